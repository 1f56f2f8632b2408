"""dK and dV for Hopper at head_dims above 128, where registers hold those of 64 keys a program.

There is no room for dQ beside them, so it has a kernel of its own (`backward_dq.py`), and S and dP
are computed twice. One consumer computes S, P and dV, the other dP, dS and dK. P goes from one to
the other through shared memory, two blocks of M queries ahead at most.

    producer     K V | dO Q | dO Q | ...                           (TMA)
    consumer 0   Sᵀ . exp2 . P -> smem . dV | the next Sᵀ . ...    (wgmma)
    consumer 1   dPᵀ . P <- smem . dS . dK | the next dPᵀ . ...    (wgmma)

A consumer has one product in flight at a time, and the tensor cores compute the other's meanwhile.
So blocks of Q and dO are released early enough for the next but one to be loaded in time.
"""

from typing import Any, NamedTuple

from ...rules import sequence, work
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
from .softmax import convert_p

# Named barriers; the producer's and 7 are those of `backward_roles`.
P_FULL, P_EMPTY = gl.constexpr(12), gl.constexpr(14)  # and the next: a stage of P


class Tiles(NamedTuple):
    """Shared memory."""

    q: Any  # of each stage
    do: Any
    lse: Any
    delta: Any
    k: Any
    v: Any
    p: Any  # of each stage: Pᵀ


class Descriptors(NamedTuple):
    """What TMA reads and writes."""

    q: Any
    k: Any
    v: Any
    do: Any
    dk: Any
    dv: Any


@gluon.jit
def compute_p(n, s, job, left, right, scale_log2, shared, PARTIAL: gl.constexpr, C: gl.constexpr):
    """Pᵀ of the n-th block from its scores, for the other consumer too."""
    _, tiles, _ = shared
    p = roles.exp2_of_scores(s, None, scale_log2, C.BLOCK_M)
    if PARTIAL:
        row = jobs.partial_block(n, job, C)[1]
        p = roles.hide(p, job, 0, row, left, right, C.BLOCK_M)
    p = convert_p(p, tiles.q)
    stage = n % roles.STAGES
    if n >= roles.STAGES:
        named_barrier("sync", P_EMPTY + stage, roles.CONSUMER_THREADS)
    tiles.p.index(stage).store(p)
    named_barrier("arrive", P_FULL + stage, roles.CONSUMER_THREADS)
    return gl.convert_layout(p, gl.DotOperandLayout(0, accumulator(pieces.piece(C.D_V)), 2))


