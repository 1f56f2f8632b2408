"""The command line: ``python -m bench SUITE``, ``--host`` or ``--list`` (see README.md)."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from bench.suites import SUITES
from bench.workloads import Workload

if TYPE_CHECKING:
    from bench.implementations import Implementation


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    suites = (*SUITES, "backward")
    add("suite", nargs="?", choices=suites, help="the suite to measure")
    add("--list", action="store_true", help="list suites and workloads, and stop")
    add("--host", action="store_true", help="measure the CPU's side of small calls instead")
    add("--only", metavar="PATTERN", help="workloads whose name contains this (* and ? allowed)")
    add(
        "--impl",
        metavar="A,B",
        help="implementations, by name (default: all but those on request)",
    )
    add("--rounds", type=int, default=10, help="rounds of a cell (default 10)")
    add("--seconds", type=float, help="begin no further cell after this many seconds")
    add("--jobs", type=int, default=14, help="processes that compile beforehand (default 14)")
    add("--commit", help="the commit to record (default: $COMMIT, else git's)")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="results folder")
    options = parser.parse_args(argv)
    if not (options.suite or options.list or options.host):
        parser.error("name a suite, or --host, or --list")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def list_suites() -> None:
    for suite, workloads in SUITES.items():
        print(f"{suite}: {len(workloads)} workloads")
        for workload in workloads:
            decodes = workload.kind == "decode"
            work = f"{workload.kv_bytes / 1e9:.4f} GB" if decodes else f"{workload.flops:.3e} FLOP"
            print(f"  {workload.name:36} {workload.kind:7} {work}")


def chosen(suite: str, pattern: str | None) -> tuple[Workload, ...]:
    return tuple(w for w in SUITES[suite] if fnmatch(w.name, f"*{pattern or ''}*"))


def possible(workloads: Sequence[Workload]) -> tuple[Workload, ...]:
    """Those whose data are here; for the others, a line that says why."""
    from bench import data

    reasons = [data.missing(workload) for workload in workloads]
    for reason, count in Counter(filter(None, reasons)).items():
        print(f"{count} workloads skipped: {reason}")
    return tuple(w for w, reason in zip(workloads, reasons, strict=True) if reason is None)


def present(names: str | None) -> list[Implementation]:
    """The implementations asked for that can run here; for the others, a line that says why."""
    from bench.implementations import IMPLEMENTATIONS

    known = [implementation.name for implementation in IMPLEMENTATIONS]
    asked = names.split(",") if names else []
    for name in asked:
        if name not in known:
            sys.exit(f"bench: no implementation {name!r}; there are {', '.join(known)}")
    found = []
    for implementation in IMPLEMENTATIONS:
        wanted = implementation.name in asked if asked else not implementation.on_request
        reason = implementation.available() if wanted else None
        if reason:
            print(f"{implementation.name} skipped: {reason}")
        elif wanted:
            found.append(implementation)
    return found


def with_the_usual(names: str | None) -> bool:
    """Whether ``--impl`` leaves out none of those that run unasked."""
    from bench.implementations import IMPLEMENTATIONS

    usual = {
        implementation.name for implementation in IMPLEMENTATIONS if not implementation.on_request
    }
    return names is None or usual <= set(names.split(","))


def card_state() -> str:
    """Clock, power and temperature right after a cell, where the driver's library is there."""
    import torch

    try:
        clock, power = torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000
        return f"{clock} MHz, {power:.0f} W, {torch.cuda.temperature()} °C"
    except Exception:  # only a remark on a line
        return ""


