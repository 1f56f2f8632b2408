"""What the Triton backward kernels are compiled for, and how their blocks are loaded and stored."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...plan.configs import Tiles
from ...plan.layout import divisible_by_8, padded
from ...problem import Problem
from ..launch import CompileTime
from .loads import as_multiples_of_8, load_rows


class Facts(NamedTuple):
    """What a kernel is compiled for."""

    HEAD_DIM: Any
    D: Any  # columns of a tile that holds HEAD_DIM
    HEAD_DIM_V: Any
    D_V: Any
    INT64_OFFSETS: Any
    DIVISIBLE_BY_8: Any
    BLOCK_M: Any
    BLOCK_N: Any
    SCORE_MODE: Any  # `scores.bias`
    GROUP: Any  # query heads of a KV head
    ONE_LOOP: Any  # over full and partial blocks: where many are partial, or registers are short


class Config(CompileTime, Facts):
    """`Facts`, as kernels take them."""

    __slots__ = ()


def config(p: Problem, tiles: Tiles, mode: str, *tensors: torch.Tensor) -> Config:
    """What a kernel is compiled for that reads and writes these tensors."""
    head_dim, head_dim_v = p.q.shape[-1], p.v.shape[-1]
    block = max(tiles.block_m, tiles.block_n)
    reach = (block * x.stride(-3) + x.shape[-1] for x in tensors)
    return Config(
        head_dim, padded(head_dim, head_dim_v), head_dim_v, padded(head_dim_v, head_dim),
        any(n >= 2**31 for n in reach), divisible_by_8(*tensors), tiles.block_m, tiles.block_n,
        mode,
        p.group,
        p.options.left is not None or max(head_dim, head_dim_v) > 128,
    )  # fmt: skip


class Tensor(NamedTuple):
    """A tensor, and its (batch, token, head) strides."""

    base: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any


@triton.jit
def tensor(base, stride_b, stride_t, stride_h, DIVISIBLE_BY_8: tl.constexpr):
    """A `Tensor`, with strides in a form that tells the compiler what they are multiples of."""
    b, t, h = as_multiples_of_8(stride_b, stride_t, stride_h, DIVISIBLE_BY_8)
    return Tensor(base, b, t, h)


@triton.jit
def head_of(x, b, first, head):
    """Where the rows of a head begin, in a sequence whose first row is `first`."""
    at = x.base + tl.cast(b, tl.int64) * x.stride_b + tl.cast(head, tl.int64) * x.stride_h
    return at + tl.cast(first, tl.int64) * x.stride_t


@triton.jit
def load_block(
    base, stride, start, count, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, C: tl.constexpr,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """BLOCK rows from row `start`, zero past HEAD_DIM and from row `count` on. WHOLE: that does not
    come.

    Offsets inside a block fit in 32 bits unless INT64_OFFSETS.
    """
    n = tl.arange(0, BLOCK)
    D: tl.constexpr = C.D if HEAD_DIM == C.HEAD_DIM else C.D_V
    base += tl.cast(start, tl.int64) * stride
    offset = tl.cast(n, tl.int64) * stride if C.INT64_OFFSETS else n * stride
    return load_rows(base, offset, start + n < count, WHOLE, HEAD_DIM, D)


@triton.jit
def store_block(base, stride, start, x, used, writable, HEAD_DIM: tl.constexpr):
    """Write a tile of gradients from row `start`: zeros in rows that are writable, but not used."""
    n = start + tl.arange(0, x.shape[0])
    d = tl.arange(0, x.shape[1])
    x = tl.where((n < used)[:, None], x, 0.0)
    at = base + tl.cast(n, tl.int64)[:, None] * stride + d[None, :]
    wanted = (n < writable)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=wanted)


def head_strides(x: torch.Tensor) -> tuple[int, int]:
    """(batch, head) strides of an LSE; 0 for the batch where queries are packed."""
    return (x.stride(0) if x.dim() == 3 else 0, x.stride(-2))
