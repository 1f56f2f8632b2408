"""``python -m bench backward``: gradients of q, k and v, ours beside PyTorch's back ends and
FlashAttention-3.

Timed is the backward pass alone, all of its kernels, in one process: contenders take turns, round
by round, in rotated order. Before each stretch the GPU is kept busy, so that the CPU's side of the
calls is not in the time; ``--host`` is where that is measured.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench import report
from bench.implementations import missing, only, portable

TOKENS = 16384
CALLS = 3  # in a stretch
BUSY = 8_000_000  # clock cycles, longer than the CPU needs for those calls
# Modules that bring the operator flash_attn_3::bwd, and what they come with.
FA3 = ("flash_attn_3._C", "xformers.flash_attn_3._C")
NAMES = ("mini", "deterministic", "portable", "cudnn", "fa2", "fa3")
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


class Cell(NamedTuple):
    """One call's shape; `lengths` are those of packed sequences."""

    name: str
    head_dim: int
    causal: bool
    seqlen: int
    nheads: int
    nheads_k: int
    lengths: tuple[int, ...] = ()
    head_dim_v: int = 0  # 0: head_dim

    @property
    def flops(self) -> float:
        """Of the five products, half of them under a causal mask."""
        pairs = sum(n * n for n in self.lengths or [self.seqlen] * (TOKENS // self.seqlen))
        widths = 3 * self.head_dim + 2 * (self.head_dim_v or self.head_dim)
        return 2.0 * pairs * self.nheads * widths * (0.5 if self.causal else 1.0)


def packed_lengths() -> tuple[int, ...]:
    """Log-normal lengths to 8k, TOKENS together."""
    numbers, lengths = random.Random(0), list[int]()
    while sum(lengths) < TOKENS:
        lengths.append(min(int(numbers.lognormvariate(6.5, 1.0)) + 1, 8192))
    return (*lengths[:-1], TOKENS - sum(lengths[:-1]))


def cells() -> list[Cell]:
    made = [
        Cell(f"d{d}/{'causal' if causal else 'full'}/{n}", d, causal, n, 2048 // d, 2048 // d)
        for d, causal, n in itertools.product((64, 128, 256), (False, True), (1024, 4096, 16384))
    ]
    made += [
        Cell(f"gqa/{'causal' if causal else 'full'}/{n}", 128, causal, n, 32, 8)
        for causal, n in itertools.product((False, True), (4096, 16384))
    ]
    made.append(Cell("packed/causal", 128, True, 8192, 16, 16, packed_lengths()))
    made.append(Cell("packed-gqa/causal", 128, True, 8192, 32, 8, packed_lengths()))
    made += [Cell(f"mla/causal/{n}", 192, True, n, 16, 16, (), 128) for n in (4096, 16384)]
    made.append(Cell("short/causal/256", 128, True, 256, 16, 16))
    return made


def tensors(cell: Cell, device: str) -> tuple[torch.Tensor, ...]:
    """q, k, v and dout, tokens before heads."""
    numbers = torch.Generator(device).manual_seed(0)
    outer = (TOKENS,) if cell.lengths else (TOKENS // cell.seqlen, cell.seqlen)
    d_v = cell.head_dim_v or cell.head_dim
    heads = (cell.nheads, cell.nheads_k, cell.nheads_k, cell.nheads)
    shapes = zip(heads, (cell.head_dim, cell.head_dim, d_v, d_v), strict=True)
    return tuple(
        torch.randn(*outer, *s, generator=numbers, device=device, dtype=torch.bfloat16)
        for s in shapes
    )


def prepare_mini(cell: Cell, q: Any, k: Any, v: Any, dout: Any, **options: Any) -> Any:
    import mini_flash_attention as mini

    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    if cell.lengths:
        ends = [0, *itertools.accumulate(cell.lengths)]
        cu = torch.tensor(ends, dtype=torch.int32, device=q.device)
        longest = max(cell.lengths)
        out = mini.flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, causal=cell.causal, **options
        )
    else:
        out = mini.flash_attn_func(q, k, v, causal=cell.causal, **options)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def prepare_sdpa(cell: Cell, q: Any, k: Any, v: Any, dout: Any) -> Any:
    if cell.lengths:
        return None
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
    grouped = cell.nheads != cell.nheads_k
    out = sdpa(q, k, v, is_causal=cell.causal, enable_gqa=grouped)
    dout = dout.transpose(1, 2)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def prepare_fa3(cell: Cell, q: Any, k: Any, v: Any, dout: Any) -> Any:
    """FlashAttention-3's operator, for our output and LSE."""
    import mini_flash_attention as mini

    if all(map(missing, FA3)):
        raise RuntimeError("no backward pass of FlashAttention-3 here")
    scale, lengths = cell.head_dim**-0.5, dict[str, Any]()
    if cell.lengths:
        ends = [0, *itertools.accumulate(cell.lengths)]
        cu = torch.tensor(ends, dtype=torch.int32, device=q.device)
        longest = max(cell.lengths)
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        lengths |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        found = mini.flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, causal=cell.causal, return_attn_probs=True
        )
    else:
        found = mini.flash_attn_func(q, k, v, causal=cell.causal, return_attn_probs=True)
    given = (dout, q, k, v, found[0], found[1].contiguous())
    options = {"softmax_scale": scale, "is_causal": cell.causal, **lengths}
    return lambda: torch.ops.flash_attn_3.bwd(*given, **options)


def prepared(cell: Cell, names: Sequence[str]) -> tuple[dict[str, Any], list[report.Row]]:
    """What to time, and a row for each that can't do the cell."""
    given, calls, failed = tensors(cell, "cuda"), dict[str, Any](), list[report.Row]()
    for name in names:
        try:
            if name in PEERS:
                with only(PEERS[name])():
                    call = prepare_sdpa(cell, *given)
                    if call is not None:
                        call()
            elif name == "fa3":
                call = prepare_fa3(cell, *given)
                call()
            elif name == "portable":
                with portable():
                    call = prepare_mini(cell, *given)
                    call()
                call = within_portable(call)
            else:
                call = prepare_mini(cell, *given, deterministic=name == "deterministic")
                call()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError) as error:
            problem = str(error).splitlines()[0]
            if problem.startswith("No available kernel"):
                continue  # the back end does not do such calls
            failed.append({"workload": cell.name, "implementation": name, "error": problem})
            continue
        if call is not None:
            calls[name] = call
    return calls, failed


def within_portable(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with portable():
            return call()

    return run


def measure(calls: dict[str, Any], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, the median of the rounds."""
    order, samples = list(calls), {name: list[float]() for name in calls}
    for turn in range(rounds + 1):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY)
            start.record()
            for _ in range(CALLS):
                calls[name]()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / CALLS)
    return {name: median(times[1:]) for name, times in samples.items()}


def compile_cell(number: int) -> None:
    """Compile what a cell needs, in a process of its own."""
    torch.set_grad_enabled(True)
    prepared(cells()[number], NAMES[:3])


def run(names: Sequence[str], rounds: int, jobs: int, pattern: str | None) -> list[report.Row]:
    """The rows of all cells, printed on the way."""
    todo = [n for n, cell in enumerate(cells()) if not pattern or pattern in cell.name]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        list(pool.map(compile_cell, todo))
    rows = list[report.Row]()
    for number in todo:
        cell = cells()[number]
        calls, failed = prepared(cell, names)
        rows += failed
        times = measure(calls, rounds)
        for name, milliseconds in times.items():
            tflops = cell.flops / milliseconds / 1e9
            row = {"workload": cell.name, "implementation": name}
            rows.append(row | {"milliseconds": round(milliseconds, 4), "tflops": round(tflops, 1)})
        print(line(cell.name, times, cell.flops), flush=True)
        torch.cuda.empty_cache()
    return rows


def line(name: str, times: dict[str, float], flops: float) -> str:
    ours = times.get("mini")
    texts = [f"{name:20}"]
    for other, t in times.items():
        ratio = f" ({t / ours:.2f})" if ours and other != "mini" else ""
        texts.append(f"{other} {flops / t / 1e9:.0f}{ratio}")
    return "  ".join(texts)
