"""Every input that is refused: the error, its text, and that nothing was written before it.

A row's name starts with what is wrong, or with the argument that is. What takes reading numbers
back from the device is in `test_device_checks.py`.
"""

import inspect
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from calls import (
    CALLS,
    append,
    contents,
    dense,
    described,
    kvcache,
    packed_append,
    paged,
    paged_append,
    rotary,
    tensor,
    unwritten,
    varlen,
)
from cases import ints
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import mini_flash_attention as mfa
from mini_flash_attention import plan, recipes, settings
from mini_flash_attention.validate import memory

NAN = float("nan")

# -- the table ------------------------------------------------------------------------------------


class Row(NamedTuple):
    call: Any
    error: type[Exception]
    message: str  # what follows the function's name, as a regular expression
    changes: dict[str, Any]  # in this order; a function takes the arguments as they are by then
    on_gpu: bool  # of fake tensors, which need none


ROWS = []


def row(name, call, error, message, *, broken="", on_gpu=False, **changes):
    """`broken` says what is wrong with the package; the row then waits for the mend."""
    marks = pytest.mark.xfail(strict=True, reason=broken) if broken else ()
    ROWS.append(pytest.param(Row(call, error, message, changes, on_gpu), id=name, marks=marks))


def qkv(change):
    """The same change to q, k and v."""
    return {n: lambda a, n=n: change(a[n]) for n in "qkv"}


def at_it(score, batch, head, q_idx, kv_idx):
    """A score_mod, as the CPU takes it."""
    return score


class Compiled:
    """A score_mod as `@triton.jit` makes it, as far as a call looks at it."""

    fn, arg_names = staticmethod(at_it), ("score", "batch", "head", "q_idx", "kv_idx")


COMPILED = Compiled()


def jagged(x):
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


# fmt: off
UNPACK = "expected 4 dimensions .batch, seqlen, heads, head_dim., got"
PACK = "expected 3 dimensions .total, heads, head_dim., got"
A_TENSOR = "expected a torch.Tensor, got"
AN_INDEX = "expected an int32 torch.Tensor, got"
A_NUMBER = r"expected a number .*1e\+30"

row("not-a-tensor-list", dense, TypeError, f"q: {A_TENSOR} list", q=lambda a: a["q"].tolist())
row("not-a-tensor-numpy", dense, TypeError,
    f"q: {A_TENSOR} numpy.ndarray", q=lambda a: a["q"].numpy())
row("not-a-tensor-none", varlen, TypeError, f"k: {A_TENSOR} NoneType", k=None)
row("not-a-tensor-cache", kvcache, TypeError, f"v_cache: {A_TENSOR} list", v_cache=[1.0])
row("not-a-tensor-new-keys", append, TypeError, f"k: {A_TENSOR} list", k=[1.0])

row("not-a-tensor-score-mod-args", dense, TypeError,
    "score_mod_args: expected tensors, got float at 1",
    score_mod=lambda a: at_it, score_mod_args=(torch.ones(2), 1.0))

row("device-meta-everywhere", dense, ValueError, "q: expected .*CUDA device or the CPU, got meta",
    **qkv(lambda x: x.to("meta")))

row("device-k", dense, ValueError, "k: expected a tensor on cpu, as q, got meta",
    k=lambda a: a["k"].to("meta"))
row("device-v-cache", kvcache, ValueError, "v_cache: expected a tensor on cpu, as q, got meta",
    v_cache=lambda a: a["v_cache"].to("meta"))
row("device-new-values", append, ValueError, "v: expected a tensor on cpu, as q, got meta",
    v=lambda a: a["v"].to("meta"))
row("device-cpu-keys-of-gpu-queries", dense, ValueError, "k: .* on cuda:0, as q, got cpu",
    on_gpu=True, k=lambda a: torch.empty_like(a["k"], device="cpu"))
row("device-another-gpu", dense, ValueError, "v: .* on cuda:0, as q, got cuda:1",
    on_gpu=True, v=lambda a: torch.empty_like(a["v"], device="cuda:1"))

for at in ("cu_seqlens_q", "cu_seqlens_k"):
    row(f"device-{at}", varlen, ValueError, f"{at}: expected a tensor on cuda:0, as q, got cpu",
        on_gpu=True, **{at: lambda a: ints(0, 3, 5)})
for at, call in (("block_table", paged), ("block_table", paged_append), ("cache_seqlens", kvcache)):
    row(f"device-{at}-{call.__name__}", call, ValueError, f"{at}: .* on cuda:0, as q, got cpu",
        on_gpu=True, **{at: lambda a: ints(3, 5)})
row("device-seqused_k", paged, ValueError, "seqused_k: expected a tensor on cuda:0, as q, got cpu",
    on_gpu=True, seqused_k=lambda a: ints(3, 5))

row("device-cache_seqlens-packed", packed_append, ValueError,
    "cache_seqlens: expected a tensor on cuda:0, as q, got cpu",
    on_gpu=True, cache_seqlens=lambda a: ints(3, 5))
row("device-cu_seqlens_q-packed", packed_append, ValueError,
    "cu_seqlens_q: .* on cuda:0, as q, got cpu",
    on_gpu=True, cu_seqlens_q=lambda a: ints(0, 2, 5))
for at in ("cache_batch_idx", "cache_leftpad"):
    row(f"device-{at}", kvcache, ValueError, f"{at}: expected a tensor on cuda:0, as q, got cpu",
        on_gpu=True, **{at: lambda a: ints(0, 1)})
    row(f"device-{at}-meta", kvcache, ValueError, f"{at}: expected a tensor on cpu, as q, got meta",
        **{at: ints(0, 1).to("meta")})
for at, x in (("alibi_slopes", torch.ones(4)), ("s_aux", torch.ones(4).half())):
    for call in (dense, varlen, kvcache):
        row(f"device-{at}-{call.__name__}", call, ValueError, f"{at}: .* on cpu, as q, got meta",
            **{at: x.to("meta")})
    row(f"device-{at}-gpu", dense, ValueError, f"{at}: expected a tensor on cuda:0, as q, got cpu",
        on_gpu=True, **{at: lambda a, x=x: torch.ones(4, dtype=x.dtype)})
for at in ("rotary_cos", "rotary_sin"):
    row(f"device-{at}", rotary, ValueError, f"{at}: expected a tensor on cpu, as q, got meta",
        **{at: lambda a, at=at: a[at].to("meta")})
    row(f"device-{at}-gpu", rotary, ValueError, f"{at}: expected a tensor on cuda:0, as q, got cpu",
        on_gpu=True, **{at: lambda a: torch.ones(8, 4)})
row("device-score-mod-args", dense, ValueError, "score_mod_args: .* on cpu, as q, got meta",
    score_mod=lambda a: at_it, score_mod_args=(torch.ones(2), torch.ones(2, device="meta")))

for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn, torch.complex64):
    name = str(dtype).removeprefix("torch.")
    row(f"dtype-{name}", dense, TypeError,
        f"q: expected dtype float16 or .* on cpu, got torch.{name}",
        **qkv(lambda x, dtype=dtype: x.to(dtype)))
row("dtype-fp32-on-gpu", dense, TypeError, "q: .* float16 or bfloat16 on cuda, got torch.float32",
    on_gpu=True, **qkv(torch.Tensor.float))

row("other-dtype-k", dense, TypeError, "k: expected dtype torch.float16, as q, got torch.float32",
    k=lambda a: a["k"].float())
row("other-dtype-v", varlen, TypeError, "v: expected dtype torch.float16, as q, got torch.bfloat16",
    v=lambda a: a["v"].bfloat16())
row("other-dtype-cache", kvcache, TypeError,
    "k_cache: .* torch.float16, as q, got torch.float8_e5m2",
    k_cache=lambda a: a["k_cache"].to(torch.float8_e5m2))
row("other-dtype-new-keys", append, TypeError,
    "k: expected dtype torch.float16, as q, got torch.float32",
    k=lambda a: a["k"].float())

row("other-dtype-packed-new-values", packed_append, TypeError,
    "v: .* torch.float16, as q, got .*float32",
    v=lambda a: a["v"].float())

row("rank-packed-q", dense, ValueError, rf"q: {UNPACK} \(3, 4, 16\) .*flash_attn_varlen_func",
    q=lambda a: a["q"][0])
row("rank-packed-v", dense, ValueError, f"v: {UNPACK}", v=lambda a: a["v"][0])
row("rank-batched-q", varlen, ValueError, f"q: {PACK}", q=lambda a: a["q"][None])
row("rank-batched-k", varlen, ValueError, f"k: {PACK}", k=lambda a: a["k"][None])
row("rank-one-token-forgotten", kvcache, ValueError, f"q: {UNPACK}", q=lambda a: a["q"][:, 0])
row("rank-new-keys", append, ValueError, f"k: {UNPACK}", k=lambda a: a["k"][:, 0])
row("rank-pages-without-a-table", paged, ValueError, f"k: {PACK}.* block_table .* pages",
    block_table=None)
row("rank-packed-keys-with-a-table", paged, ValueError,
    r"k: expected 4 dimensions \(num_blocks, page_size, heads, head_dim\), got \(7, 2, 16\)",
    k=lambda a: tensor(7), v=lambda a: tensor(7))
