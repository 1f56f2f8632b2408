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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...plan.backward import Backward, Work
from ...plan.configs import Tiles
from ...plan.layout import divisible_by_8, padded, strides
from ...plan.scores import LOG2E, choose_score_mode
from ...problem import BackwardTensors, Problem
from ...rules import dropout as dropouts
from ...rules import heads, mask, scores, sequence, work
from ...rules.window import Window
from ..launch import SIZES, CompileTime, Launch
from .loads import as_multiples_of_8, dropped, load_rows


class Facts(NamedTuple):
    """What a kernel is compiled for."""

    HEAD_DIM: Any
    D: Any  # columns of a tile that holds HEAD_DIM
    HEAD_DIM_V: Any
    D_V: Any
    INT64_OFFSETS: Any
    DIVISIBLE_BY_8: Any
    BLOCK_M: Any
    BLOCK_N: Any
    SCORE_MODE: Any  # `scores.bias`
    GROUP: Any  # query heads of a KV head
    ONE_LOOP: Any  # over full and partial blocks: where many are partial, or registers are short


class Config(CompileTime, Facts):
    """`Facts`, as kernels take them."""

    __slots__ = ()


class Tensor(NamedTuple):
    """A tensor, and its (batch, token, head) strides."""

    base: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any


class Queries(NamedTuple):
    """The queries of a KV head's group of heads in a sequence, from the first."""

    q: Any
    do: Any
    stride_q: Any  # from query to query
    stride_do: Any
    head_stride_q: Any
    head_stride_do: Any
    lse_log2: Any  # in powers of two; readable for a block past the last query
    delta: Any
    head_stride: Any  # of lse_log2 and delta
    count: Any


class Keys(NamedTuple):
    """The keys of one KV head of a sequence, from its first."""

    k: Any
    v: Any
    stride_k: Any  # from key to key
    stride_v: Any
    count: Any


class Query(NamedTuple):
    """A block of queries, loaded."""

    q: Any  # [M, D]
    do: Any  # [M, D_V]
    lse_log2: Any  # [M]
    delta: Any  # [M]
    start: Any  # the first one
    count: Any  # of the sequence


class Weights(NamedTuple):
    """How scores become weights."""

    inputs: Any
    b: Any
    window: Any
    dropout: Any  # None without


@triton.jit
def tensor(base, stride_b, stride_t, stride_h, DIVISIBLE_BY_8: tl.constexpr):
    """A `Tensor`, with strides in a form that tells the compiler what they are multiples of."""
    b, t, h = as_multiples_of_8(stride_b, stride_t, stride_h, DIVISIBLE_BY_8)
    return Tensor(base, b, t, h)


@triton.jit
def head_of(x, b, first, head):
    """Where the rows of a head begin, in a sequence whose first row is `first`."""
    at = x.base + tl.cast(b, tl.int64) * x.stride_b + tl.cast(head, tl.int64) * x.stride_h
    return at + tl.cast(first, tl.int64) * x.stride_t


