"""The host's side of a kernel: launches that cost the CPU little."""

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl

from ..plan.layout import strides
from ..problem import Problem
from ..settings import INTERPRETED
from ..validate.memory import refuse_missing_memory

Tensors = Mapping[str, torch.Tensor | None]
MAX_INT = 2**31 - 1
# Arguments of kernels that Triton is not to compile for one by one, where they are 1 or a multiple
# of 16.
SIZES = [
    "stride_lse_b", "stride_lse_h", "stride_table", "batch", "nheads", "group", "num_m_blocks",
    "l2_group", "seqlen_q", "seqlen_k", "total_q", "total_k", "num_pages", "cache_rows", "left",
    "right", "appended", "nheads_k", "splits", "split_tiles", "num_partials", "partial_rows",
    "total", "stride_slopes", "rows_cos", "num_n_blocks",
    "stride_dlse_b", "stride_dlse_h", "stride_dlse_t",
]  # fmt: skip
ALIGNMENT = 16  # bytes; Triton compiles for pointers that are, or are not, multiples of it


def output_strides(p: Problem, out: torch.Tensor, lse: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of out, of the LSE's batch and head, and of the block table's rows."""
    lse_strides = (0, 0)
    if lse is not None:
        lse_strides = (lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2))
    table = p.cache.block_table
    return (*strides(out), *lse_strides, table.stride(0) if table is not None else 0)


class CompileTime:
    """For a NamedTuple of compile-time facts, with upper-case fields: kernels read constants.

    They are plain inside, so that Triton's hooks can write them as JSON and its keys are cheap to
    hash; and plain for the interpreter, which runs Python.
    """

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        x = super().__getattribute__(name)
        return tl.constexpr(x) if name.isupper() and not INTERPRETED else x


class Launch:
    """A kernel with everything decided but where its tensors lie.

    The first call is an ordinary Triton launch: it inspects all arguments, about 40 of them,
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
        # Programmatic dependent launch lets it start before the previous launch ends. maxnreg
        # limits a thread's registers, where ptxas would rather spill than lose occupancy.
        more = {"launch_pdl": launch_pdl, "maxnreg": maxnreg}
        self.options |= {name: x for name, x in more.items() if x}
        self.runner: Any = None

    def bind(self, known: Mapping[str, str]) -> None:
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
                    refuse_missing_memory(self.kernel.__name__, {name: x})
                addresses.append(address)
                bits |= address
        return addresses, bits % ALIGNMENT == 0

    def through_triton(self, tensors: Tensors, keep: bool) -> None:
        """An ordinary Triton launch; `keep` what it compiled."""
        compiled = self.kernel[(self.programs,)](*self.arguments(tensors), **self.options)
        if keep and compiled is not None:  # the interpreter compiles nothing
            self.runner = compiled[(self.programs, 1, 1)]

    def __call__(self, tensors: Tensors, stream: int | None = None) -> None:
        """Launch on `stream`, the current one of the current device."""
        addresses, aligned = self.addresses(tensors)
        if aligned and self.runner is not None:
            self.runner(*addresses, *self.constants, stream=stream)
        else:
            self.through_triton(tensors, aligned)
