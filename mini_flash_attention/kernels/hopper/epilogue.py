"""The epilogue of a Hopper consumer: 64 rows of O by TMA, or by stores where a sequence ends."""

from typing import Any, NamedTuple

import triton.language as tl

from ...rules import heads
from ..gluon import fence_async_shared, gl, gluon, tma_store
from . import pipeline, scheduler


class Stores(NamedTuple):
    """What the consumers write."""

    o_desc: Any
    out: Any  # or partials
    lse: Any
    stride_o_b: Any
    stride_o_t: Any
    stride_o_h: Any
    stride_lse_b: Any
    stride_lse_h: Any
    # Of partials.
    total: Any
    partial_rows: Any


class Tile(NamedTuple):
    """What the epilogue has to know of a work tile."""

    num_blocks: Any  # of keys
    consumer_row: Any  # the consumer's first row in the sequence
    num_rows: Any
    b: Any
    head: Any
    result_idx: Any  # `offset_q`; SPLIT: `partial_idx`
    out_row: Any  # the consumer's first row in q; in the sequence, if it is a split


@gluon.jit
def tile_of(sched, work_idx, which: gl.constexpr, C: gl.constexpr):
    """Read here, because the fields would take registers all along the mainloop."""
    num_blocks = scheduler.load_field(sched, work_idx, scheduler.NUM_BLOCKS)
    consumer_row = scheduler.load_field(sched, work_idx, scheduler.M_ROW) + 64 * which
    num_rows = scheduler.load_field(sched, work_idx, scheduler.NUM_ROWS)
    b = scheduler.load_field(sched, work_idx, scheduler.BATCH)
    head = scheduler.load_field(sched, work_idx, scheduler.HEAD)
    result_idx = scheduler.load_field(sched, work_idx, scheduler.RESULT_IDX)
    out_row = consumer_row if C.SPLIT else result_idx + consumer_row
    return Tile(num_blocks, consumer_row, num_rows, b, head, result_idx, out_row)


@gluon.constexpr_function
def quads(columns):
    """As an accumulator, but of 16 columns a thread has four that lie side by side."""
    registers = [[0, 1], [0, 2], [8, 0], *([0, 1 << n] for n in range(4, columns.bit_length() - 1))]
    lanes = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def store_rows(row_ptrs, o, wanted, HEAD_DIM: gl.constexpr):
    """Write o [64, D] to the wanted ones of 64 rows; where they are long, 8 bytes at a time."""
    o = o.to(row_ptrs.dtype.element_ty)
    if o.shape[1] > 128 and o.dtype != gl.float32:
        o = gl.convert_layout(o, quads(o.shape[1]))
    layout: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    row_ptrs = gl.expand_dims(gl.convert_layout(row_ptrs, layout, assert_trivial=True), 1)
    wanted = gl.expand_dims(gl.convert_layout(wanted, layout, assert_trivial=True), 1)
    d = gl.expand_dims(gl.arange(0, o.shape[1], gl.SliceLayout(0, o.type.layout)), 0)
    gl.store(row_ptrs + d, o, mask=wanted & (d < HEAD_DIM))


@gluon.jit
def fits_tma(tile, C: gl.constexpr):
    """Whether TMA may write all 64 rows. It stops at a tensor's end, not at a sequence's, and a
    work tile without keys has no buffer of queries to write from.
    """
    TMA_EPILOGUE: gl.constexpr = C.TMA_EPILOGUE and not C.SPLIT
    return (
        TMA_EPILOGUE
        & (tile.num_blocks > 0)
        & ((not C.VARLEN) | (tile.consumer_row + 64 <= tile.num_rows))
    )


@gluon.jit
def store_tma(o, shared, worked, which: gl.constexpr, tile, stores, C: gl.constexpr):
    """Write 64 rows by TMA, from the shared memory of their queries, which have been read."""
    index = pipeline.q_buffer_index(shared.q_buffers, worked, which, C.CONSUMERS)
    buffer = shared.q_buffers.tiles.index(index)
    buffer.reshape([64, C.D]).store(o.to(stores.o_desc.dtype))
    fence_async_shared()
    b = 0 if C.VARLEN else tile.b
    tma_store(stores.o_desc, [b, tile.out_row // C.GROUP, tile.head * C.GROUP, 0], buffer)


@gluon.jit
def store(o, m, l, lse_tile, which: gl.constexpr, done, redo, tile, rows, stores, C: gl.constexpr):
    """Write 64 rows, unless TMA writes them (`done`), and their LSE; or partials, which
    `combine.py` merges. Write nothing if the work tile has to be done again (`redo`).
    """
    HEAD_DIM: gl.constexpr = C.HEAD_DIM
    GROUP: gl.constexpr = C.GROUP
    b, head = tile.b.to(gl.int64), tile.head.to(gl.int64) * GROUP
    row = gl.arange(0, 64, gl.SliceLayout(1, pipeline.accumulator(C.D)))
    writable = (
        row
        < scheduler.load_field(rows.sched, rows.work_idx, scheduler.WRITABLE) - tile.consumer_row
    )
    if C.SKIP_MAX:
        writable &= not redo
    t, member = heads.unpack(tile.out_row + row, GROUP)
    if not done:
        if C.SPLIT:
            base = stores.out
            at = tile.result_idx.to(gl.int64) * stores.partial_rows + 64 * which + row
            all_rows = pipeline.no_hoist(stores.total).to(gl.int64) * stores.partial_rows
            gl.store(base + all_rows * HEAD_DIM + at, m, mask=writable)
            gl.store(base + all_rows * (HEAD_DIM + 1) + at, l, mask=writable)
            at *= HEAD_DIM
        else:
            base = stores.out + b * pipeline.no_hoist(stores.stride_o_b)
            base += head * pipeline.no_hoist(stores.stride_o_h)
            at = t.to(gl.int64) * pipeline.no_hoist(stores.stride_o_t)
            if GROUP > 1:
                at += member.to(gl.int64) * pipeline.no_hoist(stores.stride_o_h)
            in_use = row < tile.num_rows - tile.consumer_row
            o = gl.where(gl.expand_dims(in_use, 1), o, 0.0)
            lse_tile = gl.where(in_use, lse_tile, float("-inf"))
        store_rows(tl.multiple_of(base + at, 16), o, writable, HEAD_DIM)  # bytes, as TMA wants too
    if stores.lse is not None:
        base = stores.lse + b * pipeline.no_hoist(stores.stride_lse_b)
        base += head * pipeline.no_hoist(stores.stride_lse_h)
        at = t + member * pipeline.no_hoist(stores.stride_lse_h) if GROUP > 1 else t
        gl.store(base + at, lse_tile, mask=writable)
