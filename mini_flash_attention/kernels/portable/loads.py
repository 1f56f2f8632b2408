"""What the Triton kernels are compiled for, where their tensors lie, and how tiles are loaded."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...plan.configs import Tiles
from ...plan.layout import divisible_by_8, int64_offsets, padded, shared_kv_offsets
from ...problem import Problem
from ...rules import paging
from ..launch import CompileTime


class Facts(NamedTuple):
    """What a kernel is compiled for."""

    # loads
    PAGE_SIZE: Any  # 0 unless paged
    HEAD_DIM: Any
    D: Any  # columns of a tile that holds HEAD_DIM
    HEAD_DIM_V: Any
    D_V: Any
    INT64_OFFSETS: Any
    SHARED_KV_OFFSETS: Any
    DIVISIBLE_BY_8: Any
    # the loop
    BLOCK_M: Any
    BLOCK_N: Any
    SCORE_MODE: Any  # `scores.modify`


class Config(CompileTime, Facts):
    """`Facts`, as kernels take them."""

    __slots__ = ()


def config(p: Problem, out: torch.Tensor, tiles: Tiles, mode: str) -> Config:
    """What a kernel for p is compiled for; `mode` is that of `plan.scores.ScoreMode`."""
    head_dim, head_dim_v = p.q.shape[-1], p.v.shape[-1]
    return Config(
        p.cache.page_size, head_dim, padded(head_dim, head_dim_v), head_dim_v,
        padded(head_dim_v, head_dim), int64_offsets(p, tiles.block_n),
        shared_kv_offsets(p, tiles.block_n),
        divisible_by_8(p.q, p.k, p.v, out), tiles.block_m, tiles.block_n, mode,
    )  # fmt: skip


def dropped(p: Problem) -> tuple[int | None, float | None]:
    """(threshold, scale) of `rules.dropout.Dropout`; None and None without dropout."""
    dropout_p = p.options.dropout_p
    return (int(dropout_p * 2**31), 1 / (1 - dropout_p)) if dropout_p else (None, None)


class Strides(NamedTuple):
    """(batch or page, token, head) strides of q, k, v and out."""

    q_b: Any
    q_t: Any
    q_h: Any
    k_b: Any
    k_t: Any
    k_h: Any
    v_b: Any
    v_t: Any
    v_h: Any
    o_b: Any
    o_t: Any
    o_h: Any


class KeysValues(NamedTuple):
    """Where the keys and values of a sequence's KV head lie."""

    k: Any  # of the first key, or of the first page
    v: Any
    stride_k: Any  # from key to key
    stride_v: Any
    page_stride_k: Any  # from page to page
    page_stride_v: Any
    block_table: Any  # the sequence's row
    num_pages: Any


@triton.jit
def as_multiples_of_8(b, t, h, DIVISIBLE_BY_8: tl.constexpr):
    """The same strides, in a form that tells the compiler that they are multiples of 8."""
    return (b // 8 * 8, t // 8 * 8, h // 8 * 8) if DIVISIBLE_BY_8 else (b, t, h)


@triton.jit
def hint_divisibility(s, C: tl.constexpr):
    """The same `Strides`, for the compiler."""
    q_b, q_t, q_h = as_multiples_of_8(s.q_b, s.q_t, s.q_h, C.DIVISIBLE_BY_8 & 1)
    k_b, k_t, k_h = as_multiples_of_8(s.k_b, s.k_t, s.k_h, C.DIVISIBLE_BY_8 & 2)
    v_b, v_t, v_h = as_multiples_of_8(s.v_b, s.v_t, s.v_h, C.DIVISIBLE_BY_8 & 4)
    o_b, o_t, o_h = as_multiples_of_8(s.o_b, s.o_t, s.o_h, C.DIVISIBLE_BY_8 & 8)
    return Strides(q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h)


@triton.jit
def sequence_start(k, v, s, head_k, row_k, offset_k, C: tl.constexpr):
    """k and v, from the tensors' beginnings moved to KV head head_k, and to the first key of one
    sequence unless it is found through the block table. row_k: of a cache.
    """
    k += head_k * s.k_h
    v += head_k * s.v_h
    if C.PAGE_SIZE == 0:
        k += row_k * s.k_b + tl.cast(offset_k, tl.int64) * s.k_t
        v += row_k * s.v_b + tl.cast(offset_k, tl.int64) * s.v_t
    return k, v


@triton.jit
def load_rows(base, offset, row_ok, WHOLE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows at base + offset as a tile [N, D]; zero past HEAD_DIM, and where row_ok is false."""
    d = tl.arange(0, D)
    row_ptrs = base + offset[:, None] + d[None, :]
    if WHOLE and HEAD_DIM == D:
        return tl.load(row_ptrs)
    if WHOLE:
        return tl.load(row_ptrs, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(row_ptrs, mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def find_pages(start, seqlen_k, at, C: tl.constexpr):
    """Pages of the keys start..start + BLOCK_N, and which can be read: one if it holds them all."""
    n = tl.arange(0, C.BLOCK_N)
    if C.PAGE_SIZE % C.BLOCK_N == 0:
        entry = at.block_table + start // C.PAGE_SIZE
        page, real = paging.lookup(entry, start < seqlen_k, at.num_pages)
    elif C.BLOCK_N % C.PAGE_SIZE == 0:
        entry = at.block_table + start // C.PAGE_SIZE + n // C.PAGE_SIZE
        page, real = paging.lookup(entry, start + n < seqlen_k, at.num_pages)
    else:
        entry = at.block_table + (start + n) // C.PAGE_SIZE
        page, real = paging.lookup(entry, start + n < seqlen_k, at.num_pages)
    return tl.cast(page, tl.int64) if C.INT64_OFFSETS else page, real


@triton.jit
def slots(start, C: tl.constexpr):
    """Slots of the same keys inside their pages; the same for every block of whole pages."""
    n = tl.arange(0, C.BLOCK_N)
    if C.PAGE_SIZE % C.BLOCK_N == 0:
        slot = start % C.PAGE_SIZE + n
    elif C.BLOCK_N % C.PAGE_SIZE == 0:
        slot = n % C.PAGE_SIZE
    else:
        slot = (start + n) % C.PAGE_SIZE
    return tl.cast(slot, tl.int64) if C.INT64_OFFSETS else slot


@triton.jit
def row_offsets(start, stride, C: tl.constexpr):
    """Offsets of the keys start..start + BLOCK_N.

    Offsets inside a block fit in 32 bits unless INT64_OFFSETS, and then stay the same from block to
    block: a tenth fewer instructions in the loop.
    """
    n = tl.arange(0, C.BLOCK_N)
    if C.INT64_OFFSETS:
        return tl.cast(start + n, tl.int64) * stride
    return tl.cast(start, tl.int64) * stride + n * stride
