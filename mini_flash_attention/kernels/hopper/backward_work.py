"""What a program of the Hopper backward kernel does: its keys, and the blocks of their queries."""

from typing import Any, NamedTuple

from ...rules import work
from ...rules.window import Window
from ..gluon import (
    fence_async_shared,
    gl,
    gluon,
    tma_add,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip
from ..launch import CompileTime
from ..tma import LAST
from .pipeline import accumulator

END = gl.constexpr(LAST)  # the end of a packed sequence, for TMA (`tma.sequence_box`)


class Facts(NamedTuple):
    """What the kernel is compiled for."""

    D: Any  # columns of a tile of Q and K
    D_V: Any  # and of V and dO
    BLOCK_M: Any
    BLOCK_N: Any
    GROUP: Any  # query heads of a KV head
    VARLEN: Any  # whether queries and keys are packed sequences
    ORDERED: Any  # whether programs add to dQ in a fixed order


class Config(CompileTime, Facts):
    """`Facts`, as the kernel takes them."""

    __slots__ = ()


def piece_columns(columns: int) -> int:
    """Columns of a piece of a tile, all of them but where they are no power of two."""
    return 64 if columns == 192 else columns


piece = gluon.constexpr_function(piece_columns)


@gluon.constexpr_function
def num_pieces(columns):
    """Pieces of a tile; `multiply_add` and `multiply_transposed` begin so many products."""
    return 3 if columns == 192 else 1


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
def load(
    desc, rows, row, head, barrier, tiles, number, COLUMNS: gl.constexpr, VARLEN: gl.constexpr
):
    """Load rows of a head from the sequence's `row`-th into the `number`-th tile, which may lie in
    pieces; zeros past its end. The caller has told the barrier how many bytes to expect.
    """
    W: gl.constexpr = piece(COLUMNS)
    for c in gl.static_range(num_pieces(COLUMNS)):
        to = tiles.index(number * num_pieces(COLUMNS) + c)
        if VARLEN:
            at = [END, rows.offset + rows.count, END - rows.count + row, head, c * W]
            tma_load(desc, at, barrier, to)
        else:
            tma_load(desc, [rows.b, row, head, c * W], barrier, to)


@gluon.jit
def store(desc, rows, row, head, tiles, number, COLUMNS: gl.constexpr, VARLEN: gl.constexpr):
    """Store the `number`-th tile to rows of a head from the sequence's `row`-th, up to its end."""
    W: gl.constexpr = piece(COLUMNS)
    for c in gl.static_range(num_pieces(COLUMNS)):
        source = tiles.index(number * num_pieces(COLUMNS) + c)
        if VARLEN:
            at = [END, rows.offset + rows.count, END - rows.count + row, head, c * W]
            tma_store(desc, at, source)
        else:
            tma_store(desc, [rows.b, row, head, c * W], source)


@gluon.jit
def matrix(tiles, n, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The n-th piece of tiles that have so many rows and columns, as a matrix."""
    W: gl.constexpr = piece(COLUMNS)
    return tiles.index(n).reshape([ROWS, W])


@gluon.jit
def zeros(COLUMNS: gl.constexpr):
    """Accumulators [64, COLUMNS], one for each piece."""
    W: gl.constexpr = piece(COLUMNS)
    made = ()
    for _ in gl.static_range(num_pieces(COLUMNS)):
        made = made + (gl.zeros([64, W], gl.float32, accumulator(W)),)  # noqa: RUF005
    return made


@gluon.jit
def multiply_add(a, tiles, number, total, COLUMNS: gl.constexpr, ROWS: gl.constexpr):
    """Begin total += a b for a tile b [ROWS, COLUMNS]; a is in registers, `total` as `zeros`."""
    COUNT: gl.constexpr = num_pieces(COLUMNS)
    added = ()
    for c in gl.static_range(COUNT):
        b = matrix(tiles, number * COUNT + c, ROWS, COLUMNS)
        added = added + (warpgroup_mma(a, b, total[c], is_async=True),)  # noqa: RUF005
    return added


@gluon.jit
def wait_for(total, a, LATER: gl.constexpr = 0):
    """`total` when its products are done: `a` was their operand in registers. LATER: products that
    were begun after them.
    """
    return warpgroup_mma_wait(LATER, deps=total + (a,))[: len(total)]  # noqa: RUF005


@gluon.jit
def fill(x, factor, tiles, number, rows, COLUMNS: gl.constexpr):
    """x, accumulators as `zeros`, times a factor into a tile for TMA; zeros from row `rows` on."""
    W: gl.constexpr = piece(COLUMNS)
    row = gl.arange(0, 64, gl.SliceLayout(1, accumulator(W)))
    for c in gl.static_range(num_pieces(COLUMNS)):
        y = gl.where(gl.expand_dims(row < rows, 1), x[c] * factor, 0.0)
        matrix(tiles, number * num_pieces(COLUMNS) + c, 64, COLUMNS).store(y.to(tiles.dtype))
    fence_async_shared()


@gluon.jit
def multiply_transposed(
    a, i, b, j, start, COLUMNS: gl.constexpr, ROWS_A: gl.constexpr, ROWS_B: gl.constexpr
):
    """Begin start + a bᵀ for the i-th tile of a and the j-th of b."""
    COUNT: gl.constexpr = num_pieces(COLUMNS)
    for c in gl.static_range(COUNT):
        x = matrix(a, i * COUNT + c, ROWS_A, COLUMNS)
        y = matrix(b, j * COUNT + c, ROWS_B, COLUMNS)
        start = warpgroup_mma(x, y.permute((1, 0)), start, use_acc=True, is_async=True)
    return start


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
