"""Stands in for `flash_attn.layers.rotary.RotaryEmbedding`, the module with the tables."""

from typing import Any

import torch

from ...validate import not_implemented, wrong_value
from .rotary import Offsets, apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_


class RotaryEmbedding(torch.nn.Module):
    """Rotates q and k, and keeps the tables for it.

    Args:
        dim: rotary_dim, even: how many elements of each head are rotated.
        base: pair i turns by `position * base ** (-2 * i / dim)`.
        interleaved: as for `apply_rotary`.
        scale_base: for XPos (arXiv:2212.10554), which shrinks q and grows k with the position.
        device: where the frequencies are made.
        pos_idx_in_fp32: True; releases before 2.8 had it. Positions are always fp32.

    Attributes have flash-attn's names, as subclasses use them: `_update_cos_sin_cache`,
    `_seq_len_cached`, `_cos_cached`, `_sin_cached`, `_cos_k_cached`, `_sin_k_cached`.
    """

    inv_freq: torch.Tensor
    scale: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if not pos_idx_in_fp32:
            raise not_implemented("RotaryEmbedding", "pos_idx_in_fp32", "True")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: torch.Tensor | None = None
        self._sin_cached: torch.Tensor | None = None
        self._cos_k_cached: torch.Tensor | None = None
        self._sin_k_cached: torch.Tensor | None = None

    def _compute_inv_freq(self, device: Any = None) -> torch.Tensor:
        return 1.0 / self.base ** (self._pairs(device) / self.dim)

    def _compute_scale(self, device: Any = None) -> torch.Tensor:
        return (self._pairs(device) + 0.4 * self.dim) / (1.4 * self.dim)

    def _pairs(self, device: Any) -> torch.Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: Any = None) -> None:
        """Make tables of `seqlen` positions, unless those at hand do."""
        cos = self._cos_cached
        usable = (
            cos is not None
            and seqlen <= self._seq_len_cached
            and (cos.device, cos.dtype) == (device, dtype)
            and not (self.training and cos.is_inference())
        )
        if usable:
            return
        self._seq_len_cached = seqlen
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        # `model.half()` rounds the buffers, so what is not fp32 is computed again.
        full = self.inv_freq.dtype == torch.float32
        frequency = self.inv_freq if full else self._compute_inv_freq(device)
        angle = torch.outer(position, frequency.to(position.device))
        cos, sin = angle.cos(), angle.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        assert self.scale_base is not None
        scale = self.scale if full else self._compute_scale(device)
        power = (position - seqlen // 2) / self.scale_base
        scale = scale.to(position.device) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rotate q and k in place.

        Args:
            qkv: as for `apply_rotary_emb_qkv_`; beside kv q alone, (batch, seqlen, nheads,
                head_dim).
            kv: (batch, seqlen, 2, nheads_k, head_dim).
            seqlen_offset: position of the first token, an int or (batch,).
            max_seqlen: number of positions to have tables for; needed where seqlen_offset is a
                tensor, as nothing here waits for the GPU.
            num_heads_q: as for `apply_rotary_emb_qkv_`.

        Returns:
            qkv, or (q, kv).
        """
        seqlen = max_seqlen
        if seqlen is None and not isinstance(seqlen_offset, torch.Tensor):
            seqlen = qkv.shape[1] + seqlen_offset
        if seqlen is not None:
            self._update_cos_sin_cache(seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = (
            self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached,
        )  # fmt: skip
        if cos is None or sin is None:
            got = "None beside a seqlen_offset on the device"
            raise wrong_value("RotaryEmbedding", "max_seqlen", "a length", got)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
