"""Work tiles of the forward kernels: from a number to query rows, and to the keys they see."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import mask, sequence, tile_order


class Grid(NamedTuple):
    """All work tiles of a launch: blocks of query rows by heads of the batch."""

    batch: Any
    nheads: Any
    num_m_blocks: Any  # blocks of query rows, for each head
    l2_group: Any  # heads whose keys share the L2 cache


class WorkTile(NamedTuple):
    """BLOCK_M query rows of one head."""

    b: Any
    head: Any
    offset_q: Any  # the entry's first row
    num_rows: Any  # rows in use
    writable: Any  # rows to write
    m_row: Any  # the tile's first row, counted in the entry


@triton.jit
def work_tile(number, lengths, table, BLOCK_M: tl.constexpr):
    """The `number`-th work tile of a `Grid`.

    The last entry also writes the rows after it, which belong to no sequence. Rows that are not in
    use are written too.
    """
    if lengths.cu_seqlens_q is None:
        batch_heads = table.batch * table.nheads
        tile, batch_head = tile_order.m_block_and_head(
            number, table.num_m_blocks, batch_heads, table.l2_group
        )
        b = batch_head // table.nheads
        offset_q, num_rows = 0, lengths.seqlen_q
        writable = lengths.seqlen_q
    else:
        tile, batch_head = tile_order.m_block_and_head(
            number, table.num_m_blocks, table.nheads, table.l2_group
        )
        b, tile = sequence.find(tile, lengths.cu_seqlens_q, table.batch, lengths.total_q, BLOCK_M)
        offset_q, length_q = sequence.query_span(b, lengths.cu_seqlens_q, lengths.total_q)
        num_rows = tl.minimum(length_q, lengths.seqlen_q)
        num_rows = sequence.used_queries(b, lengths.seqused_q, num_rows)
        writable = tl.where(b == table.batch - 1, lengths.total_q - offset_q, length_q)
    return WorkTile(b, batch_head % table.nheads, offset_q, num_rows, writable, tile * BLOCK_M)


@triton.jit
def key_span(b, lengths, seqlen_q):
    """(first key, number of keys) of entry b, which has seqlen_q queries in use."""
    offset_k = 0
    length_k = lengths.seqlen_k
    if lengths.cu_seqlens_k is not None:
        offset_k, length_k = sequence.span(b, lengths.cu_seqlens_k, lengths.total_k)
    if lengths.seqused_k is not None:
        appended = tl.where(lengths.appended < 0, seqlen_q, lengths.appended)
        length_k = sequence.used_length(b, lengths.seqused_k, appended, length_k)
    return offset_k, tl.minimum(length_k, lengths.seqlen_k)


@triton.jit
def cache_row(b, lengths, length_k):
    """(row of the cache, keys in use) of entry b by cache_batch_idx: no key where the row does not
    exist.
    """
    row, there = sequence.cache_row(b, lengths.cache_batch_idx, lengths.cache_rows)
    return row, tl.where(there, length_k, 0)


@triton.jit
def n_block_range(
    m_row, num_rows, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr = 1
):
    """`mask.n_block_range` of the BLOCK_M rows from `m_row`: none after the sequence's end.

    GROUP: rows of a query token, a divisor of BLOCK_M.
    """
    last = tl.minimum(m_row + BLOCK_M, num_rows) // GROUP - 1
    seen = mask.n_block_range(m_row // GROUP, last, window, BLOCK_N)
    end = tl.where(m_row < num_rows, seen.end, seen.begin)
    return mask.KeyBlocks(seen.begin, seen.full_begin, tl.minimum(seen.full_end, end), end)


@triton.jit
def later_n_blocks(n_row, m_row, num_rows, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many blocks after that of the BLOCK_N keys from `n_row` the rows from `m_row` see."""
    seen = n_block_range(m_row, num_rows, window, BLOCK_M, BLOCK_N)
    return (seen.end - n_row) // BLOCK_N - 1
