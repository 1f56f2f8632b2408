"""Stands in for `flash_attn_interface`, FlashAttention-3's module: its argument names and order.

Results are FlashAttention-3's: out alone, or `(out, softmax_lse)`; `flash_attn_with_kvcache` with
`return_softmax_lse` returns `(out, softmax_lse, out_accum, softmax_lse_accum)`, the last two empty.
Shapes, dtypes and errors are those of this package's functions of the same names.

`pack_gqa`, `sm_margin` and `scheduler_metadata` are hints that change no result; they are accepted
and ignored. `deterministic` concerns the backward pass alone. `num_splits` means the same to both:
0 decides from the shapes, 1 splits no keys, so that a sequence gets bitwise the same result in
every batch, and more than 128 counts as 128. `flash_attn_func` ignores it and always decides
itself; where the bits matter, `flash_attn_with_kvcache(q, k, v, num_splits=1)` computes the same.
`qv`, the descales and `attention_chunk` are refused. `s_aux`, this package's attention sinks, is an
addition.
"""

from typing import Any

import torch

from ... import flash_attn_func as dense
from ... import flash_attn_varlen_func as varlen
from ... import flash_attn_with_kvcache as kvcache
from ...api import Window
from ...validate import not_implemented, wrong_type, wrong_value
from ...validate.tensors import shape, strided_tensor

MAX_SPLITS = 128  # of this package; FlashAttention-3 has 256