@gluon.jit
def issue_dv(n, p, dv, shared, C: gl.constexpr):
    """Begin dV += Pᵀ dO for the n-th block."""
    _, tiles, full = shared
    stage = n % roles.STAGES
    mbarrier.wait(full.do.index(stage), n // roles.STAGES & 1)
    return pieces.multiply_add(p, tiles.do, stage, dv, C.D_V, C.BLOCK_M)


@gluon.jit
def issue_qk(n, shared, C: gl.constexpr):
    """Begin Sᵀ - L of the n-th block."""
    _, tiles, full = shared
    stage = n % roles.STAGES
    mbarrier.wait(full.q.index(stage), n // roles.STAGES & 1)
    return roles.product(tiles.k, 0, tiles.q, stage, tiles.lse.index(stage), C.D, C.BLOCK_M)


@gluon.jit
def step_dv(n, dv, job, left, right, scale_log2, shared, PARTIAL: gl.constexpr, C: gl.constexpr):
    """Add the n-th block to dV."""
    s = warpgroup_mma_wait(0, deps=[issue_qk(n, shared, C)])
    named_barrier("arrive", roles.Q_EMPTY + n % roles.STAGES, roles.READERS)
    p = compute_p(n, s, job, left, right, scale_log2, shared, PARTIAL, C)
    dv = pieces.wait_for(issue_dv(n, p, dv, shared, C), p)
    named_barrier("arrive", roles.DO_EMPTY + n % roles.STAGES, roles.READERS)
    return dv


@gluon.jit
def consume_dv(lengths, table, left, right, scales, shared, C: gl.constexpr):
    """The consumer of S, P and dV."""
    descs, tiles, full = shared
    scale_log2, _ = scales
    job = jobs.work_of(gl.program_id(0), lengths, table, left, right, C)
    dv = pieces.zeros(C.D_V)
    all_partial, total = C.GROUP * job.num_partial, jobs.num_blocks(job, C)
    if total > 0:
        mbarrier.wait(full.kv.index(0), 0)
        for n in range(all_partial):
            dv = step_dv(n, dv, job, left, right, scale_log2, shared, True, C)
        for n in range(all_partial, total):
            dv = step_dv(n, dv, job, left, right, scale_log2, shared, False, C)
    named_barrier("sync", roles.BOTH_CONSUMERS, roles.CONSUMER_THREADS)  # the other one has read V
    store_keys(dv, 1.0, descs.dv, tiles.v, lengths, table, left, right, C.D_V, C)


@gluon.jit
def compute_ds(n, dp, job, left, right, shared, PARTIAL: gl.constexpr, C: gl.constexpr):
    """dSᵀ of the n-th block from dPᵀ - delta and the other consumer's Pᵀ."""
    _, tiles, _ = shared
    stage = n % roles.STAGES
    named_barrier("sync", P_FULL + stage, roles.CONSUMER_THREADS)
    p = tiles.p.index(stage).load(accumulator(C.BLOCK_M))
    named_barrier("arrive", P_EMPTY + stage, roles.CONSUMER_THREADS)
    dp = warpgroup_mma_wait(0, deps=[dp])
    named_barrier("arrive", roles.DO_EMPTY + stage, roles.READERS)
    ds = p.to(gl.float32) * dp
    if PARTIAL:
        row = jobs.partial_block(n, job, C)[1]
        ds = roles.hide(ds, job, 0, row, left, right, C.BLOCK_M)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator(pieces.piece(C.D)), 2)
    return gl.convert_layout(convert_p(ds, tiles.q), operand)


@gluon.jit
def issue_dk(n, ds, dk, shared, C: gl.constexpr):
    """Begin dK += dSᵀ Q for the n-th block."""
    _, tiles, full = shared
    stage = n % roles.STAGES
    mbarrier.wait(full.q.index(stage), n // roles.STAGES & 1)
    return pieces.multiply_add(ds, tiles.q, stage, dk, C.D, C.BLOCK_M)


@gluon.jit
def issue_dp(n, shared, C: gl.constexpr):
    """Begin dPᵀ - delta of the n-th block."""
    _, tiles, full = shared
    stage = n % roles.STAGES
    mbarrier.wait(full.do.index(stage), n // roles.STAGES & 1)
    return roles.product(tiles.v, 0, tiles.do, stage, tiles.delta.index(stage), C.D_V, C.BLOCK_M)


@gluon.jit
def step_dk(n, dk, job, left, right, shared, PARTIAL: gl.constexpr, C: gl.constexpr):
    """Add the n-th block to dK."""
    dp = issue_dp(n, shared, C)
    ds = compute_ds(n, dp, job, left, right, shared, PARTIAL, C)
    dk = pieces.wait_for(issue_dk(n, ds, dk, shared, C), ds)
    named_barrier("arrive", roles.Q_EMPTY + n % roles.STAGES, roles.READERS)
    return dk


@gluon.jit
def consume_dk(lengths, table, left, right, scales, shared, C: gl.constexpr):
    """The consumer of dP, dS and dK."""
    descs, tiles, full = shared
    _, softmax_scale = scales
    job = jobs.work_of(gl.program_id(0), lengths, table, left, right, C)
    dk = pieces.zeros(C.D)
    all_partial, total = C.GROUP * job.num_partial, jobs.num_blocks(job, C)
    if total > 0:
        mbarrier.wait(full.kv.index(1), 0)
        for n in range(all_partial):
            dk = step_dk(n, dk, job, left, right, shared, True, C)
        for n in range(all_partial, total):
            dk = step_dk(n, dk, job, left, right, shared, False, C)
    named_barrier("sync", roles.BOTH_CONSUMERS, roles.CONSUMER_THREADS)  # the other one has read K
    store_keys(dk, softmax_scale, descs.dk, tiles.k, lengths, table, left, right, C.D, C)


@gluon.jit
def store_keys(
    x, factor, desc, tiles, lengths, table, left, right, COLUMNS: gl.constexpr, C: gl.constexpr
):
    """Write dK or dV, times a factor, through a tile: zeros in rows that are not in use."""
    job = jobs.work_of(no_hoist(gl.program_id(0)), lengths, table, left, right, C)
    pieces.fill(x, factor, tiles, 0, job.keys.count - job.n_row, COLUMNS)
    written = jobs.Rows(job.b, job.keys.offset, job.writable)
    pieces.store(desc, written, job.n_row, job.head_k, tiles, 0, COLUMNS, C.VARLEN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def dkdv_hopper_kernel(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, lse, delta,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    batch, nheads_k, num_n_blocks, l2_group, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, softmax_scale,
    C: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = C.BLOCK_M
    dtype: gl.constexpr = q_desc.dtype
    COUNT: gl.constexpr = pieces.num_pieces(C.D)
    COUNT_V: gl.constexpr = pieces.num_pieces(C.D_V)
    q_box: gl.constexpr = [roles.STAGES * COUNT] + q_desc.block_shape  # noqa: RUF005
    do_box: gl.constexpr = [roles.STAGES * COUNT_V] + do_desc.block_shape  # noqa: RUF005
    k_box: gl.constexpr = [COUNT] + k_desc.block_shape  # noqa: RUF005
    v_box: gl.constexpr = [COUNT_V] + v_desc.block_shape  # noqa: RUF005
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, M], dtype)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = Tiles(
        gl.allocate_shared_memory(dtype, q_box, q_desc.layout),
        gl.allocate_shared_memory(dtype, do_box, do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [roles.STAGES, M], row_layout),
        gl.allocate_shared_memory(gl.float32, [roles.STAGES, M], row_layout),
        gl.allocate_shared_memory(dtype, k_box, k_desc.layout),
        gl.allocate_shared_memory(dtype, v_box, v_desc.layout),
        gl.allocate_shared_memory(dtype, [roles.STAGES, 64, M], p_layout),
    )
    full = roles.Barriers(barriers(roles.STAGES, 2), barriers(roles.STAGES, 2), barriers(2, 1))
    fence_async_shared()
    descs = Descriptors(q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc)
    statistics = roles.Statistics(lse, delta)
    lengths = sequence.Lengths(
        cu_seqlens_k, seqused_k, seqlen_k, total_k, cu_seqlens_q, seqused_q, seqlen_q, total_q,
        0, None, None, 0,
    )  # fmt: skip
    table = work.Grid(batch, nheads_k, num_n_blocks, l2_group)
    scales, shared = (scale, softmax_scale), (descs, tiles, full)
    gl.warp_specialize([
        (consume_dv, (lengths, table, left, right, scales, shared, C)),
        (consume_dk, (lengths, table, left, right, scales, shared, C)),
        (roles.produce, (lengths, table, left, right, descs, statistics, tiles, full, C)),
    ], [4, 1], [240, 24])  # fmt: skip
