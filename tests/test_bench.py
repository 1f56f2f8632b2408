"""The benchmark's own arithmetic, order and file format. No GPU: a fake clock and CPU tensors."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import types
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import data, everyday, implementations, measure, model_scores, report, warm
from bench.__main__ import main, possible, with_the_usual
from bench.check import Checker
from bench.implementations import IMPLEMENTATIONS, Implementation, Prepared
from bench.suites import SUITES
from bench.workloads import (
    HOST,
    NORMAL,
    PORTABLE,
    SMOKE,
    Data,
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Calls are so small that on a busy machine threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("workload", SMOKE, ids=lambda workload: workload.name)
def test_flops_and_bytes_count_what_is_seen(workload):
    lengths = zip(workload.seqlens_q, workload.seqlens_k, strict=True)
    seen = [visible(q, k, workload.causal, workload.window) for q, k in lengths]
    # A multiply and an add for each element of q's rows and of v's.
    elements = workload.head_dim + (workload.head_dim_v or workload.head_dim)
    assert workload.flops == sum(int(s.sum()) for s in seen) * workload.heads * 2 * elements
    keys = sum(int(s.any(dim=0).sum()) for s in seen)
    assert workload.kv_bytes == keys * workload.heads_k * elements * 2


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
        {"kind": "decode", "lengths": (3, 4), "leftpads": (1,)},
        {"kind": "decode", "lengths": (3, 4), "leftpads": (1, 2), "page_size": 16},
        {"kind": "decode", "lengths": (3, 4), "cache_rows": 1},
        {"kind": "varlen", "lengths": (3, 4), "cache_rows": 2},
        {"kind": "varlen", "lengths": (3, 3), "data": Data("recency", 20)},
        {"kind": "decode", "lengths": (3, 4), "data": Data("recency", 20)},
        {"kind": "decode", "lengths": (3, 3), "data": Data("recency", 20), "page_size": 16},
        {"kind": "decode", "lengths": (3, 3), "data": Data("recency", 20), "cache_rows": 2},
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
    work = warm.tasks([*PORTABLE, huge], ("mini", "portable"))
    assert len(work) == 16  # dense, varlen, two page sizes; two head dims; two masks
    assert all(names == ("mini", "portable") for names, _ in work)
    assert sorted(w.name for _, given in work for w in given) == sorted(w.name for w in PORTABLE)


def test_warm_up_gives_each_workload_alone_to_what_compiles_for_each():
    work = warm.tasks(PORTABLE, ["mini"], ["flex"])
    alone = [given for names, given in work if names == ("flex",)]
    assert sorted(w.name for given in alone for w in given) == sorted(w.name for w in PORTABLE)
    assert all(len(given) == 1 for given in alone)
    assert len(work) == len(PORTABLE) + len(warm.tasks(PORTABLE, ["mini"]))


# -- the check of outputs ----------------------------------------------------------------------


def attention(workload: Workload, tensors: Tensors) -> torch.Tensor:
    """All rows, in float32, from a mask that is counted pair by pair."""
    out = tensors.q.new_full(tensors.out_shape, torch.nan)
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


def named(name: str) -> Workload:
    return next(workload for workload in SMOKE if workload.name == f"smoke/{name}")


def test_a_cache_with_rows_to_pick_and_slots_to_pass_over():
    rows = named("cache-batch-idx").tensors(CPU)
    assert (rows.k.shape, rows.v.shape) == ((5, 100, 2, 64),) * 2
    assert rows.cache_batch_idx is not None
    assert rows.cache_batch_idx.dtype == torch.int32
    first, second = rows.cache_batch_idx.tolist()
    assert first != second and {first, second} <= set(range(5))
    assert rows.seqlens_k.tolist() == [37, 100]
    assert torch.equal(rows.of_keys(named("cache-batch-idx"), 0, rows.v), rows.v[first, :37])
    padded = named("cache-leftpad").tensors(CPU)
    assert padded.leftpads is not None
    assert (padded.leftpads.tolist(), padded.seqlens_k.tolist()) == ([63, 5], [100, 105])
    assert padded.k.shape == (2, 105, 2, 64)
    assert torch.equal(padded.of_keys(named("cache-leftpad"), 1, padded.k), padded.k[1, 5:105])


@pytest.mark.parametrize("name", ["cache-batch-idx", "cache-leftpad"])
def test_the_check_sees_keys_of_another_row_or_slot(name):
    workload = named(name)
    tensors = workload.tensors(CPU)
    plain = replace(workload, leftpads=(), seqlens_k=workload.ends)
    wrong = attention(plain, replace(tensors, cache_batch_idx=None))
    assert "off by" in (Checker(workload, tensors).problem(wrong) or "")


def test_values_with_a_head_dim_of_their_own():
    for name in ("head-dim-v", "varlen-head-dim-v"):
        tensors = named(name).tensors(CPU)
        assert (tensors.q.shape[-1], tensors.k.shape[-1], tensors.v.shape[-1]) == (192, 192, 128)
        assert tensors.out_shape == (*tensors.q.shape[:-1], 128)


def test_a_mixed_batch_has_pages_and_offsets_of_its_own():
    workload = named("mixed")
    tensors = workload.tensors(CPU)
    assert tensors.cu_seqlens_q is not None and tensors.block_table is not None
    assert tensors.cu_seqlens_q.tolist() == [0, 20, 21, 24]
    assert tensors.q.shape == (24, 8, 64)
    assert (tensors.block_table.dtype, tensors.block_table.shape) == (torch.int32, (3, 7))
    table = tensors.block_table.tolist()
    used = [page for row, count in zip(table, (2, 3, 7), strict=True) for page in row[:count]]
    assert len(set(used)) == len(used)
    assert table[0][2:] == [0] * 5
    assert workload.cold and not named("paged").cold


# -- adapters ----------------------------------------------------------------------------------

# What an implementation leaves out of SMOKE and HOST.
NO_DENSE_CALL = {
    *("smoke/varlen", "smoke/paged", "smoke/prefix", "smoke/decode-ragged", "smoke/decode-paged"),
    *("smoke/mixed", "smoke/one-split", "smoke/varlen-window", "smoke/varlen-head-dim-v"),
    *("smoke/cache-batch-idx", "smoke/cache-leftpad"),
    *("host/varlen", "host/paged", "host/decode-paged"),
}
CANNOT = {
    "mini": set[str](),
    "cudnn": {*NO_DENSE_CALL, "smoke/window"},
    "fa2": NO_DENSE_CALL - {"smoke/varlen", "smoke/varlen-window"} | {"smoke/head-dim-v"},
    "fa3": set[str](),
    "flashinfer": {
        *("smoke/dense", "smoke/window", "smoke/head-dim-v", "smoke/one-split"),
        *("smoke/cache-batch-idx", "smoke/cache-leftpad", "smoke/decode", "smoke/decode-graph"),
        "smoke/decode-ragged",  # a dense cache of 100 slots is no whole pages
    },
    "two": {w.name for w in SMOKE} - {"smoke/mixed", "smoke/one-split", "smoke/prefix"},
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Peers that need a GPU, with our own functions inside: are they told the right things?"""
    mini = pytest.importorskip("mini_flash_attention")

    def forward(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, debug, **window):
        edges = (window.get("window_size_left", -1), window.get("window_size_right", -1))
        mask = {"causal": causal, "window_size": edges}
        if cu_q is None:
            return mini.flash_attn_func(q, k, v, **mask), None
        return mini.flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, **mask), None

    class Paged:
        def __init__(self, room, layout, backend="auto", use_tensor_cores=False):
            assert layout == "NHD"

        def plan(
            self, queries, starts, used, last, heads, heads_k, head_dim, page_size,
            q_data_type=None, kv_data_type=None, causal=False, window_left=-1,
        ):  # fmt: skip
            lengths = (starts.diff() - 1) * page_size + last
            rows = used.split(starts.diff().tolist())
            table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            self.arguments = (queries.int(), None, int(queries.diff().max()), int(lengths.max()))
            self.options = {"seqused_k": lengths.int(), "block_table": table, "causal": causal}
            self.options["window_size"] = (window_left, -1)
            assert (q_data_type, kv_data_type) == (torch.bfloat16,) * 2
            self.shape = (heads, heads_k, head_dim, page_size)

        def run(self, q, pages, out):
            k, v = pages
            assert self.shape == (q.shape[1], k.shape[2], q.shape[2], k.shape[1])
            out.copy_(mini.flash_attn_varlen_func(q, k, v, *self.arguments, **self.options))

    class Decode(Paged):
        def plan(self, starts, *layout, **options):
            super().plan(torch.arange(len(starts)), starts, *layout, causal=True, **options)

    class Ragged:
        def __init__(self, room, layout):
            pass

        def plan(self, queries, keys, heads, heads_k, d, d_v, **options):
            self.lengths = (queries, keys, int(queries.diff().max()), int(keys.diff().max()))
            self.shape = (heads, heads_k, d, d_v)
            window = (options.get("window_left", -1), -1)
            self.options = {"causal": options["causal"], "window_size": window}

        def run(self, q, k, v, out):
            assert self.shape == (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
            out.copy_(mini.flash_attn_varlen_func(q, k, v, *self.lengths, **self.options))

    flashinfer = types.SimpleNamespace(
        BatchPrefillWithPagedKVCacheWrapper=Paged,
        BatchDecodeWithPagedKVCacheWrapper=Decode,
        BatchPrefillWithRaggedKVCacheWrapper=Ragged,
    )
    monkeypatch.setattr(implementations, "flashinfer_workspace", lambda device: torch.empty(0))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", mini)


ADAPTERS = {implementation.name: implementation for implementation in IMPLEMENTATIONS}


@pytest.mark.parametrize("name", CANNOT)
def test_adapters_compute_the_workload(name, stand_ins):
    """On the CPU, or that they leave it out."""
    left_out = set()
    for workload in [*SMOKE, *(HOST if name in ("mini", "cudnn") else ())]:
        tensors = workload.tensors(CPU)
        prepared = ADAPTERS[name].prepare(workload, tensors)
        if prepared is None:
            left_out.add(workload.name)
            continue
        output = prepared.output(prepared.call())
        assert Checker(workload, tensors).problem(output) is None, workload.name
    assert left_out == {other for other in CANNOT[name] if name == "cudnn" or "smoke" in other}


@pytest.mark.parametrize(
    ("name", "unasked"), [("prefix", 1), ("varlen", None), ("decode", None), ("mixed", 1)]
)
def test_splits_of_keys_are_passed_on(name, unasked, monkeypatch):
    """FlashAttention-3's varlen function does not split, its function for caches does."""
    told = []
    functions = ("flash_attn_varlen_func", "flash_attn_with_kvcache")
    peer = {name: lambda *given, **options: told.append(options) for name in functions}
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(**peer))
    monkeypatch.setitem(sys.modules, "mini_flash_attention", types.SimpleNamespace(**peer))
    workload, tensors = named(name), named(name).tensors(CPU)
    for asked in (None, 0, 1):
        for adapter in ("fa3", "mini"):
            ADAPTERS[adapter].prepare(replace(workload, num_splits=asked), tensors).call()
    splits = [options.get("num_splits") for options in told]
    assert splits == [unasked, None, 0, 0, 1, 1]