def _refuse(function: str, attention_chunk: int = 0, **others: Any) -> None:
    """Refuse what would change the result and is not implemented."""
    if attention_chunk:
        raise not_implemented(function, "attention_chunk", "0")
    for name, x in others.items():
        if x is not None:
            raise not_implemented(function, name, "None")


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Attention of a batch of sequences of one length; see this package's `flash_attn_func`.

    Returns:
        out, or with `return_attn_probs` `(out, softmax_lse)`, softmax_lse
        (batch, nheads, seqlen_q).
    """
    _refuse(
        "flash_attn_func", attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale,
    )  # fmt: skip
    result = dense(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, deterministic=deterministic, return_attn_probs=return_attn_probs,
        s_aux=s_aux,
    )  # fmt: skip
    return result[:2] if return_attn_probs else result


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q, k and v in one tensor; nothing is copied.

    Args:
        qkv: (batch, seqlen, 3, nheads, head_dim), or
            (batch, seqlen, num_heads_q + 2 * nheads_k, head_dim) with `num_heads_q`.

    Raises:
        ValueError: qkv is neither.
    """
    function = "flash_attn_qkvpacked_func"
    strided_tensor(function, "qkv", qkv)
    heads = num_heads_q or 0
    rest = qkv.shape[2] - heads if qkv.dim() > 2 else 0
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k, v = qkv.unbind(2)
    elif qkv.dim() == 4 and heads > 0 and rest > 0 and rest % 2 == 0:
        q, k, v = qkv.split((heads, rest // 2, rest // 2), 2)
    else:
        wanted = "(batch, seqlen, 3, nheads, head_dim), or 4 dimensions with num_heads_q"
        got = f"{tuple(qkv.shape)} with num_heads_q={num_heads_q}"
        raise wrong_value(function, "qkv", wanted, got)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size,
        attention_chunk, softcap, deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Attention of packed sequences; see this package's `flash_attn_varlen_func`.

    Args:
        seqused_q, seqused_k: (batch,), int32: queries and keys of each sequence in use. Queries
            past that give 0 and an LSE of -inf; keys past that are not seen.

    Returns:
        out, or with `return_attn_probs` `(out, softmax_lse)`, softmax_lse (nheads, total_q).
    """
    _refuse(
        "flash_attn_varlen_func", attention_chunk, qv=qv, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    result = varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs, seqused_q=seqused_q,
        seqused_k=seqused_k, s_aux=s_aux, num_splits=_splits(num_splits),
    )  # fmt: skip
    return result[:2] if return_attn_probs else result


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """Attention of new tokens to a KV cache; see this package's `flash_attn_with_kvcache`.

    Args:
        page_table: (batch, max_blocks), int32, or (batch_cache, max_blocks) with
            `cache_batch_idx`: sequence b then uses its row `cache_batch_idx[b]`.
        cu_seqlens_k_new: None, or the very tensor `cu_seqlens_q`: packed sequences bring a key for
            each query.
        max_seqlen_q: needed with `cu_seqlens_q`, ignored without.
        rotary_seqlens: None, or the very tensor `cache_seqlens`.

    Raises:
        NotImplementedError: other cu_seqlens_k_new or rotary_seqlens, and what the module refuses.
    """
    function = "flash_attn_with_kvcache"
    _refuse(
        function, attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale,
    )  # fmt: skip
    if cu_seqlens_k_new is not None and cu_seqlens_k_new is not cu_seqlens_q:
        raise not_implemented(function, "cu_seqlens_k_new", "cu_seqlens_q itself")
    if rotary_seqlens is not None and rotary_seqlens is not cache_seqlens:
        raise not_implemented(function, "rotary_seqlens", "cache_seqlens itself")
    result = kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, page_table, softmax_scale, causal, window_size, softcap,
        rotary_interleaved, None, _splits(num_splits), return_softmax_lse,
        cu_seqlens_q=cu_seqlens_q, max_seqlen_q=None if cu_seqlens_q is None else max_seqlen_q,
        s_aux=s_aux,
    )  # fmt: skip
    if not return_softmax_lse:
        return result
    return (*result, q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32))


def _splits(num_splits: int) -> int:
    """num_splits as this package takes it. What is no int is refused there."""
    too_many = type(num_splits) is int and num_splits > MAX_SPLITS
    return MAX_SPLITS if too_many else num_splits


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> torch.Tensor:
    """An empty int32 tensor, to pass as `scheduler_metadata`: the kernels plan from the shapes."""
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to all keys, from attention to each of several parts of them.

    Exact but for rounding, which is that of fp32. A part with an LSE of -inf is not read; where
    all are, the result is 0 and -inf. Differentiable, unless `out` is given.

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, head_dim) or
            (num_splits, total, nheads, head_dim), of any float dtype.
        lse_partial: (num_splits, batch, seqlen, nheads) or (num_splits, total, nheads), fp32,
            natural logarithm. This package's functions return LSE with nheads before seqlen:
            stack it and call `.transpose(-1, -2)`.
        out: tensor to write the result to, (batch, seqlen, nheads, head_dim) or
            (total, nheads, head_dim).
        out_dtype: dtype of the result; by default out's, or out_partial's.

    Returns:
        out, and softmax_lse (batch, seqlen, nheads) or (total, nheads), fp32.

    Raises:
        TypeError, ValueError: a tensor is none, or does not fit.
    """
    function = "flash_attn_combine"
    strided_tensor(function, "out_partial", out_partial)
    strided_tensor(function, "lse_partial", lse_partial)
    if out_partial.dim() not in (4, 5):
        raise wrong_value(function, "out_partial", "4 or 5 dimensions", tuple(out_partial.shape))
    shape(function, "lse_partial", lse_partial, tuple(out_partial.shape[:-1]))
    if not out_partial.is_floating_point():
        raise wrong_type(function, "out_partial", "a float dtype", out_partial.dtype)
    if out is not None:
        strided_tensor(function, "out", out)
        shape(function, "out", out, tuple(out_partial.shape[1:]))
        if out_dtype is not None and out.dtype is not out_dtype:
            raise wrong_type(function, "out", f"dtype {out_dtype}, as out_dtype", out.dtype)
    for name, x in (("lse_partial", lse_partial), ("out", out)):
        if x is not None and x.device != out_partial.device:
            wanted = f"a tensor on {out_partial.device}, as out_partial"
            raise wrong_value(function, name, wanted, x.device)
    wide = torch.promote_types(out_partial.dtype, torch.float32)
    partial = lse_partial.to(wide)
    lse = partial.logsumexp(0)
    empty = (partial == float("-inf"))[..., None]
    weights = (partial - lse.masked_fill(lse == float("-inf"), 0.0)).exp()[..., None]
    # Emptied before they are weighed: 0 * NaN would be NaN, in the gradient too.
    merged = (out_partial.to(wide).masked_fill(empty, 0.0) * weights).sum(0)
    if out is None:
        return merged.to(out_dtype or out_partial.dtype), lse
    return out.copy_(merged), lse
