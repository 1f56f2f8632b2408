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
    row_offset: Any  # of the sequence in q; SPLIT: the number of the partial result


@gluon.jit
def load_queries(desc, shared, worked, mine, C: gl.constexpr):
    """Load each consumer's 64 rows of Q, once a buffer is free."""
    Q_TILES: gl.constexpr = C.Q_TILES
    for c in gl.static_range(C.CONSUMERS):
        slot = pipeline.q_stage(shared.q, worked, c, C.CONSUMERS)
        full, q = pipeline.q_full(shared.q, worked, c, C.CONSUMERS), shared.q.tiles.index(slot)
        mbarrier.wait(shared.q.empty.index(slot), ((worked * C.CONSUMERS + c) // Q_TILES & 1) ^ 1)
        mbarrier.expect(full, desc.block_type.nbytes)
        first = (mine.first_q + mine.first + 64 * c) // C.GROUP
        tma_load(desc, [0 if C.VARLEN else mine.b, first, mine.head * C.GROUP, 0], full, q)


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
    tile = number
    if C.SPLIT:
        tile = number // loads.splits
        table = work.Grid(table.batch, table.nheads, table.num_m_blocks, 1)
    mine = work.work_tile(tile, lengths, table, 64 * C.CONSUMERS)
    seqlen_q = mine.rows_q // C.GROUP
    first_k, length_k = work.key_span(mine.b, lengths, seqlen_q)
    window = Window(length_k - seqlen_q, loads.left, loads.right, None, length_k)
    seen = work.n_block_range(mine.first, mine.rows_q, window, 64 * C.CONSUMERS, C.BLOCK_N, C.GROUP)
    begin, end, row_offset = seen.begin, seen.end, mine.first_q
    if C.SPLIT:  # queries are dense, their first is 0
        tiles = (end - begin) // C.BLOCK_N
        low, high = split.part(tiles, gl.cdiv(tiles, loads.splits), number % loads.splits)
        begin, end = begin + low * C.BLOCK_N, begin + high * C.BLOCK_N
        block = mine.first // (64 * C.CONSUMERS)
        row_offset = (
            (mine.b * table.nheads + mine.head) * table.num_m_blocks + block
        ) * loads.splits
        row_offset += number % loads.splits
    return mine, Keys(begin, end, row_offset), first_k, length_k


@gluon.jit
def produce(loads, lengths, table, shared, C: gl.constexpr):
    """Take work tiles; load their queries, and keys and values from the last block to the first."""
    SKIP_MAX: gl.constexpr = C.SKIP_MAX
    sched = shared.sched
    # Key blocks in the work tiles before (done), how many of those had any (worked), and blocks of
    # values that were zeroed in part.
    work_idx, done, worked, zeroed = 0, 0, 0, 0
    number = gl.program_id(0)
    current, redo = scheduler.next_work_tile(sched, work_idx, number, loads.total, C)
    while current < loads.total:
        mine, keys, first_k, length_k = work_tile(current, loads, lengths, table, C)
        n = (keys.end - keys.begin) // C.BLOCK_N
        fields = (
            mine.b, mine.head, keys.row_offset, mine.rows_q, mine.writable, mine.first, length_k,
            keys.begin, n, current,
        )  # fmt: skip
        scheduler.producer_commit(sched, work_idx, fields)
        block_table = loads.block_table
        if C.PAGE_SIZE:
            block_table += mine.b.to(gl.int64) * loads.stride_table
        batch = mine.b if lengths.cu_seqlens_k is None else 0
        head = heads.kv_head(mine.head, loads.group)
        source = pipeline.Source(block_table, batch, first_k, length_k, head)
        low = 0  # before it no row sees a key
        if loads.left is not None:
            seqlen_q = mine.rows_q // C.GROUP
            window = Window(length_k - seqlen_q, loads.left, loads.right, None, length_k)
            low = mask.first_visible(mine.first // C.GROUP, window)
        if n > 0:
            load_queries(loads.q_desc, shared, worked, mine, C)
            worked += 1
        drawn, start = 0, keys.end
        for j in range(n + 1):  # keys are a block ahead of values
            start_v = start
            start -= C.BLOCK_N
            pipeline.load_stage(shared.k, done + j, loads.k_desc, source, start, j < n, C)
            # Take the next work tile late, for balance, but in time for its queries; a tile that is
            # done again takes none.
            if ((j + 1 == n) | (n == 0)) & (not redo if SKIP_MAX else True):
                drawn = draw(loads)
            m = gl.maximum(done + j - 1, 0)
            partly = (start_v + C.BLOCK_N > length_k) | (start_v < low)
            if C.ZERO_V_TAIL and (j > 0) & partly:
                pipeline.load_stage_zero_tail(
                    shared.v, m, loads.v_desc, source, start_v, low, zeroed, C
                )
                zeroed += 1
            else:
                pipeline.load_stage(shared.v, m, loads.v_desc, source, start_v, j > 0, C)
        done += n
        work_idx += 1
        drawn += gl.num_programs(0)
        number = gl.where(redo, number, drawn) if SKIP_MAX else drawn
        current, redo = scheduler.next_work_tile(sched, work_idx, number, loads.total, C)
    scheduler.producer_commit(sched, work_idx, (0, 0, 0, 0, 0, -1, 0, 0, 0, 0))  # no more work
