"""A small GPT learns this repository's own text, and PyTorch's attention checks its gradients.

The model predicts the next byte of the project's pages and source files. Every attention, forward
and backward, is `flash_attn_varlen_func`. A twin with the same first weights sees the same batches
and attends through PyTorch's `scaled_dot_product_attention` (SDPA). The end draws both loss curves
and says how far they are apart, how far the first gradients were, and how fast each twin was.

- Packing: a step is a fixed number of tokens, documents of any length one behind the other without
  padding. `cu_seqlens` says where each begins, and none sees another.
- Precision: weights, gradients and optimizer are float32. With bfloat16, the default on a GPU,
  torch.autocast rounds what enters products and attention.
- A GPU runs this package's kernels, and torch.compile compiles both models. On a CPU the package
  computes through PyTorch too; there one seed gives the same losses, bit for bit.
- `--one-sequence` is for speed: one long sequence a step. A GPU's default shapes are GPT-2 small's.

Run it with `make train`, or, where this package is installed, `python examples/train.py`. The exit
status is 0 if the twins agree, 1 if they don't, 2 if the arguments make no sense.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_flash_attention import flash_attn_func, flash_attn_varlen_func

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("*.md", "docs/*.md", "bench/*.md", "mini_flash_attention/**/*.py")
# Pages are cut before headings and numbered items, modules where two lines are blank.
CUTS = {".md": r"(?m)^(?=#+ |\d+\. )", ".py": r"\n\n\n"}
SIZES = {"steps": (600, 200), "seqlen": (512, 8192), "layers": (3, 12), "width": (192, 768)}
SIZES |= {"heads": (6, 12), "head_dim": (32, 64)}  # on a CPU, on a GPU


def main(argv: Sequence[str] | None = None) -> int:
    """Train, draw, report; returns the exit status."""
    options = parse_arguments(argv)
    documents = read_documents()
    steps = list(islice(batches(documents, options), options.steps))
    runs = [Run(name, options) for name in ("ours", "sdpa") if options.attention in (name, "both")]
    count = Counter(b"".join(documents))
    level = -sum(n * math.log(n / count.total()) for n in count.values()) / count.total()
    print(
        f"GPT, {sum(w.numel() for w in runs[0].weights) / 1e6:.1f} million weights: "
        f"{', '.join(f'{name} {getattr(options, name)}' for name in SIZES)}\n"
        f"{options.dtype} on {options.device}{', compiled' if options.compile else ''}; "
        f"text: {len(documents)} documents, {count.total()} bytes\n"
        f"Loss in nats per byte; a guess that only knows how frequent each byte is: {level:.3f}\n"
    )
    train(runs, steps, options)
    curves = {run.name: run.losses.tolist() for run in runs}
    if not all(map(math.isfinite, chain(*curves.values()))):
        print("train.py: MISMATCH: a loss is not finite")
        return 1
    print(f"\n{chart(curves, level)}\n")
    options.svg.parent.mkdir(parents=True, exist_ok=True)
    options.svg.write_text(svg(curves, level))
    print(f"The same as a drawing: {options.svg}\n")
    return report(runs, options)


class Batch(NamedTuple):
    """The documents of one step, one behind the other."""

    tokens: Tensor  # [tokens]
    targets: Tensor  # [tokens], the byte after each
    positions: Tensor  # [tokens], the place of each in its own document
    cu_seqlens: Tensor | None  # [documents + 1], int32, where each begins; None if there is one
    max_seqlen: int  # no document is longer; the same in all steps, so nothing is compiled anew


def read_documents() -> list[bytes]:
    """Sections of pages and definitions of the package, each after a 0, which is in no text."""
    files = sorted(file for pattern in TEXTS for file in ROOT.glob(pattern))
    texts = ((file.read_text(encoding="utf-8"), CUTS[file.suffix]) for file in files)
    parts = (part for text, cuts in texts for part in re.split(cuts, text))
    return [b"\0" + part.encode() for part in parts if part.strip()]


def batches(documents: list[bytes], options: argparse.Namespace) -> Iterator[Batch]:
    """Steps without end. Every document comes once before any comes again."""
    shuffle = random.Random(options.seed)
    text = b"".join(shuffle.sample(documents, len(documents)))
    text *= 1 + options.seqlen // len(text)
    while options.one_sequence:
        start = shuffle.randrange(len(text) - options.seqlen)
        yield pack([text[start : start + options.seqlen + 1]], options.seqlen, options)
    longest = -(-options.seqlen // 4)
    waiting: list[bytes] = []
    while True:
        pieces, room = [], options.seqlen
        while room:
            waiting = waiting or shuffle.sample(documents, len(documents))
            document = waiting.pop()
            n = min(len(document) - 1, longest, room)
            pieces.append(document[: n + 1])  # n + 1 bytes are n predictions
            if len(document) > n + 1:  # the rest is a document of its own
                waiting.append(document[n:])
            room -= n
        yield pack(pieces, longest, options)


def pack(pieces: list[bytes], longest: int, options: argparse.Namespace) -> Batch:
    """One step: all but the last byte of each piece is fed, all but its first is predicted."""
    lengths = [len(piece) - 1 for piece in pieces]
    tokens = torch.tensor([*b"".join(piece[:-1] for piece in pieces)], device=options.device)
    targets = torch.tensor([*b"".join(piece[1:] for piece in pieces)], device=options.device)
    positions = torch.cat([torch.arange(n, device=options.device) for n in lengths])
    if options.one_sequence:
        return Batch(tokens, targets, positions, None, longest)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=options.device)
    if options.compile:  # once, for any number of documents
        torch._dynamo.mark_dynamic(ends, 0)
    return Batch(tokens, targets, positions, ends, longest)


def ours(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """This package: `cu_seqlens` tells documents apart. Tensors are [tokens, heads, head_dim]."""
    if batch.cu_seqlens is None:
        return flash_attn_func(q[None], k[None], v[None], causal=True)[0]
    ends, longest = batch.cu_seqlens, batch.max_seqlen
    return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """PyTorch: a mask of tokens × tokens does."""
    document = (batch.positions == 0).cumsum(0)
    mask = None if batch.cu_seqlens is None else (document[:, None] == document).tril()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, head_dim]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return o[0].transpose(0, 1)


class Block(nn.Module):
    """Attention and MLP; each reads a normalized copy of x and adds its result."""

    def __init__(self, attend: Callable[..., Tensor], options: argparse.Namespace) -> None:
        super().__init__()
        self.attend, self.heads = attend, options.heads
        width, inner = options.width, options.heads * options.head_dim
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k = rotate(qkv[:, :2], *rotation).unbind(1)
        x = x + self.output(self.attend(q, k, qkv[:, 2], batch).flatten(1))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A decoder of bytes; `forward` returns the mean loss of a step."""

    def __init__(self, attend: Callable[..., Tensor], options: argparse.Namespace) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        self.embedding = nn.Embedding(256, options.width)
        self.blocks = nn.ModuleList(Block(attend, options) for _ in range(options.layers))
        self.norm = nn.RMSNorm(options.width)
        self.head = nn.Linear(options.width, 256, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)

    def forward(self, batch: Batch) -> Tensor:
        x = self.embedding(batch.tokens)  # [tokens, width], float32 under autocast too
        turn = 1e4 ** -torch.linspace(0, 1, self.head_dim // 2 + 1, device=x.device)[:-1]
        angles = batch.positions[:, None, None, None] * turn  # [tokens, 1, 1, head_dim / 2]
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()), batch)
        return F.cross_entropy(self.head(self.norm(x)).float(), batch.targets)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + head_dim / 2]) by its angle (RoFormer, Su et al., 2021)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Run:
    """One of the twins: its model and optimizer, the loss of each step and how long it took."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.name, self.device, self.half = name, options.device.type, options.dtype == "bfloat16"
        model = GPT(ours if name == "ours" else sdpa, options).to(options.device)
        self.weights = list(model.parameters())
        self.model = torch.compile(model) if options.compile else model
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.95), fused=True)
        self.step_losses: list[Tensor] = []
        self.times: list[tuple[Any, Any]] = []  # when each step began and ended

    def step(self, batch: Batch, learning_rate: float) -> None:
        begin = self.now()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = self.model(batch)
        loss.backward()
        if not self.step_losses:
            self.first = torch.cat([w.grad.flatten() for w in self.weights if w.grad is not None])
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_losses.append(loss.detach())
        self.times.append((begin, self.now()))

    def now(self) -> Any:
        """A moment. On a GPU it is a mark in its queue of work, for which the CPU doesn't wait."""
        if self.device == "cpu":
            return time.perf_counter()
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    @property
    def losses(self) -> Tensor:
        return torch.stack(self.step_losses).double().cpu()

    @property
    def milliseconds(self) -> float:
        """The median step: the few that compile don't move it."""
        cpu = self.device == "cpu"
        return statistics.median(1e3 * (b - a) if cpu else a.elapsed_time(b) for a, b in self.times)


