"""Where tensors lie: whether they have memory, whether it is shared, and what `out` must be."""

from collections.abc import Mapping
from typing import Any

import torch

from . import kind_of, wrong_type, wrong_value
from .tensors import shape, tensor


def refuse_missing_memory(function: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a tensor whose class only stands for data that lies elsewhere, as DTensor does.

    Such a tensor, or one whose storage was freed, reports address 0, and a kernel would read there.
    """
    for name, x in arguments.items():
        for one in x if isinstance(x, (tuple, list)) else (x,):
            if isinstance(one, torch.Tensor) and one.numel() and not one.data_ptr():
                hint = "pass the tensor that holds the data; for a DTensor that is .to_local()"
                wanted = "a tensor with memory of its own"
                raise wrong_type(function, name, wanted, kind_of(one), hint)


def overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements share memory: some stride is less than what lies inside it spans."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def extent(x: torch.Tensor) -> tuple[int, int]:
    """First byte and the one after the last that x can touch."""
    span = sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) + 1
    start = x.data_ptr()
    return start, start + span * x.element_size() * (x.numel() > 0)


def share_elements(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x and y, of one dtype, have an element in common. With unlike strides: whether the
    ranges of memory that they span overlap.
    """
    (first, end), (y_first, y_end) = extent(x), extent(y)
    if end <= y_first or y_end <= first or not (x.numel() and y.numel()):
        return False
    steps = []
    for stride, y_stride, n, m in zip(x.stride(), y.stride(), x.shape, y.shape, strict=True):
        if n > 1 and m > 1 and stride != y_stride:
            return True
        steps.append((max(1, stride if n > 1 else y_stride), 1 - m, n - 1))
    distance, rest = divmod(y_first - first, x.element_size())
    return rest != 0 or _reached(distance, sorted(steps, reverse=True))


def _reached(distance: int, steps: list[tuple[int, int, int]]) -> bool:
    """Whether a distance is a sum of steps (length, least number, largest number)."""
    if not steps:
        return distance == 0
    (step, low, high), *others = steps
    least, most = (sum(length * n[i] for length, *n in others) for i in (0, 1))
    low, high = max(low, -((most - distance) // step)), min(high, (distance - least) // step)
    return any(_reached(distance - n * step, others) for n in range(low, high + 1))


def out(function: str, out: Any, q: torch.Tensor, head_dim: int) -> None:
    if out is None:
        return
    tensor(function, "out", out, q.dim(), q)
    shape(function, "out", out, (*q.shape[:-1], head_dim))
    if overlaps_itself(out):
        wanted = "elements that don't overlap"
        raise wrong_value(function, "out", wanted, f"strides {out.stride()}")


def refuse_overlap(
    function: str, out: torch.Tensor, *inputs: torch.Tensor, name: str = "out"
) -> None:
    """Refuse an out that shares memory with an input."""
    if hasattr(out, "fake_mode") or not out.data_ptr():  # it lies nowhere
        return
    first, end = extent(out)
    for x in inputs:
        x_first, x_end = extent(x)
        if x_first and first < x_end and x_first < end:
            hint = "pass a tensor of its own memory"
            raise wrong_value(function, name, "memory apart from the inputs'", "an overlap", hint)
