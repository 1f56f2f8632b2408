"""dQ for Hopper at head_dims above 128: 128 queries a program (`backward_dkdv.py` says why).

Each of two consumers has 64 queries. Consumer 1 begins half a block later, so that the tensor cores
compute its products while consumer 0 computes exponentials, and the other way round.

    producer     Q dO | K V | K V | ...                        (TMA)
    consumers    S, dP . exp2 . dS . dQ | the next S, dP ...   (wgmma)

At head_dim 256 there are too few registers for S and dP at once. There the exponentials of a block
run under dQ of the block before:

    consumers    S, dQ of the block before . exp2 . dP . dS    (wgmma)
"""

from typing import Any, NamedTuple

from ...rules import mask, sequence, work
from ...rules.window import Window
from ..gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)  # fmt: skip
from ..launch import SIZES
from . import backward_pieces as pieces
from . import backward_roles as roles
from . import backward_work as jobs
from .pipeline import accumulator, barriers, named_barrier, no_hoist
from .softmax import accumulator_view, convert_p, from_view

N = gl.constexpr(64)  # keys of a block
STAGES = gl.constexpr(2)  # of K
K_EMPTY, V_EMPTY = gl.constexpr(8), gl.constexpr(10)  # named barriers, and the next: of a stage


@gluon.constexpr_function
def v_stages(D, D_V):
    """Stages of V: shared memory has room for one at head_dim 256."""
    return 2 if D + D_V <= 384 else 1


class Tiles(NamedTuple):
    """Shared memory, and the mbarriers that loads complete."""

    q: Any  # of each consumer
    do: Any
    k: Any  # of each stage
    v: Any
    q_full: Any  # of each consumer, for dO too
    k_full: Any
    v_full: Any


class Job(NamedTuple):
    """128 queries of a head, and the keys that they see."""

    tile: Any  # `work.WorkTile`
    keys: Any  # `jobs.Rows`
    blocks: Any  # of keys: `mask.KeyBlocks`
    num_partial: Any  # blocks that may need a mask
    num_blocks: Any


@gluon.jit
def job_of(program, lengths, table, left, right):
    tile = work.work_tile(program, lengths, table, 128)
    offset_k, length_k = work.key_span(tile.b, lengths, tile.num_rows)
    window = Window(length_k - tile.num_rows, left, right, None, length_k)
    blocks = work.n_block_range(tile.m_row, tile.num_rows, window, 128, N)
    num_full = (blocks.full_end - blocks.full_begin) // N
    num_blocks = (blocks.end - blocks.begin) // N
    keys = jobs.Rows(tile.b, offset_k, length_k)
    return Job(tile, keys, blocks, num_blocks - num_full, num_blocks)


@gluon.jit
def first_key(n, job):
    """The first key of the n-th block: partial ones come first."""
    start = job.blocks.full_begin + (n - job.num_partial) * N
    if n < job.num_partial:
        start = jobs.partial_start(n, job.blocks, N)
    return start


