"""From the arguments of a call to the code that computes it.

A call is described and checked (`problem`), planned (`plan`) and launched (`kernels`) in full the
first time its shapes are seen. What came of that depends on shapes, strides, dtypes, devices and
options only, so it is kept as a `Recipe`, and the same call with other tensors costs the CPU a
look-up and the launches.

With TRITON_INTERPRET=1 (Triton's own switch, set before Triton is imported) CPU tensors go
through the GPU kernels too, in Triton's interpreter: slow, and open to a debugger.
"""

import os
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import checks, cpu, plan, refusals
from .problem import Problem, empty_out

if TYPE_CHECKING:
    from .kernels.launch import Launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32_TINY = torch.finfo(torch.float32).tiny
MAX_RECIPES = 4096
PLAIN = (int, float, bool, type(None))

Arguments = Mapping[str, Any]
Result = tuple[torch.Tensor, torch.Tensor | None]


class Recipe(NamedTuple):
    """All that a call needs beside its tensors."""

    function: str
    launches: "list[Launch]"
    lse_shape: tuple[int, ...] | None
    temporaries: tuple[int, int]  # elements of what split keys leave: parts, owners
    draws: bool = False  # programs draw their work from a counter
    head_dim: int = 0  # of the result, 0 where it is q's
    rotates: bool = False  # the queries, to a tensor of their own
    clears: bool = False  # rows that no program writes


_recipes: dict[Hashable, Recipe] = {}