row("rank-packed-cache-with-a-table", paged_append, ValueError, "k_cache: .*num_blocks, page_size",
    k_cache=lambda a: tensor(24), v_cache=lambda a: tensor(24))

row("rank-batched-q-cache", packed_append, ValueError, rf"q: {PACK} \(1, 5, 4, 16\)",
    q=lambda a: a["q"][None])
row("rank-batched-new-keys", packed_append, ValueError, rf"k: {PACK} \(1, 5, 2, 16\)",
    k=lambda a: a["k"][None])
row("rank-packed-cache", packed_append, ValueError, rf"k_cache: {UNPACK} \(8, 2, 16\)",
    k_cache=lambda a: a["k_cache"][0])

row("shape-k", dense, ValueError, "k: expected batch 2, as q, got 1",
    k=lambda a: a["k"][:1], v=lambda a: a["v"][:1])
for call in (kvcache, packed_append):
    row(f"shape-cache-{call.__name__}", call, ValueError,
        "k_cache: expected batch 2, got 3 .cache_batch_idx says which rows .*",
        k_cache=lambda a: tensor(3, 8), v_cache=lambda a: tensor(3, 8))
row("shape-new-keys", append, ValueError, r"k: expected shape \(2, 2, 2, 16\), got \(1, 2, 2, 16\)",
    k=lambda a: a["k"][:1])

row("shape-packed-new-keys", packed_append, ValueError,
    r"k: expected shape \(5, 2, 16\), got \(4, 2, 16\) .*a key for each query",
    k=lambda a: a["k"][:4], v=lambda a: a["v"][:4])
for at in ("cache_batch_idx", "cache_leftpad"):
    row(f"shape-{at}", kvcache, ValueError, rf"{at}: expected shape \(2,\), got \(3,\)",
        **{at: ints(0, 1, 0)})
    row(f"shape-{at}-packed", packed_append, ValueError,
        rf"{at}: expected shape \(2,\), got \(5,\)",
        **{at: ints(0, 0, 0, 0, 0)})

row("tokens-v", dense, ValueError,
    r"v: expected \(2, 5, 2\) before head_dim, as k, got \(2, 4, 2\)",
    v=lambda a: a["v"][:, :4])
row("tokens-packed-v", varlen, ValueError,
    r"v: expected \(7, 2\) before head_dim, as k, got \(6, 2\)",
    v=lambda a: a["v"][:6])
row("tokens-new-values", append, ValueError, r"v: .*\(2, 2, 2, 16\), got \(2, 1, 2, 16\)",
    v=lambda a: a["v"][:, :1])

row("tokens-packed-new-values", packed_append, ValueError,
    r"v: expected shape \(5, 2, 16\), got \(3, 2, 16\) .*a key for each query",
    v=lambda a: a["v"][:3])

row("heads-v", dense, ValueError, r"v: expected \(2, 5, 2\) before head_dim, as k, got \(2, 5, 1\)",
    v=lambda a: a["v"][:, :, :1])
row("heads-new-keys", append, ValueError, r"k: .*\(2, 2, 2, 16\), got \(2, 2, 1, 16\)",
    k=lambda a: a["k"][:, :, :1])

row("heads-packed-new-keys", packed_append, ValueError, r"k: .*\(5, 2, 16\), got \(5, 1, 16\)",
    k=lambda a: a["k"][:, :1])

row("heads-no-group", dense, ValueError, "k: expected .* divides q's 3, got 2 .*KV head serves",
    q=lambda a: a["q"][:, :, :3], out=lambda a: a["out"][:, :, :3])
row("heads-more-kv-heads", dense, ValueError, "k: expected .* divides q's 1, got 2",
    q=lambda a: a["q"][:, :, :1], out=lambda a: a["out"][:, :, :1])

row("head-dim-k", dense, ValueError, "k: expected head_dim 16, as q, got 8",
    k=lambda a: a["k"][..., :8])
row("head-dim-q", varlen, ValueError, "k: expected head_dim 8, as q, got 16",
    q=lambda a: a["q"][..., :8])
row("head-dim-new-keys", append, ValueError, r"k: .*\(2, 2, 2, 16\), got \(2, 2, 2, 8\)",
    k=lambda a: a["k"][..., :8])

# v may have a head_dim of its own, which `out` and new values have too.
for head_dim in (0, 257):
    row(f"head-dim-v-{head_dim}", dense, ValueError,
        f"v: expected head_dim from 1 to 256, got {head_dim}",
        v=lambda a, d=head_dim: a["v"].new_zeros(2, 5, 2, d))
    row(f"head-dim-v-cache-{head_dim}", kvcache, ValueError,
        f"v_cache: expected head_dim from 1 to 256, got {head_dim}",
        v_cache=lambda a, d=head_dim: a["v_cache"].new_zeros(2, 8, 2, d))
    row(f"head-dim-v-pages-{head_dim}", paged, ValueError,
        f"v: expected head_dim from 1 to 256, got {head_dim}",
        v=lambda a, d=head_dim: a["v"].new_zeros(6, 4, 2, d))
row("head-dim-new-values", append, ValueError, r"v: .*\(2, 2, 2, 8\), got \(2, 2, 2, 16\)",
    v_cache=lambda a: a["v_cache"][..., :8])
row("head-dim-new-values-packed", packed_append, ValueError, r"v: .*\(5, 2, 8\), got \(5, 2, 16\)",
    v_cache=lambda a: a["v_cache"][..., :8])

for head_dim in (0, 257, 512):
    row(f"head-dim-{head_dim}", dense, ValueError,
        f"q: expected head_dim from 1 to 256, got {head_dim}",
        **qkv(lambda x, d=head_dim: x.new_zeros(*x.shape[:-1], d)))

row("heads-no-kv-heads", dense, ValueError, "k: expected a number of heads .*, got 0",
    k=lambda a: a["k"][:, :, :0], v=lambda a: a["v"][:, :, :0])

for p, got in ((-0.1, "-0.1"), (1.0, "1.0"), (1, "1")):
    row(f"dropout-{p!r}", dense, ValueError, f"dropout_p: expected 0 <= .* < 1, got {got}",
        dropout_p=p)
row("dropout-nan", dense, ValueError, f"dropout_p: {A_NUMBER}, got nan", dropout_p=NAN)
row("dropout-causal-as-fourth", dense, TypeError, "dropout_p: .*got True .*write causal=True",
    dropout_p=True)
row("dropout-none", varlen, TypeError, "dropout_p: expected .*, got NoneType", dropout_p=None)

for scale in (NAN, float("inf"), np.float32("nan")):
    row(f"scale-{scale!r}", dense, ValueError, f"softmax_scale: {A_NUMBER}, got {float(scale)}",
        softmax_scale=scale)
for scale, got in ((float("-inf"), "-inf"), (-1e31, "-1e.31")):
    row(f"scale-{scale}", dense, ValueError, rf"softmax_scale: expected .*-1e\+30.*, got {got}",
        softmax_scale=scale)
for scale, got in (("1", "str"), (True, "bool"), (1j, "complex"),
                   (torch.tensor(0.1), "torch.Tensor")):
    row(f"scale-{got}", kvcache, TypeError, f"softmax_scale: expected a finite .*, got {got}",
        softmax_scale=scale)
row("scale-past-fp32", dense, ValueError, rf"softmax_scale: {A_NUMBER}, got 1e\+39",
    softmax_scale=1e39)
row("scale-past-any-float", dense, ValueError, f"softmax_scale: {A_NUMBER}, got 1000",
    softmax_scale=10**400)

for call in (dense, varlen, kvcache):
    for scale in (1e-21, -1e-21, np.float32(1e-30)):
        row(f"scale-{scale!r}-alibi-{call.__name__}", call, ValueError,
            "softmax_scale: expected 0, or 1e-20 and more, with alibi_slopes, got -?1.*e-",
            softmax_scale=scale, alibi_slopes=torch.ones(4))

for call in (dense, varlen, kvcache):
    for cap in (-1, -30.0, 9e-7, np.float64(1e-300)):
        row(f"softcap-{cap!r}-{call.__name__}", call, ValueError,
            rf"softcap: expected 0 \(none\) or 1e-6 and more, got {cap}", softcap=cap)
    row(f"softcap-nan-{call.__name__}", call, ValueError, f"softcap: {A_NUMBER}, got nan",
        softcap=NAN)
row("softcap-inf", dense, ValueError, f"softcap: {A_NUMBER}, got inf", softcap=float("inf"))
row("softcap-past-fp32", dense, ValueError, rf"softcap: {A_NUMBER}, got 1e\+31", softcap=1e31)
for cap, got in ((None, "NoneType"), (True, "bool"), ("30", "str"),
                 (torch.tensor(30.0), "torch.Tensor")):
    row(f"softcap-{got}", dense, TypeError, f"softcap: expected a finite .*, got {got}",
        softcap=cap)

TWO_INTS = "window_size: expected two ints .left, right., got"
for window in (3, (1,), (1, 2, 3), (1.0, 2), (NAN, 0), None, "ab"):
    row(f"window-{window}", dense, TypeError, TWO_INTS + " " + re.escape(str(window)),
        window_size=window)