def train(runs: list[Run], steps: list[Batch], options: argparse.Namespace) -> None:
    """The twins take turns. About twenty lines say the mean loss since the line before."""
    print(" step" + "".join(f"{run.name:>10}" for run in runs), flush=True)
    every, shown = -(-len(steps) // 20), 0
    for i, batch in enumerate(steps, start=1):
        warm_up, cosine = min(1.0, 20 * i / len(steps)), math.cos(math.pi * i / len(steps))
        for run in runs:
            run.step(batch, warm_up * (0.55 + 0.45 * cosine) / (4 * options.width))
        if i % every == 0 or i == len(steps):
            means = (run.losses[shown:].mean() for run in runs)
            print(f"{i:5}" + "".join(f"{mean:10.4f}" for mean in means), flush=True)
            shown = i


def chart(curves: dict[str, list[float]], level: float) -> str:
    """The curves in characters, each column a mean of the steps there."""
    top, bottom = (end(level, *chain(*curves.values())) for end in (max, min))
    lines = [[" " * 6, *" " * 72] for _ in range(16)]

    def line(loss: float) -> list[str]:
        return lines[round((top - loss) / (top - bottom) * 15)]

    line(level)[1:] = "-" * 72
    for loss in (top, bottom, level):
        line(loss)[0] = f"{loss:5.2f} "
    for name, losses in curves.items():
        for x in range(72):
            first, last = x * len(losses) // 72, (x + 1) * len(losses) // 72
            cells = line(statistics.fmean(losses[first : max(first + 1, last)]))
            cells[x + 1] = name[0] if cells[x + 1] in " -" else "="
    legend = f"      {', '.join(f'{name[0]}: {name}' for name in curves)}, =: both, -: that guess"
    return "\n".join(["".join(cells).rstrip() for cells in lines] + [legend])


def svg(curves: dict[str, list[float]], level: float) -> str:
    """The curves as a drawing, ours thin and on top, the level dashed."""
    top = max(level, *chain(*curves.values()))

    def y(loss: float) -> float:
        return round(300 - 280 * loss / top, 1)

    parts = ['<rect width="640" height="320" fill="white"/><text y="12">nats per byte</text>']
    for nats in range(math.floor(top) + 1):
        parts.append(f'<path d="M40 {y(nats)}h580" stroke="#e4e4e4"/>')
        parts.append(f'<text x="24" y="{y(nats) + 4}">{nats}</text>')
    parts.append(f'<path d="M40 {y(level)}h580" stroke="gray" stroke-dasharray="4"/>')
    for x, name, colour, width in ((590, "sdpa", "#e08e45", 4), (560, "ours", "#2b59c3", 1)):
        losses = curves.get(name, [])
        points = " ".join(f"{40 + 580 * i / len(losses):.1f},{y(z)}" for i, z in enumerate(losses))
        style = f'fill="none" stroke="{colour}" stroke-width="{width}"'
        parts.append(f'<text x="{x}" y="30" fill="{colour}">{name}</text>')
        parts.append(f'<polyline points="{points}" {style}/>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 320" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="11">', *parts, "</svg>\n"])


