"""The inner loop of Algorithm 1 on Hopper, for a consumer of 64 query rows.

The scores of the next tile of keys are issued together with the weighted sum of this one, and the
exponentials are worked out while the tensor cores are at it. With PINGPONG consumers issue in
turn, so that one's exponentials meet the other's products.
"""

from ..rules import mask, softmax
from . import hopper
from .hopper import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait


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
def masked(
    s, first, start, diagonal, left, right, length_k,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Scores with -inf where the query of a row does not see the key."""
    i = first + gl.arange(0, 64, gl.SliceLayout(1, s.type.layout))
    j = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
    i_, j_ = gl.expand_dims(i, 1), gl.expand_dims(j, 0)
    seen = mask.sees(i_, j_, diagonal, left, right, length_k, LEFT, RIGHT)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def attend(
    which: gl.constexpr,
    queries, worked, keys, values, done, begin, clear_begin, clear_end, end,
    first, diagonal, left, right, length_k, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr, PINGPONG: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Lines 6 to 12 of Algorithm 1 for the rows from `first`: (m, l, o), keys from end to begin."""
    O: gl.constexpr = hopper.accumulator(D)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    slot = worked % SLOTS * hopper.CONSUMERS + which
    mbarrier.wait(queries.full.index(slot), worked // SLOTS & 1)
    q = queries.tiles.index(slot).reshape([64, D])
    dtype: gl.constexpr = q.dtype
    start = end - BLOCK_N

    hopper.filled(keys, done, True)
    if PINGPONG:
        hopper.my_turn(which)
    s = scores(q, keys, done, BLOCK_N, D)
    if PINGPONG:
        hopper.your_turn(which)
    if SLOTS > 1:
        if worked > 0:  # the rows of the tile of work before are written out by now
            hopper.tma.store_wait(0)
            before = (worked - 1) % SLOTS * hopper.CONSUMERS + which
            mbarrier.arrive(queries.free.index(before))
    s = warpgroup_mma_wait(0, deps=[s])
    hopper.free(keys, done)
    s = masked(s, first, start, diagonal, left, right, length_k, LEFT, RIGHT, BLOCK_N)
    m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s.type.layout))
    m, alpha, p = softmax.rescale(m, s, scale)
    l = sums(p, BLOCK_N)
    o = gl.zeros([64, D], gl.float32, O)
    p = gl.convert_layout(p.to(dtype), P)
    stop = done + (end - begin) // BLOCK_N
    if EARLY:
        hopper.filled(keys, done + 1, done + 1 < stop)
    for n in range(done + 1, stop):
        start -= BLOCK_N
        if not EARLY:
            hopper.filled(keys, n, True)
        if PINGPONG:
            hopper.my_turn(which)
        s = scores(q, keys, n, BLOCK_N, D)
        hopper.filled(values, n - 1, True)
        v = hopper.tile(values, n - 1).reshape([BLOCK_N, D])
        o = warpgroup_mma(p, v, o, is_async=True)
        if PINGPONG:
            hopper.your_turn(which)
        s = warpgroup_mma_wait(1, deps=[s])
        hopper.free(keys, n)
        if (start >= clear_end) | (start < clear_begin):
            s = masked(s, first, start, diagonal, left, right, length_k, LEFT, RIGHT, BLOCK_N)
        m, alpha, p_next = softmax.rescale(m, s, scale)
        l = l * by_row(alpha, l) + sums(p_next, BLOCK_N)
        if EARLY:  # a branch: else ptxas moves the next wait to before the exponentials
            hopper.filled(keys, n + 1, n + 1 < stop)
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        hopper.free(values, n - 1)
        o = o * by_row(alpha, o)
        p = gl.convert_layout(p_next.to(dtype), P)
    hopper.filled(values, stop - 1, True)
    v = hopper.tile(values, stop - 1).reshape([BLOCK_N, D])
    o = warpgroup_mma(p, v, o, is_async=True)
    l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, O))
    o = warpgroup_mma_wait(0, deps=[o])
    hopper.free(values, stop - 1)
    return gl.convert_layout(m, gl.SliceLayout(1, O)), l, o
