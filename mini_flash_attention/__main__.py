"""`python -m mini_flash_attention`: what is here, and whether the kernels compute what they should.

Every kernel answers a small call, which is held to the numerical promise: at most twice the error
of the same computation by PyTorch in the input's precision, and twice the rounding of the result.
The exit status is 1 if one does not keep it.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

import torch

from . import __version__, settings
from . import flash_attn_func as attend
from . import flash_attn_varlen_func as attend_packed
from . import flash_attn_with_kvcache as attend_to_cache
from .plan import decode, hopper
from .plan.gpu import Gpu, gpu_of
from .reference import attention

DESCRIPTION = """\
Prints the versions, the GPU and which kernels serve it. Then every kernel answers a small call,
and its error is held against float64. The exit status is 1 if one errs by more than it may.
"""
VARIABLES = ("MINI_FLASH_ATTENTION_", "TRITON_", "CUDA_VISIBLE_DEVICES")
PAGE_SIZE = 16
Sequences = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


# -- what is here ---------------------------------------------------------------------------------


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def find_gpu() -> tuple[Gpu | None, str]:
    """The GPU that the kernels would run on, and a line about it."""
    if not torch.cuda.is_available():
        return None, "none that torch can use"
    try:
        gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    except NotImplementedError as error:
        return None, str(error)
    capability = f"{gpu.arch // 10}.{gpu.arch % 10}"
    return gpu, f"{gpu.name}, capability {capability}, {gpu.multiprocessors} multiprocessors"


def chosen(gpu: Gpu | None) -> tuple[str, ...]:
    """Which kernels serve many queries and which few, and why."""
    if settings.INTERPRETED:
        return ("portable kernels in Triton's interpreter (TRITON_INTERPRET=1)",) * 2
    if gpu is None:
        return ("PyTorch's own attention (no GPU)",) * 2
    few = f"decode kernel, to {decode.DECODE_SEQLEN_Q} queries, more where it pays, or num_splits"
    if settings.PORTABLE:
        return "portable kernel (MINI_FLASH_ATTENTION_PORTABLE=1)", few
    if gpu.arch != 90:
        return "portable kernel (the other needs compute capability 9.0)", few
    return f"Hopper kernel from {hopper.HOPPER_FLOPS / 1e9:.1f} GFLOP on, portable below", few


def environment(gpu: Gpu | None, about: str) -> Iterator[str]:
    many, few = chosen(gpu)
    found = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)]
    registry = hasattr(torch.nn.attention, "register_flash_attention_impl")
    yield f"mini_flash_attention  {__version__}"
    yield f"Python                {platform.python_version()} on {platform.machine()}"
    yield f"torch                 {torch.__version__}"
    yield f"triton                {version('triton')}"
    yield f"GPU                   {about}"
    yield f"prefill               {many}"
    yield f"decoding              {few}"
    yield f"environment           {', '.join(found) or 'nothing set'}"
    yield f"transformers          {version('transformers')}"
    yield f"flash-attn            {version('flash-attn')}"
    yield f"torch's registry      {'there' if registry else 'missing'}"


# -- whether it computes --------------------------------------------------------------------------


class Check(NamedTuple):
    name: str
    kernels: str  # that it goes through, on a GPU
    call: Callable[[Sequences, bool], torch.Tensor]  # out, sequence after sequence
    lengths: list[tuple[int, int]]  # queries and keys of each sequence
    causal: bool = True
    nheads: int = 4
    head_dim: int = 64


def dense(qkv: Sequences, causal: bool) -> torch.Tensor:
    q, k, v = (torch.stack(x) for x in zip(*qkv, strict=True))
    return attend(q, k, v, causal=causal).flatten(0, 1)


def packed(qkv: Sequences, causal: bool) -> torch.Tensor:
    q, k, v = (torch.cat(x) for x in zip(*qkv, strict=True))
    len_q, len_k = ([x[i].shape[0] for x in qkv] for i in (0, 1))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int().to(q.device) for n in (len_q, len_k))
    return attend_packed(q, k, v, cu_q, cu_k, max(len_q), max(len_k), causal=causal)


def split(qkv: Sequences, causal: bool) -> torch.Tensor:
    q, k, v = (torch.stack(x) for x in zip(*qkv, strict=True))
    return attend_to_cache(q, k, v, causal=causal, num_splits=3).flatten(0, 1)


def paged(qkv: Sequences, causal: bool) -> torch.Tensor:
    """Pages in random order, with NaN where no key is; the call appends each last key."""
    device, lengths = qkv[0][0].device, [k.shape[0] - 1 for _, k, _ in qkv]
    columns = -(-max(lengths) // PAGE_SIZE) + 1
    table = torch.randperm(len(qkv) * columns).view(len(qkv), columns).to(device)
    shape = (table.numel(), PAGE_SIZE, *qkv[0][1].shape[1:])
    k_cache, v_cache = (torch.full(shape, float("nan")).to(qkv[0][0]) for _ in "kv")
    for row, n, (_, k, v) in zip(table, lengths, qkv, strict=True):
        j = torch.arange(n, device=device)
        for cache, x in ((k_cache, k), (v_cache, v)):
            cache[row[j // PAGE_SIZE], j % PAGE_SIZE] = x[:-1]
    q, k, v = (torch.stack([x[i][-1:] for x in qkv]) for i in range(3))
    used = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = attend_to_cache(
        q, k_cache, v_cache, k, v, cache_seqlens=used, block_table=table.int(), causal=causal
    )
    return out.flatten(0, 1)


CHECKS = [
    Check("dense", "portable", dense, [(70, 200), (70, 200)], causal=False),
    Check("causal", "portable", dense, [(70, 200), (70, 200)]),
    Check("varlen", "portable", packed, [(1, 50), (90, 90), (33, 200)]),
    Check("paged decode", "append, decode", paged, [(1, 70), (1, 300), (1, 17)]),
    Check("splits", "decode, combine", split, [(1, 500), (1, 500)]),
]
# As large as plan/hopper.py asks.
HOPPER = Check("causal", "Hopper", dense, [(1024, 1024)], nheads=8, head_dim=128)


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def errors(check: Check, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Error of the check's call and what is promised; two query heads share a KV head."""
    g = torch.Generator().manual_seed(0)
    qkv = []
    for seqlen_q, seqlen_k in check.lengths:
        shapes = [(seqlen_q, check.nheads), *[(seqlen_k, check.nheads // 2)] * 2]
        tokens = [torch.randn(*shape, check.head_dim, generator=g) for shape in shapes]
        q, k, v = (x.to(device, dtype) for x in tokens)
        qkv.append((q, k, v))
    out = check.call(qkv, check.causal)
    ref = torch.cat([attention(*x, causal=check.causal)[0] for x in qkv])
    plain = torch.cat([attention(*x, causal=check.causal, dtype=dtype)[0] for x in qkv])
    rounded = ref.to(dtype)
    promise = 2 * largest(plain.double() - ref) + 2 * largest(rounded + 0.3 - 0.3 - rounded)
    return largest(out.double() - ref), promise


def main(arguments: Sequence[str] = ()) -> int:
    """Print it all; 0 if every kernel keeps the promise, 1 if not."""
    parser = argparse.ArgumentParser("python -m mini_flash_attention", description=DESCRIPTION)
    parser.add_argument(
        "--version", action="version", version=f"mini_flash_attention {__version__}"
    )
    parser.parse_args(arguments)
    gpu, about = find_gpu()
    print(*environment(gpu, about), "", sep="\n")
    interpreted = settings.INTERPRETED  # which knows neither bf16 products nor Gluon
    has_hopper = gpu is not None and gpu.arch == 90 and not (settings.PORTABLE or interpreted)
    device = "cpu" if gpu is None else "cuda"
    dtype = torch.float16 if interpreted else torch.bfloat16
    failures = 0
    for check in [*CHECKS, HOPPER] if has_hopper else CHECKS:
        try:
            error, promise = errors(check, device, dtype)
            kept = error <= promise  # not if error is NaN
            result = f"error {error:.1e}, promise {promise:.1e}"
        except Exception as problem:  # the line of a kernel must not cost the others theirs
            kept, result = False, f"{type(problem).__name__}: {problem}"
        failures += not kept
        where = check.kernels if gpu or interpreted else "CPU"
        print(f"{check.name:<13} {where:<16} {result}  {'ok' if kept else 'FAILED'}")
    print(f"\n{failures} failed" if failures else "\nall well")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
