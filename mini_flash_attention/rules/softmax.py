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
    """Take a block of scores in: new maximum, the factor for what was summed before, the weights p.

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
def single_key_factor(l, keys, DTYPE: tl.constexpr):
    """What to multiply o by in rows computed without a running maximum, given how many keys each
    sees.

    P is rounded to DTYPE before it is multiplied by V, and l is not. Over many keys the rounding
    errors average out. The weight of a single key is l, so its rounding can be undone: the row is
    then exactly the key's value, as it is where the largest weight is 1.
    """
    return tl.where(keys == 1, l / l.to(DTYPE).to(tl.float32), 1.0)


@triton.jit
def finish(m, l, o, scale, sink):
    """Normalised output and LSE (natural logarithm); 0 and -inf for a row that saw no key.

    sink: None, or a logit that takes part in the sum of a row that saw any key.
    """
    empty = l == 0.0
    ln2: tl.constexpr = 0.6931471805599453
    top = m * scale
    weight = 1.0
    if sink is not None:
        highest = tl.maximum(tl.where(empty, 0.0, top), sink / ln2)
        weight = tl.exp2(top - highest)
        l = l * weight + tl.exp2(sink / ln2 - highest)
        top = highest
    inverse = tl.where(empty, 0.0, weight / l)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(l)) * ln2)
    return tl.where(tl.expand_dims(empty, 1), 0.0, o * tl.expand_dims(inverse, 1)), lse


@triton.jit
def merge(m, l, o, partial_m, partial_l, partial_o, scale):
    """Merge S partial results, each normalised: partial_m and partial_l [S], partial_o [S, D].

    m [1], l [1] and o [1, D] are the state before and after, not normalised, as `finish` takes it.
    A result that saw no key has l = 0, and its o is not read: it may hold NaN. Weights come from m
    and l, not from an LSE: at a score of ten million fp32 has no digits left in it for l.
    """
    m_new = tl.maximum(m, tl.max(partial_m, 0, keep_dims=True))
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m - reference) * scale)
    weight = partial_l * tl.exp2((partial_m - reference) * scale)
    partial_o = tl.where(tl.expand_dims(partial_l == 0.0, 1), 0.0, partial_o)
    l = l * alpha + tl.sum(weight, 0, keep_dims=True)
    o = o * alpha + tl.sum(partial_o * tl.expand_dims(weight, 1), 0, keep_dims=True)
    return m_new, l, o
