"""The score mode: how a kernel modifies scores, and with which numbers (`rules/scores.py`)."""

import math
from typing import NamedTuple

import torch

from ..problem import NARROW, Problem

LOG2E = math.log2(math.e)


class ScoreMode(NamedTuple):
    """How `rules/scores.py` is told what becomes of scores.

    SCORE_MODE is "", "softcap", or one of the modes that only some kernels have:
    "bounded", a soft cap that keeps weights within 2^-75 and 2^75, so that m = 0 serves all along;
    "linear", ALiBi as what it is on either side of a query; "folded", beside a score_mod, a scale
    that is a power of two, multiplied into Q.
    """

    scale: float  # of the softmax, in powers of two
    numbers: tuple[int, float, float]  # stride of the slopes' batch, factor, softcap
    mode: str  # SCORE_MODE


def choose_score_mode(p: Problem, *own: str) -> ScoreMode:
    """What becomes of p's scores, for a kernel that has these ways of its own."""
    slopes, softcap, score_mod = p.scores.alibi_slopes, p.scores.softcap, p.scores.score_mod
    stride = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    factor, left = p.options.softmax_scale, p.options.left
    scale = factor * LOG2E
    mode = ""
    if softcap:
        factor /= softcap
    if score_mod is not None or (softcap and slopes is not None):
        scale = LOG2E  # all is done by then
        # In bf16, which has the range for it.
        if not softcap and slopes is None and math.frexp(factor)[0] == 0.5:
            mode = "folded" if p.q.dtype is torch.bfloat16 else ""
    elif softcap:
        scale, narrow = softcap * LOG2E, left is not None and left < NARROW
        # fp16 does not hold such weights. Times values from 1e-15 to 1e10 they are safe in fp32.
        # Rounding changes them by up to 2^-9, even the largest, which would otherwise be exactly 1.
        # Over many keys the errors average out; for a single key
        # `softmax.single_key_factor` undoes the rounding. The choice does not depend on lengths,
        # so a sequence's result does not change with the rest of the batch.
        mode = "bounded" if scale <= 75 and p.q.dtype is not torch.float16 and not narrow else ""
    elif slopes is not None:  # what is subtracted is scaled with the score
        factor = 1 / p.options.softmax_scale
        mode = "linear"
    mode = mode if mode and mode in own else "softcap" if softcap else ""
    return ScoreMode(scale, (stride, factor, softcap), mode)
