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
def locate_tile(
    start, j, seqlen_k, table, num_pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Places of the keys j = start..start + BLOCK_N; one look at the table if a page holds them."""
    if PAGE_SIZE % BLOCK_N == 0:
        page, slot, real = paging.locate(start, start < seqlen_k, table, num_pages, PAGE_SIZE)
        slot += tl.arange(0, BLOCK_N)
        real = real & (j < seqlen_k)
    else:
        page, slot, real = paging.locate(j, j < seqlen_k, table, num_pages, PAGE_SIZE)
    return page, slot, real


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
        in_use = j < seqlen_k
        if PAGE_SIZE:
            page, slot, real = locate_tile(start, j, seqlen_k, table, num_pages, PAGE_SIZE, BLOCK_N)
            offset_k = page * page_stride_k + slot * stride_k
            offset_v = page * page_stride_v + slot * stride_v
        else:
            real = in_use
            offset_k = j.to(tl.int64) * stride_k
            offset_v = j.to(tl.int64) * stride_v
        WHOLE: tl.constexpr = not (CUT or PAGE_SIZE)
        k_tile = load_rows(k, offset_k, real, WHOLE, HEAD_DIM, D)  # [N, D]
        s = tl.dot(q, k_tile.T)  # [M, N]
        if CUT:
            seen = mask.sees(i[:, None], j[None, :], diagonal, left, right, seqlen_k, LEFT, RIGHT)
            s = tl.where(seen, s, float("-inf"))
        if PAGE_SIZE:
            s = tl.where(real[None, :], s, float("-inf"))
        m, alpha, p = softmax.rescale(m, s, scale)
        l = l * alpha + tl.sum(p, 1)
        v_tile = load_rows(v, offset_v, real, WHOLE, HEAD_DIM, D)  # [N, D]
        o = tl.dot(p.to(v_tile.dtype), v_tile, o * alpha[:, None])
    return m, l, o
