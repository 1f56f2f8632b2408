"""The key tiles of a whole batch as one line that programs cut into equal shares.

Lengths are known on the device only, so every program walks them: it counts the tiles of all
sequences, cuts out its share and finds the sequence where that begins. A sequence without keys
counts one tile, so that somebody writes its rows.
"""

import triton
import triton.language as tl

from ..rules import mask, sequence, work

CHUNK = tl.constexpr(32)  # sequences looked at together: as many as a warp has threads


@triton.jit
def key_range(b, lengths, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of sequences b: the first query row and how many; the first key and how many are in use;
    the first tile (in keys) that any query sees, how many tiles.
    """
    (
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad, cache_batch_idx,
        seqlen_q, seqlen_k, total_q, total_k, cache_rows, left, right, appended,
    ) = lengths  # fmt: skip
    first_q, rows_q = 0, seqlen_q
    if cu_seqlens_q is not None:
        first_q, rows_q = sequence.query_span(b, cu_seqlens_q, total_q)
        rows_q = sequence.used_queries(b, seqused_q, tl.minimum(rows_q, seqlen_q))
    first_k, length_k = work.keys(b, cu_seqlens_k, seqused_k, seqlen_k, total_k, appended, rows_q)
    if cache_batch_idx is not None:
        length_k = tl.where(sequence.cache_row(b, cache_batch_idx, cache_rows)[1], length_k, 0)
    pad = leftpad
    if leftpad is not None:
        pad = sequence.first_key(b, leftpad, length_k)
    begin, _, _, end = mask.key_tiles(
        0, rows_q - 1, length_k - rows_q, left, right, pad, length_k, BLOCK_N, LEFT, RIGHT
    )
    tiles = tl.maximum((end - begin) // BLOCK_N, 1)
    return first_q, rows_q, first_k, length_k, begin, tiles


@triton.jit
def chunk(first, batch, lengths, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of the sequences first..first + CHUNK, 0 past the batch."""
    b = first + tl.arange(0, CHUNK)
    tiles = key_range(tl.minimum(b, batch - 1), lengths, LEFT, RIGHT, BLOCK_N)[5]
    return tl.where(b < batch, tiles, 0)


@triton.jit
def count(batch, lengths, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of the whole batch."""
    total = 0
    for first in range(0, batch, CHUNK):
        tiles = chunk(first, batch, lengths, LEFT, RIGHT, BLOCK_N)
        total += tl.sum(tiles, 0)
    return total


@triton.jit
def find(tile, batch, lengths, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sequence that a tile of the line belongs to, and the number of tiles before it."""
    b = 0
    before = 0
    passed = 0
    for first in range(0, batch, CHUNK):
        tiles = chunk(first, batch, lengths, LEFT, RIGHT, BLOCK_N)
        over = (passed + tl.cumsum(tiles, 0) <= tile) & (first + tl.arange(0, CHUNK) < batch)
        b += tl.sum(over.to(tl.int32), 0)
        before += tl.sum(tl.where(over, tiles, 0), 0)
        passed += tl.sum(tiles, 0)
    return b, before
