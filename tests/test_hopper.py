"""The Hopper kernel on a GPU: cases of test_gpu.py, which by itself are too small to reach it."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import dense, kvcache, varlen
from test_gpu import DTYPES, LENGTHS, MASKS, SHAPES, check

import mini_flash_attention as mfa
from mini_flash_attention import plan, recipes, reference, settings

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


class Chosen(list):
    """What plan.hopper chose, call by call."""

    def every(self, n=None):
        return bool(self) and all(self) and n in (None, len(self))


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """All calls that TMA can serve go to the Hopper kernel."""
    seen = Chosen()
    choose = plan.hopper.hopper

    def hopper(p, out, gpu):
        found = choose(p, out, gpu)
        if found or not plan.decode.decodes(p, gpu):
            seen.append(found)
        return found

    monkeypatch.setattr(plan.hopper, "hopper", hopper)
    monkeypatch.setattr(plan.hopper, "HOPPER_FLOPS", 0)
    monkeypatch.setattr(plan.decode, "SPLIT_KEYS", 2**31)  # no keys are split, nor queries decoded
    monkeypatch.setattr(recipes, "_recipes", {})
    return seen


@pytest.fixture(params=["64", "64, three consumers", "128", "256"])
def head_dim(request, monkeypatch):
    head_dim, *three = request.param.split(", ")
    monkeypatch.setattr(plan.hopper, "MANY_KEYS", 0 if three else 2**31)
    return int(head_dim)


@pytest.fixture
def programs(monkeypatch):
    """Have a call's work done by so many programs: with few, each does many tiles."""
    real = plan.gpu.gpu_of

    def allow(n):
        monkeypatch.setattr(
            plan.gpu, "gpu_of", lambda device: real(device)._replace(multiprocessors=n)
        )

    return allow


def random(*shape, seed=0, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=g)


@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_dense(meaning, head_dim, chosen, programs):
    for seed, (seqlen_q, seqlen_k) in enumerate(SHAPES):
        nheads, nheads_k = [(4, 4), (6, 2), (4, 1)][seed % 3]
        dtype = DTYPES[seed % 2]
        programs((3, 1, 132, 7)[seed % 4])
        check(
            dense(seed, 2, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, dtype, "cuda", **meaning)
        )
    assert chosen.every(len(SHAPES) - 2)  # single queries are decoded


@pytest.mark.parametrize("head_dim", [40, 72, 96, 160, 200])
def test_head_dims(head_dim, chosen):
    check(dense(head_dim, 2, 130, 200, 4, 2, head_dim, torch.bfloat16, "cuda", causal=True))
    assert chosen.every()


def test_pages_of_64():
    lengths_q, lengths_k = LENGTHS[1]
    for seed, meaning in enumerate(MASKS):
        check(varlen(seed, lengths_q, lengths_k, 64, 4, 2, 256, DTYPES[0], "cuda", **meaning))


@pytest.mark.parametrize("page_size", [0, 16, 128, 256])
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_varlen(meaning, head_dim, page_size, chosen, programs):
    for seed, (lengths_q, lengths_k) in enumerate(LENGTHS):
        nheads, nheads_k = [(4, 4), (6, 2), (4, 1)][seed % 3]
        dtype = DTYPES[seed % 2]
        programs((3, 1, 132, 7)[seed % 4])
        check(
            varlen(
                seed, lengths_q, lengths_k, page_size, nheads, nheads_k, head_dim, dtype, "cuda",
                padding=200, **meaning,
            )
        )  # fmt: skip
    few = sum(max(lengths_q) <= 16 for lengths_q, _ in LENGTHS) if page_size else 0  # decoded
    assert chosen.every(len(LENGTHS) - few) is (page_size != 16 or head_dim != 256)


@pytest.mark.parametrize("page_size", [0, 32, 128])
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_kvcache(meaning, head_dim, page_size, chosen, programs):
    for seed, (seqlen_q, appended) in enumerate([(130, 0), (70, 70), (300, 5)]):
        nheads, nheads_k = [(4, 4), (6, 2), (8, 1)][seed % 3]
        dtype = DTYPES[seed % 2]
        programs((3, 1, 132, 7)[seed % 4])
        check(
            kvcache(
                seed, seqlen_q, [700, 0, 33, 256], appended, page_size, nheads, nheads_k, head_dim,
                dtype, "cuda", **meaning,
            )
        )  # fmt: skip
    assert chosen.every(3) is (page_size != 32 or head_dim != 256)


