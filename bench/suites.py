"""All suites by name."""

from __future__ import annotations

from bench.everyday import SERVING, SHAPES, SHORT
from bench.scores import SCORES
from bench.workloads import (
    CHUNKED,
    DECODE,
    FEATURES,
    PORTABLE,
    PREFILL,
    SMOKE,
    VARLEN,
    Workload,
)

SUITES: dict[str, tuple[Workload, ...]] = {
    "portable": PORTABLE,
    "decode": DECODE,
    "prefill": PREFILL,
    "varlen": VARLEN,
    "features": FEATURES,
    "chunked": CHUNKED,
    "serving": SERVING,
    "short": SHORT,
    "shapes": SHAPES,
    "scores": SCORES,
    "smoke": SMOKE,
}
