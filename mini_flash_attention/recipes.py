"""Calls that are remembered: what was found out the first time, and how to follow it again."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import settings, training, triton_on_cpu
from .entries import Entry
from .kernels import workspace
from .plan import gpu as gpus
from .problem import Problem, empty_out
from .validate import wrong_type
from .validate.tensors import transformed

if TYPE_CHECKING:
    from .kernels.launch import Launch

MAX_RECIPES = 4096
PLAIN = (int, float, bool, type(None))
OWN_MEMORY = frozenset((torch.Tensor, torch.nn.Parameter, torch.nn.Buffer))

Arguments = dict[str, Any]
Result = tuple[torch.Tensor, torch.Tensor | None]


class Recipe(NamedTuple):
    """All that a call needs beside its tensors."""

    function: str
    launches: "list[Launch]"
    lse_shape: tuple[int, ...] | None
    workspace: dict[str, int]  # elements: a counter, partials and fixup of split keys
    head_dim: int = 0  # of the result, 0 where it is q's
    rotates: bool = False  # the queries, to a tensor of their own
    clears: bool = False  # rows that no program writes
    subclassed: bool = False  # whether some tensor's class might have no memory of its own


_recipes: dict[Hashable, Recipe] = {}
GRADIENT = object()  # in place of a key


def remember(key: Hashable, recipe: Recipe) -> None:
    """Keep a recipe for the calls that are like this one."""
    if len(_recipes) >= MAX_RECIPES:
        _recipes.clear()
    _recipes[key] = recipe


def look_up(entry: Entry, arguments: Arguments) -> tuple[Any, Recipe | None]:
    """What checks, plan and launches depend on, and the recipe for it if there is one.

    None where each call must be looked at afresh, GRADIENT where the call belongs to autograd.
    """
    grad = torch.is_grad_enabled()
    if settings.CHECKED or transformed() or type(arguments.get("cache_seqlens")) is int:
        # An int cache_seqlens grows with every token.
        return GRADIENT if training.wants_gradient(arguments) else None, None
    # 1 and True and 1.0 are equal, but not alike.
    key: list[Any] = [entry.name, settings.PORTABLE, *map(type, arguments.values())]
    try:
        for x in arguments.values():
            if x is None:
                continue
            if isinstance(x, torch.Tensor):
                if grad and x.requires_grad:
                    return GRADIENT, None
                if not x.dim() or x.is_neg():
                    return None, None  # a length to be read, or to be refused
                key += (x.dtype, x.device, x.shape, x.stride())
            elif type(x) is tuple:
                for y in (len(x), *x):
                    if type(y) in PLAIN:
                        key += (type(y), y)
                    elif grad and y.requires_grad:
                        return GRADIENT, None
                    elif y.is_neg():
                        return None, None
                    else:
                        key += (type(y), y.dtype, y.device, y.layout)
            elif type(x) in PLAIN or hasattr(x, "arg_names"):  # a score_mod, compiled in
                key.append(x)
            else:
                return GRADIENT if training.wants_gradient(arguments) else None, None
        signature = tuple(key)
        return signature, _recipes.get(signature)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return None, None  # unhashable, or no plain tensor


def launchable(p: Problem) -> Problem:
    """p as kernels take it, where they can run at all."""
    settings.require_triton()
    if settings.INTERPRETED and p.q.dtype is torch.bfloat16:
        wanted, hint = "float16 or float32 in Triton's interpreter", "its bf16 products are wrong"
        raise wrong_type(p.function, "q", wanted, p.q.dtype, hint)
    functions = {
        name: triton_on_cpu.launchable(function, settings.INTERPRETED)
        for name in ("score_mod", "score_mod_bwd")
        if (function := getattr(p.scores, name)) is not None
    }
    return p._replace(scores=p.scores._replace(**functions))


def bind(
    entry: Entry, launches: "list[Launch]", arguments: Arguments, *own: str, **renamed: str
) -> bool:
    """Say by which names a call's tensors are known to its launches, beside `own`; whether some
    tensor's class might have no memory of its own.
    """
    given = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)]
    known = {name: name for name in (*given, *own)}
    known |= {name: x if x in given else "nothing" for name, x in entry.tensors.items()}
    known |= renamed
    for launch in launches:
        launch.bind(known)
    classes = {type(x) for x in (*map(arguments.get, given), *arguments["score_mod_args"])}
    return not classes <= OWN_MEMORY


def make(entry: Entry, p: Problem, arguments: Arguments) -> Recipe:
    """Plan a call and make its launches."""
    p = launchable(p)
    from .kernels.attention import launches_of

    gpu = gpus.gpu_of(p.q.device)._replace(triton=settings.triton_version())
    launches, needed, clears = launches_of(p, gpu)
    head_dim = 0 if p.v.shape[-1] == p.q.shape[-1] else p.v.shape[-1]
    rotated = {"given_q": "q", "q": "rotated_q"} if p.cache.rotary else {}
    subclassed = bind(entry, launches, arguments, "out", "lse", "aux", *needed, **rotated)
    return Recipe(
        p.function, launches, p.lse_shape, needed, head_dim, bool(p.cache.rotary), clears,
        subclassed,
    )  # fmt: skip


def follow(recipe: Recipe, tensors: Arguments, keep: bool = True) -> Result:
    """(out, softmax_lse or None), once the recipe's launches have written them."""
    q, out, lse = tensors["q"], tensors["out"], None
    if out is None:
        out = tensors["out"] = empty_out(q, recipe.head_dim)
    if recipe.lse_shape is not None:
        lse = torch.empty(recipe.lse_shape, dtype=torch.float32, device=q.device)
    if recipe.clears:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
    if recipe.rotates:
        tensors["rotated_q"] = empty_out(q)
    tensors["lse"] = lse
    launch(recipe, tensors, keep)
    return out, lse


def launch(recipe: Recipe, tensors: Arguments, keep: bool) -> None:
    """Launch it; what it needs besides is put beside the arguments. keep: the workspace."""
    stream = None
    index = tensors["q"].get_device()
    if index >= 0:  # not the CPU
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                return launch(recipe, tensors, keep)
        stream = torch._C._cuda_getCurrentRawStream(index)
    tensors |= {"nothing": None, "aux": tensors["score_mod_args"] or None}
    if recipe.workspace:
        workspace.find(recipe.workspace, tensors, stream if keep else None)
    for one in recipe.launches:
        one(tensors, stream)
    return None
