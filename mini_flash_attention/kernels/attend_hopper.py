"""The inner loop of Algorithm 1 on Hopper, for a consumer of 64 query rows.

The scores of the next tile of keys are issued together with the weighted sum of this one. While the
tensor cores are at the sum, the maxima are found, where they are (FAST). The exponentials come
after it and meet another consumer's products, but where there are never any maxima and rows are
long (EARLY). Three consumers issue in turn.
"""

from ..rules import mask, softmax, work
from ..rules.scores import modified
from . import handover, hopper
from .hopper import fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def sums(p, BLOCK_N: gl.constexpr):
    """Sums [64, 4] of what one thread holds of a row; the four are added at the end."""
    return gl.sum(gl.sum(gl.reshape(p, [64, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def by_row(x, like):
    """x [64] as a column that broadcasts over `like`."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout)), 1)


@gluon.jit
def scores(q, keys, n, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Begin q kᵀ for the n-th tile of keys."""
    k = hopper.tile(keys, n).reshape([BLOCK_N, D]).permute((1, 0))
    zeros = gl.zeros([64, BLOCK_N], gl.float32, hopper.accumulator(BLOCK_N))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def by_place(s, start, BLOCK_N: gl.constexpr):
    """Scores [64, BLOCK_N / 8, 4, 2] with their rows i and keys: start + n, `start` a tile.

    Of key 8 a + 2 b + c a thread knows a and c when it is compiled: b goes to the start.
    """
    pieces = gl.reshape(s, [64, BLOCK_N // 8, 4, 2])
    rest: gl.constexpr = gl.SliceLayout(3, pieces.type.layout)
    a = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, rest)))
    b = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, rest)))
    c = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, pieces.type.layout))))
    i = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, rest)))
    n = 8 * a[None, :, None, None] + c[None, None, None, :]
    return pieces, i[:, None, None, None], (start + 2 * b)[None, None, :, None], n


@gluon.jit
def as_before(pieces, s):
    """What `by_place` cut apart, laid out like s."""
    return gl.convert_layout(gl.reshape(pieces, s.shape), s.type.layout, assert_trivial=True)


