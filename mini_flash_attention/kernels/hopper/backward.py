"""The backward pass for Hopper: dK and dV of 128 keys a program, and dQ added up in fp32.

The five products of a block of M queries, for the 64 keys of a consumer. Scores are transposed, so
that P and dS are operands from registers where dV and dK want them:

    Sᵀ = K Qᵀ    dPᵀ = V dOᵀ    dV += Pᵀ dO    dK += dSᵀ Q    dQ += dS K

dQ needs the dS of both consumers, so that goes through shared memory. Each consumer then computes a
half of dQ's block, and TMA adds it to an fp32 copy of dQ, to which the programs of all keys add.
Consumer 0 is half a block ahead: it has computed dS when consumer 1 needs it, and takes consumer
1's of block n - 1 when it is done with its own of block n.

    producer     K V | dO delta | Q L | dO delta | Q L | ...                              (TMA)
    consumer 0   Sᵀ dPᵀ . exp2 . dS -> smem | dV . dQ of block n - 1 -> smem | dK         (wgmma)
    consumer 1   later, for the other 64 keys and the other half of dQ, but of block n
    writer       both halves of dQ -> fp32                                    (TMA, reduce-add)

`preprocess_kernel` runs before it, for L (the LSE), delta and a dQ of zeros; `postprocess_kernel`
scales dQ and narrows it. Head_dims above 128 have two kernels, `backward_dkdv.py` and
`backward_dq.py`; `launches` launches either kind.

Source: FlashAttention-3 (arXiv:2407.08608), section 3, and its backward for SM 90.
"""

from ...plan.backward import BackwardTensors, HopperBackward
from ...plan.scores import LOG2E
from ...problem import Problem
from ...rules import sequence, work
from ..gluon import fence_async_shared, gl, gluon
from ..launch import SIZES, Launch
from ..portable.backward_preprocess import postprocess, preprocess
from ..tma import ANY, LAST, WRAP, Launches, TmaBox, TmaLaunch, sequence_box
from . import backward_roles as roles
from .backward_dkdv import dkdv_hopper_kernel
from .backward_dq import dq_hopper_kernel
from .backward_pieces import piece_columns
from .backward_work import Config
from .pipeline import barriers


