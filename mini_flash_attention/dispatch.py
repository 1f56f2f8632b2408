"""From a checked call to the code that computes it: outputs, append, then one of the kernels.

With TRITON_INTERPRET=1 (Triton's own switch, set before Triton is imported) CPU tensors go
through the GPU kernels too, in Triton's interpreter: slow, and open to a debugger.
"""

import os

import torch

from . import cpu, plan
from .problem import Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32_TINY = torch.finfo(torch.float32).tiny


def run(p: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, softmax_lse or None) of a call; its new keys are in the cache afterwards."""
    out = torch.empty_like(p.q) if p.out is None else p.out
    lse = None
    if p.need_lse:
        nheads = p.q.shape[-2]
        packed = p.cu_seqlens_q is not None
        shape = (nheads, p.q.shape[0]) if packed else (p.batch, nheads, p.seqlen_q)
        lse = torch.empty(shape, dtype=torch.float32, device=p.q.device)
    if p.softmax_scale < FLOAT32_TINY:
        # The online softmax tracks the largest raw score, which is the largest scaled one only
        # for a positive scale, so the sign goes into q.
        zero = p.softmax_scale > -FLOAT32_TINY
        q = torch.zeros_like(p.q) if zero else -p.q
        p = p._replace(q=q, softmax_scale=1.0 if zero else -p.softmax_scale)
    if not (p.q.is_cuda or INTERPRETED):
        cpu.run(p, out, lse)
    elif p.q.is_cuda and torch.cuda.current_device() != p.q.device.index:
        with torch.cuda.device(p.q.device):
            _launch(p, out, lse)
    else:
        _launch(p, out, lse)
    return out, lse


def _launch(p: Problem, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    from .kernels import append, combine, decode, forward

    gpu = plan.gpu(p.q.device)
    if p.k_new is not None and p.k_new.numel():
        append.launch(p)
    if not out.numel():
        return
    if not plan.decodes(p):
        forward.launch(p, out, lse, plan.forward(p, gpu))
        return
    parts = decode.launch(p, out, lse, plan.decode(p, gpu))
    if parts is not None:
        combine.launch(p, parts, out, lse)
