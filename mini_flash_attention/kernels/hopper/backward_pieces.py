"""Tiles of the Hopper backward kernels, and the products of a consumer with them.

A tile of 192 columns lies in three pieces of 64, because shapes are powers of two.
"""

from ..gluon import (
    fence_async_shared,
    gl,
    gluon,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip
from ..tma import LAST
from .pipeline import accumulator

END = gl.constexpr(LAST)  # the end of a packed sequence, for TMA (`tma.sequence_box`)


def piece_columns(columns: int) -> int:
    """Columns of a piece of a tile, all of them but where they are no power of two."""
    return 64 if columns == 192 else columns


piece = gluon.constexpr_function(piece_columns)


@gluon.constexpr_function
def num_pieces(columns):
    """Pieces of a tile; `multiply_add` and `multiply_transposed` begin so many products."""
    return 3 if columns == 192 else 1


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
        x = gl.zeros([64, W], gl.float32, accumulator(W))
        made = made + (x,)  # type: ignore[assignment]  # noqa: RUF005
    return made


@gluon.jit
def multiply_add(a, tiles, number, total, COLUMNS: gl.constexpr, ROWS: gl.constexpr):
    """Begin total += a b for a tile b [ROWS, COLUMNS]; a is in registers, `total` as `zeros`."""
    COUNT: gl.constexpr = num_pieces(COLUMNS)
    added = ()
    for c in gl.static_range(COUNT):
        b = matrix(tiles, number * COUNT + c, ROWS, COLUMNS)
        x = warpgroup_mma(a, b, total[c], is_async=True)
        added = added + (x,)  # type: ignore[assignment]  # noqa: RUF005
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
    a, i, b, j, start, COLUMNS: gl.constexpr, ROWS_A: gl.constexpr, ROWS_B: gl.constexpr,
    USE_ACC: gl.constexpr = True,
):  # fmt: skip
    """Begin start + a bᵀ for the i-th tile of a and the j-th of b; not USE_ACC: a bᵀ."""
    COUNT: gl.constexpr = num_pieces(COLUMNS)
    for c in gl.static_range(COUNT):
        x = matrix(a, i * COUNT + c, ROWS_A, COLUMNS)
        y = matrix(b, j * COUNT + c, ROWS_B, COLUMNS)
        start = warpgroup_mma(x, y.permute((1, 0)), start, use_acc=USE_ACC or c > 0, is_async=True)
    return start