@gluon.jit(do_not_specialize=SIZES)
def backward_hopper_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc, lse, delta, turns,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    batch, nheads_k, num_n_blocks, l2_group, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, softmax_scale,
    C: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = C.BLOCK_M
    dtype: gl.constexpr = q_desc.dtype
    q_box: gl.constexpr = [roles.STAGES] + q_desc.block_shape  # noqa: RUF005
    k_box: gl.constexpr = [2] + k_desc.block_shape  # noqa: RUF005
    dq_box: gl.constexpr = [2] + dq_desc.block_shape  # noqa: RUF005
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, M], dtype)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = roles.Tiles(
        gl.allocate_shared_memory(dtype, q_box, q_desc.layout),
        gl.allocate_shared_memory(dtype, q_box, do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [roles.STAGES, M], row_layout),
        gl.allocate_shared_memory(gl.float32, [roles.STAGES, M], row_layout),
        gl.allocate_shared_memory(dtype, k_box, k_desc.layout),
        gl.allocate_shared_memory(dtype, k_box, v_desc.layout),
        gl.allocate_shared_memory(dtype, [2 * roles.STAGES, 64, M], ds_layout),
        gl.allocate_shared_memory(gl.float32, dq_box, dq_desc.layout),
    )
    full = roles.Barriers(barriers(roles.STAGES, 2), barriers(roles.STAGES, 2), barriers(2, 1))
    fence_async_shared()
    descs = roles.Descriptors(q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc)
    statistics = roles.Statistics(lse, delta)
    lengths = sequence.Lengths(
        cu_seqlens_k, seqused_k, seqlen_k, total_k, cu_seqlens_q, seqused_q, seqlen_q, total_q,
        0, None, None, 0,
    )  # fmt: skip
    table = work.Grid(batch, nheads_k, num_n_blocks, l2_group)
    scales, shared = (scale, softmax_scale), (descs, tiles, full)
    gl.warp_specialize([
        (roles.consume, (0, lengths, table, left, right, scales, shared, C)),
        (roles.consume, (1, lengths, table, left, right, scales, shared, C)),
        (roles.produce, (lengths, table, left, right, descs, statistics, tiles, full, C)),
        (roles.write, (lengths, table, left, right, descs, tiles, turns, C)),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


STATISTICS = ("lse_log2", "delta")
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")


def launches(
    p: Problem, given: BackwardTensors, plan: HopperBackward, fallback: list[Launch]
) -> tuple[list[Launch], dict[str, int]]:
    """The launches, and the elements of their workspace."""
    packed, nheads = p.lengths.cu_seqlens_q is not None, p.q.shape[-2]
    total_q, total_k = p.q.shape[-3], p.k.shape[-3]
    tiles, D, D_V = plan.work.tiles, plan.columns, plan.columns_v
    M, N = tiles.block_m, tiles.block_n
    scale = p.options.softmax_scale
    ordered = p.options.deterministic
    config = Config(D, D_V, M, N, p.group, packed, plan.dq is None, ordered)
    constants = (
        p.seqlen_q, p.seqlen_k, total_q, total_k, scale * LOG2E, p.options.left, p.options.right,
        scale, config,
    )  # fmt: skip
    pointers: tuple[str, ...] = STATISTICS + LENGTHS
    rows, needed = given.delta.numel(), {}
    if plan.dq is None:
        needed = {"dq_accum": rows * D} | ({"turns": rows} if ordered else {})
    first = preprocess(p, given, plan.preprocess, -1 / scale, cleared=tuple(needed))
    W, W_V = piece_columns(D), piece_columns(D_V)
    q, do = sequence_box("q", p.q, M, W), sequence_box("dout", given.dout, M, W_V)
    k, v = sequence_box("k", p.k, 64, W), sequence_box("v", p.v, 64, W_V)
    dk, dv = sequence_box("dk", given.dk, 64, W), sequence_box("dv", given.dv, 64, W_V)
    keys = (p.batch, p.k.shape[-2], plan.work.num_blocks, plan.work.l2_group, *constants)
    if plan.dq is not None:
        # Portable kernels take the LSE in another form, and the next launch wants this one.
        prepare, portable_dkdv, portable_dq = fallback
        queries = (p.batch, nheads, plan.dq.num_blocks, plan.dq.l2_group, *constants)
        dq = sequence_box("dq", given.dq, 64, W)
        of_keys = TmaLaunch(
            dkdv_hopper_kernel, plan.work.programs, pointers, keys, 4,
            boxes=[q, k, v, do, dk, dv],
            fallback=Launches(prepare, portable_dkdv, first), combine_launch=None,
        )  # fmt: skip
        of_queries = TmaLaunch(
            dq_hopper_kernel, plan.dq.programs, pointers, queries, 4,
            boxes=[q, k, v, do, dq], fallback=Launches(prepare, portable_dq), combine_launch=None,
        )  # fmt: skip
        return [first, of_keys, of_queries], needed
    pointers = (*STATISTICS, "turns" if ordered else "nothing", *LENGTHS)
    columns = D // 2 if M == 64 else D
    steps = [nheads * total_q * D, total_q * D, D, 1]
    dq = TmaBox("dq_accum", [p.batch, nheads, total_q, D], steps, [1, 1, 64, columns])
    if packed:
        shape, steps = [ANY, ANY, nheads, LAST, D], [WRAP - D, D, total_q * D, D, 1]
        dq = TmaBox("dq_accum", shape, steps, [1, 1, 1, 64, columns])
    main = TmaLaunch(
        backward_hopper_kernel, plan.work.programs, pointers, keys, 4,
        boxes=[q, k, v, do, dq, dk, dv], fallback=Launches(*fallback),
        combine_launch=postprocess(p, given, plan.preprocess),
    )  # fmt: skip
    return [first, main], needed
