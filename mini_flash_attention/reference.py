"""Attention by definition, in float64: the oracle of the tests. It imports nothing of ours.

Written to be read beside the definition, one sequence at a time, not to be fast.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

ScoreMod = Callable[..., torch.Tensor]
NOTHING = float("-inf")  # a score that is not seen, and the LSE where none is


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
    score_mod: ScoreMod | None = None,
    batch: int = 0,  # the number that score_mod knows the sequence by
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: out (seqlen_q, nheads, head_dim) and LSE (nheads, seqlen_q), in dtype.

    score_mod takes (score, batch, head, q_idx, kv_idx) as tensors that broadcast.
    """
    q, k, v = _by_head(dtype, q, k, v)
    options = (softmax_scale, causal, window_size, softcap, alibi_slopes, score_mod, batch)
    weights = _softmax(_scores(q, k, *options).final, s_aux)
    out = (weights.of_keys @ v).masked_fill(weights.empty[:, :, None], 0.0)
    return out.transpose(0, 1), weights.lse


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
    dlse: torch.Tensor | None = None, s_aux: torch.Tensor | None = None,
    score_mod: ScoreMod | None = None, score_mod_bwd: Any = None, batch: int = 0,
    dtype: torch.dtype = torch.float64, **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The gradients of q, k, v and s_aux, in dtype, for those of a sequence's out and LSE.

    With P the weights, S the scaled scores, and delta the row sums of dO * O, less dLSE:

        dV = Pᵀ dO      dP = dO Vᵀ      dS = P * (dP - delta)      dQ = dS K      dK = dSᵀ Q

    Between the last two steps dS goes back through what has changed the scores, and is scaled. A
    sink is a score whose dP is 0. Where nothing is seen dS is 0, whatever dP is.

    score_mod_bwd takes (grad, score, batch, head, q_idx, kv_idx), with the score that score_mod is
    given; a score_mod needs one. Other arguments are those of `attention`.
    """
    nheads_k = k.shape[1]
    q, k, v, dout = _by_head(dtype, q, k, v, dout)
    scores = _scores(q, k, score_mod=score_mod, batch=batch, **options)
    weights = _softmax(scores.final, s_aux)
    out = (weights.of_keys @ v).masked_fill(weights.empty[:, :, None], 0.0)
    delta = (dout * out).sum(2) if dlse is None else (dout * out).sum(2) - dlse.to(dtype)
    dv = weights.of_keys.mT @ dout
    ds = weights.of_keys * (dout @ v.mT - delta[:, :, None])
    if score_mod is not None:
        ds = score_mod_bwd(ds, scores.biased, *_places(ds, batch)).to(dtype)
    # Select before the products: 0 times infinity is NaN.
    ds = (ds * scores.slope).masked_fill(scores.final == NOTHING, 0.0)
    dq, dk = ds @ k, ds.mT @ q
    dk, dv = (x.unflatten(0, (nheads_k, -1)).sum(1) for x in (dk, dv))
    dq, dk, dv = (x.transpose(0, 1) for x in (dq, dk, dv))
    ds_aux = -(weights.of_sink * delta).masked_fill(weights.empty, 0.0).sum(1)
    return dq, dk, dv, None if s_aux is None else ds_aux


class Scores(NamedTuple):
    """Scores (nheads, seqlen_q, seqlen_k), step by step."""

    biased: torch.Tensor  # after soft cap and ALiBi
    slope: torch.Tensor | float  # their derivative by q kᵀ
    final: torch.Tensor  # after score_mod and mask


class Weights(NamedTuple):
    """What a softmax makes of them."""

    of_keys: torch.Tensor  # 0 where nothing is seen
    of_sink: torch.Tensor  # (nheads, seqlen_q), as are the others
    lse: torch.Tensor
    empty: torch.Tensor  # whether a query sees no key


def _by_head(dtype: torch.dtype, q: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Tensors in dtype, heads first, each KV head as often as it serves a query head."""
    heads_first = [x.to(dtype).transpose(0, 1) for x in (q, *others)]
    return [x.repeat_interleave(q.shape[1] // x.shape[0], 0) for x in heads_first]


def _scores(
    q: torch.Tensor, k: torch.Tensor, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, score_mod: ScoreMod | None = None, batch: int = 0,
) -> Scores:  # fmt: skip
    slope: torch.Tensor | float = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    biased = q @ k.mT * slope
    if softcap:
        capped = torch.tanh(biased / softcap)
        biased, slope = softcap * capped, slope * (1 - capped.square())
    i, j = _stands(biased)
    if alibi_slopes is not None:
        biased = biased - alibi_slopes.to(q.dtype)[:, None, None] * (i - j).abs()
    final = biased if score_mod is None else score_mod(biased, *_places(biased, batch))
    visible = visibility(q.shape[1], k.shape[1], causal, window_size).to(q.device)
    return Scores(biased, slope, final.to(q.dtype).masked_fill(~visible, NOTHING))


def _stands(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where queries and keys stand: the last query on the last key."""
    _, seqlen_q, seqlen_k = scores.shape
    i = torch.arange(seqlen_q, device=scores.device)[:, None] + (seqlen_k - seqlen_q)
    return i, torch.arange(seqlen_k, device=scores.device)[None, :]


def _places(scores: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """What a score_mod is told of scores: (batch, head, q_idx, kv_idx)."""
    i, j = _stands(scores)
    heads = torch.arange(scores.shape[0], device=scores.device)[:, None, None]
    return torch.tensor(batch, device=scores.device), heads, i.clamp(min=0), j


def _softmax(scores: torch.Tensor, s_aux: torch.Tensor | None) -> Weights:
    empty = (scores == NOTHING).all(2)  # softmax would make NaN of what sees nothing
    seqlen_k = scores.shape[2]
    if s_aux is not None:  # a key more, without a value
        sink = s_aux.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, sink], 2)
    weights = scores.softmax(2).masked_fill(empty[:, :, None], 0.0)
    lse = scores.logsumexp(2).masked_fill(empty, NOTHING)
    return Weights(weights[:, :, :seqlen_k], weights[:, :, seqlen_k:].sum(2), lse, empty)


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