@gluon.jit
def masked(
    s, which: gl.constexpr, turns, turn, start, left, right,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Scores with -inf where the query of a row does not see the key; keys from `start`."""
    # Read again where they are needed, instead of held in registers all along.
    length_k = handover.word(turns, turn, handover.LENGTH_K)
    diagonal = length_k - handover.word(turns, turn, handover.ROWS_Q) // GROUP
    first = handover.word(turns, turn, handover.FIRST) + 64 * which
    pieces, i, shift, n = by_place(s, start, BLOCK_N)
    i = (first + i) // GROUP - shift
    seen = mask.sees(i, n, diagonal, left, right, None, length_k - shift, LEFT, RIGHT)
    return as_before(gl.where(seen, pieces, float("-inf")), s)


LOWEST = gl.constexpr(-3.4028234663852886e38)  # of fp32: no score lies below
SLACK = gl.constexpr(8.0)  # powers of 2 by which a weight may exceed 1 where sums are moved lazily
LARGE = gl.constexpr(2.0**27)  # from here on rounding m * scale is off by more than 2^4
# Of sums of weights where maxima are not followed: up to SAFE products have about as much room as
# ever, up to LIMIT an LSE is right.
SAFE, LIMIT = gl.constexpr(2.0**12), gl.constexpr(2.0**32)


@gluon.jit
def rescale(m, s, tilt, scale, LAZY: gl.constexpr):
    """`softmax.rescale` with one instruction an element fewer: scale and subtract in one.

    Returns m, alpha, and what `weights` makes weights of: scores, factor, reference.

    LAZY: m follows a row's maximum only where it has grown by more than SLACK, so that most tiles
    leave what was summed before as it is (an idea of FlashAttention-4).
    tilt: None, or what `tilted` says is still to be added to the scores.

    A row begins with m = LOWEST, so that m is a number. What is subtracted, m times a factor, is
    rounded. Inside a tile all weights share that, and it cancels; between tiles with different
    maxima it does not, since alpha is exact: from |m * scale| = 2^16 on such tiles are weighed
    against each other with errors like those of scores one fp32 rounding apart. The factor is
    `scale`, unless their product is so large that weights could overflow: then a power of 2,
    with which nothing is rounded, and m * factor lies between 2^26 and 2^27. A score one rounding
    below the maximum weighs 2^-8 or less there.
    """
    if tilt is None:
        top = gl.max(s, 1)
    else:
        pieces = gl.reshape(s, [64, s.shape[1] // 8, 4, 2])
        top = gl.max(gl.max(gl.max(pieces, 3), 1) + tilt, 1)
        top = gl.convert_layout(top, m.type.layout, assert_trivial=True)
    m_new = gl.where(top > m + SLACK / scale, top, m) if LAZY else gl.maximum(m, top)
    # Where scores should be higher, it is lower instead.
    reference = m_new if tilt is None else by_row(m_new, tilt) - tilt
    exponent = reference.to(gl.int32, bitcast=True) & 0x7F800000
    power = (((127 + 26 + 127 << 23) - 2**32) - exponent).to(gl.float32, bitcast=True)
    factor = gl.where(gl.abs(reference) > LARGE / scale, power, scale)
    alpha = gl.exp2((m - m_new) * scale)
    reference = gl.expand_dims(reference * factor, 1)
    factor = gl.expand_dims(factor, 1)
    if tilt is not None:
        s, factor, reference = pieces, gl.expand_dims(factor, 3), gl.expand_dims(reference, 3)
    return m_new, alpha, s, factor, reference


@gluon.jit
def weights(s, factor, reference, SCORES: gl.constexpr, like):
    """2^(s * factor - reference), laid out like `like`."""
    p = hopper.exp2(s * factor) if SCORES == "bounded" else gl.exp2(s * factor - reference)
    return as_before(p, like) if len(p.shape) == 4 else p


@gluon.jit
def moved(l, o, alpha, LAZY: gl.constexpr):
    """Sums over earlier tiles, to the new reference."""
    o = hopper.scaled(o, by_row(alpha, o)) if LAZY else o * by_row(alpha, o)
    return l * by_row(alpha, l), o


@gluon.jit
def outgrown(m, l, o, rows, scale, LEFT: gl.constexpr):
    """Whether any of the first so many rows has outgrown its reference m, in l or in o.

    Nor can those do without maxima whose factor is not the scale (`rescale`). Behind a window's
    left end sums may have been scaled down again.
    """
    mine = gl.arange(0, 64, l.type.layout) < rows
    top = gl.where((gl.abs(m) > LARGE / 2 / scale) & (l > 0.0), float("inf"), l)
    top = gl.max(gl.where(mine, top, 0.0), 0)
    found = top > LIMIT
    if LEFT or top > SAFE:
        infinite = gl.where(gl.expand_dims(mine, 1) & (not (gl.abs(o) < float("inf"))), 1, 0)
        found |= gl.max(gl.max(infinite, 1), 0) > 0
    return found


@gluon.jit
def tilted(s, first, start, changes, BLOCK_N: gl.constexpr):
    """ALiBi of queries from `first`: scores, and what `rescale` is still to add to them, [64, 4].

    Before all of the queries, or after them, it is linear in the key: of a thread's part of a row
    all but slope * key inside the tile is the same, and left to the maximum. Keys are counted from
    the one next to the queries, where scores are largest and no digit may be lost.
    """
    pieces, i, shift, n = by_place(s, start, BLOCK_N)
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, pieces.type.layout))
    row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(2 * gl.arange(0, 4, gl.SliceLayout(0, layout)), 0)
    slope = changes[2] * changes[0]
    tilt = slope * (start - first + column - row).to(gl.float32)
    if (start < first + 64) & (start + BLOCK_N > first):
        pieces = modified(pieces, 0, 0, first + i, shift, n, changes, "linear", None)
        tilt = gl.zeros_like(tilt)
    elif start < first:
        pieces = pieces + slope * (n - BLOCK_N).to(gl.float32)
        tilt += slope * BLOCK_N
    else:
        pieces = pieces - slope * n.to(gl.float32)
        tilt = -tilt
    return as_before(pieces, s), tilt


@gluon.jit
def weighed(
    m, s, factor, reference, first, b, head, start, scale, changes, cut, exact,
    which: gl.constexpr, turns, turn, left, right,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LAZY: gl.constexpr,
    SCORES: gl.constexpr, SCORE_MOD: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """`rescale` of what becomes of scores of queries from `first` and keys from `start`, with the
    mask where it is `cut`. A tile that is not `exact`, and not cut, goes by the factor and the
    reference of the one before.
    """
    tilt = None
    if SCORES == "linear":
        s, tilt = tilted(s, first, start, changes, BLOCK_N)
    elif SCORE_MOD is not None or changes[2] is not None:
        pieces, i, shift, n = by_place(s, start, BLOCK_N)
        pieces = modified(pieces, b, head, first + i, shift, n, changes, SCORES, SCORE_MOD)
        s = as_before(pieces, s)
    elif SCORES != "":
        s = modified(s, 0, 0, 0, 0, 0, changes, SCORES, SCORE_MOD)
    alpha = m
    if exact:
        if cut:
            s = masked(s, which, turns, turn, start, left, right, LEFT, RIGHT, BLOCK_N, GROUP)
        if SCORES != "bounded":
            m, alpha, s, factor, reference = rescale(m, s, tilt, scale, LAZY)
    return m, alpha, s, factor, reference


@gluon.jit
def narrowed(p, like):
    """p in the dtype of `like`, neighbours together. Left to itself LLVM at times pairs others."""
    BF16: gl.constexpr = like.dtype == gl.bfloat16
    PTX: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if BF16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(PTX, "=r,f,f", [p], like.dtype, True, 2)


@gluon.jit
def attend(
    which: gl.constexpr, queries, worked, keys, values, done, turns, turn, left, right, scale,
    changes, LEFT: gl.constexpr, RIGHT: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr, FAST: gl.constexpr, SCORES: gl.constexpr, SCORE_MOD: gl.constexpr,
):  # fmt: skip
    """Lines 6 to 12 of Algorithm 1 for 64 rows of a tile of work: (m, l, o).

    Keys from the last to the first, `done` tiles of them in the turns before.
    """
    O: gl.constexpr = hopper.accumulator(D)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    BOUNDED: gl.constexpr = SCORES == "bounded"
    LAZY: gl.constexpr = D > 64  # fewer columns are as soon moved as asked for
    EARLY: gl.constexpr = BOUNDED and D > 128
    GROUP: gl.constexpr = queries.tiles.shape[3]
    slot = hopper.q_place(queries, worked, which, CONSUMERS)
    mbarrier.wait(hopper.arrival(queries, worked, which, CONSUMERS), worked // 2 & 1)
    q = queries.tiles.index(slot).reshape([64, D])
    if SCORES == "folded":  # the scale
        x = q.load(hopper.FOUR_ROWS)
        q.store((x.to(gl.float32) * changes[0]).to(q.dtype))
        fence_async_shared()
    begin = handover.word(turns, turn, handover.BEGIN)
    stop = done + handover.word(turns, turn, handover.TILES)
    first = handover.word(turns, turn, handover.FIRST) + 64 * which
    rows_q = handover.word(turns, turn, handover.ROWS_Q)
    length_k = handover.word(turns, turn, handover.LENGTH_K)
    # These rows may see fewer tiles than all of the consumers' do. One is looked at in any case.
    _, clear_begin, clear_end, last = work.key_tiles(
        first, rows_q, length_k, left, right, None, LEFT, RIGHT, 64, BLOCK_N, GROUP
    )
    own = gl.maximum(done, stop - gl.maximum((last - begin) // BLOCK_N, 1))
    for n in range(done, own):
        hopper.pass_by(which, keys, values, n, CONSUMERS)
    done, start = own, begin + (stop - own - 1) * BLOCK_N
    fast = stop
    if FAST and handover.word(turns, turn, handover.AGAIN + which) == 0:
        # The first tile without maxima: the next one after that of the last key that all rows see.
        seen = (first - rows_q) // GROUP + length_k + right + 1 if RIGHT else length_k
        fast -= gl.maximum(gl.cdiv(gl.minimum(seen, length_k) - begin, BLOCK_N) - 1, 0)
    # Where the first query stands, and whose it is: for what becomes of scores, else not read.
    first += length_k - rows_q
    b, head = handover.word(turns, turn, handover.B), handover.word(turns, turn, handover.HEAD)

    hopper.filled(keys, done, True)
    hopper.my_turn(which, CONSUMERS)
    s = scores(q, keys, done, BLOCK_N, D)
    hopper.your_turn(which, CONSUMERS)
    THROUGH: gl.constexpr = queries.tiles.shape[0] >= 2 * CONSUMERS
    if THROUGH and worked > 0:  # the rows of the tile of work before are written out by now
        hopper.tma.store_wait(0)
        mbarrier.arrive(queries.free.index(hopper.q_place(queries, worked - 1, which, CONSUMERS)))
    s = warpgroup_mma_wait(0, deps=[s])
    hopper.free(keys, done, CONSUMERS)
    m = gl.full([64], 0.0 if BOUNDED else LOWEST, gl.float32, gl.SliceLayout(1, s.type.layout))
    cut = (start >= clear_end) | (start < clear_begin if LEFT else False)
    m, alpha, found, factor, reference = weighed(
        m, s, scale, m, first, b, head, start, scale, changes, cut, True,
        which, turns, turn, left, right,
        LEFT, RIGHT, LAZY, SCORES, SCORE_MOD, BLOCK_N, GROUP,
    )  # fmt: skip
    p = weights(found, factor, reference, SCORES, s)
    l = sums(p, BLOCK_N)
    o = gl.zeros([64, D], gl.float32, O)
    p = gl.convert_layout(narrowed(p, q), P)
    hopper.filled(keys, done + 1, done + 1 < stop)
    for n in range(done + 1, stop):
        start -= BLOCK_N
        hopper.my_turn(which, CONSUMERS)
        s = scores(q, keys, n, BLOCK_N, D)
        hopper.filled(values, n - 1, True)
        v = hopper.tile(values, n - 1).reshape([BLOCK_N, D])
        o = warpgroup_mma(p, v, o, is_async=True)
        hopper.your_turn(which, CONSUMERS)
        s = warpgroup_mma_wait(1, deps=[s])
        hopper.free(keys, n, CONSUMERS)
        cut = (start >= clear_end) | (start < clear_begin if LEFT else False)
        exact = (n < fast) | (start < clear_begin if LEFT else False)
        m, alpha, found, factor, reference = weighed(
            m, s, factor, reference, first, b, head, start, scale, changes, cut,
            exact if FAST else True, which, turns, turn, left, right,
            LEFT, RIGHT, LAZY, SCORES, SCORE_MOD, BLOCK_N, GROUP,
        )  # fmt: skip
        if EARLY:
            p_next = weights(found, factor, reference, SCORES, s)
        # A branch: else ptxas moves the next wait to before the maxima.
        hopper.filled(keys, n + 1, n + 1 < stop)
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        hopper.free(values, n - 1, CONSUMERS)
        if not BOUNDED and (exact if FAST else True):
            l, o = moved(l, o, alpha, LAZY)
        if not EARLY:
            p_next = weights(found, factor, reference, SCORES, s)
        l += sums(p_next, BLOCK_N)
        p = gl.convert_layout(narrowed(p_next, q), P)
    if not THROUGH:
        mbarrier.arrive(queries.free.index(slot))
    hopper.filled(values, stop - 1, True)
    v = hopper.tile(values, stop - 1).reshape([BLOCK_N, D])
    o = warpgroup_mma(p, v, o, is_async=True)
    l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, O))
    o = warpgroup_mma_wait(0, deps=[o])
    hopper.free(values, stop - 1, CONSUMERS)
    if BOUNDED:
        gl.static_assert(GROUP == 1)  # no heads are packed beside a soft cap
        # Read again where they are needed, instead of held in registers all along.
        length_k = handover.word(turns, turn, handover.LENGTH_K)
        diagonal = length_k - handover.word(turns, turn, handover.ROWS_Q)
        i = handover.word(turns, turn, handover.FIRST) + 64 * which
        i += gl.arange(0, 64, l.type.layout)
        seen = mask.count(i, diagonal, left, right, None, length_k, LEFT, RIGHT)
        o *= gl.expand_dims(softmax.unrounded(l, seen, q.dtype), 1)
    return gl.convert_layout(m, gl.SliceLayout(1, O)), l, o
