"""The backward pass for Hopper: dK and dV of 128 keys a program, and dQ added up in fp32.

The five products of a block of M queries, for the 64 keys of a consumer. Scores are transposed, so
that P and dS are operands from registers where dV and dK want them:

    Sᵀ = K Qᵀ    dPᵀ = V dOᵀ    dV += Pᵀ dO    dK += dSᵀ Q    dQ += dS K

dQ needs the dS of both consumers, so that goes through shared memory. Each consumer then computes a
half of dQ's block, and TMA adds it to an fp32 copy of dQ, to which the programs of all keys add.
The accumulators of S and dP begin at -L / scale and -delta, which saves a subtraction a score.

    producer     K V | Q L | dO delta | Q L | dO delta | ...                     (TMA)
    consumer 0   Sᵀ dPᵀ . exp2 . dS -> smem | dV . dQ -> smem | dK | Sᵀ ...      (wgmma)
    consumer 1   the same for the other 64 keys, and the other half of dQ
    writer                                        dQ -> fp32  (TMA, reduce-add)

`preprocess_kernel` runs before it, for L (the LSE), delta and a dQ of zeros; `postprocess_kernel`
scales dQ and narrows it.

Source: FlashAttention-3 (arXiv:2407.08608), section 3, and its backward for SM 90.
"""

from typing import Any, NamedTuple

from ...plan.backward import HopperBackward
from ...plan.scores import LOG2E
from ...problem import BackwardTensors, Problem
from ...rules import mask, sequence, work
from ...rules.window import Window
from ..gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    tma_add,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip
from ..launch import SIZES, CompileTime, Launch
from ..portable.backward import postprocess, preprocess
from ..tma import ANY, LAST, WRAP, Launches, TmaBox, TmaLaunch, sequence_box
from .pipeline import ONE_WARP, accumulator, barriers, named_barrier, no_hoist
from .softmax import accumulator_view, convert_p, from_view

STAGES = gl.constexpr(2)  # of Q and of dO
# Named barriers; Triton takes 0 to 6 itself.
BOTH_CONSUMERS = gl.constexpr(7)  # dS of both is in shared memory
Q_EMPTY, DO_EMPTY = gl.constexpr(8), gl.constexpr(10)  # and the next: a stage is empty
DQ_FULL, DQ_EMPTY = gl.constexpr(12), gl.constexpr(14)  # and the next: a consumer's dQ
READERS = gl.constexpr(2 * 128 + 32)  # threads of both consumers and the producer
WRITERS = gl.constexpr(128 + 32)  # of a consumer and the writer
END = gl.constexpr(LAST)  # the end of a packed sequence, for TMA (`tma.sequence_box`)


class Facts(NamedTuple):
    """What the kernel is compiled for."""

    D: Any  # columns of a tile of Q and K
    BLOCK_M: Any
    GROUP: Any  # query heads of a KV head
    VARLEN: Any  # whether queries and keys are packed sequences


class Config(CompileTime, Facts):
    """`Facts`, as the kernel takes them."""

    __slots__ = ()


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


class Rows(NamedTuple):
    """Rows of a sequence."""

    b: Any
    offset: Any  # the first row, where sequences are packed
    count: Any


class Work(NamedTuple):
    """128 keys of a KV head, and the queries that see them."""

    b: Any
    head_k: Any
    keys: Any  # `Rows` in use
    writable: Any
    n_row: Any  # the first of the 128
    queries: Any  # `Rows`
    blocks: Any  # of queries: `mask.KeyBlocks`, seen from the keys
    num_partial: Any  # blocks of a head that may need a mask
    num_full: Any
    head_stride: Any  # rows of L and delta from head to head
    first_row: Any  # of the group's first head in L and delta


