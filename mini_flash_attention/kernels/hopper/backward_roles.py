"""The warp roles of the Hopper backward kernel: producer, consumers, and the writer of dQ."""

from typing import Any, NamedTuple

from ...rules import mask
from ...rules.window import Window
from ..gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip
from . import backward_pieces as pieces
from . import backward_work as jobs
from .pipeline import ONE_WARP, accumulator, named_barrier, no_hoist
from .softmax import accumulator_view, convert_p, from_view

STAGES = gl.constexpr(2)  # of Q and of dO
# Named barriers; with these roles Triton takes 0 to 2 itself.
DS_FULL = gl.constexpr(5)  # and the next: a consumer's dS is in shared memory
BOTH_CONSUMERS = gl.constexpr(7)  # consumer 1 begins; both have read K
Q_EMPTY, DO_EMPTY = gl.constexpr(8), gl.constexpr(10)  # and the next: a stage is empty
DQ_FULL, DQ_EMPTY = gl.constexpr(12), gl.constexpr(14)  # and the next: a consumer's dQ
CONSUMER_THREADS = gl.constexpr(2 * 128)  # of both consumers
READERS = gl.constexpr(2 * 128 + 32)  # threads of both and the producer
WRITERS = gl.constexpr(128 + 32)  # of a consumer and the writer
POLLS = gl.constexpr(1 << 20)  # about a second


class Descriptors(NamedTuple):
    """What TMA reads and writes."""

    q: Any
    k: Any
    v: Any
    do: Any
    dq: Any
    dk: Any
    dv: Any


class Statistics(NamedTuple):
    """L and delta, one number a query."""

    lse: Any
    delta: Any


class Tiles(NamedTuple):
    """Shared memory."""

    q: Any  # of each stage
    do: Any
    lse: Any
    delta: Any
    k: Any  # of each consumer
    v: Any
    ds: Any  # of each stage and consumer: dSᵀ
    dq: Any  # of each consumer


class Barriers(NamedTuple):
    """mbarriers that loads complete, those of q and do together with the producer."""

    q: Any
    do: Any
    kv: Any


