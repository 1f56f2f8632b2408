"""The same three functions on CPU tensors, through PyTorch's scaled_dot_product_attention.

Outside the GPU kernels a well-kept library beats our own code. What is left to do here is to cut
out the keys that are in use, sequence by sequence, and to say who sees whom.
"""

import torch
import torch.nn.functional as F

from .problem import Problem
from .refusals import overlaps_itself


def run(p: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Append p's new keys; (out, softmax_lse or None) of attention then."""
    out = p.new_out()
    lse = (
        None if p.lse_shape is None else torch.empty(p.lse_shape, dtype=torch.float32, device="cpu")
    )
    if p.k_new is not None:
        _append(p)
    lengths = (p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_k, p.block_table)
    if all(x is None for x in lengths):
        k, v = p.k[:, : p.seqlen_k], p.v[:, : p.seqlen_k]
        result, result_lse = _attention(p, p.q, k, v)
        out.copy_(result)
        if lse is not None:
            lse.copy_(result_lse)
        return out, lse
    out.zero_()
    if lse is not None:
        lse.fill_(float("-inf"))
    for b in range(p.batch):
        rows = _rows(b, p.cu_seqlens_q, p.q)
        if p.cu_seqlens_q is None:
            q, out_b, lse_b = p.q[b], out[b], None if lse is None else lse[b]
        else:
            rows = slice(rows.start, min(rows.stop, rows.start + p.seqlen_q))
            q, out_b, lse_b = p.q[rows], out[rows], None if lse is None else lse[:, rows]
        k, v = _keys(p, b)
        result, result_lse = _attention(p, q[None], k[None], v[None])
        out_b.copy_(result[0])
        if lse_b is not None:
            lse_b.copy_(result_lse[0])
    return out, lse


def _attention(
    p: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, Sq, H, D), (B, Sk, Hk, D) -> out (B, Sq, H, D), LSE (B, H, Sq), empty if not wanted."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if overlaps_itself(q):  # SDPA lays its output out like q, which then overwrites itself
        q = q.contiguous()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not seqlen_k or not q.numel():
        empty = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device="cpu")
        return torch.zeros_like(q).transpose(1, 2), empty
    skipped = max(0, seqlen_k - seqlen_q - p.left) if p.left >= 0 else 0
    k, v = k[:, :, skipped:], v[:, :, skipped:]  # what lies before every window
    seen = _seen(p, seqlen_q, seqlen_k, skipped)
    grouped = q.shape[1] != k.shape[1]
    result = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=p.softmax_scale, enable_gqa=grouped
    )
    if seen is not None:
        result = result.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    lse = q.new_empty(0)
    if p.need_lse:
        heads = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q.float() @ heads.float().transpose(-1, -2)) * p.softmax_scale
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        lse = scores.logsumexp(-1)
    return result.transpose(1, 2), lse


def _seen(p: Problem, seqlen_q: int, seqlen_k: int, skipped: int) -> torch.Tensor | None:
    """(seqlen_q, seqlen_k - skipped) bool, True where a query sees a key; None if all see all."""
    if p.left < 0 and p.right < 0:
        return None
    i = torch.arange(seqlen_q, device="cpu")[:, None] + seqlen_k - seqlen_q
    j = torch.arange(skipped, seqlen_k, device="cpu")[None, :]
    seen = torch.ones(seqlen_q, seqlen_k - skipped, dtype=torch.bool, device="cpu")
    if p.left >= 0:
        seen &= j >= i - p.left
    if p.right >= 0:
        seen &= j <= i + p.right
    return seen


def _rows(b: int, cu_seqlens: torch.Tensor | None, x: torch.Tensor) -> slice:
    """Rows of packed x that are sequence b, whatever cu_seqlens holds."""
    if cu_seqlens is None:
        return slice(0, 0)
    total = x.shape[0]
    start = min(max(int(cu_seqlens[b]), 0), total)
    return slice(start, min(max(int(cu_seqlens[b + 1]), start), total))


def _keys(p: Problem, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v (length, nheads_k, head_dim) of sequence b in use; zeros on a page that isn't there."""
    length = p.seqlen_k
    if p.cu_seqlens_k is not None:
        start, end = int(p.cu_seqlens_k[b]), int(p.cu_seqlens_k[b + 1])
        if not p.page_size:
            rows = _rows(b, p.cu_seqlens_k, p.k)
            start, end = rows.start, rows.stop
        length = min(max(end - start, 0), length)
    if p.seqused_k is not None:
        length = min(min(max(int(p.seqused_k[b]), 0), length) + p.appended, length)
    if not p.page_size:
        if p.cu_seqlens_k is not None:
            return p.k[start : start + length], p.v[start : start + length]
        return p.k[b, :length], p.v[b, :length]
    if not p.k.shape[0]:  # no page at all
        shape = (length, *p.k.shape[2:])
        return p.k.new_zeros(shape), p.v.new_zeros(shape)
    j = torch.arange(length, device="cpu")
    page, slot, real = _locate(p, torch.full_like(j, b), j)
    missing = ~real[:, None, None]
    return p.k[page, slot].masked_fill(missing, 0.0), p.v[page, slot].masked_fill(missing, 0.0)


def _locate(
    p: Problem, b: torch.Tensor, j: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages and slots of keys j of sequences b; a page that does not exist becomes page 0."""
    assert p.block_table is not None
    page = p.block_table[b, j // p.page_size].long()
    real = (page >= 0) & (page < p.k.shape[0])
    return page.where(real, 0), j % p.page_size, real


def _append(p: Problem) -> None:
    """Write k_new and v_new into the caches, where they fit."""
    assert p.k_new is not None and p.v_new is not None
    if p.seqused_k is None:
        start = torch.full((p.batch,), p.seqlen_k - p.appended, device="cpu")
    else:
        start = p.seqused_k.clamp(0, p.seqlen_k)
    j = start[:, None] + torch.arange(p.appended, device="cpu")
    b, t = torch.nonzero(j < p.seqlen_k, as_tuple=True)
    j = j[b, t]
    if p.page_size:
        page, slot, real = _locate(p, b, j)
        page, slot, b, t = page[real], slot[real], b[real], t[real]
    else:
        page, slot = b, j
    p.k[page, slot] = p.k_new[b, t]
    p.v[page, slot] = p.v_new[b, t]