@triton.jit
def load_block(
    base, stride, start, count, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, C: tl.constexpr,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """BLOCK rows from row `start`, zero past HEAD_DIM and from row `count` on. WHOLE: that does not
    come.

    Offsets inside a block fit in 32 bits unless INT64_OFFSETS.
    """
    n = tl.arange(0, BLOCK)
    D: tl.constexpr = C.D if HEAD_DIM == C.HEAD_DIM else C.D_V
    base += tl.cast(start, tl.int64) * stride
    offset = tl.cast(n, tl.int64) * stride if C.INT64_OFFSETS else n * stride
    return load_rows(base, offset, start + n < count, WHOLE, HEAD_DIM, D)


@triton.jit
def slope_of(head, weights):
    """ALiBi's slope of a head."""
    row = tl.cast(weights.b, tl.int64) * weights.inputs.stride_slopes
    return tl.load(weights.inputs.alibi_slopes + row + head)


@triton.jit
def weigh(
    s, lse_log2, head, i, start, n, modification, weights, C: tl.constexpr, SCORE_MOD: tl.constexpr
):
    """(the weights P of raw scores s, the scores that a score_mod is given).

    P is at most 1. The LSE is rounded, and S is not computed by the forward's product: where scores
    are huge, their difference may be far above 0, and its exponential infinite.
    """
    biased = scores.bias(s, i, start, n, modification, C.SCORE_MODE, SCORE_MOD)
    changed = biased
    if SCORE_MOD is not None:
        aux = modification.aux
        changed = scores.apply(biased, weights.b, head, i, start + n, aux, SCORE_MOD)
    return tl.exp2(tl.minimum(changed * weights.inputs.scale - lse_log2, 0.0)), biased


@triton.jit
def score_gradient(
    s, biased, p, dp, delta, head, i, j, modification, weights, C: tl.constexpr,
    SCORE_MOD_BWD: tl.constexpr,
):  # fmt: skip
    """dS, of the scaled scores, for P and dP. i and j: where queries and keys stand."""
    ds = p * (dp - delta)
    if SCORE_MOD_BWD is not None or C.SCORE_MODE == "softcap":
        ds = scores.differentiate(
            ds, s, biased, weights.b, head, i, j, modification, C.SCORE_MODE, SCORE_MOD_BWD
        )
    if SCORE_MOD_BWD is not None:  # by selection: it may be given anything where P is 0
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def hide(x, i, j, num_rows, window, partial, ONE_LOOP: tl.constexpr):
    """x where query i, of so many, sees key j; elsewhere 0, whatever x is. ONE_LOOP: only if the
    block is `partial`, else all are.
    """
    if not ONE_LOOP:
        x = tl.where(mask.is_visible(i, j, window) & (i < num_rows), x, 0.0)
    else:
        if partial:
            x = tl.where(mask.is_visible(i, j, window) & (i < num_rows), x, 0.0)
    return x


@triton.jit
def add_queries(
    dk, dv, k, v, head_k, start_k, queries, blocks, weights, PARTIAL: tl.constexpr,
    C: tl.constexpr, SCORE_MOD: tl.constexpr, SCORE_MOD_BWD: tl.constexpr,
):  # fmt: skip
    """Add to dK [N, D] and dV [N, D_V] what blocks of queries give, for all heads of the group.

    PARTIAL: the blocks that may need a mask, else the full ones; all of them if C.ONE_LOOP.
    Scores are transposed, [N, M], so that P and dS are what the products need on their left.
    """
    inputs, window = weights.inputs, weights.window
    n = tl.arange(0, C.BLOCK_N)[:, None]
    j = start_k + n
    first, size = blocks.full_begin, blocks.full_end - blocks.full_begin
    if PARTIAL:
        first, size = blocks.begin, blocks.end - blocks.begin
        if not C.ONE_LOOP:
            size -= blocks.full_end - blocks.full_begin
    num_blocks = size // C.BLOCK_M
    for number in tl.range(0, C.GROUP * num_blocks):
        if C.GROUP == 1:
            member, start = 0, first + number * C.BLOCK_M
        else:
            member, start = number // num_blocks, first + number % num_blocks * C.BLOCK_M
        if PARTIAL and not C.ONE_LOOP:
            start += tl.where(start < blocks.full_begin, 0, blocks.full_end - blocks.full_begin)
        head = head_k * C.GROUP + member
        member = tl.cast(member, tl.int64)
        slope = inputs.alibi_slopes
        if inputs.alibi_slopes is not None:
            slope = slope_of(head, weights)
        modification = scores.Modification(inputs.factor, inputs.softcap, slope, inputs.aux)
        i = start + tl.arange(0, C.BLOCK_M)
        stands = (i + window.diagonal)[None, :]
        partial = (start < blocks.full_begin) | (start >= blocks.full_end)
        q = queries.q + member * queries.head_stride_q
        q = load_block(
            q, queries.stride_q, start, queries.count, C.BLOCK_M, C.HEAD_DIM, C, not PARTIAL
        )
        rows = member * queries.head_stride + i
        lse_log2 = tl.load(queries.lse_log2 + rows)[None, :]
        s = tl.dot(k, q.T)  # Sᵀ = K Qᵀ
        p, biased = weigh(
            s, lse_log2, head, stands, start_k, n, modification, weights, C, SCORE_MOD
        )
        if weights.dropout is not None:
            kept = dropouts.is_kept(weights.dropout, weights.b, head, i[None, :], j)
        if PARTIAL:
            p = hide(p, i[None, :], j, queries.count, window, partial, C.ONE_LOOP)
        do = queries.do + member * queries.head_stride_do
        do = load_block(
            do, queries.stride_do, start, queries.count, C.BLOCK_M, C.HEAD_DIM_V, C, not PARTIAL
        )
        used = p
        if weights.dropout is not None:
            used = tl.where(kept, p * weights.dropout.scale, 0.0)
        dv = tl.dot(used.to(do.dtype), do, dv)  # dV += Pᵀ dO
        dp = tl.dot(v, do.T)  # dPᵀ = V dOᵀ
        if weights.dropout is not None:
            dp = tl.where(kept, dp * weights.dropout.scale, 0.0)
        delta = tl.load(queries.delta + rows)[None, :]
        ds = score_gradient(
            s, biased, p, dp, delta, head, stands, j, modification, weights, C, SCORE_MOD_BWD
        )
        if PARTIAL:
            ds = hide(ds, i[None, :], j, queries.count, window, partial, C.ONE_LOOP)
        dk = tl.dot(ds.to(q.dtype), q, dk)  # dK += dSᵀ Q
    return dk, dv


@triton.jit
def add_keys(
    dq, query, head, keys, blocks, weights, PARTIAL: tl.constexpr, C: tl.constexpr,
    SCORE_MOD: tl.constexpr, SCORE_MOD_BWD: tl.constexpr,
):  # fmt: skip
    """Add to dQ [M, D] what blocks of keys give. PARTIAL: as in `add_queries`."""
    inputs, window = weights.inputs, weights.window
    slope = inputs.alibi_slopes
    if inputs.alibi_slopes is not None:
        slope = slope_of(head, weights)
    modification = scores.Modification(inputs.factor, inputs.softcap, slope, inputs.aux)
    i = query.start + tl.arange(0, C.BLOCK_M)[:, None]
    n = tl.arange(0, C.BLOCK_N)[None, :]
    stands = i + window.diagonal
    lse_log2, delta = query.lse_log2[:, None], query.delta[:, None]
    begin, end = blocks.begin, blocks.full_end
    if PARTIAL:
        end = blocks.end
        if not C.ONE_LOOP:
            begin = blocks.full_end
    for start in tl.range(begin, end, C.BLOCK_N):
        partial = (start < blocks.full_begin) | (start >= blocks.full_end)
        k = load_block(
            keys.k, keys.stride_k, start, keys.count, C.BLOCK_N, C.HEAD_DIM, C, not PARTIAL
        )
        s = tl.dot(query.q, k.T)  # S = Q Kᵀ
        p, biased = weigh(s, lse_log2, head, stands, start, n, modification, weights, C, SCORE_MOD)
        v = load_block(
            keys.v, keys.stride_v, start, keys.count, C.BLOCK_N, C.HEAD_DIM_V, C, not PARTIAL
        )
        dp = tl.dot(query.do, v.T)  # dP = dO Vᵀ
        if weights.dropout is not None:
            kept = dropouts.is_kept(weights.dropout, weights.b, head, i, start + n)
            dp = tl.where(kept, dp * weights.dropout.scale, 0.0)
        ds = score_gradient(
            s, biased, p, dp, delta, head, stands, start + n, modification, weights, C,
            SCORE_MOD_BWD,
        )  # fmt: skip
        if PARTIAL:
            ds = hide(ds, i, start + n, query.count, window, partial, C.ONE_LOOP)
        dq = tl.dot(ds.to(k.dtype), k, dq)  # dQ += dS K
    return dq


@triton.jit
def store_block(base, stride, start, x, used, writable, HEAD_DIM: tl.constexpr):
    """Write a tile of gradients from row `start`: zeros in rows that are writable, but not used."""
    n = start + tl.arange(0, x.shape[0])
    d = tl.arange(0, x.shape[1])
    x = tl.where((n < used)[:, None], x, 0.0)
    at = base + tl.cast(n, tl.int64)[:, None] * stride + d[None, :]
    wanted = (n < writable)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=SIZES)
