"""The kernels on a GPU: the cases of test_functions.py at real sizes, and what only a GPU shows."""

import threading

import pytest
import torch
from cases import Case, between_margins, dense, kvcache, margins_intact, varlen

import mini_flash_attention as mfa
from mini_flash_attention import plan, settings
from mini_flash_attention.kernels import workspace

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

MASKS = [
    {},
    {"causal": True},
    {"window_size": (100, 0), "causal": True},
    {"window_size": (70, 33)},
    {"window_size": (-1, 20)},
]
DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (63, 65), (128, 128), (129, 257), (1, 1000), (300, 77), (513, 1024), (88, 448)]


def check(case: Case) -> None:
    """The case keeps the promise and writes nothing around its output."""
    out, lse = between_margins(case)
    case.check(out, lse)
    again = between_margins(case)  # as the recipe kept it
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    for name in ("k_cache", "v_cache"):
        cache = case.arguments.get(name)
        if cache is not None and "block_table" not in case.arguments:
            assert margins_intact(cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 80])
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_dense(meaning, head_dim, dtype):
    for seed, (seqlen_q, seqlen_k) in enumerate(SHAPES):
        nheads, nheads_k = [(4, 4), (6, 2), (4, 1)][seed % 3]
        check(
            dense(seed, 2, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, dtype, "cuda", **meaning)
        )


@pytest.mark.parametrize("head_dim", [1, 2, 7, 8, 16, 24, 32, 40, 59, 72, 96, 111, 160, 192, 255])
def test_head_dims(head_dim):
    check(dense(head_dim, 2, 130, 200, 4, 2, head_dim, torch.bfloat16, "cuda", causal=True))


LENGTHS = [
    ([128, 128], [128, 128]),
    ([1, 0, 300, 77, 0], [500, 30, 300, 0, 0]),
    ([150, 0, 150], [100, 100, 100]),
    ([0, 1208, 840, 0], [2538, 1742, 840, 300]),
    ([1] * 70, list(range(70))),
]


