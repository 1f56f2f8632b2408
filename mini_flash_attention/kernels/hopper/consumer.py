"""A consumer of the Hopper kernel: four warps, which compute 64 rows of each work tile."""

from ...rules import scores
from ...rules import softmax as rule
from ..gluon import gl, gluon, tma
from . import epilogue, pipeline, scheduler, softmax
from .mma import mainloop


@gluon.jit
def slope_of(sched, work_idx, inputs):
    """ALiBi's slope of the work tile's head."""
    at = scheduler.load_field(sched, work_idx, scheduler.BATCH).to(gl.int64) * inputs.stride_slopes
    return gl.load(inputs.alibi_slopes + at + scheduler.load_field(sched, work_idx, scheduler.HEAD))


@gluon.jit
def sink_of(sched, work_idx, inputs):
    """The sink of the work tile's head."""
    return gl.load(inputs.s_aux + scheduler.load_field(sched, work_idx, scheduler.HEAD)).to(
        gl.float32
    )


@gluon.jit
def needs_redo(m, l, o, tile, rows, scale):
    """Whether the work tile has to be done again, with maxima, because its sums overflowed. The
    producer reads it in the REDO field. A tile is done again once at most.

    Rows after a sequence's end belong to the next one, and don't count.
    """
    sched, work_idx, field = rows.sched, rows.work_idx, scheduler.REDO + rows.which
    redo = softmax.sums_overflow(
        m, l, o, tile.num_rows - tile.consumer_row, scale, rows.left is not None
    )
    redo &= scheduler.load_field(sched, work_idx, field) == 0
    scheduler.store_field(sched, work_idx, field, redo.to(gl.int32), pipeline.FOUR_WARPS)
    return redo


@gluon.jit
def consume(
    which: gl.constexpr, shared, stores, inputs, left, right, C: gl.constexpr,
    SCORE_MOD: gl.constexpr,
):  # fmt: skip
    """Compute and write 64 rows of each work tile, until the producer says there are no more."""
    D: gl.constexpr = C.D
    O: gl.constexpr = pipeline.accumulator(D)
    sched = shared.sched
    if which == C.CONSUMERS - 1:
        # The first consumer issues first.
        pipeline.warp_scheduler_barrier_arrive(which, C.CONSUMERS)
    # Key blocks in the work tiles before, and how many of those had any (worked).
    work_idx, blocks_before, worked = 0, 0, 0
    scheduler.consumer_wait(sched, work_idx)
    while scheduler.load_field(sched, work_idx, scheduler.M_ROW) >= 0:
        rows = softmax.Rows(sched, work_idx, which, left, right)
        o = gl.zeros([64, D], gl.float32, O)
        lse_tile = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, O))
        m, l = lse_tile, gl.zeros_like(lse_tile)
        if scheduler.load_field(sched, work_idx, scheduler.NUM_BLOCKS) > 0:
            slope, sink = inputs.alibi_slopes, inputs.s_aux
            if inputs.alibi_slopes is not None:
                slope = slope_of(sched, work_idx, inputs)
            modification = scores.Modification(inputs.factor, inputs.softcap, slope, inputs.aux)
            m, l, o = mainloop(
                which, shared, rows, worked, blocks_before, inputs.scale, modification, C, SCORE_MOD
            )
            if inputs.s_aux is not None:
                sink = sink_of(sched, work_idx, inputs)
            o, lse_tile = rule.finish(m, l, o, inputs.scale, sink)
        tile = epilogue.tile_of(sched, work_idx, which, C)
        whole, redo = epilogue.fits_tma(tile, C), False
        if C.SKIP_MAX:
            redo = needs_redo(m, l, o, tile, rows, inputs.scale)
            whole &= not redo
        if C.TMA_EPILOGUE and not C.SPLIT:
            if whole:
                epilogue.store_tma(o, shared, worked, which, tile, stores, C)
        worked += (tile.num_blocks > 0).to(gl.int32)
        epilogue.store(o, m, l, lse_tile, which, whole, redo, tile, rows, stores, C)
        blocks_before += tile.num_blocks
        scheduler.consumer_release(sched, work_idx)
        work_idx += 1
        scheduler.consumer_wait(sched, work_idx)
    tma.store_wait(0)
