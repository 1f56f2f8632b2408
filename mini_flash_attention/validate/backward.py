"""The arguments of the backward pass: those of the forward call, and what that has returned."""

from typing import Any

import torch

from ..problem import Problem, shape_of_lse
from . import calls, memory, not_differentiable, tensors, wrong_value
from .tensors import transformed

FORWARD = {"out": None, "return_attn_probs": True, "s_aux": None, "function": "backward"}
VARLEN = {"block_table": None, "num_splits": 0}


def dense(**arguments: Any) -> Problem:
    """A call that `flash_attn_func` has made."""
    return _checked(calls.dense, arguments, FORWARD)


def varlen(**arguments: Any) -> Problem:
    """A call that `flash_attn_varlen_func` has made."""
    return _checked(calls.varlen, arguments, FORWARD | VARLEN)


def _checked(parse: Any, arguments: dict[str, Any], more: dict[str, Any]) -> Problem:
    own = ("out", "softmax_lse", "dout", "dsoftmax_lse", "dq", "dk", "dv")
    out, lse, dout, dlse, *results = (arguments.pop(name) for name in own)
    p: Problem = parse(**arguments, **more)
    function, q = p.function, p.q
    for name, x in (("out", out), ("dout", dout)):
        tensors.tensor(function, name, x, q.dim(), q)
        tensors.shape(function, name, x, (*q.shape[:-1], p.v.shape[-1]))
    for name, x in (("softmax_lse", lse), ("dsoftmax_lse", dlse)):
        if x is not None or name == "softmax_lse":
            tensors.strided_tensor(function, name, x, q)
            tensors.shape(function, name, x, shape_of_lse(q))
            tensors.dtype(function, name, x, torch.float32)
    tensors.rows(function, "softmax_lse", lse)
    for name, x, like in zip(("dq", "dk", "dv"), results, (q, p.k, p.v), strict=True):
        if x is not None:
            tensors.tensor(function, name, x, like.dim(), q)
            tensors.shape(function, name, x, tuple(like.shape))
            if memory.overlaps_itself(x):
                wanted = "elements that don't overlap"
                raise wrong_value(function, name, wanted, f"strides {x.stride()}")
    if p.scores.score_mod is not None and p.scores.score_mod_bwd is None:
        raise not_differentiable(function, "a score_mod without score_mod_bwd")
    return p


def refuse(function: str, arguments: dict[str, Any]) -> None:
    """Refuse gradients of what has none, by name: they would be lost in silence."""
    if "k_cache" in arguments:
        if transformed() and not torch.compiler.is_compiling():
            what = "torch.func transforms and forward-mode AD"
            raise NotImplementedError(f"{function}: {what}: not implemented")
        hint = "flash_attn_func and flash_attn_varlen_func have gradients"
        raise not_differentiable(function, "a KV cache", hint)
    for name in ("out", "block_table"):
        if arguments.get(name) is not None:
            raise not_differentiable(function, name)
    if arguments["score_mod"] is not None and arguments["score_mod_bwd"] is None:
        raise not_differentiable(function, "a score_mod without score_mod_bwd")
    without = [("score_mod_args", x) for x in arguments["score_mod_args"]]
    without += [("alibi_slopes", arguments["alibi_slopes"])]
    for name, x in without:
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise not_differentiable(function, f"{name}, which has no gradient", "detach it")
