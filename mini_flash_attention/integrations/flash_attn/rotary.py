"""Stands in for the functions of `flash_attn.layers.rotary` and `flash_attn.ops.triton.rotary`.

Rotary position embeddings (arXiv:2104.09864) in plain PyTorch, on any device, in fp32 or wider.
cos and sin are (positions, rotary_dim / 2), of any float dtype; the first rotary_dim elements of
each head are rotated. Tokens at positions past the table, and those that belong to no sequence, are
left as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...validate import wrong_value

Offsets = int | torch.Tensor


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Rotate every head of x by its token's position. Nothing waits for the GPU.

    Args:
        x: (batch, seqlen, nheads, head_dim); with `cu_seqlens` (total, nheads, head_dim).
        cos, sin: (positions, rotary_dim / 2).
        seqlen_offsets: position of each sequence's first token, an int or (batch,) int32 or int64.
        cu_seqlens: (batch + 1,): sequence b is the rows `cu_seqlens[b]` to `cu_seqlens[b + 1]`.
        max_seqlen: length of the longest sequence, used only to check the size of the table.
        interleaved: whether elements 0 and 1, 2 and 3, ... are rotated together, or those of the
            two halves of rotary_dim.
        inplace: write the result to x.
        conjugate: rotate backwards.

    Returns:
        A tensor like x, or x itself.

    Raises:
        ValueError: shapes don't fit, or the positions of an int offset go past the table.
    """
    function = "apply_rotary"
    rank = 4 if cu_seqlens is None else 3
    if x.dim() != rank:
        wanted = f"{rank} dimensions"
        raise wrong_value(function, "x", wanted, tuple(x.shape), "3 go with cu_seqlens")
    if cos.dim() != 2 or 2 * cos.shape[1] > x.shape[-1]:
        wanted = f"shape (positions, rotary_dim / 2), rotary_dim up to {x.shape[-1]}"
        raise wrong_value(function, "cos", wanted, tuple(cos.shape))
    if sin.shape != cos.shape:
        raise wrong_value(function, "sin", f"shape {tuple(cos.shape)}, as cos", tuple(sin.shape))
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(seqlen_offsets, torch.Tensor):
        if seqlen_offsets.shape != (batch,):
            got = tuple(seqlen_offsets.shape)
            raise wrong_value(function, "seqlen_offsets", f"shape ({batch},)", got)
    else:
        seqlen = x.shape[1] if cu_seqlens is None else max_seqlen or 0
        if seqlen_offsets < 0:
            raise wrong_value(function, "seqlen_offsets", "0 or more", seqlen_offsets)
        if seqlen_offsets + seqlen > cos.shape[0]:
            wanted = f"a table of {seqlen_offsets + seqlen} positions or more"
            raise wrong_value(function, "cos", wanted, f"{cos.shape[0]} of them")
    cos, sin = _rows(x, cos, sin, seqlen_offsets, cu_seqlens)
    rotary_dim = 2 * cos.shape[-1]
    turned = _turned(x[..., :rotary_dim], cos, -sin if conjugate else sin, interleaved)
    if inplace:
        x[..., :rotary_dim].copy_(turned)
        return x
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)


