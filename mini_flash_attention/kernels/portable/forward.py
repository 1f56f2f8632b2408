"""Algorithm 1 of FlashAttention-2 (arXiv:2307.08691) in Triton, for every NVIDIA GPU from SM 80.

One program owns BLOCK_M query rows of one head. It asks the rules which keys they see, visits the
full key blocks without a mask and the partial ones with it, and writes its rows of the output once.
"""

import torch
import triton
import triton.language as tl

from ...plan.forward import Forward
from ...plan.layout import strides
from ...plan.scores import choose_score_mode
from ...problem import Problem
from ...rules import dropout as dropouts
from ...rules import heads, mask, scores, sequence, softmax, work
from ...rules.window import Window
from ..launch import MAX_INT, SIZES, Launch, output_strides
from .attend import attend
from .loads import (
    KeysValues,
    Strides,
    config,
    dropped,
    hint_divisibility,
    load_rows,
    sequence_start,
)


@triton.jit
def store_rows(out, offset, o, row_ok, C: tl.constexpr):
    """Write the rows of o [M, D] to out + offset [M, 1]."""
    d_v = tl.arange(0, C.D_V)
    wanted = row_ok[:, None] & (d_v < C.HEAD_DIM_V)[None, :]
    tl.store(out + offset + d_v[None, :], o.to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, lse,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table,
    cache_batch_idx, cache_leftpad, alibi_slopes, s_aux, aux, dropout_seed,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_o_b, stride_o_t, stride_o_h,
    stride_lse_b, stride_lse_h, stride_table,
    batch, nheads, group, num_m_blocks, l2_group,
    seqlen_q, seqlen_k, total_q, total_k, num_pages, cache_rows,
    scale, left, right, appended, stride_slopes, factor, softcap, threshold, kept_scale,
    C: tl.constexpr, SCORE_MOD: tl.constexpr,
):  # fmt: skip
    strides = hint_divisibility(
        Strides(
            stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
            stride_v_b, stride_v_t, stride_v_h, stride_o_b, stride_o_t, stride_o_h,
        ),
        C,
    )  # fmt: skip
    lengths = sequence.Lengths(
        cu_seqlens_q, seqused_q, seqlen_q, total_q, cu_seqlens_k, seqused_k, seqlen_k, total_k,
        appended, cache_batch_idx, cache_leftpad, cache_rows,
    )  # fmt: skip
    BLOCK_M: tl.constexpr = C.BLOCK_M
    D_V: tl.constexpr = C.D_V

    # Which rows are mine?
    table = work.Grid(batch, nheads, num_m_blocks, l2_group)
    tile = work.work_tile(tl.program_id(0), lengths, table, BLOCK_M)
    b = tile.b.to(tl.int64)
    head = tile.head
    i = tile.m_row + tl.arange(0, BLOCK_M)

    # Which keys are theirs?
    offset_k, length_k = work.key_span(b, lengths, tile.num_rows)
    row_k, first_key = b, cache_leftpad
    if cache_batch_idx is not None:
        row_k, length_k = work.cache_row(b, lengths, length_k)
    if cache_leftpad is not None:
        first_key = sequence.first_key(b, cache_leftpad, length_k)
    slope, sink = alibi_slopes, s_aux
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_slopes + head)
    if s_aux is not None:
        sink = tl.load(s_aux + head).to(tl.float32)
    modification = scores.Modification(factor, softcap, slope, aux)
    dropout = dropout_seed
    if dropout_seed is not None:
        dropout = dropouts.Dropout(tl.load(dropout_seed), threshold, kept_scale)
    scoring = scores.Scoring(scale, tile.b, head, modification, dropout)

    q += b * strides.q_b + head.to(tl.int64) * strides.q_h
    row_q = (tile.offset_q + i).to(tl.int64)
    q_tile = load_rows(q, row_q * strides.q_t, i < tile.num_rows, False, C.HEAD_DIM, C.D)
    head_k, row_k = heads.kv_head(head, group).to(tl.int64), row_k.to(tl.int64)
    k, v = sequence_start(k, v, strides, head_k, row_k, offset_k, C)
    if C.PAGE_SIZE:
        block_table += row_k * stride_table
    at = KeysValues(
        k, v, strides.k_t, strides.v_t, strides.k_b, strides.v_b, block_table, num_pages
    )

    m = tl.full([BLOCK_M], 0.0 if C.SCORE_MODE == "bounded" else float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, D_V], tl.float32)
    window = Window(length_k - tile.num_rows, left, right, first_key, length_k)
    seen = work.n_block_range(tile.m_row, tile.num_rows, window, BLOCK_M, C.BLOCK_N)
    count = i
    if C.SCORE_MODE == "bounded":  # counting after the loop made ptxas serialise the products
        count = mask.num_visible(i, window)
    # One loop if blocks are partial on both sides: three would drain the pipeline of loads thrice.
    if left is not None:
        m, l, o = attend(m, l, o, q_tile, i, seen, True, at, window, scoring, C, SCORE_MOD)
    else:
        full = mask.KeyBlocks(seen.begin, seen.full_begin, seen.full_end, seen.full_end)
        m, l, o = attend(m, l, o, q_tile, i, full, False, at, window, scoring, C, SCORE_MOD)
        partial = mask.KeyBlocks(seen.full_end, 0, 0, seen.end)
        m, l, o = attend(m, l, o, q_tile, i, partial, True, at, window, scoring, C, SCORE_MOD)

    if C.SCORE_MODE == "bounded":
        o = o * softmax.single_key_factor(l, count, q.dtype.element_ty)[:, None]
    o, lse_tile = softmax.finish(m, l, o, scale, sink)
    if dropout_seed is not None:
        o = o * kept_scale
    if cu_seqlens_q is not None:  # rows after the last sequence's end
        o = tl.where((i < tile.num_rows)[:, None], o, 0.0)
        lse_tile = tl.where(i < tile.num_rows, lse_tile, float("-inf"))
    out += b * strides.o_b + head.to(tl.int64) * strides.o_h
    store_rows(out, row_q[:, None] * strides.o_t, o, i < tile.writable, C)
    if lse is not None:
        lse += b * stride_lse_b + head.to(tl.int64) * stride_lse_h
        tl.store(lse + row_q, lse_tile, mask=i < tile.writable)


POINTERS = (
    "q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "block_table", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "s_aux", "aux",
    "dropout_seed",
)  # fmt: skip


def launch(p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Forward) -> Launch:
    """The launch that writes attention of p to out, and its LSE where that is wanted."""
    tiles = plan.tiles
    paged = p.cache.block_table is not None
    own = () if p.options.dropout_p else ("bounded",)
    score_mode = choose_score_mode(p, *own)
    constants = (
        *strides(p.q), *strides(p.k), *strides(p.v), *output_strides(p, out, lse),
        p.batch, p.q.shape[-2], p.group, plan.num_m_blocks, plan.l2_group,
        p.seqlen_q, p.seqlen_k, p.q.shape[0], MAX_INT if paged else p.k.shape[0], p.k.shape[0],
        p.cache_rows,
        score_mode.scale, p.options.left, p.options.right, p.cache.appended, *score_mode.numbers,
        *dropped(p), config(p, out, tiles, score_mode.mode), p.scores.score_mod,
    )  # fmt: skip
    return Launch(
        forward_kernel, plan.num_m_blocks * plan.batch_heads, POINTERS, constants, *tiles[2:]
    )
