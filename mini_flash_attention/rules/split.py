"""Which slice of the keys is mine. Everything is counted in key tiles.

Two ways to share out the keys of a batch: `part` cuts every sequence by itself, so that a
sequence's result does not change with its neighbours; `share` cuts the whole batch into equal
shares wherever sequences begin and end, so that programs finish together.
"""

import triton
import triton.language as tl


@triton.jit
def part(tiles, size, split):
    """Tiles of part `split` of a sequence cut every `size` tiles; the last parts may be empty."""
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
