"""Run a call directly, or as an operator under torch.compile, torch.export and dispatch modes."""

from typing import Any

import torch

from . import execution, execution_backward, recipes
from .entries import KVCACHE, Entry
from .recipes import Arguments, Result
from .validate.options import pair


def run(entry: Entry, arguments: Arguments) -> Result:
    """(out, softmax_lse or None) of a call; its new keys are in the cache afterwards.

    A compiler that traces the call, or a mode that looks at operators, sees one.
    """
    if type(arguments["window_size"]) is not tuple:
        arguments["window_size"] = pair(arguments["window_size"])
    if arguments.get("dropout_p") and "dropout_seed" not in arguments:
        arguments["dropout_seed"] = seed(arguments["q"])
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        from . import ops

        autocasts(entry, arguments)
        return ops.run(entry, arguments)
    key, recipe = recipes.look_up(entry, arguments)
    if recipe is None and autocasts(entry, arguments):
        return run(entry, arguments)
    if key is recipes.GRADIENT:
        from . import autograd

        return autograd.run(entry, arguments)
    return execution.run_known(entry, arguments, key, recipe)


def autocasts(entry: Entry, arguments: Arguments) -> bool:
    """Whether torch.autocast is on and q, k or v are in fp32; they are cast then, as those of
    PyTorch's attention.
    """
    q = arguments["q"]
    if entry is KVCACHE or not isinstance(q, torch.Tensor):
        return False
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return False
    given = {name: arguments[name] for name in ("q", "k", "v")}
    wide = [n for n, x in given.items() if isinstance(x, torch.Tensor) and x.dtype is torch.float32]
    dtype = torch.get_autocast_dtype(kind)
    if not wide or dtype is torch.float32:
        return False
    arguments |= {name: given[name].to(dtype) for name in wide}
    return True


def seed(q: Any) -> torch.Tensor | None:
    """A number from PyTorch's generator. It stays on the device, so that each replay of a CUDA
    graph gets its own.
    """
    if not isinstance(q, torch.Tensor):  # refused later
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def run_backward(entry: Entry, arguments: Arguments) -> execution_backward.Gradients:
    """The gradients of a call; `entry` is that of its backward pass."""
    if type(arguments["window_size"]) is not tuple:
        arguments["window_size"] = pair(arguments["window_size"])
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        from . import ops

        return ops.run_backward(entry, arguments)
    return execution_backward.run(entry, arguments)
