"""Attention of few queries to a long cache: the keys are read once, at the speed of memory.

All query heads that share a KV head, and all query tokens, are packed into the rows of one tile,
so a key is loaded once for all of them. Where that leaves too few programs to fill the GPU, the
keys are split: each program takes a part, and `combine.py` folds the parts.
Source: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
"""

import math

import torch
import triton
import triton.language as tl

from ..plan import Decode
from ..problem import Problem
from ..rules import heads, mask, sequence, softmax, split
from .attend import attend
from .launch import Launch, strides, twins, wide

LOG2E = math.log2(math.e)


@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "stride_table", "nheads_k", "group", "splits",
        "seqlen_q", "seqlen_k", "num_pages", "left", "right", "appended",
    ]
)  # fmt: skip
def decode_kernel(
    q, k, v, out, lse, sums, seqused_k, block_table,
    stride_q_b, stride_q_t, stride_q_h,
    stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h,
    stride_o_s, stride_o_b, stride_o_t, stride_o_h,
    stride_lse_s, stride_lse_b, stride_lse_h, stride_table,
    nheads_k, group, splits,
    seqlen_q, seqlen_k, num_pages,
    scale, left, right, appended,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, TWINS: tl.constexpr,
):  # fmt: skip
    # Which rows are mine? Row r is query token r // group of head r % group in the KV head's group.
    program = tl.program_id(0)
    part = program % splits
    rows = seqlen_q * group
    blocks = tl.cdiv(rows, BLOCK_M)
    block = program // splits % blocks
    unit = program // splits // blocks
    head_k = (unit % nheads_k).to(tl.int64)
    b = (unit // nheads_k).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i, member = heads.unpack(row, group)
    head = head_k * group + member

    # Which keys are theirs, and which of those mine?
    length_k = seqlen_k
    if seqused_k is not None:
        length_k = sequence.used_length(b, seqused_k, appended, seqlen_k)
    diagonal = length_k - seqlen_q
    first = block * BLOCK_M // group
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group, seqlen_q - 1)
    begin, clear_begin, clear_end, end = mask.key_tiles(
        first, last, diagonal, left, right, length_k, BLOCK_N, LEFT, RIGHT
    )
    begin, end = split.part(begin, end, part, splits, BLOCK_N)
    clear_begin = sequence.clamp(clear_begin, begin, end)
    clear_end = sequence.clamp(clear_end, clear_begin, end)

    d = tl.arange(0, D)
    wanted = (row < rows)[:, None] & (d < HEAD_DIM)[None, :]
    q_tile = tl.load(
        q
        + b * stride_q_b
        + (i.to(tl.int64) * stride_q_t + head * stride_q_h)[:, None]
        + d[None, :],
        mask=wanted,
        other=0.0,
    )
    k += head_k * stride_k_h
    v += head_k * stride_v_h
    if PAGE_SIZE == 0:
        k += b * stride_k_b
        v += b * stride_v_b
    else:
        block_table += b * stride_table

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, D], tl.float32)
    if LEFT:
        m, l, o = attend(
            m, l, o, q_tile, i, begin, clear_begin, True,
            k, v, stride_k_t, stride_v_t, stride_k_b, stride_v_b, block_table, num_pages,
            diagonal, left, right, length_k, scale,
            LEFT, RIGHT, PAGE_SIZE, HEAD_DIM, BLOCK_N, D, WIDE, TWINS,
        )  # fmt: skip
    m, l, o = attend(
        m, l, o, q_tile, i, clear_begin, clear_end, False,
        k, v, stride_k_t, stride_v_t, stride_k_b, stride_v_b, block_table, num_pages,
        diagonal, left, right, length_k, scale,
        LEFT, RIGHT, PAGE_SIZE, HEAD_DIM, BLOCK_N, D, WIDE, TWINS,
    )  # fmt: skip
    m, l, o = attend(
        m, l, o, q_tile, i, clear_end, end, True,
        k, v, stride_k_t, stride_v_t, stride_k_b, stride_v_b, block_table, num_pages,
        diagonal, left, right, length_k, scale,
        LEFT, RIGHT, PAGE_SIZE, HEAD_DIM, BLOCK_N, D, WIDE, TWINS,
    )  # fmt: skip

    o, lse_tile = softmax.finish(m, l, o, scale)
    out += part.to(tl.int64) * stride_o_s + b * stride_o_b
    tl.store(
        out + (i.to(tl.int64) * stride_o_t + head * stride_o_h)[:, None] + d[None, :],
        o.to(out.dtype.element_ty),
        mask=wanted,
    )
    at = part.to(tl.int64) * stride_lse_s + b * stride_lse_b + head * stride_lse_h + i
    if sums is not None:  # a part: `combine` wants its state
        tl.store(lse + at, m, mask=row < rows)
        tl.store(sums + at, l, mask=row < rows)
    elif lse is not None:
        tl.store(lse + at, lse_tile, mask=row < rows)


POINTERS = ("q", "k", "v", "out", "lse", "nothing", "seqused_k", "block_table")
SPLIT_POINTERS = (
    "q", "k", "v", "part_out", "part_max", "part_sum", "seqused_k", "block_table",
)  # fmt: skip


def parts(p: Problem, plan: Decode) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shapes (fp32) of what splits leave: outputs; maxima and sums. None without splits."""
    if plan.splits == 1:
        return None
    nheads, head_dim = p.q.shape[-2:]
    return (
        (plan.splits, p.batch, p.seqlen_q, nheads, head_dim),
        (plan.splits, p.batch, nheads, p.seqlen_q),
    )


def launch(p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Decode) -> Launch:
    """The launch that writes attention of p to out and lse, or to the parts if keys are split."""
    tiles = plan.tiles
    nheads, head_dim = p.q.shape[-2:]
    nheads_k = p.k.shape[-2]
    split = plan.splits > 1
    if split:
        row, rows = nheads * head_dim, p.batch * p.seqlen_q * nheads
        out_strides = (rows * head_dim, p.seqlen_q * row, row, head_dim)
        lse_strides = (rows, nheads * p.seqlen_q, p.seqlen_q)
    else:
        out_strides = (0, *strides(out))
        lse_strides = (0, 0, 0) if lse is None else (0, lse.stride(0), lse.stride(1))
    constants = (
        *strides(p.q), *strides(p.k), *strides(p.v), *out_strides, *lse_strides,
        p.block_table.stride(0) if p.block_table is not None else 0,
        nheads_k, nheads // nheads_k, plan.splits,
        p.seqlen_q, p.seqlen_k, p.k.shape[0],
        p.softmax_scale * LOG2E, p.left, p.right, p.appended,
        p.left >= 0, p.right >= 0, p.page_size,
        head_dim, max(16, triton.next_power_of_2(head_dim)), tiles.block_m, tiles.block_n,
        wide(p, tiles.block_n), twins(p, tiles.block_n),
    )  # fmt: skip
    return Launch(
        decode_kernel, plan.programs, SPLIT_POINTERS if split else POINTERS, constants,
        tiles.num_warps, tiles.num_stages,
    )  # fmt: skip
