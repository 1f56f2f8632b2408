"""The tile scheduler of the Hopper kernel: the producer broadcasts work tiles to the consumers.

The producer writes what the consumers need to know of a work tile to shared memory, in one of two
sets of fields. A consumer whose sums overflow (`softmax.sums_overflow`) asks for the tile again by
a REDO field, and gets it two work tiles later, or next if there is no other work.
"""

from typing import Any, NamedTuple

from ..gluon import gl, gluon, mbarrier
from .pipeline import FOUR_WARPS, ONE_WARP


class TileScheduler(NamedTuple):
    """Two sets of NUM_FIELDS integers, with the barriers that say full and empty."""

    fields: Any
    full: Any
    empty: Any


# The fields of a set; from REDO on one for each consumer, which asks for the tile again there.
(
    BATCH, HEAD, RESULT_IDX, NUM_ROWS, WRITABLE, M_ROW, LENGTH_K, BEGIN, NUM_BLOCKS, TILE_IDX,
    REDO,
) = map(gl.constexpr, range(11))  # fmt: skip
NUM_FIELDS = gl.constexpr(REDO.value + 3)


@gluon.jit
def store_field(sched, work_idx, n, value, LAYOUT: gl.constexpr):
    sched.fields.index(work_idx % 2 * NUM_FIELDS + n).store(
        gl.full([1], gl.to_tensor(value), gl.int32, LAYOUT)
    )


@gluon.jit
def load_field(sched, work_idx, n, LAYOUT: gl.constexpr = FOUR_WARPS):
    """A field as a scalar: the maximum of one element, over axis 0."""
    return gl.max(sched.fields.index(work_idx % 2 * NUM_FIELDS + n).load(LAYOUT), 0)


@gluon.jit
def producer_acquire(sched, work_idx, C: gl.constexpr):
    """Wait until the consumers have released the set; whether one asks for its tile again."""
    mbarrier.wait(sched.empty.index(work_idx % 2), (work_idx // 2 & 1) ^ 1)
    redo = work_idx < 0  # False, as a tensor
    for c in gl.static_range(C.CONSUMERS if C.SKIP_MAX else 0):
        redo |= load_field(sched, work_idx, REDO + c, ONE_WARP) > 0
    return redo


@gluon.jit
def next_work_tile(sched, work_idx, number, total, C: gl.constexpr):
    """(the next work tile, whether it is one to be done again instead of the `number`-th).

    Only C.SKIP_MAX does tiles again. When no work is left, the other set's tile may be next.
    """
    redo = producer_acquire(sched, work_idx, C)
    tile_idx = number
    if C.SKIP_MAX:
        tile_idx = gl.where(redo, load_field(sched, work_idx, TILE_IDX, ONE_WARP), number)
    if C.SKIP_MAX and tile_idx >= total:
        redo = producer_acquire(sched, work_idx + 1, C)
        tile_idx = gl.where(redo, load_field(sched, work_idx + 1, TILE_IDX, ONE_WARP), number)
        for c in gl.static_range(C.CONSUMERS):
            asked = load_field(sched, work_idx + 1, REDO + c, ONE_WARP)
            store_field(sched, work_idx, REDO + c, asked, ONE_WARP)
            store_field(sched, work_idx + 1, REDO + c, 0, ONE_WARP)
    return tile_idx, redo


@gluon.jit
def producer_commit(sched, work_idx, fields):
    """Write the fields of a set and tell the consumers; after `next_work_tile`."""
    for n in gl.static_range(REDO):
        store_field(sched, work_idx, n, fields[n], ONE_WARP)
    mbarrier.arrive(sched.full.index(work_idx % 2))


@gluon.jit
def consumer_wait(sched, work_idx):
    """Wait for the fields of a set, which may be read until `consumer_release`."""
    mbarrier.wait(sched.full.index(work_idx % 2), work_idx // 2 & 1)


@gluon.jit
def consumer_release(sched, work_idx):
    mbarrier.arrive(sched.empty.index(work_idx % 2))
