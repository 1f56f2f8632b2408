"""Scores as models have them: what becomes of random normal inputs.

The scores of random normal queries and keys have mean 0 and standard deviation 1, for
softmax_scale is ``head_dim ** -0.5``. Below, some channels are set apart for a pattern that all
queries share, and the others go on giving such scores. So what a pattern adds is known up to
rounding to bf16.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from bench.model_scores import OUT
from bench.workloads import NORMAL, Tensors, Workload

KEYS = 10  # that stand out anywhere, in each KV head
CHANNEL = 0  # where they stand out
ROTARY_BASE = 10_000.0


def shape(workload: Workload, tensors: Tensors, generator: torch.Generator) -> Tensors:
    """Random normal tensors, changed to what the workload's data are."""
    if workload.data == NORMAL:
        return tensors
    if workload.data.kind == "model":
        return of_model(workload, tensors)
    if workload.data.kind == "recency":
        recent(workload, tensors)
        return tensors
    batch, seqlen_k, heads_k, _ = tensors.k.shape
    if workload.data.kind == "first":
        positions = torch.zeros(batch, 1, heads_k, dtype=torch.long, device=tensors.k.device)
    else:
        draws = torch.rand(batch, seqlen_k, heads_k, generator=generator, device=tensors.k.device)
        positions = draws.topk(KEYS, dim=1).indices
    stand_out(workload, tensors, positions)
    return tensors


def stand_out(workload: Workload, tensors: Tensors, positions: torch.Tensor) -> None:
    """Let keys at these positions, [batch, keys, heads_k], score ``nats`` with every query.

    One channel is 1 in all queries. These keys are 0 in all other channels, and all other keys are
    0 in this one.
    """
    data, k = workload.data, tensors.k
    q = tensors.q.unflatten(2, (workload.heads_k, -1))  # [batch, seqlen_q, heads_k, group, D]
    q[:, :, :: data.one_in, :, CHANNEL] = 1
    k[:, :, :: data.one_in, CHANNEL] = 0
    key = torch.zeros_like(k[0, 0, 0])
    key[CHANNEL] = data.nats * workload.head_dim**0.5
    entries = torch.arange(workload.batch, device=k.device)[:, None, None]
    heads = torch.arange(0, workload.heads_k, data.one_in, device=k.device)
    k[entries, positions[:, :, heads], heads] = key


def fall(distance: torch.Tensor, head_dim: int) -> torch.Tensor:
    """By how much of ``nats`` a key at this distance outscores one that is far away.

    1 at distance 0. The mean of the cosines falls about as the logarithm of the distance does.
    """
    return torch.cos(distance.double()[..., None] * frequencies(head_dim, distance.device)).mean(-1)


def frequencies(head_dim: int, device: torch.device) -> torch.Tensor:
    pairs = head_dim // 4
    return ROTARY_BASE ** -(torch.arange(pairs, device=device).double() / pairs)


def recent(workload: Workload, tensors: Tensors) -> None:
    """Let scores fall with distance, from ``nats`` on, as rotary embeddings do it.

    Half of the channels hold one vector for all queries and keys, turned by their positions. The
    others are enlarged, so that what they add to scores still has standard deviation 1.
    """
    seqlen_q, seqlen_k = workload.seqlens_q[0], workload.seqlens_k[0]
    device, half = tensors.q.device, workload.head_dim // 2
    theta = frequencies(workload.head_dim, device)
    size = (workload.data.nats * workload.head_dim**0.5 / len(theta)) ** 0.5
    for x, start in ((tensors.q, seqlen_k - seqlen_q), (tensors.k, 0)):
        positions = torch.arange(start, start + x.shape[1], device=device)
        angles = positions[:, None] * theta  # [seqlen, pairs]
        turned = size * torch.cat([angles.cos(), angles.sin()], dim=-1)
        x[..., :half] = turned[:, None].to(x.dtype)
        x[..., half:] *= 2**0.25


@cache
def recorded() -> dict[str, Any]:
    """What ``model_scores.py`` wrote. Only the layers that are used are read."""
    found: dict[str, Any] = torch.load(OUT, mmap=True, weights_only=True)
    return found


def missing(workload: Workload) -> str | None:
    """Why the workload's data can't be had here, or None."""
    if workload.data.kind != "model" or OUT.exists():
        return None
    return f"no {OUT.parent.name}/{OUT.name} (python -m bench.model_scores writes it)"


def of_model(workload: Workload, tensors: Tensors) -> Tensors:
    """A layer's q, k and v, the same for each sequence of the batch."""
    copies = {}
    for name in ("q", "k", "v"):
        like, layer = getattr(tensors, name), recorded()[name][workload.data.layer]
        if like.shape[1:] != layer.shape:
            expected, got = tuple(like.shape[1:]), tuple(layer.shape)
            raise ValueError(f"{workload.name}: {name} of the model is {got}, expected {expected}")
        copies[name] = layer.to(like).expand(like.shape).contiguous()
    return replace(tensors, **copies)
