"""The inner loop of Algorithm 1, shared by the Triton kernels: keys and values tile by tile."""

import triton
import triton.language as tl

from ..rules import mask, paging, softmax


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
def locate_tile(start, seqlen_k, table, num_pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """(page, slot, can be read) of the keys start..start + BLOCK_N.

    One look at the table if a page holds the tile; slots that stay the same from tile to tile if
    the tile holds whole pages.
    """
    n = tl.arange(0, BLOCK_N)
    in_use = start + n < seqlen_k
    if PAGE_SIZE % BLOCK_N == 0:
        page, real = paging.lookup(table + start // PAGE_SIZE, start < seqlen_k, num_pages)
        slot = start % PAGE_SIZE + n
    elif BLOCK_N % PAGE_SIZE == 0:
        entry = table + start // PAGE_SIZE + n // PAGE_SIZE
        page, real = paging.lookup(entry, in_use, num_pages)
        slot = n % PAGE_SIZE
    else:
        page, real = paging.lookup(table + (start + n) // PAGE_SIZE, in_use, num_pages)
        slot = (start + n) % PAGE_SIZE
    return page, tl.cast(slot, tl.int64), real & in_use


@triton.jit
def attend(
    m, l, o, q, i, begin, end, CUT: tl.constexpr,  # [M], [M], [M, D], [M, D], [M]
    k, v, stride_k, stride_v, page_stride_k, page_stride_v, table, num_pages,
    diagonal, left, right, seqlen_k, scale,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Lines 7 to 11 of Algorithm 1 over the keys begin..end; CUT where the mask cuts tiles."""
    for start in tl.range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        if PAGE_SIZE:
            page, slot, real = locate_tile(start, seqlen_k, table, num_pages, PAGE_SIZE, BLOCK_N)
            offset_k = page * page_stride_k + slot * stride_k
            offset_v = page * page_stride_v + slot * stride_v
        else:
            real = j < seqlen_k
            offset_k = j.to(tl.int64) * stride_k
            offset_v = j.to(tl.int64) * stride_v
        WHOLE: tl.constexpr = not (CUT or PAGE_SIZE)
        k_tile = load_rows(k, offset_k, real, WHOLE, HEAD_DIM, D)  # [N, D]
        s = tl.dot(q, k_tile.T)  # [M, N]
        if CUT:
            seen = mask.sees(i[:, None], j[None, :], diagonal, left, right, seqlen_k, LEFT, RIGHT)
            s = tl.where(seen, s, float("-inf"))
        m, alpha, p = softmax.rescale(m, s, scale)
        l = l * alpha + tl.sum(p, 1)
        v_tile = load_rows(v, offset_v, real, WHOLE, HEAD_DIM, D)  # [N, D]
        o = tl.dot(p.to(v_tile.dtype), v_tile, o * alpha[:, None])
    return m, l, o
