"""The Hopper kernel: its arguments, what its parts share, and its launch.

One program stays on each multiprocessor and draws tiles of work, the longest first. Its producer,
a warp, only loads: it runs ahead as far as there is room. Its consumers, 64 query rows and four
warps each, only compute.

Source: FlashAttention-3 (arXiv:2407.08608), sections 3.1 and 3.2.
"""

from typing import Any, NamedTuple

import torch

from ...plan.hopper import Hopper
from ...plan.layout import size_class
from ...problem import Problem
from ...rules import scores, sequence, work
from ..gluon import fence_async_shared, gl, gluon
from ..launch import MAX_INT, SIZES, Launch, where
from ..tma import TmaLaunch, view
from . import pipeline, scheduler
from .consumer import consume
from .epilogue import Stores
from .producer import Loads, produce


class Config(NamedTuple):
    """What the kernel is compiled for."""

    # all roles
    D: Any  # columns of a tile that holds HEAD_DIM
    BLOCK_N: Any
    CONSUMERS: Any
    Q_TILES: Any  # places for 64 rows of Q
    GROUP: Any  # heads packed into the rows of a tile
    PACKED: Any  # whether queries are
    SPLIT: Any  # whether a tile of work is a part of its keys, and its result one
    FAST: Any  # most tiles of keys can do without maxima (`mma.attend`)
    # the producer
    PAGE_SIZE: Any  # 0 unless paged
    CLEAR: Any  # whether values outside of a sequence are replaced by zeros
    # the consumers
    HEAD_DIM: Any
    SCORES: Any  # `scores.modified`
    LAZY: Any  # `softmax.rescale`
    THROUGH: Any  # rows are written through the place of their queries, by TMA, unless SPLIT


@gluon.jit(do_not_specialize=SIZES)
def forward_hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, out, lse, counter,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table, alibi_slopes, s_aux, aux,
    stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h, stride_table,
    batch, nheads, group, tiles, per_group, total, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, appended, stride_slopes, factor, softcap, splits, part_rows,
    C: gl.constexpr, SCORE_MOD: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = C.BLOCK_N
    CONSUMERS: gl.constexpr = C.CONSUMERS
    D: gl.constexpr = C.D
    q_box: gl.constexpr = [C.Q_TILES, 1, 64 // C.GROUP, C.GROUP, D]
    k_box: gl.constexpr = [pipeline.STAGES, 1, BLOCK_N, 1, D]
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, q_box, q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, k_box, k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, k_box, v_desc.layout)
    words = gl.allocate_shared_memory(
        gl.int32, [2 * scheduler.WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    queries = pipeline.Queries(
        q_tiles, pipeline.barriers(2 * CONSUMERS, 1), pipeline.barriers(C.Q_TILES, 1)
    )
    keys = pipeline.Ring(k_tiles, pipeline.barriers(pipeline.STAGES, 1), pipeline.K_FREED)
    # One more for parts. By itself it would be nobody's where CLEAR is False, and Triton would have
    # the producer's draws in its place: a mere number there did not survive a change of contexts.
    values = pipeline.Ring(v_tiles, pipeline.barriers(pipeline.STAGES + 1, 1), pipeline.V_FREED)
    turns = scheduler.Turns(words, pipeline.barriers(2, 1), pipeline.barriers(2, CONSUMERS))
    for n in gl.static_range(2 * CONSUMERS):
        scheduler.say(turns, n % 2, scheduler.AGAIN + n // 2, 0, pipeline.FOUR)
    fence_async_shared()
    shared = pipeline.Shared(queries, keys, values, turns)

    lengths = sequence.Lengths(
        cu_seqlens_q, seqused_q, seqlen_q, total_q, cu_seqlens_k, seqused_k, seqlen_k, total_k,
        appended, None, None, 0,
    )  # fmt: skip
    table = work.Grid(batch, nheads, tiles, per_group)
    loads = Loads(
        q_desc, k_desc, v_desc, block_table, stride_table, group, left, right, counter, total,
        splits,
    )  # fmt: skip
    stores = Stores(
        o_desc, out, lse, stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h, total,
        part_rows,
    )  # fmt: skip
    given = scores.Inputs(scale, factor, softcap, aux, alibi_slopes, stride_slopes, s_aux)
    # A copy brings a whole tile of keys; of pages smaller than it the producer has more to hold.
    WHOLE: gl.constexpr = k_desc.block_shape[1] == BLOCK_N
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (0, shared, stores, given, left, right, C, SCORE_MOD)),
            (consume, (1, shared, stores, given, left, right, C, SCORE_MOD)),
            (produce, (loads, lengths, table, shared, C)),
        ], [4, 1], [240, 24] if WHOLE else [208, 96] if D == 64 else [224, 56])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (0, shared, stores, given, left, right, C, SCORE_MOD)),
            (consume, (1, shared, stores, given, left, right, C, SCORE_MOD)),
            (consume, (2, shared, stores, given, left, right, C, SCORE_MOD)),
            (produce, (loads, lengths, table, shared, C)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


POINTERS = (
    "out", "lse", "counter", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "block_table", "alibi_slopes", "s_aux", "aux",
)  # fmt: skip


def launch(
    p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Hopper, otherwise: Launch,
    fold: Launch | None,
) -> Launch:  # fmt: skip
    """The launch that writes attention of p to out, and its LSE where that is wanted."""
    tiles, group, change = plan.tiles, plan.group, plan.change
    nheads, head_dim = p.q.shape[-2:]
    packed, total, columns = (
        p.cu_seqlens_q is not None,
        plan.rows * plan.units,
        size_class(head_dim),
    )
    splits, part_rows, pointers = 1, 0, POINTERS
    if plan.parts:
        splits, part_rows = plan.parts.splits, plan.parts.rows
        pointers = ("parts", "nothing", *POINTERS[2:])
    total_q, total_k = p.q.shape[0], p.k.shape[0]
    tokens_q = total_q if packed else p.seqlen_q
    tokens_k = p.page_size or (total_k if p.k.dim() == 3 else p.seqlen_k)
    box = min(tiles.block_n, p.page_size or tiles.block_n)
    views = [
        view("q", p.q, tokens_q, 64 // group, columns, group),
        view("k", p.k, tokens_k, box, columns),
        view("v", p.v, tokens_k, box, columns),
        view("out", out, tokens_q, 64 // group, columns, group),
    ]
    config = Config(
        columns, tiles.block_n, tiles.consumers, tiles.q_tiles, group, packed,
        plan.parts is not None, plan.fast, p.page_size, plan.clear, head_dim, change.way, plan.lazy,
        plan.through,
    )  # fmt: skip
    constants = (
        *where(p, out, lse), p.batch, nheads // group, p.group // group, plan.rows, plan.per_group,
        total * splits, p.seqlen_q * group, p.seqlen_k, total_q,
        MAX_INT if p.page_size else total_k,
        change.scale, p.left, p.right, p.appended, *change.numbers, splits, part_rows,
        Config._make(map(gl.constexpr, config)), p.scores.score_mod,
    )  # fmt: skip
    return TmaLaunch(
        forward_hopper_kernel, plan.programs, pointers, constants, 4,
        views=views, otherwise=otherwise, fold=fold,
    )  # fmt: skip