WIDE = {"window_size": (1500, 0), "causal": True}


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("meaning", [*MASKS, WIDE], ids=str)
def test_few_queries(meaning, parts, head_dim, chosen, programs, monkeypatch):
    """Heads packed into rows, and keys split, where tiles would be few or empty."""
    monkeypatch.setattr(plan.decode, "SPLIT_KEYS", 0 if parts else 2**31)
    monkeypatch.setattr(plan.decode, "_splits_pay", lambda *_: False)  # for the decode kernel
    programs(132 if parts else 7)
    shapes = [(17, 0, 8, 2, 0), (9, 5, 64, 1, 16), (200, 0, 6, 2, 128)]
    for seed, (seqlen_q, appended, nheads, nheads_k, page_size) in enumerate(shapes):
        lengths, dtype = [1700, 0, 33, 256], DTYPES[seed % 2]
        page_size = 64 if page_size == 16 and head_dim == 256 else page_size
        case = kvcache(
            seed, seqlen_q, lengths, appended, page_size, nheads, nheads_k, head_dim, dtype, "cuda",
            **meaning,
        )  # fmt: skip
        check(case)
    left = meaning.get("window_size", (-1, -1))[0]
    crowded = head_dim == 256 and left >= 0  # nine queries are decoded then
    assert [x.group for x in chosen] == ([1, 1] if crowded else [4, 64, 1])
    split = parts and not crowded and (left < 0 or meaning is WIDE)
    assert all(bool(x.partials) is split for x in chosen)


