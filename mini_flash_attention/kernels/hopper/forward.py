"""The Hopper kernel: its arguments, its shared memory, its warp roles, and its launch.

One program stays on each multiprocessor and takes work tiles from a counter, the longest first. Its
producer, one warp, only loads, and runs ahead as far as there are free stages. Its consumers, four
warps and 64 query rows each, only compute.

Source: FlashAttention-3 (arXiv:2407.08608), sections 3.1 and 3.2.
"""

from typing import Any, NamedTuple

import torch

from ...plan.hopper import Hopper
from ...plan.layout import size_class
from ...problem import Problem
from ...rules import scores, sequence, work
from ..gluon import fence_async_shared, gl, gluon
from ..launch import MAX_INT, SIZES, CompileTime, Launch, output_strides
from ..tma import TmaLaunch, tma_box
from . import pipeline, scheduler
from .consumer import consume
from .epilogue import Stores
from .producer import Loads, produce


class Facts(NamedTuple):
    """What the kernel is compiled for."""

    # all roles
    D: Any  # columns of a tile that holds HEAD_DIM
    BLOCK_N: Any
    CONSUMERS: Any
    Q_BUFFERS: Any  # buffers for 64 rows of Q
    GROUP: Any  # heads packed into the rows of a tile (PackGQA)
    VARLEN: Any  # whether queries are packed sequences
    SPLIT: Any  # whether a work tile is a split of its keys, and its result partial
    SKIP_MAX: Any  # most full blocks go without maxima (`mma.mainloop`)
    # the producer
    PAGE_SIZE: Any  # 0 unless paged
    ZERO_V_TAIL: Any  # whether values outside of a sequence are replaced by zeros
    # the consumers
    HEAD_DIM: Any
    SCORE_MODE: Any  # `scores.modify`
    LAZY_RESCALE: Any  # `softmax.rescale`
    TMA_EPILOGUE: Any  # TMA writes the rows from their queries' buffer, unless SPLIT


class Config(CompileTime, Facts):
    """`Facts`, as the kernel takes them."""

    __slots__ = ()


