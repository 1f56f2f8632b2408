"""Attention of few queries to a long cache: the keys are read once, at the speed of memory.

All query heads that share a KV head, and all query tokens, are packed into the rows of one tile,
so a key is loaded once for all of them. Keys are split among programs, and `combine.py` merges
their partial results. STREAM_K tells how they are split:

- stream-K (`stream_k.py`): equal shares of the whole batch's keys, one for each program that the
  GPU can run at a time, so that all end together, whatever the lengths;
- splits: each sequence by itself, into a number of splits.

Source: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023); equal shares as in Stream-K
(arXiv:2301.03598).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ...plan.decode import Decode, maxnreg
from ...plan.layout import strides
from ...plan.scores import choose_score_mode
from ...problem import Problem
from ...rules import heads, mask, scores, sequence, softmax, split, work
from ...rules.window import Window
from ..launch import MAX_INT, SIZES, Launch, output_strides
from ..portable.attend import attend
from ..portable.loads import (
    KeysValues,
    Strides,
    config,
    hint_divisibility,
    load_rows,
    sequence_start,
)
from . import stream_k


class Tensors(NamedTuple):
    """What a launch reads and writes, from each tensor's beginning."""

    q: Any
    at: Any  # `KeysValues`
    out: Any
    lse: Any
    strides: Any  # `Strides`
    stride_lse_b: Any
    stride_lse_h: Any
    stride_table: Any


class Partials(NamedTuple):
    """Where results of splits go, for `combine.py` to merge."""

    numbers: Any  # fp32: outputs [num_partials, num_rows, D], maxima, sums; or None
    num_partials: Any
    num_rows: Any  # of one


class DecodeTile(NamedTuple):
    """A block of rows of one KV head, and some of the key tiles that its sequence sees."""

    b: Any
    head_k: Any
    block: Any
    low: Any  # its key tiles
    high: Any
    whole: Any  # whether these are all of them
    partial_idx: Any  # of `Partials`, if not


@triton.jit
def slope_of(b, head, row_ok, inputs):
    """ALiBi's slopes of rows' heads [M, 1]."""
    slopes = inputs.alibi_slopes + b.to(tl.int64) * inputs.stride_slopes + head
    return tl.load(slopes, mask=row_ok, other=0.0)[:, None]


@triton.jit
def sink_of(head, row_ok, whole, inputs):
    """The sinks of rows' heads; -inf for a split, because `combine` adds them at the end."""
    sink = tl.load(inputs.s_aux + head, mask=row_ok, other=0.0).to(tl.float32)
    return tl.where(whole, sink, float("-inf"))


@triton.jit
def store_partial(m, l, o, place, partials, row_ok, wanted, C: tl.constexpr):
    """Leave the state of rows for `combine.py`: outputs first, then all maxima, then all sums."""
    d_v = tl.arange(0, C.D_V)
    tl.store(partials.numbers + place[:, None] * C.HEAD_DIM_V + d_v[None, :], o, mask=wanted)
    all_rows = partials.num_partials.to(tl.int64) * partials.num_rows
    maxima = partials.numbers + all_rows * C.HEAD_DIM_V
    tl.store(maxima + place, m, mask=row_ok)
    tl.store(maxima + all_rows + place, l, mask=row_ok)