@gluon.jit
def work_of(program, lengths, table, left, right, C: gl.constexpr):
    """The program's work. Keys are handed to the rules as what sees queries (`portable/backward`).

    The first keys of a head come first: under a causal mask most queries see them.
    """
    BLOCK_M: gl.constexpr = C.BLOCK_M
    number = gl.num_programs(0) - 1 - program
    tile = work.work_tile(number, lengths, table, 128)
    offset_q, length_q = work.key_span(tile.b, lengths, 0)
    from_keys = Window(length_q - tile.num_rows, right, left, None, length_q)
    blocks = work.n_block_range(tile.m_row, tile.num_rows, from_keys, 128, BLOCK_M)
    num_full = (blocks.full_end - blocks.full_begin) // BLOCK_M
    num_partial = (blocks.end - blocks.begin) // BLOCK_M - num_full
    total_q = lengths.total_k
    head = tile.head * C.GROUP
    if not C.VARLEN:
        head += tile.b * table.nheads * C.GROUP
    return Work(
        tile.b, tile.head, Rows(tile.b, tile.offset_q, tile.num_rows), tile.writable, tile.m_row,
        Rows(tile.b, offset_q, length_q), blocks, num_partial, num_full, total_q,
        head * total_q + offset_q,
    )  # fmt: skip


@gluon.jit
def partial_block(n, job, C: gl.constexpr):
    """(member of the group, first query) of the n-th block of queries that may need a mask."""
    member, block = n * 0, n
    if C.GROUP > 1:
        member, block = n // job.num_partial, n % job.num_partial
    row, blocks = job.blocks.begin + block * C.BLOCK_M, job.blocks
    return member, row + gl.where(row < blocks.full_begin, 0, blocks.full_end - blocks.full_begin)


@gluon.jit
def full_block(n, job, C: gl.constexpr):
    """(member of the group, first query) of the n-th full block of queries."""
    member, block = n * 0, n
    if C.GROUP > 1:
        member, block = n // job.num_full, n % job.num_full
    return member, job.blocks.full_begin + block * C.BLOCK_M


@gluon.jit
def nth_block(n, job, C: gl.constexpr):
    """(member of the group, first query) of the n-th block: partial ones come first."""
    all_partial = C.GROUP * job.num_partial
    if n < all_partial:
        member, row = partial_block(n, job, C)
    else:
        member, row = full_block(n - all_partial, job, C)
    return member, row


@gluon.jit
def num_blocks(job, C: gl.constexpr):
    """Blocks of queries, for all heads of the group."""
    return C.GROUP * (job.num_partial + job.num_full)


@gluon.jit
def load(desc, rows, row, head, barrier, tile, VARLEN: gl.constexpr):
    """Load rows of a head from the sequence's `row`-th; zeros past its end."""
    if VARLEN:
        at = [END, rows.offset + rows.count, END - rows.count + row, head, 0]
        tma_load(desc, at, barrier, tile)
    else:
        tma_load(desc, [rows.b, row, head, 0], barrier, tile)


@gluon.jit
def store(desc, rows, row, head, tile, VARLEN: gl.constexpr):
    """Store rows of a head from the sequence's `row`-th, up to its end."""
    if VARLEN:
        at = [END, rows.offset + rows.count, END - rows.count + row, head, 0]
        tma_store(desc, at, tile)
    else:
        tma_store(desc, [rows.b, row, head, 0], tile)


