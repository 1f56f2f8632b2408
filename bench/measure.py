"""How it is timed: all contenders of a cell interleaved, round by round, in one process.

A contender is one implementation on one workload. A cell is a few workloads that are compared
with one another (the same tokens dense, packed and paged), so that their ratios come from the
same minutes of the same card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from typing import Any, Protocol

import torch

from bench.check import Checker, poison
from bench.implementations import Implementation
from bench.report import Row, error_row, timed_row
from bench.workloads import Tensors, Workload

TARGET_MS = 20.0  # one timed stretch: long against an event's resolution of about 1 µs
GRAPH_MS = 2.0  # work in one graph: long against the gap between two replays
COLD = 4  # decoding rotates inputs of this many times the L2, so none is found there
SHORTEST_MS = 1e-3  # no estimate below an event's resolution
COPIES = 64  # at most this many sets of inputs


class Timer(Protocol):
    def __call__(self, calls: Sequence[Callable[[], Any]], repeats: int) -> float:
        """Milliseconds on the device of ``repeats`` calls, taken from ``calls`` in turn."""


def cuda_timer(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for i in range(repeats):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@dataclass
class Contender:
    workload: Workload
    name: str
    context: Callable[[], AbstractContextManager[Any]]
    calls: list[Callable[[], Any]]
    attentions: int = 1  # attentions that one call computes: more than one in a graph
    repeats: int = 1
    samples: list[float] = field(default_factory=list)  # milliseconds of one attention
    kept: list[Any] = field(default_factory=list)  # a graph reads it, so it must outlive that

    def stretch(self, timer: Timer) -> float:
        with self.context():
            return timer(self.calls, self.repeats) / (self.repeats * self.attentions)


def round_order(count: int, number: int) -> list[int]:
    """Contenders' order in round ``number``: every second round runs backwards.

    Backwards, because each contender then follows the other neighbour and a pair of rounds puts
    all at the same mean position; each pair starts one further on.
    """
    order = [(i + number // 2) % count for i in range(count)]
    return order[::-1] if number % 2 else order


def cells(workloads: Sequence[Workload]) -> Iterator[list[Workload]]:
    """Workloads that follow each other with the same cell; without one, each by itself."""
    for _, members in groupby(workloads, key=lambda workload: workload.cell or workload.name):
        yield list(members)


def input_sets(workload: Workload, device: torch.device) -> list[Tensors]:
    """A cache gets enough sets that the L2 holds none of the next one; other keys one."""
    copies = 1
    if workload.cold and device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(COPIES, math.ceil(COLD * l2_bytes / workload.kv_bytes))
    return [workload.tensors(device, copy) for copy in range(copies)]


def captured(calls: list[Callable[[], Any]], attentions: int) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(attentions):
            calls[i % len(calls)]()
    return graph.replay


def contender(
    workload: Workload,
    implementation: Implementation,
    sets: list[Tensors],
    checker: Checker,
    timer: Timer,
) -> Contender | Row | None:
    """Checked and warmed up; or a row with its error; or None where it can't do the workload."""
    try:
        prepared = [implementation.ready(workload, tensors) for tensors in sets]
        calls = [p.call for p in prepared if p is not None]
        if prepared[0] is None:
            return None
        kept = [*sets, *prepared]  # a peer's workspace hangs on its call
        entrant = Contender(workload, implementation.name, implementation.context, calls, kept=kept)
        with implementation.context():
            poison(sets[0].q, sets[0].out_shape)
            result = calls[0]()
            attends = implementation.attends
            problem = checker.problem(prepared[0].output(result)) if attends else None
            if problem:
                return error_row(workload, implementation.name, problem)
            few = max(3, len(calls))
            timer(calls, few)
            estimate = max(timer(calls, few) / few, SHORTEST_MS)
            if workload.graph and sets[0].q.is_cuda:
                passes = math.ceil(GRAPH_MS / (estimate * len(calls)))
                entrant.attentions = passes * len(calls)
                entrant.calls = [captured(calls, entrant.attentions)]
                timer(entrant.calls, 1)
                estimate = timer(entrant.calls, 3) / (3 * entrant.attentions)
        entrant.repeats = max(1, round(TARGET_MS / (estimate * entrant.attentions)))
        return entrant
    except NotImplementedError as refusal:
        print(f"  {workload.name}: {implementation.name} skipped: {refusal}")
        return None
    except Exception as error:  # one implementation's failure must not end the others' run
        if sets[0].q.is_cuda:
            torch.cuda.synchronize()  # raises where the failure took the device with it
        text = next(iter(str(error).splitlines()), "")
        return error_row(workload, implementation.name, f"{type(error).__name__}: {text}")


def measure_cell(
    workloads: Sequence[Workload],
    implementations: Sequence[Implementation],
    timer: Timer,
    device: torch.device,
    rounds: int,
) -> list[Row]:
    """One row for each workload and implementation that can do it: the median over the rounds."""
    rows: list[Row] = []
    entrants: list[Contender] = []
    for workload in workloads:
        sets = input_sets(workload, device)
        checker = Checker(workload, sets[0])
        for implementation in implementations:
            entrant = contender(workload, implementation, sets, checker, timer)
            if isinstance(entrant, Contender):
                entrants.append(entrant)
            elif entrant is not None:
                rows.append(entrant)
    for entrant in entrants:  # an untimed round, to bring the card to its working temperature
        entrant.stretch(timer)
    for number in range(rounds):
        for index in round_order(len(entrants), number):
            entrants[index].samples.append(entrants[index].stretch(timer))
    rows += [timed_row(e.workload, e.name, median(e.samples)) for e in entrants]
    names = [workload.name for workload in workloads]
    columns = [implementation.name for implementation in implementations]
    return sorted(
        rows, key=lambda row: (names.index(row["workload"]), columns.index(row["implementation"]))
    )