def test_parts_repeat_and_do_without_alignment(head_dim, chosen, monkeypatch):
    """A thousand times the same bits; and what TMA can't take is whole without the fold."""
    monkeypatch.setattr(plan.decode, "SPLIT_KEYS", 0)
    q, k, v = random(2, 24, 8, head_dim), *random(2, 2, 5000, 2, head_dim, seed=1)
    expected = mfa.flash_attn_func(q, k, v, causal=True)
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        differ += (mfa.flash_attn_func(q, k, v, causal=True) != expected).any()
    assert differ.item() == 0 and chosen.every() and chosen[0].partials
    moved = torch.zeros(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view(q.shape).copy_(q)
    close = mfa.flash_attn_func(moved, k, v, causal=True)
    assert len(chosen) == 1  # the first call's recipe
    assert (close - expected).abs().max() < 0.01


def test_strides_and_addresses_give_the_same_bits(chosen):
    """TMA takes any strides of 16 bytes. What it can't take, the portable kernel does."""
    qkv = random(2, 300, 3, 4, 64)
    q, k, v = qkv.unbind(2)
    plain = mfa.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(mfa.flash_attn_func(q, k, v, causal=True), plain)
    assert torch.equal(mfa.flash_attn_func(*heads_first, causal=True), plain)
    assert chosen.every()
    odd = [torch.zeros(2, 300, 4, 65, device="cuda", dtype=q.dtype)[..., 1:] for _ in range(3)]
    for x, y in zip(odd, (q, k, v), strict=True):
        x.copy_(y)
    close = mfa.flash_attn_func(*odd, causal=True)
    assert chosen[-1] is None and (close - plain).abs().max() < 0.02
    flat = [torch.zeros(q.numel() + 1, device="cuda", dtype=q.dtype) for _ in range(3)]
    moved = [x[1:].view(q.shape).copy_(y) for x, y in zip(flat, (q, k, v), strict=True)]
    calls = len(chosen)
    close = mfa.flash_attn_func(*moved, causal=True)
    assert len(chosen) == calls  # the first call's recipe
    assert not torch.equal(close, plain) and (close - plain).abs().max() < 0.02
    kept = mfa.flash_attn_func(*[x.contiguous() for x in (q, k, v)], causal=True)
    assert torch.equal(kept, plain)


def test_thousand_repeats_beside_another_stream(head_dim, chosen):
    q, k, v = (random(3, 700, 5, head_dim, seed=seed) for seed in range(3))
    expected = mfa.flash_attn_func(q, k, v, causal=True)
    side, noise = torch.cuda.Stream(), random(2048, 2048, seed=9)
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for n in range(1000):
        if n % 10 == 0:
            with torch.cuda.stream(side):
                noise @ noise
                mfa.flash_attn_func(v, k, q, causal=True)
        differ += (mfa.flash_attn_func(q, k, v, causal=True) != expected).any()
    torch.cuda.synchronize()
    assert differ.item() == 0 and chosen.every()


def test_graphs_draw_from_counters_of_their_own(chosen):
    """Two graphs replayed on two streams at once, and eager calls between them."""
    made = []
    for seed in range(2):
        q, k, v = (random(2, 1500, 6, 128, seed=3 * seed + n) for n in range(3))
        expected = mfa.flash_attn_func(q, k, v, causal=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mfa.flash_attn_func(q, k, v, causal=True)
        made.append((graph, out, expected, torch.cuda.Stream(), (q, k, v)))
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, _, _, stream, _ in made:
            with torch.cuda.stream(stream):
                graph.replay()
        again = mfa.flash_attn_func(*made[0][-1], causal=True)
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for _, out, expected, _, _ in made)
    assert torch.equal(again, made[0][2]) and chosen.every()


def test_both_kernels_agree(head_dim, chosen, monkeypatch):
    q, k, v = (random(1, 4096, 8, head_dim, seed=seed) for seed in range(3))
    for meaning in MASKS:
        ours = mfa.flash_attn_func(q, k, v, **meaning)
        monkeypatch.setattr(settings, "PORTABLE", True)
        other = mfa.flash_attn_func(q, k, v, **meaning)
        monkeypatch.setattr(settings, "PORTABLE", False)
        assert chosen[-2] is not None and chosen[-1] is None
        assert (ours - other).abs().max() <= 2**-7 * other.abs().max()


RAISED = ("a ramp", "a key", "some keys", "the first half")


def raise_scores(case, how):
    """Scores that grow, from the last key to the first, by far more than weights have room for."""
    for _, _, q, k, _ in case.rows:
        if how == "a ramp":
            q[..., 0] = 10.0
            k[..., 0] = torch.linspace(300, 0, len(k), device="cuda")[:, None]
        elif how == "a key":
            k[len(k) // 5 : len(k) // 5 + 1] *= 60
        elif how == "some keys":
            k[3::37] *= 40
        elif how == "the first half":
            k[: len(k) // 2] *= 20


@pytest.mark.parametrize("how", RAISED)
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_scores_that_grow(how, meaning, head_dim, chosen, programs, monkeypatch):
    """Tiles of work that a consumer has to do twice, among others and at the end."""
    sizes = (4, 2, head_dim, torch.bfloat16, "cuda")
    for n, seqlen_q, seqlen_k in ((1, 700, 700), (3, 300, 1500), (132, 1300, 1000)):
        programs(n)
        case = dense(n, 2, seqlen_q, seqlen_k, *sizes, **meaning)
        raise_scores(case, how)
        check(case)
        case = varlen(n, *LENGTHS[3], 0, *sizes, **meaning)
        raise_scores(case, how)
        check(case)
    monkeypatch.setattr(plan.decode, "SPLIT_KEYS", 0)  # in parts
    case = dense(5, 2, 40, 3000, 8, 2, head_dim, torch.bfloat16, "cuda", **meaning)
    raise_scores(case, how)
    check(case)
    assert all(chosen[:6])


def test_large_sums_in_a_tile_that_is_done_again(head_dim, chosen):
    """Weights of up to 2^8 of many keys, and then a maximum that grows."""
    score = torch.full((20480,), 5.5)
    score[-128:], score[5] = 0.0, 30.0
    q, k = torch.zeros(1, 192, 1, head_dim), torch.zeros(1, 20480, 1, head_dim)
    q[..., 0], k[..., 0] = 1.0, score[:, None]
    q, k, v = (*(x.bfloat16().cuda() for x in (q, k)), random(1, 20480, 1, head_dim))
    out, lse, _ = mfa.flash_attn_func(q, k, v, softmax_scale=1.0, return_attn_probs=True)
    expected, expected_lse = reference.attention(q[0], k[0], v[0], softmax_scale=1.0)
    assert (out[0] - expected).abs().max() <= 2**-7 * expected.abs().max()
    assert torch.allclose(lse[0].double(), expected_lse, rtol=1e-5) and chosen.every()


@pytest.mark.parametrize("growth", [1, 4, 8, 12])
def test_values_of_any_size_beside_scores_that_grow(growth, head_dim, chosen):
    """Where weights are large, their products with values may leave fp32's range before they do."""
    q, k, v = (random(1, 1500, 2, head_dim, seed=seed) for seed in range(3))
    k[:, 3::37] *= growth
    large = 2.0**100
    for meaning in MASKS:
        out, scaled = (mfa.flash_attn_func(q, k, x, **meaning).float() for x in (v, v * large))
        assert ((scaled / large - out).abs() <= 2**-7 * out.abs().max()).all()
    assert chosen.every()


def test_rows_of_the_next_sequence_have_no_say(head_dim, chosen):
    """They lie in the last rows of a tile, and their scores may be anything."""
    lengths_q, lengths_k = [74, 300, 10], [900, 500, 1200]
    starts, starts_k = (
        torch.tensor([0, *lengths]).cumsum(0).int().cuda() for lengths in (lengths_q, lengths_k)
    )
    q = random(sum(lengths_q) + 200, 4, head_dim)
    k, v = (random(sum(lengths_k), 2, head_dim, seed=seed) for seed in (1, 2))
    k[7::37] *= 4
    loud = q.clone()
    loud[74:374] *= 100
    loud[384:] = 1e4
    for meaning in MASKS:
        outs = [
            mfa.flash_attn_varlen_func(
                x, k, v, starts, starts_k, 300, 1200, num_splits=1, **meaning
            )
            for x in (q, loud)
        ]
        for mine in (slice(0, 74), slice(374, None)):
            assert torch.equal(outs[0][mine], outs[1][mine])
    assert chosen.every()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_sequence_that_is_no_number_stays_alone(value, head_dim, chosen, programs):
    """It is done twice, too, and no more often."""
    q, k, v = (random(3, 900, 4, head_dim, seed=seed) for seed in range(3))
    bad = k.clone()
    bad[1, 100:140] = value
    for n in (1, 3, 132):
        programs(n)
        for meaning in MASKS:
            clean, out = (mfa.flash_attn_func(q, x, v, **meaning) for x in (k, bad))
            assert torch.equal(out[::2], clean[::2])
    assert chosen.every()


def test_consumers_do_not_change_the_bits(chosen, monkeypatch):
    """How many there are follows the longest sequence; another beside it must not notice."""
    lengths_q, lengths_k = LENGTHS[3]
    for meaning, page_size, how in itertools.product(MASKS, (0, 128), (None, *RAISED)):
        sizes = (page_size, 4, 2, 64, torch.bfloat16, "cuda")
        case = varlen(7, lengths_q, lengths_k, *sizes, **meaning)
        if how and page_size:  # those of a case in pages are copies
            continue
        raise_scores(case, how)
        outs = []
        for many in (0, 2**31):
            monkeypatch.setattr(plan.hopper, "MANY_KEYS", many)
            recipes._recipes.clear()
            outs.append(mfa.flash_attn_varlen_func(**case.arguments))
        assert torch.equal(*outs)
    assert {x.tiles.consumers for x in chosen} == {2, 3}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e3, 1e6, 1e8, 1e30])
def test_scores_of_any_size(scale, chosen, monkeypatch):
    """Weights from ties to a single one; both kernels ask the same rule."""
    q, k, v = (random(1, 700, 2, 128, seed=seed) for seed in range(3))
    ours, lse, _ = mfa.flash_attn_func(q, k, v, 0.0, scale, True, return_attn_probs=True)
    monkeypatch.setattr(settings, "PORTABLE", True)
    other, lse_other, _ = mfa.flash_attn_func(q, k, v, 0.0, scale, True, return_attn_probs=True)
    assert chosen[0] is not None and chosen[1] is None
    assert (ours - other).abs().max() <= 2**-7 * other.abs().max()
    assert torch.allclose(lse, lse_other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_wrong_pages_and_lengths_stay_inside(page_size, chosen):
    """Page numbers and lengths that no cache holds: any answer, no fault."""
    q, pages = random(3, 200, 4, 128), random(2, 9, page_size, 2, 128, seed=1)
    table = torch.tensor([[-1, 2**31 - 1, 9], [-(2**31), 3, 8], [0, 1, 2]], dtype=torch.int32)
    table = table.repeat(1, 256 // page_size)
    for lengths in ([700, -5, 2**31 - 1], [768, 1, 0]):
        used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        out = mfa.flash_attn_with_kvcache(q, *pages, cache_seqlens=used, block_table=table.cuda())
        assert out.isfinite().all() and not out[[n <= 0 for n in lengths]].any()
    assert chosen.every()


@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 133120.0), (torch.float16, 2e4)])
def test_huge_logits(dtype, value, chosen):
    """Scores that fp32 can't tell apart: all keys weigh the same, and nothing overflows."""
    for head_dim in (64, 128, 256):
        q = torch.full((1, 300, 2, head_dim), value, device="cuda", dtype=dtype)
        v = random(1, 300, 2, head_dim, dtype=dtype)
        out, lse, _ = mfa.flash_attn_func(q, q, v, return_attn_probs=True)
        mean = v.float().mean(1, keepdim=True)
        assert (out.float() - mean).abs().max() < 0.01 and lse.isfinite().all()
    assert chosen.every(3)


