"""What becomes of a score before the softmax: soft cap, ALiBi, a function of the caller's.

Queries and keys are numbered by where they stand in their sequence, so the last query stands on
the last key and one function serves prefill, packed sequences and decoding. A tile of keys comes
as `start + n`, n constants of the compiler's: distances then cost one addition a score.
Source: ALiBi, arXiv:2108.12409; soft cap, arXiv:2408.00118, section 2.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
def modified(s, b, head, i, start, n, given, SCORES: tl.constexpr, SCORE_MOD: tl.constexpr):
    """Scores s of batch entry b: queries i of `head` against the keys start + n.

    given: factor, softcap, ALiBi slopes or None, what SCORE_MOD is handed beside the score or None.
    SCORES: what else is asked for, and what the kernel does itself (`launch.Changes`).
    Without anything to do, s stays as it is and the softmax scales it. With a soft cap alone, the
    softmax multiplies by it. With ALiBi alone scores are not scaled either, but the slope is by
    their factor's inverse: one multiplication less a score.
    """
    factor, softcap, slope, aux = given
    CAPPED: tl.constexpr = SCORES == "softcap" or SCORES == "bounded"
    if CAPPED:
        s = tanh(s * factor)
        if SCORE_MOD is not None or slope is not None:
            s = s * softcap
    elif SCORE_MOD is not None and SCORES != "folded":
        s = s * factor
    if slope is not None:
        if not CAPPED and SCORE_MOD is None:
            slope = slope * factor
        distance = tl.cast(n, tl.float32) - tl.cast(i - start, tl.float32)
        s = s - slope * tl.abs(distance)
    if SCORE_MOD is not None:
        i = tl.maximum(i, 0)  # before the first key stand queries without any; it may read by i
        if aux is None:
            s = SCORE_MOD(s, b, head, i, start + n)
        else:
            s = SCORE_MOD(s, b, head, i, start + n, aux)
    return s
