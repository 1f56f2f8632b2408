"""Algorithm 1 of FlashAttention-2 for Hopper, where copies and matrix products are asynchronous.

One program stays on each multiprocessor and draws tiles of work, the longest first. Its producer,
a warp, only loads: it runs ahead as far as there is room. Its consumers, 64 query rows and four
warps each, only compute (`attend_hopper.py`).

Source: FlashAttention-3 (arXiv:2407.08608), sections 3.1 and 3.2.
"""

import torch
import triton.language as tl

from .. import plan as plans
from ..plan import Hopper
from ..problem import Problem
from ..rules import heads, softmax, split, work
from . import handover, hopper
from .attend_hopper import attend, outgrown
from .hopper import fence_async_shared, gl, gluon, mbarrier
from .launch import MAX_INT, SIZES, Launch, changes, strides, where


@gluon.jit
def produce(
    loads, LEFT: gl.constexpr, RIGHT: gl.constexpr, PAGE_SIZE: gl.constexpr, CLEAR: gl.constexpr,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, SPLIT: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """Draw tiles of work; load their queries, and keys and values from the last to the first."""
    (
        q_desc, k_desc, v_desc, counter, queries, keys, values, turns,
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table, stride_table,
        batch, nheads, group, tiles, per_group,
        total, seqlen_q, seqlen_k, total_q, total_k, left, right, appended, splits,
    ) = loads  # fmt: skip
    GROUP: gl.constexpr = q_desc.block_shape[2]
    PACKED: gl.constexpr = cu_seqlens_q is not None
    Q_TILES: gl.constexpr = queries.tiles.shape[0]
    # Tiles of keys in the turns before, turns that had any, and tiles of values that are someone
    # else's, or nobody's, in part.
    turn, done, worked, cleared = 0, 0, 0, 0
    number = gl.program_id(0)
    mine, again = handover.take(turns, turn, number, total, CONSUMERS, FAST)
    while mine < total:
        tile = mine
        if SPLIT:
            tile, per_group = mine // splits, 1
        b, head, first_q, rows_q, writable, first = work.queries(
            tile, cu_seqlens_q, seqused_q, batch, nheads, tiles, per_group, seqlen_q, total_q,
            64 * CONSUMERS,
        )  # fmt: skip
        first_k, length_k = work.keys(
            b, cu_seqlens_k, seqused_k, seqlen_k, total_k, appended, rows_q // GROUP
        )
        begin, _, _, end = work.key_tiles(
            first, rows_q, length_k, left, right, None, LEFT, RIGHT, 64 * CONSUMERS, BLOCK_N, GROUP
        )
        place = first_q
        if SPLIT:  # where this part's result lies; queries are dense, their first is 0
            seen = (end - begin) // BLOCK_N
            low, high = split.part(seen, gl.cdiv(seen, splits), mine % splits)
            begin, end = begin + low * BLOCK_N, begin + high * BLOCK_N
            block = first // (64 * CONSUMERS)
            place = ((b * nheads + head) * tiles + block) * splits + mine % splits
        n = (end - begin) // BLOCK_N
        words = (b, head, place, rows_q, writable, first, length_k, begin, n, mine)
        handover.tell(turns, turn, words)
        # Before it no row sees a key.
        low = first // GROUP + length_k - rows_q // GROUP - left if LEFT else 0
        source = (
            block_table if PAGE_SIZE == 0 else block_table + b.to(gl.int64) * stride_table,
            b if cu_seqlens_k is None else 0, first_k, length_k, heads.kv_head(head, group),
        )  # fmt: skip
        if n > 0:
            for c in gl.static_range(CONSUMERS):
                slot = hopper.q_place(queries, worked, c, CONSUMERS)
                full, q = hopper.arrival(queries, worked, c, CONSUMERS), queries.tiles.index(slot)
                mbarrier.wait(
                    queries.free.index(slot), ((worked * CONSUMERS + c) // Q_TILES & 1) ^ 1
                )
                mbarrier.expect(full, q_desc.block_type.nbytes)
                at = [0 if PACKED else b, (first_q + first + 64 * c) // GROUP, head * GROUP, 0]
                hopper.tma_load(q_desc, at, full, q)
            worked += 1
        drawn, start = 0, end
        for j in range(n + 1):  # keys are a tile ahead of values
            start_v = start
            start -= BLOCK_N
            hopper.fill(keys, done + j, k_desc, source, start, j < n, CONSUMERS, PAGE_SIZE)
            # Late, which balances; in time for the next queries. For a tile again there was one.
            if ((j + 1 == n) | (n == 0)) & (not again if FAST else True):
                drawn = gl.atomic_add(counter, 1, sem="relaxed")
                # A program draws once for each tile it works on, so there is a last draw.
                if drawn == total - 1:
                    gl.atomic_xchg(counter, 0, sem="relaxed")
            m = gl.maximum(done + j - 1, 0)
            if CLEAR and (j > 0) & ((start_v + BLOCK_N > length_k) | (start_v < low)):
                hopper.fill_part(
                    values, m, v_desc, source, start_v, low, length_k, cleared, CONSUMERS, PAGE_SIZE
                )  # fmt: skip
                cleared += 1
            else:
                hopper.fill(values, m, v_desc, source, start_v, j > 0, CONSUMERS, PAGE_SIZE)
        done += n
        turn += 1
        drawn += gl.num_programs(0)
        number = gl.where(again, number, drawn) if FAST else drawn
        mine, again = handover.take(turns, turn, number, total, CONSUMERS, FAST)
    handover.tell(turns, turn, (0, 0, 0, 0, 0, -1, 0, 0, 0, 0))  # no more work


@gluon.constexpr_function
def quads(columns):
    """As an accumulator, but of 16 columns a thread has four that lie side by side."""
    registers = [[0, 1], [0, 2], [8, 0], *([0, 1 << n] for n in range(4, columns.bit_length() - 1))]
    lanes = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def store_rows(rows, o, wanted, HEAD_DIM: gl.constexpr):
    """Write o [64, D] to the wanted ones of 64 rows; where they are long, 8 bytes at a time."""
    o = o.to(rows.dtype.element_ty)
    if o.shape[1] > 128 and o.dtype != gl.float32:
        o = gl.convert_layout(o, quads(o.shape[1]))
    layout: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    rows = gl.expand_dims(gl.convert_layout(rows, layout, assert_trivial=True), 1)
    wanted = gl.expand_dims(gl.convert_layout(wanted, layout, assert_trivial=True), 1)
    d = gl.expand_dims(gl.arange(0, o.shape[1], gl.SliceLayout(0, o.type.layout)), 0)
    gl.store(rows + d, o, mask=wanted & (d < HEAD_DIM))


@gluon.jit
def consume(
    which: gl.constexpr, job,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, HEAD_DIM: gl.constexpr, CONSUMERS: gl.constexpr,
    FAST: gl.constexpr, SCORES: gl.constexpr, SCORE_MOD: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile of work: attention to their keys, and the rows written out."""
    o_desc, out, lse, cu_seqlens_q, queries, keys, values, turns = job[:8]
    stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h, scale, left, right = job[8:16]
    alibi_slopes, s_aux, aux, stride_slopes, factor, softcap, total, part_rows = job[16:]
    SPLIT: gl.constexpr = out.dtype.element_ty == gl.float32  # out is `parts`
    GROUP: gl.constexpr = o_desc.block_shape[2]  # rows of a query token
    PACKED: gl.constexpr = cu_seqlens_q is not None
    D: gl.constexpr = o_desc.block_shape[3]
    BLOCK_N: gl.constexpr = keys.tiles.shape[2]
    O: gl.constexpr = hopper.accumulator(D)
    if which == CONSUMERS - 1:
        hopper.your_turn(which, CONSUMERS)  # the first one's first
    turn, done, worked = 0, 0, 0
    handover.hear(turns, turn)
    while handover.word(turns, turn, handover.FIRST) >= 0:
        o = gl.zeros([64, D], gl.float32, O)
        lse_tile = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, O))
        m, l = lse_tile, gl.zeros_like(lse_tile)
        if handover.word(turns, turn, handover.TILES) > 0:
            changes = (factor, softcap, alibi_slopes, aux)
            if alibi_slopes is not None:
                at = handover.word(turns, turn, handover.B).to(gl.int64) * stride_slopes
                slope = gl.load(alibi_slopes + at + handover.word(turns, turn, handover.HEAD))
                changes = (factor, softcap, slope, aux)
            m, l, o = attend(
                which, queries, worked, keys, values, done, turns, turn, left, right, scale,
                changes, LEFT, RIGHT, D, BLOCK_N, CONSUMERS, FAST, SCORES, SCORE_MOD,
            )  # fmt: skip
            sink = s_aux
            if s_aux is not None:
                sink = gl.load(s_aux + handover.word(turns, turn, handover.HEAD)).to(gl.float32)
            o, lse_tile = softmax.finish(m, l, o, scale, sink)
        # Read again where they are needed, instead of held in registers all along.
        seen = handover.word(turns, turn, handover.TILES)
        first = handover.word(turns, turn, handover.FIRST) + 64 * which
        rows_q = handover.word(turns, turn, handover.ROWS_Q)
        b, head = handover.word(turns, turn, handover.B), handover.word(turns, turn, handover.HEAD)
        place = handover.word(turns, turn, handover.FIRST_Q)
        first_q = first if SPLIT else place + first
        # TMA writes the rows: it stops at a tensor's end, not a sequence's.
        THROUGH: gl.constexpr = queries.tiles.shape[0] >= 2 * CONSUMERS and not SPLIT
        whole = THROUGH & (seen > 0) & ((not PACKED) | (first + 64 <= rows_q))
        if FAST:  # rows after a sequence's end are someone else's, and have no say
            again = outgrown(m, l, o, rows_q - first, scale, LEFT)
            again &= handover.word(turns, turn, handover.AGAIN + which) == 0
            handover.say(turns, turn, handover.AGAIN + which, again.to(gl.int32), hopper.FOUR)
            whole &= not again
        if THROUGH and whole:
            tile = queries.tiles.index(hopper.q_place(queries, worked, which, CONSUMERS))
            tile.reshape([64, D]).store(o.to(o_desc.dtype))
            fence_async_shared()
            at_q = [0 if PACKED else b, first_q // GROUP, head * GROUP, 0]
            hopper.tma_store(o_desc, at_q, tile)
        worked += (seen > 0).to(gl.int32)
        b, head = b.to(gl.int64), head.to(gl.int64) * GROUP
        row = gl.arange(0, 64, gl.SliceLayout(1, O))
        writable = row < handover.word(turns, turn, handover.WRITABLE) - first
        if FAST:
            writable &= not again
        t, member = heads.unpack(first_q + row, GROUP)
        if not whole:
            if SPLIT:
                base = out
                at = place.to(gl.int64) * part_rows + 64 * which + row
                all_rows = hopper.here(total).to(gl.int64) * part_rows
                gl.store(out + all_rows * HEAD_DIM + at, m, mask=writable)
                gl.store(out + all_rows * (HEAD_DIM + 1) + at, l, mask=writable)
                at *= HEAD_DIM
            else:
                base = out + b * hopper.here(stride_o_b) + head * hopper.here(stride_o_h)
                at = t.to(gl.int64) * hopper.here(stride_o_t)
                if GROUP > 1:
                    at += member.to(gl.int64) * hopper.here(stride_o_h)
                mine = row < rows_q - first
                o = gl.where(gl.expand_dims(mine, 1), o, 0.0)
                lse_tile = gl.where(mine, lse_tile, float("-inf"))
            rows = tl.multiple_of(base + at, 16)  # bytes, as TMA wants it too
            store_rows(rows, o, writable, HEAD_DIM)
        if lse is not None:
            base = lse + b * hopper.here(stride_lse_b) + head * hopper.here(stride_lse_h)
            at = t + member * hopper.here(stride_lse_h) if GROUP > 1 else t
            gl.store(base + at, lse_tile, mask=writable)
        done += seen
        handover.heard(turns, turn)
        turn += 1
        handover.hear(turns, turn)
    hopper.tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def forward_hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, out, lse, counter,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table, alibi_slopes, s_aux, aux,
    stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h, stride_table,
    batch, nheads, group, tiles, per_group, total, seqlen_q, seqlen_k, total_q, total_k,
    scale, left, right, appended, stride_slopes, factor, softcap, splits, part_rows,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, PAGE_SIZE: gl.constexpr, CLEAR: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, Q_TILES: gl.constexpr,
    SCORES: gl.constexpr, SCORE_MOD: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = k_desc.block_shape[3]
    GROUP: gl.constexpr = q_desc.block_shape[2]
    SPLIT: gl.constexpr = out.dtype.element_ty == gl.float32  # out is `parts`
    # Most tiles of keys can do without maxima (`attend`), where weights have the range for it.
    PLAIN: gl.constexpr = SCORES == "" and SCORE_MOD is None and alibi_slopes is None
    FAST: gl.constexpr = PLAIN and D <= 128 and q_desc.dtype == gl.bfloat16
    q_box: gl.constexpr = [Q_TILES, 1, 64 // GROUP, GROUP, D]
    k_box: gl.constexpr = [hopper.STAGES, 1, BLOCK_N, 1, D]
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, q_box, q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, k_box, k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, k_box, v_desc.layout)
    words = gl.allocate_shared_memory(
        gl.int32, [2 * handover.WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    queries = hopper.Queries(
        q_tiles, hopper.barriers(2 * CONSUMERS, 1), hopper.barriers(Q_TILES, 1)
    )
    keys = hopper.Ring(k_tiles, hopper.barriers(hopper.STAGES, 1), hopper.K_FREED)
    # One more for parts. By itself it would be nobody's where CLEAR is False, and Triton would have
    # the producer's draws in its place: a mere number there did not survive a change of contexts.
    values = hopper.Ring(v_tiles, hopper.barriers(hopper.STAGES + 1, 1), hopper.V_FREED)
    turns = handover.Turns(words, hopper.barriers(2, 1), hopper.barriers(2, CONSUMERS))
    for n in gl.static_range(2 * CONSUMERS):
        handover.say(turns, n % 2, handover.AGAIN + n // 2, 0, hopper.FOUR)
    fence_async_shared()
    job = (
        o_desc, out, lse, cu_seqlens_q, queries, keys, values, turns,
        stride_o_b, stride_o_t, stride_o_h, stride_lse_b, stride_lse_h, scale, left, right,
        alibi_slopes, s_aux, aux, stride_slopes, factor, softcap, total, part_rows,
    )  # fmt: skip
    loads = (
        q_desc, k_desc, v_desc, counter, queries, keys, values, turns,
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table, stride_table,
        batch, nheads, group, tiles, per_group,
        total, seqlen_q, seqlen_k, total_q, total_k, left, right, appended, splits,
    )  # fmt: skip
    # A copy brings a whole tile of keys; of pages smaller than it the producer has more to hold.
    WHOLE: gl.constexpr = k_desc.block_shape[1] == BLOCK_N
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (0, job, LEFT, RIGHT, HEAD_DIM, CONSUMERS, FAST, SCORES, SCORE_MOD)),
            (consume, (1, job, LEFT, RIGHT, HEAD_DIM, CONSUMERS, FAST, SCORES, SCORE_MOD)),
            (produce, (loads, LEFT, RIGHT, PAGE_SIZE, CLEAR, BLOCK_N, CONSUMERS, SPLIT, FAST)),
        ], [4, 1], [240, 24] if WHOLE else [208, 96] if D == 64 else [224, 56])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (0, job, LEFT, RIGHT, HEAD_DIM, CONSUMERS, FAST, SCORES, SCORE_MOD)),
            (consume, (1, job, LEFT, RIGHT, HEAD_DIM, CONSUMERS, FAST, SCORES, SCORE_MOD)),
            (consume, (2, job, LEFT, RIGHT, HEAD_DIM, CONSUMERS, FAST, SCORES, SCORE_MOD)),
            (produce, (loads, LEFT, RIGHT, PAGE_SIZE, CLEAR, BLOCK_N, CONSUMERS, SPLIT, FAST)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


POINTERS = (
    "out", "lse", "counter", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "block_table", "alibi_slopes", "s_aux", "aux",
)  # fmt: skip


def view(name: str, x: torch.Tensor, tokens: int, rows: int, heads: int = 1) -> hopper.View:
    """x as a descriptor sees it; `tokens` of a sequence or a page, boxes of `rows` for `heads`."""
    packed = x.dim() == 3
    *outer, nheads, head_dim = x.shape
    shape = [1 if packed else outer[0], tokens, nheads, head_dim]
    # A dimension of one is never stepped over, but TMA wants a stride that it could take.
    steps = [s if s and n > 1 else 8 for s, n in zip(strides(x), shape, strict=False)]
    return hopper.View(name, shape, [*steps, 1], [1, rows, heads, plans.size_class(head_dim)])


def launch(
    p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Hopper, otherwise: Launch,
    fold: Launch | None,
) -> Launch:  # fmt: skip
    """The launch that writes attention of p to out, and its LSE where that is wanted."""
    tiles, (nheads, head_dim) = plan.tiles, p.q.shape[-2:]
    # Triton 3.8 and newer have no registers for these beside rows of 256, or with three consumers.
    # How many there are must change no bits, so two don't get them either.
    crowded = plans.size_class(head_dim) == 256 and p.scores.score_mod is not None
    full = hopper.NEWER and head_dim <= 64 and p.scores.alibi_slopes is not None
    if (hopper.NEWER and crowded) or (full and p.windowed):
        return otherwise
    # At 256 one tile's way out of two is no faster.
    change = changes(p, "bounded", "folded", *["linear"] * (head_dim <= 128 and not full))
    packed, group, total = p.cu_seqlens_q is not None, plan.group, plan.rows * plan.units
    splits, part_rows, pointers = 1, 0, POINTERS
    if plan.parts:
        splits, part_rows = plan.parts.splits, plan.parts.rows
        pointers = ("parts", "nothing", *POINTERS[2:])
    total_q, total_k = p.q.shape[0], p.k.shape[0]
    tokens_q = total_q if packed else p.seqlen_q
    tokens_k = p.page_size or (total_k if p.k.dim() == 3 else p.seqlen_k)
    box = min(tiles.block_n, p.page_size or tiles.block_n)
    views = [
        view("q", p.q, tokens_q, 64 // group, group), view("k", p.k, tokens_k, box),
        view("v", p.v, tokens_k, box), view("out", out, tokens_q, 64 // group, group),
    ]  # fmt: skip
    # Past a dense tensor's end TMA finds zeros. Elsewhere there are others' keys, or what was never
    # written; and what lies before every window may be someone else's by now.
    inside = p.cu_seqlens_k is not None or p.seqused_k is not None or p.page_size > 0
    constants = (
        *where(p, out, lse), p.batch, nheads // group, p.group // group, plan.rows, plan.per_group,
        total * splits, p.seqlen_q * group, p.seqlen_k, total_q,
        MAX_INT if p.page_size else total_k,
        change.scale, p.left, p.right, p.appended, *change.numbers, splits, part_rows,
        p.left >= 0, p.right >= 0, p.page_size, inside or p.left >= 0,
        head_dim, tiles.block_n, tiles.consumers, tiles.q_tiles, *change.flags,
    )  # fmt: skip
    return hopper.TmaLaunch(
        forward_hopper_kernel, plan.programs, pointers, constants, 4,
        views=views, otherwise=otherwise, fold=fold,
    )  # fmt: skip
