"""The softmax of a Hopper consumer: 64 rows of scores in the registers of its four warps."""

from typing import Any, NamedTuple

from ...rules import mask
from ...rules.scores import modify
from ...rules.window import Window
from ..gluon import gl, gluon
from . import scheduler

LOWEST = gl.constexpr(-3.4028234663852886e38)  # of fp32: no score lies below
SLACK = gl.constexpr(8.0)  # powers of 2 by which a weight may exceed 1 under LAZY_RESCALE
LARGE = gl.constexpr(2.0**27)  # from here on rounding m * scale is off by more than 2^4
# Row sums under SKIP_MAX: up to SAFE products have about as much room as
# ever, up to LIMIT an LSE is right.
SAFE, LIMIT = gl.constexpr(2.0**12), gl.constexpr(2.0**32)


class Rows(NamedTuple):
    """Where a consumer reads what its rows are, wherever it needs that: the fields would take
    registers all along.
    """

    sched: Any
    work_idx: Any
    which: Any
    left: Any  # of the window
    right: Any


class Exponent(NamedTuple):
    """Weights are 2^(s * factor - reference)."""

    factor: Any
    reference: Any


# 2^t for |t| < 127 and -inf: 1.5 * 2^23 + 127 rounds t to a whole number n, and leaves n + 127, the
# exponent of 2^n, in the last bits of r. Of the rest, within 1/2, 2^f is a polynomial with a
# relative error of 3e-6. NaN stays NaN.
EXP2 = gl.constexpr("""{ .reg .f32 t, r, f, p; .reg .b32 i;
max.NaN.f32 t, $4, 0fC2FE0000; add.rn.f32 r, t, 0f4B40007F; sub.rn.f32 f, r, 0f4B40007F;
sub.rn.f32 f, t, f; fma.rn.f32 p, f, 0f3C1D0166, 0f3D64FE23; fma.rn.f32 p, p, f, 0f3E7601BC;
fma.rn.f32 p, p, f, 0f3F317096; fma.rn.f32 p, p, f, 0f3F800000;
mov.b32 i, r; shl.b32 i, i, 23; mov.b32 r, i; mul.rn.f32 $0, p, r;
} ex2.approx.ftz.f32 $1, $5; ex2.approx.ftz.f32 $2, $6; ex2.approx.ftz.f32 $3, $7;""")


@gluon.jit
def exp2(x):
    """2^x, one in four by a polynomial: the special function units have tanh to do as well."""
    return gl.inline_asm_elementwise(EXP2, "=f,=f,=f,=f,f,f,f,f", [x], gl.float32, True, 4)


@gluon.constexpr_function
def scaling(count):
    """PTX: $0, $1, ... times as many factors, unless none in the warp is below 1; its registers.

    Of the 64 rows of a product a thread holds two: one's sums are $0 and $1, the other's $2 and $3.
    """
    factors = [f"${2 * count + n}" for n in range(count)]
    products = "".join(f"mul.f32 ${n}, ${n}, {factors[n]};" for n in range(count))
    ask = "setp.lt.f32 any, {0}, 0f3F800000; setp.lt.or.f32 any, {2}, 0f3F800000, any;"
    vote = "vote.sync.any.pred any, any, 0xffffffff; @!any bra.uni DONE;"
    code = f"{{ .reg .pred any; {ask.format(*factors)} {vote} {products} DONE: }}"
    return code, ",".join(["=f"] * count + [str(n) for n in range(count)] + ["f"] * count), count