@gluon.jit
def produce(lengths, table, left, right, descs, tiles, C: gl.constexpr):
    """Load Q and dO, and the keys' blocks in turn."""
    q_desc, k_desc, v_desc, do_desc = descs
    COUNT: gl.constexpr = pieces.num_pieces(C.D)
    COUNT_V: gl.constexpr = pieces.num_pieces(C.D_V)
    V_STAGES: gl.constexpr = v_stages(C.D, C.D_V)
    Q_BYTES: gl.constexpr = COUNT * q_desc.block_type.nbytes + COUNT_V * do_desc.block_type.nbytes
    job = job_of(gl.program_id(0), lengths, table, left, right)
    tile = job.tile
    head_k = tile.head // C.GROUP
    queries = jobs.Rows(tile.b, tile.offset_q, tile.num_rows)
    for n in range(job.num_blocks):
        start, stage = first_key(n, job), n % STAGES
        if n >= STAGES:
            named_barrier("sync", K_EMPTY + stage, roles.READERS)
        full = tiles.k_full.index(stage)
        mbarrier.expect(full, COUNT * k_desc.block_type.nbytes)
        pieces.load(k_desc, job.keys, start, head_k, full, tiles.k, stage, C.D, C.VARLEN)
        if n == 0:
            for which in gl.static_range(2):
                full, row = tiles.q_full.index(which), tile.m_row + 64 * which
                mbarrier.expect(full, Q_BYTES)
                pieces.load(q_desc, queries, row, tile.head, full, tiles.q, which, C.D, C.VARLEN)
                pieces.load(
                    do_desc, queries, row, tile.head, full, tiles.do, which, C.D_V, C.VARLEN
                )
        stage = n % V_STAGES
        if n >= V_STAGES:
            named_barrier("sync", V_EMPTY + stage, roles.READERS)
        full = tiles.v_full.index(stage)
        mbarrier.expect(full, COUNT_V * v_desc.block_type.nbytes)
        pieces.load(v_desc, job.keys, start, head_k, full, tiles.v, stage, C.D_V, C.VARLEN)


@gluon.jit
def product(a, i, b, j, row, COLUMNS: gl.constexpr):
    """Begin a bᵀ [64, N] for the i-th tile of a and the j-th of b, each column of it from the `row`
    of numbers [64].
    """
    start = gl.zeros([64, N], gl.float32, accumulator(N))
    start = gl.broadcast(gl.expand_dims(row, 1), start)[0]
    return pieces.multiply_transposed(a, i, b, j, start, COLUMNS, 64, N)


@gluon.jit
def hide(x, row, job, start, sides):
    """x [64, N], of the queries from `row`, where they see the keys from `start`; 0 elsewhere."""
    view, i, shift, j = accumulator_view(x, no_hoist(start), N)
    length_k = job.keys.count
    left, right = sides
    window = Window(length_k - job.tile.num_rows, left, right, None, length_k - shift)
    return from_view(gl.where(mask.is_visible(row + i - shift, j, window), view, 0.0), x)


