"""Who sees whom, and which key tiles are empty, cut or clear.

The last query stands on the last key (bottom-right). With `diagonal = seqlen_k - seqlen_q`,
query i sees the keys `i + diagonal - left .. i + diagonal + right` that exist.
LEFT and RIGHT say which of the two bounds there are; causal is RIGHT with right = 0.
"""

import triton
import triton.language as tl


@triton.jit
def bounds(i, diagonal, left, right, pad, seqlen_k, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """(first, last) key that query i sees; `first` may lie before key 0.

    pad: None, or the first key that exists; enforced only with LEFT.
    """
    first = i * 0
    last = seqlen_k - 1
    if RIGHT:
        last = tl.minimum(last, i + (diagonal + right))
    if LEFT:
        first = i + (diagonal - left)
        if pad is not None:
            first = tl.maximum(first, pad)
    return first, last


@triton.jit
def sees(i, j, diagonal, left, right, pad, seqlen_k, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether query i sees key j; i and j are numbers or broadcastable tiles."""
    first, last = bounds(i, diagonal, left, right, pad, seqlen_k, LEFT, RIGHT)
    visible = j <= last
    if LEFT:
        visible = visible & (j >= first)
    return visible


@triton.jit
def count(i, diagonal, left, right, pad, seqlen_k, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """How many keys query i sees; 0 or less if none."""
    first, last = bounds(i, diagonal, left, right, pad, seqlen_k, LEFT, RIGHT)
    return last + 1 - tl.maximum(first, 0)


@triton.jit
def key_tiles(
    first, last, diagonal, left, right, pad, seqlen_k,
    BLOCK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Key tiles that queries first..last see, as four multiples of BLOCK.

    begin..clear_begin and clear_end..end are cut by the mask or the sequence's end,
    clear_begin..clear_end is seen by every query in full, the rest is seen by none.
    """
    begin = first * 0
    every_begin = first * 0
    end = seqlen_k
    every_end = seqlen_k
    if LEFT:
        lowest = 0 if pad is None else pad
        begin = tl.maximum(first + (diagonal - left), lowest)
        every_begin = tl.maximum(last + (diagonal - left), lowest)
    if RIGHT:
        end = tl.minimum(end, tl.maximum(last + (diagonal + right) + 1, 0))
        every_end = tl.minimum(every_end, tl.maximum(first + (diagonal + right) + 1, 0))
    begin = begin // BLOCK * BLOCK
    end = tl.maximum((end + BLOCK - 1) // BLOCK * BLOCK, begin)
    clear_begin = tl.minimum((every_begin + BLOCK - 1) // BLOCK * BLOCK, end)
    clear_end = tl.minimum(tl.maximum(every_end // BLOCK * BLOCK, clear_begin), end)
    return begin, clear_begin, clear_end, end
