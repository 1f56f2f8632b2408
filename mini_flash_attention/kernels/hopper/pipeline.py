"""Stages of K, V and Q in shared memory, the barriers that guard them, and the order of issue."""

from typing import Any, NamedTuple

from ...rules import paging
from ..gluon import fence_async_shared, gl, gluon, mbarrier, tma_load

STAGES = gl.constexpr(2)  # of a pipeline
# The hardware has 16 named barriers. Triton takes the first few itself.
K_EMPTY, V_EMPTY = gl.constexpr(8), gl.constexpr(10)  # and the next: a stage is empty
WARP_SCHEDULER_BARRIER = gl.constexpr(12)  # and those after: a consumer may issue
ONE_WARP = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
FOUR_WARPS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
FOUR_WARPS_2D = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
ONE_WARP_2D = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))


@gluon.constexpr_function
def accumulator(columns):
    """Where a consumer's four warps hold the 64 rows of a product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


class QBuffers(NamedTuple):
    """Buffers of 64 rows of Q, which consumers take in turn.

    full: two mbarriers for each consumer (`q_full`), which the loads complete. empty: one mbarrier
    for each buffer, at which the consumer that has read it arrives.
    """

    tiles: Any
    full: Any
    empty: Any


@gluon.jit
def q_buffer_index(q_buffers, worked, which, CONSUMERS: gl.constexpr):
    """The buffer of a consumer's queries: consumers take them in turn."""
    return (worked * CONSUMERS + which) % q_buffers.tiles.shape[0]


@gluon.jit
def q_full(q_buffers, worked, which, CONSUMERS: gl.constexpr):
    """The barrier that says that a consumer's queries are there. Each consumer has two of its own:
    at a shared one, the first to wait could take the other's phase for its own (NOTES 111).
    """
    return q_buffers.full.index(worked % 2 * CONSUMERS + which)


class Pipeline(NamedTuple):
    """A ring of stages: the n-th block lies in stage n % STAGES.

    full: mbarriers, which the loads complete. empty: the number of the first of the named barriers
    at which consumers arrive; for an mbarrier the four warps would have to synchronise first.
    """

    tiles: Any
    full: Any
    empty: Any


class Shared(NamedTuple):
    """What producer and consumers share."""

    q_buffers: Any  # `QBuffers`
    k: Any  # `Pipeline`
    v: Any  # `Pipeline`
    sched: Any  # `scheduler.TileScheduler`


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
def warp_scheduler_barrier_sync(which: gl.constexpr, CONSUMERS: gl.constexpr):
    """Where there are three, wait until the consumer before has issued its products."""
    if CONSUMERS == 3:
        named_barrier("sync", WARP_SCHEDULER_BARRIER + which, 256)


@gluon.jit
def warp_scheduler_barrier_arrive(which: gl.constexpr, CONSUMERS: gl.constexpr):
    if CONSUMERS == 3:
        named_barrier("arrive", WARP_SCHEDULER_BARRIER + (which + 1) % CONSUMERS, 256)


@gluon.jit
def no_hoist(x):
    """The integer x; what depends on it is not hoisted, which would take registers all along."""
    x = gl.to_tensor(x)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def stage_of(n):
    """n % STAGES, cheaper: products wait for it."""
    return n & STAGES - 1


@gluon.jit
def stage_tile(pipe, n):
    return pipe.tiles.index(stage_of(n))


class Source(NamedTuple):
    """Where the keys, or values, of a sequence's KV head lie, as descriptors see them."""

    block_table: Any  # the sequence's row; None unless paged
    batch: Any
    offset_k: Any  # row of the first key
    seqlen_k: Any
    head: Any


