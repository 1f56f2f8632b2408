"""The launches of a backward pass."""

from .. import settings
from ..plan import backward as planning
from ..plan.backward import BackwardTensors
from ..plan.gpu import Gpu
from ..problem import Problem
from .launch import Launch
from .portable import backward as portable


def launches_of(
    p: Problem, given: BackwardTensors, gpu: Gpu
) -> tuple[list[Launch], dict[str, int]]:
    """The launches in order, and the elements of their workspace."""
    launches = portable.launches(p, given, planning.backward(p, gpu))
    results = (given.dq, given.dk, given.dv)
    plan = None if settings.INTERPRETED else planning.hopper(p, given.dout, results, gpu)
    if plan is None:
        return launches, {}
    from .hopper import backward as hopper  # Gluon has no interpreter

    return hopper.launches(p, given, plan, launches)