for window in ((-2, 0), (0, -5)):
    row(f"window-{window}", varlen, ValueError, "window_size: expected -1 .open. or more, got",
        window_size=window)
# A bool is no 0 or 1 here: causal in the place of window_size; and tensors would be read.
for name, window in (
    ("bools", (True, False)), ("tensors", (torch.tensor(1), torch.tensor(2))),
    ("meta", (torch.ones(1, dtype=torch.int64, device="meta"), 0)),
):
    row(f"window-of-{name}", kvcache, TypeError, TWO_INTS, window_size=window)
for window in ([1, 2, 3], [1.0, 2.0], [[1, 2]], 1):
    row(f"window-in-a-tensor-{window}", kvcache, TypeError, TWO_INTS,
        window_size=torch.tensor(window))

for causal, got in ((1, "int"), (None, "NoneType"), (torch.tensor(True), "torch.Tensor"),
                    (np.bool_(True), "numpy.bool")):
    row(f"causal-{got}", dense, TypeError, f"causal: expected a bool, got {got}", causal=causal)
for name, call in (
    ("causal", varlen), ("causal", kvcache), ("return_attn_probs", dense),
    ("deterministic", dense), ("deterministic", varlen), ("return_attn_probs", varlen),
    ("return_softmax_lse", kvcache), ("rotary_interleaved", kvcache),
):
    row(f"{name}-{call.__name__}", call, TypeError, f"{name}: expected a bool, got int",
        **{name: 1})

DTYPES = {"alibi_slopes": "torch.float32", "s_aux": "torch.float32 or torch.float16"}
SHAPES = {"alibi_slopes": r"\(4,\) or \(2, 4\)", "s_aux": r"\(4,\)"}
for call in (dense, varlen, paged, kvcache, packed_append):
    for name, dtypes in DTYPES.items():
        where = f"{name}-{call.__name__}"
        for x, got in (([1.0] * 4, "list"), (1.0, "float"), (np.ones(4), "numpy.ndarray")):
            row(f"{where}-{got}", call, TypeError, f"{name}: {A_TENSOR} {got}", **{name: x})
        wrong = [torch.float64, torch.bfloat16, torch.int32]
        for dtype in wrong + [torch.float16] * (name == "alibi_slopes"):
            row(f"{where}-{dtype}", call, TypeError,
                f"{name}: expected dtype {dtypes}, got {dtype} .cast it",
                **{name: torch.ones(4).to(dtype)})
        for shape in ((), (2,), (5,), (4, 1), (1, 4), (4, 2), (2, 2, 4)):
            row(f"{where}-{shape}", call, ValueError,
                rf"{name}: expected shape {SHAPES[name]}, got {re.escape(str(shape))}",
                **{name: torch.ones(shape)})
        row(f"{where}-strided", call, ValueError,
            rf"{name}: expected contiguous rows, got strides \(2,\) .call .contiguous\(\)",
            **{name: torch.ones(8)[::2]})
    row(f"alibi_slopes-per-batch-{call.__name__}-strided", call, ValueError,
        r"alibi_slopes: expected contiguous rows, got strides \(1, 2\)",
        alibi_slopes=torch.ones(4, 2).t())
    row(f"s_aux-{call.__name__}-per-batch", call, ValueError,
        r"s_aux: expected shape \(4,\), got \(2, 4\)", s_aux=torch.ones(2, 4))
row("s_aux-other-half", dense, TypeError, "s_aux: .* torch.float32 or torch.bfloat16, got",
    **qkv(torch.Tensor.bfloat16), out=lambda a: a["out"].bfloat16(), s_aux=torch.ones(4).half())
row("s_aux-fp32-once", dense, TypeError, "s_aux: .* dtype torch.float32, got torch.float16",
    **qkv(torch.Tensor.float), out=lambda a: a["out"].float(), s_aux=torch.ones(4).half())
for call in (dense, varlen, kvcache):
    row(f"sinks-both-{call.__name__}", call, TypeError,
        "learnable_sink: expected None beside s_aux, got both .they are one argument",
        s_aux=torch.ones(4), learnable_sink=torch.ones(4))
    # What is refused goes by the name that the documentation explains.
    row(f"sinks-the-other-name-{call.__name__}", call, ValueError,
        r"s_aux: expected shape \(4,\), got \(3,\)", learnable_sink=torch.ones(3))

    # A function of the caller's stands where slopes do: after them, before the mask.
    for x, got in ((1, "int"), ("relu", "str"), (torch.ones(4), "torch.Tensor")):
        row(f"score-mod-{got}-{call.__name__}", call, TypeError,
            f"score_mod: expected a function, got {got} .decorate it with @triton.jit", score_mod=x)
    row(f"score-mod-plain-on-gpu-{call.__name__}", call, TypeError,
        "score_mod: expected a function, got function .decorate it with @triton.jit",
        on_gpu=True, score_mod=lambda a: at_it)
    if call is not kvcache:  # which has no gradients
        for x, got in ((1, "int"), ("relu", "str"), (torch.ones(4), "torch.Tensor")):
            row(f"score-mod-bwd-{got}-{call.__name__}", call, TypeError,
                f"score_mod_bwd: expected a function, got {got} .decorate it with @triton.jit",
                score_mod=lambda a: at_it, score_mod_bwd=x)
        row(f"score-mod-bwd-alone-{call.__name__}", call, ValueError,
            "score_mod_bwd: expected None without a score_mod, got a function",
            score_mod_bwd=lambda a: at_it)
        row(f"score-mod-bwd-plain-on-gpu-{call.__name__}", call, TypeError,
            "score_mod_bwd: expected a function, got function .decorate it with @triton.jit",
            on_gpu=True, score_mod=COMPILED, score_mod_bwd=lambda a: at_it)
    for x, got in ((None, "NoneType"), (torch.ones(4), "torch.Tensor"), ({}, "dict"),
                   (1.0, "float")):
        row(f"score-mod-args-{got}-{call.__name__}", call, TypeError,
            f"score_mod_args: expected a tuple of tensors, got {got}",
            score_mod=lambda a: at_it, score_mod_args=x)
    row(f"score-mod-args-none-{call.__name__}", call, TypeError,
        "score_mod_args: expected a tuple of tensors, got NoneType", score_mod_args=None)
    row(f"score-mod-args-alone-{call.__name__}", call, ValueError,
        r"score_mod_args: expected \(\) without a score_mod, got 2",
        score_mod_args=(torch.ones(2), torch.ones(2)))
    for x, got in ((3, "int"), (None, "NoneType"), ([1.0], "list")):
        row(f"score-mod-args-of-{got}-{call.__name__}", call, TypeError,
            f"score_mod_args: expected tensors, got {got} at 0",
            score_mod=lambda a: at_it, score_mod_args=(x,))

for at in ("cu_seqlens_q", "cu_seqlens_k"):
    row(f"{at}-int64", varlen, TypeError, f"{at}: .* torch.int32, got torch.int64 .*int",
        **{at: torch.tensor([0, 2, 5])})
    row(f"{at}-fp32", varlen, TypeError, f"{at}: expected dtype torch.int32, got torch.float32",
        **{at: torch.tensor([0.0, 2.0, 5.0])})
    row(f"{at}-list", varlen, TypeError, f"{at}: {AN_INDEX} list", **{at: [0, 2, 5]})
    row(f"{at}-numpy", varlen, TypeError, f"{at}: {AN_INDEX} numpy.ndarray",
        **{at: np.array([0, 2, 5], dtype=np.int32)})
    row(f"{at}-none", varlen, TypeError, f"{at}: {AN_INDEX} None", **{at: None})
row("seqused_k-int64", paged, TypeError, "seqused_k: expected dtype torch.int32, got torch.int64",
    seqused_k=torch.tensor([2, 2]))
row("seqused_q-int64", varlen, TypeError, "seqused_q: expected dtype torch.int32, got torch.int64",
    seqused_q=torch.tensor([2, 2]))
row("seqused_q-shape", varlen, ValueError, r"seqused_q: expected shape \(2,\), got \(3,\)",
    seqused_q=ints(1, 2, 3))
row("offsets-only-seqused-unpaged", varlen, TypeError,
    "cu_seqlens_k: .*only paged keys with seqused_k",
    cu_seqlens_k=None, seqused_k=ints(2, 2))

row("cu_seqlens_q-cache-int64", packed_append, TypeError,
    "cu_seqlens_q: .* torch.int32, got torch.int64",
    cu_seqlens_q=torch.tensor([0, 2, 5]))
row("cu_seqlens_q-cache-list", packed_append, TypeError, f"cu_seqlens_q: {AN_INDEX} list",
    cu_seqlens_q=[0, 2, 5])

row("offsets-2d", varlen, ValueError, r"cu_seqlens_q: expected shape .*, got \(1, 3\)",
    cu_seqlens_q=ints(0, 2, 5)[None])
row("offsets-0d", varlen, ValueError, r"cu_seqlens_k: expected shape \(3,\), got \(\)",
    cu_seqlens_k=ints(5)[0])
row("offsets-one-entry", varlen, ValueError,
    "cu_seqlens_q: expected batch . 1 entries.*got 1 for 5",
    cu_seqlens_q=ints(0))
