"""Combine the partials of split keys: one program for each row of a sequence's KV head."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ...plan.decode import Decode, combine
from ...plan.scores import choose_score_mode
from ...problem import Problem
from ...rules import heads, sequence, softmax
from ..launch import SIZES, Launch, output_strides


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    partials, fixup, out, lse, cu_seqlens_q, seqused_q, s_aux,
    stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h,
    nheads_k, group, splits, num_partials, partial_rows, seqlen_q, total_q, scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, S: tl.constexpr,
    STREAM_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()  # until `decode` is done
    # Whose partials? `owner` numbers (share, KV head, block) or (sequence, KV head, block).
    local = tl.program_id(0) % partial_rows
    owner = tl.program_id(0) // partial_rows
    blocks = tl.cdiv(seqlen_q * group, BLOCK_M)
    block = owner % blocks
    head_k = owner // blocks % nheads_k
    if STREAM_K:
        b = tl.load(fixup + 2 * owner)
        count = tl.load(fixup + 2 * owner + 1)
        b = tl.where(count > 0, b, 0)  # else it was never written
        first_partial, step = 2 * owner + 1, 2 * blocks * nheads_k
    else:
        b = owner // blocks // nheads_k
        count = splits
        first_partial, step = owner * splits, 1
    i, member = heads.unpack(block * BLOCK_M + local, group)
    length_q = seqlen_q
    if cu_seqlens_q is not None:  # the caller cleared what belongs to no sequence
        offset_q, length_q = sequence.query_span(b, cu_seqlens_q, total_q)
        length_q = sequence.used_queries(b, seqused_q, tl.minimum(length_q, seqlen_q))
        out += tl.cast(offset_q, tl.int64) * stride_o_t
        if lse is not None:
            lse += offset_q
    if i >= length_q:
        count = 0
    sink = s_aux
    if s_aux is not None:
        sink = tl.load(s_aux + head_k * group + member).to(tl.float32)

    d = tl.arange(0, D)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    o = tl.zeros([1, D], tl.float32)
    all_rows = num_partials.to(tl.int64) * partial_rows
    for start in range(0, count, S):
        s = start + tl.arange(0, S)
        partial_idx = first_partial + s * step
        if STREAM_K:  # the first lies at a share's end, the others at the beginning of theirs
            partial_idx -= (s > 0).to(tl.int32)
        at = partial_idx.to(tl.int64) * partial_rows + local
        partial_m = tl.load(
            partials + all_rows * HEAD_DIM + at, mask=s < count, other=float("-inf")
        )
        partial_l = tl.load(partials + all_rows * (HEAD_DIM + 1) + at, mask=s < count, other=0.0)
        partial_o = tl.load(
            partials + at[:, None] * HEAD_DIM + d[None, :],
            mask=(s < count)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        m, l, o = softmax.merge(m, l, o, partial_m, partial_l, partial_o, scale)
    if count > 0:
        o, lse_tile = softmax.finish(m, l, o, scale, sink)
        head = head_k.to(tl.int64) * group + member
        out += b.to(tl.int64) * stride_o_b + i.to(tl.int64) * stride_o_t + head * stride_o_h
        tl.store(out + d[None, :], o.to(out.dtype.element_ty), mask=(d < HEAD_DIM)[None, :])
        if lse is not None:
            lse += b.to(tl.int64) * stride_lse_b + head * stride_lse_h + i
            tl.store(lse + tl.arange(0, 1), lse_tile)


POINTERS = ("partials", "fixup", "out", "lse", "cu_seqlens_q", "seqused_q", "s_aux")


def launch(
    p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Decode, group: int
) -> Launch:
    """The launch that combines partials into out and lse; `group` heads are packed into rows."""
    head_dim, chosen = p.v.shape[-1], combine(p, plan)
    constants = (
        *output_strides(p, out, lse)[:5], p.q.shape[-2] // group, group, plan.splits,
        plan.num_partials, plan.rows, p.seqlen_q, p.q.shape[0], choose_score_mode(p).scale,
        head_dim, triton.next_power_of_2(head_dim), plan.tiles.block_m, chosen.at_once,
        plan.stream_k, plan.overlapped,
    )  # fmt: skip
    return Launch(
        combine_kernel, chosen.programs, POINTERS, constants, chosen.num_warps,
        launch_pdl=plan.overlapped,
    )  # fmt: skip
