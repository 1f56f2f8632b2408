"""What comes out: rows, the results file, and the table that is printed."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.workloads import NORMAL, Workload

ROOT = Path(__file__).resolve().parent
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
Row = dict[str, Any]


def timed_row(workload: Workload, implementation: str, milliseconds: float) -> Row:
    return {
        "workload": workload.name,
        "implementation": implementation,
        "milliseconds": float(f"{milliseconds:.5g}"),
        workload.unit: float(f"{workload.rate(milliseconds):.5g}"),
    }


def error_row(workload: Workload, implementation: str, problem: str) -> Row:
    """An implementation that failed or gave a wrong output is recorded, and not timed."""
    return {"workload": workload.name, "implementation": implementation, "error": problem}


def rate(row: Row | None) -> float | None:
    if row is None:
        return None
    return row.get("tflops", row.get("gigabytes_per_second"))


# -- the results file --------------------------------------------------------------------------


def gpu_folder(gpu: str) -> str:
    """``NVIDIA H200`` -> ``h200``."""
    words = gpu.lower().replace("/", "-").split()
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


def run_text(*command: str) -> str:
    """What a command prints, or nothing where it isn't there or fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """``COMMIT`` from the environment, else git's; ``-dirty`` where code differs from it."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    head = run_text("git", "rev-parse", "--short=12", "HEAD")
    changed = run_text("git", "status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
    return (head or "unknown") + ("-dirty" if changed else "")


def versions() -> dict[str, str]:
    """Of everything that takes part; what is absent is left out."""
    import torch

    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or ""),
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "driver": run_text(*DRIVER).partition("\n")[0],
    }
    modules = {"triton": "triton", "fa3": "flash_attn_interface", "flashinfer": "flashinfer"}
    distributions = metadata.packages_distributions()
    for name, module in modules.items():
        for distribution in distributions.get(module, [])[:1]:
            found[name] = metadata.version(distribution)
    return {name: version for name, version in found.items() if version}


def heading(gpu: str, commit_name: str) -> dict[str, Any]:
    today = datetime.now(timezone.utc).date().isoformat()
    return {"gpu": gpu, "versions": versions(), "commit": commit_name, "date": today}


def write(path: Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """The heading's fields a line each, then a line for each row: differences stay readable."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["{", *lines, '  "rows": [', body, "  ]", "}", ""]))


# -- the printed table -------------------------------------------------------------------------


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to the widest entry: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


class Comparison:
    """Ours against each peer, and each workload against the dense one of its cell."""

    def __init__(self, workloads: Sequence[Workload], rows: Sequence[Row]) -> None:
        self.rows = {(row["workload"], row["implementation"]): row for row in rows}
        measured = {row["workload"] for row in rows}
        self.workloads = [workload for workload in workloads if workload.name in measured]
        names = dict.fromkeys(row["implementation"] for row in rows)
        self.peers = [name for name in names if name != "mini"]
        self.dense: dict[str, Workload] = {}
        for workload in self.workloads:
            if workload.cell and workload.kind == "dense":
                self.dense.setdefault(workload.cell, workload)

    def rate(self, workload: Workload, name: str) -> float | None:
        return rate(self.rows.get((workload.name, name)))

    def ratio(self, workload: Workload, peer: str) -> float | None:
        """Above 1 we are faster."""
        ours, theirs = self.rate(workload, "mini"), self.rate(workload, peer)
        return ours / theirs if ours and theirs else None

    def of_dense(self, workload: Workload) -> float | None:
        """Our speed as a share of our own on the dense workload of the cell."""
        reference = self.dense.get(workload.cell)
        if reference is None or reference is workload:
            return None
        ours, base = self.rate(workload, "mini"), self.rate(reference, "mini")
        return ours / base if ours and base else None

    def entry(self, workload: Workload, name: str) -> str:
        row = self.rows.get((workload.name, name))
        if row is None:
            return "-"
        if "error" in row:
            return "ERROR"
        ratio = self.ratio(workload, name) if name != "mini" else None
        return f"{rate(row):.4g}" + (f" ({ratio:.2f})" if ratio else "")

    def table(self) -> str:
        names = ["mini", *self.peers]
        lines = [["workload", *names, "of dense"]]
        for workload in self.workloads:
            share = self.of_dense(workload)
            entries = [self.entry(workload, name) for name in names]
            lines.append([workload.name, *entries, f"{share:.2f}" if share else ""])
        return text_table(lines)

    def means(self) -> str:
        """Geometric means of mini / peer over each group and over all."""
        groups = dict.fromkeys(workload.group for workload in self.workloads)
        lines = [["geometric mean, mini / peer", *self.peers, "of dense"]]
        for group in [*groups, "all"]:
            members = [w for w in self.workloads if group in ("all", w.group)]
            line = [group]
            for peer in self.peers:
                ratios = [self.ratio(workload, peer) for workload in members]
                line.append(mean_text(ratios))
            line.append(mean_text([self.of_dense(workload) for workload in members]))
            lines.append(line)
        return text_table(lines)

    def shares(self) -> str:
        """What each workload on other data keeps of the speed on random normal data; or nothing."""
        names, random = ["mini", *self.peers], dict[str, Workload]()
        lines = [["share of random data's speed", *names]]
        for workload in self.workloads:
            if workload.data == NORMAL:
                random[workload.cell] = workload
            elif workload.cell in random:
                base = random[workload.cell]
                rates = [(self.rate(workload, name), self.rate(base, name)) for name in names]
                shares = [f"{one / other:.3f}" if one and other else "-" for one, other in rates]
                lines.append([workload.name, *shares])
        return text_table(lines) if len(lines) > 1 else ""

    def errors(self) -> list[str]:
        return [
            f"ERROR {row['workload']} {row['implementation']}: {row['error']}"
            for row in self.rows.values()
            if "error" in row
        ]


def mean_text(ratios: Iterable[float | None]) -> str:
    present = [ratio for ratio in ratios if ratio]
    return f"{geometric_mean(present):.3f}" if present else "-"