@gluon.jit(do_not_specialize=SIZES)
def forward_hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, out, lse, counter,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table, alibi_slopes, s_aux, aux,
    stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h, stride_table,
    batch, nheads, group, num_m_blocks, l2_group, total, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, appended, stride_slopes, factor, softcap, splits, partial_rows,
    C: gl.constexpr, SCORE_MOD: gl.constexpr,
):  # fmt: skip
    # With packed heads nheads and group count packs of C.GROUP heads, and seqlen_q counts rows.
    BLOCK_N: gl.constexpr = C.BLOCK_N
    CONSUMERS: gl.constexpr = C.CONSUMERS
    D: gl.constexpr = C.D
    q_box: gl.constexpr = [C.Q_BUFFERS, 1, 64 // C.GROUP, C.GROUP, D]
    k_box: gl.constexpr = [pipeline.STAGES, 1, BLOCK_N, 1, D]
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, q_box, q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, k_box, k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, k_box, v_desc.layout)
    fields = gl.allocate_shared_memory(
        gl.int32, [2 * scheduler.NUM_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    q_buffers = pipeline.QBuffers(
        q_tiles, pipeline.barriers(2 * CONSUMERS, 1), pipeline.barriers(C.Q_BUFFERS, 1)
    )
    keys = pipeline.Pipeline(k_tiles, pipeline.barriers(pipeline.STAGES, 1), pipeline.K_EMPTY)
    # One barrier more, for ZERO_V_TAIL. It belongs to this array because Triton would reuse the
    # memory of an unused one as scratch of `draw`, and a number in a barrier's place did not
    # survive a context switch (NOTES 78).
    values = pipeline.Pipeline(v_tiles, pipeline.barriers(pipeline.STAGES + 1, 1), pipeline.V_EMPTY)
    sched = scheduler.TileScheduler(
        fields, pipeline.barriers(2, 1), pipeline.barriers(2, CONSUMERS)
    )
    for n in gl.static_range(2 * CONSUMERS):
        scheduler.store_field(sched, n % 2, scheduler.REDO + n // 2, 0, pipeline.FOUR_WARPS)
    fence_async_shared()
    shared = pipeline.Shared(q_buffers, keys, values, sched)

    lengths = sequence.Lengths(
        cu_seqlens_q, seqused_q, seqlen_q, total_q, cu_seqlens_k, seqused_k, seqlen_k, total_k,
        appended, None, None, 0,
    )  # fmt: skip
    table = work.Grid(batch, nheads, num_m_blocks, l2_group)
    loads = Loads(
        q_desc, k_desc, v_desc, block_table, stride_table, group, left, right, counter, total,
        splits,
    )  # fmt: skip
    stores = Stores(
        o_desc, out, lse, stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h, total,
        partial_rows,
    )  # fmt: skip
    inputs = scores.Inputs(scale, factor, softcap, aux, alibi_slopes, stride_slopes, s_aux)
    # One copy brings a whole block of keys; for smaller pages the producer needs more registers.
    WHOLE: gl.constexpr = k_desc.block_shape[1] == BLOCK_N
    # The first partition runs on the kernel's own 4 warps; the lists of warps and registers are for
    # the others.
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (0, shared, stores, inputs, left, right, C, SCORE_MOD)),
            (consume, (1, shared, stores, inputs, left, right, C, SCORE_MOD)),
            (produce, (loads, lengths, table, shared, C)),
        ], [4, 1], [240, 24] if WHOLE else [208, 96] if D == 64 else [224, 56])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (0, shared, stores, inputs, left, right, C, SCORE_MOD)),
            (consume, (1, shared, stores, inputs, left, right, C, SCORE_MOD)),
            (consume, (2, shared, stores, inputs, left, right, C, SCORE_MOD)),
            (produce, (loads, lengths, table, shared, C)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


POINTERS = (
    "out", "lse", "counter", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "block_table", "alibi_slopes", "s_aux", "aux",
)  # fmt: skip


def launch(
    p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Hopper, fallback: Launch,
    combine_launch: Launch | None,
) -> Launch:  # fmt: skip
    """The launch that writes attention of p to out, and its LSE where that is wanted."""
    tiles, group, score_mode = plan.tiles, plan.group, plan.score_mode
    nheads, head_dim = p.q.shape[-2:]
    packed, page_size = p.lengths.cu_seqlens_q is not None, p.cache.page_size
    total, columns = plan.num_m_blocks * plan.batch_heads, size_class(head_dim)
    splits, partial_rows, pointers = 1, 0, POINTERS
    if plan.partials:
        splits, partial_rows = plan.partials.splits, plan.partials.rows
        pointers = ("partials", "nothing", *POINTERS[2:])
    total_q, total_k = p.q.shape[0], p.k.shape[0]
    tokens_q = total_q if packed else p.seqlen_q
    tokens_k = page_size or (total_k if p.k.dim() == 3 else p.seqlen_k)
    box = min(tiles.block_n, page_size or tiles.block_n)
    boxes = [
        tma_box("q", p.q, tokens_q, 64 // group, columns, group),
        tma_box("k", p.k, tokens_k, box, columns),
        tma_box("v", p.v, tokens_k, box, columns),
        tma_box("out", out, tokens_q, 64 // group, columns, group),
    ]
    config = Config(
        columns, tiles.block_n, tiles.consumers, tiles.q_buffers, group, packed,
        plan.partials is not None, plan.skip_max, page_size, plan.zero_v_tail, head_dim,
        score_mode.mode, plan.lazy_rescale, plan.tma_epilogue,
    )  # fmt: skip
    constants = (
        *output_strides(p, out, lse), p.batch, nheads // group, p.group // group,
        plan.num_m_blocks, plan.l2_group, total * splits, p.seqlen_q * group, p.seqlen_k, total_q,
        MAX_INT if page_size else total_k, score_mode.scale, p.options.left, p.options.right,
        p.cache.appended, *score_mode.numbers, splits, partial_rows, config, p.scores.score_mod,
    )  # fmt: skip
    return TmaLaunch(
        forward_hopper_kernel, plan.programs, pointers, constants, 4,
        boxes=boxes, fallback=fallback, combine_launch=combine_launch,
    )  # fmt: skip
