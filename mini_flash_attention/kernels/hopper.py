"""The tools of a Hopper kernel in Gluon: how a producer and its consumers hand each other tiles.

All that differs between Triton's versions stands here too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as nvidia
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import ALIGNMENT, Launch, Tensors

__all__ = ["gl", "gluon"]
mbarrier, tma, fence_async_shared = nvidia.mbarrier, nvidia.tma, nvidia.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = nvidia.warpgroup_mma, nvidia.warpgroup_mma_wait
NEWER = hasattr(tma, "async_load")  # Triton 3.8 renamed copies
tma_load: Any = tma.async_load if NEWER else tma.async_copy_global_to_shared
tma_store: Any = tma.async_store if NEWER else tma.async_copy_shared_to_global

STAGES = gl.constexpr(2)  # tiles in a ring
# The hardware has 16 named barriers. Triton takes the first few itself, 8 to 15 are free.
K_FREED, V_FREED = gl.constexpr(8), gl.constexpr(10)  # and the next: a place in a ring is free
TURN = gl.constexpr(12)  # and those after: a consumer's turn to issue
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
FOUR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
FOUR_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))


@gluon.constexpr_function
def accumulator(columns):
    """Where a consumer's four warps hold the 64 rows of a product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


class View(NamedTuple):
    """How a descriptor sees a tensor, (batch or page, token, head, head_dim), and what it moves."""

    name: str
    shape: list[int]
    strides: list[int]
    box: list[int]


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


class Queries(NamedTuple):
    """Q tiles, which consumers take in turn, a barrier for each that it is free, and `arrival`s."""

    tiles: Any
    full: Any
    free: Any


@gluon.jit
def q_place(queries, worked, which, CONSUMERS: gl.constexpr):
    """Where a consumer's queries lie: consumers take places in turn."""
    return (worked * CONSUMERS + which) % queries.tiles.shape[0]


@gluon.jit
def arrival(queries, worked, which, CONSUMERS: gl.constexpr):
    """What says that a consumer's queries are there. Its own, in every second turn with any work:
    where two share one, the first to wait could take the other's turn for its own.
    """
    return queries.full.index(worked % 2 * CONSUMERS + which)


class Ring(NamedTuple):
    """Tiles that the producer fills in turn. The n-th lies in place n % STAGES.

    `full` says that a tile is there; that a place is free again, the named barriers from `freed`
    on: to arrive at one costs a consumer less than an mbarrier, for which its warps have to meet.
    """

    tiles: Any
    full: Any
    freed: Any


