"""Which keys a program reads, counted in key blocks.

There are two ways. `part` splits every sequence by itself, so that a sequence's result does not
change with its neighbours. `share` divides the blocks of the whole batch equally, wherever
sequences begin and end, so that programs finish together (stream-K).
"""

import triton
import triton.language as tl


@triton.jit
def part(tiles, size, split):
    """Blocks of split number `split`, of `size` blocks; the last splits may be empty."""
    low = tl.minimum(split * size, tiles)
    return low, tl.minimum(low + size, tiles)


@triton.jit
def share(total, number, shares):
    """Tiles of share `number` of `shares`; they differ by one tile at most.

    `shares` is not above `total`, so that no share between two others is empty. A `number` past
    the last gets nothing.
    """
    low = tl.minimum(total * number // shares, total)
    return low, tl.minimum(total * (number + 1) // shares, total)


@triton.jit
def share_of(tile, total, shares):
    """The share that a tile belongs to: the largest whose first tile is not after it."""
    return ((tile + 1) * shares - 1) // total
