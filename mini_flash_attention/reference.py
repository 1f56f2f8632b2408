"""Attention by definition, in float64: the oracle of the tests. It imports nothing of ours.

Written to be read beside the definition, one sequence at a time, not to be fast.
"""

from collections.abc import Callable

import torch


def attention(
    q: torch.Tensor,  # (seqlen_q, nheads, head_dim)
    k: torch.Tensor,  # (seqlen_k, nheads_k, head_dim)
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,  # (nheads,)
    s_aux: torch.Tensor | None = None,  # (nheads,)
    score_mod: Callable[..., torch.Tensor] | None = None,
    batch: int = 0,  # the number that score_mod knows the sequence by
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: out (seqlen_q, nheads, head_dim) and LSE (nheads, seqlen_q), in dtype.

    score_mod takes (score, batch, head, q_idx, kv_idx) as tensors that broadcast.
    """
    (seqlen_q, nheads, head_dim), (seqlen_k, nheads_k, _) = q.shape, k.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    visible = visibility(seqlen_q, seqlen_k, causal, window_size).to(q.device)
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))  # heads first
    k, v = (x.repeat_interleave(nheads // nheads_k, 0) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(seqlen_q, device=q.device)[:, None] + (seqlen_k - seqlen_q)
    j = torch.arange(seqlen_k, device=q.device)[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * (i - j).abs()
    if score_mod is not None:
        heads = torch.arange(nheads, device=q.device)[:, None, None]
        number = torch.tensor(batch, device=q.device)
        scores = score_mod(scores, number, heads, i.clamp(min=0), j).to(dtype)
    scores = scores.masked_fill(~visible, float("-inf"))
    empty = (scores == float("-inf")).all(2)  # softmax would make NaN of what sees nothing
    if s_aux is not None:  # a key more, without a value
        sink = s_aux.to(dtype)[:, None, None].expand(nheads, seqlen_q, 1)
        scores = torch.cat([scores, sink], 2)
        v = torch.cat([v, v.new_zeros(nheads, 1, v.shape[2])], 1)
    out = (scores.softmax(2) @ v).masked_fill(empty[:, :, None], 0.0)
    lse = scores.logsumexp(2).masked_fill(empty, float("-inf"))
    return out.transpose(0, 1), lse


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
