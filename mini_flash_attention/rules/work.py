"""What a number stands for in the forward kernels: a tile of query rows, and the keys it sees."""

import triton
import triton.language as tl

from . import grid, mask, sequence


@triton.jit
def queries(
    number, cu_seqlens_q, seqused_q, batch, nheads, tiles, per_group, seqlen_q, total_q,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(b, head, the entry's first row, its rows, those to write, the tile's first row).

    The last entry also writes the rows after it, which belong to no sequence. Rows that are not in
    use are written too.
    """
    if cu_seqlens_q is None:
        units = batch * nheads
        tile, unit = grid.place(number, tiles, units, per_group)
        b = unit // nheads
        first_q, rows_q = 0, seqlen_q
        writable = seqlen_q
    else:
        tile, unit = grid.place(number, tiles, nheads, per_group)
        b, tile = sequence.find(tile, cu_seqlens_q, batch, total_q, BLOCK_M)
        first_q, length_q = sequence.query_span(b, cu_seqlens_q, total_q)
        rows_q = sequence.used_queries(b, seqused_q, tl.minimum(length_q, seqlen_q))
        writable = tl.where(b == batch - 1, total_q - first_q, length_q)
    return b, unit % nheads, first_q, rows_q, writable, tile * BLOCK_M


@triton.jit
def keys(b, cu_seqlens_k, seqused_k, seqlen_k, total_k, appended, rows_q):
    """(first key, number of keys) of entry b; appended < 0: as many as it has queries."""
    first_k = 0
    length_k = seqlen_k
    if cu_seqlens_k is not None:
        first_k, length_k = sequence.span(b, cu_seqlens_k, total_k)
    if seqused_k is not None:
        appended = tl.where(appended < 0, rows_q, appended)
        length_k = sequence.used_length(b, seqused_k, appended, length_k)
    return first_k, tl.minimum(length_k, seqlen_k)


@triton.jit
def key_tiles(
    first, rows_q, length_k, left, right, pad,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr = 1,
):  # fmt: skip
    """`mask.key_tiles` of the BLOCK_M rows from `first`: none after the sequence's end.

    GROUP: rows of a query token, a divisor of BLOCK_M.
    """
    last = tl.minimum(first + BLOCK_M, rows_q) // GROUP - 1
    begin, clear_begin, clear_end, end = mask.key_tiles(
        first // GROUP, last, length_k - rows_q // GROUP, left, right, pad, length_k, BLOCK_N,
        LEFT, RIGHT,
    )  # fmt: skip
    end = tl.where(first < rows_q, end, begin)
    return begin, clear_begin, tl.minimum(clear_end, end), end
