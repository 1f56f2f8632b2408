"""The inner loop of Algorithm 1, shared by the Triton kernels: keys and values tile by tile."""

import triton
import triton.language as tl

from ...rules import dropout as dropouts
from ...rules import mask, scores, softmax
from .loads import find_pages, load_rows, row_offsets, slots


@triton.jit
def in_any_window(real, j, i, window):
    """Which of the real keys j may be read. The page of a key before every window may belong to
    another sequence by now.
    """
    real = real & (j >= mask.first_visible(tl.min(i, 0), window))
    if window.first_key is not None:
        real = real & (j >= window.first_key)
    return real


@triton.jit
def attend(
    m, l, o, q, i,  # [M], [M] or [M, N], [M, D], [M, D], [M]
    tiles, PARTIAL: tl.constexpr, at, window, scoring, C: tl.constexpr, SCORE_MOD: tl.constexpr,
):  # fmt: skip
    """Lines 7 to 11 of Algorithm 1 over the keys tiles.begin..tiles.end.

    at: `KeysValues`. PARTIAL: whether any of the blocks may need a mask. C.SHARED_KV_OFFSETS: the
    offsets of k serve v too. l is a sum per row, or one per row and column where summing over the
    columns would wait for other warps in every block.
    """
    if C.PAGE_SIZE:  # looked up a tile ahead, so that no load of keys waits for the block table
        page, there = find_pages(tiles.begin, window.seqlen_k, at, C)
    for start in tl.range(tiles.begin, tiles.end, C.BLOCK_N):
        j = start + tl.arange(0, C.BLOCK_N)
        if C.PAGE_SIZE:
            slot = slots(start, C)
            k_offsets = page * at.page_stride_k + slot * at.stride_k
            v_offsets = k_offsets
            if not C.SHARED_KV_OFFSETS:
                v_offsets = page * at.page_stride_v + slot * at.stride_v
            real = there & (j < window.seqlen_k)
            page, there = find_pages(start + C.BLOCK_N, window.seqlen_k, at, C)
        else:
            real = j < window.seqlen_k
            k_offsets = row_offsets(start, at.stride_k, C)
            v_offsets = k_offsets
            if not C.SHARED_KV_OFFSETS:
                v_offsets = row_offsets(start, at.stride_v, C)
        if PARTIAL and window.left is not None:
            real = in_any_window(real, j, i, window)
        WHOLE: tl.constexpr = not (PARTIAL or C.PAGE_SIZE)
        k = load_rows(at.k, k_offsets, real, WHOLE, C.HEAD_DIM, C.D)  # [N, D]
        s = tl.dot(q, k.T)  # S = Q Kᵀ  [M, N]
        s = scores.modify(
            s, scoring.b, scoring.head, i[:, None] + window.diagonal, start,
            tl.arange(0, C.BLOCK_N)[None, :], scoring.modification, C.SCORE_MODE, SCORE_MOD,
        )  # fmt: skip
        if PARTIAL:
            if (start < tiles.full_begin) | (start >= tiles.full_end):
                s = tl.where(mask.is_visible(i[:, None], j[None, :], window), s, float("-inf"))
        if C.SCORE_MODE == "bounded":
            p = tl.exp2(s * scoring.scale)
            l += tl.sum(p, 1)
        else:
            m, alpha, p = softmax.rescale(m, s, scoring.scale)
            if len(l.shape) == 1:
                l = l * alpha + tl.sum(p, 1)
            else:
                l = l * alpha[:, None] + p
            o = o * alpha[:, None]
        if scoring.dropout is not None:
            kept = dropouts.is_kept(
                scoring.dropout, scoring.b, scoring.head, i[:, None], j[None, :]
            )
            p = tl.where(kept, p, 0.0)
        v = load_rows(at.v, v_offsets, real, WHOLE, C.HEAD_DIM_V, C.D_V)  # [N, D]
        o = tl.dot(p.to(v.dtype), v, o)  # O += P V
    return m, l, o