row("offsets-no-entry", varlen, ValueError, "cu_seqlens_q: expected batch . 1 entries.*got 0 for 5",
    cu_seqlens_q=ints())
row("offsets-batches-differ", varlen, ValueError,
    r"cu_seqlens_k: expected shape \(3,\), got \(4,\)",
    cu_seqlens_k=ints(0, 1, 2, 7))
row("seqused_k-shape", paged, ValueError, r"seqused_k: expected shape \(2,\), got \(3,\)",
    seqused_k=ints(1, 2, 3))

row("offsets-2d-cache", packed_append, ValueError, r"cu_seqlens_q: expected shape .*, got \(1, 3\)",
    cu_seqlens_q=ints(0, 2, 5)[None])
for name, offsets in (("one", ints(0)), ("no", ints())):
    row(f"offsets-{name}-entry-cache", packed_append, ValueError,
        f"cu_seqlens_q: expected batch . 1 entries.*got {len(offsets)} for 5", cu_seqlens_q=offsets)
row("offsets-batches-differ-cache", packed_append, ValueError, "k_cache: expected batch 3, got 2",
    cu_seqlens_q=ints(0, 1, 2, 5))

row("strided-cu_seqlens_q-cache", packed_append, ValueError,
    r"cu_seqlens_q: expected contiguous .* \(2,\) .*contiguous",
    cu_seqlens_q=ints(0, 9, 2, 9, 5)[::2])
for at in ("cu_seqlens_q", "cu_seqlens_k"):
    row(f"strided-{at}", varlen, ValueError, rf"{at}: expected contiguous .* \(2,\) .*contiguous",
        **{at: ints(0, 9, 2, 9, 5)[::2]})

for at in ("max_seqlen_q", "max_seqlen_k"):
    for n, got in ((None, "NoneType"), (3.0, "float"), ("3", "str"), (True, "bool"),
                   (torch.tensor(3.0), "torch.Tensor"), (torch.tensor([3]), "torch.Tensor"),
                   (torch.tensor([3, 4]), "torch.Tensor"),
                   (torch.tensor(3, device="meta"), "torch.Tensor"),
                   (np.array([3]), "numpy.ndarray")):
        size = f"-{tuple(n.shape)}-{n.device}" if isinstance(n, torch.Tensor) else ""
        row(f"{at}-{got}{size}", varlen, TypeError, f"{at}: expected an int, got {got}",
            **{at: n})
    for n in (-1, 2**31, np.int32(-3), torch.tensor(-3)):
        row(f"{at}-{n!r}", varlen, ValueError, rf"{at}: expected 0 <= .*, got {int(n)}$",
            **{at: n})

for n, got in ((None, "NoneType"), (3.0, "float"), (True, "bool"),
               (torch.tensor([3]), "torch.Tensor")):
    row(f"max_seqlen_q-cache-{got}", packed_append, TypeError,
        f"max_seqlen_q: expected an int, got {got}",
        max_seqlen_q=n)
row("max_seqlen_q-cache-negative", packed_append, ValueError,
    "max_seqlen_q: expected 0 <= .*, got -1$",
    max_seqlen_q=-1)
for call in (kvcache, append, paged_append):
    for n, got in ((3, "int"), (0, "int"), (torch.tensor(3), "torch.Tensor")):
        row(f"max_seqlen_q-unpacked-{n!r}-{call.__name__}", call, ValueError,
            f"max_seqlen_q: expected None without cu_seqlens_q, got {got} .*packed queries",
            max_seqlen_q=n)

for call in (paged, paged_append):
    row(f"table-both-names-{call.__name__}", call, TypeError,
        "page_table: expected None beside block_table, got both .they are one argument",
        page_table=lambda a: a["block_table"])
    row(f"table-the-other-name-{call.__name__}", call, TypeError,
        "block_table: expected dtype torch.int32, got torch.int64",
        page_table=lambda a: a["block_table"].long(), block_table=None)
    for name, change, error, message in (
        ("list", lambda t: t.tolist(), TypeError, f"{AN_INDEX} list"),
        ("int64", lambda t: t.long(), TypeError, "expected dtype torch.int32, got torch.int64"),
        ("1d", lambda t: t[0], ValueError, r"expected shape \(2, 'any'\), got \(2,\)"),
        ("3d", lambda t: t[None], ValueError, r"expected shape \(2, 'any'\), got \(1, 2, 2\)"),
        ("rows", lambda t: t[:1], ValueError, r"expected shape \(2, 'any'\), got \(1, 2\)"),
        ("strided", lambda t: t.t(), ValueError, r"expected contiguous rows, got strides \(1, 2\)"),
    ):
        row(f"table-{name}-{call.__name__}", call, error, f"block_table: {message}",
            block_table=lambda a, change=change: change(a["block_table"]))

# Any page size from 1 is supported.
row("table-empty-pages", paged, ValueError,
    "block_table: expected pages of at least one token, got 0",
    k=lambda a: tensor(6, 0), v=lambda a: tensor(6, 0))
row("table-empty-pages-cache", paged_append, ValueError,
    "block_table: .* at least one token, got 0",
    k_cache=lambda a: tensor(6, 0), v_cache=lambda a: tensor(6, 0))

row("tokens-v-cache", kvcache, ValueError,
    r"v_cache: expected \(2, 8, 2\) .*k_cache, got \(2, 7, 2\)",
    v_cache=lambda a: a["v_cache"][:, :7])
row("tokens-v-cache-pages", paged_append, ValueError,
    r"v_cache: expected \(6, 4, 2\) .*, got \(5, 4, 2\)",
    v_cache=lambda a: a["v_cache"][:5])

for at in ("cache_batch_idx", "cache_leftpad"):
    for name, value, error, message in (
        ("int64", torch.tensor([0, 1]), TypeError, "expected dtype torch.int32, got torch.int64"),
        ("bool", torch.tensor([True, False]), TypeError, ".* torch.int32, got torch.bool"),
        ("list", [0, 1], TypeError, f"{AN_INDEX} list"),
        ("int", 0, TypeError, f"{AN_INDEX} int"),
        ("0d", ints(1)[0], ValueError, r"expected shape \(2,\), got \(\)"),
        ("2d", ints(0, 1)[None], ValueError, r"expected shape \(2,\), got \(1, 2\)"),
        ("strided", ints(0, 9, 1)[::2], ValueError, r"expected contiguous .*strides \(2,\)"),
    ):
        row(f"{at}-{name}", kvcache, error, f"{at}: {message}", **{at: value})

for name, value, error, message in (
    ("int64", torch.tensor([3, 5]), TypeError, "expected dtype torch.int32, got torch.int64"),
    ("0d", ints(3)[0], ValueError, r"expected shape \(2,\), got \(\)"),
    ("too-many", ints(1, 2, 3), ValueError, r"expected shape \(2,\), got \(3,\)"),
    ("strided", ints(1, 9, 2)[::2], ValueError, r"expected contiguous rows, got strides \(2,\)"),
    ("negative", -1, ValueError, "expected 0 <= .*, got -1"),
    ("float", 3.0, TypeError, "expected an int.*, got float"),
    ("bool", True, TypeError, "expected an int.*, got bool"),
    ("numpy", np.array([3, 5]), TypeError, "expected an int.*, got numpy.ndarray"),
    ("list", [3, 5], TypeError, "expected an int or an int32 torch.Tensor, got list"),
):
    row(f"lengths-{name}", kvcache, error, f"cache_seqlens: {message}", cache_seqlens=value)

for n in (3, 0, np.int64(3)):
    row(f"lengths-packed-{n!r}", packed_append, TypeError,
        "cache_seqlens: expected a tensor where packed keys are appended, got an int",
        cache_seqlens=n)

row("room-int", kvcache, ValueError, "cache_seqlens: expected at most .* 8 tokens, got 9$",
    cache_seqlens=9)
for call in (append, paged_append):
    row(f"room-int-{call.__name__}", call, ValueError,
        "cache_seqlens: expected at most .* 8 tokens, got 9 .*append count too",
        cache_seqlens=7)
row("room-more-new-keys-than-room", append, ValueError, "k: expected at most .* 8 tokens, got 9",
    k=lambda a: tensor(2, 9), v=lambda a: tensor(2, 9))

for call in (append, packed_append):
    for missing in ("k", "v"):
        row(f"append-no-{missing}-{call.__name__}", call, ValueError,
            f"{missing}: expected k and v together", **{missing: None})

    row(f"append-no-lengths-{call.__name__}", call, ValueError,
        "cache_seqlens: expected lengths when k, v are given", cache_seqlens=None)

# What has no gradient would lose it in silence. A call with `out` is refused for that alone.
OF_A_CACHE = "backward: not implemented for a KV cache; flash_attn_func and .* have gradients"
NO_GRAD = "; call it under torch.no_grad.* or detach its tensors"
for name in ("q", "k_cache", "v_cache", "k", "v"):
    row(f"gradient-{name}", append, NotImplementedError, OF_A_CACHE,
        **{name: lambda a, name=name: a[name].requires_grad_()})
for name in ("q", "k", "v"):
    row(f"gradient-packed-{name}", packed_append, NotImplementedError, OF_A_CACHE,
        **{name: lambda a, name=name: a[name].requires_grad_()})