def report(runs: list[Run], options: argparse.Namespace) -> int:
    """Speeds, and how far the twins are apart; returns the exit status."""
    print(f"{'':5}{'loss at the end':>16}{'ms per step':>13}{'tokens/s':>10}")
    for run in runs:
        end, speed = run.losses[-options.steps // 10 :].mean(), options.seqlen / run.milliseconds
        print(f"{run.name:5}{end:16.4f}{run.milliseconds:13.1f}{1e3 * speed:10.0f}")
    if len(runs) == 1:
        return 0
    apart = (runs[0].losses - runs[1].losses).abs()
    first = ((runs[0].first - runs[1].first).norm() / runs[1].first.norm()).item()
    print(f"Speed of ours over sdpa: {runs[1].milliseconds / runs[0].milliseconds:.2f}")
    print(f"The losses differ by {apart.max():.1g} nats at most, {apart.mean():.1g} on average")
    print(f"The first gradients differ by {first:.1g} of their length")
    return int(apart.mean().item() > 0.05 or first > (0.05 if runs[0].half else 1e-4))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; prints a message and exits with status 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    for name, sizes in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=positive, metavar="N", help=f"CPU, GPU: {sizes}")
    add("--seed", type=positive, default=1, metavar="N", help="of weights and batches (1)")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if torch finds one")
    add("--dtype", choices=("float32", "bfloat16"), help="float32; on a GPU bfloat16 alone")
    add("--attention", choices=("both", "ours", "sdpa"), default="both", help="which run")
    add("--one-sequence", action="store_true", help="a step is one sequence, not documents")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on a GPU)")
    add("--svg", type=Path, metavar="FILE", default=ROOT / "build/train.svg", help="a drawing")
    options = parser.parse_args(argv)
    gpu = options.device != "cpu" and torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        parser.error("--device: torch finds no GPU it can use (--device cpu works everywhere)")
    options.device = torch.device("cuda" if gpu else "cpu")
    for name, sizes in SIZES.items():
        setattr(options, name, getattr(options, name) or sizes[gpu])
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.compile = gpu if options.compile is None else options.compile
    if gpu and options.dtype == "float32":
        parser.error("--dtype: the kernels of a GPU take bfloat16, got float32")
    if options.head_dim % 2 or options.head_dim > 256:
        parser.error(f"--head-dim: expected an even number up to 256, got {options.head_dim}")
    return options


def positive(text: str) -> int:
    """An argument that counts something."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 2**31, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
