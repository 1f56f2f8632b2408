"""One call: looked up among those before, or validated and planned; then launched.

What came of a call depends on shapes, strides, dtypes, devices and options only, so it is kept as
a `Recipe`, and the same call with other tensors costs the CPU a look-up and the launches.

With TRITON_INTERPRET=1 (Triton's own switch, set before Triton is imported) CPU tensors go
through the GPU kernels too, in Triton's interpreter: slow, and open to a debugger.
"""

from typing import Any

import torch

from . import cpu, device_checks, recipes, settings
from .entries import Entry
from .plan import gpu as gpus
from .problem import Problem
from .recipes import Arguments, Recipe, Result
from .validate import memory
from .validate.tensors import refuse_tracing

FLOAT32_TINY = torch.finfo(torch.float32).tiny


def run(entry: Entry, arguments: Arguments, keep: bool = True) -> Result:
    """(out, softmax_lse or None) of a call. keep: the workspace, for the next call."""
    return run_known(entry, arguments, *recipes.look_up(entry, arguments), keep)


def run_known(
    entry: Entry, arguments: Arguments, key: Any, recipe: Recipe | None, keep: bool = True
) -> Result:
    """The same, for what `recipes.look_up` has found."""
    if recipe is not None:
        if recipe.subclassed:
            memory.refuse_missing_memory(recipe.function, arguments)
        if arguments["out"] is not None:
            _keep_apart(recipe.function, arguments)
        return recipes.follow(recipe, arguments, keep)
    p = validate(entry, arguments)
    memory.refuse_missing_memory(p.function, arguments)
    arguments["score_mod_args"] = p.scores.aux or ()
    if settings.CHECKED:
        device_checks.values(p)
    if p.options.softmax_scale < FLOAT32_TINY:
        p = _positive_scale(p)
        arguments, key = {**arguments, "q": p.q}, None  # a recipe would need the new q
    settings.warn_of_late_switch()
    if not (p.q.is_cuda or settings.INTERPRETED):
        with torch.autocast("cpu", enabled=False):  # what is in fp32 there is so on purpose
            return cpu.run(p)
    recipe = recipes.make(entry, p, arguments)
    if key is not None:
        recipes.remember(key, recipe)
    return recipes.follow(recipe, arguments, keep)


def _positive_scale(p: Problem) -> Problem:
    """p with the scale's sign in q: the online softmax follows the largest raw score, which is the
    largest scaled one only for a positive scale.
    """
    scale = p.options.softmax_scale
    q, scale = (-p.q, -scale) if scale <= -FLOAT32_TINY else (torch.zeros_like(p.q), 1.0)
    return p._replace(q=q, options=p.options._replace(softmax_scale=scale))


def validate(entry: Entry, arguments: Arguments) -> Problem:
    """The call as a `Problem`, if nothing about it is wrong."""
    refuse_tracing()
    p = entry.parse(**arguments)
    if arguments["out"] is not None and "dout" not in arguments:
        _keep_apart(p.function, arguments)
    if p.q.is_cuda:
        try:
            gpus.gpu_of(p.q.device)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, NotImplementedError):
                raise  # else it is a tensor without memory, where there is no GPU
    return p


def _keep_apart(function: str, arguments: Arguments) -> None:
    """Refuse an out that shares memory with any other tensor."""
    others = [x for name, x in arguments.items() if name != "out"]
    others += arguments["score_mod_args"]
    memory.refuse_overlap(function, arguments["out"], *filter(torch.is_tensor, others))
