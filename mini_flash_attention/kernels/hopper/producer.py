"""The producer warp of the Hopper kernel: it takes work tiles and issues all their loads."""

from typing import Any, NamedTuple

from ...rules import heads, mask, split, work
from ...rules.window import Window
from ..gluon import gl, gluon, mbarrier, tma_load
from . import pipeline, scheduler


class Loads(NamedTuple):
    """What the producer reads."""

    q_desc: Any
    k_desc: Any
    v_desc: Any
    block_table: Any
    stride_table: Any
    group: Any  # query heads, or packed groups of them, of a KV head
    left: Any  # of the window
    right: Any
    # Dynamic scheduling.
    counter: Any  # of work tiles taken
    total: Any  # work tiles
    splits: Any  # of each tile's keys


class Keys(NamedTuple):
    """The keys of a work tile, between two multiples of BLOCK_N."""

    begin: Any
    end: Any
    result_idx: Any  # `offset_q`; SPLIT: `partial_idx`, the number of the partial result


@gluon.jit
def load_queries(desc, shared, worked, tile, C: gl.constexpr):
    """Load each consumer's 64 rows of Q, once a buffer is free."""
    Q_BUFFERS: gl.constexpr = C.Q_BUFFERS
    q_buffers = shared.q_buffers
    for c in gl.static_range(C.CONSUMERS):
        index = pipeline.q_buffer_index(q_buffers, worked, c, C.CONSUMERS)
        full, q = pipeline.q_full(q_buffers, worked, c, C.CONSUMERS), q_buffers.tiles.index(index)
        mbarrier.wait(
            q_buffers.empty.index(index), ((worked * C.CONSUMERS + c) // Q_BUFFERS & 1) ^ 1
        )
        mbarrier.expect(full, desc.block_type.nbytes)
        first_token = (tile.offset_q + tile.m_row + 64 * c) // C.GROUP
        tma_load(desc, [0 if C.VARLEN else tile.b, first_token, tile.head * C.GROUP, 0], full, q)


@gluon.jit
def draw(loads):
    """How many work tiles have been taken, beside those that programs began with.

    The last draw of a launch sets the counter to zero for the next one.
    """
    drawn = gl.atomic_add(loads.counter, 1, sem="relaxed")
    # A program draws once for each tile it works on, so there is a last draw.
    if drawn == loads.total - 1:
        gl.atomic_xchg(loads.counter, 0, sem="relaxed")
    return drawn


@gluon.jit
def work_tile(number, loads, lengths, table, C: gl.constexpr):
    """The `number`-th work tile, the `Keys` to load for it, the sequence's first key and how many
    keys it has.
    """
    whole_idx = number  # of the tile before its keys are split
    if C.SPLIT:
        whole_idx = number // loads.splits
        table = work.Grid(table.batch, table.nheads, table.num_m_blocks, 1)
    tile = work.work_tile(whole_idx, lengths, table, 64 * C.CONSUMERS)
    seqlen_q = tile.num_rows // C.GROUP
    offset_k, length_k = work.key_span(tile.b, lengths, seqlen_q)
    window = Window(length_k - seqlen_q, loads.left, loads.right, None, length_k)
    seen = work.n_block_range(
        tile.m_row, tile.num_rows, window, 64 * C.CONSUMERS, C.BLOCK_N, C.GROUP
    )
    begin, end, result_idx = seen.begin, seen.end, tile.offset_q
    if C.SPLIT:  # queries are dense, their first is 0
        tiles = (end - begin) // C.BLOCK_N
        low, high = split.part(tiles, gl.cdiv(tiles, loads.splits), number % loads.splits)
        begin, end = begin + low * C.BLOCK_N, begin + high * C.BLOCK_N
        block = tile.m_row // (64 * C.CONSUMERS)
        result_idx = (
            (tile.b * table.nheads + tile.head) * table.num_m_blocks + block
        ) * loads.splits
        result_idx += number % loads.splits
    return tile, Keys(begin, end, result_idx), offset_k, length_k


@gluon.jit
def produce(loads, lengths, table, shared, C: gl.constexpr):
    """Take work tiles; load their queries, and keys and values from the last block to the first."""
    SKIP_MAX: gl.constexpr = C.SKIP_MAX
    sched = shared.sched
    # Key blocks in the work tiles before, how many of those had any (worked), and blocks of
    # values that were zeroed in part.
    work_idx, blocks_before, worked, zeroed = 0, 0, 0, 0
    number = gl.program_id(0)
    current, redo = scheduler.next_work_tile(sched, work_idx, number, loads.total, C)
    while current < loads.total:
        tile, keys, offset_k, length_k = work_tile(current, loads, lengths, table, C)
        n = (keys.end - keys.begin) // C.BLOCK_N
        fields = (
            tile.b, tile.head, keys.result_idx, tile.num_rows, tile.writable, tile.m_row, length_k,
            keys.begin, n, current,
        )  # fmt: skip
        scheduler.producer_commit(sched, work_idx, fields)
        block_table = loads.block_table
        if C.PAGE_SIZE:
            block_table += tile.b.to(gl.int64) * loads.stride_table
        batch = tile.b if lengths.cu_seqlens_k is None else 0
        head = heads.kv_head(tile.head, loads.group)
        source = pipeline.Source(block_table, batch, offset_k, length_k, head)
        low = 0  # before it no row sees a key
        if loads.left is not None:
            seqlen_q = tile.num_rows // C.GROUP
            window = Window(length_k - seqlen_q, loads.left, loads.right, None, length_k)
            low = mask.first_visible(tile.m_row // C.GROUP, window)
        if n > 0:
            load_queries(loads.q_desc, shared, worked, tile, C)
            worked += 1
        drawn, start = 0, keys.end
        for j in range(n + 1):  # keys are a block ahead of values
            start_v = start
            start -= C.BLOCK_N
            pipeline.load_stage(shared.k, blocks_before + j, loads.k_desc, source, start, j < n, C)
            # Take the next work tile late, for balance, but in time for its queries; a tile that is
            # done again takes none.
            if ((j + 1 == n) | (n == 0)) & (not redo if SKIP_MAX else True):
                drawn = draw(loads)
            m = gl.maximum(blocks_before + j - 1, 0)
            partly = (start_v + C.BLOCK_N > length_k) | (start_v < low)
            if C.ZERO_V_TAIL and (j > 0) & partly:
                pipeline.load_stage_zero_tail(
                    shared.v, m, loads.v_desc, source, start_v, low, zeroed, C
                )
                zeroed += 1
            else:
                pipeline.load_stage(shared.v, m, loads.v_desc, source, start_v, j > 0, C)
        blocks_before += n
        work_idx += 1
        drawn += gl.num_programs(0)
        number = gl.where(redo, number, drawn) if SKIP_MAX else drawn
        current, redo = scheduler.next_work_tile(sched, work_idx, number, loads.total, C)
    scheduler.producer_commit(sched, work_idx, (0, 0, 0, 0, 0, -1, 0, 0, 0, 0))  # no more work
