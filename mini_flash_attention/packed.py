"""q, k and v in one tensor, or k and v: flash-attn's packed functions, and states put together.

Arguments not listed are those of `flash_attn_func` and `flash_attn_varlen_func`; so are results and
errors. The parts are views: nothing is copied.
"""

from typing import Any

import torch

from .api import flash_attn_func, flash_attn_varlen_func
from .refusals import kind_of, refuse


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """Attention of qkv (batch, seqlen, 3, nheads, head_dim). `more`: keywords of flash_attn_func."""
    return flash_attn_func(
        *_parts("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3), dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, **more,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """Attention of q to kv (batch, seqlen_k, 2, nheads_k, head_dim)."""
    return flash_attn_func(
        q, *_parts("flash_attn_kvpacked_func", "kv", kv, 5, 2), dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, **more,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """Attention of packed sequences, qkv (total, 3, nheads, head_dim)."""
    return flash_attn_varlen_func(
        *_parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3), cu_seqlens, cu_seqlens,
        max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs, **more,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """Attention of packed sequences to kv (total_k, 2, nheads_k, head_dim)."""
    return flash_attn_varlen_func(
        q, *_parts("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2), cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs, **more,
    )  # fmt: skip


def _parts(function: str, name: str, x: Any, rank: int, parts: int) -> tuple[torch.Tensor, ...]:
    if not isinstance(x, torch.Tensor):
        refuse(TypeError, function, name, "a torch.Tensor", kind_of(x))
    if x.dim() != rank or x.shape[-3] != parts:
        outer = "batch, seqlen" if rank == 5 else "total"
        wanted = f"shape ({outer}, {parts}, heads, head_dim)"
        refuse(ValueError, function, name, wanted, tuple(x.shape))
    return x.unbind(-3)


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention to two sets of keys, from what each gave alone.

    Exact but for rounding. A part that saw no key (LSE -inf) weighs nothing; two such give 0 and
    -inf. A sink belongs to one of the parts. Differentiable.

    Args:
        out_a, out_b: (batch, seqlen, nheads, head_dim) or (total, nheads, head_dim).
        lse_a, lse_b: (batch, nheads, seqlen) or (nheads, total), fp32, natural logarithm.

    Raises:
        ValueError: shapes do not fit.
    """
    function = "merge_attention_states"
    *outer, nheads, _ = out_a.shape
    wanted = (*outer[:-1], nheads, outer[-1])
    if out_b.shape != out_a.shape:
        refuse(ValueError, function, "out_b", f"shape {tuple(out_a.shape)}", tuple(out_b.shape))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if tuple(lse.shape) != wanted:
            refuse(ValueError, function, name, f"shape {wanted}", tuple(lse.shape))
    lse = torch.logaddexp(lse_a.float(), lse_b.float())
    least = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = (torch.exp(x.float() - least).transpose(-1, -2)[..., None] for x in (lse_a, lse_b))
    parts = zip(weights, (out_a, out_b), strict=True)
    return sum(w * x.float() for w, x in parts).to(out_a.dtype), lse
