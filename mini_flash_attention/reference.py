"""Attention by definition, in float64: the oracle of the tests. It imports nothing of ours.

Written to be read beside the definition, one sequence at a time, not to be fast.
"""

import torch


def attention(
    q: torch.Tensor,  # (seqlen_q, nheads, head_dim)
    k: torch.Tensor,  # (seqlen_k, nheads_k, head_dim)
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: out (seqlen_q, nheads, head_dim) and LSE (nheads, seqlen_q), in dtype."""
    (seqlen_q, nheads, head_dim), (seqlen_k, nheads_k, _) = q.shape, k.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(seqlen_q, nheads, v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full((nheads, seqlen_q), float("-inf"), dtype=dtype, device=q.device)
    visible = visibility(seqlen_q, seqlen_k, causal, window_size).to(q.device)
    rows = visible.any(1)
    if not rows.any():
        return out, lse
    for head in range(nheads):
        served = head // (nheads // nheads_k)
        scores = (q[:, head].to(dtype) @ k[:, served].to(dtype).T) * scale
        scores = scores.masked_fill(~visible, float("-inf"))[rows]
        out[rows, head] = scores.softmax(1) @ v[:, served].to(dtype)
        lse[head, rows] = scores.logsumexp(1)
    return out, lse


def visibility(
    seqlen_q: int, seqlen_k: int, causal: bool, window_size: tuple[int, int]
) -> torch.Tensor:
    """(seqlen_q, seqlen_k) bool: the last query stands on the last key."""
    left, right = window_size
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    stands_on = torch.arange(seqlen_q).unsqueeze(1) + (seqlen_k - seqlen_q)
    distance = torch.arange(seqlen_k).unsqueeze(0) - stands_on
    if left >= 0:
        visible &= distance >= -left
    if causal or right >= 0:
        visible &= distance <= (0 if causal else right)
    return visible


def pages(cache: torch.Tensor, table_row: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens (length, nheads_k, head_dim) of a sequence in a paged cache."""
    page_size = cache.shape[1]
    needed = -(-length // page_size)
    return cache[table_row[:needed].long()].flatten(0, 1)[:length]
