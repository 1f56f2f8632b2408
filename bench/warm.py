"""Compile our kernels in parallel processes before anything is timed.

Each worker runs some workloads once on the same GPU. Triton writes what it compiles to its disk
cache, where the measuring process then finds it.
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

LARGEST = 2**31  # bytes of inputs; a larger workload shares its kernels with smaller ones


def tasks(workloads: Sequence[Workload]) -> list[list[Workload]]:
    """Workloads that may share kernels go to one worker, so that none is compiled twice."""
    by_variant: dict[tuple[object, ...], list[Workload]] = defaultdict(list)
    for workload in workloads:
        if workload.tensor_bytes <= LARGEST:
            by_variant[workload.variant].append(workload)
    return sorted(by_variant.values(), key=len, reverse=True)


def run_once(workloads: Sequence[Workload]) -> list[str]:
    """In a worker: each workload once. What failed is told; the measuring run records it."""
    import torch

    from bench.implementations import OURS

    failures = []
    ours = [implementation for implementation in OURS if implementation.available() is None]
    for workload, implementation in itertools.product(workloads, ours):
        try:
            prepared = implementation.ready(workload, workload.tensors(torch.device("cuda")))
            with implementation.context():
                if prepared is not None:
                    prepared.call()
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(f"{workload.name}: {type(error).__name__}: {error}")
    return failures


def compile_all(workloads: Sequence[Workload], jobs: int) -> None:
    work = tasks(workloads)
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
