"""Algorithm 1 of FlashAttention-2 (arXiv:2307.08691) in Triton, for every NVIDIA GPU from SM 80.

One program owns BLOCK_M query rows of one head. It asks the rules which keys they see, walks the
key tiles that the mask cuts with a mask and the clear ones without, and writes its rows of the
output once.
"""

import torch
import triton
import triton.language as tl

from ..plan import Forward
from ..problem import Problem
from ..rules import heads, mask, sequence, softmax, work
from .attend import attend, in_eights, load_rows
from .launch import MAX_INT, SIZES, Launch, changes, eights, padded, strides, twins, where, wide


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, lse,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table,
    cache_batch_idx, cache_leftpad, alibi_slopes, s_aux, aux,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_o_b, stride_o_t, stride_o_h,
    stride_lse_b, stride_lse_h, stride_table,
    batch, nheads, group, tiles, per_group,
    seqlen_q, seqlen_k, total_q, total_k, num_pages, cache_rows,
    scale, left, right, appended, stride_slopes, factor, softcap,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, TWINS: tl.constexpr,
    EIGHTS: tl.constexpr, SCORES: tl.constexpr, SCORE_MOD: tl.constexpr,
):  # fmt: skip
    stride_q_b, stride_q_t, stride_q_h = in_eights(stride_q_b, stride_q_t, stride_q_h, EIGHTS & 1)
    stride_k_b, stride_k_t, stride_k_h = in_eights(stride_k_b, stride_k_t, stride_k_h, EIGHTS & 2)
    stride_v_b, stride_v_t, stride_v_h = in_eights(stride_v_b, stride_v_t, stride_v_h, EIGHTS & 4)
    stride_o_b, stride_o_t, stride_o_h = in_eights(stride_o_b, stride_o_t, stride_o_h, EIGHTS & 8)

    # Which rows are mine?
    b, head, first_q, rows_q, writable, first = work.queries(
        tl.program_id(0), cu_seqlens_q, seqused_q, batch, nheads, tiles, per_group, seqlen_q,
        total_q, BLOCK_M,
    )  # fmt: skip
    entry = b
    b = b.to(tl.int64)
    i = first + tl.arange(0, BLOCK_M)

    # Which keys are theirs?
    first_k, length_k = work.keys(b, cu_seqlens_k, seqused_k, seqlen_k, total_k, appended, rows_q)
    row_k = b
    if cache_batch_idx is not None:
        row_k, there = sequence.cache_row(b, cache_batch_idx, cache_rows)
        row_k = row_k.to(tl.int64)
        length_k = tl.where(there, length_k, 0)
    pad = cache_leftpad
    if cache_leftpad is not None:
        pad = sequence.first_key(b, cache_leftpad, length_k)
    changes = (factor, softcap, alibi_slopes, aux)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_slopes + head)
        changes = (factor, softcap, slope, aux)
    sink = s_aux
    if s_aux is not None:
        sink = tl.load(s_aux + head).to(tl.float32)

    q += b * stride_q_b + head.to(tl.int64) * stride_q_h
    row_q = (first_q + i).to(tl.int64)
    q_tile = load_rows(q, row_q * stride_q_t, i < rows_q, False, HEAD_DIM, D)
    k += heads.kv_head(head, group).to(tl.int64) * stride_k_h
    v += heads.kv_head(head, group).to(tl.int64) * stride_v_h
    if PAGE_SIZE == 0:
        k += row_k * stride_k_b + tl.cast(first_k, tl.int64) * stride_k_t
        v += row_k * stride_v_b + tl.cast(first_k, tl.int64) * stride_v_t
    else:
        block_table += row_k * stride_table

    m = tl.full([BLOCK_M], 0.0 if SCORES == "bounded" else float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, D_V], tl.float32)
    diagonal = length_k - rows_q
    begin, clear_begin, clear_end, end = work.key_tiles(
        first, rows_q, length_k, left, right, pad, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    seen = i
    if SCORES == "bounded":  # here, for counting after the loop made ptxas serialise the products
        seen = mask.count(i, diagonal, left, right, pad, length_k, LEFT, RIGHT)
    # With cut tiles on both sides one loop, or three would drain the pipeline three times.
    stop = end if LEFT else clear_end
    m, l, o = attend(
        m, l, o, q_tile, i, begin, clear_begin, clear_end, stop, LEFT, k, v, stride_k_t, stride_v_t,
        stride_k_b, stride_v_b, block_table, num_pages, diagonal, left, right, pad, length_k, scale,
        entry, head, changes, LEFT, RIGHT, PAGE_SIZE, HEAD_DIM, BLOCK_N, D, HEAD_DIM_V, D_V, WIDE,
        TWINS, SCORES, SCORE_MOD,
    )  # fmt: skip
    if not LEFT:
        m, l, o = attend(
            m, l, o, q_tile, i, clear_end, 0, 0, end, True, k, v, stride_k_t, stride_v_t,
            stride_k_b, stride_v_b, block_table, num_pages, diagonal, left, right, pad, length_k,
            scale, entry, head, changes, LEFT, RIGHT, PAGE_SIZE, HEAD_DIM, BLOCK_N, D, HEAD_DIM_V,
            D_V, WIDE, TWINS, SCORES, SCORE_MOD,
        )  # fmt: skip

    if SCORES == "bounded":
        o = o * softmax.unrounded(l, seen, q.dtype.element_ty)[:, None]
    o, lse_tile = softmax.finish(m, l, o, scale, sink)
    if cu_seqlens_q is not None:  # rows after the last sequence's end
        o = tl.where((i < rows_q)[:, None], o, 0.0)
        lse_tile = tl.where(i < rows_q, lse_tile, float("-inf"))
    out += b * stride_o_b + head.to(tl.int64) * stride_o_h
    d_v = tl.arange(0, D_V)
    tl.store(
        out + row_q[:, None] * stride_o_t + d_v[None, :],
        o.to(out.dtype.element_ty),
        mask=(i < writable)[:, None] & (d_v < HEAD_DIM_V)[None, :],
    )
    if lse is not None:
        lse += b * stride_lse_b + head.to(tl.int64) * stride_lse_h
        tl.store(lse + row_q, lse_tile, mask=i < writable)


POINTERS = (
    "q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "block_table", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "s_aux", "aux",
)  # fmt: skip


def launch(p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Forward) -> Launch:
    """The launch that writes attention of p to out, and its LSE where that is wanted."""
    tiles = plan.tiles
    nheads, head_dim, head_dim_v = *p.q.shape[-2:], p.v.shape[-1]
    paged = p.block_table is not None
    change = changes(p, "bounded")
    constants = (
        *strides(p.q), *strides(p.k), *strides(p.v), *where(p, out, lse),
        p.batch, nheads, p.group, plan.rows, plan.per_group,
        p.seqlen_q, p.seqlen_k, p.q.shape[0], MAX_INT if paged else p.k.shape[0], p.k.shape[0],
        p.cache_rows,
        change.scale, p.left, p.right, p.appended, *change.numbers,
        p.left >= 0, p.right >= 0, p.page_size, head_dim, padded(head_dim, head_dim_v),
        head_dim_v, padded(head_dim_v, head_dim), tiles.block_m, tiles.block_n,
        wide(p, tiles.block_n), twins(p, tiles.block_n), eights(p.q, p.k, p.v, out), *change.flags,
    )  # fmt: skip
    return Launch(forward_kernel, plan.rows * plan.units, POINTERS, constants, *tiles[2:])
