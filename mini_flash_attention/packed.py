"""q, k and v in one tensor, or k and v: flash-attn's packed functions, and states put together.

Arguments not listed are those of `flash_attn_func` and `flash_attn_varlen_func`; so are results and
errors. The parts are views: nothing is copied.
"""

from collections.abc import Callable
from typing import Any

import torch

from .api import Window, flash_attn_func, flash_attn_varlen_func
from .validate import wrong_value
from .validate.tensors import shape, strided_tensor


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None, score_mod: Callable[..., Any] | None = None,
    score_mod_args: tuple[torch.Tensor, ...] = (),
    score_mod_bwd: Callable[..., Any] | None = None, out: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    """Attention of qkv (batch, seqlen, 3, nheads, head_dim)."""
    q, k, v = _parts("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, s_aux=s_aux, learnable_sink=learnable_sink,
        score_mod=score_mod, score_mod_args=score_mod_args, score_mod_bwd=score_mod_bwd, out=out,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None, score_mod: Callable[..., Any] | None = None,
    score_mod_args: tuple[torch.Tensor, ...] = (),
    score_mod_bwd: Callable[..., Any] | None = None, out: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    """Attention of q to kv (batch, seqlen_k, 2, nheads_k, head_dim)."""
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, s_aux=s_aux, learnable_sink=learnable_sink,
        score_mod=score_mod, score_mod_args=score_mod_args, score_mod_bwd=score_mod_bwd, out=out,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | torch.Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, *,
    seqused_q: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None, learnable_sink: torch.Tensor | None = None,
    score_mod: Callable[..., Any] | None = None, score_mod_args: tuple[torch.Tensor, ...] = (),
    score_mod_bwd: Callable[..., Any] | None = None, num_splits: int = 0,
    out: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    """Attention of packed sequences, qkv (total, 3, nheads, head_dim)."""
    q, k, v = _parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, seqused_q=seqused_q,
        seqused_k=seqused_k, s_aux=s_aux, learnable_sink=learnable_sink, score_mod=score_mod,
        score_mod_args=score_mod_args, score_mod_bwd=score_mod_bwd, num_splits=num_splits, out=out,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor, max_seqlen_k: int | torch.Tensor, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *,
    seqused_q: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None, learnable_sink: torch.Tensor | None = None,
    score_mod: Callable[..., Any] | None = None, score_mod_args: tuple[torch.Tensor, ...] = (),
    score_mod_bwd: Callable[..., Any] | None = None, num_splits: int = 0,
    out: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    """Attention of packed sequences to kv (total_k, 2, nheads_k, head_dim)."""
    k, v = _parts("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        seqused_q=seqused_q, seqused_k=seqused_k, s_aux=s_aux, learnable_sink=learnable_sink,
        score_mod=score_mod, score_mod_args=score_mod_args, score_mod_bwd=score_mod_bwd,
        num_splits=num_splits, out=out,
    )  # fmt: skip


def _parts(function: str, name: str, x: Any, rank: int, parts: int) -> Any:
    strided_tensor(function, name, x)
    if x.dim() != rank or x.shape[-3] != parts:
        outer = "batch, seqlen" if rank == 5 else "total"
        wanted = f"shape ({outer}, {parts}, heads, head_dim)"
        raise wrong_value(function, name, wanted, tuple(x.shape))
    return x.unbind(-3)


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention to two sets of keys, from what each gave alone.

    Exact but for rounding. The out of a part that saw no key (LSE -inf) is not read, so it may hold
    NaN; two such parts give 0 and -inf. A sink belongs to one of the parts. Differentiable.

    Args:
        out_a, out_b: (batch, seqlen, nheads, head_dim) or (total, nheads, head_dim).
        lse_a, lse_b: (batch, nheads, seqlen) or (nheads, total), fp32, natural logarithm.

    Raises:
        TypeError, ValueError: a tensor is none, or does not fit.
    """
    function = "merge_attention_states"
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        strided_tensor(function, name, x)
        if x.device != out_a.device:
            raise wrong_value(function, name, f"a tensor on {out_a.device}", x.device)
    if out_a.dim() not in (3, 4):
        raise wrong_value(function, "out_a", "3 or 4 dimensions", tuple(out_a.shape))
    *outer, nheads, _ = out_a.shape
    shape(function, "out_b", out_b, tuple(out_a.shape))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        shape(function, name, lse, (*outer[:-1], nheads, outer[-1]))
    nothing = float("-inf")
    empty = (lse_a == nothing) & (lse_b == nothing)
    # Select before computing: 0 times NaN is NaN, in a gradient too.
    finite_a, finite_b = (x.float().masked_fill(empty, 0.0) for x in (lse_a, lse_b))
    lse = torch.logaddexp(finite_a, finite_b)
    merged = torch.zeros_like(out_a, dtype=torch.float32)
    for out, part in ((out_a, finite_a), (out_b, finite_b)):
        unread = empty | (part == nothing)
        weight = torch.exp(part - lse).masked_fill(unread, 0.0)
        weight, unread = (x.transpose(-1, -2)[..., None] for x in (weight, unread))
        merged = merged + weight * out.float().masked_fill(unread, 0.0)
    return merged.to(out_a.dtype), lse.masked_fill(empty, nothing)
