"""The producer warp of the Hopper kernel: it draws tiles of work and loads all that they need."""

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
    # Which tile of work is next.
    counter: Any
    total: Any
    splits: Any  # parts of each tile's keys


class Part(NamedTuple):
    """The keys of a tile of work, from a multiple of BLOCK_N to another."""

    begin: Any
    end: Any
    place: Any  # where the result of a part lies; else the sequence's first row


@gluon.jit
def load_queries(desc, shared, worked, mine, C: gl.constexpr, PACKED: gl.constexpr):
    """Load the consumers' rows of Q, each into a place that is free."""
    Q_TILES: gl.constexpr = C.Q_TILES
    for c in gl.static_range(C.CONSUMERS):
        slot = pipeline.q_place(shared.q, worked, c, C.CONSUMERS)
        full, q = pipeline.arrival(shared.q, worked, c, C.CONSUMERS), shared.q.tiles.index(slot)
        mbarrier.wait(shared.q.free.index(slot), ((worked * C.CONSUMERS + c) // Q_TILES & 1) ^ 1)
        mbarrier.expect(full, desc.block_type.nbytes)
        first = (mine.first_q + mine.first + 64 * c) // C.GROUP
        tma_load(desc, [0 if PACKED else mine.b, first, mine.head * C.GROUP, 0], full, q)


@gluon.jit
def draw(loads):
    """The number that comes next, less those that programs began with. The last draw resets."""
    drawn = gl.atomic_add(loads.counter, 1, sem="relaxed")
    # A program draws once for each tile it works on, so there is a last draw.
    if drawn == loads.total - 1:
        gl.atomic_xchg(loads.counter, 0, sem="relaxed")
    return drawn


@gluon.jit
def tile_of_work(number, loads, lengths, table, C: gl.constexpr):
    """The `number`-th tile of work, the `Part` of keys to load, the sequence's first key and how
    many it has.
    """
    tile = number
    if C.SPLIT:
        tile = number // loads.splits
        table = work.Grid(table.batch, table.nheads, table.tiles, 1)
    mine = work.queries(tile, lengths, table, 64 * C.CONSUMERS)
    seqlen_q = mine.rows_q // C.GROUP
    first_k, length_k = work.keys(mine.b, lengths, seqlen_q)
    window = Window(length_k - seqlen_q, loads.left, loads.right, None, length_k)
    seen = work.key_tiles(mine.first, mine.rows_q, window, 64 * C.CONSUMERS, C.BLOCK_N, C.GROUP)
    begin, end, place = seen.begin, seen.end, mine.first_q
    if C.SPLIT:  # queries are dense, their first is 0
        tiles = (end - begin) // C.BLOCK_N
        low, high = split.part(tiles, gl.cdiv(tiles, loads.splits), number % loads.splits)
        begin, end = begin + low * C.BLOCK_N, begin + high * C.BLOCK_N
        block = mine.first // (64 * C.CONSUMERS)
        place = ((mine.b * table.nheads + mine.head) * table.tiles + block) * loads.splits
        place += number % loads.splits
    return mine, Part(begin, end, place), first_k, length_k


@gluon.jit
def produce(loads, lengths, table, shared, C: gl.constexpr):
    """Draw tiles of work; load their queries, and keys and values from the last to the first."""
    PACKED: gl.constexpr = lengths.cu_seqlens_q is not None
    FAST: gl.constexpr = C.FAST
    turns = shared.turns
    # Tiles of keys in the turns before, turns that had any, and tiles of values that are someone
    # else's, or nobody's, in part.
    turn, done, worked, cleared = 0, 0, 0, 0
    number = gl.program_id(0)
    current, again = scheduler.take(turns, turn, number, loads.total, C)
    while current < loads.total:
        mine, part, first_k, length_k = tile_of_work(current, loads, lengths, table, C)
        n = (part.end - part.begin) // C.BLOCK_N
        words = (
            mine.b, mine.head, part.place, mine.rows_q, mine.writable, mine.first, length_k,
            part.begin, n, current,
        )  # fmt: skip
        scheduler.tell(turns, turn, words)
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
            load_queries(loads.q_desc, shared, worked, mine, C, PACKED)
            worked += 1
        drawn, start = 0, part.end
        for j in range(n + 1):  # keys are a tile ahead of values
            start_v = start
            start -= C.BLOCK_N
            pipeline.fill(shared.k, done + j, loads.k_desc, source, start, j < n, C)
            # Late, which balances; in time for the next queries. For a tile again there was one.
            if ((j + 1 == n) | (n == 0)) & (not again if FAST else True):
                drawn = draw(loads)
            m = gl.maximum(done + j - 1, 0)
            partly = (start_v + C.BLOCK_N > length_k) | (start_v < low)
            if C.CLEAR and (j > 0) & partly:
                pipeline.fill_part(shared.v, m, loads.v_desc, source, start_v, low, cleared, C)
                cleared += 1
            else:
                pipeline.fill(shared.v, m, loads.v_desc, source, start_v, j > 0, C)
        done += n
        turn += 1
        drawn += gl.num_programs(0)
        number = gl.where(again, number, drawn) if FAST else drawn
        current, again = scheduler.take(turns, turn, number, loads.total, C)
    scheduler.tell(turns, turn, (0, 0, 0, 0, 0, -1, 0, 0, 0, 0))  # no more work
