"""A consumer of the Hopper kernel: 64 rows of each tile of work, four warps."""

from ...rules import scores
from ...rules import softmax as rule
from ..gluon import gl, gluon, tma
from . import epilogue, pipeline, scheduler, softmax
from .mma import attend


@gluon.jit
def slope_of(turns, turn, given):
    """ALiBi's slope of a tile of work's head."""
    at = scheduler.word(turns, turn, scheduler.B).to(gl.int64) * given.stride_slopes
    return gl.load(given.alibi_slopes + at + scheduler.word(turns, turn, scheduler.HEAD))


@gluon.jit
def sink_of(turns, turn, given):
    """The sink of a tile of work's head."""
    return gl.load(given.s_aux + scheduler.word(turns, turn, scheduler.HEAD)).to(gl.float32)


@gluon.jit
def wanted_again(m, l, o, tile, rows, scale):
    """Whether sums have outgrown their reference, unless they are the second; the producer is told.

    Rows after a sequence's end are someone else's, and have no say.
    """
    turns, turn, word = rows.turns, rows.turn, scheduler.AGAIN + rows.which
    again = softmax.outgrown(m, l, o, tile.rows_q - tile.first, scale, rows.left is not None)
    again &= scheduler.word(turns, turn, word) == 0
    scheduler.say(turns, turn, word, again.to(gl.int32), pipeline.FOUR)
    return again


@gluon.jit
def consume(
    which: gl.constexpr, shared, stores, given, left, right, C: gl.constexpr,
    SCORE_MOD: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile of work: attention to their keys, and the rows written out."""
    D: gl.constexpr = C.D
    O: gl.constexpr = pipeline.accumulator(D)
    turns = shared.turns
    if which == C.CONSUMERS - 1:
        pipeline.your_turn(which, C.CONSUMERS)  # the first one's first
    # Tiles of keys in the turns before, and turns that had any.
    turn, done, worked = 0, 0, 0
    scheduler.hear(turns, turn)
    while scheduler.word(turns, turn, scheduler.FIRST) >= 0:
        rows = softmax.Rows(turns, turn, which, left, right)
        o = gl.zeros([64, D], gl.float32, O)
        lse_tile = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, O))
        m, l = lse_tile, gl.zeros_like(lse_tile)
        if scheduler.word(turns, turn, scheduler.TILES) > 0:
            slope, sink = given.alibi_slopes, given.s_aux
            if given.alibi_slopes is not None:
                slope = slope_of(turns, turn, given)
            modification = scores.Modification(given.factor, given.softcap, slope, given.aux)
            m, l, o = attend(
                which, shared, rows, worked, done, given.scale, modification, C, SCORE_MOD
            )
            if given.s_aux is not None:
                sink = sink_of(turns, turn, given)
            o, lse_tile = rule.finish(m, l, o, given.scale, sink)
        tile = epilogue.tile_of(turns, turn, which, C)
        whole, again = epilogue.fits_tma(tile, C), False
        if C.FAST:
            again = wanted_again(m, l, o, tile, rows, given.scale)
            whole &= not again
        if C.THROUGH and not C.SPLIT:
            if whole:
                epilogue.store_tma(o, shared, worked, which, tile, stores, C)
        worked += (tile.tiles > 0).to(gl.int32)
        epilogue.store(o, m, l, lse_tile, which, whole, again, tile, rows, stores, C)
        done += tile.tiles
        scheduler.heard(turns, turn)
        turn += 1
        scheduler.hear(turns, turn)
    tma.store_wait(0)
