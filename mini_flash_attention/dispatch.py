"""From the arguments of a call to the code that computes it.

A call is described and checked (`problem`), planned (`plan`) and launched (`kernels`) in full the
first time its shapes are seen. What came of that depends on shapes, strides, dtypes, devices and
options only, so it is kept as a `Recipe`, and the same call with other tensors costs the CPU a
look-up and the launches.

With TRITON_INTERPRET=1 (Triton's own switch, set before Triton is imported) CPU tensors go
through the GPU kernels too, in Triton's interpreter: slow, and open to a debugger.
"""

import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import checks, cpu, language, memory, plan, refusals
from .problem import Problem, empty_out

if TYPE_CHECKING:
    from .kernels.launch import Launch

INTERPRETED = checks.INTERPRETED
FLOAT32_TINY = torch.finfo(torch.float32).tiny
MAX_RECIPES = 4096
PLAIN = (int, float, bool, type(None))
OWN_MEMORY = frozenset((torch.Tensor, torch.nn.Parameter, torch.nn.Buffer))

Arguments = dict[str, Any]
Reader = Callable[..., Problem]  # of the arguments of a public function
Result = tuple[torch.Tensor, torch.Tensor | None]


class Recipe(NamedTuple):
    """All that a call needs beside its tensors."""

    function: str
    launches: "list[Launch]"
    lse_shape: tuple[int, ...] | None
    workspace: dict[str, int]  # elements: a counter, what split keys leave in parts and owners
    head_dim: int = 0  # of the result, 0 where it is q's
    rotates: bool = False  # the queries, to a tensor of their own
    clears: bool = False  # rows that no program writes
    subclassed: bool = False  # whether some tensor's class might have no memory of its own


_recipes: dict[Hashable, Recipe] = {}


def run(describe: Reader, arguments: Arguments, names: Arguments) -> Result:
    """(out, softmax_lse or None) of a call; its new keys are in the cache afterwards.

    `names` says which argument stands for a tensor that kernels know under another name. Whoever
    traces the call, or looks at operators, is shown one.
    """
    if type(arguments["window_size"]) is not tuple:
        arguments["window_size"] = refusals.pair(arguments["window_size"])
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        from . import ops

        return ops.run(describe, arguments)
    return compute(describe, arguments, names)


def compute(describe: Reader, arguments: Arguments, names: Arguments, keep: bool = True) -> Result:
    """`run` without an operator. keep: the workspace, for the next call."""
    key, recipe = _look_up(describe, arguments)
    if recipe is not None:
        if recipe.subclassed:
            memory.without_memory(recipe.function, arguments)
        if arguments["out"] is not None:
            _keep_apart(recipe.function, arguments)
        return _follow(recipe, arguments, keep)
    p = check(describe, arguments)
    memory.without_memory(p.function, arguments)
    arguments["score_mod_args"] = p.scores.aux or ()
    if checks.ON:
        checks.values(p)
    if p.softmax_scale < FLOAT32_TINY:
        # The online softmax tracks the largest raw score, which is the largest scaled one only
        # for a positive scale, so the sign goes into q.
        zero = p.softmax_scale > -FLOAT32_TINY
        q = torch.zeros_like(p.q) if zero else -p.q
        p = p._replace(q=q, softmax_scale=1.0 if zero else -p.softmax_scale)
        arguments, key = {**arguments, "q": q}, None
    checks.warn_of_late_switch()
    if not (p.q.is_cuda or INTERPRETED):
        return cpu.run(p)
    recipe = _recipe(p, arguments, names)
    if key is not None:
        if len(_recipes) >= MAX_RECIPES:
            _recipes.clear()
        _recipes[key] = recipe
    return _follow(recipe, arguments, keep)


def check(describe: Reader, arguments: Arguments) -> Problem:
    """The call described, if nothing about it is to be refused."""
    refusals.traced()
    p = describe(**arguments)
    if arguments["out"] is not None:
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
    others = [x for name, x in arguments.items() if name != "out"]
    others += arguments["score_mod_args"]
    memory.apart(function, arguments["out"], *filter(torch.is_tensor, others))


def _look_up(describe: Reader, arguments: Arguments) -> tuple[Any, Recipe | None]:
    """What checks, plan and launches depend on, and the recipe for it if there is one.

    None where each call must be looked at afresh.
    """
    if checks.ON or refusals.transformed() or type(arguments.get("cache_seqlens")) is int:
        return None, None  # the last, because it grows with every token
    grad = torch.is_grad_enabled()
    # 1 and True and 1.0 are equal, but not alike.
    key: list[Any] = [describe, plan.PORTABLE, *map(type, arguments.values())]
    try:
        for x in arguments.values():
            if x is None:
                continue
            if isinstance(x, torch.Tensor):
                if not x.dim() or (grad and x.requires_grad) or x.is_neg():
                    return None, None  # a length to be read, or to be refused
                key += (x.dtype, x.device, x.shape, x.stride())
            elif type(x) is tuple:
                for y in (len(x), *x):
                    if type(y) in PLAIN:
                        key += (type(y), y)
                    elif (grad and y.requires_grad) or y.is_neg():
                        return None, None
                    else:
                        key += (type(y), y.dtype, y.device, y.layout)
            elif type(x) in PLAIN or hasattr(x, "arg_names"):  # a score_mod, compiled in
                key.append(x)
            else:
                return None, None
        signature = tuple(key)
        return signature, _recipes.get(signature)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return None, None  # unhashable, or no plain tensor


