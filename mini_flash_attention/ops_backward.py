"""The gradients of the operators of `ops.py`, which are operators too."""

from collections.abc import Mapping
from typing import Any

import torch

from . import execution_backward
from .autograd import once
from .entries import DENSE, DENSE_BACKWARD, VARLEN, VARLEN_BACKWARD, Entry
from .execution_backward import RESULTS, Gradients, readable, sink_gradient
from .ops import LIBRARY, NAMESPACE, arguments_of, define, simple
from .problem import empty_out

_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor dout, "
    "Tensor? dsoftmax_lse, float? softmax_scale, bool causal, SymInt[] window_size, "
    "float softcap, Tensor? alibi_slopes, bool deterministic, str? score_mod, "
    "Tensor[] score_mod_args, str? score_mod_bwd, float dropout_p, Tensor? dropout_seed"
)
BACKWARD = {
    "dense_backward": _GIVEN,
    "varlen_backward": (
        f"{_GIVEN}, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, "
        "SymInt? max_seqlen_k, Tensor? seqused_q, Tensor? seqused_k, *, "
        "Tensor? max_seqlen_q_tensor=None, Tensor? max_seqlen_k_tensor=None"
    ),
}


def run_backward(entry: Entry, arguments: Mapping[str, Any]) -> Gradients:
    """The gradients of a call, through the operator for them."""
    given = dict(arguments)
    results = [given.pop(name) for name in RESULTS]
    operator = getattr(torch.ops.mini_flash_attention, entry.name)
    *gradients, delta = operator(**simple(given))
    made = (x if out is None else out.copy_(x) for x, out in zip(gradients, results, strict=True))
    dq, dk, dv = made
    return Gradients(dq, dk, dv, delta)


def _define_backward(entry: Entry) -> None:
    def compute(**given: Any) -> tuple[torch.Tensor, ...]:
        dq, dk, dv, delta = execution_backward.run(
            entry, arguments_of(entry.name, given), keep=False
        )
        return dq, dk, dv, delta.clone()  # without the room beside it

    def fake(**given: Any) -> tuple[torch.Tensor, ...]:
        delta = torch.empty_like(given["softmax_lse"], memory_format=torch.contiguous_format)
        return *(empty_out(given[x]) for x in ("q", "k", "v")), delta

    define(entry, entry.name, BACKWARD[entry.name], 4, compute, fake, 5)


def _differentiate(forward: Entry, entry: Entry) -> None:
    """Register what computes the gradients of the forward operator."""
    operator = getattr(torch.ops.mini_flash_attention, forward.name).default
    order = [argument.name for argument in operator._schema.arguments]
    backward_operator = getattr(torch.ops.mini_flash_attention, entry.name)
    wanted = [argument.name for argument in backward_operator.default._schema.arguments]

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        given = dict(zip(order, inputs, strict=True))
        if not given["need_lse"]:
            raise ValueError(f"{NAMESPACE}: need_lse: expected True where gradients are wanted")
        ctx.entry = forward
        ctx.names = [name for name, x in given.items() if isinstance(x, torch.Tensor)]
        ctx.others = {name: x for name, x in given.items() if name not in ctx.names}
        aux = ctx.others.pop("score_mod_args")
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(given[name] for name in ctx.names), *aux, *output)

    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        given = ctx.others | dict(zip(ctx.names, tensors, strict=False))
        given |= {"out": out, "softmax_lse": lse, "dsoftmax_lse": dlse}
        given["dout"] = torch.zeros_like(out) if dout is None else readable(dout)
        given["score_mod_args"] = list(tensors[len(ctx.names) :])
        own = {name: given[name] for name in wanted if name in given}
        dq, dk, dv, delta = once(ctx, lambda *_: backward_operator(**own), *tensors)
        gradients: dict[str, Any] = {"q": dq, "k": dk, "v": dv}
        if given["s_aux"] is not None:
            gradients["s_aux"] = sink_gradient(given["s_aux"], lse, delta)
        gradients["score_mod_args"] = [None] * len(given["score_mod_args"])
        return tuple(gradients.get(name) for name in order)

    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=LIBRARY)


for _forward, _entry in ((DENSE, DENSE_BACKWARD), (VARLEN, VARLEN_BACKWARD)):
    _define_backward(_entry)
    _differentiate(_forward, _entry)