@pytest.mark.parametrize("page_size", [0, 16, 64, 256])
def test_what_no_query_sees_may_hold_anything(page_size, head_dim, chosen):
    """Keys before every window and after the sequence's end, in the tiles that are read."""
    seqlen_q, seqlen_k, left = 200, 1000, 57
    cache = random(2, 1, 1280, 2, head_dim)
    q = random(1, seqlen_q, 4, head_dim, seed=1)
    options = {"causal": True, "window_size": (left, 0), "cache_seqlens": seqlen_k}
    if page_size:
        pages = torch.arange(1280 // page_size, device="cuda", dtype=torch.int32)
        options["block_table"] = pages[None]

    def call():
        k, v = cache.view(2, -1, page_size, 2, head_dim) if page_size else cache
        return mfa.flash_attn_with_kvcache(q, k, v, **options)

    # The first tile of rows sees keys from here on, and no other tile sees one before.
    first = seqlen_k - seqlen_q - left
    expected = call()
    cache[:, :, seqlen_k:] = float("nan")
    cache[:, :, :first] = float("nan")
    assert torch.equal(call(), expected)
    assert chosen.every() is (page_size != 16 or head_dim != 256)


def test_out_of_its_own_strides(chosen):
    q, k, v = (random(2, 333, 4, 128, seed=seed) for seed in range(3))
    expected = mfa.flash_attn_func(q, k, v, causal=True)
    around = torch.full((2, 335, 6, 144), float("nan"), device="cuda", dtype=q.dtype)
    out = around[:, 1:-1, 1:-1, 8:136]
    assert mfa.flash_attn_func(q, k, v, causal=True, out=out) is out
    assert torch.equal(out, expected) and chosen.every()
    out.fill_(float("nan"))
    assert around.isnan().all()


def test_threads_on_streams_of_their_own(chosen):
    made = [[random(2, 1100, 6, 128, seed=3 * n + i) for i in range(3)] for n in range(4)]
    expected = [mfa.flash_attn_func(*qkv, causal=True) for qkv in made]
    torch.cuda.synchronize()
    recipes._recipes.clear()

    def work(n):
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [mfa.flash_attn_func(*made[n], causal=True) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
            return all(torch.equal(out, expected[n]) for out in outs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert chosen.every()


BUSY = """
import torch
import mini_flash_attention as mfa

q = torch.randn(1, 1 << 17, 16, 128, device="cuda", dtype=torch.bfloat16)
k, v = torch.randn(2, 1, 256, 16, 128, device="cuda", dtype=torch.bfloat16)
out, lost = torch.empty_like(q), torch.zeros((), device="cuda", dtype=torch.int64)
for _ in range(1000):
    mfa.flash_attn_func(q, k, v, out=out.fill_(float("nan")))
    lost += out.isnan().any()
print(lost.item())
"""


def test_beside_other_processes():
    """The driver stops kernels in the middle to let another process's run: no tile gets lost."""
    command = [sys.executable, "-c", BUSY]
    made = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0] for process in made] == ["0\n"] * 4
