"""Fold the parts that split keys left: one program for each query token and head."""

import math

import torch
import triton
import triton.language as tl

from ..plan import Decode
from ..problem import Problem
from ..rules import softmax
from .launch import Launch, strides

LOG2E = math.log2(math.e)


@triton.jit(
    do_not_specialize=["stride_lse_b", "stride_lse_h", "batch", "seqlen_q", "nheads", "splits"]
)
def combine_kernel(
    part_out, part_max, part_sum, out, lse,
    stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h,
    batch, seqlen_q, nheads, splits, scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of (batch, seqlen_q, nheads)
    rows = batch.to(tl.int64) * seqlen_q * nheads
    head = row % nheads
    i = row // nheads % seqlen_q
    b = row // nheads // seqlen_q
    s = tl.arange(0, S)
    d = tl.arange(0, D)
    there = s < splits
    at = s * rows + (b * nheads + head) * seqlen_q + i
    m = tl.load(part_max + at, mask=there, other=float("-inf"))
    l = tl.load(part_sum + at, mask=there, other=0.0)
    o = tl.load(
        part_out + (s * rows + row)[:, None] * HEAD_DIM + d[None, :],
        mask=there[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    m, l, o = softmax.merge(m, l, o, scale)
    o, lse_tile = softmax.finish(m, l, o, scale)  # [1, D], [1]
    out += b * stride_o_b + i * stride_o_t + head * stride_o_h
    tl.store(out + d[None, :], o.to(out.dtype.element_ty), mask=(d < HEAD_DIM)[None, :])
    if lse is not None:
        lse += b * stride_lse_b + head * stride_lse_h + i
        tl.store(lse + tl.arange(0, 1), lse_tile)


def launch(p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Decode) -> Launch:
    """The launch that folds the parts that `decode` left to out and lse."""
    nheads, head_dim = p.q.shape[-2:]
    lse_strides = (0, 0) if lse is None else (lse.stride(0), lse.stride(1))
    constants = (
        *strides(out), *lse_strides, p.batch, p.seqlen_q, nheads, plan.splits,
        p.softmax_scale * LOG2E,
        head_dim, triton.next_power_of_2(head_dim), triton.next_power_of_2(plan.splits),
    )  # fmt: skip
    pointers = ("part_out", "part_max", "part_sum", "out", "lse")
    rows = p.batch * p.seqlen_q * nheads
    return Launch(combine_kernel, rows, pointers, constants, 4 if head_dim > 32 else 1)
