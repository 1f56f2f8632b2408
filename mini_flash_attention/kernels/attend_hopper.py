"""The inner loop of Algorithm 1 on Hopper, for a consumer of 64 query rows.

The scores of the next tile of keys are issued together with the weighted sum of this one, and the
exponentials are worked out while the tensor cores are at it. With PINGPONG consumers issue in
turn, so that one's exponentials meet the other's products.
"""

from ..rules import mask
from . import hopper
from .hopper import fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait

TURN = gl.constexpr(8)  # named barriers: the turn to issue of each consumer


@gluon.jit
def rescale(m, s, scale):
    """`softmax.rescale` with one instruction fewer an element: it scales and subtracts in one.

    What the rounding of m * scale shifts, it shifts in the weights, their sum and the LSE alike.
    """
    m_new = gl.maximum(m, gl.max(s, 1))
    reference = gl.where(m_new == float("-inf"), 0.0, m_new * scale)
    alpha = gl.exp2(m * scale - reference)
    p = gl.exp2(s * scale - gl.expand_dims(reference, 1))
    return m_new, alpha, p


@gluon.jit
def sums(p, BLOCK_N: gl.constexpr):
    """Sums [64, 4] of what one thread holds of a row; the four are added at the end."""
    return gl.sum(gl.sum(gl.reshape(p, [64, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def by_row(x, like):
    """x [64] as a column that broadcasts over `like`."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout)), 1)


@gluon.jit
def scores(q, k_tile, S: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Begin q kᵀ."""
    k = k_tile.reshape([BLOCK_N, D]).permute((1, 0))
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S)
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def masked(
    s, i, start, diagonal, left, right, length_k,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Scores with -inf where query i does not see the key."""
    j = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
    i_, j_ = gl.expand_dims(i, 1), gl.expand_dims(j, 0)
    seen = mask.sees(i_, j_, diagonal, left, right, length_k, LEFT, RIGHT)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def clear(v, low, high, BLOCK_N: gl.constexpr):
    """Zero the rows of a tile [N, D] outside low..high: a weight of 0 does not hide their NaN.

    Each consumer does it, before it reads; what another still reads gets the values it has.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for first in gl.static_range(0, BLOCK_N, 16):
        if (first < low) | (first + 16 > high):
            rows = v.slice(first, 16)
            row = first + gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
            x = rows.load(LAYOUT)
            keep = gl.expand_dims((row >= low) & (row < high), 1)
            rows.store(gl.where(keep, x, 0.0).to(x.dtype))
    fence_async_shared()


@gluon.jit
def attend(
    which: gl.constexpr,
    q, i, keys, values, q_free, slot_before, release, done, begin, clear_begin, clear_end, end,
    diagonal, left, right, length_k, low, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, CLEAR: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, PINGPONG: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Lines 6 to 12 of Algorithm 1 for 64 rows: (m, l, o) over the keys from end to begin."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    MINE: gl.constexpr = TURN + which
    NEXT: gl.constexpr = TURN + (which + 1) % CONSUMERS
    dtype: gl.constexpr = q.dtype
    n = (end - begin) // BLOCK_N

    hopper.filled(keys, done, True)
    if PINGPONG:
        hopper.sync(MINE, 2 * hopper.CONSUMER)
    s = scores(q, keys.tiles.index(done % 2), S, BLOCK_N, D)
    if PINGPONG:
        hopper.arrive(NEXT, 2 * hopper.CONSUMER)
    if release:  # the rows of the turn before are written out by now
        hopper.tma_store_wait(0)
        mbarrier.arrive(q_free.index(slot_before))
    s = warpgroup_mma_wait(0, deps=[s])
    hopper.free(keys, done, CONSUMERS)
    s = masked(s, i, end - BLOCK_N, diagonal, left, right, length_k, LEFT, RIGHT, BLOCK_N)
    m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    m, alpha, p = rescale(m, s, scale)
    l = sums(p, BLOCK_N)
    o = gl.zeros([64, D], gl.float32, O)
    p = gl.convert_layout(p.to(dtype), P)
    if EARLY:
        hopper.filled(keys, done + 1, n > 1)
    for j in range(1, n):
        start = end - (j + 1) * BLOCK_N
        now, before = done + j, done + j - 1
        if not EARLY:
            hopper.filled(keys, now, True)
        if PINGPONG:
            hopper.sync(MINE, 2 * hopper.CONSUMER)
        s = scores(q, keys.tiles.index(now % 2), S, BLOCK_N, D)
        hopper.filled(values, before, True)
        v = values.tiles.index(before % 2).reshape([BLOCK_N, D])
        if CLEAR:
            if (j == 1) | (start + BLOCK_N < clear_begin):
                clear(v, low - start - BLOCK_N, length_k - start - BLOCK_N, BLOCK_N)
        o = warpgroup_mma(p, v, o, is_async=True)
        if PINGPONG:
            hopper.arrive(NEXT, 2 * hopper.CONSUMER)
        s = warpgroup_mma_wait(1, deps=[s])
        hopper.free(keys, now, CONSUMERS)
        if (start >= clear_end) | (start < clear_begin):
            s = masked(s, i, start, diagonal, left, right, length_k, LEFT, RIGHT, BLOCK_N)
        m, alpha, p_new = rescale(m, s, scale)
        l = l * by_row(alpha, l) + sums(p_new, BLOCK_N)
        if EARLY:  # a branch, which keeps ptxas from moving the next wait before the exponentials
            hopper.filled(keys, now + 1, j + 1 < n)
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        hopper.free(values, before, CONSUMERS)
        o = o * by_row(alpha, o)
        p = gl.convert_layout(p_new.to(dtype), P)
    before = done + n - 1
    hopper.filled(values, before, True)
    v = values.tiles.index(before % 2).reshape([BLOCK_N, D])
    if CLEAR:
        clear(v, low - begin, length_k - begin, BLOCK_N)
    o = warpgroup_mma(p, v, o, is_async=True)
    l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, O))
    o = warpgroup_mma_wait(0, deps=[o])
    hopper.free(values, before, CONSUMERS)
    return gl.convert_layout(m, gl.SliceLayout(1, O)), l, o