@gluon.jit
def barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """New mbarriers that COUNT arrivals complete."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(NUMBER):
        mbarrier.init(made.index(n), count=COUNT)
    return made


@gluon.jit
def named_barrier(OPERATION: gl.constexpr, barrier, THREADS: gl.constexpr):
    """`sync`: wait until THREADS threads have come, these included. `arrive`: come, and go on."""
    PTX: gl.constexpr = f"bar.{OPERATION} $1, {THREADS}; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(PTX, "=r,r", [gl.to_tensor(barrier)], gl.int32, False, 1)


@gluon.jit
def my_turn(which: gl.constexpr, CONSUMERS: gl.constexpr):
    """Where there are three, wait until the consumer before has issued its products."""
    if CONSUMERS == 3:
        named_barrier("sync", TURN + which, 256)


@gluon.jit
def your_turn(which: gl.constexpr, CONSUMERS: gl.constexpr):
    if CONSUMERS == 3:
        named_barrier("arrive", TURN + (which + 1) % CONSUMERS, 256)


@gluon.jit
def here(x):
    """The integer x, of which nothing is worked out before: that would take registers all along."""
    x = gl.to_tensor(x)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


# 2^t for |t| < 127 and -inf: 1.5 * 2^23 + 127 rounds t to a whole number n, and leaves n + 127, the
# exponent of 2^n, in the last bits of r. Of the rest, within 1/2, 2^f is a polynomial with a
# relative error of 3e-6. What is no number stays none.
EXP2 = gl.constexpr("""{ .reg .f32 t, r, f, p; .reg .b32 i;
max.NaN.f32 t, $4, 0fC2FE0000; add.rn.f32 r, t, 0f4B40007F; sub.rn.f32 f, r, 0f4B40007F;
sub.rn.f32 f, t, f; fma.rn.f32 p, f, 0f3C1D0166, 0f3D64FE23; fma.rn.f32 p, p, f, 0f3E7601BC;
fma.rn.f32 p, p, f, 0f3F317096; fma.rn.f32 p, p, f, 0f3F800000;
mov.b32 i, r; shl.b32 i, i, 23; mov.b32 r, i; mul.rn.f32 $0, p, r;
} ex2.approx.ftz.f32 $1, $5; ex2.approx.ftz.f32 $2, $6; ex2.approx.ftz.f32 $3, $7;""")


@gluon.jit
def exp2(x):
    """2^x, one of four by the units of products: where those of functions have tanh to do too."""
    return gl.inline_asm_elementwise(EXP2, "=f,=f,=f,=f,f,f,f,f", [x], gl.float32, True, 4)


@gluon.constexpr_function
def scaling(count):
    """PTX: $0, $1, ... times as many factors, unless none in the warp is below 1; its registers.

    Of the 64 rows of a product a thread holds two: one's sums are $0 and $1, the other's $2 and $3.
    """
    factors = [f"${2 * count + n}" for n in range(count)]
    products = "".join(f"mul.f32 ${n}, ${n}, {factors[n]};" for n in range(count))
    ask = "setp.lt.f32 any, {0}, 0f3F800000; setp.lt.or.f32 any, {2}, 0f3F800000, any;"
    vote = "vote.sync.any.pred any, any, 0xffffffff; @!any bra.uni DONE;"
    code = f"{{ .reg .pred any; {ask.format(*factors)} {vote} {products} DONE: }}"
    return code, ",".join(["=f"] * count + [str(n) for n in range(count)] + ["f"] * count), count


@gluon.jit
def scaled(o, alpha):
    """o [64, D] times alpha [64, 1], none of it above 1, by the warps where some of it is below."""
    PTX: gl.constexpr = scaling(o.shape[1] // 2)
    return gl.inline_asm_elementwise(PTX[0], PTX[1], [o, alpha], gl.float32, False, PTX[2])


@gluon.jit
def place(n):
    """Where in a ring the n-th tile lies. Products wait for this: n % STAGES takes longer."""
    return n & STAGES - 1


@gluon.jit
def tile(ring, n):
    return ring.tiles.index(place(n))


@gluon.jit
def load_tile(desc, source, start, tile, barrier, wanted, PAGE_SIZE: gl.constexpr):
    """Load the keys, or values, of a sequence from its `start`-th, in pieces of at most a page.

    source: the sequence's row of the block table, its number, its first row and its length where
    keys are dense or packed, and the KV head.
    """
    table, batch, first, length, head = source
    N: gl.constexpr = desc.block_shape[1]
    WHOLE: gl.constexpr = tile.shape[1]
    mbarrier.expect(barrier, WHOLE // N * desc.block_type.nbytes, pred=wanted)
    if PAGE_SIZE == 0:
        tma_load(desc, [batch, first + start, head, 0], barrier, tile, pred=wanted)
    else:  # pages that are none read as zeros, as all does that lies outside the descriptor
        for group in gl.static_range(0, WHOLE, 4 * N):  # four look-ups on their way at a time
            pages = ()
            for n in gl.static_range(group, min(group + 4 * N, WHOLE), N):
                there = wanted & (start + n < length)
                page = gl.load(table + (start + n) // PAGE_SIZE, mask=there, other=-1)
                pages = pages + (page,)  # type: ignore[assignment]  # noqa: RUF005 (no `*` in Gluon)
            for n in gl.static_range(group, min(group + 4 * N, WHOLE), N):
                at = [pages[(n - group) // N], (start + n) % PAGE_SIZE, head, 0]
                tma_load(desc, at, barrier, tile.slice(n, N, 1), pred=wanted)


@gluon.jit
def fill(ring, n, desc, source, start, wanted, CONSUMERS: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Load the n-th tile of a ring, once its place is free."""
    stage = n % STAGES
    if wanted and n >= STAGES:
        named_barrier("sync", ring.freed + stage, 128 * CONSUMERS + 32)
    load_tile(desc, source, start, tile(ring, n), ring.full.index(stage), wanted, PAGE_SIZE)


@gluon.jit
def fill_part(
    ring, n, desc, source, start, low, high, times,
    CONSUMERS: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """`fill`, with zeros outside the keys low..high: a weight of 0 does not hide what is NaN.

    The producer waits for the load at the ring's last barrier, which it has used `times` times.
    """
    stage = n % STAGES
    if n >= STAGES:
        named_barrier("sync", ring.freed + stage, 128 * CONSUMERS + 32)
    tile = ring.tiles.index(stage)
    load_tile(desc, source, start, tile, ring.full.index(STAGES), True, PAGE_SIZE)
    mbarrier.wait(ring.full.index(STAGES), times & 1)
    low, high = low - start, high - start
    N: gl.constexpr = tile.shape[1]
    D: gl.constexpr = tile.shape[3]
    for first in gl.static_range(0, N, 8):
        if (first < low) | (first + 8 > high):
            row = here(first) + gl.arange(0, 8, gl.SliceLayout(1, ROWS))
            keep = gl.expand_dims((row >= low) & (row < high), 1)
            for column in gl.static_range(0, D, 64):  # few registers
                part = tile.reshape([N, D]).slice(first, 8).slice(column, 64, 1)
                x = part.load(ROWS)
                part.store(gl.where(keep, x, 0.0).to(x.dtype))
    fence_async_shared()
    mbarrier.arrive(ring.full.index(stage))


@gluon.jit
def filled(ring, n, wanted):
    """Wait until the n-th tile is there, if it is wanted."""
    mbarrier.wait(ring.full.index(place(n)), n // STAGES & 1, pred=wanted)


@gluon.jit
def free(ring, n, CONSUMERS: gl.constexpr):
    """A consumer has read the n-th tile."""
    named_barrier("arrive", ring.freed + place(n), 128 * CONSUMERS + 32)


@gluon.jit
def pass_by(which: gl.constexpr, keys, values, n, CONSUMERS: gl.constexpr):
    """A consumer frees the n-th tile without a look, when it is there: the place is one before."""
    filled(keys, n, True)
    my_turn(which, CONSUMERS)
    your_turn(which, CONSUMERS)
    free(keys, n, CONSUMERS)
    filled(values, n, True)
    free(values, n, CONSUMERS)
