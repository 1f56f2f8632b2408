"""What becomes of a score before the softmax: soft cap, ALiBi, a function of the caller's.

Queries and keys are numbered by where they stand in their sequence, so the last query stands on
the last key and one function serves prefill, packed sequences and decoding. A tile of keys comes
as `start + n`, n constants of the compiler's: distances then cost one addition a score.
Source: ALiBi, arXiv:2108.12409; soft cap, arXiv:2408.00118, section 2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import settings

INTERPRETED = tl.constexpr(settings.INTERPRETED)


class Modification(NamedTuple):
    """What a score is modified with; `plan` says how these numbers come about."""

    factor: Any  # before the soft cap, or of the slope, or before a score_mod
    softcap: Any
    slope: Any  # ALiBi's: None, or one a row
    aux: Any  # tensors for the score_mod: None without


class Scoring(NamedTuple):
    """How the scores of rows become weights."""

    scale: Any  # of the softmax, in powers of two
    b: Any  # the batch entry they are of
    head: Any
    modification: Any
    dropout: Any  # None without, as in most calls


class Inputs(NamedTuple):
    """What a launch knows of scores, for all heads."""

    scale: Any
    factor: Any
    softcap: Any
    aux: Any
    alibi_slopes: Any
    stride_slopes: Any  # from batch entry to batch entry
    s_aux: Any


@triton.jit
def tanh(x):
    """One instruction of the GPU's, right to 2^-11 of the result: the last bits of fp16."""
    if INTERPRETED:
        y = 1.0 - 2.0 / (tl.exp(2.0 * tl.cast(x, tl.float64)) + 1.0)
        return tl.cast(y, tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def bias(s, i, start, n, modification, SCORE_MODE: tl.constexpr, SCORE_MOD: tl.constexpr):
    """Scores s after soft cap and ALiBi: what a score_mod is given. Arguments as in `modify`.

    Without anything to do, s stays as it is and the softmax scales it. With a soft cap alone, the
    softmax multiplies by it. With ALiBi alone scores are not scaled either, but the slope is by
    their factor's inverse: one multiplication less a score.
    """
    slope = modification.slope
    CAPPED: tl.constexpr = SCORE_MODE == "softcap" or SCORE_MODE == "bounded"
    if CAPPED:
        s = tanh(s * modification.factor)
        if SCORE_MOD is not None or slope is not None:
            s = s * modification.softcap
    elif SCORE_MOD is not None and SCORE_MODE != "folded":
        s = s * modification.factor
    if slope is not None:
        if not CAPPED and SCORE_MOD is None:
            slope = slope * modification.factor
        distance = tl.cast(n, tl.float32) - tl.cast(i - start, tl.float32)
        s = s - slope * tl.abs(distance)
    return s


@triton.jit
def apply(s, b, head, i, j, aux, SCORE_MOD: tl.constexpr):
    """SCORE_MOD of the scores s that `bias` gives."""
    i = tl.maximum(i, 0)  # before the first key stand queries without any; it may read by i
    if aux is None:
        s = SCORE_MOD(s, b, head, i, j)
    else:
        s = SCORE_MOD(s, b, head, i, j, aux)
    return s


@triton.jit
def modify(
    s, b, head, i, start, n, modification, SCORE_MODE: tl.constexpr, SCORE_MOD: tl.constexpr
):
    """Scores s of batch entry b: queries i of `head` against the keys start + n.

    SCORE_MODE: what else is asked for, and what the kernel does itself (`plan.scores.ScoreMode`).
    """
    s = bias(s, i, start, n, modification, SCORE_MODE, SCORE_MOD)
    if SCORE_MOD is not None:
        s = apply(s, b, head, i, start + n, modification.aux, SCORE_MOD)
    return s


@triton.jit
def differentiate(
    grad, s, biased, b, head, i, j, modification, SCORE_MODE: tl.constexpr,
    SCORE_MOD_BWD: tl.constexpr,
):  # fmt: skip
    """The gradient of the scaled scores, from `grad`, that of the modified ones.

    s: the raw scores, which `bias` made `biased`. The bias of ALiBi has no part in it.
    """
    if SCORE_MOD_BWD is not None:
        i = tl.maximum(i, 0)
        if modification.aux is None:
            grad = SCORE_MOD_BWD(grad, biased, b, head, i, j)
        else:
            grad = SCORE_MOD_BWD(grad, biased, b, head, i, j, modification.aux)
    if SCORE_MODE == "softcap":
        t = tanh(s * modification.factor)
        grad = grad * (1.0 - t * t)
    return grad
