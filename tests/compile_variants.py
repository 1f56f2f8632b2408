"""Compiles the kernels for a GPU that need not be there, and prints what came of it as JSON.

    python tests/compile_variants.py ARCH [--tight K/N] [--rest K/N]

A variant is a call of a public function. Its tensors lie on the CPU, but it is checked, planned
and specialised as on a GPU of compute capability ARCH (90 for 9.0): whatever the package decides
to launch goes through Triton's own launcher, up to where that would load the binary. So nothing
here has to know how Triton treats strides, ones and alignment. K/N stands for the K-th of N equal
shares, counted from 0; by default all variants are compiled.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
import time
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import mini_flash_attention as mfa
from mini_flash_attention import cpu, dispatch, plan
from mini_flash_attention.problem import Problem

BATCH, SEQLEN_Q, SEQLEN_K = 2, 1024, 2048
NHEADS, NHEADS_K = 8, 2
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


class Variant(NamedTuple):
    """A call, and the kernel that it is there for."""

    kernel: str
    head_dim: int
    mask: str
    keys: str  # dense, packed, used (dense with lengths on the device) or pages of a size
    words: str  # lse, fp16, q=, splits=, append=, apart (v has other strides than k), far (64 bits)

    def __str__(self) -> str:
        return f"{self.kernel} head_dim {self.head_dim}, {self.mask}, {self.keys}, {self.words}"


MASKS = {"none": {}, "causal": {"causal": True}, "window": {"window_size": (500, 0)}}
# Tables of tiles go by head_dim up to 64, 128 and 256; one that is no power of two has part of its
# tile masked away.
POWERS, ALL = (64, 128, 256), (64, 128, 256, 96)

# What needs the most registers and shared memory of each entry in the tables of plan.py.
TIGHT = [
    # kernel   head_dims mask      keys         words
    ("forward", ALL, "window", "pages 16", "lse"),  # three loops that look pages up
    ("forward", ALL, "window", "packed", "lse"),  # three loops, and where the sequence lies
    ("forward", POWERS, "none", "packed", "lse"),  # the widest tiles
    ("forward", POWERS, "causal", "pages 16", "lse"),  # tiles for small pages
    ("forward", POWERS, "causal", "pages 256", "lse"),  # tiles for pages of whole tiles
    ("decode", ALL, "window", "pages 16", "q=16 lse"),  # 64 rows, three loops, one more stage
    ("decode", ALL, "window", "used", "q=4 splits=3 lse"),  # 16 rows
    ("combine", (256,), "none", "dense", "q=1 splits=128 lse"),  # the most parts
]
RARE = [
    Variant("append", 64, "none", "dense", "q=1 append=1"),
    Variant("append", 128, "none", "pages 16", "q=1 append=1 fp16"),
    Variant("append", 256, "causal", "used", "q=16 append=16"),
    Variant("append", 96, "causal", "pages 5", "q=16 append=16"),
    Variant("append", 128, "causal", "pages 256", "q=512 append=512"),
    Variant("combine", 64, "none", "used", "q=1 splits=128 fp16"),
    Variant("combine", 96, "none", "used", "q=1 splits=128 lse"),
    Variant("decode", 128, "causal", "pages 5", "q=8 lse"),
    Variant("decode", 40, "window", "pages 16", "q=16 lse"),
    Variant("decode", 201, "window", "pages 16", "q=16 lse"),
    Variant("forward", 1, "causal", "dense", "lse"),  # strides that are 1
    Variant("forward", 16, "causal", "packed", "lse"),  # the narrowest tile
    Variant("forward", 59, "window", "packed", "lse"),  # loads without alignment
    Variant("forward", 111, "window", "pages 16", "lse"),
    Variant("forward", 192, "causal", "pages 16", "lse"),
    Variant("forward", 201, "window", "packed", "lse"),
    *(Variant("forward", d, "causal", "pages 16", "lse apart") for d in ALL),
    *(Variant("forward", d, "causal", "packed", "lse apart far") for d in POWERS),
]


def tight() -> list[Variant]:
    """The variants that are most likely not to fit."""
    return [Variant(kernel, d, *row) for kernel, head_dims, *row in TIGHT for d in head_dims]


def rest() -> list[Variant]:
    """The others: for each class of head_dim every mask with every kind of keys, and what is rare.

    LSE, dtype and splits alternate so that they meet every mask and every kind of keys.
    """
    variants = []
    keys = ("dense", "packed", "used", "pages 16", "pages 5", "pages 256")
    for head_dim, (i, mask), (j, name) in itertools.product(ALL, enumerate(MASKS), enumerate(keys)):
        words = ["lse"] * ((i + j) % 2) + ["fp16"] * ((i + j // 2) % 3 == 0)
        variants.append(Variant("forward", head_dim, mask, name, " ".join(words)))
    keys = ("dense", "used", "pages 16", "pages 256")
    for head_dim, (i, q), (j, name) in itertools.product(
        ALL, enumerate((1, 8, 16)), enumerate(keys)
    ):
        words = [f"q={q}", *["splits=2"] * ((i + j) % 2), *["lse"] * (j // 2 == i % 2)]
        mask = list(MASKS)[(i + j) % 3]
        variants.append(Variant("decode", head_dim, mask, name, " ".join(words)))
    return [v for v in variants + RARE if v not in tight()]


def call(variant: Variant) -> None:
    """Make the variant's call."""
    words = variant.words.split()
    number = {name: int(n) for name, _, n in (word.partition("=") for word in words) if n}
    seqlen_q, appended = number.get("q", SEQLEN_Q), number.get("append", 0)
    head_dim = variant.head_dim
    nheads, nheads_k = (NHEADS, NHEADS_K) if head_dim > 1 else (1, 1)
    dtype = torch.float16 if "fp16" in words else torch.bfloat16

    def tokens(*shape: int, heads: int = nheads_k, apart: bool = False) -> torch.Tensor:
        x = torch.empty(*shape, heads * (1 + apart), head_dim, dtype=dtype)
        return x[..., :heads, :]

    def keys(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens(*shape), tokens(*shape, apart="apart" in words)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    lse, mask = "lse" in words, MASKS[variant.mask]
    layout, _, size = variant.keys.partition(" ")
    pages: dict[str, torch.Tensor] = {}
    if size:
        max_blocks = SEQLEN_K // int(size)
        pages = {"block_table": numbers(BATCH, max_blocks)}
        k, v = keys(BATCH * max_blocks, int(size))
    elif layout == "packed":
        k, v = keys(SEQLEN_K)
    else:
        k, v = keys(BATCH, SEQLEN_K)
    if "q" in number or layout == "used":
        new = {"k": tokens(BATCH, appended), "v": tokens(BATCH, appended)} if appended else {}
        lengths = SEQLEN_K - appended if layout == "dense" else numbers(BATCH)
        q = tokens(BATCH, seqlen_q, heads=nheads)
        mfa.flash_attn_with_kvcache(
            q, k, v, **new, cache_seqlens=lengths, **pages, **mask,
            num_splits=number.get("splits", 1), return_softmax_lse=lse,
        )  # fmt: skip
    elif pages:
        q = tokens(SEQLEN_Q, heads=nheads)
        mfa.flash_attn_varlen_func(
            q, k, v, numbers(BATCH + 1), None, SEQLEN_Q, SEQLEN_K, **mask, return_attn_probs=lse,
            seqused_k=numbers(BATCH), **pages,
        )  # fmt: skip
    elif layout == "packed":
        q, cu_seqlens = tokens(SEQLEN_Q, heads=nheads), numbers(BATCH + 1)
        mfa.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, SEQLEN_Q, SEQLEN_K, **mask, return_attn_probs=lse
        )
    else:
        q = tokens(BATCH, SEQLEN_Q, heads=nheads)
        mfa.flash_attn_func(q, k, v, **mask, return_attn_probs=lse)