@gluon.jit
def load_keys(desc, job, barrier, tiles, COLUMNS: gl.constexpr, C: gl.constexpr):
    """Load the program's keys, or values."""
    mbarrier.expect(barrier, tiles.shape[0] * desc.block_type.nbytes)
    for which in gl.static_range(C.BLOCK_N // 64):
        row = job.n_row + 64 * which
        pieces.load(desc, job.keys, row, job.head_k, barrier, tiles, which, COLUMNS, C.VARLEN)


@gluon.jit
def load_queries(
    desc, job, row, head, barriers, tiles, stage, COLUMNS: gl.constexpr, C: gl.constexpr
):
    """Load a block of Q, or dO."""
    full = barriers.index(stage)
    mbarrier.expect(full, pieces.num_pieces(COLUMNS) * desc.block_type.nbytes)
    pieces.load(desc, job.queries, row, head, full, tiles, stage, COLUMNS, C.VARLEN)


@gluon.jit
def produce(lengths, table, left, right, descs, statistics, tiles, full, C: gl.constexpr):
    """Load K and V, and the queries' blocks in turn."""
    job = jobs.work_of(gl.program_id(0), lengths, table, left, right, C)
    M: gl.constexpr = C.BLOCK_M
    if jobs.num_blocks(job, C) > 0:
        load_keys(descs.k, job, full.kv.index(0), tiles.k, C.D, C)
        load_keys(descs.v, job, full.kv.index(1), tiles.v, C.D_V, C)
    for n in range(jobs.num_blocks(job, C)):
        stage = n % STAGES
        member, row = jobs.nth_block(n, job, C)
        head = job.head_k * C.GROUP + member
        # TMA wants these at multiples of 16 bytes, which packed sequences are not.
        i = row + gl.arange(0, M, ONE_WARP)
        at = job.first_row + member.to(gl.int64) * job.head_stride + i
        lse = gl.load(statistics.lse + at, mask=i < job.queries.count, other=0.0)
        delta = gl.load(statistics.delta + at, mask=i < job.queries.count, other=0.0)
        if n >= STAGES:
            named_barrier("sync", DO_EMPTY + stage, READERS)
        load_queries(descs.do, job, row, head, full.do, tiles.do, stage, C.D_V, C)
        if n >= STAGES:
            named_barrier("sync", Q_EMPTY + stage, READERS)
        load_queries(descs.q, job, row, head, full.q, tiles.q, stage, C.D, C)
        tiles.lse.index(stage).store(lse)
        mbarrier.arrive(full.q.index(stage))
        tiles.delta.index(stage).store(-delta)
        mbarrier.arrive(full.do.index(stage))


@gluon.jit
def take_turn(counter, turn, patience):
    """Wait until `turn` programs have been here. Not for ever, as lengths may be junk: at most
    `patience` polls; returns how many the next wait has, none where this one was in vain.
    """
    come, polls = gl.load(counter, volatile=True), 0
    while (come < turn) & (polls < patience):
        come = gl.load(counter, volatile=True)
        polls += 1
    return gl.where(come < turn, 0, patience)


@gluon.jit
def end_turn(counter):
    """Say that this program's additions are done, once they are."""
    PTX: gl.constexpr = "cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(PTX, "=r,r", [gl.to_tensor(0)], gl.int32, False, 1)
    gl.atomic_add(counter, 1, sem="release")


@gluon.jit
def write(lengths, table, left, right, descs, tiles, turns, C: gl.constexpr):
    """Add the consumers' blocks of dQ to the fp32 copy. turns: a counter for each of its rows, of
    which the first of a block is used. Consumer 1 is done with a block before consumer 0.
    """
    job = jobs.work_of(gl.program_id(0), lengths, table, left, right, C)
    patience = gl.to_tensor(POLLS)
    for n in range(jobs.num_blocks(job, C)):
        member, row = jobs.nth_block(n, job, C)
        counter = turns
        if C.ORDERED:
            counter += job.first_row + member.to(gl.int64) * job.head_stride + row
            patience = take_turn(counter, jobs.turn_of(job, row, left, right, C), patience)
        for which in gl.static_range(1, -1, -1):
            named_barrier("sync", DQ_FULL + which, WRITERS)
            jobs.add_dq(descs.dq, job, member, row, which, tiles.dq.index(which), C)
        for which in gl.static_range(1, -1, -1):
            tma.store_wait(which)  # all but the last `which` of the two have been read
            named_barrier("arrive", DQ_EMPTY + which, WRITERS)
        if C.ORDERED:
            end_turn(counter)


@gluon.jit
def product(a, i, b, j, row, COLUMNS: gl.constexpr, M: gl.constexpr, INIT_ACC: gl.constexpr = True):
    """Begin a bᵀ + row [64, M] for the i-th tile of a and the j-th of b. row: M numbers in shared
    memory, at which the accumulators begin if INIT_ACC; otherwise `add_row` adds them afterwards.
    """
    S: gl.constexpr = accumulator(M)
    start = gl.zeros([64, M], gl.float32, S)
    if INIT_ACC:
        start = gl.broadcast(gl.expand_dims(row.load(gl.SliceLayout(0, S)), 0), start)[0]
    return pieces.multiply_transposed(a, i, b, j, start, COLUMNS, 64, M, INIT_ACC)


@gluon.jit
def add_row(x, row, factor, M: gl.constexpr, INIT_ACC: gl.constexpr):
    """x, a `product` times `factor`, plus its `row` times `factor` unless INIT_ACC."""
    if not INIT_ACC:
        x += gl.expand_dims(row.load(gl.SliceLayout(0, accumulator(M))), 0) * factor
    return x


@gluon.jit
def exp2_of_scores(s, lse, scale_log2, M: gl.constexpr, INIT_ACC: gl.constexpr = True):
    """P of a `product` and its LSE. Saturated to at most 1: where scores are huge, S - L may be far
    above 0. NaN becomes 0; delta is NaN in such a row, and with it dQ and dK, but not dV.
    """
    p = gl.exp2(add_row(s * scale_log2, lse, scale_log2, M, INIT_ACC))
    PTX: gl.constexpr = "cvt.ftz.sat.f32.f32 $0, $1;"
    return gl.inline_asm_elementwise(PTX, "=f,f", [p], gl.float32, True, 1)


@gluon.jit
def hide(x, job, which: gl.constexpr, row, left, right, M: gl.constexpr):
    """x [64, M], of a consumer's keys, where the M queries from `row` see them; 0 elsewhere.

    0 for keys past the end too.
    """
    view, j, shift, i = accumulator_view(x, no_hoist(row), M)
    j = job.n_row + 64 * which + j
    length_q, length_k = job.queries.count, job.keys.count
    seen = gl.where(j < length_k, length_q, 0) - shift
    from_keys = Window(length_q - length_k, right, left, None, seen)
    return from_view(gl.where(mask.is_visible(j - shift, i, from_keys), view, 0.0), x)


@gluon.jit
def issue_dq(which: gl.constexpr, stage, tiles, C: gl.constexpr):
    """Begin a consumer's half of dQ = dS K for a stage's dS: 64 rows, or half of the columns."""
    D: gl.constexpr = C.D
    M: gl.constexpr = C.BLOCK_M
    COLUMNS: gl.constexpr = D // 2 if M == 64 else D
    dq = gl.zeros([64, COLUMNS], gl.float32, accumulator(COLUMNS))
    for other in gl.static_range(2):
        ds_t = tiles.ds.index(stage * 2 + other)
        keys = tiles.k.index(other).reshape([64, D])
        if M == 64:
            keys = keys.slice(COLUMNS * which, COLUMNS, 1)
        else:
            ds_t = ds_t.slice(64 * which, 64, 1)
        dq = warpgroup_mma(ds_t.permute((1, 0)), keys, dq, use_acc=other > 0, is_async=True)
    return dq


@gluon.jit
def hand_over(which: gl.constexpr, dq, n, tiles, C: gl.constexpr):
    """Give the n-th block's dQ to the writer. There is none before the first.

    Column 32 a + 16 b + 8 c + 2 d + e goes to 32 a + 8 d + 4 b + 2 c + e: a thread stores 16 bytes
    at a time, without bank conflicts. `postprocess_kernel` puts columns back.
    """
    COLUMNS: gl.constexpr = C.D // 2 if C.BLOCK_M == 64 else C.D
    if n >= 0:
        if n > 0:
            named_barrier("sync", DQ_EMPTY + which, WRITERS)
        x = gl.reshape(dq, [64, COLUMNS // 32, 2, 2, 4, 2])
        x = gl.permute(x, (0, 1, 4, 2, 3, 5))
        tiles.dq.index(which).reshape([64, COLUMNS]).store(gl.reshape(x, [64, COLUMNS]))
        fence_async_shared()
        named_barrier("arrive", DQ_FULL + which, WRITERS)


@gluon.jit
def step(
    which: gl.constexpr, n, dk, dv, job, left, right, scale_log2, shared, PARTIAL: gl.constexpr,
    C: gl.constexpr,
):  # fmt: skip
    """The n-th block of queries. PARTIAL: it may need a mask.

    Consumer 0 is ahead, and computes its half of dQ one block later.
    """
    _, tiles, full = shared
    D: gl.constexpr = C.D
    M: gl.constexpr = C.BLOCK_M
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    LAG: gl.constexpr = 1 - which  # of dQ, in blocks
    # L and delta go into the accumulators. With 128 queries adding them later is faster, but takes
    # registers, which a mask needs.
    INIT_ACC: gl.constexpr = M == 64 or PARTIAL
    stage, phase = n % STAGES, n // STAGES & 1
    q = tiles.q.index(stage).reshape([M, D])
    do = tiles.do.index(stage).reshape([M, D])
    lse, delta = tiles.lse.index(stage), tiles.delta.index(stage)
    mbarrier.wait(full.q.index(stage), phase)
    # Sᵀ - L = K Qᵀ - L
    s = product(tiles.k, which, tiles.q, stage, lse, D, M, INIT_ACC)
    mbarrier.wait(full.do.index(stage), phase)
    # dPᵀ - delta = V dOᵀ - delta
    dp = product(tiles.v, which, tiles.do, stage, delta, D, M, INIT_ACC)
    s = warpgroup_mma_wait(1, deps=[s])
    p = exp2_of_scores(s, lse, scale_log2, M, INIT_ACC)
    if which == 0:
        if n == 0:
            named_barrier("arrive", BOTH_CONSUMERS, CONSUMER_THREADS)
    if PARTIAL:
        p = hide(p, job, which, jobs.partial_block(n, job, C)[1], left, right, M)
    p_operand = gl.convert_layout(convert_p(p, q), P)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * add_row(dp, delta, 1.0, M, INIT_ACC)
    if PARTIAL:
        ds = hide(ds, job, which, jobs.partial_block(n, job, C)[1], left, right, M)
    ds = convert_p(ds, q)
    # Wait for the dS of the other consumer: consumer 0's of this block, consumer 1's of the one
    # before. Whoever has arrived there has read the dS that was in this stage before.
    if which == 1:
        named_barrier("sync", DS_FULL, CONSUMER_THREADS)
    elif n > 0:
        named_barrier("sync", DS_FULL + 1, CONSUMER_THREADS)
    tiles.ds.index(stage * 2 + which).store(ds)
    dv = warpgroup_mma(p_operand, do, dv, is_async=True)  # dV += Pᵀ dO
    fence_async_shared()
    # The compiler synchronises a consumer's own four warps before the product that reads this dS.
    named_barrier("arrive", DS_FULL + which, CONSUMER_THREADS)
    # Of block n - LAG. That of consumer 0 before the first block is dropped.
    dq = issue_dq(which, (n + LAG) % STAGES, tiles, C)
    ds_operand = gl.convert_layout(ds, P)
    dk = warpgroup_mma(ds_operand, q, dk, is_async=True)  # dK += dSᵀ Q
    dv, dq, p_operand = warpgroup_mma_wait(1, deps=[dv, dq, p_operand])
    named_barrier("arrive", DO_EMPTY + stage, READERS)
    hand_over(which, dq, n - LAG, tiles, C)
    dk, ds_operand = warpgroup_mma_wait(0, deps=[dk, ds_operand])
    named_barrier("arrive", Q_EMPTY + stage, READERS)
    return dk, dv


@gluon.jit
def consume(which: gl.constexpr, lengths, table, left, right, scales, shared, C: gl.constexpr):
    """64 keys: dK and dV, and a half of dQ."""
    descs, tiles, full = shared
    scale_log2, softmax_scale = scales
    D: gl.constexpr = C.D
    KV: gl.constexpr = accumulator(D)
    job = jobs.work_of(gl.program_id(0), lengths, table, left, right, C)
    dk = gl.zeros([64, D], gl.float32, KV)
    dv = gl.zeros([64, D], gl.float32, KV)
    all_partial, total = C.GROUP * job.num_partial, jobs.num_blocks(job, C)
    mbarrier.wait(full.kv.index(0), 0, pred=total > 0)
    mbarrier.wait(full.kv.index(1), 0, pred=total > 0)
    if which == 1:
        # Begin half a block after consumer 0, so that not both compute exponentials at once.
        if total > 0:
            named_barrier("sync", BOTH_CONSUMERS, CONSUMER_THREADS)
    for n in range(all_partial):
        dk, dv = step(which, n, dk, dv, job, left, right, scale_log2, shared, True, C)
    for n in range(all_partial, total):
        dk, dv = step(which, n, dk, dv, job, left, right, scale_log2, shared, False, C)
    if total > 0:
        if which == 0:
            named_barrier("sync", DS_FULL + 1, CONSUMER_THREADS)
            dq = warpgroup_mma_wait(0, deps=[issue_dq(which, (total - 1) % STAGES, tiles, C)])
            hand_over(which, dq, total - 1, tiles, C)
        named_barrier("sync", DQ_EMPTY + which, WRITERS)
    named_barrier("sync", BOTH_CONSUMERS, CONSUMER_THREADS)  # both have read K
    # Worked out once more, because it would take registers all along.
    job = jobs.work_of(no_hoist(gl.program_id(0)), lengths, table, left, right, C)
    n_row = job.n_row + 64 * which
    pieces.fill((dv,), 1.0, tiles.v, which, job.keys.count - n_row, D)
    pieces.fill((dk,), softmax_scale, tiles.k, which, job.keys.count - n_row, D)
    written = jobs.Rows(job.b, job.keys.offset, job.writable)
    pieces.store(descs.dv, written, n_row, job.head_k, tiles.v, which, D, C.VARLEN)
    pieces.store(descs.dk, written, n_row, job.head_k, tiles.k, which, D, C.VARLEN)
    tma.store_wait(0)
