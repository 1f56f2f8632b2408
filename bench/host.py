"""The CPU's side of a call: its time, its synchronisations, and the first call of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from bench.check import Checker
from bench.implementations import Implementation
from bench.report import Row, error_row, text_table
from bench.workloads import HOST

WARM_UP = 200
BATCHES = 21
CALLS = 200  # in a batch: well below the number of launches that the driver queues

FIRST_CALL = """
import time, torch, mini_flash_attention
q = torch.randn(1, 512, 16, 128, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
began = time.perf_counter()
mini_flash_attention.flash_attn_func(q, q, q, causal=True)
torch.cuda.synchronize()
print(time.perf_counter() - began)
"""


def microseconds(call: Callable[[], Any]) -> float:
    """CPU time of a call that is not waited for: the median over batches of calls."""
    for _ in range(WARM_UP):
        call()
    samples = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - began) / CALLS * 1e6)
    torch.cuda.synchronize()
    return median(samples)


def synchronisations(call: Callable[[], Any]) -> int:
    """How often a call waits for the device, as far as PyTorch sees it (.item(), copies, …)."""
    calls = 10
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(calls):
                call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return round(sum("called a synchronizing" in str(warning.message) for warning in seen) / calls)


def first_call_seconds() -> float | None:
    """The first call in a fresh process with an empty kernel cache; None where it failed."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    if done.returncode:
        print(f"  first call failed: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return round(float(done.stdout), 2)


def measure_host(implementations: Sequence[Implementation]) -> list[Row]:
    device = torch.device("cuda")
    rows: list[Row] = []
    for workload in HOST:
        tensors = workload.tensors(device)
        checker = Checker(workload, tensors)
        for implementation in implementations:
            try:
                prepared = implementation.ready(workload, tensors)
                if prepared is None:
                    continue
                with implementation.context():
                    problem = checker.problem(prepared.output(prepared.call()))
                    if problem:
                        rows.append(error_row(workload, implementation.name, problem))
                        continue
                    row: Row = {"workload": workload.name, "implementation": implementation.name}
                    row["microseconds"] = round(microseconds(prepared.call), 2)
                    row["synchronisations"] = synchronisations(prepared.call)
                    rows.append(row)
            except Exception as error:  # recorded; the others go on
                text = f"{type(error).__name__}: {error}"
                rows.append(error_row(workload, implementation.name, text))
                torch.cuda.synchronize()
    return rows


def host_table(rows: Sequence[Row]) -> str:
    lines = [["workload", "implementation", "µs a call", "synchronisations"]]
    for row in rows:
        if "error" in row:
            lines.append([row["workload"], row["implementation"], "ERROR", row["error"]])
        else:
            figures = [f"{row['microseconds']:.1f}", str(row["synchronisations"])]
            lines.append([row["workload"], row["implementation"], *figures])
    return text_table(lines)
