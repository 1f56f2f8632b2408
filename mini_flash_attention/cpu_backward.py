"""The backward pass on CPU tensors: the formulas, in PyTorch, one sequence at a time.

Scores are recomputed in fp32 (float64 for float64 tensors), for all heads of a sequence at once.
"""

import torch

from . import cpu, training
from .plan.backward import BackwardTensors
from .problem import Problem
from .rules.window import Window


def run(p: Problem, given: BackwardTensors) -> None:
    """Write delta, dq, dk and dv of a call."""
    wide = torch.promote_types(p.q.dtype, torch.float32)
    delta = (given.dout.to(wide) * given.out.to(wide)).sum(-1).transpose(-1, -2)
    delta = delta if given.dlse is None else delta - given.dlse
    delta = delta.masked_fill(given.lse == float("-inf"), 0.0)
    given.delta.copy_(delta)
    for gradient in (given.dq, given.dk, given.dv):
        gradient.zero_()
    for b in range(p.batch):
        queries, keys = cpu.queries_of(p, b), _keys_of(p, b)
        at = queries if p.lengths.cu_seqlens_q is None else (..., queries)
        q, dout = (x[queries].transpose(0, 1).to(wide) for x in (p.q, given.dout))
        k, v = (x[keys].transpose(0, 1).to(wide) for x in (p.k, p.v))
        if q.numel() and k.numel():
            dq, dk, dv = _sequence(p, b, (q, k, v, dout), given.lse[at], delta[at])
            given.dq[queries] = dq.transpose(0, 1)
            given.dk[keys] = dk.transpose(0, 1)
            given.dv[keys] = dv.transpose(0, 1)


def _keys_of(p: Problem, b: int) -> int | slice:
    """Where in k the keys in use of sequence b lie."""
    lengths, most = p.lengths, p.seqlen_k
    if lengths.cu_seqlens_k is None:
        return b
    if lengths.seqused_k is not None:
        most = min(max(int(lengths.seqused_k[b]), 0), most)
    return cpu.rows_of(b, lengths.cu_seqlens_k, p.k, most)


def _sequence(
    p: Problem, b: int, tensors: tuple[torch.Tensor, ...], lse: torch.Tensor, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq (H, Sq, D), dk and dv (Hk, Sk, D) of sequence b, for q, k, v and dout; lse, delta (H, Sq).

    Selections come before products: 0 times infinity is NaN.
    """
    q, k, v, dout = tensors
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scale, softcap = p.options.softmax_scale, p.scores.softcap
    raw = q @ k.mT * scale
    biased = cpu.biased(p, raw[None], b, 0)
    scores = biased
    if p.scores.score_mod is not None:
        scores = cpu.modified(p, p.scores.score_mod, b, 0, biased)
    scores = scores[0]
    hidden = (scores == float("-inf")) | (lse == float("-inf"))[..., None]
    window = Window(k.shape[1] - q.shape[1], p.options.left, p.options.right, None, k.shape[1])
    visible = cpu.visible(window, q.shape[1], 0)
    hidden = hidden if visible is None else hidden | ~visible
    weights = (scores - lse[..., None]).masked_fill(hidden, float("-inf")).exp()
    used, dp = weights, dout @ v.mT
    if p.options.dropout_p:
        kept = training.kept(p, b, k.shape[1], biased.shape)[0].to(weights.dtype)
        used, dp = weights * kept, dp * kept
    dv = used.mT @ dout
    ds = weights * (dp - delta[..., None])
    if p.scores.score_mod_bwd is not None:
        ds = cpu.modified(p, p.scores.score_mod_bwd, b, 0, ds[None], biased)[0]
    if softcap:
        ds = ds * (1 - torch.tanh(raw / softcap).square())
    ds = ds.masked_fill(hidden, 0.0) * scale
    dq, dk = ds @ k, ds.mT @ q
    dk, dv = (x.unflatten(0, (-1, group)).sum(1) for x in (dk, dv))
    return dq, dk, dv
