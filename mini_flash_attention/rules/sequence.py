"""Where the tokens of batch entry b live: dense, packed, or with a used length.

Lengths come from device tensors whose content nobody checked, so every one is clamped to what
the tensors passed in can hold: a bad length gives a wrong answer, never a stray access.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Lengths(NamedTuple):
    """Where the sequences of a batch lie, and how far the tensors passed in reach."""

    cu_seqlens_q: Any  # of queries: None unless packed
    seqused_q: Any
    seqlen_q: Any  # no sequence has more
    total_q: Any
    cu_seqlens_k: Any  # of keys
    seqused_k: Any
    seqlen_k: Any
    total_k: Any
    appended: Any  # keys that a call appends to each sequence; -1: as many as it has queries
    cache_batch_idx: Any  # of a cache
    cache_leftpad: Any
    cache_rows: Any


@triton.jit
def clamp(x, low, high):
    """x limited to low..high; low wins when they cross."""
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def span(b, cu_seqlens, total):
    """Packed tokens of entry b: (first row, number of rows), inside 0..total."""
    start = clamp(tl.load(cu_seqlens + b), 0, total)
    return start, clamp(tl.load(cu_seqlens + b + 1), start, total) - start


@triton.jit
def query_start(b, cu_seqlens, total):
    """First row of queries; entry 0 starts at 0 whatever it says, so that no row is left out."""
    return tl.where(b == 0, 0, clamp(tl.load(cu_seqlens + b), 0, total))


@triton.jit
def query_span(b, cu_seqlens, total):
    """`span` for queries."""
    start = query_start(b, cu_seqlens, total)
    return start, clamp(tl.load(cu_seqlens + b + 1), start, total) - start


@triton.jit
def used_queries(b, seqused_q, length):
    """How many of entry b's `length` query rows are in use, counted from the first."""
    if seqused_q is not None:
        length = clamp(tl.load(seqused_q + b), 0, length)
    return length


@triton.jit
def first_tile(b, cu_seqlens, total, BLOCK: tl.constexpr):
    """Number of the first tile of entry b when tiles of all entries are counted through.

    `cu_seqlens[b] // BLOCK + b` leaves each entry room for all its tiles (at most one stays
    unused), grows with b, and needs no prefix sum over the batch.
    """
    return query_start(b, cu_seqlens, total) // BLOCK + b


@triton.jit
def find(tile, cu_seqlens, batch, total, BLOCK: tl.constexpr):
    """The entry that a counted-through tile belongs to, and the tile's number inside it."""
    b = 0
    above = batch
    while above - b > 1:
        middle = (b + above) // 2
        if first_tile(middle, cu_seqlens, total, BLOCK) <= tile:
            b = middle
        else:
            above = middle
    return b, tile - first_tile(b, cu_seqlens, total, BLOCK)


@triton.jit
def cache_row(b, cache_batch_idx, num_rows):
    """(row of a dense cache that entry b uses, whether there is such a row)."""
    row = tl.load(cache_batch_idx + b)
    there = (row >= 0) & (row < num_rows)
    return tl.where(there, row, 0), there


@triton.jit
def first_key(b, leftpad, length):
    """The first key of entry b that is in use, `length` if none is."""
    return clamp(tl.load(leftpad + b), 0, length)


@triton.jit
def used_length(b, seqused, appended, capacity):
    """Keys in use: `seqused[b]` (negative counts as 0) and those just appended, within capacity."""
    return tl.minimum(clamp(tl.load(seqused + b), 0, capacity), capacity - appended) + appended
