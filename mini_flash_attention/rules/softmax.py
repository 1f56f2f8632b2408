"""The online softmax: scores arrive tile by tile, the maximum so far is the reference point.

The state of a row is m (largest raw score so far), l (sum of `exp2((s - m) * scale)`) and o (the
same sum weighted by v). `scale` is positive, so that the largest raw score is also the largest
scaled one, and already holds log2(e), because the GPU's exponential is `exp2`.
Source: FlashAttention-2, arXiv:2307.08691, section 3.1.
"""

import triton
import triton.language as tl


@triton.jit
def rescale(m, s, scale):
    """Fold a tile of scores: new maximum, the factor for what was summed before, the weights p.

    A row that has seen nothing has m = -inf; 0 then stands in for it in the subtraction, which
    makes every weight 0, but is not stored: a later tile may hold any score, however small.
    Subtracting before scaling costs a multiplication and is exact where s = m, however large.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m - reference) * scale)
    p = tl.exp2((s - tl.expand_dims(reference, 1)) * scale)
    return m_new, alpha, p


@triton.jit
def finish(m, l, o, scale):
    """Normalised output and LSE (natural logarithm); 0 and -inf for a row that saw no key."""
    empty = l == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / l)
    ln2: tl.constexpr = 0.6931471805599453
    lse = tl.where(empty, float("-inf"), (m * scale + tl.log2(l)) * ln2)
    return o * tl.expand_dims(inverse, 1), lse


@triton.jit
def merge(lse, o):
    """Fold partial results over disjoint keys: weights are the exponentials of their LSEs.

    lse [S] and o [S, D] of S parts, each normalised -> (o [D], lse). A part that saw no key has an
    LSE of -inf and weighs nothing; if all are empty the result is 0 and -inf.
    """
    m = tl.max(lse, 0)
    reference = tl.where(m == float("-inf"), 0.0, m)
    weight = tl.exp(lse - reference)
    total = tl.sum(weight, 0)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    return tl.sum(o * tl.expand_dims(weight, 1), 0) * inverse, reference + tl.log(total)