for name in ("alibi_slopes", "s_aux", "learnable_sink"):
    row(f"gradient-{name}-kvcache", kvcache, NotImplementedError, OF_A_CACHE,
        **{name: lambda a: torch.ones(4).requires_grad_()})
for name in ("rotary_cos", "rotary_sin"):
    row(f"gradient-{name}", rotary, NotImplementedError, OF_A_CACHE,
        **{name: lambda a, name=name: a[name].requires_grad_()})
row("gradient-score_mod_args-kvcache", kvcache, NotImplementedError, OF_A_CACHE,
    score_mod=lambda a: at_it, score_mod_args=lambda a: (torch.ones(2).requires_grad_(),))
for call in (dense, varlen):
    for name in ("q", "k", "v"):
        row(f"gradient-out-{name}-{call.__name__}", call, NotImplementedError,
            f"backward: not implemented for out{NO_GRAD}",
            **{name: lambda a, name=name: a[name].requires_grad_()})
    for name in ("s_aux", "learnable_sink"):
        row(f"gradient-out-{name}-{call.__name__}", call, NotImplementedError,
            f"backward: not implemented for out{NO_GRAD}",
            **{name: lambda a: torch.ones(4).requires_grad_()})
    row(f"gradient-alibi_slopes-{call.__name__}", call, NotImplementedError,
        "backward: not implemented for alibi_slopes, which has no gradient; detach it$",
        out=None, alibi_slopes=lambda a: torch.ones(4).requires_grad_())
    row(f"gradient-score_mod_args-{call.__name__}", call, NotImplementedError,
        "backward: not implemented for score_mod_args, which has no gradient; detach it$",
        out=None, score_mod=lambda a: at_it, score_mod_bwd=lambda a: at_it,
        score_mod_args=lambda a: (torch.ones(2), torch.ones(2).requires_grad_()))
    row(f"gradient-score_mod-{call.__name__}", call, NotImplementedError,
        f"backward: not implemented for a score_mod without score_mod_bwd{NO_GRAD}",
        out=None, score_mod=lambda a: at_it, v=lambda a: a["v"].requires_grad_())
for name in ("q", "k", "v", "s_aux"):
    row(f"gradient-pages-{name}", paged, NotImplementedError,
        f"backward: not implemented for block_table{NO_GRAD}", out=None,
        **{name: lambda a, name=name: a.get(name, torch.ones(4)).requires_grad_()})

for name in ("k_cache", "v_cache"):
    row(f"append-to-an-expanded-{name}", append, ValueError,
        f"{name}: expected memory of its own, got .*0",
        **{name: lambda a: tensor(1, 8).expand(2, -1, -1, -1)})

row("rotary-nothing-to-append", kvcache, ValueError,
    "rotary_cos: expected k and v to append, got none .rotate q yourself",
    rotary_cos=torch.ones(8, 4), rotary_sin=torch.ones(8, 4))
TOGETHER = "rotary_cos and rotary_sin go together"
for name in ("rotary_cos", "rotary_sin"):
    for x, got in ((None, "NoneType"), ([1.0], "list"), (1.0, "float")):
        at = "rotary_cos" if name == "rotary_cos" else "rotary_(cos|sin)"
        row(f"{name}-{got}", rotary, TypeError, f"{at}: {A_TENSOR} .*{TOGETHER}", **{name: x})
    for dtype in (torch.float64, torch.bfloat16, torch.complex64):
        row(f"{name}-{dtype}", rotary, TypeError,
            rf"{name}: expected dtype torch.float16 or torch.float32, got {dtype} .cast it",
            **{name: lambda a, name=name, dtype=dtype: a[name].to(dtype)})
    # Tables: of another width or length than the other, wider than a head, of no rows or columns.
    for shape in ((8, 3), (7, 4), (8,), (1, 8, 4), (8, 9), (0, 4), (8, 0)):
        message = r"rotary_(cos|sin): expected shape .positions, rotary_dim / 2., .* at most 16"
        row(f"{name}-{shape}", rotary, ValueError, message, **{name: torch.ones(shape)})
    row(f"{name}-strided", rotary, ValueError,
        rf"{name}: expected a contiguous table, got strides \(1, 8\) .call .contiguous\(\)",
        **{name: torch.ones(4, 8).t()})
row("rotary-dtypes-differ", rotary, TypeError, "rotary_sin: expected dtype .*, got torch.float16",
    rotary_sin=lambda a: a["rotary_sin"].half())
for name, shape in (("wide", (8, 9)), ("empty", (8, 0)), ("rows", (0, 4)), ("flat", (8,))):
    row(f"rotary-both-{name}", rotary, ValueError,
        rf"rotary_cos: expected shape .*, rotary_dim at most 16, got {re.escape(str(shape))}",
        rotary_cos=torch.ones(shape), rotary_sin=torch.ones(shape))

for call in (varlen, kvcache):
    row(f"splits-129-{call.__name__}", call, ValueError, "num_splits: expected 0 .* 128, got 129",
        num_splits=129)
    for n, got in ((None, "NoneType"), (True, "bool"), (1.0, "float")):
        row(f"splits-{got}-{call.__name__}", call, TypeError,
            f"num_splits: expected an int, got {got}",
            num_splits=n)
    row(f"splits-negative-{call.__name__}", call, ValueError,
        "num_splits: expected 0 .* 128, got -1",
        num_splits=-1)

for size in (0, -1, 2**31):
    row(f"splits-size-{size}", kvcache, ValueError, f"fixed_split_size: expected 1 or .*got {size}",
        fixed_split_size=size)
for size, got in ((True, "bool"), (64.0, "float"), ("64", "str")):
    row(f"splits-size-{got}", kvcache, TypeError, f"fixed_split_size: expected an int .*got {got}",
        fixed_split_size=size)
row("splits-size-and-splits", kvcache, ValueError,
    "fixed_split_size: expected None with num_splits",
    fixed_split_size=64, num_splits=2)

for out, got in (([1.0], "list"), (True, "bool")):
    row(f"out-{got}", dense, TypeError, f"out: {A_TENSOR} {got}", out=out)
row("out-shape", dense, ValueError, "out: expected shape .*, got", out=lambda a: a["out"][:, :2])
row("out-rank", varlen, ValueError, f"out: {PACK}", out=lambda a: a["out"][None])
row("out-dtype", kvcache, TypeError, "out: expected dtype torch.float16, as q, got torch.float32",
    out=lambda a: a["out"].float())
row("out-device", dense, ValueError, "out: expected a tensor on cpu, as q, got meta",
    out=lambda a: a["out"].to("meta"))
row("out-device-gpu", dense, ValueError, "out: expected a tensor on cuda:0, as q, got cpu",
    on_gpu=True, out=lambda a: torch.empty_like(a["q"], device="cpu"))
row("out-expanded", dense, ValueError, "out: expected elements that don't overlap, got strides .0,",
    out=lambda a: a["out"][:1].expand(2, -1, -1, -1))
row("out-strided", dense, ValueError, "out: expected a contiguous last dimension, got strides",
    out=lambda a: a["out"].mT.contiguous().mT)
# The result has v's head_dim.
for call, name, shape in ((dense, "v", "2, 3, 4, 8"), (varlen, "v", "5, 4, 8"),
                          (paged, "v", "5, 4, 8"), (kvcache, "v_cache", "2, 3, 4, 8")):
    row(f"out-head-dim-of-q-{call.__name__}", call, ValueError,
        rf"out: expected shape \({shape}\), got \(.*, 16\)",
        **{name: lambda a, name=name: a[name][..., :8]})
row("out-head-dim-of-another", dense, ValueError, r"out: expected shape .*16\), got .*8\)",
    out=lambda a: a["out"][..., :8])
APART = "out: expected memory apart from the inputs', got an overlap"
row("out-is-q", dense, ValueError, APART, out=lambda a: a["q"])
row("out-is-a-view-of-q", dense, ValueError, APART, out=lambda a: a["q"].view_as(a["q"]))
row("out-within-q", varlen, ValueError, APART, q=lambda a: tensor(6, heads=4)[:5],
    out=lambda a: a["q"].as_strided((5, 4, 16), (64, 16, 1), 64))
for name in ("k_cache", "v_cache"):
    row(f"out-within-{name}", kvcache, ValueError, APART, q=lambda a: a["q"][:, :, :2],
        out=lambda a, name=name: a[name][:, :3])
for name in ("k", "v"):
    row(f"out-is-new-{name}", append, ValueError, APART, q=lambda a: a["q"][:, :2, :2],
        out=lambda a, name=name: a[name])
for name in ("alibi_slopes", "s_aux", "score_mod_args"):
    row(f"out-is-{name}", dense, ValueError, APART, score_mod=lambda a: at_it, **{
        name: lambda a, name=name: (
            (a["out"],) if name == "score_mod_args" else
            a["out"].view(-1)[:8].view(torch.float32) if name == "alibi_slopes" else
            a["out"].view(-1)[:4]
        )
    })
row("out-requires-grad", dense, NotImplementedError,
    f"backward: not implemented for out{NO_GRAD}",
    out=lambda a: a["out"].requires_grad_())

