"""The host's side of TMA: how descriptors see tensors, and launches that take them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..plan.layout import strides
from .gluon import TensorDescriptor, gl
from .launch import ALIGNMENT, Launch, Tensors

DTYPES = {
    torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32,
}  # fmt: skip


class TmaBox(NamedTuple):
    """How a descriptor sees a tensor, (batch or page, token, head, head_dim), and what it moves."""

    name: str
    shape: list[int]
    strides: list[int]
    box: list[int]


def tma_box(
    name: str, x: torch.Tensor, tokens: int, rows: int, columns: int, heads: int = 1
) -> TmaBox:
    """x as a descriptor sees it: `tokens` of a sequence or a page, boxes of `rows` for `heads`."""
    packed = x.dim() == 3
    *outer, nheads, head_dim = x.shape
    shape = [1 if packed else outer[0], tokens, nheads, head_dim]
    # A dimension of one is never stepped over, but TMA wants a stride that it could take.
    steps = [s if s and n > 1 else 8 for s, n in zip(strides(x), shape, strict=False)]
    return TmaBox(name, shape, [*steps, 1], [1, rows, heads, columns])


# TMA sees a packed sequence through a window: two dimensions before the tokens, the first with so
# large a stride that addresses wrap around at 64 bits, move the sequence's last token to where the
# tokens' dimension ends for TMA. Past it reads give zeros, and nothing is written.
WRAP, LAST, ANY = 1 << 34, 1 << 30, (1 << 31) - (1 << 16)


def sequence_box(name: str, x: torch.Tensor, rows: int, columns: int) -> TmaBox:
    """x as a descriptor sees it that stops at the end of a sequence: boxes of `rows` of a head."""
    if x.dim() == 4:
        return tma_box(name, x, x.shape[1], rows, columns)
    box = tma_box(name, x, x.shape[0], rows, columns)
    _, step, *rest = box.strides
    shape = [ANY, ANY, LAST, *box.shape[2:]]
    return TmaBox(name, shape, [WRAP - step, step, step, *rest], [1, *box.box])


class RawDescriptor:
    """What Triton's launcher reads of a TensorDescriptor, without the checks of making one."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: torch.Tensor, box: TmaBox) -> None:
        self.base, self.shape, self.strides = base, box.shape, box.strides


class Launches:
    """Several launches in the place of one."""

    __slots__ = ("launches",)

    def __init__(self, *launches: Launch) -> None:
        self.launches = launches

    def bind(self, known: Mapping[str, str]) -> None:
        for launch in self.launches:
            launch.bind(known)

    def __call__(self, tensors: Tensors, stream: int | None = None) -> None:
        for launch in self.launches:
            launch(tensors, stream)


class TmaLaunch(Launch):
    """A launch whose first arguments are descriptors; `fallback` where an address fits none.

    combine_launch: None, or the launch that makes the result of what this one leaves.
    """

    __slots__ = ("boxes", "combine_launch", "fallback")

    def __init__(
        self, *arguments: Any, boxes: list[TmaBox], fallback: "Launch | Launches",
        combine_launch: Launch | None,
    ) -> None:  # fmt: skip
        super().__init__(*arguments)
        self.boxes, self.fallback, self.combine_launch = boxes, fallback, combine_launch

    def bind(self, known: Mapping[str, str]) -> None:
        super().bind(known)
        self.boxes = [box._replace(name=known[box.name]) for box in self.boxes]
        self.fallback.bind(known)
        if self.combine_launch is not None:
            self.combine_launch.bind(known)

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        descriptors = []
        for box in self.boxes:
            x: Any = tensors[box.name]
            dtype = DTYPES[x.dtype]
            layout = gl.NVMMASharedLayout.get_default_for(box.box, dtype)
            descriptors.append(TensorDescriptor(x, box.shape, box.strides, box.box, layout))
        return (*descriptors, *super().arguments(tensors))

    def __call__(self, tensors: Tensors, stream: int | None = None) -> None:
        bases: list[Any] = [tensors[box.name] for box in self.boxes]
        if any(not at or at % ALIGNMENT for at in map(torch.Tensor.data_ptr, bases)):
            self.fallback(tensors, stream)
            return
        addresses, aligned = self.addresses(tensors)
        if aligned and self.runner is not None:
            placed = map(RawDescriptor, bases, self.boxes)
            self.runner(*placed, *addresses, *self.constants, stream=stream)
        else:
            self.through_triton(tensors, aligned)
        if self.combine_launch is not None:
            self.combine_launch(tensors, stream)