def run(describe: Callable[..., Problem], arguments: Arguments, names: Arguments) -> Result:
    """(out, softmax_lse or None) of a call; its new keys are in the cache afterwards.

    `names` says which argument stands for a tensor that kernels know under another name. Whoever
    traces the call, or looks at operators, is shown one.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        from . import ops

        return ops.run(describe, arguments)
    return compute(describe, arguments, names)


def compute(describe: Callable[..., Problem], arguments: Arguments, names: Arguments) -> Result:
    """`run` without an operator."""
    key = _signature(describe, arguments)
    recipe = None if key is None else _recipes.get(key)
    if recipe is not None:
        _keep_apart(recipe.function, arguments)
        return _follow(recipe, arguments, names)
    p = check(describe, arguments)
    if checks.ON:
        checks.values(p)
    if p.softmax_scale < FLOAT32_TINY:
        # The online softmax tracks the largest raw score, which is the largest scaled one only
        # for a positive scale, so the sign goes into q.
        zero = p.softmax_scale > -FLOAT32_TINY
        q = torch.zeros_like(p.q) if zero else -p.q
        p = p._replace(q=q, softmax_scale=1.0 if zero else -p.softmax_scale)
        arguments, key = {**arguments, "q": q}, None
    if not (p.q.is_cuda or INTERPRETED):
        return cpu.run(p)
    recipe = _recipe(p)
    if key is not None:
        if len(_recipes) >= MAX_RECIPES:
            _recipes.clear()
        _recipes[key] = recipe
    return _follow(recipe, arguments, names)


def check(describe: Callable[..., Problem], arguments: Arguments) -> Problem:
    """The call described, if nothing about it is to be refused."""
    p = describe(**arguments)
    _keep_apart(p.function, arguments)
    if p.q.is_cuda:
        try:
            plan.gpu(p.q.device)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, NotImplementedError):
                raise  # else it is a tensor without memory, where there is no GPU
    return p


def _keep_apart(function: str, arguments: Arguments) -> None:
    """Refuse an out that shares memory with any other tensor."""
    if arguments["out"] is not None:
        others = [x for name, x in arguments.items() if name != "out"]
        others += arguments["score_mod_args"]
        inputs = [x for x in others if isinstance(x, torch.Tensor)]
        refusals.apart(function, arguments["out"], *inputs)


def _signature(describe: Callable[..., Problem], arguments: Arguments) -> Hashable:
    """What checks, plan and launches depend on; None where each call must be looked at afresh."""
    if checks.ON or refusals.transformed() or type(arguments.get("cache_seqlens")) is int:
        return None  # the last, because it grows with every token
    grad = torch.is_grad_enabled()
    key: list[Any] = [describe, plan.PORTABLE]
    add = key.append
    try:
        for x in arguments.values():
            kind = type(x)
            if x is None or kind is bool:
                add(x)
            elif kind is int or kind is float:  # 1 and True and 1.0 are equal, but not alike
                add(kind)
                add(x)
            elif kind is tuple:
                for y in x:
                    kind = type(y)
                    add(kind)
                    if kind in PLAIN:
                        add(y)
                        continue
                    if not isinstance(y, torch.Tensor) or (grad and y.requires_grad) or y.is_neg():
                        return None
                    key += (y.dtype, y.device, y.layout)
            elif isinstance(x, torch.Tensor):
                shape = x.shape
                if not shape or (grad and x.requires_grad) or x.is_neg():
                    return None  # a length to be read, or to be refused
                key += (kind, x.dtype, x.device, shape, x.stride())
            elif hasattr(x, "arg_names"):  # a score_mod, compiled in
                add(x)
            else:
                return None
        signature = tuple(key)
        hash(signature)
    except (TypeError, RuntimeError, NotImplementedError):  # unhashable, or no plain tensor
        return None
    return signature


def _recipe(p: Problem) -> Recipe:
    """Plan a call and decide its launches."""
    checks.require_triton()
    if INTERPRETED and p.q.dtype is torch.bfloat16:
        wanted, hint = "float16 or float32 in Triton's interpreter", "its bf16 products are wrong"
        refusals.refuse(TypeError, p.function, "q", wanted, p.q.dtype, hint)
    from .kernels import append, combine, decode, forward

    gpu = plan.gpu(p.q.device)
    out = p.new_out()
    lse = None if p.lse_shape is None else torch.empty(p.lse_shape, device="meta")
    launches = append.launches(p)
    if p.rotary is not None:
        p = p._replace(q=empty_out(p.q))
    temporaries, draws, clears = (0, 0), False, False
    # Gluon has no interpreter.
    hopper = plan.hopper(p, out, gpu) if out.numel() and not INTERPRETED else None
    if not out.numel():
        pass
    elif not hopper and plan.decodes(p, gpu):
        decoding = plan.decode(p, gpu)
        clears = p.cu_seqlens_q is not None
        temporaries = decode.temporaries(p, decoding)
        launches.append(decode.launch(p, out, lse, decoding))
        if temporaries[0]:
            launches.append(combine.launch(p, out, lse, decoding, p.group))
    else:
        launches.append(forward.launch(p, out, lse, plan.forward(p, gpu)))
        if hopper:
            from .kernels import forward_hopper

            fold, draws = None, True
            if hopper.parts:
                temporaries = decode.temporaries(p, hopper.parts)
                fold = combine.launch(p, out, lse, hopper.parts, hopper.group)
            launches[-1] = forward_hopper.launch(p, out, lse, hopper, launches[-1], fold)
    head_dim = 0 if p.v.shape[-1] == p.q.shape[-1] else p.v.shape[-1]
    rotates = p.rotary is not None
    return Recipe(p.function, launches, p.lse_shape, temporaries, draws, head_dim, rotates, clears)


def _follow(recipe: Recipe, arguments: Arguments, names: Arguments) -> Result:
    q = arguments["q"]
    if q.is_cuda and torch.cuda.current_device() != q.device.index:
        with torch.cuda.device(q.device):
            return _follow(recipe, arguments, names)
    tensors = {**NOTHING, **arguments}
    for name, argument in names.items():
        tensors[name] = arguments[argument]
    if not isinstance(tensors["seqused_k"], torch.Tensor):
        tensors["seqused_k"] = None  # an int, known to the launches
    out, lse = arguments["out"], None
    if out is None:
        out = tensors["out"] = empty_out(q, recipe.head_dim)
    if recipe.lse_shape is not None:
        lse = torch.empty(recipe.lse_shape, dtype=torch.float32, device=q.device)
        tensors["lse"] = lse
    if recipe.clears:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
    tensors["aux"] = tuple(arguments["score_mod_args"]) or None
    parts, owners = recipe.temporaries
    if parts:
        tensors["parts"] = torch.empty(parts, dtype=torch.float32, device=q.device)
    if owners:
        tensors["owners"] = torch.empty(owners, dtype=torch.int32, device=q.device)
    if recipe.draws:
        tensors["counter"] = _counter(q.device)
    if recipe.rotates:
        tensors["given_q"], tensors["q"] = q, empty_out(q)
    for launch in recipe.launches:
        launch(tensors)
    return out, lse


_counters: dict[tuple[torch.device, int, int], torch.Tensor] = {}


def _counter(device: torch.device) -> torch.Tensor:
    """A zero to draw tiles of work from, which a kernel leaves zero again.

    Kernels of one stream run one after the other and share it; threads don't, for each may have a
    stream of its own under the same handle. A CUDA graph, which may be replayed on any stream, has
    its own, and sets it.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, threading.get_ident())
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


NOTHING = dict.fromkeys((
    "lse", "parts", "owners", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table",
    "cache_batch_idx", "cache_leftpad", "nothing",
))  # fmt: skip