def run_suite(options: argparse.Namespace) -> int:
    if options.suite == "portable":  # the suite of the portable kernel, on every GPU
        os.environ["MINI_FLASH_ATTENTION_PORTABLE"] = "1"
    import torch

    from bench import measure, report, warm

    matching = chosen(options.suite, options.only)
    if not matching:
        sys.exit(f"bench {options.suite}: no workload matches {options.only!r} (see --list)")
    workloads = possible(matching)
    began = time.monotonic()
    implementations = present(options.impl)
    gpu = torch.cuda.get_device_name()
    head = report.heading(gpu, options.commit or report.commit())
    folder = options.out / report.gpu_folder(gpu)
    partial = folder / f"{options.suite}.partial.json"
    ours = [i.name for i in implementations if i.name in warm.OURS]
    if ours:
        each = [i.name for i in implementations if i.compiles]
        warm.compile_all(workloads, min(options.jobs, os.cpu_count() or 1), ours, each)

    rows: list[report.Row] = []
    cells = list(measure.cells(workloads))
    done = 0
    for cell in cells:
        if options.seconds is not None and time.monotonic() - began > options.seconds:
            print(f"time is up: {len(cells) - done} of {len(cells)} cells left out")
            break
        cell_began = time.monotonic()
        rows += measure.measure_cell(
            cell, implementations, measure.cuda_timer, torch.device("cuda"), options.rounds
        )
        done += 1
        report.write(partial, head, rows)
        seconds = time.monotonic() - cell_began
        name = cell[0].cell or cell[0].name
        print(f"[{done}/{len(cells)}] {name}: {seconds:.1f} s, {card_state()}", flush=True)

    if not rows:
        sys.exit(f"bench {options.suite}: nothing was measured")
    path = partial
    whole = workloads == SUITES[options.suite] and done == len(cells)
    if whole and with_the_usual(options.impl):
        path = partial.rename(folder / f"{options.suite}.json")
    comparison = report.Comparison(workloads, rows)
    unit = "TFLOP/s; decoding GB/s; in brackets mini / peer, above 1 mini is faster"
    print(f"\n{gpu}, {head['commit']}, {unit}\n{comparison.table()}\n\n{comparison.means()}")
    if shares := comparison.shares():
        print(f"\n{shares}")
    print("\n".join(["", *comparison.errors(), f"{time.monotonic() - began:.0f} s, {path}"]))
    return int(any("error" in row for row in rows if row["implementation"] == "mini"))


def run_host(options: argparse.Namespace) -> int:
    import torch

    from bench import host, report

    gpu = torch.cuda.get_device_name()
    implementations = present(options.impl)
    rows = host.measure_host(implementations)
    head = report.heading(gpu, options.commit or report.commit())
    if any(implementation.name == "mini" for implementation in implementations):
        head["first_call_seconds"] = host.first_call_seconds()
        print(f"first call, fresh process, cold cache: {head['first_call_seconds']} s")
    path = options.out / report.gpu_folder(gpu) / "host.json"
    report.write(path, head, rows)
    print(f"{host.host_table(rows)}\n{path}")
    return int(any("error" in row for row in rows if row["implementation"] == "mini"))


def run_backward(options: argparse.Namespace) -> int:
    import torch

    from bench import backward, report

    names = options.impl.split(",") if options.impl else backward.NAMES
    jobs = min(options.jobs, os.cpu_count() or 1)
    print("TFLOP/s; in brackets a peer's time over ours, above 1 ours is faster")
    rows = backward.run(names, options.rounds, jobs, options.only)
    gpu = torch.cuda.get_device_name()
    name = "backward.partial.json" if options.only or options.impl else "backward.json"
    path = options.out / report.gpu_folder(gpu) / name
    report.write(path, report.heading(gpu, options.commit or report.commit()), rows)
    print(path)
    return int(any("error" in row for row in rows if row["implementation"] == "mini"))


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.list:
        list_suites()
        return 0
    what = "--host" if options.host else options.suite
    try:
        import torch
    except ImportError:
        sys.exit(f"bench {what}: needs PyTorch, which is not installed")
    if not torch.cuda.is_available():
        sys.exit(f"bench {what}: needs a CUDA GPU, and PyTorch sees none here")
    if options.suite == "backward":
        return run_backward(options)
    return run_host(options) if options.host else run_suite(options)


if __name__ == "__main__":
    sys.exit(main())
