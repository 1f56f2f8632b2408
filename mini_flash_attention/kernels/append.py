"""Write new keys and values into the cache, straight or through the block table."""

import torch
import triton
import triton.language as tl

from ..problem import Problem
from ..rules import paging, sequence
from .strides import strides


@triton.jit(do_not_specialize=["stride_table", "nheads_k", "seqlen_k", "appended", "num_pages"])
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
    if seqused is None:
        j = seqlen_k - appended + t
    else:
        j = sequence.used_length(b, seqused, 0, seqlen_k) + t
    fits = (t < appended) & (j < seqlen_k)
    if PAGE_SIZE:
        page, slot, real = paging.locate(
            j, fits, block_table + b * stride_table, num_pages, PAGE_SIZE
        )
        row = page * stride_c_b + slot * stride_c_t
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


def launch(p: Problem) -> None:
    """Append p.k_new and p.v_new to the caches p.k and p.v, one launch each."""
    assert p.k_new is not None and p.v_new is not None
    head_dim = p.k.shape[-1]
    for new, cache in ((p.k_new, p.k), (p.v_new, p.v)):
        _append(p, new, cache, head_dim)


def _append(p: Problem, new: torch.Tensor, cache: torch.Tensor, head_dim: int) -> None:
    nheads_k = cache.shape[-2]
    block = 1 if p.appended == 1 else 16
    table = p.block_table
    append_kernel[(p.batch * nheads_k * -(-p.appended // block),)](
        new, cache, p.seqused_k, table,
        *strides(new), *strides(cache), 0 if table is None else table.stride(0),
        nheads_k, p.seqlen_k, p.appended, cache.shape[0],
        PAGE_SIZE=p.page_size, HEAD_DIM=head_dim, D=triton.next_power_of_2(head_dim), BLOCK=block,
        num_warps=1,
    )  # fmt: skip
