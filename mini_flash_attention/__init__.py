"""FlashAttention in Python: the interface of flash-attn, Triton kernels for NVIDIA GPUs."""

from .api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__version__ = "0.1.0"
__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
