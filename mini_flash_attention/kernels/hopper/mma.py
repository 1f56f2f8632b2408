"""The inner loop of Algorithm 1 on Hopper, for a consumer of 64 query rows.

The scores of the next tile of keys are issued together with the weighted sum of this one. While the
tensor cores are at the sum, the maxima are found, where they are (FAST). The exponentials come
after it and meet another consumer's products, but where there are never any maxima and rows are
long (EARLY). Three consumers issue in turn.
"""

from ...rules import mask, work
from ...rules import softmax as rule
from ...rules.scores import Scoring
from ...rules.window import Window
from ..gluon import fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from . import pipeline, scheduler, softmax


@gluon.jit
def scores(q, keys, n, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Begin S = Q Kᵀ for the n-th tile of keys."""
    k = pipeline.tile(keys, n).reshape([BLOCK_N, D]).permute((1, 0))
    zeros = gl.zeros([64, BLOCK_N], gl.float32, pipeline.accumulator(BLOCK_N))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def weighted_sum(p, values, n, o, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Begin O += P V for the n-th tile of values."""
    v = pipeline.tile(values, n).reshape([BLOCK_N, D])
    return warpgroup_mma(p, v, o, is_async=True)


@gluon.jit
def queries(shared, worked, which: gl.constexpr, factor, C: gl.constexpr):
    """Wait for this consumer's 64 rows of Q, [64, D]; multiply them by the factor if "folded"."""
    slot = pipeline.q_place(shared.q, worked, which, C.CONSUMERS)
    mbarrier.wait(pipeline.arrival(shared.q, worked, which, C.CONSUMERS), worked // 2 & 1)
    q = shared.q.tiles.index(slot).reshape([64, C.D])
    if C.SCORES == "folded":  # the scale
        x = q.load(pipeline.FOUR_ROWS)
        q.store((x.to(gl.float32) * factor).to(q.dtype))
        fence_async_shared()
    return q


@gluon.jit
def written(shared, worked, which: gl.constexpr, C: gl.constexpr):
    """Free the rows of the tile of work before, which are written out by now."""
    if C.THROUGH and worked > 0:
        tma.store_wait(0)
        slot = pipeline.q_place(shared.q, worked - 1, which, C.CONSUMERS)
        mbarrier.arrive(shared.q.free.index(slot))


@gluon.jit
def alone(o, l, q, rows, C: gl.constexpr):
    """o without the rounding of its weight where a row sees one key; for rows without maxima."""
    gl.static_assert(C.GROUP == 1)  # no heads are packed beside a soft cap
    length_k = scheduler.word(rows.turns, rows.turn, scheduler.LENGTH_K)
    diagonal = length_k - scheduler.word(rows.turns, rows.turn, scheduler.ROWS_Q)
    i = scheduler.word(rows.turns, rows.turn, scheduler.FIRST) + 64 * rows.which
    i += gl.arange(0, 64, l.type.layout)
    seen = mask.count(i, Window(diagonal, rows.left, rows.right, None, length_k))
    return o * gl.expand_dims(rule.unrounded(l, seen, q.dtype), 1)


@gluon.jit
def attend(
    which: gl.constexpr, shared, rows, worked, done, scale, modification, C: gl.constexpr,
    SCORE_MOD: gl.constexpr,
):  # fmt: skip
    """Lines 6 to 12 of Algorithm 1 for 64 rows of a tile of work: (m, l, o).

    Keys from the last to the first, `done` tiles of them in the turns before.
    """
    CONSUMERS: gl.constexpr = C.CONSUMERS
    D: gl.constexpr = C.D
    BLOCK_N: gl.constexpr = C.BLOCK_N
    O: gl.constexpr = pipeline.accumulator(D)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    BOUNDED: gl.constexpr = C.SCORES == "bounded"
    LAZY: gl.constexpr = C.LAZY
    EARLY: gl.constexpr = BOUNDED and D > 128
    keys, values, turns, turn = shared.k, shared.v, rows.turns, rows.turn
    q = queries(shared, worked, which, modification.factor, C)
    begin = scheduler.word(turns, turn, scheduler.BEGIN)
    stop = done + scheduler.word(turns, turn, scheduler.TILES)
    first = scheduler.word(turns, turn, scheduler.FIRST) + 64 * which
    rows_q = scheduler.word(turns, turn, scheduler.ROWS_Q)
    length_k = scheduler.word(turns, turn, scheduler.LENGTH_K)
    # These rows may see fewer tiles than all of the consumers' do. One is looked at in any case.
    window = Window(length_k - rows_q // C.GROUP, rows.left, rows.right, None, length_k)
    seen = work.key_tiles(first, rows_q, window, 64, BLOCK_N, C.GROUP)
    clear_begin, clear_end = seen.clear_begin, seen.clear_end
    own = gl.maximum(done, stop - gl.maximum((seen.end - begin) // BLOCK_N, 1))
    for n in range(done, own):
        pipeline.pass_by(which, keys, values, n, CONSUMERS)
    done, start = own, begin + (stop - own - 1) * BLOCK_N
    fast = stop
    if C.FAST and scheduler.word(turns, turn, scheduler.AGAIN + which) == 0:
        # The first tile without maxima: the next one after that of the last key that all rows see.
        visible = length_k
        if rows.right is not None:
            visible = gl.minimum(mask.last_visible(first // C.GROUP, window) + 1, length_k)
        fast -= gl.maximum(gl.cdiv(visible - begin, BLOCK_N) - 1, 0)
    # Where the first query stands, and whose it is: for what becomes of scores, else not read.
    first += length_k - rows_q
    b, head = scheduler.word(turns, turn, scheduler.B), scheduler.word(turns, turn, scheduler.HEAD)
    scoring = Scoring(scale, b, head, modification)

    pipeline.filled(keys, done, True)
    pipeline.my_turn(which, CONSUMERS)
    s = scores(q, keys, done, BLOCK_N, D)
    pipeline.your_turn(which, CONSUMERS)
    written(shared, worked, which, C)
    s = warpgroup_mma_wait(0, deps=[s])
    pipeline.free(keys, done, CONSUMERS)
    m = gl.full(
        [64], 0.0 if BOUNDED else softmax.LOWEST, gl.float32, gl.SliceLayout(1, s.type.layout)
    )
    cut = (start >= clear_end) | (start < clear_begin if rows.left is not None else False)
    weighing = softmax.Weighing(scale, m)
    m, alpha, found, weighing = softmax.weighed(
        m, s, weighing, start, cut, True, first, rows, scoring, C, SCORE_MOD
    )
    p = softmax.weights(found, weighing.factor, weighing.reference, C.SCORES, s)
    l = softmax.sums(p, BLOCK_N)
    o = gl.zeros([64, D], gl.float32, O)
    p = gl.convert_layout(softmax.narrowed(p, q), P)
    pipeline.filled(keys, done + 1, done + 1 < stop)
    for n in range(done + 1, stop):
        start -= BLOCK_N
        pipeline.my_turn(which, CONSUMERS)
        s = scores(q, keys, n, BLOCK_N, D)  # S = Q Kᵀ
        pipeline.filled(values, n - 1, True)
        o = weighted_sum(p, values, n - 1, o, BLOCK_N, D)  # O += P V
        pipeline.your_turn(which, CONSUMERS)
        s = warpgroup_mma_wait(1, deps=[s])
        pipeline.free(keys, n, CONSUMERS)
        cut = (start >= clear_end) | (start < clear_begin if rows.left is not None else False)
        exact = (n < fast) | (start < clear_begin if rows.left is not None else False)
        m, alpha, found, weighing = softmax.weighed(
            m, s, weighing, start, cut, exact if C.FAST else True, first, rows, scoring, C,
            SCORE_MOD,
        )  # fmt: skip
        if EARLY:
            p_next = softmax.weights(found, weighing.factor, weighing.reference, C.SCORES, s)
        # A branch: else ptxas moves the next wait to before the maxima.
        pipeline.filled(keys, n + 1, n + 1 < stop)
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        pipeline.free(values, n - 1, CONSUMERS)
        if not BOUNDED and (exact if C.FAST else True):
            l, o = softmax.moved(l, o, alpha, LAZY)
        if not EARLY:
            p_next = softmax.weights(found, weighing.factor, weighing.reference, C.SCORES, s)
        l += softmax.sums(p_next, BLOCK_N)
        p = gl.convert_layout(softmax.narrowed(p_next, q), P)
    if not C.THROUGH:
        slot = pipeline.q_place(shared.q, worked, which, CONSUMERS)
        mbarrier.arrive(shared.q.free.index(slot))
    pipeline.filled(values, stop - 1, True)
    o = weighted_sum(p, values, stop - 1, o, BLOCK_N, D)  # O += P V
    l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, O))
    o = warpgroup_mma_wait(0, deps=[o])
    pipeline.free(values, stop - 1, CONSUMERS)
    if BOUNDED:
        o = alone(o, l, q, rows, C)
    return gl.convert_layout(m, gl.SliceLayout(1, O)), l, o