def _rows(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offsets: Offsets, cu: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the tables for x's tokens, (..., tokens, rotary_dim / 2)."""
    if cu is None and not isinstance(offsets, torch.Tensor):
        at = slice(offsets, offsets + x.shape[1])
        return cos[at], sin[at]
    row = torch.arange(x.shape[-3], device=x.device)
    if cu is None:
        assert isinstance(offsets, torch.Tensor)
        position, known = row + offsets[:, None], None
    else:
        cu = cu.to(row.dtype)
        sequence = torch.searchsorted(cu[1:-1].contiguous(), row, right=True)
        position, known = row - cu[sequence], (row >= cu[0]) & (row < cu[-1])
        position = position + (offsets[sequence] if isinstance(offsets, torch.Tensor) else offsets)
    in_table = (position >= 0) & (position < cos.shape[0])
    known = in_table if known is None else known & in_table
    rows, known = position.where(known, 0), known[..., None]
    return cos[rows].where(known, 1.0), sin[rows].where(known, 0.0)


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x (..., tokens, nheads, rotary_dim) rotated, in fp32 or wider."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    half = cos.shape[-1]
    shape, pair = ((half, 2), -1) if interleaved else ((2, half), -2)
    one, two = x.to(dtype).unflatten(-1, shape).unbind(pair)
    cos, sin = (table.to(dtype).unsqueeze(-2) for table in (cos, sin))
    return torch.stack((one * cos - two * sin, one * sin + two * cos), pair).flatten(-2)


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """x (batch, seqlen, nheads, head_dim) rotated, by tables of exactly its positions.

    cos, sin: (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2). The result has the dtype
    that x and the tables promote to.
    """
    rotary_dim = 2 * cos.shape[-1]
    dtype = torch.promote_types(x.dtype, cos.dtype)
    turned = _turned(x[..., :rotary_dim], cos, sin, interleaved)
    return torch.cat((turned.to(dtype), x[..., rotary_dim:].to(dtype)), -1)


class _InPlace(torch.autograd.Function):
    """A rotation that overwrites its argument. Its gradient is rotated backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rotate: Callable[..., None]) -> torch.Tensor:
        ctx.rotate = rotate
        # Through .data, as q and kv are often parts of one tensor: autograd would refuse to go on
        # with the one after the other has changed.
        rotate(x.data, conjugate=False)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].clone()
        ctx.rotate(grad, conjugate=True)
        return grad, None


def _in_place(x: torch.Tensor, rotate: Callable[..., Any]) -> torch.Tensor:
    return _InPlace.apply(x, rotate)  # type: ignore[no-untyped-call]


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """`apply_rotary`, differentiable also in place.

    In place, gradients flow through the result alone: go on with it and leave x alone. cos and sin
    get gradients only out of place.
    """
    rotate = partial(
        apply_rotary, cos=cos, sin=sin, seqlen_offsets=seqlen_offsets, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, interleaved=interleaved, inplace=inplace,
    )  # fmt: skip
    return _in_place(x, rotate) if inplace else rotate(x)


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """Rotate q and k inside qkv, in place, as `apply_rotary_emb` does.

    Args:
        qkv: (batch, seqlen, 3, nheads, head_dim), or
            (batch, seqlen, num_heads_q + 2 * nheads_k, head_dim) with `num_heads_q`.
        cos_k, sin_k: tables for k where they differ from those for q.

    Raises:
        ValueError: qkv is neither, or as for `apply_rotary`.
    """
    heads = num_heads_q or 0
    rest = qkv.shape[2] - heads if qkv.dim() > 2 else 0
    if qkv.dim() == 5 and rest == 3:
        parts: tuple[Any, Any] = (0, 1)
    elif qkv.dim() == 4 and heads and rest > 0 and rest % 2 == 0:
        parts = (slice(heads), slice(heads, heads + rest // 2))
    else:
        wanted = "(batch, seqlen, 3, nheads, head_dim), or 4 dimensions with num_heads_q"
        got = f"{tuple(qkv.shape)} with num_heads_q={num_heads_q}"
        raise wrong_value("apply_rotary_emb_qkv_", "qkv", wanted, got)
    tables = ((cos, sin), (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k))

    def rotate(x: torch.Tensor, conjugate: bool) -> None:
        for part, (cos, sin) in zip(parts, tables, strict=True):
            apply_rotary(
                x[:, :, part], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True,
                conjugate=conjugate,
            )  # fmt: skip

    return _in_place(qkv, rotate)


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
) -> torch.Tensor:
    """Rotate k inside kv (batch, seqlen, 2, nheads_k, head_dim), in place.

    Raises:
        ValueError: kv is not that, or as for `apply_rotary`.
    """
    if kv.dim() != 5 or kv.shape[2] != 2:
        wanted = "shape (batch, seqlen, 2, nheads_k, head_dim)"
        raise wrong_value("apply_rotary_emb_kv_", "kv", wanted, tuple(kv.shape))

    def rotate(x: torch.Tensor, conjugate: bool) -> None:
        apply_rotary(
            x[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True,
            conjugate=conjugate,
        )  # fmt: skip

    return _in_place(kv, rotate)
