"""FlashAttention in Python: the interface of flash-attn, Triton kernels for NVIDIA GPUs."""

from .api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .api_backward import backward
from .packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    merge_attention_states,
)

__version__ = "0.1.0"
__all__ = [
    "backward", "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache", "merge_attention_states",
]  # fmt: skip
