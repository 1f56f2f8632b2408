"""Compile our kernels, and what a peer compiles, in parallel processes before anything is timed.

Each worker runs some workloads once on the same GPU. Triton and PyTorch write what they compile to
their disk caches, where the measuring process then finds it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from bench.workloads import Workload

OURS = ("mini", "portable", "maxima")  # each with kernels of its own
LARGEST = 2**31  # bytes of inputs; a larger workload shares its kernels with smaller ones


Task = tuple[Sequence[str], Sequence[Workload]]  # implementations, by name, and what they are given


def tasks(
    workloads: Sequence[Workload], ours: Sequence[str], each: Sequence[str] = ()
) -> list[Task]:
    """Workloads that may share kernels go to one worker, so that none is compiled twice.

    ours: implementations that share kernels. each: those that share none between workloads.
    """
    by_variant: dict[tuple[object, ...], list[Workload]] = defaultdict(list)
    for workload in workloads:
        if workload.tensor_bytes <= LARGEST:
            by_variant[workload.variant].append(workload)
    groups = sorted(by_variant.values(), key=len, reverse=True)
    alone: list[Task] = [((name,), [w]) for group in groups for w in group for name in each]
    return [*alone, *((ours, group) for group in groups)]


def run_once(task: Task) -> list[str]:
    """In a worker: each workload once, by each implementation named, if it can run here.

    What failed is told; the measuring run records it.
    """
    import torch

    from bench.implementations import IMPLEMENTATIONS

    failures = []
    names, workloads = task
    asked = [i for i in IMPLEMENTATIONS if i.name in names and i.available() is None]
    for workload, implementation in itertools.product(workloads, asked):
        try:
            prepared = implementation.ready(workload, workload.tensors(torch.device("cuda")))
            with implementation.context():
                if prepared is not None:
                    prepared.call()
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(f"{workload.name}: {type(error).__name__}: {error}")
    return failures


def compile_all(
    workloads: Sequence[Workload], jobs: int, ours: Sequence[str], each: Sequence[str] = ()
) -> None:
    work = tasks(workloads, ours, each)
    if jobs < 2 or not work:
        return
    began = time.monotonic()
    workers = min(jobs, len(work))
    context = multiprocessing.get_context("spawn")
    failures: list[str] = []
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for told in pool.map(run_once, work):
                failures += told
    except BrokenProcessPool as error:
        failures.append(f"a worker died: {error}")
    seconds = time.monotonic() - began
    print(f"compiled with {workers} processes in {seconds:.1f} s")
    for failure in failures:
        print(f"  failed: {failure}")