def far(x: torch.Tensor) -> torch.Tensor:
    """Like x without its memory, and with rows so far apart that offsets need 64 bits."""
    outer, row = x.stride()[:-3], 1 << 25
    strides = (*(row * x.shape[-3] for _ in outer), row, *x.stride()[-2:])
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")


class Driver:
    """What Triton's launcher asks of a driver before it loads a kernel."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(p: Problem) -> list[tuple[str, dict[str, int], Any]]:
    """(kernel, options, what was compiled) of every launch of a call."""
    recipe = dispatch._recipe(p)
    tensors = {**p._asdict(), "out": torch.empty_like(p.q), "lse": None}
    if recipe.lse_shape is not None:
        tensors["lse"] = torch.empty(recipe.lse_shape)
    if recipe.part_shapes is not None:
        tensors["part_out"], tensors["part_lse"] = map(torch.empty, recipe.part_shapes)
    compiled = []
    for launch in recipe.launches:
        arguments = [*(tensors[name] for name in launch.pointers), *launch.constants]
        kernel = launch.kernel.warmup(*arguments, grid=(launch.programs,), **launch.options)
        compiled.append((launch.kernel.__name__, launch.options, kernel))
    return compiled


def measured(kernel: Any) -> dict[str, int]:
    """Resources of a compiled kernel. It has a stack only where registers were spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    shared, columns = kernel.metadata.shared, kernel.metadata.tmem_size or 0
    return {"registers": registers, "spilled": stack, "shared": shared, "tensor_memory": columns}


def compile_variant(variant: Variant, seen: set[str]) -> list[dict[str, Any]]:
    """What came of each kernel that the variant launches, except those seen before."""
    launched: list[tuple[str, dict[str, int], Any]] = []

    def instead_of_cpu(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        if "far" in variant.words.split():
            p = p._replace(k=far(p.k), v=far(p.v))
        launched.extend(compile_launches(p))
        return p.q, p.q

    cpu.run = instead_of_cpu
    start = time.perf_counter()
    try:
        call(variant)
    except Exception as error:
        return [{"variant": str(variant), "error": f"{type(error).__name__}: {error}"}]
    seconds = time.perf_counter() - start
    names = [name.removesuffix("_kernel") for name, _, _ in launched]
    if variant.kernel not in names:
        return [{"variant": str(variant), "error": f"it launched {' and '.join(names)}"}]
    results = []
    for name, (_, options, kernel) in zip(names, launched, strict=True):
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            row = {"variant": str(variant), "kernel": name, **options, **measured(kernel)}
            results.append({**row, "seconds": round(seconds, 2)})
            seconds = 0.0
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int, choices=MULTIPROCESSORS)
    parser.add_argument("--tight", default="0/1", metavar="K/N")
    parser.add_argument("--rest", default="0/1", metavar="K/N")
    arguments = parser.parse_args()
    variants = []
    for share, these in ((arguments.tight, tight()), (arguments.rest, rest())):
        k, n = map(int, share.split("/"))
        variants += these[k::n]
    arch = arguments.arch
    driver.set_active(Driver(arch))
    plan.gpu = lambda device: plan.Gpu(f"sm_{arch}", arch, MULTIPROCESSORS[arch])
    seen: set[str] = set()
    for variant in variants:
        for result in compile_variant(variant, seen):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
