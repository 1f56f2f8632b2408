"""Tests import their helpers by name from this folder. Skips that say the same thing many times
over are counted at the end instead of listed.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mini_flash_attention import settings
from mini_flash_attention.kernels import workspace

sys.path.insert(0, str(Path(__file__).parent))

if settings.INTERPRETED:
    import interpreter

    interpreter.hasten()


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so a result that was not written shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def fill(*args, original=original, **kwargs):
            x = original(*args, **kwargs)
            with torch.no_grad():  # Inductor makes leaves that require gradients
                return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, fill)
    monkeypatch.setattr(workspace, "MAX_KEPT", 1)  # parts are fresh too
    monkeypatch.setattr(workspace, "_rooms", {})


def pytest_collection_modifyitems(config, items):
    """Of several processes each begins with its share of the slow tests.

    They take from one another what is left, which should be short: the list is dealt out to them
    in parts of one length.
    """
    processes = getattr(config, "workerinput", {"workercount": 1})["workercount"]
    if processes == 1:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    part = -(-len(rest) // processes)
    items[:] = [
        item
        for n in range(processes)
        for item in slow[n::processes] + rest[n * part : (n + 1) * part]
    ]


# Reasons for skipping that hundreds of tests can have at a time.
COUNTED = re.compile(r"needs .*GPUs?|one of three")


def reason(report):
    """Why a test was skipped."""
    where = report.longrepr
    return where[2].removeprefix("Skipped: ") if isinstance(where, tuple) else str(where)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest's own
def pytest_terminal_summary(terminalreporter):
    """Pytest lists failures, errors and skips one by one. Those COUNTED follow in two lines."""
    skipped = terminalreporter.stats.get("skipped", [])
    counts = Counter(why for report in skipped if COUNTED.fullmatch(why := reason(report)))
    if not counts:
        return (yield)
    listed = [report for report in skipped if reason(report) not in counts]
    terminalreporter.stats["skipped"] = listed
    try:
        result = yield
    finally:
        terminalreporter.stats["skipped"] = skipped  # the closing line counts them all
    each = ", ".join(f"{n} × {why}" for why, n in counts.most_common())
    terminalreporter.line(f"Skipped and not listed: {each}")
    if any("GPU" in why for why in counts):
        terminalreporter.line("To run them on a machine with such a GPU: python -m pytest -m gpu")
    return result
