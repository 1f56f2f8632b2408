"""What kernels are told of tensors' strides, and of the columns of their tiles."""

import math

import torch

from ..problem import Problem


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """(batch or page, token, head) strides; 0 for the batch of a packed tensor.

    A dimension of size 1 is never stepped over and may carry any stride: 0 stands in, so that an
    odd one does not cost the kernel its aligned loads.
    """
    steps = tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))
    return (0, steps[0], steps[1]) if len(steps) == 3 else (steps[0], steps[1], steps[2])


def divisible_by_8(*tensors: torch.Tensor) -> int:
    """A bit for each tensor whose strides are multiples of 8 elements, but not all of 16.

    Multiples of 16 Triton finds by itself; others it takes for odd, and loads two bytes at a time
    instead of 16.
    """
    return sum((math.gcd(*strides(x)) % 16 == 8) << n for n, x in enumerate(tensors))


def padded(head_dim: int, other: int) -> int:
    """Columns of a tile that holds head_dim: a power of two, as many as a product wants.

    Up to 64 no fewer than `other` has, the tile of V or of K: where the two were swizzled in
    different ways, ptxas 12.8 had a product read V from somewhere else (bench/NOTES.md, 113).
    """
    return max(16, 1 << (max(head_dim, min(other, 64)) - 1).bit_length())


def size_class(head_dim: int) -> int:
    """Tiles are chosen for these three; head_dim is at most 256."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def int64_offsets(p: Problem, block_n: int) -> bool:
    """Whether offsets inside a tile of keys, or inside a whole cache of pages, need 64 bits.

    Above head_dim 128 they are given them anyway: there it is registers that are short.
    """
    if max(p.k.shape[-1], p.v.shape[-1]) > 128:
        return True
    if p.cache.page_size:
        last = (p.k.shape[0] - 1, p.k.shape[1] - 1)
        reach = (last[0] * x.stride(0) + last[1] * x.stride(1) for x in (p.k, p.v))
    else:
        reach = (block_n * x.stride(-3) for x in (p.k, p.v))
    return any(n + p.k.shape[-1] >= 2**31 for n in reach)


def shared_kv_offsets(p: Problem, block_n: int) -> bool:
    """Whether v should be found by k's offsets: strides agree and it pays.

    Sharing saves up to an eighth of the loop's instructions with 64-bit offsets or one page a
    tile. Otherwise it was slower: the compiler keeps fewer of them from tile to tile.
    """
    one_page = p.cache.page_size > 0 and p.cache.page_size % block_n == 0
    return strides(p.k) == strides(p.v) and (int64_offsets(p, block_n) or one_page)
