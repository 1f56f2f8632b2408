"""The mainloop of a Hopper consumer, for 64 query rows: key blocks from the last to the first.

The timeline of two consumers at head_dim 128 in key blocks of 128, 32 cycles a character
(docs/hopper.md says where the numbers come from):

    cycles       0               512             1024            1536            2048
    tensor cores |QK[n] of 0     |PV[n-1] of 0   |QK[n] of 1     |PV[n-1] of 1   |QK[n+1] of 0
    consumer 0   |issue, wait QK |row max|wait PV|exp2, convert_p   |issue, wait QK
    consumer 1   |exp2, convert_p   |issue, wait QK              |row max|wait PV|exp2 ...

S of the next block is issued together with O += P V of this one. The row maximum runs while the
tensor cores are at PV; the exponentials run after it, under the other consumer's products. Two
flags change that: SKIP_MAX leaves out the maxima of most full blocks, and EXP_BEFORE_PV moves the
exponentials ahead of the wait for PV where there are never any maxima and rows are long. Three
consumers issue one after the other (`pipeline.warp_scheduler_barrier_sync`).
"""

from typing import Any, NamedTuple

from ...rules import mask, work
from ...rules import softmax as rule
from ...rules.scores import Scoring
from ...rules.window import Window
from ..gluon import fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from . import pipeline, scheduler, softmax


