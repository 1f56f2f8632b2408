"""Calls that want gradients: a torch.autograd.Function around the forward and backward passes.

A compiler, and a mode that looks at operators, see operators instead (`ops.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from . import execution, execution_backward
from .entries import DENSE, DENSE_BACKWARD, VARLEN_BACKWARD, Entry
from .execution_backward import readable, sink_gradient
from .recipes import Arguments, Result
from .validate.backward import refuse

# Tensors that have gradients, in the order of the Function's results.
DIFFERENTIABLE = ("q", "k", "v", "s_aux")
# What only the forward call is told.
FORWARD_ONLY = ("out", "block_table", "num_splits", "return_attn_probs")


@dataclass(frozen=True, slots=True)
class Call:
    """A call without its tensors. No tuple: torch.func would look for tensors inside."""

    entry: Entry
    names: tuple[str, ...]  # of the tensors
    others: Arguments

    def arguments(self, tensors: tuple[torch.Tensor | None, ...]) -> Arguments:
        """The call's arguments, once more with its tensors; score_mod_args come last."""
        given = dict(zip(self.names, tensors, strict=False))
        aux = tuple(tensors[len(self.names) :])
        return {**self.others, **given, "score_mod_args": aux}


def run(entry: Entry, arguments: Arguments) -> Result:
    """(out, softmax_lse) of a call, with their history."""
    refuse(entry.function, arguments)
    rest = [n for n in arguments if n not in DIFFERENTIABLE]
    names = (*DIFFERENTIABLE, *(n for n in rest if isinstance(arguments[n], torch.Tensor)))
    others = {n: arguments[n] for n in rest if n not in names}
    tensors = [arguments[n] for n in names]
    apply: Any = Attention.apply
    return apply(Call(entry, names, others), *tensors, *arguments["score_mod_args"])


class Attention(torch.autograd.Function):
    """(out, softmax_lse) of a `Call` and its tensors."""

    @staticmethod
    def forward(call: Call, *tensors: torch.Tensor | None) -> Any:
        arguments = call.arguments(tensors) | {call.entry.wants_lse: True}
        return execution.run(call.entry, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them then
        gradients = once(ctx.call, gradients_of, ctx.call, dout, dlse, *saved)
        nothing = len(saved) - len(DIFFERENTIABLE) - 2
        return None, *gradients, *[None] * nothing

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *tensors: Any) -> NoReturn:
        raise _refusal(call, "torch.vmap", "make the mapped dimension the batch")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise _refusal(ctx.call, "forward-mode AD", "use torch.func.vjp")


class OnlyOnce(torch.autograd.Function):
    """Gradients that `compute` makes; they have none themselves. call: has an `entry`."""

    @staticmethod
    def forward(call: Any, compute: Callable[..., Any], *given: Any) -> Any:
        return compute(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise _refusal(ctx.call, "second derivatives", "differentiate once")

    vmap = Attention.vmap


def once(call: Any, compute: Callable[..., Any], *given: Any) -> Any:
    """`compute(*given)`. With create_graph its results require gradients, and computing those
    raises an error that names the function.
    """
    apply: Any = OnlyOnce.apply if torch.is_grad_enabled() else OnlyOnce.forward
    return apply(call, compute, *given)


def gradients_of(
    call: Call, dout: torch.Tensor | None, dlse: torch.Tensor | None,
    *saved: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """The gradients of q, k, v and s_aux, for those of out and softmax_lse."""
    *tensors, out, lse = saved
    batched = (is_batchedtensor, is_legacy_batchedtensor)
    if any(batch(x) for batch in batched for x in (dout, dlse) if x is not None):
        raise _refusal(call, "torch.vmap", "differentiate one at a time")
    assert out is not None and lse is not None
    arguments = call.arguments(tuple(tensors))
    sink = arguments.pop("s_aux")
    for name in FORWARD_ONLY:
        arguments.pop(name, None)
    own = {"out": out, "softmax_lse": lse, "dsoftmax_lse": dlse, "dq": None, "dk": None, "dv": None}
    own["dout"] = torch.zeros_like(out) if dout is None else readable(dout)
    entry = DENSE_BACKWARD if call.entry is DENSE else VARLEN_BACKWARD
    gradients = execution_backward.run(entry, arguments | own)
    return *gradients[:3], None if sink is None else sink_gradient(sink, lse, gradients.delta)


def _refusal(call: Call, what: str, hint: str) -> NotImplementedError:
    return NotImplementedError(f"{call.entry.function}: {what}: not implemented; {hint}")
