"""Stands in for the private functions of `flash_attn.flash_attn_interface`, and for their
`_wrapped_` twins, with flash-attn 2.8's arguments and results.

Libraries that spread a sequence over several GPUs build on them: they put together what blocks of
keys give, and call the backward pass for each block with the result and the LSE of all keys. Then
the gradients of a block are its part in those of all, and parts add up.
"""

from typing import Any

import torch

from ... import backward, flash_attn_func, flash_attn_varlen_func
from ...validate import not_implemented
from .interface2 import maybe_contiguous

Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> Forward:
    """`flash_attn_func`, returning what its backward pass wants.

    A tensor whose last dimension is not contiguous is copied, here and in the other three.

    Returns:
        (out, softmax_lse, S_dmask, rng_state). S_dmask is empty and rng_state holds nothing, as
        without dropout in flash-attn.

    Raises:
        NotImplementedError: dropout_p is not 0, or return_softmax.
        ValueError, TypeError: as in `flash_attn_func`.
    """
    _refuse("_flash_attn_forward", dropout_p, return_softmax)
    q, k, v = map(_rows, (q, k, v))
    out, lse, _ = flash_attn_func(
        q, k, v, 0.0, softmax_scale, causal, (window_size_left, window_size_right), softcap,
        alibi_slopes, return_attn_probs=True,
    )  # fmt: skip
    return out, lse, *_undrawn(q)


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> Forward:
    """`flash_attn_varlen_func`, returning what its backward pass wants.

    Args:
        zero_tensors: rows of no sequence are 0 with or without it.

    Returns, Raises: as `_flash_attn_forward`. leftpad_k is refused too, and block_table where a
        gradient is wanted.
    """
    _refuse("_flash_attn_varlen_forward", dropout_p, return_softmax, leftpad_k)
    q, k, v = map(_rows, (q, k, v))
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale,
        causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        return_attn_probs=True, block_table=block_table, seqused_k=seqused_k,
    )  # fmt: skip
    return out, lse, *_undrawn(q)


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """This package's `backward` for a batch of sequences of one length.

    Args:
        softmax_lse: (batch, nheads, seqlen_q), or a view of that with the last two dimensions
            exchanged, which flash-attn, reading its memory, does not notice: diffusers passes one.
        dq, dk, dv: tensors like q, k and v that the gradients are written to, or None.
        rng_state: of dropout; not read.

    Returns:
        softmax_d, (batch, nheads, seqlen_q), fp32: the row sums of dout * out.

    Raises:
        NotImplementedError: dropout_p is not 0.
        ValueError, TypeError: as in `backward`.
    """
    return _differentiate(
        "_flash_attn_backward", (dout, q, k, v, out), _as_read(softmax_lse, q), (dq, dk, dv),
        dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=(window_size_left, window_size_right), softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    """This package's `backward` for packed sequences; see `_flash_attn_backward`.

    softmax_lse and softmax_d are (nheads, total_q). zero_tensors: gradients of rows of no sequence
    are 0 with or without it.
    """
    return _differentiate(
        "_flash_attn_varlen_backward", (dout, q, k, v, out), softmax_lse, (dq, dk, dv), dropout_p,
        softmax_scale=softmax_scale, causal=causal,
        window_size=(window_size_left, window_size_right), softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip


def _differentiate(
    function: str,
    tensors: tuple[torch.Tensor, ...],
    softmax_lse: torch.Tensor,
    results: tuple[torch.Tensor | None, ...],
    dropout_p: float,
    **options: Any,
) -> torch.Tensor:
    """softmax_d; the gradients go to results, (dq, dk, dv). tensors: (dout, q, k, v, out)."""
    _refuse(function, dropout_p)
    dout, q, k, v, out, softmax_lse = map(_rows, (*tensors, softmax_lse))
    dq, dk, dv = results
    with torch.no_grad():
        backward(dout, q, k, v, out, softmax_lse, dq=dq, dk=dk, dv=dv, **options)
        return (dout.float() * out).sum(-1).transpose(-1, -2)


def _as_read(softmax_lse: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """softmax_lse as (batch, nheads, seqlen_q), whichever way its last two dimensions are named."""
    if getattr(softmax_lse, "ndim", 0) != 3 or getattr(q, "ndim", 0) != 4:
        return softmax_lse
    turned, shape = softmax_lse.mT, (q.shape[0], q.shape[2], q.shape[1])
    stored = turned.is_contiguous() and not softmax_lse.is_contiguous()
    exchanged = turned.shape == shape and (stored or softmax_lse.shape != shape)
    return turned if exchanged else softmax_lse


def _rows(x: Any) -> Any:
    """x with a contiguous last dimension. What is no tensor is refused later."""
    return maybe_contiguous(x) if isinstance(x, torch.Tensor) else x


def _undrawn(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S_dmask and rng_state of a dropout that did not happen."""
    return q.new_empty(0), q.new_empty(2, dtype=torch.int64)


def _refuse(
    function: str, dropout_p: float, return_softmax: bool = False, leftpad_k: Any = None
) -> None:
    if dropout_p:
        raise not_implemented(function, "dropout_p", "0.0")
    if return_softmax:
        raise not_implemented(function, "return_softmax", "False")
    if leftpad_k is not None:
        raise not_implemented(function, "leftpad_k", "None")
