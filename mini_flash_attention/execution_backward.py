"""One backward pass: looked up among those before, or validated and planned; then launched."""

from typing import NamedTuple

import torch

from . import cpu_backward, execution, recipes, settings
from .entries import Entry
from .plan import gpu as gpus
from .plan.backward import ROOM, BackwardTensors
from .problem import Problem, empty_out
from .recipes import Arguments, Recipe
from .validate import memory, wrong_value

RESULTS = ("dq", "dk", "dv")


class Gradients(NamedTuple):
    """What the backward pass gives."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    delta: torch.Tensor  # like softmax_lse


def run(entry: Entry, arguments: Arguments, keep: bool = True) -> Gradients:
    """The gradients of a call. keep: the workspace, for the next call."""
    if torch.are_deterministic_algorithms_enabled():
        arguments["deterministic"] = True
    key, recipe = recipes.look_up(entry, arguments)
    if recipe is not None:
        keep_apart(arguments)
        if recipe.subclassed:
            memory.refuse_missing_memory(recipe.function, arguments)
        result = allocate(arguments)
        recipes.launch(recipe, arguments, keep)
        return result
    p = execution.validate(entry, arguments)
    keep_apart(arguments)
    memory.refuse_missing_memory(p.function, arguments)
    arguments["score_mod_args"] = p.scores.aux or ()
    result = allocate(arguments)
    if not (p.q.numel() and p.k.numel()):
        for x in result:
            x.zero_()
        return result
    zero = abs(p.options.softmax_scale) < execution.FLOAT32_TINY
    if zero:  # q plays no part
        p = p._replace(q=torch.zeros_like(p.q), options=p.options._replace(softmax_scale=1.0))
        arguments, key = {**arguments, "q": p.q}, None
    given = BackwardTensors(
        arguments["out"], arguments["dout"], arguments["softmax_lse"], arguments["dsoftmax_lse"],
        result.delta, result.dq, result.dk, result.dv,
    )  # fmt: skip
    if p.q.is_cuda or settings.INTERPRETED:
        recipe = make(entry, p, given, arguments)
        if key is not None:
            recipes.remember(key, recipe)
        recipes.launch(recipe, arguments, keep)
    else:
        with torch.autocast("cpu", enabled=False):
            cpu_backward.run(p, given)
    if zero:
        result.dq.zero_()
    return result


def keep_apart(arguments: Arguments) -> None:
    """Refuse a caller's dq, dk or dv that shares memory with an input, or elements with another;
    they may be parts of one tensor.
    """
    given = {name: arguments[name] for name in RESULTS if arguments[name] is not None}
    inputs = [x for name, x in arguments.items() if name not in RESULTS and torch.is_tensor(x)]
    for name, x in given.items():
        memory.refuse_overlap("backward", x, *inputs, name=name)
        if any(memory.share_elements(x, y) for other, y in given.items() if other != name):
            raise wrong_value("backward", name, "elements apart from dq, dk and dv", "an overlap")


def allocate(arguments: Arguments) -> Gradients:
    """Put the results among the arguments, where the caller has not, and the workspace."""
    for name in ("q", "k", "v"):
        if arguments[f"d{name}"] is None:
            arguments[f"d{name}"] = empty_out(arguments[name])
    lse = arguments["softmax_lse"]
    rows = lse.numel()
    statistics = torch.empty(2, -(-rows // 4) * 4 + ROOM, dtype=torch.float32, device=lse.device)
    arguments["lse_log2"], arguments["delta"] = statistics.unbind(0)
    delta = arguments["delta"][:rows].view(lse.shape)
    return Gradients(arguments["dq"], arguments["dk"], arguments["dv"], delta)


def make(entry: Entry, p: Problem, given: BackwardTensors, arguments: Arguments) -> Recipe:
    """Plan the backward pass and make its launches."""
    p = recipes.launchable(p)
    from .kernels.backward import launches_of

    gpu = gpus.gpu_of(p.q.device)._replace(triton=settings.triton_version())
    launches, needed = launches_of(p, given, gpu)
    subclassed = recipes.bind(entry, launches, arguments, "aux", *needed)
    return Recipe(p.function, launches, None, needed, subclassed=subclassed)


def readable(dout: torch.Tensor) -> torch.Tensor:
    """dout as kernels read it: `out.sum()` gives it expanded, with strides of 0."""
    fits = dout.stride(-1) == 1 and all(s % 8 == 0 and s for s in dout.stride()[:-1])
    return dout if fits else dout.contiguous()


def sink_gradient(sink: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The gradient of s_aux (nheads,): a sink's weight times -delta, summed over the queries."""
    weight = torch.exp(sink.float()[:, None] - lse).masked_fill(lse == float("-inf"), 0.0)
    terms = (weight * delta).transpose(-1, -2).flatten(0, -2)
    return -terms.sum(0).to(sink.dtype)
