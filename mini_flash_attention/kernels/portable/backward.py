"""The backward pass in Triton: Algorithm 2 of FlashAttention-2, in two kernels.

P is recomputed block by block from the scores S and the forward's LSE. With `delta`, the row sums
of dO * O, less the gradient of the LSE:

    dV = Pᵀ dO      dP = dO Vᵀ      dS = P * (dP - delta)      dQ = dS K      dK = dSᵀ Q

One kernel owns blocks of keys and goes through the queries that see them, for dK and dV; the other
owns blocks of queries and goes through their keys, for dQ. S and dP are computed in both, so there
are 7 products instead of 5. In exchange nothing is added up in memory: there are no atomic
operations and no fp32 copy of dQ, and every run gives the same bits.

Source: FlashAttention-2, arXiv:2307.08691, Algorithm 2.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ...plan.backward import Backward, BackwardTensors, Work
from ...plan.layout import strides
from ...plan.scores import LOG2E, choose_score_mode
from ...problem import Problem
from ...rules import dropout as dropouts
from ...rules import heads, scores, sequence, work
from ...rules.window import Window
from ..launch import SIZES, Launch
from .backward_loads import config, head_of, load_block, store_block, tensor
from .backward_loops import KeyBlock, Keys, Queries, Query, Weights, add_keys, add_queries
from .backward_preprocess import preprocess
from .loads import dropped


@triton.jit
def row_of(b, head, nheads, offset_q, total_q, cu_seqlens_q):
    """Where the queries of a head begin in `lse_log2` and `delta`."""
    batch_head = tl.cast(head, tl.int64)
    if cu_seqlens_q is None:
        batch_head += tl.cast(b, tl.int64) * nheads
    return batch_head * total_q + offset_q


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    q, k, v, dout, lse_log2, delta, dk, dv,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, aux, dropout_seed,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
    stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
    batch, nheads_k, num_n_blocks, l2_group, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, stride_slopes, factor, softcap, softmax_scale, threshold, kept_scale,
    C: tl.constexpr, SCORE_MOD: tl.constexpr, SCORE_MOD_BWD: tl.constexpr,
):  # fmt: skip
    q = tensor(q, stride_q_b, stride_q_t, stride_q_h, C.DIVISIBLE_BY_8 & 1)
    k = tensor(k, stride_k_b, stride_k_t, stride_k_h, C.DIVISIBLE_BY_8 & 2)
    v = tensor(v, stride_v_b, stride_v_t, stride_v_h, C.DIVISIBLE_BY_8 & 4)
    dout = tensor(dout, stride_do_b, stride_do_t, stride_do_h, C.DIVISIBLE_BY_8 & 8)
    dk = tensor(dk, stride_dk_b, stride_dk_t, stride_dk_h, C.DIVISIBLE_BY_8 & 16)
    dv = tensor(dv, stride_dv_b, stride_dv_t, stride_dv_h, C.DIVISIBLE_BY_8 & 32)
    BLOCK_N: tl.constexpr = C.BLOCK_N

    # Which keys are mine? The rules know queries that see keys; here keys are what sees queries, so
    # lengths and window are handed to them with the two exchanged. The first keys of a head come
    # first: under a causal mask most queries see them.
    by_key = sequence.Lengths(
        cu_seqlens_k, seqused_k, seqlen_k, total_k, cu_seqlens_q, seqused_q, seqlen_q, total_q,
        0, None, None, 0,
    )  # fmt: skip
    table = work.Grid(batch, nheads_k, num_n_blocks, l2_group)
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = work.work_tile(number, by_key, table, BLOCK_N)
    b, head_k, num_keys = tile.b, tile.head, tile.num_rows
    at_k = head_of(k, b, tile.offset_q, head_k)
    at_v = head_of(v, b, tile.offset_q, head_k)
    k_tile = load_block(at_k, k.stride_t, tile.m_row, num_keys, BLOCK_N, C.HEAD_DIM, C)
    v_tile = load_block(at_v, v.stride_t, tile.m_row, num_keys, BLOCK_N, C.HEAD_DIM_V, C)

    # Which queries see them?
    offset_q, length_q = work.key_span(b, by_key, 0)
    window = Window(num_keys - length_q, left, right, None, num_keys)
    from_keys = Window(length_q - num_keys, right, left, None, length_q)
    seen = work.n_block_range(tile.m_row, num_keys, from_keys, BLOCK_N, C.BLOCK_M)
    dk_tile = tl.zeros([BLOCK_N, C.D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, C.D_V], tl.float32)
    row = row_of(b, head_k * C.GROUP, nheads_k * C.GROUP, offset_q, total_q, cu_seqlens_q)
    queries = Queries(
        head_of(q, b, offset_q, head_k * C.GROUP), head_of(dout, b, offset_q, head_k * C.GROUP),
        q.stride_t, dout.stride_t, q.stride_h, dout.stride_h, lse_log2 + row, delta + row,
        total_q, length_q,
    )  # fmt: skip
    inputs = scores.Inputs(scale, factor, softcap, aux, alibi_slopes, stride_slopes, None)
    dropout = dropout_seed
    if dropout_seed is not None:
        dropout = dropouts.Dropout(tl.load(dropout_seed), threshold, kept_scale)
    weights = Weights(inputs, b, window, dropout)
    keys = KeyBlock(k_tile, v_tile, head_k, tile.m_row)
    if not C.ONE_LOOP:
        dk_tile, dv_tile = add_queries(
            dk_tile, dv_tile, keys, queries, seen, weights, False, C, SCORE_MOD, SCORE_MOD_BWD
        )
    dk_tile, dv_tile = add_queries(
        dk_tile, dv_tile, keys, queries, seen, weights, True, C, SCORE_MOD, SCORE_MOD_BWD
    )
    at_dk = head_of(dk, b, tile.offset_q, head_k)
    at_dv = head_of(dv, b, tile.offset_q, head_k)
    dk_tile = dk_tile * softmax_scale
    store_block(at_dk, dk.stride_t, tile.m_row, dk_tile, num_keys, tile.writable, C.HEAD_DIM)
    store_block(at_dv, dv.stride_t, tile.m_row, dv_tile, num_keys, tile.writable, C.HEAD_DIM_V)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q, k, v, dout, lse_log2, delta, dq,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, aux, dropout_seed,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
    stride_dq_b, stride_dq_t, stride_dq_h,
    batch, nheads, num_m_blocks, l2_group, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, stride_slopes, factor, softcap, softmax_scale, threshold, kept_scale,
    C: tl.constexpr, SCORE_MOD: tl.constexpr, SCORE_MOD_BWD: tl.constexpr,
):  # fmt: skip
    q = tensor(q, stride_q_b, stride_q_t, stride_q_h, C.DIVISIBLE_BY_8 & 1)
    k = tensor(k, stride_k_b, stride_k_t, stride_k_h, C.DIVISIBLE_BY_8 & 2)
    v = tensor(v, stride_v_b, stride_v_t, stride_v_h, C.DIVISIBLE_BY_8 & 4)
    dout = tensor(dout, stride_do_b, stride_do_t, stride_do_h, C.DIVISIBLE_BY_8 & 8)
    dq = tensor(dq, stride_dq_b, stride_dq_t, stride_dq_h, C.DIVISIBLE_BY_8 & 16)
    BLOCK_M: tl.constexpr = C.BLOCK_M

    # Which queries are mine, and which keys do they see?
    lengths = sequence.Lengths(
        cu_seqlens_q, seqused_q, seqlen_q, total_q, cu_seqlens_k, seqused_k, seqlen_k, total_k,
        0, None, None, 0,
    )  # fmt: skip
    table = work.Grid(batch, nheads, num_m_blocks, l2_group)
    tile = work.work_tile(tl.program_id(0), lengths, table, BLOCK_M)
    b, head, length_q = tile.b, tile.head, tile.num_rows
    offset_k, num_keys = work.key_span(b, lengths, length_q)
    window = Window(num_keys - length_q, left, right, None, num_keys)
    seen = work.n_block_range(tile.m_row, length_q, window, BLOCK_M, C.BLOCK_N)

    at_q, at_do = head_of(q, b, tile.offset_q, head), head_of(dout, b, tile.offset_q, head)
    q_tile = load_block(at_q, q.stride_t, tile.m_row, length_q, BLOCK_M, C.HEAD_DIM, C)
    do_tile = load_block(at_do, dout.stride_t, tile.m_row, length_q, BLOCK_M, C.HEAD_DIM_V, C)
    row = row_of(b, head, nheads, tile.offset_q + tile.m_row, total_q, cu_seqlens_q)
    row += tl.arange(0, BLOCK_M)
    query = Query(
        q_tile, do_tile, tl.load(lse_log2 + row), tl.load(delta + row), tile.m_row, length_q
    )
    head_k = heads.kv_head(head, C.GROUP)
    keys = Keys(
        head_of(k, b, offset_k, head_k), head_of(v, b, offset_k, head_k), k.stride_t, v.stride_t,
        num_keys,
    )  # fmt: skip
    inputs = scores.Inputs(scale, factor, softcap, aux, alibi_slopes, stride_slopes, None)
    dq_tile = tl.zeros([BLOCK_M, C.D], tl.float32)
    dropout = dropout_seed
    if dropout_seed is not None:
        dropout = dropouts.Dropout(tl.load(dropout_seed), threshold, kept_scale)
    weights = Weights(inputs, b, window, dropout)
    if not C.ONE_LOOP:
        dq_tile = add_keys(
            dq_tile, query, head, keys, seen, weights, False, C, SCORE_MOD, SCORE_MOD_BWD
        )
    dq_tile = add_keys(dq_tile, query, head, keys, seen, weights, True, C, SCORE_MOD, SCORE_MOD_BWD)
    at_dq = head_of(dq, b, tile.offset_q, head)
    dq_tile = dq_tile * softmax_scale
    store_block(at_dq, dq.stride_t, tile.m_row, dq_tile, length_q, tile.writable, C.HEAD_DIM)


STATISTICS = ("q", "k", "v", "dout", "lse_log2", "delta")
OPTIONS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes", "aux", "dropout_seed",
)  # fmt: skip


def launches(p: Problem, given: BackwardTensors, plan: Backward) -> list[Launch]:
    """The launches that prepare the LSE and delta, and then write dK and dV, and dQ."""
    return [
        preprocess(p, given, plan.preprocess, LOG2E),
        _launch(p, given, dkdv_kernel, plan.dkdv, p.k.shape[-2], {"dk": given.dk, "dv": given.dv}),
        _launch(p, given, dq_kernel, plan.dq, p.q.shape[-2], {"dq": given.dq}),
    ]


def _launch(
    p: Problem, given: BackwardTensors, kernel: Any, work: Work, nheads: int,
    results: dict[str, torch.Tensor],
) -> Launch:  # fmt: skip
    """The launch of a kernel that owns blocks of `nheads` heads, and writes `results`."""
    tensors = (p.q, p.k, p.v, given.dout, *results.values())
    options = p.options
    mode = choose_score_mode(p)
    constants = (
        *(step for x in tensors for step in strides(x)),
        p.batch, nheads, work.num_blocks, work.l2_group,
        p.seqlen_q, p.seqlen_k, p.q.shape[-3], p.k.shape[-3],
        mode.scale, options.left, options.right, *mode.numbers, options.softmax_scale,
        *dropped(p),
        config(p, work.tiles, mode.mode, *tensors),
        p.scores.score_mod, p.scores.score_mod_bwd,
    )  # fmt: skip
    pointers = (*STATISTICS, *results, *OPTIONS)
    return Launch(kernel, work.programs, pointers, constants, *work.tiles[2:])