row("layout-sparse", dense, TypeError,
    "q: expected a dense tensor, got torch.sparse_coo .*to_dense",
    q=lambda a: a["q"].to_sparse())
NESTED = "expected a dense tensor, got a nested one"
row("layout-jagged-q", dense, TypeError, f"q: {NESTED} .*jagged", q=lambda a: jagged(a["q"]))
row("layout-jagged-k", dense, TypeError, f"k: {NESTED} .*jagged", k=lambda a: jagged(a["k"]))
row("layout-nested", dense, TypeError, f"q: {NESTED}",
    q=lambda a: torch.nested.nested_tensor(list(a["q"])))
row("layout-quantised", dense, TypeError, "q: expected dtype .*, got torch.quint8",
    q=lambda a: torch.quantize_per_tensor(a["q"].float(), 0.1, 0, torch.quint8))
row("layout-strided", dense, ValueError, r"q: expected a contiguous last .*call .contiguous\(\)",
    q=lambda a: a["q"].mT.contiguous().mT)
for name in ("q", "k", "v", "out"):
    row(f"layout-negated-{name}", dense, TypeError,
        rf"{name}: expected plain memory, got a lazy negation .call .resolve_neg\(\)",
        **{name: lambda a, name=name: torch._neg_view(a[name])})
# fmt: on


# -- the tests ------------------------------------------------------------------------------------


def with_out(call):
    function, arguments = call()
    return function, arguments | {"out": torch.full_like(arguments["q"], 7.0)}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_unchanged_calls_work(call):
    function, arguments = with_out(call)
    before = contents(arguments)
    assert function(**arguments) is arguments["out"]
    # What a refusal must leave alone is what a call writes: `out`, and the caches when it appends.
    written = [not torch.equal(*x) for x in zip(before, contents(arguments), strict=True)]
    appends = call in (append, paged_append, packed_append, rotary)
    assert written == [True] + [appends] * (len(written) - 1)
    with FakeTensorMode():
        described(*call("cuda"))


def check_refused(case):
    with FakeTensorMode() if case.on_gpu else nullcontext():
        function, arguments = case.call("cuda") if case.on_gpu else with_out(case.call)
        for name, change in case.changes.items():
            arguments[name] = change(arguments) if inspect.isfunction(change) else change
        before = [] if case.on_gpu else contents(arguments)
        with pytest.raises(case.error) as caught:
            function(**arguments)
    text = str(caught.value)
    assert re.match(f"{function.__name__}: {case.message}", text), text
    form = "not implemented" if caught.type is NotImplementedError else "expected .+, got .+"
    assert re.match(rf"\w+: \w+: {form}", text), text
    assert unwritten(before, arguments)


QUIET = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor"
)


@QUIET
@pytest.mark.parametrize("case", ROWS)
def test_refused(case):
    check_refused(case)


@pytest.fixture
def remembered(monkeypatch):
    """Calls on the CPU are remembered as those on a GPU are, and launch nothing."""
    monkeypatch.setattr(settings, "INTERPRETED", True)
    monkeypatch.setattr(recipes, "_recipes", {})
    nothing = lambda _, p, *rest: recipes.Recipe(p.function, [], p.lse_shape, {})  # noqa: E731
    monkeypatch.setattr(recipes, "make", nothing)


@QUIET
@pytest.mark.parametrize("case", ROWS)
def test_refused_after_a_call_that_worked(case, remembered):
    """What is remembered of a good call must not let a bad one pass that looks like it."""
    function, arguments = with_out(case.call)
    function(**arguments)
    assert recipes._recipes
    check_refused(case)


NUMBERS = torch.ones(2)

