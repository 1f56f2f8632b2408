"""Which query sees which key, and which key blocks are full, partial or empty (`window.py`)."""

from types import FunctionType
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import window as windows

# As if they stood in this module: Triton's interpreter wants to find `tl` beside a function.
first_visible = triton.jit(FunctionType(windows.first_visible.__code__, globals()))
last_visible = triton.jit(FunctionType(windows.last_visible.__code__, globals()))


class KeyBlocks(NamedTuple):
    """The key blocks that some queries see, as four multiples of BLOCK.

    Blocks in full_begin..full_end are full: every query sees every key. Those in begin..full_begin
    and full_end..end are partial, by the mask or the sequence's end. No query sees the rest.
    """

    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


@triton.jit
def bounds(i, window):
    """(first, last) key that query i sees; `first` may lie before key 0."""
    first = i * 0
    last = window.seqlen_k - 1
    if window.right is not None:
        last = tl.minimum(last, last_visible(i, window))
    if window.left is not None:
        first = first_visible(i, window)
        if window.first_key is not None:
            first = tl.maximum(first, window.first_key)
    return first, last


@triton.jit
def is_visible(i, j, window):
    """Whether query i sees key j; i and j are numbers or broadcastable tiles."""
    first, last = bounds(i, window)
    visible = j <= last
    if window.left is not None:
        visible = visible & (j >= first)
    return visible


@triton.jit
def num_visible(i, window):
    """How many keys query i sees; 0 or less if none."""
    first, last = bounds(i, window)
    return last + 1 - tl.maximum(first, 0)


@triton.jit
def n_block_range(first_query, last_query, window, BLOCK: tl.constexpr):
    """The `KeyBlocks` that queries first_query..last_query see."""
    begin = first_query * 0
    every_begin = first_query * 0
    end = window.seqlen_k
    every_end = window.seqlen_k
    if window.left is not None:
        lowest = 0 if window.first_key is None else window.first_key
        begin = tl.maximum(first_visible(first_query, window), lowest)
        every_begin = tl.maximum(first_visible(last_query, window), lowest)
    if window.right is not None:
        end = tl.minimum(end, tl.maximum(last_visible(last_query, window) + 1, 0))
        every_end = tl.minimum(every_end, tl.maximum(last_visible(first_query, window) + 1, 0))
    begin = begin // BLOCK * BLOCK
    end = tl.maximum((end + BLOCK - 1) // BLOCK * BLOCK, begin)
    full_begin = tl.minimum((every_begin + BLOCK - 1) // BLOCK * BLOCK, end)
    full_end = tl.minimum(tl.maximum(every_end // BLOCK * BLOCK, full_begin), end)
    return KeyBlocks(begin, full_begin, full_end, end)
