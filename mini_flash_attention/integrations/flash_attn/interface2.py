"""Stands in for parts of `flash_attn.flash_attn_interface` that need a form of their own there.

These are flash-attn 1's names for packed sequences, with its arguments in its order,
`flash_attn_with_kvcache`, and two helpers. Results are as in this package's functions of the newer
names: softmax_lse is (nheads, total_q), where flash-attn 1 returned (batch, nheads, seqlen).
"""

from typing import Any

import torch

from ... import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ... import flash_attn_with_kvcache as kvcache
from ...api import Window
from ...validate import invalid


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
    **more: Any,
) -> Any:
    """This package's `flash_attn_with_kvcache`; more: its other keywords.

    The signature leaves them out because transformers reads it: a `max_seqlen_q` there means
    FlashAttention-3, and it would pass one beside queries that are not packed.
    """
    return kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, softmax_scale, causal, window_size, softcap,
        rotary_interleaved, alibi_slopes, num_splits, return_softmax_lse, s_aux=s_aux, **more,
    )  # fmt: skip


def flash_attn_unpadded_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """`flash_attn_varlen_func` by its old name.

    With `causal`, flash-attn 1 let query i see the keys up to key i, and this package lets the last
    query see the last key. The two agree where queries and keys have the same length.

    Raises:
        NotImplementedError: causal, with fewer or more queries than keys.
    """
    _same_lengths("flash_attn_unpadded_func", causal, q, k, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_unpadded_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """`flash_attn_varlen_kvpacked_func` by its old name; see `flash_attn_unpadded_func`."""
    _same_lengths("flash_attn_unpadded_kvpacked_func", causal, q, kv, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_kvpacked_func(
        q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_unpadded_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """`flash_attn_varlen_qkvpacked_func` by its old name."""
    return flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def _same_lengths(
    function: str, causal: bool, q: torch.Tensor, k: torch.Tensor, longest_q: int, longest_k: int
) -> None:
    """Refuse a causal mask that flash-attn 1 and this package understand differently."""
    if causal and (longest_q != longest_k or q.shape[0] != k.shape[0]):
        got = (
            f"{q.shape[0]} queries, at most {longest_q}, and {k.shape[0]} keys, at most {longest_k}"
        )
        hint = "flash_attn_varlen_func lets the last query see the last key"
        wanted = "False where queries and keys differ in length"
        raise invalid(NotImplementedError, function, "causal", wanted, got, hint)


def maybe_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """x with a contiguous last dimension, copied only if it has none; None stays None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def round_multiple(x: int, m: int) -> int:
    """The least multiple of m that is x or more."""
    return -(-x // m) * m
