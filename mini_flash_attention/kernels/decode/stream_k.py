"""Stream-K: the key blocks of a whole batch in one line, cut into equal shares for the programs.

Lengths are known on the device only, so every program reads them: it counts the blocks of all
sequences, computes its share, and finds the sequence where that begins. A sequence without keys
counts one block, so that one program writes its rows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...rules import mask, sequence, work
from ...rules.window import Window

CHUNK = tl.constexpr(32)  # sequences looked at together: as many as a warp has threads


class Batch(NamedTuple):
    """The sequences that a launch is about."""

    number: Any
    lengths: Any  # `sequence.Lengths`
    left: Any  # of the window
    right: Any


class KeyRange(NamedTuple):
    """Of a sequence, or of several: query rows, keys, and the key blocks that any query sees."""

    offset_q: Any
    length_q: Any
    offset_k: Any
    length_k: Any
    begin: Any  # the first block's first key
    tiles: Any  # blocks


@triton.jit
def key_range(b, batch, BLOCK_N: tl.constexpr):
    """The `KeyRange` of sequences b."""
    lengths = batch.lengths
    offset_q, length_q = 0, lengths.seqlen_q
    if lengths.cu_seqlens_q is not None:
        offset_q, length_q = sequence.query_span(b, lengths.cu_seqlens_q, lengths.total_q)
        length_q = tl.minimum(length_q, lengths.seqlen_q)
        length_q = sequence.used_queries(b, lengths.seqused_q, length_q)
    offset_k, length_k = work.key_span(b, lengths, length_q)
    if lengths.cache_batch_idx is not None:
        length_k = work.cache_row(b, lengths, length_k)[1]
    first_key = lengths.cache_leftpad
    if lengths.cache_leftpad is not None:
        first_key = sequence.first_key(b, lengths.cache_leftpad, length_k)
    window = Window(length_k - length_q, batch.left, batch.right, first_key, length_k)
    seen = mask.n_block_range(0, length_q - 1, window, BLOCK_N)
    tiles = tl.maximum((seen.end - seen.begin) // BLOCK_N, 1)
    return KeyRange(offset_q, length_q, offset_k, length_k, seen.begin, tiles)


@triton.jit
def chunk(b0, batch, BLOCK_N: tl.constexpr):
    """Tiles of the sequences b0..b0 + CHUNK, 0 past the batch."""
    b = b0 + tl.arange(0, CHUNK)
    tiles = key_range(tl.minimum(b, batch.number - 1), batch, BLOCK_N).tiles
    return tl.where(b < batch.number, tiles, 0)


@triton.jit
def count(batch, BLOCK_N: tl.constexpr):
    """Tiles of the whole batch."""
    total = 0
    for b0 in range(0, batch.number, CHUNK):
        total += tl.sum(chunk(b0, batch, BLOCK_N), 0)
    return total


@triton.jit
def find(tile, batch, BLOCK_N: tl.constexpr):
    """The sequence that a tile of the line belongs to, and the number of tiles before it."""
    b = 0
    before = 0
    passed = 0
    for b0 in range(0, batch.number, CHUNK):
        tiles = chunk(b0, batch, BLOCK_N)
        over = (passed + tl.cumsum(tiles, 0) <= tile) & (b0 + tl.arange(0, CHUNK) < batch.number)
        b += tl.sum(over.to(tl.int32), 0)
        before += tl.sum(tl.where(over, tiles, 0), 0)
        passed += tl.sum(tiles, 0)
    return b, before
