"""The host's side of a kernel: strides, and launches that cost the CPU little."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..memory import without_memory
from ..problem import NARROW, Problem

Tensors = Mapping[str, torch.Tensor | None]
LOG2E, MAX_INT = math.log2(math.e), 2**31 - 1
# Arguments of kernels that Triton is not to compile for one by one, where they are 1 or a multiple
# of 16.
SIZES = [
    "stride_lse_b", "stride_lse_h", "stride_table", "batch", "nheads", "group", "tiles",
    "per_group", "seqlen_q", "seqlen_k", "total_q", "total_k", "num_pages", "cache_rows", "left",
    "right", "appended", "nheads_k", "splits", "split_tiles", "slots", "part_rows", "total",
    "stride_slopes", "rows_cos",
]  # fmt: skip
ALIGNMENT = 16  # bytes; Triton compiles for pointers that are, or are not, multiples of it


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """(batch or page, token, head) strides; 0 for the batch of a packed tensor.

    A dimension of size 1 is never stepped over and may carry any stride: 0 stands in, so that an
    odd one does not cost the kernel its aligned loads.
    """
    steps = tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))
    return (0, steps[0], steps[1]) if len(steps) == 3 else (steps[0], steps[1], steps[2])


def where(p: Problem, out: torch.Tensor, lse: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of out, of the LSE's batch and head, and of the block table's rows."""
    lse_strides = (0, 0)
    if lse is not None:
        lse_strides = (lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2))
    row = p.block_table.stride(0) if p.block_table is not None else 0
    return (*strides(out), *lse_strides, row)


def eights(*tensors: torch.Tensor) -> int:
    """A bit for each tensor whose strides are multiples of 8 elements, but not all of 16.

    Multiples of 16 Triton finds by itself; others it takes for odd, and loads two bytes at a time
    instead of 16.
    """
    return sum((math.gcd(*strides(x)) % 16 == 8) << n for n, x in enumerate(tensors))


def padded(head_dim: int, other: int) -> int:
    """Columns of a tile that holds head_dim: a power of two, as many as a product wants.

    Up to 64 no fewer than `other` has, the tile of V or of K: where the two were swizzled in
    different ways, ptxas 12.8 had a product read V from somewhere else (bench/NOTES.md, 113).
    """
    return max(16, 1 << (max(head_dim, min(other, 64)) - 1).bit_length())


class Changes(NamedTuple):
    """How `rules/scores.py` is told what becomes of scores.

    SCORES is "", "softcap", or what a kernel does in a way of its own:
    "bounded", a soft cap that keeps weights within 2^-75 and 2^75, so that m = 0 serves all along;
    "linear", ALiBi as what it is on either side of a query; "folded", beside a score_mod, a scale
    that is a power of two, multiplied into Q.
    """

    scale: float  # of the softmax, in powers of two
    numbers: tuple[int, float, float]  # stride of the slopes' batch, factor, softcap
    way: str  # SCORES


def changes(p: Problem, *own: str) -> Changes:
    """What becomes of p's scores, for a kernel that has these ways of its own."""
    slopes, softcap, score_mod = p.scores.alibi_slopes, p.scores.softcap, p.scores.score_mod
    stride = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    scale, factor = p.softmax_scale * LOG2E, p.softmax_scale
    way = ""
    if softcap:
        factor /= softcap
    if score_mod is not None or (softcap and slopes is not None):
        scale = LOG2E  # all is done by then
        # In bf16, which has the range for it.
        if not softcap and slopes is None and math.frexp(factor)[0] == 0.5:
            way = "folded" if p.q.dtype is torch.bfloat16 else ""
    elif softcap:
        scale, narrow = softcap * LOG2E, p.left is not None and p.left < NARROW
        # fp16 does not hold such weights. Times values from 1e-15 to 1e10 they are safe in fp32.
        # Rounding changes them by up to 2^-9, even the largest, which would otherwise be exactly 1.
        # Over many keys the errors average out; for a single key `softmax.unrounded` undoes the
        # rounding. The choice does not depend on lengths, so a sequence's result does not change
        # with the rest of the batch.
        way = "bounded" if scale <= 75 and p.q.dtype is not torch.float16 and not narrow else ""
    elif slopes is not None:  # what is subtracted is scaled with the score
        factor = 1 / p.softmax_scale
        way = "linear"
    way = way if way in own else "softcap" if softcap else ""
    return Changes(scale, (stride, factor, softcap), way)