def _recipe(p: Problem, arguments: Arguments, names: Arguments) -> Recipe:
    """Plan a call and decide its launches."""
    checks.require_triton()
    if p.scores.score_mod is not None:
        score_mod = language.launchable(p.scores.score_mod, INTERPRETED)
        p = p._replace(scores=p.scores._replace(score_mod=score_mod))
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
    workspace, clears = dict[str, int](), False
    # Gluon has no interpreter.
    hopper = plan.hopper(p, out, gpu) if out.numel() and not INTERPRETED else None
    if not out.numel():
        pass
    elif not hopper and plan.decodes(p, gpu):
        decoding = plan.decode(p, gpu)
        clears = p.cu_seqlens_q is not None
        workspace = decode.workspace(p, decoding)
        launches.append(decode.launch(p, out, lse, decoding))
        if workspace:
            launches.append(combine.launch(p, out, lse, decoding, p.group))
    else:
        launches.append(forward.launch(p, out, lse, plan.forward(p, gpu)))
        if hopper:
            from .kernels.hopper import forward as forward_hopper

            fold = None
            if hopper.parts:
                workspace = decode.workspace(p, hopper.parts)
                fold = combine.launch(p, out, lse, hopper.parts, hopper.group)
            launches[-1] = forward_hopper.launch(p, out, lse, hopper, launches[-1], fold)
            workspace["counter"] = 1
    head_dim = 0 if p.v.shape[-1] == p.q.shape[-1] else p.v.shape[-1]
    given = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)]
    classes = {type(x) for x in (*map(arguments.get, given), *arguments["score_mod_args"])}
    known = {name: name for name in (*given, "out", "lse", "aux", *workspace)}
    known |= {name: x if x in given else "nothing" for name, x in names.items()}
    known |= {"given_q": "q", "q": "rotated_q"} if p.rotary else {}
    for launch in launches:
        launch.find(known)
    return Recipe(
        p.function, launches, p.lse_shape, workspace, head_dim, bool(p.rotary), clears,
        not classes <= OWN_MEMORY,
    )  # fmt: skip


def _follow(recipe: Recipe, tensors: Arguments, keep: bool = True) -> Result:
    """Launch it; what it needs besides is put beside the arguments."""
    q, stream = tensors["q"], None
    index = q.get_device()
    if index >= 0:  # not the CPU
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                return _follow(recipe, tensors, keep)
        stream = torch._C._cuda_getCurrentRawStream(index)
    out, lse = tensors["out"], None
    if out is None:
        out = tensors["out"] = empty_out(q, recipe.head_dim)
    if recipe.lse_shape is not None:
        lse = torch.empty(recipe.lse_shape, dtype=torch.float32, device=q.device)
    if recipe.clears:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
    tensors |= {"lse": lse, "nothing": None, "aux": tensors["score_mod_args"] or None}
    if recipe.workspace:
        _find_room(recipe.workspace, tensors, stream if keep else None)
    if recipe.rotates:
        tensors["rotated_q"] = empty_out(q)
    for launch in recipe.launches:
        launch(tensors, stream)
    return out, lse


_rooms: dict[Hashable, dict[str, torch.Tensor]] = {}
MAX_ROOMS, MAX_KEPT = 16, 8 << 20  # elements of 4 bytes


def _find_room(workspace: dict[str, int], tensors: Arguments, stream: int | None) -> None:
    """Put a recipe's workspace among its tensors, and keep it for the next call.

    The counter is a zero to draw tiles of work from, which a kernel leaves zero again. Kernels of
    one stream run one after the other and share what is kept; threads don't, for their launches may
    lie between one another's. A CUDA graph, which may be replayed on any stream, has its own.
    """
    room, device = {}, tensors["q"].device
    if stream is not None and not torch.cuda.is_current_stream_capturing():
        room = _rooms.setdefault((device, stream, threading.get_ident()), {})
        if len(_rooms) > MAX_ROOMS:
            _rooms.pop(list(_rooms)[0], None)  # noqa: RUF015 (another thread may add one meanwhile)
    for name, elements in workspace.items():
        x = room.get(name)
        if x is None or x.numel() < elements:
            make: Any = torch.zeros if name == "counter" else torch.empty
            dtype = torch.float32 if name == "parts" else torch.int32
            x = make(elements, dtype=dtype, device=device)
            if elements <= MAX_KEPT:
                room[name] = x
        tensors[name] = x
