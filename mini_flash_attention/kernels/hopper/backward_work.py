"""What a program of a Hopper backward kernel does: its keys, and the blocks of their queries."""

from typing import Any, NamedTuple

from ...rules import mask, work
from ...rules.window import Window
from ..gluon import gl, gluon, tma_add
from ..launch import CompileTime
from .backward_pieces import END


class Facts(NamedTuple):
    """What the kernel is compiled for."""

    D: Any  # columns of a tile of Q and K
    D_V: Any  # and of V and dO
    BLOCK_M: Any
    BLOCK_N: Any
    GROUP: Any  # query heads of a KV head
    VARLEN: Any  # whether queries and keys are packed sequences
    ADDS_DQ: Any  # whether programs of keys add to dQ
    ORDERED: Any  # in a fixed order


class Config(CompileTime, Facts):
    """`Facts`, as the kernel takes them."""

    __slots__ = ()


class Rows(NamedTuple):
    """Rows of a sequence."""

    b: Any
    offset: Any  # the first row, where sequences are packed
    count: Any


class Work(NamedTuple):
    """BLOCK_N keys of a KV head, and the queries that see them."""

    b: Any
    head_k: Any
    keys: Any  # `Rows` in use
    writable: Any
    n_row: Any  # the first of the BLOCK_N
    queries: Any  # `Rows`
    blocks: Any  # of queries: `mask.KeyBlocks`, seen from the keys
    num_partial: Any  # blocks of a head that may need a mask
    num_full: Any
    head_stride: Any  # rows of L and delta from head to head
    first_row: Any  # of the group's first head in L and delta


@gluon.jit
def work_of(program, lengths, table, left, right, C: gl.constexpr):
    """The program's work. Keys are handed to the rules as what sees queries (`portable/backward`).

    The first keys of a head come first: under a causal mask most queries see them. Where programs
    take turns the last ones do, so that none waits for one that starts later (`turn_of`).
    """
    BLOCK_M: gl.constexpr = C.BLOCK_M
    BLOCK_N: gl.constexpr = C.BLOCK_N
    number = program
    if not C.ORDERED:
        number = gl.num_programs(0) - 1 - program
    tile = work.work_tile(number, lengths, table, BLOCK_N)
    offset_q, length_q = work.key_span(tile.b, lengths, 0)
    from_keys = Window(length_q - tile.num_rows, right, left, None, length_q)
    blocks = work.n_block_range(tile.m_row, tile.num_rows, from_keys, BLOCK_N, BLOCK_M)
    # A tile after a packed sequence's end has no blocks, but may have a full_begin after their end.
    full_begin, full_end = gl.minimum(blocks.full_begin, blocks.end), blocks.full_end
    if C.ADDS_DQ:
        # With keys past the end no block is full: their dS may be infinite in fp16, and is hidden.
        masked = tile.m_row + BLOCK_N > tile.num_rows
        if C.ORDERED and left is not None:
            # Blocks in their order, the partial ones of both of the window's ends among them. Else
            # a program would come to the last of them, where others wait for it, first.
            masked = masked | True
        full_begin = gl.where(masked, blocks.end, full_begin)
        full_end = gl.where(masked, blocks.end, full_end)
    blocks = mask.KeyBlocks(blocks.begin, full_begin, full_end, blocks.end)
    num_full = (blocks.full_end - blocks.full_begin) // BLOCK_M
    num_partial = (blocks.end - blocks.begin) // BLOCK_M - num_full
    total_q = lengths.total_k
    head = tile.head * C.GROUP
    if not C.VARLEN:
        head += tile.b * table.nheads * C.GROUP
    return Work(
        tile.b, tile.head, Rows(tile.b, tile.offset_q, tile.num_rows), tile.writable, tile.m_row,
        Rows(tile.b, offset_q, length_q), blocks, num_partial, num_full, total_q,
        head * total_q + offset_q,
    )  # fmt: skip


@gluon.jit
def partial_block(n, job, C: gl.constexpr):
    """(member of the group, first query) of the n-th block of queries that may need a mask."""
    member, block = n * 0, n
    if C.GROUP > 1:
        member, block = n // job.num_partial, n % job.num_partial
    return member, partial_start(block, job.blocks, C.BLOCK_M)


@gluon.jit
def partial_start(n, blocks, BLOCK: gl.constexpr):
    """Where the n-th block begins that may need a mask: full ones lie between them."""
    start = blocks.begin + n * BLOCK
    return start + gl.where(start < blocks.full_begin, 0, blocks.full_end - blocks.full_begin)


@gluon.jit
def full_block(n, job, C: gl.constexpr):
    """(member of the group, first query) of the n-th full block of queries."""
    member, block = n * 0, n
    if C.GROUP > 1:
        member, block = n // job.num_full, n % job.num_full
    return member, job.blocks.full_begin + block * C.BLOCK_M


@gluon.jit
def nth_block(n, job, C: gl.constexpr):
    """(member of the group, first query) of the n-th block: partial ones come first."""
    all_partial = C.GROUP * job.num_partial
    if n < all_partial:
        member, row = partial_block(n, job, C)
    else:
        member, row = full_block(n - all_partial, job, C)
    return member, row


@gluon.jit
def num_blocks(job, C: gl.constexpr):
    """Blocks of queries, for all heads of the group."""
    return C.GROUP * (job.num_partial + job.num_full)


@gluon.jit
def turn_of(job, row, left, right, C: gl.constexpr):
    """How many programs add to dQ's block from `row` before this one: those of later keys."""
    BLOCK_M: gl.constexpr = C.BLOCK_M
    BLOCK_N: gl.constexpr = C.BLOCK_N
    length_q, length_k = job.queries.count, job.keys.count
    window = Window(length_k - length_q, left, right, None, length_k)
    return work.later_n_blocks(job.n_row, row, length_q, window, BLOCK_M, BLOCK_N)


@gluon.jit
def add_dq(desc, job, member, row, which: gl.constexpr, tile, C: gl.constexpr):
    """Add a consumer's half of dQ's block, 64 rows or half of the columns, up to the sequence's
    end.
    """
    column = 0
    if C.BLOCK_M == 64:
        column = which * (C.D // 2)
    else:
        row += 64 * which
    head = job.head_k * C.GROUP + member
    queries = job.queries
    if C.VARLEN:
        end = queries.offset + queries.count
        tma_add(desc, [END, end, head, END - queries.count + row, column], tile)
    else:
        tma_add(desc, [queries.b, head, row, column], tile)
