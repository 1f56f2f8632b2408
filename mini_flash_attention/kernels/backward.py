"""The launches of a backward pass."""

from ..plan.backward import backward as plan_backward
from ..plan.gpu import Gpu
from ..problem import BackwardTensors, Problem
from .launch import Launch
from .portable import backward


def launches_of(
    p: Problem, given: BackwardTensors, gpu: Gpu
) -> tuple[list[Launch], dict[str, int]]:
    """The launches in order, and the elements of their workspace."""
    return backward.launches(p, given, plan_backward(p, gpu)), {}
