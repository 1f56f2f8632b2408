"""The benchmark's own arithmetic, order and file format. No GPU: a fake clock and CPU tensors."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import measure, report, warm
from bench.__main__ import main, with_the_usual
from bench.check import Checker
from bench.implementations import IMPLEMENTATIONS, Implementation, Prepared
from bench.workloads import (
    HOST,
    PORTABLE,
    SMOKE,
    SUITES,
    Tensors,
    Workload,
    prefill_cell,
    ragged_lengths,
    small,
    visible_area,
    visible_keys,
)

CPU = torch.device("cpu")
LENGTH = st.integers(0, 40)
EDGE = st.integers(-1, 45)


def visible(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """Who sees whom, pair by pair, as the interface defines it: [seqlen_q, seqlen_k]."""
    left, right = window
    seen = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            distance = j - (i + seqlen_k - seqlen_q)
            in_window = (left < 0 or distance >= -left) and (right < 0 or distance <= right)
            seen[i, j] = distance <= 0 and (left < 0 or distance >= -left) if causal else in_window
    return seen


@settings(deadline=None)  # a busy machine is no mistake
@given(LENGTH, LENGTH, st.booleans(), st.tuples(EDGE, EDGE))
def test_visible_area_and_keys_equal_the_mask_counted_pair_by_pair(
    seqlen_q, seqlen_k, causal, window
):
    seen = visible(seqlen_q, seqlen_k, causal, window)
    assert visible_area(seqlen_q, seqlen_k, causal, window) == int(seen.sum())
    if seqlen_q:
        assert visible_keys(seqlen_q, seqlen_k, causal, window) == int(seen.any(dim=0).sum())


def test_flops_and_bytes_of_known_workloads():
    by_name = {workload.name: workload for workload in PORTABLE}
    full = by_name["dense/d128/none/s4096"]
    assert full.flops == 4 * 4 * 4096 * 4096 * 16 * 128
    assert full.rate(1.0) == pytest.approx(full.flops / 1e-3 / 1e12)
    causal = by_name["dense/d128/causal/s4096"]
    assert causal.flops == 4 * 4 * (4096 * 4097 // 2) * 16 * 128
    assert by_name["paged/p16/d128/causal/s4096"].flops == causal.flops
    ragged = by_name["ragged/d128/none/s4096"]
    assert sum(ragged.seqlens_q) == 16384
    assert ragged.flops == 4 * sum(n * n for n in ragged.seqlens_q) * 16 * 128
    decode = small("x/decode", "decode", (100, 50), page_size=16)
    assert decode.kv_bytes == 2 * 150 * 2 * 64 * 2
    assert decode.rate(1.0) == pytest.approx(decode.kv_bytes / 1e-3 / 1e9)
    assert (full.unit, decode.unit) == ("tflops", "gigabytes_per_second")


def test_every_workload_has_a_name_of_its_own():
    everything = [workload.name for suite in (*SUITES.values(), HOST) for workload in suite]
    assert [name for name, count in Counter(everything).items() if count > 1] == []


def test_portable_covers_the_promised_grid():
    names = {workload.name for workload in PORTABLE}
    for head_dim in (64, 128):
        for mask in ("none", "causal"):
            for seqlen in (1024, 4096, 16384):
                for prefix in ("dense", "varlen", "paged/p16", "paged/p256"):
                    assert f"{prefix}/d{head_dim}/{mask}/s{seqlen}" in names
            assert f"ragged/d{head_dim}/{mask}/s4096" in names
    assert {sum(workload.seqlens_q) for workload in PORTABLE} == {16384}
    assert {workload.heads * workload.head_dim for workload in PORTABLE} == {2048}


@given(st.integers(20, 500), st.integers(1, 20), st.integers(0, 9))
def test_ragged_lengths_add_up(total, count, seed):
    lengths = ragged_lengths(total, count, seed)
    assert (len(lengths), sum(lengths), min(lengths) >= 1) == (count, total, True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "dense", "lengths": (3, 4)},
        {"kind": "paged", "lengths": (3, 4)},
        {"kind": "varlen", "lengths": (3, 4), "page_size": 16},
        {"kind": "dense", "lengths": (3,), "heads": 3},
        {"kind": "varlen", "lengths": (3, 4), "seqlens_q": (3,)},
    ],
)
def test_workloads_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="wrong:"):
        small("wrong", **wrong)


@given(st.integers(1, 30))
def test_every_contender_takes_every_place_and_pairs_of_rounds_are_balanced(count):
    orders = [measure.round_order(count, number) for number in range(2 * count)]
    places = Counter((place, who) for order in orders for place, who in enumerate(order))
    assert set(places.values()) == {2}
    assert len(places) == count * count
    for there, back in zip(orders[::2], orders[1::2], strict=True):
        assert there == back[::-1]


def test_cells_are_what_is_timed_together():
    timed_together = list(measure.cells(PORTABLE))
    assert [cell[0].kind for cell in timed_together] == ["dense"] * 12
    assert all(len({workload.cell for workload in cell}) == 1 for cell in timed_together)
    assert [len(cell) for cell in measure.cells(SMOKE)] == [1] * len(SMOKE)


def test_warm_up_gives_each_variant_to_one_worker_and_leaves_out_what_is_too_large():
    huge = small("x/huge", "decode", (2**22,) * 8)
    work = warm.tasks([*PORTABLE, huge])
    assert len(work) == 16  # dense, varlen, two page sizes; two head dims; two masks
    assert all(names == ("mini", "portable") for names, _ in work)
    assert sorted(w.name for _, given in work for w in given) == sorted(w.name for w in PORTABLE)


def test_warm_up_gives_each_workload_alone_to_what_compiles_for_each():
    work = warm.tasks(PORTABLE, ["flex"])
    alone = [given for names, given in work if names == ("flex",)]
    assert sorted(w.name for given in alone for w in given) == sorted(w.name for w in PORTABLE)
    assert all(len(given) == 1 for given in alone)
    assert len(work) == len(PORTABLE) + len(warm.tasks(PORTABLE))


# -- the check of outputs ----------------------------------------------------------------------


def attention(workload: Workload, tensors: Tensors) -> torch.Tensor:
    """All rows, in float32, from a mask that is counted pair by pair."""
    out = torch.full_like(tensors.q, torch.nan)
    group = workload.heads // workload.heads_k
    lengths = zip(workload.seqlens_q, workload.seqlens_k, strict=True)
    for entry, (seqlen_q, seqlen_k) in enumerate(lengths):
        q = tensors.of_queries(workload, entry, tensors.q).float()
        k = tensors.of_keys(workload, entry, tensors.k).float().repeat_interleave(group, dim=1)
        v = tensors.of_keys(workload, entry, tensors.v).float().repeat_interleave(group, dim=1)
        s = torch.einsum("qhd,khd->hqk", q, k) * workload.head_dim**-0.5
        seen = visible(seqlen_q, seqlen_k, workload.causal, workload.window)
        p = torch.softmax(s.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0)
        o = torch.einsum("hqk,khd->qhd", p, v).to(out.dtype)
        tensors.of_queries(workload, entry, out).copy_(o)
    return out


@pytest.mark.parametrize("workload", SMOKE, ids=lambda workload: workload.name)
def test_the_check_accepts_right_outputs_and_refuses_wrong_ones(workload):
    tensors = workload.tensors(CPU)
    checker = Checker(workload, tensors)
    right = attention(workload, tensors)
    assert checker.problem(right) is None
    assert "off by" in (checker.problem(right * 1.1) or "")
    unwritten = right.clone()
    unwritten.view(-1)[-1] = torch.nan
    assert "not written" in (checker.problem(unwritten) or "")
    assert "shape" in (checker.problem(right[:1, :1]) or "")


def test_the_same_name_gives_the_same_tensors_and_copies_differ():
    workload = SMOKE[3]
    one, again, other = (workload.tensors(CPU, copy) for copy in (0, 0, 1))
    assert torch.equal(one.k, again.k)
    assert not torch.equal(one.k, other.k)
    assert one.block_table is not None
    pages = one.block_table[-1, :7].tolist()
    assert len(set(pages)) == 7
    assert max(pages) < one.k.shape[0]


# -- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", [*SMOKE, *HOST], ids=lambda workload: workload.name)
@pytest.mark.parametrize("name", ["mini", "sdpa"])
def test_adapters_compute_the_workload(name, workload):
    """On the CPU: our adapter, and the one that both SDPA back ends share."""
    adapters = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
    implementation = adapters["cudnn" if name == "sdpa" else name]
    if name == "mini" and implementation.available():
        pytest.skip(f"mini: {implementation.available()}")
    tensors = workload.tensors(CPU)
    prepared = implementation.prepare(workload, tensors)
    if prepared is None:
        pytest.skip(f"{name} does not do this workload")
    output = prepared.output(prepared.call())
    assert Checker(workload, tensors).problem(output) is None


# -- a run with a fake clock -------------------------------------------------------------------


def fake_implementation(name: str, factor: float, cannot: str = "") -> Implementation:
    def prepare(workload: Workload, tensors: Tensors) -> Prepared | None:
        if workload.kind == cannot:
            return None
        output = attention(workload, tensors) * factor
        return Prepared(lambda: (name, output), lambda result: result[1])

    return Implementation(name, lambda: None, prepare)


def refuses(workload: Workload, tensors: Tensors) -> Prepared | None:
    def call() -> torch.Tensor:
        raise RuntimeError("no kernel for this\nand a long explanation")

    return Prepared(call)


COST = {"mini": 1.0, "fa2": 2.0, "wrong": 0.001}


def fake_timer(calls, repeats):
    """Each attention takes what COST says, however often it is called."""
    return repeats * COST[calls[0]()[0]]


@pytest.fixture(scope="module")
def cell() -> list[Workload]:
    lengths = {"seqlens_q": (12, 12), "seqlens_k": (12, 12)}
    return [
        small("dense/d64/causal/s12", "dense", (12, 12), cell="c", **lengths),
        small("ragged/d64/causal/s12", "varlen", (5, 19), cell="c"),
        small("decode/s9", "decode", (9, 4)),
    ]


@pytest.fixture(scope="module")
def rows(cell) -> list[report.Row]:
    contenders = [
        fake_implementation("mini", 1.0),
        fake_implementation("fa2", 1.0, cannot="varlen"),
        fake_implementation("wrong", 1.1),
        Implementation("broken", lambda: None, refuses),
    ]
    return [
        row
        for workloads in measure.cells(cell)
        for row in measure.measure_cell(workloads, contenders, fake_timer, CPU, rounds=3)
    ]


def test_results_file_has_the_promised_fields(cell, rows, tmp_path):
    path = tmp_path / "h200" / "portable.json"
    report.write(path, report.heading("NVIDIA H200", "abc"), rows)
    written = json.loads(path.read_text())
    assert list(written) == ["gpu", "versions", "commit", "date", "rows"]
    assert written["versions"]["torch"] == torch.__version__
    by_key = {(row["workload"], row["implementation"]): row for row in written["rows"]}
    for workload in cell:
        row = by_key[workload.name, "mini"]
        assert list(row) == ["workload", "implementation", "milliseconds", workload.unit]
        assert row["milliseconds"] == 1.0
        assert row[workload.unit] == pytest.approx(workload.rate(1.0), rel=1e-4)
    assert ("ragged/d64/causal/s12", "fa2") not in by_key


def test_wrong_and_broken_implementations_are_recorded_and_not_timed(cell, rows):
    for workload in cell:
        problems = {
            row["implementation"]: row["error"]
            for row in rows
            if row["workload"] == workload.name and "error" in row
        }
        assert set(problems) == {"wrong", "broken"}
        assert "off by" in problems["wrong"]
        assert problems["broken"] == "RuntimeError: no kernel for this"
    assert not any("milliseconds" in row for row in rows if "error" in row)


def test_what_a_graph_reads_outlives_it(cell):
    """A peer's workspace hangs on its call, which a graph takes the place of."""
    places = []
    real = fake_implementation("mini", 1.0)

    def prepare(workload, tensors):
        call, output = real.prepare(workload, tensors)
        room = torch.empty(1)
        places.append(weakref.ref(room))
        return Prepared(lambda: call() if room.numel() else None, output)

    sets = measure.input_sets(cell[2], CPU)
    peer, checker = replace(real, prepare=prepare), Checker(cell[2], sets[0])
    entrant = measure.contender(cell[2], peer, sets, checker, fake_timer)
    entrant.calls = [lambda: None]  # as a graph's replay
    gc.collect()
    assert places and all(place() is not None for place in places)