@gluon.jit
def add_dq(desc, job, member, row, which: gl.constexpr, tile, C: gl.constexpr):
    """Add a consumer's half of dQ's block, 64 rows or half of the columns, up to the sequence's
    end.
    """
    column = 0
    if C.BLOCK_M == 64:
        column = which * (C.D // 2)
    else:
        row += 64 * which
    head = job.head_k * C.GROUP + member
    queries = job.queries
    if C.VARLEN:
        end = queries.offset + queries.count
        tma_add(desc, [END, end, head, END - queries.count + row, column], tile)
    else:
        tma_add(desc, [queries.b, head, row, column], tile)


@gluon.jit
def load_keys(desc, job, barrier, tiles, VARLEN: gl.constexpr):
    """Load the keys, or values, of both consumers."""
    mbarrier.expect(barrier, 2 * desc.block_type.nbytes)
    for which in gl.static_range(2):
        row = job.n_row + 64 * which
        load(desc, job.keys, row, job.head_k, barrier, tiles.index(which), VARLEN)


@gluon.jit
def produce(lengths, table, left, right, descs, statistics, tiles, full, C: gl.constexpr):
    """Load K and V, and the queries' blocks in turn."""
    job = work_of(gl.program_id(0), lengths, table, left, right, C)
    M: gl.constexpr = C.BLOCK_M
    VARLEN: gl.constexpr = C.VARLEN
    if num_blocks(job, C) > 0:
        load_keys(descs.k, job, full.kv.index(0), tiles.k, VARLEN)
        load_keys(descs.v, job, full.kv.index(1), tiles.v, VARLEN)
    for n in range(num_blocks(job, C)):
        stage = n % STAGES
        member, row = nth_block(n, job, C)
        head = job.head_k * C.GROUP + member
        # TMA wants these at multiples of 16 bytes, which packed sequences are not.
        i = row + gl.arange(0, M, ONE_WARP)
        at = job.first_row + member.to(gl.int64) * job.head_stride + i
        lse = gl.load(statistics.lse + at, mask=i < job.queries.count, other=0.0)
        delta = gl.load(statistics.delta + at, mask=i < job.queries.count, other=0.0)
        if n >= STAGES:
            named_barrier("sync", Q_EMPTY + stage, READERS)
        mbarrier.expect(full.q.index(stage), descs.q.block_type.nbytes)
        load(descs.q, job.queries, row, head, full.q.index(stage), tiles.q.index(stage), VARLEN)
        tiles.lse.index(stage).store(lse)
        mbarrier.arrive(full.q.index(stage))
        if n >= STAGES:
            named_barrier("sync", DO_EMPTY + stage, READERS)
        mbarrier.expect(full.do.index(stage), descs.do.block_type.nbytes)
        load(descs.do, job.queries, row, head, full.do.index(stage), tiles.do.index(stage), VARLEN)
        tiles.delta.index(stage).store(delta)
        mbarrier.arrive(full.do.index(stage))


@gluon.jit
def write(lengths, table, left, right, descs, tiles, C: gl.constexpr):
    """Add the consumers' blocks of dQ to the fp32 copy."""
    job = work_of(gl.program_id(0), lengths, table, left, right, C)
    for n in range(num_blocks(job, C)):
        member, row = nth_block(n, job, C)
        for which in gl.static_range(2):
            named_barrier("sync", DQ_FULL + which, WRITERS)
            add_dq(descs.dq, job, member, row, which, tiles.dq.index(which), C)
        for which in gl.static_range(2):
            tma.store_wait(1 - which)
            named_barrier("arrive", DQ_EMPTY + which, WRITERS)


@gluon.jit
def product(a, b, row, M: gl.constexpr):
    """Begin a bᵀ [64, M], each row of it from the `row` of numbers [M]."""
    S: gl.constexpr = accumulator(M)
    start = gl.expand_dims(row.load(gl.SliceLayout(0, S)), 0)
    start = gl.broadcast(start, gl.zeros([64, M], gl.float32, S))[0]
    return warpgroup_mma(a, b.permute((1, 0)), start, use_acc=True, is_async=True)


@gluon.jit
def hide(x, job, which: gl.constexpr, row, left, right, M: gl.constexpr):
    """x [64, M], of a consumer's keys, where the M queries from `row` see them; 0 elsewhere."""
    view, j, shift, i = accumulator_view(x, no_hoist(row), M)
    j = job.n_row + 64 * which + j - shift
    length_q = job.queries.count
    from_keys = Window(length_q - job.keys.count, right, left, None, length_q - shift)
    return from_view(gl.where(mask.is_visible(j, i, from_keys), view, 0.0), x)


@gluon.jit
def step(
    which: gl.constexpr, n, dk, dv, job, left, right, scale_log2, shared, PARTIAL: gl.constexpr,
    C: gl.constexpr,
):  # fmt: skip
    """The n-th block of queries. PARTIAL: it may need a mask."""
    _, tiles, full = shared
    D: gl.constexpr = C.D
    M: gl.constexpr = C.BLOCK_M
    P: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    COLUMNS: gl.constexpr = D // 2 if M == 64 else D
    stage, phase = n % STAGES, n // STAGES & 1
    k = tiles.k.index(which).reshape([64, D])
    v = tiles.v.index(which).reshape([64, D])
    q = tiles.q.index(stage).reshape([M, D])
    do = tiles.do.index(stage).reshape([M, D])
    mbarrier.wait(full.q.index(stage), phase)
    s = product(k, q, tiles.lse.index(stage), M)  # Sᵀ - L = K Qᵀ - L
    mbarrier.wait(full.do.index(stage), phase)
    dp = product(v, do, tiles.delta.index(stage), M)  # dPᵀ - delta = V dOᵀ - delta
    s = warpgroup_mma_wait(1, deps=[s])
    # At most 1: where scores are huge, S - L may be far above 0.
    p = gl.exp2(gl.minimum(s * scale_log2, 0.0))
    if PARTIAL:
        p = hide(p, job, which, partial_block(n, job, C)[1], left, right, M)
    p_operand = gl.convert_layout(convert_p(p, q), P)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * dp
    if PARTIAL:
        ds = hide(ds, job, which, partial_block(n, job, C)[1], left, right, M)
    ds = convert_p(ds, q)
    tiles.ds.index(stage * 2 + which).store(ds)
    dv = warpgroup_mma(p_operand, do, dv, is_async=True)  # dV += Pᵀ dO
    fence_async_shared()
    named_barrier("sync", BOTH_CONSUMERS, 256)
    dq = gl.zeros([64, COLUMNS], gl.float32, accumulator(COLUMNS))
    for other in gl.static_range(2):  # dQ = dS K: 64 rows, or half of the columns
        ds_t = tiles.ds.index(stage * 2 + other)
        keys = tiles.k.index(other).reshape([64, D])
        if M == 64:
            keys = keys.slice(COLUMNS * which, COLUMNS, 1)
        else:
            ds_t = ds_t.slice(64 * which, 64, 1)
        dq = warpgroup_mma(ds_t.permute((1, 0)), keys, dq, use_acc=other > 0, is_async=True)
    ds_operand = gl.convert_layout(ds, P)
    dk = warpgroup_mma(ds_operand, q, dk, is_async=True)  # dK += dSᵀ Q
    dv, dq, p_operand = warpgroup_mma_wait(1, deps=[dv, dq, p_operand])
    named_barrier("arrive", DO_EMPTY + stage, READERS)
    if n > 0:
        named_barrier("sync", DQ_EMPTY + which, WRITERS)
    tiles.dq.index(which).reshape([64, COLUMNS]).store(dq)
    fence_async_shared()
    named_barrier("arrive", DQ_FULL + which, WRITERS)
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
    job = work_of(gl.program_id(0), lengths, table, left, right, C)
    dk = gl.zeros([64, D], gl.float32, KV)
    dv = gl.zeros([64, D], gl.float32, KV)
    all_partial, total = C.GROUP * job.num_partial, num_blocks(job, C)
    mbarrier.wait(full.kv.index(0), 0, pred=total > 0)
    mbarrier.wait(full.kv.index(1), 0, pred=total > 0)
    for n in range(all_partial):
        dk, dv = step(which, n, dk, dv, job, left, right, scale_log2, shared, True, C)
    for n in range(all_partial, total):
        dk, dv = step(which, n, dk, dv, job, left, right, scale_log2, shared, False, C)
    if total > 0:
        named_barrier("sync", DQ_EMPTY + which, WRITERS)
    named_barrier("sync", BOTH_CONSUMERS, 256)  # both have read K
    # Worked out once more, because it would take registers all along.
    job = work_of(no_hoist(gl.program_id(0)), lengths, table, left, right, C)
    n_row = job.n_row + 64 * which
    key = n_row + gl.arange(0, 64, gl.SliceLayout(1, KV))
    in_use = gl.expand_dims(key < job.keys.count, 1)
    k = tiles.k.index(which).reshape([64, D])
    v = tiles.v.index(which).reshape([64, D])
    v.store(gl.where(in_use, dv, 0.0).to(v.dtype))
    k.store(gl.where(in_use, dk * softmax_scale, 0.0).to(k.dtype))
    fence_async_shared()
    written = Rows(job.b, job.keys.offset, job.writable)
    store(descs.dv, written, n_row, job.head_k, tiles.v.index(which), C.VARLEN)
    store(descs.dk, written, n_row, job.head_k, tiles.k.index(which), C.VARLEN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def backward_hopper_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc, lse, delta,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    batch, nheads_k, num_n_blocks, l2_group, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, softmax_scale,
    C: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = C.BLOCK_M
    dtype: gl.constexpr = q_desc.dtype
    q_box: gl.constexpr = [STAGES] + q_desc.block_shape  # noqa: RUF005
    k_box: gl.constexpr = [2] + k_desc.block_shape  # noqa: RUF005
    dq_box: gl.constexpr = [2] + dq_desc.block_shape  # noqa: RUF005
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, M], dtype)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = Tiles(
        gl.allocate_shared_memory(dtype, q_box, q_desc.layout),
        gl.allocate_shared_memory(dtype, q_box, do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, M], row_layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, M], row_layout),
        gl.allocate_shared_memory(dtype, k_box, k_desc.layout),
        gl.allocate_shared_memory(dtype, k_box, v_desc.layout),
        gl.allocate_shared_memory(dtype, [2 * STAGES, 64, M], ds_layout),
        gl.allocate_shared_memory(gl.float32, dq_box, dq_desc.layout),
    )
    full = Barriers(barriers(STAGES, 2), barriers(STAGES, 2), barriers(2, 1))
    fence_async_shared()
    descs = Descriptors(q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc)
    statistics = Statistics(lse, delta)
    lengths = sequence.Lengths(
        cu_seqlens_k, seqused_k, seqlen_k, total_k, cu_seqlens_q, seqused_q, seqlen_q, total_q,
        0, None, None, 0,
    )  # fmt: skip
    table = work.Grid(batch, nheads_k, num_n_blocks, l2_group)
    scales, shared = (scale, softmax_scale), (descs, tiles, full)
    gl.warp_specialize([
        (consume, (0, lengths, table, left, right, scales, shared, C)),
        (consume, (1, lengths, table, left, right, scales, shared, C)),
        (produce, (lengths, table, left, right, descs, statistics, tiles, full, C)),
        (write, (lengths, table, left, right, descs, tiles, C)),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


POINTERS = ("lse_log2", "delta", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")


def launches(
    p: Problem, given: BackwardTensors, plan: HopperBackward, fallback: list[Launch]
) -> tuple[list[Launch], dict[str, int]]:
    """The launches, and the elements of their workspace: an fp32 copy of dQ."""
    packed, nheads = p.lengths.cu_seqlens_q is not None, p.q.shape[-2]
    total_q, total_k = p.q.shape[-3], p.k.shape[-3]
    M, D, columns = plan.block_m, plan.columns, plan.columns // (2 if plan.block_m == 64 else 1)
    rows = given.delta.numel()
    steps = [nheads * total_q * D, total_q * D, D, 1]
    dq = TmaBox("dq_accum", [p.batch, nheads, total_q, D], steps, [1, 1, 64, columns])
    if packed:
        shape, steps = [ANY, ANY, nheads, LAST, D], [WRAP - D, D, total_q * D, D, 1]
        dq = TmaBox("dq_accum", shape, steps, [1, 1, 1, 64, columns])
    boxes = [
        sequence_box("q", p.q, M, D), sequence_box("k", p.k, 64, D), sequence_box("v", p.v, 64, D),
        sequence_box("dout", given.dout, M, D),
        dq, sequence_box("dk", given.dk, 64, D), sequence_box("dv", given.dv, 64, D),
    ]  # fmt: skip
    config = Config(D, M, p.group, packed)
    scale = p.options.softmax_scale
    constants = (
        p.batch, p.k.shape[-2], plan.work.num_blocks, plan.work.l2_group,
        p.seqlen_q, p.seqlen_k, total_q, total_k,
        scale * LOG2E, p.options.left, p.options.right, scale, config,
    )  # fmt: skip
    main = TmaLaunch(
        backward_hopper_kernel, plan.work.programs, POINTERS, constants, 4, boxes=boxes,
        fallback=Launches(*fallback), combine_launch=postprocess(p, given, plan.preprocess),
    )  # fmt: skip
    first = preprocess(p, given, plan.preprocess, -1 / scale, -1.0, True)
    return [first, main], {"dq_accum": rows * D}
