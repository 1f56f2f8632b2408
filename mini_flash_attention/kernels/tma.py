"""The host's side of TMA: how descriptors see tensors, and launches that take them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..plan.layout import strides
from .gluon import TensorDescriptor, gl
from .launch import ALIGNMENT, Launch, Tensors


class View(NamedTuple):
    """How a descriptor sees a tensor, (batch or page, token, head, head_dim), and what it moves."""

    name: str
    shape: list[int]
    strides: list[int]
    box: list[int]


def view(name: str, x: torch.Tensor, tokens: int, rows: int, columns: int, heads: int = 1) -> View:
    """x as a descriptor sees it: `tokens` of a sequence or a page, boxes of `rows` for `heads`."""
    packed = x.dim() == 3
    *outer, nheads, head_dim = x.shape
    shape = [1 if packed else outer[0], tokens, nheads, head_dim]
    # A dimension of one is never stepped over, but TMA wants a stride that it could take.
    steps = [s if s and n > 1 else 8 for s, n in zip(strides(x), shape, strict=False)]
    return View(name, shape, [*steps, 1], [1, rows, heads, columns])


class Placed:
    """What Triton's launcher reads of a TensorDescriptor, without the checks of making one."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: torch.Tensor, view: View) -> None:
        self.base, self.shape, self.strides = base, view.shape, view.strides


class TmaLaunch(Launch):
    """A launch whose first arguments are descriptors; `otherwise` where an address fits none.

    fold: None, or the launch that makes a whole of what this one leaves.
    """

    __slots__ = ("fold", "otherwise", "views")

    def __init__(
        self, *arguments: Any, views: list[View], otherwise: Launch, fold: Launch | None
    ) -> None:
        super().__init__(*arguments)
        self.views, self.otherwise, self.fold = views, otherwise, fold

    def find(self, known: Mapping[str, str]) -> None:
        super().find(known)
        self.views = [view._replace(name=known[view.name]) for view in self.views]
        for launch in filter(None, (self.otherwise, self.fold)):
            launch.find(known)

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        descriptors = []
        for view in self.views:
            x: Any = tensors[view.name]
            dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[x.dtype]
            layout = gl.NVMMASharedLayout.get_default_for(view.box, dtype)
            descriptors.append(TensorDescriptor(x, view.shape, view.strides, view.box, layout))
        return (*descriptors, *super().arguments(tensors))

    def __call__(self, tensors: Tensors, stream: int | None = None) -> None:
        bases: list[Any] = [tensors[view.name] for view in self.views]
        if any(not at or at % ALIGNMENT for at in map(torch.Tensor.data_ptr, bases)):
            self.otherwise(tensors, stream)
            return
        addresses, aligned = self.addresses(tensors)
        if aligned and self.runner is not None:
            placed = map(Placed, bases, self.views)
            self.runner(*placed, *addresses, *self.constants, stream=stream)
        else:
            self.first(tensors, aligned)
        if self.fold is not None:
            self.fold(tensors, stream)