@pytest.mark.parametrize(
    ("names", "whole"),
    [(None, True), ("mini,fa3", False), ("mini,portable,fa2,cudnn,fa3,read,flashinfer", True)],
)
def test_a_whole_run_has_all_the_usual_implementations(names, whole):
    assert with_the_usual(names) is whole


def test_comparison_divides_rates_and_finds_the_dense_workload(cell, rows):
    comparison = report.Comparison(cell, rows)
    dense, ragged, decode = cell
    assert comparison.ratio(dense, "fa2") == pytest.approx(2.0, rel=1e-3)
    assert comparison.ratio(ragged, "fa2") is None
    assert comparison.ratio(dense, "wrong") is None
    assert comparison.of_dense(ragged) == pytest.approx(ragged.flops / dense.flops, rel=1e-3)
    assert comparison.of_dense(dense) is comparison.of_dense(decode) is None
    table = comparison.table().splitlines()
    assert len(table) == 1 + len(cell)
    assert "ERROR" in table[1]
    assert comparison.means().splitlines()[-1].split()[:2] == ["all", "2.000"]
    assert len(comparison.errors()) == 2 * len(cell)


def test_geometric_mean_and_folder_names():
    assert report.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert report.gpu_folder("NVIDIA H200") == "h200"
    assert report.gpu_folder("NVIDIA GeForce RTX 4090") == "rtx-4090"
    assert report.gpu_folder("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


# -- the command line --------------------------------------------------------------------------


def test_list_names_every_workload(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {w.name} " in printed for suite in SUITES.values() for w in suite)


@pytest.mark.parametrize("arguments", [["portable"], ["--host"]])
def test_without_a_gpu_it_says_so_in_one_line(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert "needs a CUDA GPU" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_prefill_cells_share_one_amount_of_tokens():
    cell = list(prefill_cell(64, causal=True, seqlen=4096))
    assert [w.name.partition("/")[0] for w in cell] == [
        *("dense", "varlen", "ragged", "paged", "paged")
    ]
