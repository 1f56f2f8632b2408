"""Attention of few queries to a long cache: the keys are read once, at the speed of memory.

All query heads that share a KV head, and all query tokens, are packed into the rows of one tile,
so a key is loaded once for all of them. Keys are split among programs, and `combine.py` folds what
they found. There are two ways to split, told apart by SHARES:

- equal shares of the whole batch's keys (`shares.py`), one for each program that the GPU can run at
  a time: it stays full to the end, whatever the lengths;
- a number of parts for each sequence, where a caller asks for that.

Source: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023); equal shares as in Stream-K
(arXiv:2301.03598).
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..plan import Decode
from ..problem import Problem
from ..rules import heads, mask, sequence, softmax, split
from . import shares
from .attend import attend, in_eights, load_rows
from .launch import MAX_INT, SIZES, Launch, changes, eights, padded, strides, twins, where, wide


@triton.jit
def decode_tiles(
    b, head_k, block, low, high, whole, slot, given,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, TWINS: tl.constexpr,
    SCORES: tl.constexpr, SCORE_MOD: tl.constexpr,
):  # fmt: skip
    """A block of rows of one KV head against the tiles low..high of what its sequence sees.

    The result goes to out and lse if those tiles are the whole, else to a slot of the parts.
    """
    (
        q, k, v, out, lse, parts, block_table, lengths, alibi_slopes, s_aux, aux,
        stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
        stride_v_b, stride_v_t, stride_v_h, stride_o_b, stride_o_t, stride_o_h,
        stride_lse_b, stride_lse_h, stride_table, group, slots, part_rows,
        scale, stride_slopes, factor, softcap, num_pages,
    ) = given  # fmt: skip
    leftpad, cache_batch_idx, cache_rows = lengths[4], lengths[5], lengths[10]
    left, right = lengths[11], lengths[12]
    # Which keys are mine, and which rows? Row r is query token r // group of head r % group in the
    # KV head's group.
    first_q, rows_q, first_k, length_k, start, _ = shares.key_range(
        b, lengths, LEFT, RIGHT, BLOCK_N
    )
    pad = leftpad
    if leftpad is not None:
        pad = sequence.first_key(b, leftpad, length_k)
    rows = rows_q * group
    local = tl.arange(0, BLOCK_M)
    row = block * BLOCK_M + local
    i, member = heads.unpack(row, group)
    head_k = head_k.to(tl.int64)
    head = head_k * group + member

    diagonal = length_k - rows_q
    first = block * BLOCK_M // group
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group, rows_q - 1)
    begin, clear_begin, clear_end, end = mask.key_tiles(
        first, last, diagonal, left, right, pad, length_k, BLOCK_N, LEFT, RIGHT
    )
    begin = tl.maximum(begin, start + low * BLOCK_N)
    end = tl.minimum(end, start + high * BLOCK_N)

    changes = (factor, softcap, alibi_slopes, aux)
    if alibi_slopes is not None:
        slopes = alibi_slopes + b.to(tl.int64) * stride_slopes + head
        slope = tl.load(slopes, mask=row < rows, other=0.0)
        changes = (factor, softcap, slope[:, None], aux)
    sink = s_aux
    if s_aux is not None:
        sink = tl.load(s_aux + head, mask=row < rows, other=0.0).to(tl.float32)
        sink = tl.where(whole, sink, float("-inf"))  # of parts, `combine` adds it

    entry = b
    b = b.to(tl.int64)
    if lengths[0] is not None:
        q += tl.cast(first_q, tl.int64) * stride_q_t
        out += tl.cast(first_q, tl.int64) * stride_o_t
        if lse is not None:
            lse += first_q
    q += b * stride_q_b
    offset_q = i.to(tl.int64) * stride_q_t + head * stride_q_h
    q_tile = load_rows(q, offset_q, row < rows, False, HEAD_DIM, D)
    k += head_k * stride_k_h
    v += head_k * stride_v_h
    row_k = b
    if cache_batch_idx is not None:
        row_k = sequence.cache_row(b, cache_batch_idx, cache_rows)[0].to(tl.int64)
    if PAGE_SIZE == 0:
        k += row_k * stride_k_b
        v += row_k * stride_v_b
        if lengths[1] is not None:
            k += tl.cast(first_k, tl.int64) * stride_k_t
            v += tl.cast(first_k, tl.int64) * stride_v_t
    else:
        block_table += row_k * stride_table

    # One loop with a mask: what the mask costs is hidden behind the loads, and between two loops
    # no load would be on its way.
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M] if BLOCK_M * BLOCK_N >= 4096 else [BLOCK_M, BLOCK_N], tl.float32)
    o = tl.zeros([BLOCK_M, D_V], tl.float32)
    m, l, o = attend(
        m, l, o, q_tile, i, begin, clear_begin, clear_end, end, True,
        k, v, stride_k_t, stride_v_t, stride_k_b, stride_v_b, block_table, num_pages,
        diagonal, left, right, pad, length_k, scale, entry, head[:, None], changes,
        LEFT, RIGHT, PAGE_SIZE, HEAD_DIM, BLOCK_N, D, HEAD_DIM_V, D_V, WIDE, TWINS,
        SCORES, SCORE_MOD,
    )  # fmt: skip
    if len(l.shape) == 2:
        l = tl.sum(l, 1)
    o, lse_tile = softmax.finish(m, l, o, scale, sink)
    d_v = tl.arange(0, D_V)
    wanted = (row < rows)[:, None] & (d_v < HEAD_DIM_V)[None, :]
    if whole:
        out += b * stride_o_b
        tl.store(
            out + (i.to(tl.int64) * stride_o_t + head * stride_o_h)[:, None] + d_v[None, :],
            o.to(out.dtype.element_ty),
            mask=wanted,
        )
        if lse is not None:
            tl.store(lse + b * stride_lse_b + head * stride_lse_h + i, lse_tile, mask=row < rows)
    elif parts is not None:
        at = slot.to(tl.int64) * part_rows + local
        tl.store(parts + at[:, None] * HEAD_DIM_V + d_v[None, :], o, mask=wanted)
        maxima = parts + slots.to(tl.int64) * part_rows * HEAD_DIM_V
        tl.store(maxima + at, m, mask=row < rows)
        tl.store(maxima + slots.to(tl.int64) * part_rows + at, l, mask=row < rows)


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q, k, v, out, lse, parts, owners, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table,
    cache_batch_idx, cache_leftpad, alibi_slopes, s_aux, aux,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_o_b, stride_o_t, stride_o_h,
    stride_lse_b, stride_lse_h, stride_table,
    batch, nheads_k, group, splits, split_tiles, slots, part_rows,
    seqlen_q, seqlen_k, total_q, total_k, num_pages, cache_rows, scale, left, right, appended,
    stride_slopes, factor, softcap,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, HEAD_DIM_V: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, TWINS: tl.constexpr,
    EIGHTS: tl.constexpr, SCORES: tl.constexpr, SCORE_MOD: tl.constexpr,
    SHARES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # `combine` may take its place as soon as there is room, and waits there
        gdc_launch_dependents()
    lengths = (
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad, cache_batch_idx,
        seqlen_q, seqlen_k, total_q, total_k, cache_rows, left, right, appended,
    )  # fmt: skip
    stride_q_b, stride_q_t, stride_q_h = in_eights(stride_q_b, stride_q_t, stride_q_h, EIGHTS & 1)
    stride_k_b, stride_k_t, stride_k_h = in_eights(stride_k_b, stride_k_t, stride_k_h, EIGHTS & 2)
    stride_v_b, stride_v_t, stride_v_h = in_eights(stride_v_b, stride_v_t, stride_v_h, EIGHTS & 4)
    stride_o_b, stride_o_t, stride_o_h = in_eights(stride_o_b, stride_o_t, stride_o_h, EIGHTS & 8)
    given = (
        q, k, v, out, lse, parts, block_table, lengths, alibi_slopes, s_aux, aux,
        stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
        stride_v_b, stride_v_t, stride_v_h, stride_o_b, stride_o_t, stride_o_h,
        stride_lse_b, stride_lse_h, stride_table, group, slots, part_rows,
        scale, stride_slopes, factor, softcap, num_pages,
    )  # fmt: skip
    program = tl.program_id(0)
    blocks = tl.cdiv(seqlen_q * group, BLOCK_M)
    if SHARES:
        # Programs of one share stand side by side, so that all heads of a key are read together.
        block = program % blocks
        head_k = program // blocks % nheads_k
        share = program // blocks // nheads_k
        total = shares.count(batch, lengths, LEFT, RIGHT, BLOCK_N)
        cuts = tl.minimum(splits, total)
        tile, stop = split.share(total, share, cuts)
        b, before = shares.find(tile, batch, lengths, LEFT, RIGHT, BLOCK_N)
        crossed = 0  # shares that the sequence which goes on after this one lies in
        # Lengths that another stream changes meanwhile may spoil results, but lead nowhere else.
        while (tile < stop) & (b < batch):
            tiles = shares.key_range(b, lengths, LEFT, RIGHT, BLOCK_N)[5]
            low = tile - before
            high = tl.minimum(tiles, low + stop - tile)
            begins = low == 0
            if begins & (high < tiles):  # goes on in the next shares
                crossed = split.share_of(before + tiles - 1, total, cuts) - share + 1
                crossed = tl.minimum(crossed, cuts - share)
                tl.store(owners + 2 * program, b)
            decode_tiles(
                b, head_k, block, low, high, begins & (high == tiles),
                2 * program + begins.to(tl.int32), given, LEFT, RIGHT, PAGE_SIZE, HEAD_DIM, D,
                HEAD_DIM_V, D_V, BLOCK_M, BLOCK_N, WIDE, TWINS, SCORES, SCORE_MOD,
            )  # fmt: skip
            before += tiles
            tile += high - low
            b += 1
        tl.store(owners + 2 * program + 1, crossed)
    else:
        part = program % splits
        block = program // splits % blocks
        head_k = program // splits // blocks % nheads_k
        b = program // splits // blocks // nheads_k
        tiles = shares.key_range(b, lengths, LEFT, RIGHT, BLOCK_N)[5]
        size = split_tiles
        if size == 0:
            size = tl.cdiv(tiles, splits)
        low, high = split.part(tiles, size, part)
        decode_tiles(
            b, head_k, block, low, high, splits == 1, program, given, LEFT, RIGHT, PAGE_SIZE,
            HEAD_DIM, D, HEAD_DIM_V, D_V, BLOCK_M, BLOCK_N, WIDE, TWINS, SCORES, SCORE_MOD,
        )  # fmt: skip


POINTERS = (
    "q", "k", "v", "out", "lse", "parts", "owners", "cu_seqlens_q", "cu_seqlens_k", "seqused_q",
    "seqused_k", "block_table", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "s_aux", "aux",
)  # fmt: skip


def workspace(p: Problem, plan: Decode) -> dict[str, int]:
    """Elements of `parts` (fp32: outputs [slots, rows, D], maxima, sums) and `owners` (int32).

    owners says for each program which sequence begins in its share and goes on in the next, and
    how many shares that lies in; 0 if there is none.
    """
    elements = {"owners": 2 * plan.programs} if plan.shares else {}
    elements["parts"] = plan.slots * plan.rows * (p.v.shape[-1] + 2)
    return elements if elements["parts"] else {}


def launch(p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Decode) -> Launch:
    """The launch that writes attention of p to out and lse, or to parts where keys are split."""
    tiles = plan.tiles
    head_dim, head_dim_v, change = p.q.shape[-1], p.v.shape[-1], changes(p)
    total_k = MAX_INT if p.page_size else p.k.shape[0]
    constants = (
        *strides(p.q), *strides(p.k), *strides(p.v), *where(p, out, lse),
        p.batch, p.k.shape[-2], p.group, plan.splits, plan.split_tiles, plan.slots,
        plan.rows, p.seqlen_q, p.seqlen_k, p.q.shape[0], total_k, p.k.shape[0], p.cache_rows,
        change.scale, p.left, p.right, p.appended, *change.numbers,
        p.left >= 0, p.right >= 0, p.page_size, head_dim, padded(head_dim, head_dim_v),
        head_dim_v, padded(head_dim_v, head_dim), tiles.block_m, tiles.block_n,
        wide(p, tiles.block_n), twins(p, tiles.block_n), eights(p.q, p.k, p.v, out), *change.flags,
        plan.shares, plan.overlapped,
    )  # fmt: skip
    # Tuned without a limit at head_dim 128, where ptxas spills for the sake of a second program.
    crowded = p.page_size > 0 and tiles.num_warps == 8
    return Launch(
        decode_kernel, plan.programs, POINTERS, constants, tiles.num_warps, tiles.num_stages,
        maxnreg=255 if head_dim <= 64 or head_dim > 128 or crowded else None,
    )  # fmt: skip
