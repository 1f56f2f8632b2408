"""The inner loop of Algorithm 1, shared by the Triton kernels: keys and values tile by tile."""

import triton
import triton.language as tl

from ..rules import mask, paging, scores, softmax


@triton.jit
def in_eights(b, t, h, EIGHTS: tl.constexpr):
    """Strides, which the compiler sees to be multiples of 8 if EIGHTS (`launch.eights`)."""
    return (b // 8 * 8, t // 8 * 8, h // 8 * 8) if EIGHTS else (b, t, h)


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
def find_pages(
    start, seqlen_k, table, num_pages,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pages of the keys start..start + BLOCK_N, and which can be read: one if it holds them all."""
    n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        page, real = paging.lookup(table + start // PAGE_SIZE, start < seqlen_k, num_pages)
    elif BLOCK_N % PAGE_SIZE == 0:
        entry = table + start // PAGE_SIZE + n // PAGE_SIZE
        page, real = paging.lookup(entry, start + n < seqlen_k, num_pages)
    else:
        entry = table + (start + n) // PAGE_SIZE
        page, real = paging.lookup(entry, start + n < seqlen_k, num_pages)
    return tl.cast(page, tl.int64) if WIDE else page, real


@triton.jit
def slots(start, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Places of the same keys inside their pages; the same for every tile of whole pages."""
    n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        slot = start % PAGE_SIZE + n
    elif BLOCK_N % PAGE_SIZE == 0:
        slot = n % PAGE_SIZE
    else:
        slot = (start + n) % PAGE_SIZE
    return tl.cast(slot, tl.int64) if WIDE else slot


@triton.jit
def rows(start, stride, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the keys start..start + BLOCK_N.

    What is inside a tile fits in 32 bits unless WIDE, and then stays the same from tile to tile:
    a tenth fewer instructions in the loop.
    """
    n = tl.arange(0, BLOCK_N)
    if WIDE:
        return tl.cast(start + n, tl.int64) * stride
    return tl.cast(start, tl.int64) * stride + n * stride


@triton.jit
def attend(
    m, l, o, q, i,  # [M], [M] or [M, N], [M, D], [M, D], [M]
    begin, clear_begin, clear_end, end, CUT: tl.constexpr,
    k, v, stride_k, stride_v, page_stride_k, page_stride_v, table, num_pages,
    diagonal, left, right, pad, seqlen_k, scale, b, head, changes,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, TWINS: tl.constexpr,
    SCORES: tl.constexpr, SCORE_MOD: tl.constexpr,
):  # fmt: skip
    """Lines 7 to 11 of Algorithm 1 over the keys begin..end.

    changes: what `scores.modified` is given. pad: None, or the first key there is.

    CUT: the mask cuts tiles, but none of clear_begin..clear_end. TWINS: the offsets of k serve v
    too. l is a sum per row, or one per row and column where summing over the columns would wait
    for other warps in every tile.
    """
    if PAGE_SIZE:  # looked up a tile ahead, so that no load of keys waits for the block table
        page, there = find_pages(begin, seqlen_k, table, num_pages, PAGE_SIZE, BLOCK_N, WIDE)
    for start in tl.range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        if PAGE_SIZE:
            slot = slots(start, PAGE_SIZE, BLOCK_N, WIDE)
            offset_k = page * page_stride_k + slot * stride_k
            offset_v = offset_k
            if not TWINS:
                offset_v = page * page_stride_v + slot * stride_v
            real = there & (j < seqlen_k)
            page, there = find_pages(
                start + BLOCK_N, seqlen_k, table, num_pages, PAGE_SIZE, BLOCK_N, WIDE
            )
        else:
            real = j < seqlen_k
            offset_k = rows(start, stride_k, BLOCK_N, WIDE)
            offset_v = offset_k
            if not TWINS:
                offset_v = rows(start, stride_v, BLOCK_N, WIDE)
        if CUT and LEFT:  # what lies before every window may be someone else's by now
            real = real & (j >= tl.min(i, 0) + (diagonal - left))
            if pad is not None:
                real = real & (j >= pad)
        WHOLE: tl.constexpr = not (CUT or PAGE_SIZE)
        k_tile = load_rows(k, offset_k, real, WHOLE, HEAD_DIM, D)  # [N, D]
        s = tl.dot(q, k_tile.T)  # [M, N]
        s = scores.modified(
            s, b, head, i[:, None] + diagonal, start, tl.arange(0, BLOCK_N)[None, :], changes,
            SCORES, SCORE_MOD,
        )  # fmt: skip
        if CUT:
            if (start < clear_begin) | (start >= clear_end):
                i_, j_ = i[:, None], j[None, :]
                seen = mask.sees(i_, j_, diagonal, left, right, pad, seqlen_k, LEFT, RIGHT)
                s = tl.where(seen, s, float("-inf"))
        if SCORES == "bounded":
            p = tl.exp2(s * scale)
            l += tl.sum(p, 1)
        else:
            m, alpha, p = softmax.rescale(m, s, scale)
            if len(l.shape) == 1:
                l = l * alpha + tl.sum(p, 1)
            else:
                l = l * alpha[:, None] + p
            o = o * alpha[:, None]
        v_tile = load_rows(v, offset_v, real, WHOLE, HEAD_DIM_V, D_V)  # [N, D]
        o = tl.dot(p.to(v_tile.dtype), v_tile, o)
    return m, l, o