@gluon.jit
def issue_qk(q, keys, n, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Begin S = Q Kᵀ for the n-th tile of keys."""
    k = pipeline.stage_tile(keys, n).reshape([BLOCK_N, D]).permute((1, 0))
    zeros = gl.zeros([64, BLOCK_N], gl.float32, pipeline.accumulator(BLOCK_N))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def issue_pv(p, values, n, o, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Begin O += P V for the n-th tile of values."""
    v = pipeline.stage_tile(values, n).reshape([BLOCK_N, D])
    return warpgroup_mma(p, v, o, is_async=True)


@gluon.jit
def wait_q(shared, worked, which: gl.constexpr, factor, C: gl.constexpr):
    """Wait for this consumer's 64 rows of Q, [64, D]; fold the scale into them if "folded"."""
    index = pipeline.q_buffer_index(shared.q_buffers, worked, which, C.CONSUMERS)
    mbarrier.wait(pipeline.q_full(shared.q_buffers, worked, which, C.CONSUMERS), worked // 2 & 1)
    q = shared.q_buffers.tiles.index(index).reshape([64, C.D])
    if C.SCORE_MODE == "folded":
        x = q.load(pipeline.FOUR_WARPS_2D)
        q.store((x.to(gl.float32) * factor).to(q.dtype))
        fence_async_shared()
    return q


@gluon.jit
def release_previous_q(shared, worked, which: gl.constexpr, C: gl.constexpr):
    """Wait until TMA has read O from the previous work tile's Q buffer, and release that. The first
    product, issued before, hides the wait.
    """
    if C.TMA_EPILOGUE and worked > 0:
        tma.store_wait(0)
        index = pipeline.q_buffer_index(shared.q_buffers, worked - 1, which, C.CONSUMERS)
        mbarrier.arrive(shared.q_buffers.empty.index(index))


@gluon.jit
def unround_single_keys(o, l, q, rows, C: gl.constexpr):
    """o without the rounding of its only weight, where a row sees one key (no maxima)."""
    gl.static_assert(C.GROUP == 1)  # no heads are packed beside a soft cap
    length_k = scheduler.load_field(rows.sched, rows.work_idx, scheduler.LENGTH_K)
    diagonal = length_k - scheduler.load_field(rows.sched, rows.work_idx, scheduler.NUM_ROWS)
    i = scheduler.load_field(rows.sched, rows.work_idx, scheduler.M_ROW) + 64 * rows.which
    i += gl.arange(0, 64, l.type.layout)
    seen = mask.num_visible(i, Window(diagonal, rows.left, rows.right, None, length_k))
    return o * gl.expand_dims(rule.single_key_factor(l, seen, q.dtype), 1)


class OwnBlocks(NamedTuple):
    """The key blocks of a work tile that 64 of its rows see. Blocks are numbered through all work
    tiles, in the order of the loop: from the last key to the first.
    """

    b0lock: Any  # number of the first block
    stop: Any  # and of the one after the last
    start: Any  # the first block's first key
    full_begin: Any  # keys between which no block needs a mask
    full_end: Any
    skip_from: Any  # number of the first block that may go without maxima
    position: Any  # of the first query among the keys; read only where GROUP is 1


@gluon.jit
def own_blocks(which: gl.constexpr, shared, rows, blocks_before, C: gl.constexpr):
    """Release the blocks that only other consumers' rows see; the `OwnBlocks` that are left, at
    least one. `blocks_before` blocks came before this work tile.
    """
    sched, work_idx = rows.sched, rows.work_idx
    begin = scheduler.load_field(sched, work_idx, scheduler.BEGIN)
    stop = blocks_before + scheduler.load_field(sched, work_idx, scheduler.NUM_BLOCKS)
    consumer_row = scheduler.load_field(sched, work_idx, scheduler.M_ROW) + 64 * which
    num_rows = scheduler.load_field(sched, work_idx, scheduler.NUM_ROWS)
    length_k = scheduler.load_field(sched, work_idx, scheduler.LENGTH_K)
    window = Window(length_k - num_rows // C.GROUP, rows.left, rows.right, None, length_k)
    seen = work.n_block_range(consumer_row, num_rows, window, 64, C.BLOCK_N, C.GROUP)
    b0lock = gl.maximum(blocks_before, stop - gl.maximum((seen.end - begin) // C.BLOCK_N, 1))
    for n in range(blocks_before, b0lock):
        pipeline.skip_block(which, shared.k, shared.v, n, C.CONSUMERS)
    start = begin + (stop - b0lock - 1) * C.BLOCK_N
    skip_from = stop
    if C.SKIP_MAX and scheduler.load_field(sched, work_idx, scheduler.REDO + which) == 0:
        # From the block after that of the last key that all rows see.
        visible = length_k
        if rows.right is not None:
            visible = gl.minimum(mask.last_visible(consumer_row // C.GROUP, window) + 1, length_k)
        skip_from -= gl.maximum(gl.cdiv(visible - begin, C.BLOCK_N) - 1, 0)
    position = consumer_row + (length_k - num_rows)
    return OwnBlocks(b0lock, stop, start, seen.full_begin, seen.full_end, skip_from, position)


@gluon.jit
def cut_at_left(start, own, rows):
    """Whether the window's left side cuts the block of keys from `start`."""
    return start < own.full_begin if rows.left is not None else False


@gluon.jit
def mainloop(
    which: gl.constexpr, shared, rows, worked, blocks_before, scale, modification, C: gl.constexpr,
    SCORE_MOD: gl.constexpr,
):  # fmt: skip
    """FlashAttention-3's Algorithm 2 for 64 rows of a work tile: (m, l, o), not normalised.

    `worked` work tiles with any keys, and `blocks_before` key blocks, came before it.
    """
    CONSUMERS: gl.constexpr = C.CONSUMERS
    D: gl.constexpr = C.D
    BLOCK_N: gl.constexpr = C.BLOCK_N
    O: gl.constexpr = pipeline.accumulator(D)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    BOUNDED: gl.constexpr = C.SCORE_MODE == "bounded"
    LAZY_RESCALE: gl.constexpr = C.LAZY_RESCALE
    EXP_BEFORE_PV: gl.constexpr = BOUNDED and D > 128
    keys, values, sched, work_idx = shared.k, shared.v, rows.sched, rows.work_idx
    q = wait_q(shared, worked, which, modification.factor, C)
    own = own_blocks(which, shared, rows, blocks_before, C)
    b0lock, stop, start = own.b0lock, own.stop, own.start
    b = scheduler.load_field(sched, work_idx, scheduler.BATCH)
    head = scheduler.load_field(sched, work_idx, scheduler.HEAD)
    scoring = Scoring(scale, b, head, modification, None)

    pipeline.consumer_wait(keys, b0lock, True)
    pipeline.warp_scheduler_barrier_sync(which, CONSUMERS)
    s = issue_qk(q, keys, b0lock, BLOCK_N, D)
    pipeline.warp_scheduler_barrier_arrive(which, CONSUMERS)
    release_previous_q(shared, worked, which, C)
    s = warpgroup_mma_wait(0, deps=[s])
    pipeline.consumer_release(keys, b0lock, CONSUMERS)
    m = gl.full(
        [64], 0.0 if BOUNDED else softmax.LOWEST, gl.float32, gl.SliceLayout(1, s.type.layout)
    )
    partial = (start >= own.full_end) | cut_at_left(start, own, rows)
    exponent = softmax.Exponent(scale, m)
    m, alpha, scores, exponent = softmax.softmax_step(
        m, s, exponent, start, partial, True, own.position, rows, scoring, C, SCORE_MOD
    )
    p = softmax.exp2_scores(scores, exponent, C.SCORE_MODE, s)
    l = softmax.row_sums(p, BLOCK_N)
    o = gl.zeros([64, D], gl.float32, O)
    p = gl.convert_layout(softmax.convert_p(p, q), P)
    pipeline.consumer_wait(keys, b0lock + 1, b0lock + 1 < stop)
    for n in range(b0lock + 1, stop):
        start -= BLOCK_N
        pipeline.warp_scheduler_barrier_sync(which, CONSUMERS)
        s = issue_qk(q, keys, n, BLOCK_N, D)  # S = Q Kᵀ
        pipeline.consumer_wait(values, n - 1, True)
        o = issue_pv(p, values, n - 1, o, BLOCK_N, D)  # O += P V
        pipeline.warp_scheduler_barrier_arrive(which, CONSUMERS)
        s = warpgroup_mma_wait(1, deps=[s])
        pipeline.consumer_release(keys, n, CONSUMERS)
        partial = (start >= own.full_end) | cut_at_left(start, own, rows)
        exact = (n < own.skip_from) | cut_at_left(start, own, rows)
        m, alpha, scores, exponent = softmax.softmax_step(
            m, s, exponent, start, partial, exact if C.SKIP_MAX else True, own.position, rows,
            scoring, C, SCORE_MOD,
        )  # fmt: skip
        if EXP_BEFORE_PV:
            p_next = softmax.exp2_scores(scores, exponent, C.SCORE_MODE, s)
        # Behind a branch, because ptxas would move the next wait ahead of the maxima.
        pipeline.consumer_wait(keys, n + 1, n + 1 < stop)
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        pipeline.consumer_release(values, n - 1, CONSUMERS)
        if not BOUNDED and (exact if C.SKIP_MAX else True):
            l, o = softmax.rescale_o(l, o, alpha, LAZY_RESCALE)
        if not EXP_BEFORE_PV:
            p_next = softmax.exp2_scores(scores, exponent, C.SCORE_MODE, s)
        l += softmax.row_sums(p_next, BLOCK_N)
        p = gl.convert_layout(softmax.convert_p(p_next, q), P)
    if not C.TMA_EPILOGUE:  # else the next work tile does it (`release_previous_q`)
        index = pipeline.q_buffer_index(shared.q_buffers, worked, which, CONSUMERS)
        mbarrier.arrive(shared.q_buffers.empty.index(index))
    pipeline.consumer_wait(values, stop - 1, True)
    o = issue_pv(p, values, stop - 1, o, BLOCK_N, D)  # O += P V
    l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, O))
    o = warpgroup_mma_wait(0, deps=[o])
    pipeline.consumer_release(values, stop - 1, CONSUMERS)
    if BOUNDED:
        o = unround_single_keys(o, l, q, rows, C)
    return gl.convert_layout(m, gl.SliceLayout(1, O)), l, o
