"""Compiles the kernels for a GPU that need not be there, and prints what came of it as JSON.

    python tests/compile_variants.py ARCH [--round 0 | --round 1]

A variant is a call of a public function. Its tensors lie on the CPU, but it is checked, planned
and specialised as on a GPU of compute capability ARCH (90 for 9.0): whatever the package decides
to launch goes through Triton's own launcher, up to where that would load the binary. So nothing
here has to know how Triton treats strides, ones and alignment.

Without --round all variants are compiled, in up to twenty minutes. The tests compile each ARCH
twice, with another Triton in each round, and share the variants out.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
import time
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from registers import unwritten
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import mini_flash_attention as mfa
from mini_flash_attention import dispatch, execution_backward, recipes, settings
from mini_flash_attention.kernels.launch import Launch
from mini_flash_attention.kernels.tma import TmaLaunch
from mini_flash_attention.plan import decode, gpu, hopper

BATCH, SEQLEN_Q, SEQLEN_K = 2, 1024, 1 << 14
NHEADS, NHEADS_K = 8, 2
FLOPS = hopper.HOPPER_FLOPS
ARCHS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


class Variant(NamedTuple):
    """A call, and the kernel that it is there for."""

    kernel: str
    head_dim: int
    mask: str
    keys: str  # dense, packed, used (dense with lengths on the device) or pages of a size
    words: str  # lse, fp16, q=, splits=, append=; wide, shares: what plan.decode does if there is a
    # lot to read; short: if little; many: what plan.hopper does if there are many keys; packs,
    # parts: with few queries, of few keys or many; apart: v has other strides than k; far: 64 bits;
    # unaligned: says that head_dim leaves no load aligned; v=: v's head_dim; softcap, alibi, sinks,
    # mod, rotary; rows: cache_batch_idx and cache_leftpad; dlse: of the LSE too; alone: each
    # KV head serves one query head

    def __str__(self) -> str:
        return f"{self.kernel} head_dim {self.head_dim}, {self.mask}, {self.keys}, {self.words}"


MASKS = {"none": {}, "causal": {"causal": True}, "window": {"window_size": (5000, 0)}}
# plan/configs.py has tiles for head_dim up to 64, 128 and 256. 96 stands for what is no power of
# two: part of its tile is masked away.
POWERS, ALL = (64, 128, 256), (64, 128, 256, 96)

# The most registers and shared memory that those tiles come to. For every architecture,
TIGHT = [  # with both Tritons:
    ("forward", ALL, "window", "pages 16", "lse"),  # three loops that look pages up
    ("forward", (128, 256), "none", "packed", "lse"),  # the widest tiles
    ("decode", (128,), "window", "pages 16", "q=16 lse shares"),  # most rows
]
ALSO_TIGHT = [  # with one of them:
    ("forward", (64,), "none", "packed", "lse"),
    ("forward", ALL, "window", "packed", "lse fp16"),  # three loops, and where the sequence lies
    ("forward", POWERS, "causal", "pages 16", "lse"),  # the tiles for small pages
    ("forward", POWERS, "causal", "pages 256", "lse"),  # the tiles for large pages
    ("decode", (64, 256), "window", "pages 16", "q=16 lse shares"),
    ("decode", (64, 256), "causal", "used", "q=8 shares"),
    ("decode", POWERS, "causal", "used", "q=8 wide"),
    ("decode", POWERS, "causal", "pages 16", "q=8 wide"),
    ("decode", POWERS, "causal", "pages 16", "q=4 short"),
    ("decode", POWERS, "none", "pages 256", "q=1 wide shares"),
    ("decode", (128,), "causal", "dense", "q=16 lse"),
    ("decode", (64, 256), "causal", "used", "q=64 splits=2"),  # the tiles for many rows
    ("decode", (128, 96), "window", "pages 16", "q=64 splits=2 lse"),
    ("combine", (256,), "none", "dense", "q=1 splits=128 lse"),
]
RARE = [
    ("append", (64,), "none", "dense", "q=1 append=1"),
    ("append", (128,), "none", "pages 16", "q=1 append=1 fp16"),
    ("append", (256,), "causal", "used", "q=16 append=16"),
    ("append", (96,), "causal", "pages 5", "q=16 append=16"),
    ("append", (128,), "causal", "pages 256", "q=512 append=512"),
    ("combine", (64,), "none", "used", "q=1 splits=128 fp16"),
    ("combine", (96,), "none", "used", "q=4 splits=128 lse"),
    ("decode", (16,), "causal", "pages 5", "q=8 lse"),
    ("decode", (96,), "window", "pages 16", "q=16 lse"),
    ("forward", (1,), "causal", "dense", "lse"),  # strides that are 1
    ("forward", (16,), "causal", "packed", "lse"),  # the narrowest tile
    ("forward", (192,), "causal", "pages 16", "lse"),
    ("forward", (59,), "window", "pages 16", "lse unaligned"),
    ("decode", (201,), "window", "pages 16", "q=16 lse unaligned"),
    ("forward", ALL, "causal", "pages 16", "lse apart"),
    ("forward", (128,), "causal", "packed", "lse apart far"),
    # What becomes of scores, and what else a cache may come with.
    ("forward", POWERS, "causal", "dense", "mod"),
    ("forward", (128,), "window", "pages 16", "softcap alibi sinks lse"),
    ("forward", (192,), "causal", "pages 16", "v=128 sinks"),
    ("forward", (64,), "causal", "used", "q=64 append=64 rotary rows"),
    ("decode", (128,), "window", "used", "q=16 softcap alibi sinks mod rows lse shares"),
    ("decode", (256,), "causal", "used", "q=1 mod wide"),
    ("decode", (64,), "none", "packed", "splits=3 alibi lse"),
    ("combine", (128,), "causal", "dense", "q=1 splits=16 sinks v=64"),
    ("append", (128,), "causal", "pages 16", "q=16 append=16 rotary"),
    ("forward", (72, 40), "causal", "dense", "lse"),  # multiples of 8 and not of 16
    ("decode", (88, 40), "window", "pages 16", "q=16 lse"),
]


# On Hopper alone: what needs most registers of its own kernel, with both Tritons,
HOPPER = [
    # and a K and a V that are not as wide, in shared memory that is neither's for good
    ("forward", (36,), "causal", "pages 16", "lse v=12 unaligned"),
    ("forward", (36,), "none", "packed", "lse v=28 unaligned"),
    ("decode", (24,), "causal", "used", "q=64 splits=2 v=15"),
    ("forward", (40,), "causal", "pages 16", "lse v=16"),  # multiples of 8 and not of 16
    ("forward", (40,), "none", "packed", "lse v=32"),
    ("forward", (72,), "window", "pages 16", "lse"),
    ("decode", (88,), "none", "pages 256", "q=1 wide shares"),
    ("forward_hopper", (128,), "window", "pages 16", "lse fp16"),
    ("forward_hopper", (256,), "window", "pages 256", "lse fp16"),
]
ALSO_HOPPER = [  # with one of them:
    ("forward_hopper", POWERS, "causal", "dense", ""),
    ("forward_hopper", POWERS[::-1], "window", "packed", "lse"),
    ("forward_hopper", (64,), "window", "pages 256", "lse fp16 many"),
    ("forward_hopper", (96,), "none", "used", "lse"),
    ("forward_hopper", (64,), "causal", "pages 16", "lse"),
    ("forward_hopper", (64,), "none", "dense", "many"),
    ("forward_hopper", (64,), "causal", "packed", "lse many"),
    ("forward_hopper", (128,), "causal", "dense", "softcap alibi sinks"),
    ("forward_hopper", POWERS, "causal", "dense", "softcap"),
    ("forward_hopper", POWERS, "causal", "dense", "alibi"),
    ("forward_hopper", (64,), "causal", "packed", "softcap lse many"),
    ("forward_hopper", (64,), "none", "packed", "alibi many"),
    ("forward_hopper", (256,), "causal", "packed", "mod lse"),
    ("forward_hopper", (64,), "causal", "dense", "softcap alibi sinks many"),
    ("forward_hopper", (128,), "causal", "pages 16", "mod"),
    ("forward_hopper", (128,), "window", "pages 16", "softcap"),
    ("forward_hopper", POWERS, "causal", "used", "q=32 parts"),
    ("forward_hopper", (128, 64), "causal", "pages 16", "q=32 parts"),
    ("forward_hopper", (128, 64), "window", "used", "q=32 parts"),
    ("forward_hopper", (64, 128), "window", "pages 16", "q=32 packs lse"),
    ("forward_hopper", (256,), "causal", "pages 256", "q=32 packs lse"),
]


# Gradients. A call launches `preprocess`, `dkdv` and `dq`, or where it is for Hopper's the others.
FOR_HOPPER = {"backward_hopper", "postprocess", "dkdv_hopper", "dq_hopper"}
BACKWARD = {"preprocess", "dkdv", "dq"} | FOR_HOPPER
# For every architecture,
TIGHT_BACKWARD = [  # with both Tritons:
    ("dkdv", (64, 128, 256), "causal", "dense", ""),
    ("dkdv", (128,), "window", "used", "dlse fp16"),  # masks in every block, lengths on the device
]
ALSO_TIGHT_BACKWARD = [  # with one of them:
    ("dkdv", (96,), "causal", "dense", ""),  # part of a tile is masked away
    ("dq", (64, 256), "window", "packed", "dlse"),
    ("dkdv", (64, 128), "none", "dense", "alone"),  # one loop less
    ("dq", (128,), "causal", "dense", "softcap"),
    ("dkdv", (64,), "causal", "dense", "alibi"),
    ("dkdv", (128, 256), "causal", "packed", "mod"),
    ("dq", (128,), "window", "used", "softcap alibi mod dlse"),
]
# For some architecture:
RARE_BACKWARD = [
    ("preprocess", (1,), "causal", "dense", "dlse"),  # strides that are 1
    ("preprocess", (16,), "none", "packed", ""),  # the narrowest tile
    ("dkdv", (192,), "causal", "dense", "v=128"),
    ("dkdv", (64,), "none", "packed", "v=128"),
    ("dkdv", (256,), "none", "dense", "alone"),
    ("dq", (64, 256), "causal", "dense", "softcap"),
    ("dkdv", (128, 256), "window", "dense", "alibi"),
    ("dkdv", (64,), "causal", "packed", "mod"),
    ("dkdv", (59,), "window", "packed", "unaligned"),
    ("dq", (201,), "causal", "dense", "unaligned"),
    ("dkdv", (36,), "none", "packed", "v=12 unaligned"),
    ("dkdv", (72, 40), "causal", "dense", ""),  # multiples of 8 and not of 16
    ("dq", (88,), "window", "used", "alone"),
    ("dkdv", (128,), "causal", "packed", "far"),
    ("dkdv", (256,), "window", "used", "fp16"),
    ("dq", (96,), "none", "packed", "mod alone"),
    ("dkdv", (64,), "window", "dense", "softcap alibi dlse"),
    ("dq", (256,), "none", "packed", "softcap mod"),
]
HOPPER_BACKWARD = [  # on Hopper alone, with both Tritons
    ("backward_hopper", (128, 64), "causal", "dense", ""),
    ("backward_hopper", (128, 64), "none", "dense", "fp16"),
    ("backward_hopper", (128, 64), "window", "used", "dlse"),
    ("backward_hopper", (128, 96), "none", "packed", "alone"),
    ("backward_hopper", (128, 64), "causal", "dense", "ordered"),
    ("backward_hopper", (64,), "window", "packed", "ordered"),
    ("dkdv_hopper", (256,), "causal", "dense", "alone"),
    ("dkdv_hopper", (256,), "window", "used", "dlse"),
    ("dkdv_hopper", (192,), "none", "packed", "v=128 fp16"),
    ("dq_hopper", (256,), "causal", "dense", "alone"),
    ("dq_hopper", (256,), "window", "used", "dlse"),
    ("dq_hopper", (192,), "none", "packed", "v=128 fp16"),
    ("postprocess", (96,), "causal", "packed", ""),
    ("postprocess", (40,), "causal", "dense", ""),
]


def variants(rows: list[tuple[str, tuple[int, ...], str, str, str]]) -> list[Variant]:
    """One for each head_dim of each row."""
    return [Variant(kernel, d, *row) for kernel, head_dims, *row in rows for d in head_dims]


def others() -> list[Variant]:
    """Every mask with every kind of keys, in each class of head_dim where that matters.

    LSE, dtype, splits and, in decoding, head_dim alternate so that every pair of values occurs.
    """
    grid = []
    keys = ("dense", "packed", "pages 16", "used", "pages 256", "pages 5")
    for d, (i, mask), (j, name) in itertools.product(ALL, enumerate(MASKS), enumerate(keys)):
        if name in ("used", "pages 5") and d != POWERS[i]:
            continue  # one class is enough: like dense and pages 16 but for a line
        words = ["lse"] * ((i + j) % 2) + ["fp16"] * (i == j % 2)
        grid.append(Variant("forward", d, mask, name, " ".join(words)))
    keys = ("dense", "used", "pages 16", "pages 256")
    for (i, q), (j, name) in itertools.product(enumerate((1, 8, 16)), enumerate(keys)):
        words = [f"q={q}", *["splits=2"] * ((i + j) % 2), *["lse"] * (j // 2 == i % 2)]
        mask = list(MASKS)[(i + 2 * j) % 3]
        grid.append(Variant("decode", POWERS[(i + j) % 3], mask, name, " ".join(words)))
    there = [v[:4] for v in variants(TIGHT + ALSO_TIGHT) if v.kernel == "forward"]
    return [v for v in grid if v[:4] not in there] + variants(RARE)


def share(arch: int, turn: int) -> list[Variant]:
    """What `arch` compiles in this round."""
    targets = [(arch, turn) for turn in (0, 1) for arch in ARCHS]
    mine = others()[targets.index((arch, turn)) :: len(targets)]
    # One of these stands for the others: the same tiles, the same instructions and, sm_80 apart,
    # the same registers to the last.
    alike = (80, 86, 89)

    def takes(n: int) -> bool:
        return arch not in alike or alike[(n + turn) % 3] == arch

    mine += variants(RARE_BACKWARD)[targets.index((arch, turn)) :: len(targets)]
    if arch == 90:
        mine += variants(HOPPER) + variants(ALSO_HOPPER)[turn::2] + variants(HOPPER_BACKWARD)
    mine += [v for n, v in enumerate(variants(TIGHT + TIGHT_BACKWARD)) if takes(n)]
    half = enumerate(variants(ALSO_TIGHT + ALSO_TIGHT_BACKWARD))
    half = [(n, v) for n, v in half if (n + arch // 10) % 2 == turn]
    return mine + [v for n, v in half if takes(n // 2)]


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
        v = tokens(*shape, apart="apart" in words)
        return tokens(*shape), v[..., : number.get("v", head_dim)]

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    more: dict[str, Any] = {}
    if "softcap" in words:
        more["softcap"] = 30.0
    if "alibi" in words:
        more["alibi_slopes"] = torch.empty(BATCH, nheads)
    if "sinks" in words:
        more["s_aux"] = torch.empty(nheads, dtype=dtype)
    if "mod" in words:
        more |= {"score_mod": in_document, "score_mod_args": (numbers(BATCH, SEQLEN_K),)}
    settings.PORTABLE = variant.kernel != "forward_hopper"
    hopper.MANY_KEYS = 0 if "many" in words else 2**31
    lse, mask = "lse" in words, MASKS[variant.mask]
    automatic = {"wide", "shares", "short", "packs", "parts"} & set(words)
    hopper.HOPPER_FLOPS = 0 if {"packs", "parts"} & set(words) else FLOPS
    decode.SMALL_WORK = 0 if "wide" in words else 2**31
    decode.SPLIT_KEYS = 0 if "parts" in words else 2**31  # no forward kernel's call is decoded
    decode.STREAM_K_WORK = decode.WAVES_WORK = 0 if "shares" in words else 2**31
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
        if "rotary" in words:
            new |= {"rotary_cos": torch.empty(SEQLEN_K, head_dim // 2, dtype=dtype)}
            new |= {"rotary_sin": new["rotary_cos"]}
        if "rows" in words:
            more |= {"cache_batch_idx": numbers(BATCH), "cache_leftpad": numbers(BATCH)}
        lengths = SEQLEN_K - appended if layout == "dense" else numbers(BATCH)
        q = tokens(BATCH, seqlen_q, heads=nheads)
        mfa.flash_attn_with_kvcache(
            q, k, v, **new, cache_seqlens=lengths, **pages, **mask, **more,
            num_splits=0 if automatic else number.get("splits", 1), return_softmax_lse=lse,
        )  # fmt: skip
    elif pages:
        q = tokens(SEQLEN_Q, heads=nheads)
        mfa.flash_attn_varlen_func(
            q, k, v, numbers(BATCH + 1), None, SEQLEN_Q, SEQLEN_K, **mask, return_attn_probs=lse,
            seqused_k=numbers(BATCH), **pages, **more, num_splits=number.get("splits", 1),
        )  # fmt: skip
    elif layout == "packed":
        q, cu_seqlens = tokens(SEQLEN_Q, heads=nheads), numbers(BATCH + 1)
        mfa.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, SEQLEN_Q, SEQLEN_K, **mask, return_attn_probs=lse,
            num_splits=number.get("splits", 0), **more,
        )  # fmt: skip
    else:
        q = tokens(BATCH, SEQLEN_Q, heads=nheads)
        mfa.flash_attn_func(q, k, v, **mask, return_attn_probs=lse, **more)


def differentiate(variant: Variant) -> None:
    """Make a call of the backward pass."""
    words = variant.words.split()
    number = {name: int(n) for name, _, n in (word.partition("=") for word in words) if n}
    head_dim, head_dim_v = variant.head_dim, number.get("v", variant.head_dim)
    nheads = NHEADS if head_dim > 1 else 1
    nheads_k = nheads if "alone" in words or head_dim == 1 else NHEADS_K
    dtype = torch.float16 if "fp16" in words else torch.bfloat16
    settings.PORTABLE = variant.kernel not in FOR_HOPPER
    packed = variant.keys != "dense"

    def tokens(length: int, heads: int, head_dim: int) -> torch.Tensor:
        return torch.empty(*([] if packed else [BATCH]), length, heads, head_dim, dtype=dtype)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    q, k = tokens(SEQLEN_Q, nheads, head_dim), tokens(SEQLEN_K, nheads_k, head_dim)
    v, out = tokens(SEQLEN_K, nheads_k, head_dim_v), tokens(SEQLEN_Q, nheads, head_dim_v)
    lse = torch.empty(*([] if packed else [BATCH]), nheads, SEQLEN_Q)
    more: dict[str, Any] = dict(MASKS[variant.mask])
    if "softcap" in words:
        more["softcap"] = 30.0
    if "alibi" in words:
        more["alibi_slopes"] = torch.empty(BATCH, nheads)
    if "mod" in words:
        more |= {"score_mod": curved, "score_mod_bwd": curved_backward}
        more["score_mod_args"] = (torch.empty(SEQLEN_K),)
    if "ordered" in words:
        more["deterministic"] = True
    if "dlse" in words:
        more["dsoftmax_lse"] = torch.empty_like(lse)
    if packed:
        more |= {"cu_seqlens_q": numbers(BATCH + 1), "cu_seqlens_k": numbers(BATCH + 1)}
        more |= {"max_seqlen_q": SEQLEN_Q, "max_seqlen_k": SEQLEN_K}
    if variant.keys == "used":
        more |= {"seqused_q": numbers(BATCH), "seqused_k": numbers(BATCH)}
    mfa.backward(torch.empty_like(out), q, k, v, out, lse, **more)


@triton.jit
def curved(score, batch, head, q_idx, kv_idx, args):
    """A score_mod that reads a tensor, and whose derivative depends on the score."""
    weight = tl.load(args[0] + kv_idx, mask=kv_idx < 16384, other=0.0)
    return tl.where(weight < 0.0, float("-inf"), weight * tl.sigmoid(score))


@triton.jit
def curved_backward(grad, score, batch, head, q_idx, kv_idx, args):
    s = tl.sigmoid(score)
    return grad * tl.load(args[0] + kv_idx, mask=kv_idx < 16384, other=0.0) * s * (1.0 - s)


@triton.jit
def in_document(score, batch, head, q_idx, kv_idx, args):
    """A score_mod that reads a tensor twice: -inf between tokens of different documents."""
    row = args[0] + batch * 2048
    same = tl.load(row + tl.maximum(q_idx, 0)) == tl.load(row + tl.minimum(kv_idx, 2047))
    return tl.where(same, score, float("-inf"))


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


def cuobjdump(kernel: Any, *words: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, *words, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@lru_cache(maxsize=1)
def machine_code(kernel: Any) -> str:
    return cuobjdump(kernel, "-sass")


def measured(kernel: Any) -> dict[str, int]:
    """Resources of a compiled kernel, and how often it reads a register that nothing has written.

    It has a stack only where registers were spilled.
    """
    usage = cuobjdump(kernel, "-res-usage")
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    shared, columns = kernel.metadata.shared, kernel.metadata.tmem_size or 0
    resources = {"registers": registers, "spilled": stack, "shared": shared, "unwritten": 0}
    if kernel.metadata.target.arch <= 90:  # what Blackwell's instructions write is not known there
        resources["unwritten"] = len(unwritten(machine_code(kernel)))
    return resources | {"tensor_memory": columns}


# One of the Hopper kernel's matrix products, the wait for it, or what is worked out meanwhile.
WAIT = r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]"
STEP = re.compile(rf"\b(HGMMA|WARPGROUP\.ARRIVE|{WAIT}|MUFU\.EX2|FMNMX|FMUL|PRMT)")


# A warp asks whether any of its rows needs what comes next, and jumps over it.
VOTE, LINE = re.compile(r"\bVOTE\.ANY"), re.compile(r"/\*([0-9a-f]{4,})\*/ +(.*?);")
JUMP = re.compile(r"^@!P\d BRA 0x([0-9a-f]+)$")


def common(sass: str) -> str:
    """The machine code without what warps jump over after a vote."""
    kept, voted, until = [], False, 0
    for address, line in LINE.findall(sass):
        if int(address, 16) < until:
            continue
        kept.append(line)
        voted = voted or bool(VOTE.search(line))
        if voted and (jump := JUMP.match(line.strip())):
            voted, until = False, int(jump[1], 16)
    return "\n".join(kept)


def schedule(kernel: Any) -> dict[str, int]:
    """Of the Hopper kernel's machine code: what ptxas made of the order that its source asks for.

    groups: of matrix products issued together; where ptxas serialises them each stands alone.
    hidden, ahead: exponentials, and maxima, between the wait for the scores and the one for the
    weighted sum. moves: multiplications after that, where they are not jumped over. repairs: of
    weights that were not converted with their neighbours.
    """
    steps = STEP.findall(common(machine_code(kernel)))
    letters = {"HGMMA": "h", "WARPGROUP.ARRIVE": "a", "MUFU.EX2": "e", "FMNMX": "m"}
    letters |= {"FMUL": "r", "PRMT": "p"}
    text = "".join(letters.get(x, x[-1]) for x in steps)
    between, after = re.findall(r"1([emrp]*)0", text), re.findall(r"1[emrp]*0([^a]*)a", text)
    hidden, ahead = (min((x.count(letter) for x in between), default=0) for letter in "em")
    moves, repairs = (max((x.count(letter) for x in after), default=0) for letter in "rp")
    counts = {"hidden": hidden, "ahead": ahead, "moves": moves, "repairs": repairs}
    return {"groups": text.count("a"), **counts}


# Of PTX: an address in shared memory worked out, a barrier made, a number stored or loaded.
PLACE = re.compile(r"add\.s32\s+(%r\d+), %r\d+, (\d+);")
BARRIER = re.compile(r"mbarrier\.init\S+ \[(%r\d+)\]")
NUMBER = re.compile(r"(?:ld|st)\.shared\.[^[]*\[ ?(%r\d+|global_smem)(?:\+| \+ )(\d+) ?\]")


def reused(ptx: str) -> int:
    """Barriers with a number in their place, which the driver may not keep (bench/NOTES.md)."""
    places, barriers, numbers = {"global_smem": 0}, set(), set()
    for line in ptx.splitlines():
        if found := PLACE.search(line):
            places[found[1]] = int(found[2])
        elif found := BARRIER.search(line):
            barriers.add(places[found[1]])
        elif (found := NUMBER.search(line)) and found[1] in places:
            numbers.add(places[found[1]] + int(found[2]))
    return len(barriers & numbers)


def aligned(variant: Variant) -> bool:
    """Whether q, k and v can be loaded 16 bytes at a time, and nothing else has two bytes."""
    head_dims = (variant.head_dim, *map(int, re.findall(r"\bv=(\d+)", variant.words)))
    odd = {"unaligned", "sinks"} & set(variant.words.split())
    return not odd and all(head_dim % 8 == 0 for head_dim in head_dims)


def compile_variant(variant: Variant, seen: set[str]) -> list[dict[str, Any]]:
    """What came of each kernel that the variant launches, except those seen before."""
    launched: list[tuple[str, Launch, Any]] = []

    def run(entry: Any, arguments: Any) -> Any:
        p = entry.parse(**arguments)
        if "far" in variant.words.split():
            p = p._replace(k=far(p.k), v=far(p.v))
        return recipes.follow(recipes.make(entry, p, arguments), arguments)

    def run_backward(entry: Any, arguments: Any) -> Any:
        p = entry.parse(**arguments)
        if "far" in variant.words.split():
            p = p._replace(q=far(p.q), k=far(p.k), v=far(p.v))
        arguments["score_mod_args"] = p.scores.aux or ()
        result = execution_backward.allocate(arguments)
        names = ("out", "dout", "softmax_lse", "dsoftmax_lse", "dq", "dk", "dv")
        out, dout, lse, dlse, *gradients = (arguments[name] for name in names)
        given = execution_backward.BackwardTensors(out, dout, lse, dlse, result.delta, *gradients)
        recipes.launch(execution_backward.make(entry, p, given, arguments), arguments, True)
        return result

    def compile_only(launch: Launch, tensors: Any, stream: Any = None) -> None:
        arguments = launch.arguments(tensors)
        compiled = launch.kernel.warmup(*arguments, grid=(launch.programs,), **launch.options)
        launched.append((launch.kernel.__name__.removesuffix("_kernel"), launch, compiled))
        if isinstance(launch, TmaLaunch) and launch.combine_launch:
            compile_only(launch.combine_launch, tensors)

    dispatch.run, Launch.__call__, TmaLaunch.__call__ = run, compile_only, compile_only
    dispatch.run_backward = run_backward
    start = time.perf_counter()
    try:
        (differentiate if variant.kernel in BACKWARD else call)(variant)
    except Exception as error:
        import os
        import traceback

        if os.environ.get("TB"):
            traceback.print_exc()
        return [{"variant": str(variant), "error": f"{type(error).__name__}: {error}"}]
    seconds = time.perf_counter() - start
    names = [name for name, _, _ in launched]
    if variant.kernel not in names:
        return [{"variant": str(variant), "error": f"it launched {' and '.join(names)}"}]
    results = []
    for name, launch, compiled in launched:
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            row = {"variant": str(variant), "kernel": name, **launch.options, **measured(compiled)}
            if name in ("forward", "decode", "preprocess", "dkdv", "dq") and aligned(variant):
                row["narrow"] = len(re.findall(r"\bLDG\.\S*U16\b", machine_code(compiled)))
            if name == "backward_hopper":
                row["reused"] = reused(compiled.asm["ptx"])
            if name == "forward_hopper":
                facts, mod = launch.constants[-2:]
                keys, consumers = facts.BLOCK_N.value, facts.CONSUMERS.value
                scores = facts.SCORE_MODE.value
                early = scores == "bounded" and variant.head_dim > 128
                lazy = variant.head_dim > 64 and scores == "" and mod is None
                # Exponentials of a thread, one of four a polynomial where there is tanh too;
                # products before, in and after the loop.
                row |= schedule(compiled) | {
                    "reused": reused(compiled.asm["ptx"]),
                    "to_hide": early * keys // 2 * (3 if scores == "bounded" else 4) // 4,
                    "to_be_ahead": 0 if scores == "bounded" else keys // 2 - 2,
                    # Without maxima no sum is moved, with lazy ones hardly ever. A polynomial has a
                    # multiplication, and so has tanh, which may come late too.
                    "may_move": keys // 8
                    if lazy
                    else keys * (5, 1)[early] // 8
                    if scores == "bounded"
                    else 256,
                    "to_issue": 4 * consumers,
                }
            results.append({**row, "seconds": round(seconds, 2)})
            seconds = 0.0
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int, choices=ARCHS)
    parser.add_argument("--round", type=int, choices=(0, 1))
    arguments = parser.parse_args()
    arch, turn = arguments.arch, arguments.round
    everything = variants(TIGHT + ALSO_TIGHT) + others()
    everything += variants(TIGHT_BACKWARD + ALSO_TIGHT_BACKWARD + RARE_BACKWARD)
    everything += variants(HOPPER + ALSO_HOPPER + HOPPER_BACKWARD) * (arch == 90)
    todo = everything if turn is None else share(arch, turn)
    driver.set_active(Driver(arch))
    made = gpu.Gpu(f"sm_{arch}", arch, ARCHS[arch], settings.triton_version())
    gpu.gpu_of = lambda device: made
    seen: set[str] = set()
    for variant in todo:
        for result in compile_variant(variant, seen):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