@gluon.jit
def load_tile(desc, source, start, tile, barrier, wanted, C: gl.constexpr):
    """Load the keys, or values, of a sequence from its `start`-th, in pieces of at most a page."""
    N: gl.constexpr = desc.block_shape[1]
    PAGE_SIZE: gl.constexpr = C.PAGE_SIZE
    WHOLE: gl.constexpr = tile.shape[1]
    mbarrier.expect(barrier, WHOLE // N * desc.block_type.nbytes, pred=wanted)
    if PAGE_SIZE == 0:
        at = [source.batch, source.offset_k + start, source.head, 0]
        tma_load(desc, at, barrier, tile, pred=wanted)
    else:  # invalid pages read as zeros, like everything outside the descriptor
        for group in gl.static_range(0, WHOLE, 4 * N):  # four look-ups in flight
            pages = ()
            for n in gl.static_range(group, min(group + 4 * N, WHOLE), N):
                entry = source.block_table + (start + n) // PAGE_SIZE
                page = paging.page_of(entry, wanted & (start + n < source.seqlen_k))
                pages = pages + (page,)  # type: ignore[assignment]  # noqa: RUF005 (no `*` in Gluon)
            for n in gl.static_range(group, min(group + 4 * N, WHOLE), N):
                at = [pages[(n - group) // N], (start + n) % PAGE_SIZE, source.head, 0]
                tma_load(desc, at, barrier, tile.slice(n, N, 1), pred=wanted)


@gluon.jit
def load_stage(pipe, n, desc, source, start, wanted, C: gl.constexpr):
    """Acquire the stage of the n-th block, and load it."""
    stage = n % STAGES
    if wanted and n >= STAGES:
        named_barrier("sync", pipe.empty + stage, 128 * C.CONSUMERS + 32)
    load_tile(desc, source, start, stage_tile(pipe, n), pipe.full.index(stage), wanted, C)


@gluon.jit
def load_stage_zero_tail(pipe, n, desc, source, start, low, times, C: gl.constexpr):
    """`load_stage` for V, with zeros outside the keys low..seqlen_k: 0 times NaN is NaN.

    The producer waits for the load at the pipeline's last barrier, which it has used `times` times.
    """
    stage = n % STAGES
    if n >= STAGES:
        named_barrier("sync", pipe.empty + stage, 128 * C.CONSUMERS + 32)
    tile = pipe.tiles.index(stage)
    load_tile(desc, source, start, tile, pipe.full.index(STAGES), True, C)
    mbarrier.wait(pipe.full.index(STAGES), times & 1)
    low, high = low - start, source.seqlen_k - start
    N: gl.constexpr = tile.shape[1]
    D: gl.constexpr = tile.shape[3]
    for first_row in gl.static_range(0, N, 8):
        if (first_row < low) | (first_row + 8 > high):
            row = no_hoist(first_row) + gl.arange(0, 8, gl.SliceLayout(1, ONE_WARP_2D))
            keep = gl.expand_dims((row >= low) & (row < high), 1)
            for column in gl.static_range(0, D, 64):  # few registers
                piece = tile.reshape([N, D]).slice(first_row, 8).slice(column, 64, 1)
                x = piece.load(ONE_WARP_2D)
                piece.store(gl.where(keep, x, 0.0).to(x.dtype))
    fence_async_shared()
    mbarrier.arrive(pipe.full.index(stage))


@gluon.jit
def consumer_wait(pipe, n, wanted):
    """Wait until the n-th block is there, if it is wanted."""
    mbarrier.wait(pipe.full.index(stage_of(n)), n // STAGES & 1, pred=wanted)


@gluon.jit
def consumer_release(pipe, n, CONSUMERS: gl.constexpr):
    """A consumer has read the n-th block."""
    named_barrier("arrive", pipe.empty + stage_of(n), 128 * CONSUMERS + 32)


@gluon.jit
def skip_block(which: gl.constexpr, keys, values, n, CONSUMERS: gl.constexpr):
    """Release the n-th block unread, once it is there: before that its stage holds another."""
    consumer_wait(keys, n, True)
    warp_scheduler_barrier_sync(which, CONSUMERS)
    warp_scheduler_barrier_arrive(which, CONSUMERS)
    consumer_release(keys, n, CONSUMERS)
    consumer_wait(values, n, True)
    consumer_release(values, n, CONSUMERS)
