"""A function in Triton's language, run on tensors of the CPU: what a score_mod does there.

Triton's names stand for PyTorch's functions of the same meaning, `tl.load(pointer + index)` for
indexing. Names that are neither are an error that says so.
"""

import builtins
import types
from collections.abc import Callable
from typing import Any

import torch

SAME = (
    "abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "floor", "ceil",
    "sigmoid", "where", "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32",
    "int64", "uint8",
)  # fmt: skip


class Pointer:
    """A tensor's memory and an index into it."""

    def __init__(self, memory: torch.Tensor, index: Any = 0) -> None:
        self.memory, self.index = memory, index

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.index + more)

    __radd__ = __add__


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> torch.Tensor:
    """tl.load: an index counts the elements of memory, as on a GPU."""
    there = torch.as_tensor(True if mask is None else mask)
    x = pointer.memory
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    memory = x.as_strided((room,), (1,))
    return torch.where(there, memory[torch.where(there, pointer.index, 0).long()], other)


LANGUAGE = types.SimpleNamespace(
    **{name: getattr(torch, name) for name in SAME},
    load=load,
    maximum=lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),  # numbers too
    minimum=lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
    cast=lambda x, dtype: torch.as_tensor(x).to(dtype),
    constexpr=lambda x: x,
)


def call(score_mod: Any, *arguments: Any) -> torch.Tensor:
    """What score_mod gives for tensors; a tuple of them becomes one of pointers."""
    given = [tuple(map(Pointer, x)) if isinstance(x, tuple) else x for x in arguments]
    return plain(score_mod)(*given)


def plain(function: Any) -> Callable[..., Any]:
    """A @triton.jit function as Python's, with PyTorch's functions for Triton's."""
    function = getattr(function, "fn", function)
    names: dict[str, Any] = {"__builtins__": builtins}
    for name in function.__globals__.keys() & set(function.__code__.co_names):
        x = function.__globals__[name]
        if isinstance(x, types.ModuleType) and x.__name__ == "triton.language":
            x = LANGUAGE
        elif hasattr(x, "fn") and hasattr(x, "arg_names"):
            x = plain(x)
        elif (getattr(x, "__module__", None) or "").startswith("triton.language"):
            x = getattr(LANGUAGE, name, getattr(x, "value", x))
        names[name] = x
    return types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
