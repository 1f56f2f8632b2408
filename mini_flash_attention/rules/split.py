"""Which slice of the keys is mine."""

import triton
import triton.language as tl


@triton.jit
def part(begin, end, split, splits, BLOCK: tl.constexpr):
    """Keys of part `split` of `splits`: whole tiles of begin..end, shared out as evenly as can be.

    It depends on this sequence's own keys and on `splits` only, so that a sequence's result does
    not change with its neighbours. With fewer tiles than parts the last parts are empty.
    """
    size = tl.cdiv(tl.cdiv(end - begin, BLOCK), splits) * BLOCK
    mine = tl.minimum(begin + split * size, end)
    return mine, tl.minimum(mine + size, end)
