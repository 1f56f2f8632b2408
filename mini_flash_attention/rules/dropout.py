"""Which weights dropout keeps: a function of a seed and of where a weight stands, nothing else.

So the backward pass drops what the forward pass has dropped, whatever their tiles. Random bits are
those of Philox (Salmon et al., 2011), a block cipher of a counter: here the key, the query, the
head and the batch entry.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Dropout(NamedTuple):
    """How weights are dropped."""

    seed: Any  # 64 bits
    threshold: Any  # of 31 bits: below it a weight is dropped
    scale: Any  # of what is kept: 1 / (1 - p)


@triton.jit
def is_kept(dropout, b, head, i, j):
    """Whether the weights of queries i and keys j, numbered in their sequence, are kept."""
    j = j + i * 0
    i = i + j * 0
    bits, _, _, _ = tl.philox(dropout.seed, j, i, i * 0 + head, i * 0 + b)
    return (bits >> 1).to(tl.int32) >= dropout.threshold