@gluon.jit
def issue_qk(which: gl.constexpr, n, lse, tiles, C: gl.constexpr):
    """Begin S - L of the n-th block."""
    stage = n % STAGES
    mbarrier.wait(tiles.k_full.index(stage), n // STAGES & 1)
    return product(tiles.q, which, tiles.k, stage, lse, C.D)


@gluon.jit
def issue_dp(which: gl.constexpr, n, delta, tiles, C: gl.constexpr):
    """Begin dP - delta of the n-th block."""
    V_STAGES: gl.constexpr = v_stages(C.D, C.D_V)
    stage = n % V_STAGES
    mbarrier.wait(tiles.v_full.index(stage), n // V_STAGES & 1)
    return product(tiles.do, which, tiles.v, stage, delta, C.D_V)


@gluon.jit
def issue_dq(n, ds, dq, tiles, C: gl.constexpr):
    """Begin dQ += dS K for the n-th block."""
    return pieces.multiply_add(ds, tiles.k, n % STAGES, dq, C.D, N)


@gluon.jit
def compute_ds(p, dp, row, start, job, sides, tiles, PARTIAL: gl.constexpr, C: gl.constexpr):
    """dS of a block, as an operand."""
    ds = p * dp
    if PARTIAL:
        ds = hide(ds, row, job, start, sides)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator(pieces.piece(C.D)), 2)
    return gl.convert_layout(convert_p(ds, tiles.q), operand)


@gluon.jit
def compute_p(s, row, start, job, sides, scale_log2, PARTIAL: gl.constexpr):
    """P of a block."""
    p = roles.exp2_of_scores(s, None, scale_log2, N)
    if PARTIAL:
        p = hide(p, row, job, start, sides)
    return p


@gluon.jit
def step(
    which: gl.constexpr, n, dq, row, job, sides, statistics, scale_log2, tiles,
    PARTIAL: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Add the n-th block to dQ."""
    lse, delta = statistics
    start = 0
    if PARTIAL:
        start = jobs.partial_start(n, job.blocks, N)
    s = issue_qk(which, n, lse, tiles, C)
    dp = issue_dp(which, n, delta, tiles, C)
    s = warpgroup_mma_wait(pieces.num_pieces(C.D_V), deps=[s])
    p = compute_p(s, row, start, job, sides, scale_log2, PARTIAL)
    if which == 0:
        if n == 0:
            named_barrier("arrive", roles.BOTH_CONSUMERS, roles.CONSUMER_THREADS)
    dp = warpgroup_mma_wait(0, deps=[dp])
    named_barrier("arrive", V_EMPTY + n % v_stages(C.D, C.D_V), roles.READERS)
    ds = compute_ds(p, dp, row, start, job, sides, tiles, PARTIAL, C)
    dq = pieces.wait_for(issue_dq(n, ds, dq, tiles, C), ds)
    named_barrier("arrive", K_EMPTY + n % STAGES, roles.READERS)
    return dq


@gluon.jit
def add_blocks(
    which: gl.constexpr, dq, row, job, sides, statistics, scale_log2, tiles, C: gl.constexpr
):
    """dQ of all blocks. Consumer 1 begins later, so that not both compute exponentials at once."""
    if which == 1:
        named_barrier("sync", roles.BOTH_CONSUMERS, roles.CONSUMER_THREADS)
    for n in range(job.num_partial):
        dq = step(which, n, dq, row, job, sides, statistics, scale_log2, tiles, True, C)
    for n in range(job.num_partial, job.num_blocks):
        dq = step(which, n, dq, row, job, sides, statistics, scale_log2, tiles, False, C)
    return dq


@gluon.jit
def delayed_step(
    which: gl.constexpr, n, ds, dq, row, job, sides, statistics, scale_log2, tiles,
    PARTIAL: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Block n - 1 is added to dQ, whose dS is ds. That of block n, and dQ."""
    lse, delta = statistics
    start = 0
    if PARTIAL:
        start = jobs.partial_start(n, job.blocks, N)
    s = issue_qk(which, n, lse, tiles, C)
    dq = issue_dq(n - 1, ds, dq, tiles, C)
    s = warpgroup_mma_wait(pieces.num_pieces(C.D), deps=[s])
    p = compute_p(s, row, start, job, sides, scale_log2, PARTIAL)
    dp = issue_dp(which, n, delta, tiles, C)
    dq = pieces.wait_for(dq, ds, pieces.num_pieces(C.D_V))
    named_barrier("arrive", K_EMPTY + (n - 1) % STAGES, roles.READERS)
    dp = warpgroup_mma_wait(0, deps=[dp])
    named_barrier("arrive", V_EMPTY, roles.READERS)
    return compute_ds(p, dp, row, start, job, sides, tiles, PARTIAL, C), dq


@gluon.jit
def add_blocks_delayed(
    which: gl.constexpr, dq, row, job, sides, statistics, scale_log2, tiles, C: gl.constexpr
):
    """dQ of all blocks where V has one stage: S and dP do not begin together."""
    lse, delta = statistics
    start = first_key(0, job)
    s = warpgroup_mma_wait(0, deps=[issue_qk(which, 0, lse, tiles, C)])
    p = compute_p(s, row, start, job, sides, scale_log2, True)
    dp = warpgroup_mma_wait(0, deps=[issue_dp(which, 0, delta, tiles, C)])
    named_barrier("arrive", V_EMPTY, roles.READERS)
    ds = compute_ds(p, dp, row, start, job, sides, tiles, True, C)
    for n in range(1, job.num_partial):
        ds, dq = delayed_step(
            which, n, ds, dq, row, job, sides, statistics, scale_log2, tiles, True, C
        )
    for n in range(gl.maximum(job.num_partial, 1), job.num_blocks):
        ds, dq = delayed_step(
            which, n, ds, dq, row, job, sides, statistics, scale_log2, tiles, False, C
        )
    return pieces.wait_for(issue_dq(job.num_blocks - 1, ds, dq, tiles, C), ds)


@gluon.jit
def consume(
    which: gl.constexpr, lengths, table, left, right, scales, dq_desc, statistics, tiles,
    C: gl.constexpr,
):  # fmt: skip
    """64 queries: dQ."""
    scale_log2, softmax_scale = scales
    sides = (left, right)
    job = job_of(gl.program_id(0), lengths, table, left, right)
    tile, row = job.tile, job.tile.m_row + 64 * which
    dq = pieces.zeros(C.D)
    if job.num_blocks > 0:
        i = row + gl.arange(0, 64, gl.SliceLayout(1, accumulator(N)))
        head = tile.head
        if not C.VARLEN:
            head += tile.b * table.nheads
        at = head.to(gl.int64) * lengths.total_q + tile.offset_q + i
        lse = gl.load(statistics.lse + at, mask=i < tile.num_rows, other=0.0)
        delta = -gl.load(statistics.delta + at, mask=i < tile.num_rows, other=0.0)
        mbarrier.wait(tiles.q_full.index(which), 0)
        own = (lse, delta)
        if v_stages(C.D, C.D_V) == 1:
            dq = add_blocks_delayed(which, dq, row, job, sides, own, scale_log2, tiles, C)
        else:
            dq = add_blocks(which, dq, row, job, sides, own, scale_log2, tiles, C)
    tile = job_of(no_hoist(gl.program_id(0)), lengths, table, left, right).tile
    row = tile.m_row + 64 * which
    pieces.fill(dq, softmax_scale, tiles.q, which, tile.num_rows - row, C.D)
    written = jobs.Rows(tile.b, tile.offset_q, tile.writable)
    pieces.store(dq_desc, written, row, tile.head, tiles.q, which, C.D, C.VARLEN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def dq_hopper_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, lse, delta,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    batch, nheads, num_m_blocks, l2_group, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, softmax_scale,
    C: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    COUNT: gl.constexpr = pieces.num_pieces(C.D)
    COUNT_V: gl.constexpr = pieces.num_pieces(C.D_V)
    q_box: gl.constexpr = [2 * COUNT] + q_desc.block_shape  # noqa: RUF005
    do_box: gl.constexpr = [2 * COUNT_V] + do_desc.block_shape  # noqa: RUF005
    k_box: gl.constexpr = [STAGES * COUNT] + k_desc.block_shape  # noqa: RUF005
    V_STAGES: gl.constexpr = v_stages(C.D, C.D_V)
    v_box: gl.constexpr = [V_STAGES * COUNT_V] + v_desc.block_shape  # noqa: RUF005
    tiles = Tiles(
        gl.allocate_shared_memory(dtype, q_box, q_desc.layout),
        gl.allocate_shared_memory(dtype, do_box, do_desc.layout),
        gl.allocate_shared_memory(dtype, k_box, k_desc.layout),
        gl.allocate_shared_memory(dtype, v_box, v_desc.layout),
        barriers(2, 1), barriers(STAGES, 1), barriers(V_STAGES, 1),
    )  # fmt: skip
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, do_desc)
    statistics = roles.Statistics(lse, delta)
    lengths = sequence.Lengths(
        cu_seqlens_q, seqused_q, seqlen_q, total_q, cu_seqlens_k, seqused_k, seqlen_k, total_k,
        0, None, None, 0,
    )  # fmt: skip
    table, scales = work.Grid(batch, nheads, num_m_blocks, l2_group), (scale, softmax_scale)
    gl.warp_specialize([
        (consume, (0, lengths, table, left, right, scales, dq_desc, statistics, tiles, C)),
        (consume, (1, lengths, table, left, right, scales, dq_desc, statistics, tiles, C)),
        (produce, (lengths, table, left, right, descs, tiles, C)),
    ], [4, 1], [240, 24])  # fmt: skip
