"""Small calls that work, of every form, each as its function and its arguments.

Tests of what is refused change an argument, and look at what the call may have written.
"""

import inspect

import torch
from cases import ints

import mini_flash_attention as mfa
from mini_flash_attention.validate import calls as parse

DESCRIBES = {
    mfa.flash_attn_func: parse.dense,
    mfa.flash_attn_varlen_func: parse.varlen,
    mfa.flash_attn_with_kvcache: parse.kvcache,
}


def tensor(*shape, heads=2, device="cpu"):
    return torch.full((*shape, heads, 16), 0.5, dtype=torch.float16, device=device)


def dense(device="cpu"):
    return mfa.flash_attn_func, {
        "q": tensor(2, 3, heads=4, device=device),
        "k": tensor(2, 5, device=device),
        "v": tensor(2, 5, device=device),
    }


def varlen(device="cpu"):
    return mfa.flash_attn_varlen_func, {
        "q": tensor(5, heads=4, device=device),
        "k": tensor(7, device=device),
        "v": tensor(7, device=device),
        "cu_seqlens_q": ints(0, 2, 5, device=device),
        "cu_seqlens_k": ints(0, 3, 7, device=device),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    }


def paged(device="cpu"):
    function, arguments = varlen(device)
    return function, arguments | {
        "k": tensor(6, 4, device=device),
        "v": tensor(6, 4, device=device),
        "block_table": ints(0, 1, 2, 3, device=device).view(2, 2),
    }


def kvcache(device="cpu"):
    return mfa.flash_attn_with_kvcache, {
        "q": tensor(2, 3, heads=4, device=device),
        "k_cache": tensor(2, 8, device=device),
        "v_cache": tensor(2, 8, device=device),
        "cache_seqlens": ints(3, 5, device=device),
    }


def append(device="cpu"):
    function, arguments = kvcache(device)
    new = {"k": tensor(2, 2, device=device) + 1, "v": tensor(2, 2, device=device) + 1}
    return function, arguments | new


def paged_append(device="cpu"):
    function, arguments = append(device)
    return function, arguments | {
        "k_cache": tensor(6, 4, device=device),
        "v_cache": tensor(6, 4, device=device),
        "block_table": ints(0, 1, 2, 3, device=device).view(2, 2),
    }


def packed_append(device="cpu"):
    """Queries that are packed, as are the keys they bring."""
    function, arguments = kvcache(device)
    return function, arguments | {
        "q": tensor(5, heads=4, device=device),
        "k": tensor(5, device=device) + 1,
        "v": tensor(5, device=device) + 1,
        "cu_seqlens_q": ints(0, 2, 5, device=device),
        "max_seqlen_q": 3,
    }


def rotary(device="cpu"):
    function, arguments = append(device)
    tables = {n: torch.ones(8, 4, device=device) for n in ("rotary_cos", "rotary_sin")}
    return function, arguments | tables


CALLS = [dense, varlen, paged, kvcache, append, paged_append, packed_append, rotary]


def contents(arguments):
    """Copies of what a call may write to."""
    written = (arguments.get(name) for name in ("out", "k_cache", "v_cache"))
    return [x.clone() for x in written if isinstance(x, torch.Tensor) and x.device.type == "cpu"]


def unwritten(before, arguments):
    return all(map(torch.equal, before, contents(arguments)))


def described(function, arguments):
    """The Problem that a call becomes: everything up to the launch."""
    call = inspect.signature(function).bind(**arguments)
    call.apply_defaults()
    of_two_names = ("learnable_sink", "page_table")
    first_names = {n: x for n, x in call.arguments.items() if n not in of_two_names}
    return DESCRIBES[function](**first_names)
