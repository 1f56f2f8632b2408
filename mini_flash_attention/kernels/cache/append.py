"""Write new keys and values into the cache, straight or through the block table.

Keys may be rotated on their way, and queries are then rotated by a launch of their own.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ...plan.append import append
from ...plan.layout import strides
from ...problem import Problem, empty_out
from ...rules import paging, rotary, sequence
from ..launch import SIZES, Launch


@triton.jit(do_not_specialize=SIZES)
def append_kernel(
    new, cache, cu_seqlens_q, seqused, block_table, cache_batch_idx, cos, sin,
    stride_n_b, stride_n_t, stride_n_h,
    stride_c_b, stride_c_t, stride_c_h, stride_table,
    batch, nheads, seqlen_k, appended, total_q, num_pages, cache_rows, rows_cos,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, STILL: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """A program copies one head of BLOCK new tokens of one sequence.

    QUERIES: they are queries, and go to where they come from. STILL: all stand at the first's.
    """
    head = (tl.program_id(0) % nheads).to(tl.int64)
    tile = tl.program_id(0) // nheads
    tokens = appended
    offset_q = 0
    if cu_seqlens_q is None:
        blocks = tl.cdiv(appended, BLOCK)
        b = (tile // blocks).to(tl.int64)
        t = tile % blocks * BLOCK + tl.arange(0, BLOCK)
    else:
        b, block = sequence.find(tile, cu_seqlens_q, batch, total_q, BLOCK)
        b = b.to(tl.int64)
        t = block * BLOCK + tl.arange(0, BLOCK)
        offset_q, tokens = sequence.query_span(b, cu_seqlens_q, total_q)
        tokens = tl.minimum(tokens, appended)
    d = tl.arange(0, D)
    used = seqlen_k - appended
    if seqused is not None:
        used = sequence.used_length(b, seqused, 0, seqlen_k)
    fits = t < tokens
    if not QUERIES:
        fits = fits & (t < seqlen_k - used)
    j = used + tl.where(fits, t, 0)
    from_row = b * stride_n_b + tl.cast(offset_q + t, tl.int64) * stride_n_t + head * stride_n_h
    position = j
    if STILL:
        position = used + tl.zeros_like(t)
    x = rotary.load(
        new, from_row, fits, position, cos, sin, rows_cos,
        HEAD_DIM, D, ROTARY_DIM, INTERLEAVED,
    )  # fmt: skip
    real = fits
    row_c = b
    if cache_batch_idx is not None:
        row_c, there = sequence.cache_row(b, cache_batch_idx, cache_rows)
        row_c = row_c.to(tl.int64)
        if not QUERIES:
            real = fits & there
    if QUERIES:
        row = b * stride_c_b + tl.cast(offset_q + t, tl.int64) * stride_c_t
    elif PAGE_SIZE:
        entry = block_table + row_c * stride_table + j // PAGE_SIZE
        page, real = paging.lookup(entry, real, num_pages)
        row = page.to(tl.int64) * stride_c_b + (j % PAGE_SIZE).to(tl.int64) * stride_c_t
    else:
        row = row_c * stride_c_b + j.to(tl.int64) * stride_c_t
    tl.store(
        cache + head * stride_c_h + row[:, None] + d[None, :],
        x.to(cache.dtype.element_ty),
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
    )


def launches(p: Problem) -> list[Launch]:
    """The launches that append p's new keys and values, and rotate its queries where asked to."""
    k_new, v_new, rotated = p.cache.k_new, p.cache.v_new, p.cache.rotary is not None
    if k_new is None or v_new is None or not p.batch:
        return []
    made = []
    if k_new.numel():
        made.append(_launch(p, "k_new", k_new, "k", p.k, rotated))
    if v_new.numel():
        made.append(_launch(p, "v_new", v_new, "v", p.v, False))
    if rotated and p.q.numel():
        q = empty_out(p.q, device="meta")  # for its strides
        made.append(_launch(p, "given_q", p.q, "q", q, True, queries=True))
    return made


def _launch(
    p: Problem, new_name: str, new: torch.Tensor, cache_name: str, cache: torch.Tensor,
    rotated: bool, queries: bool = False,
) -> Launch:  # fmt: skip
    nheads, head_dim = new.shape[-2:]
    plan = append(p, rotated, queries)
    seqlen_k, table, rotary = p.seqlen_k, p.cache.block_table, p.cache.rotary
    if queries and p.lengths.seqused_k is None:  # the kernel subtracts what it appends
        seqlen_k += plan.tokens - p.cache.appended
    rotary_dim = 2 * rotary.cos.shape[1] if rotated and rotary else 0
    interleaved = bool(rotated and rotary and rotary.interleaved)
    still = bool(queries and rotary and not rotary.moving)
    constants: tuple[Any, ...] = (
        *strides(new), *strides(cache),
        table.stride(0) if table is not None else 0,
        p.batch, nheads, seqlen_k, plan.tokens, p.q.shape[0], p.k.shape[0], p.cache_rows,
        rotary.cos.shape[0] if rotary else 0,
        p.cache.page_size, head_dim, triton.next_power_of_2(head_dim), plan.block,
        rotary_dim, interleaved, still, queries,
    )  # fmt: skip
    pointers = (
        new_name, cache_name, "cu_seqlens_q", "seqused_k", "block_table", "cache_batch_idx",
        *(("rotary_cos", "rotary_sin") if rotated else ("nothing", "nothing")),
    )  # fmt: skip
    return Launch(append_kernel, plan.tiles * nheads, pointers, constants, 1)
