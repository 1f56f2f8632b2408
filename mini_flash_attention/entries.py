"""What the three public functions are called, who validates them, and what their tensors are to
kernels.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from .problem import Problem
from .validate import backward, calls


class Entry(NamedTuple):
    """A public function, seen from inside."""

    function: str
    name: str  # of its operator
    parse: Callable[..., Problem]
    wants_lse: str  # the argument that asks for softmax_lse
    tensors: Mapping[str, str]  # a kernel's name of a tensor -> the argument, where they differ


# flash_attn_with_kvcache has other names for the cache and for what is appended.
CACHE = {"k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v", "seqused_k": "cache_seqlens"}
DENSE = Entry("flash_attn_func", "dense", calls.dense, "return_attn_probs", {})
VARLEN = Entry("flash_attn_varlen_func", "varlen", calls.varlen, "return_attn_probs", {})
KVCACHE = Entry("flash_attn_with_kvcache", "kvcache", calls.kvcache, "return_softmax_lse", CACHE)

# The LSE is an argument of the backward pass, and has no other name.
STATISTICS = {"lse": "softmax_lse", "dlse": "dsoftmax_lse"}
DENSE_BACKWARD = Entry("backward", "dense_backward", backward.dense, "", STATISTICS)
VARLEN_BACKWARD = Entry("backward", "varlen_backward", backward.varlen, "", STATISTICS)