@gluon.jit
def rescale_if_any(o, alpha):
    """o [64, D] times alpha [64, 1], none of it above 1, by the warps where some of it is below."""
    PTX: gl.constexpr = scaling(o.shape[1] // 2)
    return gl.inline_asm_elementwise(PTX[0], PTX[1], [o, alpha], gl.float32, False, PTX[2])


@gluon.jit
def row_sums(p, BLOCK_N: gl.constexpr):
    """Sums [64, 4] of what one thread holds of a row; the four are added at the end."""
    return gl.sum(gl.sum(gl.reshape(p, [64, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def by_row(x, like):
    """x [64] as a column that broadcasts over `like`."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout)), 1)


@gluon.jit
def accumulator_view(s, start, BLOCK_N: gl.constexpr):
    """Scores [64, BLOCK_N / 8, 4, 2] with their rows i and keys: start + n, `start` a tile.

    Of key 8 a + 2 b + c a thread knows a and c when it is compiled: b goes to the start.
    """
    view = gl.reshape(s, [64, BLOCK_N // 8, 4, 2])
    rest: gl.constexpr = gl.SliceLayout(3, view.type.layout)
    a = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, rest)))
    b = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, rest)))
    c = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, view.type.layout))))
    i = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, rest)))
    n = 8 * a[None, :, None, None] + c[None, None, None, :]
    return view, i[:, None, None, None], (start + 2 * b)[None, None, :, None], n


@gluon.jit
def from_view(view, s):
    """The inverse of `accumulator_view`: laid out like s."""
    return gl.convert_layout(gl.reshape(view, s.shape), s.type.layout, assert_trivial=True)


@gluon.jit
def mask_scores(s, start, rows, C: gl.constexpr):
    """Scores with -inf where the query of a row does not see the key; keys from `start`."""
    sched, work_idx = rows.sched, rows.work_idx
    length_k = scheduler.load_field(sched, work_idx, scheduler.LENGTH_K)
    diagonal = length_k - scheduler.load_field(sched, work_idx, scheduler.NUM_ROWS) // C.GROUP
    consumer_row = scheduler.load_field(sched, work_idx, scheduler.M_ROW) + 64 * rows.which
    view, i, shift, n = accumulator_view(s, start, C.BLOCK_N)
    i = (consumer_row + i) // C.GROUP - shift
    window = Window(diagonal, rows.left, rows.right, None, length_k - shift)
    return from_view(gl.where(mask.is_visible(i, n, window), view, float("-inf")), s)


@gluon.jit
def rescale(m, s, bias, scale, LAZY_RESCALE: gl.constexpr):
    """`rescale` of rules/softmax.py, scale and subtraction fused: an instruction an element less.

    Returns m, alpha, the scores, and the factor and reference of their `Exponent`.

    LAZY_RESCALE: m follows a row's maximum only where that has grown by more than SLACK, so that
    most tiles leave o and l as they are (FlashAttention-4's conditional rescale).
    bias: None, or what `alibi_bias` leaves to be added to the scores.

    A row begins with m = LOWEST, so that m is a number. What is subtracted, m times a factor, is
    rounded. Inside a tile all weights share that, and it cancels; between tiles with different
    maxima it does not, since alpha is exact: from |m * scale| = 2^16 on such tiles are weighed
    against each other with errors like those of scores one fp32 rounding apart. The factor is
    `scale`, unless their product is so large that weights could overflow: then a power of 2,
    with which nothing is rounded, and m * factor lies between 2^26 and 2^27. A score one rounding
    below the maximum weighs 2^-8 or less there.
    """
    if bias is None:
        top = gl.max(s, 1)
    else:
        view = gl.reshape(s, [64, s.shape[1] // 8, 4, 2])
        top = gl.max(gl.max(gl.max(view, 3), 1) + bias, 1)
        top = gl.convert_layout(top, m.type.layout, assert_trivial=True)
    m_new = gl.where(top > m + SLACK / scale, top, m) if LAZY_RESCALE else gl.maximum(m, top)
    # Where scores should be higher, it is lower instead.
    reference = m_new if bias is None else by_row(m_new, bias) - bias
    exponent = reference.to(gl.int32, bitcast=True) & 0x7F800000
    power = (((127 + 26 + 127 << 23) - 2**32) - exponent).to(gl.float32, bitcast=True)
    factor = gl.where(gl.abs(reference) > LARGE / scale, power, scale)
    alpha = gl.exp2((m - m_new) * scale)
    reference = gl.expand_dims(reference * factor, 1)
    factor = gl.expand_dims(factor, 1)
    if bias is not None:
        s, factor, reference = view, gl.expand_dims(factor, 3), gl.expand_dims(reference, 3)
    return m_new, alpha, s, factor, reference


@gluon.jit
def exp2_scores(s, exponent, SCORE_MODE: gl.constexpr, like):
    """2^(s * factor - reference) by the `Exponent`, laid out like `like`."""
    s = s * exponent.factor
    p = exp2(s) if SCORE_MODE == "bounded" else gl.exp2(s - exponent.reference)
    return from_view(p, like) if len(p.shape) == 4 else p


@gluon.jit
def rescale_o(l, o, alpha, LAZY_RESCALE: gl.constexpr):
    """Sums over earlier tiles, to the new reference."""
    o = rescale_if_any(o, by_row(alpha, o)) if LAZY_RESCALE else o * by_row(alpha, o)
    return l * by_row(alpha, l), o


@gluon.jit
def sums_overflow(m, l, o, num_rows, scale, WINDOW: gl.constexpr):
    """Whether any of the first `num_rows` rows has outgrown its reference m, in l or in o.

    Nor can those do without maxima whose factor is not the scale (`rescale`). Behind a window's
    left end sums may have been scaled down again.
    """
    in_use = gl.arange(0, 64, l.type.layout) < num_rows
    top = gl.where((gl.abs(m) > LARGE / 2 / scale) & (l > 0.0), float("inf"), l)
    top = gl.max(gl.where(in_use, top, 0.0), 0)
    found = top > LIMIT
    if WINDOW or top > SAFE:
        infinite = gl.where(gl.expand_dims(in_use, 1) & (not (gl.abs(o) < float("inf"))), 1, 0)
        found |= gl.max(gl.max(infinite, 1), 0) > 0
    return found


@gluon.jit
def alibi_bias(s, position, start, modification, BLOCK_N: gl.constexpr):
    """ALiBi of queries from `position`: scores, and what `rescale` is to add to them yet, [64, 4].

    Before all of the queries, or after them, it is linear in the key: of a thread's part of a row
    all but slope * key inside the tile is the same, and left to the maximum. Keys are counted from
    the one next to the queries, where scores are largest and no digit may be lost.
    """
    view, i, shift, n = accumulator_view(s, start, BLOCK_N)
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, view.type.layout))
    row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(2 * gl.arange(0, 4, gl.SliceLayout(0, layout)), 0)
    slope = modification.slope * modification.factor
    bias = slope * (start - position + column - row).to(gl.float32)
    if (start < position + 64) & (start + BLOCK_N > position):
        view = modify(view, 0, 0, position + i, shift, n, modification, "linear", None)
        bias = gl.zeros_like(bias)
    elif start < position:
        view = view + slope * (n - BLOCK_N).to(gl.float32)
        bias += slope * BLOCK_N
    else:
        view = view - slope * n.to(gl.float32)
        bias = -bias
    return from_view(view, s), bias


@gluon.jit
def softmax_step(
    m, s, exponent, start, partial, exact, position, rows, scoring, C: gl.constexpr,
    SCORE_MOD: gl.constexpr,
):  # fmt: skip
    """Modify a block of scores, mask it if it is `partial`, and find its new maxima: (m, alpha, the
    scores, their `Exponent`). A block that is not `exact` keeps the `Exponent` of the one before.

    position: where the first of the queries stands. start: the block's first key.
    """
    SCORE_MODE: gl.constexpr = C.SCORE_MODE
    LAZY_RESCALE: gl.constexpr = C.LAZY_RESCALE
    modification = scoring.modification
    factor, reference = exponent.factor, exponent.reference
    bias = None
    if SCORE_MODE == "linear":
        s, bias = alibi_bias(s, position, start, modification, C.BLOCK_N)
    elif SCORE_MOD is not None or modification.slope is not None:
        view, i, shift, n = accumulator_view(s, start, C.BLOCK_N)
        view = modify(
            view, scoring.b, scoring.head, position + i, shift, n, modification, SCORE_MODE,
            SCORE_MOD,
        )  # fmt: skip
        s = from_view(view, s)
    elif SCORE_MODE != "":
        s = modify(s, 0, 0, 0, 0, 0, modification, SCORE_MODE, SCORE_MOD)
    alpha = m
    if exact:
        if partial:
            s = mask_scores(s, start, rows, C)
        if SCORE_MODE != "bounded":
            m, alpha, s, factor, reference = rescale(m, s, bias, scoring.scale, LAZY_RESCALE)
    return m, alpha, s, Exponent(factor, reference)


@gluon.jit
def convert_p(p, like):
    """p in the dtype of `like`, neighbours together. Left to itself LLVM at times pairs others."""
    BF16: gl.constexpr = like.dtype == gl.bfloat16
    PTX: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if BF16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(PTX, "=r,f,f", [p], like.dtype, True, 2)