def wide(p: Problem, block_n: int) -> bool:
    """Whether offsets inside a tile of keys, or inside a whole cache of pages, need 64 bits.

    Above head_dim 128 they are given them anyway: there it is registers that are short.
    """
    if max(p.k.shape[-1], p.v.shape[-1]) > 128:
        return True
    if p.page_size:
        last = (p.k.shape[0] - 1, p.k.shape[1] - 1)
        reach = (last[0] * x.stride(0) + last[1] * x.stride(1) for x in (p.k, p.v))
    else:
        reach = (block_n * x.stride(-3) for x in (p.k, p.v))
    return any(n + p.k.shape[-1] >= 2**31 for n in reach)


def twins(p: Problem, block_n: int) -> bool:
    """Whether v should be found by k's offsets: strides agree and it pays.

    Sharing saves up to an eighth of the loop's instructions with 64-bit offsets or one page a
    tile. Otherwise it was slower: the compiler keeps fewer of them from tile to tile.
    """
    one_page = p.page_size > 0 and p.page_size % block_n == 0
    return strides(p.k) == strides(p.v) and (wide(p, block_n) or one_page)


class Launch:
    """A kernel with everything decided but where its tensors lie.

    The first call goes the way of any Triton launch: it inspects all arguments, about 40 of them,
    and compiles. What Triton inspects is then fixed, except for the alignment of the addresses,
    so later calls hand the compiled kernel bare addresses, at a fraction of the cost.
    """

    __slots__ = ("constants", "kernel", "options", "pointers", "programs", "runner")

    def __init__(
        self, kernel: Any, programs: int, pointers: tuple[str, ...], constants: tuple[Any, ...],
        num_warps: int, num_stages: int = 1, *, launch_pdl: bool = False,
        maxnreg: int | None = None,
    ) -> None:  # fmt: skip
        self.kernel = kernel
        self.programs = programs
        self.pointers = pointers  # names of the tensors, in the kernel's order
        self.constants = constants  # all the other arguments, constexprs last
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        # Programmatic dependent launch: it may start before the launch before ends. Registers of a
        # thread, where ptxas would rather spill than lose occupancy.
        more = {"launch_pdl": launch_pdl, "maxnreg": maxnreg}
        self.options |= {name: x for name, x in more.items() if x}
        self.runner: Any = None

    def find(self, known: Mapping[str, str]) -> None:
        """Replace the kernel's names of its tensors by those they are `known` under."""
        self.pointers = tuple(known.get(name, "nothing") for name in self.pointers)

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        """What the kernel is called with the first time."""
        return (*(tensors[name] for name in self.pointers), *self.constants)

    def addresses(self, tensors: Tensors) -> tuple[list[Any], bool]:
        """Where the tensors lie, and whether all at multiples of ALIGNMENT."""
        addresses: list[int | None] = []
        bits = 0
        for name in self.pointers:
            x: Any = tensors[name]
            if x is None:
                addresses.append(None)
            elif type(x) is tuple:  # of a score_mod's tensors: Triton may look at them each time
                bits = 1
            else:
                address = x.data_ptr()
                if not address:  # freed after the call was first checked
                    without_memory(self.kernel.__name__, {name: x})
                addresses.append(address)
                bits |= address
        return addresses, bits % ALIGNMENT == 0

    def first(self, tensors: Tensors, keep: bool) -> None:
        """The way of any Triton launch; `keep` what it compiled."""
        compiled = self.kernel[(self.programs,)](*self.arguments(tensors), **self.options)
        if keep and compiled is not None:  # the interpreter compiles nothing
            self.runner = compiled[(self.programs, 1, 1)]

    def __call__(self, tensors: Tensors, stream: int | None = None) -> None:
        """Launch on `stream`, the current one of the current device."""
        addresses, aligned = self.addresses(tensors)
        if aligned and self.runner is not None:
            self.runner(*addresses, *self.constants, stream=stream)
        else:
            self.first(tensors, aligned)
