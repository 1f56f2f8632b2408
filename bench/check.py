"""Is the output right? A cheap test before anything is timed.

Every element must be finite (the memory an output is likely to get was filled with NaN before),
and sampled rows must keep the package's numerical promise against attention by definition in
float64. Nothing here comes from the package.
"""

from __future__ import annotations

import random

import torch

from bench.workloads import Tensors, Workload

ENTRIES = 5  # batch entries sampled
ROWS = 16  # query rows sampled in each


def attention_rows(
    workload: Workload,
    tensors: Tensors,
    entry: int,
    head: int,
    rows: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Attention by definition for some query rows of one head, computed in ``dtype``: [rows, D]."""
    head_k = head * workload.heads_k // workload.heads
    q = tensors.of_queries(workload, entry, tensors.q)[rows, head].to(dtype)
    k = tensors.of_keys(workload, entry, tensors.k)[:, head_k].to(dtype)
    v = tensors.of_keys(workload, entry, tensors.v)[:, head_k].to(dtype)
    left, right = workload.window
    diagonal = (rows + workload.seqlens_k[entry] - workload.seqlens_q[entry])[:, None]
    key = torch.arange(workload.seqlens_k[entry], device=q.device)[None, :]
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if workload.causal:
        hidden = hidden | (key > diagonal)
    if left >= 0:
        hidden = hidden | (key < diagonal - left)
    if right >= 0:
        hidden = hidden | (key > diagonal + right)
    s = q @ k.T * workload.head_dim**-0.5
    scores = workload.scores(q.device)
    if "softcap" in scores:
        s = scores["softcap"] * torch.tanh(s / scores["softcap"])
    if "alibi_slopes" in scores:
        s = s - scores["alibi_slopes"][head].to(dtype) * (diagonal - key).abs()
    s = s.masked_fill(hidden, -torch.inf)
    if "s_aux" in scores:
        sink = scores["s_aux"][head].to(dtype).expand(len(s), 1)
        return torch.softmax(torch.cat([s, sink], -1), dim=-1)[:, :-1] @ v
    return torch.softmax(s, dim=-1).nan_to_num(0.0) @ v  # a row that sees nothing gives 0


def sample(workload: Workload) -> list[tuple[int, int, list[int]]]:
    """(entry, head, rows): the first and last entry, those with the most keys and the most queries,
    a random one; ends and middle.
    """
    chance = random.Random(workload.name)
    longest, largest = (
        max(range(workload.batch), key=lengths.__getitem__)
        for lengths in (workload.seqlens_k, workload.seqlens_q)
    )
    entries = {0, workload.batch - 1, longest, largest, chance.randrange(workload.batch)}
    picks = []
    for entry in sorted(entries)[:ENTRIES]:
        seqlen = workload.seqlens_q[entry]
        if not seqlen:
            continue
        rows = {0, seqlen - 1, *(chance.randrange(seqlen) for _ in range(ROWS - 2))}
        picks.append((entry, chance.randrange(workload.heads), sorted(rows)))
    return picks


class Checker:
    """The expected rows of one workload, computed once for all implementations."""

    def __init__(self, workload: Workload, tensors: Tensors) -> None:
        self.workload = workload
        self.tensors = tensors
        self.expected: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        error = rounding = 0.0
        for entry, head, picked in sample(workload):
            rows = torch.tensor(picked, device=tensors.q.device)
            exact = attention_rows(workload, tensors, entry, head, rows, torch.float64)
            plain = attention_rows(workload, tensors, entry, head, rows, tensors.q.dtype)
            error = max(error, (plain.double() - exact).abs().max().item())
            rounded = exact.to(tensors.q.dtype)
            there_and_back = (rounded + 0.3 - 0.3 - rounded).abs().max().item()
            rounding = max(rounding, there_and_back)
            self.expected.append((entry, head, rows, exact))
        self.limit = 2 * error + 2 * rounding

    def problem(self, output: torch.Tensor) -> str | None:
        """What is wrong with ``output``, or None."""
        shape = self.tensors.out_shape
        if output.shape != shape:
            return f"output has shape {tuple(output.shape)}, expected {shape}"
        if not torch.isfinite(output).all():
            return "output holds NaN or Inf, or was not written everywhere"
        worst = 0.0
        for entry, head, rows, exact in self.expected:
            ours = self.tensors.of_queries(self.workload, entry, output)[rows, head].double()
            worst = max(worst, (ours - exact).abs().max().item())
        if worst > self.limit:
            return f"output is off by {worst:.3g}, allowed {self.limit:.3g}"
        return None


def poison(like: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Leave NaN in the memory that the allocator hands out next for tensors of this shape."""
    if like.is_cuda:
        torch.cuda.empty_cache()
    blocks = [like.new_full(shape, torch.nan) for _ in range(4)]
    del blocks