def preprocess_kernel(
    out, dout, lse, dlse, lse_log2, delta, dq_accum,
    stride_o_b, stride_o_t, stride_o_h, stride_do_b, stride_do_t, stride_do_h,
    stride_lse_b, stride_lse_h, stride_dlse_b, stride_dlse_h, stride_dlse_t,
    nheads, num_m_blocks, seqlen_q, lse_factor, delta_factor,
    C: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O), less the gradient of the LSE; and the LSE, each times a factor.

    Both are 0 in a row that sees no key or belongs to no sequence, whatever its dO holds. dq_accum:
    None, or an fp32 copy of dQ to clear.
    """
    out = tensor(out, stride_o_b, stride_o_t, stride_o_h, C.DIVISIBLE_BY_8 & 1)
    dout = tensor(dout, stride_do_b, stride_do_t, stride_do_h, C.DIVISIBLE_BY_8 & 2)
    start = tl.program_id(0) % num_m_blocks * C.BLOCK_M
    batch_head = tl.program_id(0) // num_m_blocks
    b, head = (batch_head // nheads).to(tl.int64), (batch_head % nheads).to(tl.int64)
    i = start + tl.arange(0, C.BLOCK_M)
    real = i < seqlen_q
    o = load_block(
        head_of(out, b, 0, head), out.stride_t, start, seqlen_q, C.BLOCK_M, C.HEAD_DIM_V, C
    )
    do = load_block(
        head_of(dout, b, 0, head), dout.stride_t, start, seqlen_q, C.BLOCK_M, C.HEAD_DIM_V, C
    )
    d = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        at = dlse + b * stride_dlse_b + head * stride_dlse_h + i.to(tl.int64) * stride_dlse_t
        d -= tl.load(at, mask=real, other=0.0)
    top = tl.load(lse + b * stride_lse_b + head * stride_lse_h + i, mask=real, other=0.0)
    empty = top == float("-inf")
    at = batch_head.to(tl.int64) * seqlen_q + i
    tl.store(lse_log2 + at, tl.where(empty, 0.0, top * lse_factor), mask=real)
    tl.store(delta + at, tl.where(empty, 0.0, d * delta_factor), mask=real)
    if dq_accum is not None:
        columns = tl.arange(0, C.D)
        rows = dq_accum + at[:, None] * C.D + columns[None, :]
        tl.store(rows, tl.zeros([C.BLOCK_M, C.D], tl.float32), mask=real[:, None])


@triton.jit(do_not_specialize=SIZES)
def postprocess_kernel(
    dq_accum, dq, stride_dq_b, stride_dq_t, stride_dq_h, nheads, num_m_blocks, seqlen_q,
    softmax_scale,
    C: tl.constexpr,
):  # fmt: skip
    """dQ in its own dtype from the fp32 copy, times the softmax scale."""
    dq = tensor(dq, stride_dq_b, stride_dq_t, stride_dq_h, C.DIVISIBLE_BY_8 & 1)
    start = tl.program_id(0) % num_m_blocks * C.BLOCK_M
    batch_head = tl.program_id(0) // num_m_blocks
    b, head = batch_head // nheads, batch_head % nheads
    rows = dq_accum + batch_head.to(tl.int64) * seqlen_q * C.D
    x = load_block(rows, C.D, start, seqlen_q, C.BLOCK_M, C.HEAD_DIM, C) * softmax_scale
    at = head_of(dq, b, 0, head)
    store_block(at, dq.stride_t, start, x, seqlen_q, seqlen_q, C.HEAD_DIM)


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
    if not C.ONE_LOOP:
        dk_tile, dv_tile = add_queries(
            dk_tile, dv_tile, k_tile, v_tile, head_k, tile.m_row, queries, seen, weights, False,
            C, SCORE_MOD, SCORE_MOD_BWD,
        )  # fmt: skip
    dk_tile, dv_tile = add_queries(
        dk_tile, dv_tile, k_tile, v_tile, head_k, tile.m_row, queries, seen, weights, True, C,
        SCORE_MOD, SCORE_MOD_BWD,
    )  # fmt: skip
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
SCORES = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "alibi_slopes",
    "aux",
    "dropout_seed",
)


def _config(p: Problem, tiles: Tiles, mode: str, *tensors: torch.Tensor) -> Config:
    """What a kernel is compiled for that reads and writes these tensors."""
    head_dim, head_dim_v = p.q.shape[-1], p.v.shape[-1]
    block = max(tiles.block_m, tiles.block_n)
    reach = (block * x.stride(-3) + x.shape[-1] for x in tensors)
    return Config(
        head_dim, padded(head_dim, head_dim_v), head_dim_v, padded(head_dim_v, head_dim),
        any(n >= 2**31 for n in reach), divisible_by_8(*tensors), tiles.block_m, tiles.block_n,
        mode,
        p.group,
        p.options.left is not None or max(head_dim, head_dim_v) > 128,
    )  # fmt: skip


def _head_strides(x: torch.Tensor) -> tuple[int, int]:
    """(batch, head) strides of an LSE; 0 for the batch where queries are packed."""
    return (x.stride(0) if x.dim() == 3 else 0, x.stride(-2))


def launches(p: Problem, given: BackwardTensors, plan: Backward) -> list[Launch]:
    """The launches that prepare the LSE and delta, and then write dK and dV, and dQ."""
    return [
        preprocess(p, given, plan.preprocess, LOG2E),
        _launch(p, given, dkdv_kernel, plan.dkdv, p.k.shape[-2], {"dk": given.dk, "dv": given.dv}),
        _launch(p, given, dq_kernel, plan.dq, p.q.shape[-2], {"dq": given.dq}),
    ]


def preprocess(
    p: Problem, given: BackwardTensors, work: Work, lse_factor: float, delta_factor: float = 1.0,
    accumulates: bool = False,
) -> Launch:  # fmt: skip
    """The launch of `preprocess_kernel`; whether it clears an fp32 copy of dQ too."""
    out, dout, dlse = given.out, given.dout, given.dlse
    dlse_strides = (0, 0, 0) if dlse is None else (*_head_strides(dlse), dlse.stride(-1))
    constants = (
        *strides(out), *strides(dout), *_head_strides(given.lse), *dlse_strides,
        p.q.shape[-2], work.num_blocks, p.q.shape[-3], lse_factor, delta_factor,
        _config(p, work.tiles, "", out, dout),
    )  # fmt: skip
    accum = "dq_accum" if accumulates else "nothing"
    pointers = ("out", "dout", "lse", "dlse", "lse_log2", "delta", accum)
    return Launch(preprocess_kernel, work.programs, pointers, constants, *work.tiles[2:])


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
        _config(p, work.tiles, mode.mode, *tensors),
        p.scores.score_mod, p.scores.score_mod_bwd,
    )  # fmt: skip
    pointers = (*STATISTICS, *results, *SCORES)
    return Launch(kernel, work.programs, pointers, constants, *work.tiles[2:])


def postprocess(p: Problem, given: BackwardTensors, work: Work) -> Launch:
    """The launch of `postprocess_kernel`."""
    constants = (
        *strides(given.dq), p.q.shape[-2], work.num_blocks, p.q.shape[-3],
        p.options.softmax_scale, _config(p, work.tiles, "", given.dq),
    )  # fmt: skip
    pointers = ("dq_accum", "dq")
    return Launch(postprocess_kernel, work.programs, pointers, constants, *work.tiles[2:])