ALIKE = {
    "float-window": ({"window_size": (2, 0)}, {"window_size": (2.0, 0)}),
    "bool-window": ({"window_size": (1, 0)}, {"window_size": (True, False)}),
    "bool-causal": ({"causal": True}, {"causal": 1}),
    "bool-dropout": ({"dropout_p": 0.0}, {"dropout_p": False}),
    "bool-softcap": ({"softcap": 1.0}, {"softcap": True}),
    "slopes-elsewhere": (
        {"alibi_slopes": torch.ones(4)}, {"alibi_slopes": torch.ones(4, device="meta")}
    ),
    "slopes-strided": ({"alibi_slopes": torch.ones(4)}, {"alibi_slopes": torch.ones(8)[::2]}),
    "slopes-of-another-dtype": (
        {"alibi_slopes": torch.ones(4)}, {"alibi_slopes": torch.ones(4).half()}
    ),
    "scale-with-slopes": (
        {"softmax_scale": 1e-25}, {"softmax_scale": 1e-25, "alibi_slopes": torch.ones(4)}
    ),
    "sink-of-another-shape": ({"s_aux": torch.ones(4)}, {"s_aux": torch.ones(4, 1)}),
    "both-sinks": ({"s_aux": torch.ones(4)}, dict.fromkeys(("s_aux", "learnable_sink"), NUMBERS)),
    "args-without-a-function": (
        {"score_mod": COMPILED, "score_mod_args": (NUMBERS,)}, {"score_mod_args": (NUMBERS,)}
    ),
    "args-elsewhere": (
        {"score_mod": COMPILED, "score_mod_args": (NUMBERS,)},
        {"score_mod": COMPILED, "score_mod_args": (NUMBERS.to("meta"),)},
    ),
    "args-of-numbers": (
        {"score_mod": COMPILED, "score_mod_args": (NUMBERS,)},
        {"score_mod": COMPILED, "score_mod_args": (1.0,)},
    ),
    "out-is-an-arg": (
        {"score_mod": COMPILED, "score_mod_args": (NUMBERS,)},
        {"score_mod": COMPILED, "score_mod_args": lambda a: (a["out"],)},
    ),
    "out-is-q": ({}, {"out": lambda a: a["q"]}),
    "out-within-q": ({}, {"out": lambda a: a["q"].view_as(a["q"])}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_refused_after_one_that_looks_alike(name, remembered):
    good, bad = ALIKE[name]
    function, arguments = with_out(dense)
    function(**arguments | good)
    assert recipes._recipes
    with pytest.raises((TypeError, ValueError)):
        function(
            **arguments | {n: x(arguments) if inspect.isfunction(x) else x for n, x in bad.items()}
        )


# -- q, k and v in one tensor, and states put together; nothing of the caller's is written ---------

OFFSETS = ints(0, 2, 5)
IN_ONE = {
    "qkvpacked": (mfa.flash_attn_qkvpacked_func, {"qkv": tensor(2, 3, 3)}),
    "kvpacked": (mfa.flash_attn_kvpacked_func, {"q": tensor(2, 3), "kv": tensor(2, 5, 2)}),
    "varlen_qkvpacked": (
        mfa.flash_attn_varlen_qkvpacked_func,
        {"qkv": tensor(5, 3), "cu_seqlens": OFFSETS, "max_seqlen": 3},
    ),
    "varlen_kvpacked": (
        mfa.flash_attn_varlen_kvpacked_func,
        {
            "q": tensor(5), "kv": tensor(5, 2), "cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS,
            "max_seqlen_q": 3, "max_seqlen_k": 3,
        },
    ),
    "merge": (
        mfa.merge_attention_states,
        {
            "out_a": tensor(2, 3), "lse_a": torch.zeros(2, 2, 3),
            "out_b": tensor(2, 3), "lse_b": torch.zeros(2, 2, 3),
        },
    ),
    "varlen_merge": (
        mfa.merge_attention_states,
        {
            "out_a": tensor(5), "lse_a": torch.zeros(2, 5),
            "out_b": tensor(5), "lse_b": torch.zeros(2, 5),
        },
    ),
}  # fmt: skip
BATCHED, TOTAL = r"expected shape \(batch, seqlen, ", r"expected shape \(total, "
IN_ONE_REFUSED = {
    "not-a-tensor-qkv-list": ("qkvpacked", {"qkv": [1.0]}, TypeError, f"qkv: {A_TENSOR} list"),
    "not-a-tensor-kv-none": ("kvpacked", {"kv": None}, TypeError, f"kv: {A_TENSOR} NoneType"),
    "not-a-tensor-varlen-qkv": ("varlen_qkvpacked", {"qkv": 1}, TypeError, f"qkv: {A_TENSOR} int"),
    "not-a-tensor-varlen-kv": (
        "varlen_kvpacked", {"kv": np.ones(3)}, TypeError, "kv: .* numpy.ndarray"
    ),
    "shape-qkv-of-two": (
        "qkvpacked", {"qkv": tensor(2, 3, 2)}, ValueError,
        rf"qkv: {BATCHED}3, heads, head_dim\), got \(2, 3, 2, 2, 16\)",
    ),
    "rank-qkv-packed": ("qkvpacked", {"qkv": tensor(5, 3)}, ValueError, f"qkv: {BATCHED}3"),
    "shape-kv-of-three": (
        "kvpacked", {"kv": tensor(2, 5, 3)}, ValueError,
        rf"kv: {BATCHED}2, heads, head_dim\), got \(2, 5, 3, 2, 16\)",
    ),
    "rank-kv-packed": ("kvpacked", {"kv": tensor(5, 2)}, ValueError, f"kv: {BATCHED}2"),
    "shape-varlen-qkv-of-two": (
        "varlen_qkvpacked", {"qkv": tensor(5, 2)}, ValueError,
        rf"qkv: {TOTAL}3, heads, head_dim\), got \(5, 2, 2, 16\)",
    ),
    "rank-varlen-qkv-batched": (
        "varlen_qkvpacked", {"qkv": tensor(2, 3, 3)}, ValueError, f"qkv: {TOTAL}3"
    ),
    "shape-varlen-kv-of-three": (
        "varlen_kvpacked", {"kv": tensor(5, 3)}, ValueError,
        rf"kv: {TOTAL}2, heads, head_dim\), got \(5, 3, 2, 16\)",
    ),
    "rank-varlen-kv-batched": (
        "varlen_kvpacked", {"kv": tensor(2, 3, 2)}, ValueError, f"kv: {TOTAL}2"
    ),
    "shape-merge-out": (
        "merge", {"out_b": tensor(2, 4)}, ValueError,
        r"out_b: expected shape \(2, 3, 2, 16\), got \(2, 4, 2, 16\)",
    ),
    "shape-merge-lse-transposed": (
        "merge", {"lse_a": torch.zeros(2, 3, 2)}, ValueError,
        r"lse_a: expected shape \(2, 2, 3\), got \(2, 3, 2\)",
    ),
    "shape-merge-lse-packed": (
        "merge", {"lse_b": torch.zeros(2, 6)}, ValueError,
        r"lse_b: expected shape \(2, 2, 3\), got \(2, 6\)",
    ),
    "shape-merge-packed-lse": (
        "varlen_merge", {"lse_b": torch.zeros(5, 2)}, ValueError,
        r"lse_b: expected shape \(2, 5\), got \(5, 2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_ONE_REFUSED)
def test_tensors_in_one_refused(name):
    call, changes, error, message = IN_ONE_REFUSED[name]
    function, arguments = IN_ONE[call]
    function(**arguments)  # works without the change
    with pytest.raises(error, match=rf"^{function.__name__}: {message}") as caught:
        function(**arguments | changes)
    assert re.match(r"\w+: \w+: expected .+, got .+", str(caught.value))


@pytest.mark.parametrize("name", [n for n in IN_ONE if "packed" in n])
def test_tensors_in_one_are_refused_as_others_are(name):
    """What they pass on is judged by the function that they call, under its name."""
    function, arguments = IN_ONE[name]
    called = "flash_attn_varlen_func" if "varlen" in name else "flash_attn_func"
    for changes, error, message in (
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected 0 <= "),
        ({"softcap": -1}, ValueError, "softcap: expected 0"),
        ({"s_aux": torch.ones(3)}, ValueError, "s_aux: expected shape"),
    ):
        with pytest.raises(error, match=f"^{called}: {message}"):
            function(**arguments | changes)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        function(**arguments, nonsense=1)


# -- the backward pass as a function --------------------------------------------------------------


def differentiated(call):
    """The arguments of `backward` for a call, with tensors to write to."""
    function, arguments = call()
    out, lse, _ = function(**arguments, return_attn_probs=True)
    own = {f"d{n}": torch.full_like(arguments[n], 7.0) for n in "qkv"}
    return arguments | own | {"dout": torch.ones_like(out), "out": out, "softmax_lse": lse}


MEMORY = "expected memory apart from the inputs', got an overlap"
ROOM = torch.zeros(3, 5, 2, 16, dtype=torch.float16)
BACKWARD_REFUSED = {
    "dout-none": (dense, {"dout": None}, TypeError, f"dout: {A_TENSOR} NoneType"),
    "dout-shape": (
        dense, {"dout": lambda a: a["dout"][:1]}, ValueError,
        r"dout: expected shape \(2, 3, 4, 16\), got \(1, 3, 4, 16\)",
    ),
    "dout-rank": (varlen, {"dout": lambda a: a["dout"][None]}, ValueError, f"dout: {PACK}"),
    "dout-dtype": (
        dense, {"dout": lambda a: a["dout"].float()}, TypeError,
        "dout: expected dtype torch.float16, as q, got torch.float32",
    ),
    "dout-device": (
        dense, {"dout": lambda a: a["dout"].to("meta")}, ValueError,
        "dout: expected a tensor on cpu, as q, got meta",
    ),
    "dout-strided": (
        dense, {"dout": lambda a: a["dout"].mT.contiguous().mT}, ValueError,
        "dout: expected a contiguous last dimension",
    ),
    "out-shape": (
        varlen, {"out": lambda a: a["out"][..., :8]}, ValueError,
        r"out: expected shape \(5, 4, 16\), got \(5, 4, 8\)",
    ),
    "lse-none": (dense, {"softmax_lse": None}, TypeError, f"softmax_lse: {A_TENSOR} NoneType"),
    "lse-dtype": (
        dense, {"softmax_lse": lambda a: a["softmax_lse"].half()}, TypeError,
        "softmax_lse: expected dtype torch.float32, got torch.float16",
    ),
    "lse-shape": (
        varlen, {"softmax_lse": lambda a: a["softmax_lse"].t()}, ValueError,
        r"softmax_lse: expected shape \(4, 5\), got \(5, 4\)",
    ),
    "lse-strided": (
        dense, {"softmax_lse": lambda a: a["softmax_lse"].mT.contiguous().mT}, ValueError,
        "softmax_lse: expected contiguous rows",
    ),
    "dlse-shape": (
        dense, {"dsoftmax_lse": lambda a: a["softmax_lse"][0]}, ValueError,
        r"dsoftmax_lse: expected shape \(2, 4, 3\), got \(4, 3\)",
    ),
    "dlse-dtype": (
        dense, {"dsoftmax_lse": lambda a: a["softmax_lse"].half()}, TypeError,
        "dsoftmax_lse: expected dtype torch.float32",
    ),
    "dq-shape": (
        dense, {"dq": lambda a: a["dq"][:1]}, ValueError,
        r"dq: expected shape \(2, 3, 4, 16\), got \(1, 3, 4, 16\)",
    ),
    "dk-dtype": (
        varlen, {"dk": lambda a: a["dk"].float()}, TypeError,
        "dk: expected dtype torch.float16, as q, got torch.float32",
    ),
    "dv-expanded": (
        dense, {"dv": lambda a: a["dv"][:1].expand(2, -1, -1, -1)}, ValueError,
        "dv: expected elements that don't overlap",
    ),
    "dq-is-q": (dense, {"dq": lambda a: a["q"]}, ValueError, f"dq: {MEMORY}"),
    "dk-is-v": (varlen, {"dk": lambda a: a["v"]}, ValueError, f"dk: {MEMORY}"),
    "dv-is-dk": (dense, {"dv": lambda a: a["dk"]}, ValueError, "d[kv]: expected elements apart"),
    "dv-begins-inside-dk": (
        dense, {"dk": lambda a: ROOM[:-1], "dv": lambda a: ROOM[1:]}, ValueError,
        "dk: expected elements apart from dq, dk and dv, got an overlap",
    ),
    "score-mod-alone": (
        dense, {"score_mod": at_it}, NotImplementedError,
        "backward: not implemented for a score_mod without score_mod_bwd",
    ),
    "score-mod-bwd-alone": (
        dense, {"score_mod_bwd": lambda a: at_it}, ValueError,
        "score_mod_bwd: expected None without a score_mod",
    ),
    "lengths-of-batched-tensors": (dense, {"max_seqlen_q": 3}, ValueError, f"q: {PACK}"),
    "deterministic": (dense, {"deterministic": 1}, TypeError, "deterministic: expected a bool"),
    "window": (varlen, {"window_size": 3}, TypeError, TWO_INTS),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARD_REFUSED)
def test_backward_refused(name):
    call, changes, error, message = BACKWARD_REFUSED[name]
    arguments = differentiated(call)
    mfa.backward(**arguments)  # works without the change
    before = [arguments[x].clone() for x in ("dq", "dk", "dv", "q", "k", "v")]
    bad = {
        n: x(arguments) if inspect.isfunction(x) and x is not at_it else x
        for n, x in changes.items()
    }
    with pytest.raises(error, match=rf"^\w+: {message}"):
        mfa.backward(**arguments | bad)
    after = [arguments[x] for x in ("dq", "dk", "dv", "q", "k", "v")]
    assert all(map(torch.equal, before, after)), "nothing was written"


def test_which_parts_of_a_tensor_share_elements():
    """Slices of one tensor against the elements that they hold; so slices with other strides."""
    number = random.Random(0)
    room = torch.arange(4 * 5 * 6).view(4, 5, 6)
    shared = 0
    for _ in range(1000):
        x, y = (
            room[tuple(slice(number.randrange(3), number.randint(2, n)) for n in room.shape)]
            for _ in "xy"
        )
        alike = bool(set(x.flatten().tolist()) & set(y.flatten().tolist()))
        assert memory.share_elements(x, y) == memory.share_elements(y, x) == alike
        shared += alike
    assert 100 < shared < 900
    assert memory.share_elements(room[0, :2, ::2], room[0, :2, 1:4]), "not known to be apart"
    assert not memory.share_elements(room[0], room[1, :, ::2])


@pytest.mark.parametrize("call", [dense, varlen], ids=lambda call: call.__name__)
def test_backward_is_refused_under_its_own_name(call):
    arguments = differentiated(call)
    for bad in ({"dout": None}, {"softcap": -1.0}):
        with pytest.raises((TypeError, ValueError), match=r"^backward: "):
            mfa.backward(**arguments | bad)


def test_backward_takes_names_of_arguments_alone():
    arguments = differentiated(dense)
    given = [arguments.pop(x) for x in ("dout", "q", "k", "v", "out", "softmax_lse")]
    mfa.backward(*given, **arguments)
    with pytest.raises(TypeError, match="positional arguments"):
        mfa.backward(*given, torch.ones(1))


@pytest.mark.parametrize("call", [dense, varlen, kvcache], ids=lambda call: call.__name__)
def test_every_argument_can_be_refused(call):
    """Each function's each argument is at fault in some row, and no two rows share a name."""
    function, _ = call()
    rows = [case.values[0] for case in ROWS]
    faults = {row.message.partition(":")[0] for row in rows if row.call()[0] is function}
    assert set(inspect.signature(function).parameters) <= faults
    ids = [case.id for case in ROWS] + list(IN_ONE_REFUSED)
    assert len(set(ids)) == len(ids)


INTERPRETED_BFLOAT16 = """
import torch, mini_flash_attention as mfa
q = torch.randn(1, 20, 2, 16, dtype=torch.bfloat16)
mfa.flash_attn_func(q, q, q)
"""


def test_bfloat16_in_the_interpreter():
    """Triton's interpreter multiplies bfloat16 tiles wrongly: outputs of 1e8."""
    pytest.importorskip("triton")
    call = subprocess.run(
        [sys.executable, "-c", INTERPRETED_BFLOAT16],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "TypeError: flash_attn_func: q: expected float16 or float32 in" in call.stderr


@pytest.fixture
def gpu_of(monkeypatch):
    """A GPU of this name and compute capability, as far as the plan looks."""

    def pretend(name, major, minor):
        device = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=40)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        plan.gpu.gpu_of.cache_clear()

    yield pretend
    plan.gpu.gpu_of.cache_clear()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_compute_capability(call, gpu_of):
    pytest.importorskip("triton")
    gpu_of("Tesla T4", 7, 5)
    with FakeTensorMode():
        function, arguments = call("cuda")
        message = r"expected compute capability 8\.0 or newer, got 7\.5 \(Tesla T4\)"
        with pytest.raises(NotImplementedError, match=message):
            function(**arguments)
    gpu_of("A100", 8, 0)
    assert plan.gpu.gpu_of(torch.device("cuda", 0)).arch == 80


def test_a_gpu_without_triton(gpu_of, monkeypatch):
    """The GPU is known before Triton is: what is missing is said by `require_triton`."""
    gpu_of("A100", 8, 0)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert plan.gpu.gpu_of(torch.device("cuda", 0)).arch == 80


def vmap(f, q):
    return torch.vmap(f)(q[None])


def grad(f, q):
    return torch.func.grad(lambda q: f(q).float().sum())(q)


def jvp(f, q):
    return torch.func.jvp(f, (q,), (q,))


def dual(f, q):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(q, q))


@pytest.mark.parametrize("transform", [vmap, grad, jvp, dual])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_transforms(transform, call):
    function, arguments = with_out(call)
    before = contents(arguments)
    q = arguments.pop("q")
    with pytest.raises(NotImplementedError, match=rf"^{function.__name__}: .*not implemented"):
        transform(lambda q: function(q, **arguments), q)
    assert unwritten(before, arguments)


def plain_under_vmap(f, q):
    return torch.vmap(lambda _: f(q))(torch.zeros(2))


def plain_at_a_dual_level(f, q):
    with forward_ad.dual_level():
        return f(q)


@pytest.mark.parametrize("transform", [plain_under_vmap, plain_at_a_dual_level])
def test_plain_tensors_inside_a_transform(transform, remembered):
    """Any call there is refused, also one that is remembered from outside."""
    function, arguments = with_out(append)
    q = arguments.pop("q")
    function(q, **arguments)
    before = contents(arguments)
    with pytest.raises(NotImplementedError, match=rf"^{function.__name__}: torch\.func .*forward"):
        transform(lambda q: function(q, **arguments), q)
    assert unwritten(before, arguments)
    function(q, **arguments)


def test_vmap_over_lengths():
    function, arguments = append()
    lengths = torch.stack([arguments.pop("cache_seqlens")] * 2)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.vmap(lambda n: function(**arguments, cache_seqlens=n))(lengths)


# -- what looks alike and must work ---------------------------------------------------------------

ALLOWED = {
    "numpy-scale": (dense, {"softmax_scale": np.float32(0.25)}),
    "negative-scale": (dense, {"softmax_scale": -1}),
    "numpy-window": (dense, {"window_size": np.array([1, 2])}),
    "list-window": (dense, {"window_size": [1, None]}),
    "endless-window": (dense, {"window_size": (10**30, 0)}),
    "numpy-dropout": (dense, {"dropout_p": np.float64(0)}),
    "no-query-heads": (dense, {"q": tensor(2, 3, heads=0)}),
    "lengths-from-tensors": (varlen, {"max_seqlen_q": torch.tensor(3), "max_seqlen_k": 2**31 - 1}),
    "lengths-from-numpy": (varlen, {"max_seqlen_q": np.int64(3), "max_seqlen_k": np.uint8(4)}),
    "no-sequences": (
        varlen, {"q": tensor(0, heads=4), "cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)}
    ),
    "only-seqused": (paged, {"cu_seqlens_k": None, "seqused_k": ints(3, 4)}),
    "table-of-one-row": (paged, {"block_table": ints(0, 1).expand(2, 2)}),
    "table-of-more-columns": (paged, {"block_table": torch.zeros(2, 9).int()[:, :3]}),
    "numpy-length": (append, {"cache_seqlens": np.int64(3)}),
    "full-to-the-end": (append, {"cache_seqlens": 6}),
    "no-new-keys": (append, {"k": tensor(2, 0), "v": tensor(2, 0)}),
    # Both are written to it; which of them remains is left open.
    "one-cache-for-both": (append, dict.fromkeys(("k_cache", "v_cache"), tensor(2, 8))),
    "most-splits": (kvcache, {"num_splits": 128}),
    "fixed-splits": (kvcache, {"fixed_split_size": 1}),
    "no-softcap": (dense, {"softcap": 0}),
    "least-softcap": (varlen, {"softcap": 1e-6}),
    "numpy-softcap": (kvcache, {"softcap": np.float32(30)}),
    "slopes-of-each-sequence": (varlen, {"alibi_slopes": torch.ones(1, 4).expand(2, 4)}),
    "slopes-of-every-second-row": (dense, {"alibi_slopes": torch.ones(4, 4)[::2]}),
    "slopes-and-no-scale": (dense, {"alibi_slopes": torch.ones(4), "softmax_scale": 0.0}),
    "slopes-and-a-small-scale": (dense, {"alibi_slopes": torch.ones(4), "softmax_scale": -1e-20}),
    "small-scale-without-slopes": (dense, {"softmax_scale": 1e-25}),
    "sink-in-half": (dense, {"s_aux": torch.ones(4).half()}),
    "another-name-of-a-sink": (kvcache, {"learnable_sink": torch.ones(4), "s_aux": None}),
    "another-name-of-a-table": (
        paged, {"block_table": None, "page_table": ints(0, 1, 2, 3).view(2, 2)}
    ),
    "plain-score-mod": (dense, {"score_mod": at_it, "score_mod_args": []}),
    "values-of-another-head-dim": (varlen, {"v": torch.ones(7, 2, 24).half()}),
    "varlen-splits": (varlen, {"num_splits": 128}),
    "rows-of-a-larger-cache": (
        kvcache, {
            "k_cache": tensor(5, 8), "v_cache": tensor(5, 8), "cache_batch_idx": ints(4, 1),
            "cache_leftpad": ints(2, 0),
        },
    ),
    "packed-queries-of-a-whole-cache": (
        packed_append, {"cache_seqlens": None, "k": None, "v": None}
    ),
    "packed-queries-of-a-length": (packed_append, {"cache_seqlens": 3, "k": None, "v": None}),
    "rotary-of-a-whole-head": (
        rotary, {"rotary_cos": torch.ones(1, 8).half(), "rotary_sin": torch.ones(1, 8).half()}
    ),
    "no-pages": (paged, {"k": tensor(0, 4), "v": tensor(0, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name):
    call, changes = ALLOWED[name]
    function, arguments = call()
    arguments |= changes
    out = function(**arguments)
    head_dim = arguments["v_cache" if "v_cache" in arguments else "v"].shape[-1]
    assert out.shape == (*arguments["q"].shape[:-1], head_dim) and out.isfinite().all()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_allowed_whatever_the_default_device(call):
    """An engine sets it to its GPU; tensors on the CPU stay what they are."""
    function, arguments = call()
    expected = function(**arguments, causal=True)
    function, arguments = call()
    with torch.device("meta"):
        assert torch.equal(function(**arguments, causal=True), expected)