def test_what_peers_have_no_kernel_for_is_left_out():
    many = small("x/many", "varlen", (1,) * 65536, heads=1, heads_k=1, head_dim=8)
    assert ADAPTERS["fa2"].prepare(many, many.tensors(CPU)) is None  # above 65,535 in a grid
    for name in ("fa3", "flashinfer"):
        for shape in ({"head_dim": 44}, {"head_dim": 96, "head_dim_v": 64}):
            workload = small("x/head-dim", "varlen", (20,), **shape)
            assert ADAPTERS[name].prepare(workload, workload.tensors(CPU)) is None
    for name in ("varlen", "mixed", "cache-batch-idx", "cache-leftpad"):
        assert ADAPTERS["flex"].prepare(named(name), named(name).tensors(CPU)) is None
    rows = small("x/rows", "decode", (2**20,), heads_k=1, head_dim=8, cache_rows=2)
    assert ADAPTERS["read"].prepare(rows, named("decode").tensors(CPU)) is None


# -- serving, short, shapes and scores ---------------------------------------------------------

EVERYDAY = {name: SUITES[name] for name in ("serving", "short", "shapes", "scores")}
MOST_BYTES = 40e9
L2_BYTES = 64e6

# Of the first cells of each suite: those stay, whatever is added behind them.
CHECKSUMS = {
    "serving": (82, "e6915f71c93a38f5"),
    "short": (28, "1622b6b68aa2ca9e"),
    "shapes": (71, "3a18c4b577e3553c"),
    "scores": (77, "51e0fc189668cb37"),
}


