"""Write new keys and values into the cache, straight or through the block table."""

import torch
import triton
import triton.language as tl

from ..problem import Problem
from ..rules import paging, sequence
from .launch import SIZES, Launch, strides


@triton.jit(do_not_specialize=SIZES)
def append_kernel(
    new, cache, seqused, block_table,
    stride_n_b, stride_n_t, stride_n_h,
    stride_c_b, stride_c_t, stride_c_h, stride_table,
    nheads_k, seqlen_k, appended, num_pages,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program copies one head of BLOCK new tokens of one sequence."""
    blocks = tl.cdiv(appended, BLOCK)
    unit = tl.program_id(0) // blocks
    head = (unit % nheads_k).to(tl.int64)
    b = (unit // nheads_k).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    used = seqlen_k - appended
    if seqused is not None:
        used = sequence.used_length(b, seqused, 0, seqlen_k)
    fits = (t < appended) & (t < seqlen_k - used)
    j = used + tl.where(fits, t, 0)
    if PAGE_SIZE:
        entry = block_table + b * stride_table + j // PAGE_SIZE
        page, real = paging.lookup(entry, fits, num_pages)
        row = page.to(tl.int64) * stride_c_b + (j % PAGE_SIZE).to(tl.int64) * stride_c_t
    else:
        real = fits
        row = b * stride_c_b + j.to(tl.int64) * stride_c_t
    tile = tl.load(
        new + b * stride_n_b + head * stride_n_h
        + t.to(tl.int64)[:, None] * stride_n_t + d[None, :],
        mask=fits[:, None] & (d < HEAD_DIM)[None, :],
    )  # fmt: skip
    tl.store(
        cache + head * stride_c_h + row[:, None] + d[None, :],
        tile,
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
    )


def launches(p: Problem) -> list[Launch]:
    """The launches that append p's new keys and values to the caches."""
    if p.k_new is None or p.v_new is None or not p.k_new.numel():
        return []
    return [_launch(p, "k_new", p.k_new, "k", p.k), _launch(p, "v_new", p.v_new, "v", p.v)]


def _launch(
    p: Problem, new_name: str, new: torch.Tensor, cache_name: str, cache: torch.Tensor
) -> Launch:
    num_pages, _, nheads_k, head_dim = cache.shape
    block = 1 if p.appended == 1 else 16
    constants = (
        *strides(new), *strides(cache),
        p.block_table.stride(0) if p.block_table is not None else 0,
        nheads_k, p.seqlen_k, p.appended, num_pages,
        p.page_size, head_dim, triton.next_power_of_2(head_dim), block,
    )  # fmt: skip
    pointers = (new_name, cache_name, "seqused_k", "block_table")
    programs = p.batch * nheads_k * -(-p.appended // block)
    return Launch(append_kernel, programs, pointers, constants, 1)
