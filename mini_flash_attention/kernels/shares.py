"""The key tiles of a whole batch as one line that programs cut into equal shares.

Lengths are known on the device only, so every program walks them: it counts the tiles of all
sequences, cuts out its share and finds the sequence where that begins. A sequence without keys
counts one tile, so that somebody writes its rows.
"""

import triton
import triton.language as tl

from ..rules import mask, sequence

CHUNK = tl.constexpr(32)  # sequences looked at together: as many as a warp has threads


@triton.jit
def key_range(
    b, seqused_k, appended, seqlen_q, seqlen_k, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of sequences b: keys in use, the first tile (in keys) that any query sees, how many tiles."""
    length_k = seqlen_k
    if seqused_k is not None:
        length_k = sequence.used_length(b, seqused_k, appended, seqlen_k)
    begin, _, _, end = mask.key_tiles(
        0, seqlen_q - 1, length_k - seqlen_q, left, right, length_k, BLOCK_N, LEFT, RIGHT
    )
    return length_k, begin, tl.maximum((end - begin) // BLOCK_N, 1)


@triton.jit
def chunk(
    first, batch, seqused_k, appended, seqlen_q, seqlen_k, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles of the sequences first..first + CHUNK, 0 past the batch."""
    b = first + tl.arange(0, CHUNK)
    _, _, tiles = key_range(
        tl.minimum(b, batch - 1), seqused_k, appended, seqlen_q, seqlen_k, left, right,
        LEFT, RIGHT, BLOCK_N,
    )  # fmt: skip
    return tl.where(b < batch, tiles, 0)


@triton.jit
def count(
    batch, seqused_k, appended, seqlen_q, seqlen_k, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles of the whole batch."""
    total = 0
    for first in range(0, batch, CHUNK):
        tiles = chunk(
            first, batch, seqused_k, appended, seqlen_q, seqlen_k, left, right,
            LEFT, RIGHT, BLOCK_N,
        )  # fmt: skip
        total += tl.sum(tiles, 0)
    return total


@triton.jit
def find(
    tile, batch, seqused_k, appended, seqlen_q, seqlen_k, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sequence that a tile of the line belongs to, and the number of tiles before it."""
    b = 0
    before = 0
    passed = 0
    for first in range(0, batch, CHUNK):
        tiles = chunk(
            first, batch, seqused_k, appended, seqlen_q, seqlen_k, left, right,
            LEFT, RIGHT, BLOCK_N,
        )  # fmt: skip
        over = (passed + tl.cumsum(tiles, 0) <= tile) & (first + tl.arange(0, CHUNK) < batch)
        b += tl.sum(over.to(tl.int32), 0)
        before += tl.sum(tl.where(over, tiles, 0), 0)
        passed += tl.sum(tiles, 0)
    return b, before