def checksum(workloads) -> str:
    """Of all that makes a call what it is, and of its name."""
    facts = [
        (
            *(w.name, w.kind, w.seqlens_q, w.seqlens_k, w.heads, w.heads_k, w.head_dim, w.d_v),
            *(w.causal, w.window, w.dtype, w.page_size, w.graph, w.feature),
            *(w.cache_rows, w.leftpads, w.num_splits),
            *(w.data if w.data != NORMAL else ()),
        )
        for w in workloads
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@pytest.mark.parametrize("suite", EVERYDAY)
def test_no_cell_is_changed_or_removed(suite):
    count, expected = CHECKSUMS[suite]
    assert len(EVERYDAY[suite]) >= count
    assert checksum(EVERYDAY[suite][:count]) == expected


def test_sixty_cells_are_drawn_from_distributions_that_say_what_they_stand_for():
    families = Counter(workload.group for suite in EVERYDAY.values() for workload in suite)
    distributions = {
        "serving": ("chat", "completion", "retrieval", "speculative", "answers"),
        "short": ("texts", "crops"),
        "shapes": ("odd_head_dims", "odd_lengths", "model_heads"),
    }
    total = 0
    for suite, names in distributions.items():
        for name in names:
            distribution = getattr(everyday, name)
            assert distribution.__doc__
            count = families[f"{suite}/{name}"]
            total += count
            # One more leaves those before it as they are.
            again = list(everyday.drawn(suite, distribution, count + 1))
            assert set(again[:count]) <= set(EVERYDAY[suite])
    assert total == 60


@pytest.mark.parametrize("suite", EVERYDAY)
def test_a_cell_fits_into_memory_and_is_timed_as_a_graph(suite):
    for cell in measure.cells(EVERYDAY[suite]):
        assert all(workload.graph for workload in cell)
        total = 0.0
        for w in cell:
            sets = min(measure.COPIES, -(-measure.COLD * L2_BYTES // w.kv_bytes)) if w.cold else 1
            # An output and a graph's for each contender.
            outputs = 16 * sum(w.seqlens_q) * w.heads * w.d_v * w.itemsize
            total += sets * w.tensor_bytes + outputs
        assert total < MOST_BYTES, cell[0].name


def shrunk(workload: Workload) -> Workload:
    """The same call with few and short sequences."""
    entries = sorted({0, workload.batch // 2, workload.batch - 1})
    lengths = [(workload.seqlens_q[entry], workload.seqlens_k[entry]) for entry in entries]
    new = [q if q < 8 else 8 + q % 8 + q // 4096 for q, _ in lengths]
    left, right = workload.window
    return replace(
        workload,
        seqlens_q=tuple(new),
        seqlens_k=tuple(n + (k - q) // 1024 for n, (q, k) in zip(new, lengths, strict=True)),
        page_size=workload.page_size and 16,
        window=(left // 32, right) if left > 0 else workload.window,
        cache_rows=workload.cache_rows and 5,
        leftpads=tuple(
            workload.leftpads[entry] // 64 for entry in entries[: len(workload.leftpads)]
        ),
    )


@pytest.mark.parametrize("suite", EVERYDAY)
def test_our_call_computes_small_versions_of_every_cell(suite):
    seen = set()
    for workload in map(shrunk, EVERYDAY[suite]):
        if workload.variant in seen:
            continue
        seen.add(workload.variant)
        tensors = workload.tensors(CPU)
        prepared = ADAPTERS["mini"].prepare(workload, tensors)
        assert prepared is not None
        output = prepared.output(prepared.call())
        assert Checker(workload, tensors).problem(output) is None, workload.name


# -- what scores are like ----------------------------------------------------------------------


def scores_of(head_dim: int, kind: Data) -> tuple[Workload, torch.Tensor]:
    """All scores of a small workload, in float64: [batch, heads, seqlen_q, seqlen_k]."""
    heads = {"heads": 16, "heads_k": 8, "head_dim": head_dim}
    workload = small("x/data", "dense", (300, 300), data=kind, **heads)
    tensors = workload.tensors(CPU)
    k = tensors.k.double().repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", tensors.q.double(), k) * head_dim**-0.5
    return workload, scores


def assert_normal(scores: torch.Tensor) -> None:
    assert scores.mean().abs() < 0.02
    assert scores.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("nats", [10, 20, 30, 60])
def test_a_first_key_outscores_the_others_with_every_query(nats, head_dim):
    for one_in in (1, 8):
        _, scores = scores_of(head_dim, Data("first", nats, one_in))
        sinks = torch.arange(16) // 2 % one_in == 0
        first = scores[..., 0]
        torch.testing.assert_close(
            first[:, sinks], torch.full_like(first[:, sinks], nats), rtol=2**-9, atol=0
        )
        assert_normal(scores[:, sinks, :, 1:])
        if one_in > 1:
            assert_normal(scores[:, ~sinks])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ten_keys_anywhere_outscore_the_others(head_dim):
    _, scores = scores_of(head_dim, Data("anywhere", 30))
    stands_out = (scores - 30).abs() < 30 * 2**-9
    assert_normal(scores[~stands_out])
    assert (stands_out.sum(-1) == 10).all()
    places = stands_out[:, ::2, 0]  # [batch, heads_k, seqlen_k]
    assert torch.equal(stands_out, places.repeat_interleave(2, dim=1)[:, :, None].expand_as(scores))
    assert len({tuple(row.nonzero().flatten().tolist()) for row in places.flatten(0, 1)}) == 16


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_fall_with_distance(head_dim):
    _, scores = scores_of(head_dim, Data("recency", 20))
    position = torch.arange(300)
    pattern = 20 * data.fall(position[:, None] - position, head_dim)
    assert_normal(scores - pattern)
    assert pattern.diagonal() == pytest.approx(20)
    far = [20 * data.fall(torch.arange(4**n, 4 ** (n + 1)), head_dim).mean() for n in range(7)]
    assert far == sorted(far, reverse=True) and far[0] > 14 and far[-1] < 1


def test_a_pattern_ends_at_the_last_key_as_the_mask_does():
    workload = small("x/data", "decode", (50,), seqlens_q=(3,), data=Data("recency", 20))
    tensors = workload.tensors(CPU)
    scores = torch.einsum("qd,kd->qk", tensors.q[0, :, 0, :32], tensors.k[0, :, 0, :32]) / 8
    assert scores.argmax(-1).tolist() == [47, 48, 49]


@pytest.mark.parametrize("kind", [Data("first", 30, 2), Data("anywhere", 30), Data("recency", 20)])
def test_data_are_made_from_the_same_random_tensors(kind):
    """So workloads that have none get what they always got."""
    plain = small("x/data", "dense", (40, 40))
    workload = replace(plain, data=kind)
    before, one, again, other = (w.tensors(CPU, c) for w, c in (
        (plain, 0), (workload, 0), (workload, 0), (workload, 1)
    ))  # fmt: skip
    assert torch.equal(one.q, again.q) and torch.equal(one.k, again.k)
    assert not torch.equal(one.k, other.k)
    assert torch.equal(one.v, before.v) and not torch.equal(one.q, before.q)
    kept = slice(32, None) if kind.kind == "recency" else slice(1, None)
    scale = 2**0.25 if kind.kind == "recency" else 1
    assert torch.equal(one.q[..., kept], before.q[..., kept] * scale)
    assert Checker(workload, one).problem(attention(workload, one)) is None


@pytest.fixture
def model_file(tmp_path, monkeypatch):
    """Where the model's data are looked for; not there yet."""
    monkeypatch.setattr(data, "OUT", tmp_path / "build" / "model_scores.pt")
    data.recorded.cache_clear()
    yield data.OUT
    data.recorded.cache_clear()


def test_without_the_model_its_cells_are_left_out_with_a_reason(model_file, capsys):
    left = possible(SUITES["scores"])
    printed = capsys.readouterr().out.splitlines()
    assert [w for w in SUITES["scores"] if w not in left] == [
        w for w in SUITES["scores"] if "/layer" in w.name
    ]
    assert len(printed) == 1
    assert printed[0].startswith("30 workloads skipped: no build/model_scores.pt")
    assert "python -m bench.model_scores" in printed[0]


def test_the_model_gives_its_layers(model_file):
    shapes = {"q": 9, "k": 3, "v": 3}
    layers = {n: torch.randn(2, 20, h, 64, dtype=torch.bfloat16) for n, h in shapes.items()}
    model_file.parent.mkdir()
    torch.save(layers, model_file)
    assert possible(SUITES["scores"]) == SUITES["scores"]
    heads = {"heads": 9, "heads_k": 3, "data": Data("model", layer=1)}
    tensors = small("x/model", "dense", (20, 20), **heads).tensors(CPU)
    for name in shapes:
        for entry in getattr(tensors, name):
            assert torch.equal(entry, layers[name][1])
    with pytest.raises(ValueError, match="x/model: q of the model"):
        small("x/model", "dense", (21, 21), **heads).tensors(CPU)


def test_the_recorder_attends_and_keeps_what_it_was_given():
    workload = small("x/recorder", "dense", (30,), heads=9, heads_k=3, dtype="float32")
    tensors = workload.tensors(CPU)
    q, k, v = tensors.q[0], tensors.k[0], tensors.v[0]
    recorder = model_scores.Recorder(torch.arange(30), torch.arange(30), torch.tensor([29]))
    out = recorder.attend(q, k, v, *recorder.layer(0))
    assert Checker(workload, tensors).problem(out[None]) is None
    assert {name: len(layers) for name, layers in recorder.heads.items()} == {
        "q": 1,
        "k": 1,
        "v": 1,
    }
    assert torch.equal(recorder.heads["k"][0], k.bfloat16())
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(3, dim=1)) / 8
    lead = [[s[i, 0] - s[i, 1 : i + 1].mean() for i in range(1, 30)] for s in scores]
    expected = torch.tensor(lead).mean(1)
    torch.testing.assert_close(model_scores.lead_of_first_key(q, k), expected, rtol=0, atol=1e-5)


def test_maxima_changes_the_plan_and_remembers_its_calls_apart():
    pytest.importorskip("triton")
    from mini_flash_attention import plan, recipes
    from mini_flash_attention.validate import calls

    gpu = plan.gpu.Gpu("H200", 90, 132)
    q = torch.empty(4, 4096, 16, 128, dtype=torch.bfloat16)
    p = calls.dense(q, q, q, 0.0, None, True, (-1, -1), 0.0, None, False, False, None, None)
    usual, remembered = plan.attention(p, q, gpu), recipes._recipes
    recipes.remember("x", None)
    for _ in range(2):
        with implementations.maxima():
            assert plan.attention(p, q, gpu) == usual._replace(skip_max=False) != usual
            assert "x" not in recipes._recipes
            recipes.remember("y", None)
        assert plan.attention(p, q, gpu) == usual
        assert recipes._recipes is remembered and "y" not in remembered
        with implementations.maxima():
            assert recipes._recipes.pop("y", "gone") is None
    del remembered["x"]


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
    [(None, True), ("mini,fa3", False), ("mini,portable,two,fa2,cudnn,fa3,read,flashinfer", True)],
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


def test_shares_of_the_speed_on_random_data(cell, rows):
    assert report.Comparison(cell, rows).shares() == ""
    plain = replace(cell[0], name="c/normal")
    other = replace(plain, name="c/first30", data=Data("first", 30))
    timed = [
        report.timed_row(workload, name, milliseconds)
        for workload, name, milliseconds in (
            (plain, "mini", 1.0), (other, "mini", 2.0), (plain, "fa2", 4.0), (other, "fa2", 5.0),
            (other, "fa3", 1.0),
        )
    ]  # fmt: skip
    lines = [
        line.split() for line in report.Comparison([plain, other], timed).shares().splitlines()
    ]
    assert lines[0][-3:] == ["mini", "fa2", "fa3"]
    assert lines[1:] == [["c/first30", "0.500", "0.800", "-"]]


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
