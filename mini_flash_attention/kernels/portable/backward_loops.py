"""The loops of the Triton backward kernels: over the queries of a block of keys, and over the keys
of a block of queries.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...rules import dropout as dropouts
from ...rules import mask, scores
from .backward_loads import load_block


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


class KeyBlock(NamedTuple):
    """A block of keys, loaded."""

    k: Any  # [N, D]
    v: Any  # [N, D_V]
    head: Any  # of k
    start: Any  # the first one


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
    dk, dv, keys, queries, blocks, weights, PARTIAL: tl.constexpr, C: tl.constexpr,
    SCORE_MOD: tl.constexpr, SCORE_MOD_BWD: tl.constexpr,
):  # fmt: skip
    """Add to dK [N, D] and dV [N, D_V] what blocks of queries give, for all heads of the group.

    PARTIAL: the blocks that may need a mask, else the full ones; all of them if C.ONE_LOOP.
    Scores are transposed, [N, M], so that P and dS are what the products need on their left.
    """
    inputs, window = weights.inputs, weights.window
    n = tl.arange(0, C.BLOCK_N)[:, None]
    j = keys.start + n
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
        head = keys.head * C.GROUP + member
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
        s = tl.dot(keys.k, q.T)  # Sᵀ = K Qᵀ
        p, biased = weigh(
            s, lse_log2, head, stands, keys.start, n, modification, weights, C, SCORE_MOD
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
        dp = tl.dot(keys.v, do.T)  # dPᵀ = V dOᵀ
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
