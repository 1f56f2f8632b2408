"""Scores as models have them: the suite ``scores``.

A kernel may do less where scores hardly differ, as those of random normal inputs do. Trained models
have keys that outscore all others by far, mostly the first (attention sinks, Xiao et al., 2023),
and scores that fall with distance. Every cell begins with the call on random normal data, and the
others of the cell are the same call on other data, so that their ratio says what the data cost.

``data.py`` makes the data. Those of a trained model come from a file that ``model_scores.py``
writes; where it is absent, these workloads are left out. Cells and workloads may be added at the
end. None may be changed or removed: tests/test_bench.py holds their checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from bench.workloads import NORMAL, TOKENS, WIDTH, Data, Workload, decode_cell, dense_cell

LAYERS = 30

DATA = {
    "normal": NORMAL,
    **{f"first{nats}": Data("first", nats) for nats in (10, 20, 30, 60)},
    **{f"first{nats}-eighth": Data("first", nats, one_in=8) for nats in (10, 20, 30, 60)},
    "anywhere30": Data("anywhere", 30),
    "recency": Data("recency", 20),
}
MODEL = {f"layer{n:02}": Data("model", layer=n) for n in range(LAYERS)}


def with_data(call: Workload, data: dict[str, Data]) -> Iterator[Workload]:
    """The call on each kind of data, timed together."""
    for name, kind in data.items():
        yield replace(call, name=f"{call.name}/{name}", data=kind, graph=True, cell=call.name)


SCORES = (
    *(
        workload
        for d, s in product((64, 128), (4096, 16384))
        for workload in with_data(
            dense_cell("scores", TOKENS // s, s, WIDTH // d, d, causal=True), DATA
        )
    ),
    # SmolLM2-135M's heads, and its 4,096 tokens four times.
    *with_data(
        dense_cell("scores/smollm2", TOKENS // 4096, 4096, 9, 64, heads_k=3, causal=True),
        {"normal": NORMAL, **MODEL},
    ),
    *(
        workload
        for call in decode_cell(16, 32, 8, 4096)
        for workload in with_data(
            replace(call, name=f"scores/{call.name}"), {n: DATA[n] for n in ("normal", "first30")}
        )
    ),
)