@pytest.mark.parametrize("page_size", [0, 1, 16, 48, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_varlen(meaning, head_dim, page_size):
    for seed, (lengths_q, lengths_k) in enumerate(LENGTHS):
        nheads, nheads_k = [(4, 4), (6, 2), (4, 1)][seed % 3]
        dtype = DTYPES[seed % 2]
        check(
            varlen(
                seed, lengths_q, lengths_k, page_size, nheads, nheads_k, head_dim, dtype, "cuda",
                padding=200, **meaning,
            )
        )  # fmt: skip


@pytest.mark.parametrize("page_size", [0, 1, 16, 20, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_kvcache(meaning, head_dim, page_size):
    for seed, (seqlen_q, appended) in enumerate([(1, 0), (1, 1), (4, 4), (130, 0), (70, 70)]):
        nheads, nheads_k = [(4, 4), (6, 2), (8, 1)][seed % 3]
        dtype = DTYPES[seed % 2]
        check(
            kvcache(
                seed, seqlen_q, [700, 0, 33, 256], appended, page_size, nheads, nheads_k, head_dim,
                dtype, "cuda", **meaning,
            )
        )  # fmt: skip


@pytest.mark.parametrize("page_size", [0, 16, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("meaning", [{}, {"causal": True}, {"window_size": (4000, 0)}], ids=str)
def test_many_queries_of_a_long_cache(meaning, head_dim, page_size, monkeypatch):
    """More than a few, and still the decode kernel's: heads packed, keys split."""
    monkeypatch.setattr(settings, "PORTABLE", True)
    decides, decided = plan.decode.decodes, []
    monkeypatch.setattr(
        plan.decode, "decodes", lambda *x: decided.append(decides(*x)) or decided[-1]
    )
    for seed, (seqlen_q, nheads, nheads_k) in enumerate([(20, 8, 2), (40, 8, 1), (100, 4, 4)]):
        lengths, dtype = [5000, 0, 33, 4097], DTYPES[seed % 2]
        check(
            kvcache(
                seed, seqlen_q, lengths, 0, page_size, nheads, nheads_k, head_dim, dtype, "cuda",
                **meaning,
            )
        )  # fmt: skip
    assert len(decided) == 3 and all(decided)


def test_strides_give_the_same_bits():
    g = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(2, 200, 3, 4, 64, device="cuda", dtype=torch.bfloat16, generator=g)
    q, k, v = qkv.unbind(2)
    plain = mfa.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    shifted = []
    for x in (q, k, v):
        room = torch.zeros(2, 200, 4, 65, device="cuda", dtype=torch.bfloat16)[..., 1:]
        shifted.append(room.copy_(x))
    for views in ((q, k, v), heads_first, shifted):
        assert torch.equal(mfa.flash_attn_func(*views, causal=True), plain)
    expanded = k[:, :, :1].expand(-1, -1, 4, -1)
    same = mfa.flash_attn_func(q, expanded, expanded)
    assert torch.equal(mfa.flash_attn_func(q, expanded.contiguous(), expanded.contiguous()), same)


def test_size_one_dimensions_may_carry_any_stride():
    q = torch.randn(1, 100, 1, 64, device="cuda", dtype=torch.float16)
    odd = q.as_strided(q.shape, (99990001, 64, 3331333, 1))
    assert torch.equal(mfa.flash_attn_func(odd, odd, odd), mfa.flash_attn_func(q, q, q))


def test_thousand_repeats_while_another_stream_is_busy():
    case = dense(0, 2, 300, 300, 4, 2, 128, torch.bfloat16, "cuda", causal=True)
    other = torch.cuda.Stream()
    big = torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(other):
        for _ in range(200):
            big = (big @ big).clamp(-1, 1)
    first, first_lse = case.run()
    for _ in range(1000):
        out, lse = case.run()
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window_size", [(-1, -1), (63, 0), (500, 0)])
def test_a_sequence_does_not_see_its_neighbours(head_dim, window_size):
    """Bitwise the same alone and in batches of 5 and 64, prefill and decoding without splits."""
    lengths = [60, 300, 1, 1200, 77] + [200] * 59
    masks = {"causal": True, "window_size": window_size}
    for page_size in (0, 16):
        whole = varlen(
            0, lengths, lengths, page_size, 4, 2, head_dim, torch.bfloat16, "cuda", **masks
        )
        decoded = kvcache(
            0, 1, lengths, 0, page_size, 4, 2, head_dim, torch.bfloat16, "cuda",
            num_splits=1, **masks,
        )  # fmt: skip
        out, step = whole.run(num_splits=1)[0], decoded.run()[0]
        for batch in (1, 5):
            cu = whole.arguments["cu_seqlens_q"][: batch + 1].contiguous()
            few = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "q": whole.arguments["q"][: cu[-1]]}
            few |= {
                "num_splits": 1,
                "max_seqlen_q": max(lengths[:batch]),
                "max_seqlen_k": max(lengths[:batch]),
            }
            of_few = {"q": decoded.arguments["q"][:batch]}
            of_few |= {"cache_seqlens": decoded.arguments["cache_seqlens"][:batch]}
            if page_size:
                few["block_table"] = whole.arguments["block_table"][:batch]
                of_few["block_table"] = decoded.arguments["block_table"][:batch]
            else:
                of_few |= {n: decoded.arguments[n][:batch] for n in ("k_cache", "v_cache")}
            assert torch.equal(whole.run(**few)[0], out[: cu[-1]])
            assert torch.equal(decoded.run(**of_few)[0], step[:batch])
            for asked in ({"num_splits": 3}, {"num_splits": 0, "fixed_split_size": 128}):
                of_all = decoded.run(**asked)[0]
                assert torch.equal(decoded.run(**of_few, **asked)[0], of_all[:batch])


def test_graph_replay_follows_lengths_and_pages():
    case = kvcache(0, 1, [300, 40, 7], 0, 16, 4, 2, 64, torch.bfloat16, "cuda", causal=True)
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = case.run()
    lengths, table = case.arguments["cache_seqlens"], case.arguments["block_table"]
    for change in ([300, 40, 7], [20, 40, 0], [0, 0, 0], [299, 1, 5]):
        lengths.copy_(torch.tensor(change))
        table[2, 0] = table[0, 0]
        graph.replay()
        eager, eager_lse = case.run()
        assert torch.equal(out, eager)
        assert torch.equal(lse, eager_lse)
    table.fill_(-1)
    graph.replay()
    assert not out.any()


def test_each_stream_and_thread_keeps_a_workspace(monkeypatch):
    """A workspace is made once, shared by no two streams or threads, and a graph has its own."""
    monkeypatch.setattr(workspace, "MAX_KEPT", 1 << 20)
    monkeypatch.setattr(workspace, "_rooms", rooms := {})
    cases = [
        kvcache(seed, 1, lengths, 0, 16, 4, 2, 64, torch.bfloat16, "cuda", causal=True)
        for seed, lengths in enumerate(([4000, 3000], [900, 3999, 50]))
    ]
    wanted = [case.run()[0] for case in cases]
    (kept,) = rooms.values()
    place = kept["partials"].data_ptr()
    case, graph, stream = cases[0], torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = case.run()[0]
    assert len(rooms) == 1
    stream.wait_stream(torch.cuda.current_stream())
    outs = []
    for _ in range(100):
        with torch.cuda.stream(stream):
            outs.append((1, cases[1].run()[0]))
        graph.replay()
        outs.append((0, case.run()[0]))
    thread = threading.Thread(target=lambda: outs.append((1, cases[1].run()[0])))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(captured, wanted[0])
    assert all(torch.equal(out, wanted[n]) for n, out in outs)
    places = {room["partials"].data_ptr() for room in rooms.values()}
    assert place in places and len(places) == len(rooms) == 3
    monkeypatch.setattr(workspace, "MAX_ROOMS", 3)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(case.run()[0], wanted[0])
    assert len(rooms) == 3 and place not in {x["partials"].data_ptr() for x in rooms.values()}


def test_no_call_synchronises():
    cases = [
        dense(0, 2, 64, 64, 4, 2, 64, torch.bfloat16, "cuda"),
        varlen(0, [30, 50], [30, 50], 0, 4, 2, 64, torch.bfloat16, "cuda"),
        varlen(0, [30, 50], [30, 50], 16, 4, 2, 64, torch.bfloat16, "cuda"),
        kvcache(0, 1, [30, 50], 1, 16, 4, 2, 64, torch.bfloat16, "cuda", causal=True),
    ]
    for case in cases:
        case.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case in cases:
            case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_unused_slots_never_reach_an_output(value):
    results = []
    for fill in (0.0, value):
        case = kvcache(0, 2, [300, 0, 33], 0, 16, 4, 2, 64, torch.bfloat16, "cuda", causal=True)
        for name in ("k_cache", "v_cache"):
            cache = case.arguments[name]
            cache.copy_(cache.nan_to_num(nan=fill, posinf=fill))
        results.append(case.run())
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("junk", [-1, -(2**31), 2**31 - 1, 10**6])
def test_junk_in_lengths_and_pages_stays_inside(junk):
    for page_size in (0, 16):
        case = kvcache(0, 2, [90, 33], 2, page_size, 4, 2, 64, torch.bfloat16, "cuda", causal=True)
        case.arguments["cache_seqlens"].fill_(junk)
        if page_size:
            case.arguments["block_table"].fill_(junk)
        out, _ = case.run()
        if page_size:
            assert not out.any()
        case = varlen(0, [90, 33], [90, 33], page_size, 4, 2, 64, torch.bfloat16, "cuda")
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            case.arguments[name].copy_(torch.tensor([junk, 5, junk]))
        case.run()
    torch.cuda.synchronize()


def test_huge_logits_and_huge_inputs():
    x = torch.full((1, 1, 1, 64), 133120.0, device="cuda", dtype=torch.bfloat16)
    assert mfa.flash_attn_func(x, x, x).isfinite().all()
    q = torch.full((1, 64, 1, 64), 448.0, device="cuda", dtype=torch.bfloat16)
    k = torch.full((1, 200, 1, 64), -1880.0, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(1, 200, 1, 64, device="cuda", dtype=torch.bfloat16)
    out = mfa.flash_attn_func(q, k, v)
    assert torch.allclose(out.float(), v.float().mean(1, keepdim=True).expand_as(out), atol=1e-2)


@pytest.mark.parametrize("softmax_scale", [0.0, -0.1, 1e-4, 3.0])
def test_scales(softmax_scale):
    check(
        dense(
            0,
            1,
            100,
            150,
            2,
            2,
            64,
            torch.float16,
            "cuda",
            softmax_scale=softmax_scale,
            causal=True,
        )
    )


def test_many_short_sequences_and_many_heads():
    lengths = [1] * 66000
    cu = torch.arange(66001, device="cuda", dtype=torch.int32)
    q = torch.randn(len(lengths), 2, 64, device="cuda", dtype=torch.bfloat16)
    out = mfa.flash_attn_varlen_func(q, q, q, cu, cu, 1, 1)
    assert torch.equal(out, q)
    q = torch.randn(1, 3, 71280, 128, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(mfa.flash_attn_func(q[:, :1], q[:, :1], q[:, :1]), q[:, :1])


def test_more_elements_than_32_bits_count():
    q = torch.randn(1, 300000, 64, 128, device="cuda", dtype=torch.bfloat16)
    rows = torch.tensor([0, 150000, 299999], device="cuda")
    out = mfa.flash_attn_func(q[:, rows], q, q)
    k, v = q[0, :, 63].float(), q[0, :, 63].float()
    ref = (q[0, rows, 63].float() @ k.T * 128**-0.5).softmax(-1) @ v
    assert torch.allclose(out[0, :, 63].float(), ref, atol=1e-2)
    part = mfa.flash_attn_func(q, q[:, :100], q[:, :100])
    same = mfa.flash_attn_func(q[:, -1:], q[:, :100], q[:, :100])
    assert torch.allclose(part[:, -1:].float(), same.float(), atol=1e-2)
