"""The inner loop of Algorithm 1, shared by the Triton kernels: keys and values tile by tile."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..problem import Problem
from ..rules import mask, paging, scores, softmax
from ..tiles import Tiles
from .launch import eights, padded, twins, wide


class Config(NamedTuple):
    """What a kernel is compiled for."""

    # loads
    PAGE_SIZE: Any  # 0 unless paged
    HEAD_DIM: Any
    D: Any  # columns of a tile that holds HEAD_DIM
    HEAD_DIM_V: Any
    D_V: Any
    WIDE: Any
    TWINS: Any
    EIGHTS: Any
    # the loop
    BLOCK_M: Any
    BLOCK_N: Any
    SCORES: Any  # `scores.modified`

    @classmethod
    def of(cls, *facts: Any) -> "Config":
        """As constants of the compiler's; the interpreter, which runs Python, wants them plain."""
        return cls(*(facts if scores.INTERPRETED.value else map(tl.constexpr, facts)))


def config(p: Problem, out: torch.Tensor, tiles: Tiles, way: str) -> Config:
    """What a kernel for p is compiled for; `way` is that of `launch.Changes`."""
    head_dim, head_dim_v = p.q.shape[-1], p.v.shape[-1]
    return Config.of(
        p.page_size, head_dim, padded(head_dim, head_dim_v), head_dim_v,
        padded(head_dim_v, head_dim), wide(p, tiles.block_n), twins(p, tiles.block_n),
        eights(p.q, p.k, p.v, out), tiles.block_m, tiles.block_n, way,
    )  # fmt: skip


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
def in_eights(b, t, h, EIGHTS: tl.constexpr):
    """Strides, which the compiler sees to be multiples of 8 if EIGHTS (`launch.eights`)."""
    return (b // 8 * 8, t // 8 * 8, h // 8 * 8) if EIGHTS else (b, t, h)


@triton.jit
def hinted(s, C: tl.constexpr):
    """The same `Strides`, for the compiler."""
    q_b, q_t, q_h = in_eights(s.q_b, s.q_t, s.q_h, C.EIGHTS & 1)
    k_b, k_t, k_h = in_eights(s.k_b, s.k_t, s.k_h, C.EIGHTS & 2)
    v_b, v_t, v_h = in_eights(s.v_b, s.v_t, s.v_h, C.EIGHTS & 4)
    o_b, o_t, o_h = in_eights(s.o_b, s.o_t, s.o_h, C.EIGHTS & 8)
    return Strides(q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h)


@triton.jit
def sequence_start(k, v, s, head_k, row_k, first_k, C: tl.constexpr):
    """k and v, from the tensors' beginnings moved to KV head head_k, and to the first key of one
    sequence unless it is found through the block table. row_k: of a cache.
    """
    k += head_k * s.k_h
    v += head_k * s.v_h
    if C.PAGE_SIZE == 0:
        k += row_k * s.k_b + tl.cast(first_k, tl.int64) * s.k_t
        v += row_k * s.v_b + tl.cast(first_k, tl.int64) * s.v_t
    return k, v


@triton.jit
def load_rows(base, offset, row_ok, WHOLE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows at base + offset as a tile [N, D]; zero past HEAD_DIM, and where row_ok is false."""
    d = tl.arange(0, D)
    pointers = base + offset[:, None] + d[None, :]
    if WHOLE and HEAD_DIM == D:
        return tl.load(pointers)
    if WHOLE:
        return tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers, mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


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
    return tl.cast(page, tl.int64) if C.WIDE else page, real


@triton.jit
def slots(start, C: tl.constexpr):
    """Places of the same keys inside their pages; the same for every tile of whole pages."""
    n = tl.arange(0, C.BLOCK_N)
    if C.PAGE_SIZE % C.BLOCK_N == 0:
        slot = start % C.PAGE_SIZE + n
    elif C.BLOCK_N % C.PAGE_SIZE == 0:
        slot = n % C.PAGE_SIZE
    else:
        slot = (start + n) % C.PAGE_SIZE
    return tl.cast(slot, tl.int64) if C.WIDE else slot


@triton.jit
def rows(start, stride, C: tl.constexpr):
    """Offsets of the keys start..start + BLOCK_N.

    What is inside a tile fits in 32 bits unless WIDE, and then stays the same from tile to tile:
    a tenth fewer instructions in the loop.
    """
    n = tl.arange(0, C.BLOCK_N)
    if C.WIDE:
        return tl.cast(start + n, tl.int64) * stride
    return tl.cast(start, tl.int64) * stride + n * stride


@triton.jit
def in_a_window(real, j, i, window):
    """Which of the real keys j may be read: what lies before every window of the queries i may be
    someone else's by now.
    """
    real = real & (j >= mask.first_visible(tl.min(i, 0), window))
    if window.first_key is not None:
        real = real & (j >= window.first_key)
    return real


@triton.jit
def attend(
    m, l, o, q, i,  # [M], [M] or [M, N], [M, D], [M, D], [M]
    tiles, CUT: tl.constexpr, at, window, scoring, C: tl.constexpr, SCORE_MOD: tl.constexpr,
):  # fmt: skip
    """Lines 7 to 11 of Algorithm 1 over the keys tiles.begin..tiles.end.

    at: `KeysValues`. CUT: the mask cuts tiles, but none of clear_begin..clear_end. C.TWINS: the
    offsets of k serve v too. l is a sum per row, or one per row and column where summing over the
    columns would wait for other warps in every tile.
    """
    if C.PAGE_SIZE:  # looked up a tile ahead, so that no load of keys waits for the block table
        page, there = find_pages(tiles.begin, window.seqlen_k, at, C)
    for start in tl.range(tiles.begin, tiles.end, C.BLOCK_N):
        j = start + tl.arange(0, C.BLOCK_N)
        if C.PAGE_SIZE:
            slot = slots(start, C)
            offset_k = page * at.page_stride_k + slot * at.stride_k
            offset_v = offset_k
            if not C.TWINS:
                offset_v = page * at.page_stride_v + slot * at.stride_v
            real = there & (j < window.seqlen_k)
            page, there = find_pages(start + C.BLOCK_N, window.seqlen_k, at, C)
        else:
            real = j < window.seqlen_k
            offset_k = rows(start, at.stride_k, C)
            offset_v = offset_k
            if not C.TWINS:
                offset_v = rows(start, at.stride_v, C)
        if CUT and window.left is not None:
            real = in_a_window(real, j, i, window)
        WHOLE: tl.constexpr = not (CUT or C.PAGE_SIZE)
        k = load_rows(at.k, offset_k, real, WHOLE, C.HEAD_DIM, C.D)  # [N, D]
        s = tl.dot(q, k.T)  # S = Q Kᵀ  [M, N]
        s = scores.modified(
            s, scoring.b, scoring.head, i[:, None] + window.diagonal, start,
            tl.arange(0, C.BLOCK_N)[None, :], scoring.modification, C.SCORES, SCORE_MOD,
        )  # fmt: skip
        if CUT:
            if (start < tiles.clear_begin) | (start >= tiles.clear_end):
                s = tl.where(mask.sees(i[:, None], j[None, :], window), s, float("-inf"))
        if C.SCORES == "bounded":
            p = tl.exp2(s * scoring.scale)
            l += tl.sum(p, 1)
        else:
            m, alpha, p = softmax.rescale(m, s, scoring.scale)
            if len(l.shape) == 1:
                l = l * alpha + tl.sum(p, 1)
            else:
                l = l * alpha[:, None] + p
            o = o * alpha[:, None]
        v = load_rows(at.v, offset_v, real, WHOLE, C.HEAD_DIM_V, C.D_V)  # [N, D]
        o = tl.dot(p.to(v.dtype), v, o)  # O += P V
    return m, l, o