@triton.jit
def decode_tiles(
    work_tile, group, tensors, partials, batch, inputs, C: tl.constexpr, SCORE_MOD: tl.constexpr
):
    """Attention of a `DecodeTile`, to out and lse if it is whole, else to a partial result."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    D_V: tl.constexpr = C.D_V
    lengths, s = batch.lengths, tensors.strides
    # Which keys are mine, and which rows? Row r is query token r // group of head r % group in the
    # KV head's group.
    key_range = stream_k.key_range(work_tile.b, batch, BLOCK_N)
    length_q, length_k = key_range.length_q, key_range.length_k
    first_key = lengths.cache_leftpad
    if lengths.cache_leftpad is not None:
        first_key = sequence.first_key(work_tile.b, lengths.cache_leftpad, length_k)
    window = Window(length_k - length_q, batch.left, batch.right, first_key, length_k)
    num_rows = length_q * group
    local = tl.arange(0, BLOCK_M)
    row = work_tile.block * BLOCK_M + local
    i, member = heads.unpack(row, group)
    head_k = work_tile.head_k.to(tl.int64)
    head = head_k * group + member

    first_query = work_tile.block * BLOCK_M // group
    last_query = tl.minimum((work_tile.block * BLOCK_M + BLOCK_M - 1) // group, length_q - 1)
    seen = mask.n_block_range(first_query, last_query, window, BLOCK_N)
    begin = tl.maximum(seen.begin, key_range.begin + work_tile.low * BLOCK_N)
    end = tl.minimum(seen.end, key_range.begin + work_tile.high * BLOCK_N)
    seen = mask.KeyBlocks(begin, seen.full_begin, seen.full_end, end)

    slope, sink = inputs.alibi_slopes, inputs.s_aux
    if inputs.alibi_slopes is not None:
        slope = slope_of(work_tile.b, head, row < num_rows, inputs)
    if inputs.s_aux is not None:
        sink = sink_of(head, row < num_rows, work_tile.whole, inputs)
    modification = scores.Modification(inputs.factor, inputs.softcap, slope, inputs.aux)
    scoring = scores.Scoring(inputs.scale, work_tile.b, head[:, None], modification, None)

    b = work_tile.b.to(tl.int64)
    q, out, lse = tensors.q, tensors.out, tensors.lse
    if lengths.cu_seqlens_q is not None:
        q += tl.cast(key_range.offset_q, tl.int64) * s.q_t
        out += tl.cast(key_range.offset_q, tl.int64) * s.o_t
        if lse is not None:
            lse += key_range.offset_q
    q += b * s.q_b
    q_offsets = i.to(tl.int64) * s.q_t + head * s.q_h
    q_tile = load_rows(q, q_offsets, row < num_rows, False, C.HEAD_DIM, C.D)
    row_k = b
    if lengths.cache_batch_idx is not None:
        row_k = work.cache_row(b, lengths, length_k)[0].to(tl.int64)
    at = tensors.at
    k, v = sequence_start(at.k, at.v, s, head_k, row_k, key_range.offset_k, C)
    block_table = at.block_table
    if C.PAGE_SIZE:
        block_table += row_k * tensors.stride_table
    at = KeysValues(k, v, s.k_t, s.v_t, s.k_b, s.v_b, block_table, at.num_pages)

    # One loop with a mask: its cost is hidden behind the loads, and between two loops no load would
    # be in flight.
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M] if BLOCK_M * BLOCK_N >= 4096 else [BLOCK_M, BLOCK_N], tl.float32)
    o = tl.zeros([BLOCK_M, D_V], tl.float32)
    m, l, o = attend(m, l, o, q_tile, i, seen, True, at, window, scoring, C, SCORE_MOD)
    if len(l.shape) == 2:
        l = tl.sum(l, 1)
    o, lse_tile = softmax.finish(m, l, o, inputs.scale, sink)
    d_v = tl.arange(0, D_V)
    wanted = (row < num_rows)[:, None] & (d_v < C.HEAD_DIM_V)[None, :]
    if work_tile.whole:
        out += b * s.o_b
        tl.store(
            out + (i.to(tl.int64) * s.o_t + head * s.o_h)[:, None] + d_v[None, :],
            o.to(out.dtype.element_ty),
            mask=wanted,
        )
        if lse is not None:
            lse_rows = lse + b * tensors.stride_lse_b + head * tensors.stride_lse_h + i
            tl.store(lse_rows, lse_tile, mask=row < num_rows)
    elif partials.numbers is not None:
        place = work_tile.partial_idx.to(tl.int64) * partials.num_rows + local
        store_partial(m, l, o, place, partials, row < num_rows, wanted, C)


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q, k, v, out, lse, partials, fixup,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table,
    cache_batch_idx, cache_leftpad, alibi_slopes, s_aux, aux,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_o_b, stride_o_t, stride_o_h,
    stride_lse_b, stride_lse_h, stride_table,
    batch, nheads_k, group, splits, split_tiles, num_partials, partial_rows,
    seqlen_q, seqlen_k, total_q, total_k, num_pages, cache_rows, scale, left, right, appended,
    stride_slopes, factor, softcap,
    C: tl.constexpr, SCORE_MOD: tl.constexpr, STREAM_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # `combine` may be scheduled as soon as there is room, and waits in gdc_wait
        gdc_launch_dependents()
    strides = hint_divisibility(
        Strides(
            stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
            stride_v_b, stride_v_t, stride_v_h, stride_o_b, stride_o_t, stride_o_h,
        ),
        C,
    )  # fmt: skip
    lengths = sequence.Lengths(
        cu_seqlens_q, seqused_q, seqlen_q, total_q, cu_seqlens_k, seqused_k, seqlen_k, total_k,
        appended, cache_batch_idx, cache_leftpad, cache_rows,
    )  # fmt: skip
    at = KeysValues(
        k, v, strides.k_t, strides.v_t, strides.k_b, strides.v_b, block_table, num_pages
    )
    tensors = Tensors(q, at, out, lse, strides, stride_lse_b, stride_lse_h, stride_table)
    sequences = stream_k.Batch(batch, lengths, left, right)
    inputs = scores.Inputs(scale, factor, softcap, aux, alibi_slopes, stride_slopes, s_aux)
    partials_ = Partials(partials, num_partials, partial_rows)
    program = tl.program_id(0)
    blocks = tl.cdiv(seqlen_q * group, C.BLOCK_M)
    if STREAM_K:
        # Programs of one share are neighbours, so that all heads of a key are read together.
        block = program % blocks
        head_k = program // blocks % nheads_k
        share = program // blocks // nheads_k
        total = stream_k.count(sequences, C.BLOCK_N)
        cuts = tl.minimum(splits, total)
        tile, stop = split.share(total, share, cuts)
        b, before = stream_k.find(tile, sequences, C.BLOCK_N)
        crossed = 0  # shares spanned by the sequence that continues after this one
        # Lengths that another stream changes meanwhile may spoil results, but lead nowhere else.
        while (tile < stop) & (b < batch):
            tiles = stream_k.key_range(b, sequences, C.BLOCK_N).tiles
            low = tile - before
            high = tl.minimum(tiles, low + stop - tile)
            begins = low == 0
            if begins & (high < tiles):  # continues in the next shares
                crossed = split.share_of(before + tiles - 1, total, cuts) - share + 1
                crossed = tl.minimum(crossed, cuts - share)
                tl.store(fixup + 2 * program, b)
            partial_idx = 2 * program + begins.to(tl.int32)
            work_tile = DecodeTile(
                b, head_k, block, low, high, begins & (high == tiles), partial_idx
            )
            decode_tiles(work_tile, group, tensors, partials_, sequences, inputs, C, SCORE_MOD)
            before += tiles
            tile += high - low
            b += 1
        tl.store(fixup + 2 * program + 1, crossed)
    else:
        part = program % splits
        block = program // splits % blocks
        head_k = program // splits // blocks % nheads_k
        b = program // splits // blocks // nheads_k
        tiles = stream_k.key_range(b, sequences, C.BLOCK_N).tiles
        size = split_tiles
        if size == 0:
            size = tl.cdiv(tiles, splits)
        low, high = split.part(tiles, size, part)
        work_tile = DecodeTile(b, head_k, block, low, high, splits == 1, program)
        decode_tiles(work_tile, group, tensors, partials_, sequences, inputs, C, SCORE_MOD)


POINTERS = (
    "q", "k", "v", "out", "lse", "partials", "fixup", "cu_seqlens_q", "cu_seqlens_k", "seqused_q",
    "seqused_k", "block_table", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "s_aux", "aux",
)  # fmt: skip


def workspace(p: Problem, plan: Decode) -> dict[str, int]:
    """Elements of `partials` (fp32: outputs [num_partials, rows, D], maxima, sums) and `fixup`.

    fixup (int32) holds a record for each program: which sequence begins in its share and continues
    in the next one, and how many shares that sequence spans; 0 if there is none.
    """
    elements = {"fixup": 2 * plan.programs} if plan.stream_k else {}
    elements["partials"] = plan.num_partials * plan.rows * (p.v.shape[-1] + 2)
    return elements if elements["partials"] else {}


def launch(p: Problem, out: torch.Tensor, lse: torch.Tensor | None, plan: Decode) -> Launch:
    """The launch that writes attention of p to out and lse, or to partials where keys are split."""
    tiles, score_mode = plan.tiles, choose_score_mode(p)
    total_k = MAX_INT if p.cache.page_size else p.k.shape[0]
    constants = (
        *strides(p.q), *strides(p.k), *strides(p.v), *output_strides(p, out, lse),
        p.batch, p.k.shape[-2], p.group, plan.splits, plan.split_tiles, plan.num_partials,
        plan.rows, p.seqlen_q, p.seqlen_k, p.q.shape[0], total_k, p.k.shape[0], p.cache_rows,
        score_mode.scale, p.options.left, p.options.right, p.cache.appended, *score_mode.numbers,
        config(p, out, tiles, score_mode.mode), p.scores.score_mod, plan.stream_k, plan.overlapped,
    )  # fmt: skip
    return Launch(
        decode_kernel, plan.programs, POINTERS, constants, tiles.num_warps, tiles.num_stages,
        maxnreg=maxnreg(p, tiles),
    )  # fmt: skip
