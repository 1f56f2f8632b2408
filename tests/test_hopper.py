"""The Hopper kernel on a GPU: cases of test_gpu.py, which by itself are too small to reach it."""

import pytest
import torch
from cases import dense, kvcache, varlen
from test_gpu import DTYPES, LENGTHS, MASKS, SHAPES, check, poisoned  # noqa: F401  (a fixture)

import mini_flash_attention as mfa
from mini_flash_attention import dispatch, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """All calls that TMA can serve go to the Hopper kernel; how many did."""
    seen = []
    choose = plan.hopper

    def hopper(*arguments):
        seen.append(choose(*arguments))
        return seen[-1]

    monkeypatch.setattr(plan, "hopper", hopper)
    monkeypatch.setattr(plan, "HOPPER_FLOPS", 0)
    monkeypatch.setattr(dispatch, "_recipes", {})
    return seen


def random(*shape, seed=0, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=g)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_dense(meaning, head_dim, chosen):
    for seed, (seqlen_q, seqlen_k) in enumerate(SHAPES):
        nheads, nheads_k = [(4, 4), (6, 2), (4, 1)][seed % 3]
        dtype = DTYPES[seed % 2]
        check(
            dense(seed, 2, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, dtype, "cuda", **meaning)
        )
    assert len(chosen) >= len(SHAPES) and all(chosen)


@pytest.mark.parametrize("head_dim", [40, 72, 96, 160, 200])
def test_head_dims(head_dim, chosen):
    check(dense(head_dim, 2, 130, 200, 4, 2, head_dim, torch.bfloat16, "cuda", causal=True))
    assert all(chosen)


@pytest.mark.parametrize("page_size", [0, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_varlen(meaning, head_dim, page_size, chosen):
    for seed, (lengths_q, lengths_k) in enumerate(LENGTHS):
        nheads, nheads_k = [(4, 4), (6, 2), (4, 1)][seed % 3]
        dtype = DTYPES[seed % 2]
        check(
            varlen(
                seed, lengths_q, lengths_k, page_size, nheads, nheads_k, head_dim, dtype, "cuda",
                padding=200, **meaning,
            )
        )  # fmt: skip
    assert all(chosen)


@pytest.mark.parametrize("page_size", [0, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("meaning", MASKS, ids=str)
def test_kvcache(meaning, head_dim, page_size, chosen):
    for seed, (seqlen_q, appended) in enumerate([(130, 0), (70, 70), (300, 5)]):
        nheads, nheads_k = [(4, 4), (6, 2), (8, 1)][seed % 3]
        dtype = DTYPES[seed % 2]
        check(
            kvcache(
                seed, seqlen_q, [700, 0, 33, 256], appended, page_size, nheads, nheads_k, head_dim,
                dtype, "cuda", **meaning,
            )
        )  # fmt: skip
    assert all(chosen)


def test_strides_and_addresses_give_the_same_bits(chosen):
    """TMA takes any strides of 16 bytes. What it can't take, the portable kernel does."""
    qkv = random(2, 300, 3, 4, 64)
    q, k, v = qkv.unbind(2)
    plain = mfa.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(mfa.flash_attn_func(q, k, v, causal=True), plain)
    assert torch.equal(mfa.flash_attn_func(*heads_first, causal=True), plain)
    assert all(chosen)
    odd = [torch.zeros(2, 300, 4, 65, device="cuda", dtype=q.dtype)[..., 1:] for _ in range(3)]
    for x, y in zip(odd, (q, k, v), strict=True):
        x.copy_(y)
    close = mfa.flash_attn_func(*odd, causal=True)
    assert chosen[-1] is None and (close - plain).abs().max() < 0.02
    flat = [torch.zeros(q.numel() + 1, device="cuda", dtype=q.dtype) for _ in range(3)]
    moved = [x[1:].view(q.shape).copy_(y) for x, y in zip(flat, (q, k, v), strict=True)]
    close = mfa.flash_attn_func(*moved, causal=True)
    assert chosen[-1] is not None and (close - plain).abs().max() < 0.02
    kept = mfa.flash_attn_func(*[x.contiguous() for x in (q, k, v)], causal=True)
    assert torch.equal(kept, plain)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
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
    assert differ.item() == 0 and all(chosen)


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
    assert torch.equal(again, made[0][2]) and all(chosen)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_both_kernels_agree(head_dim, chosen, monkeypatch):
    q, k, v = (random(1, 4096, 8, head_dim, seed=seed) for seed in range(3))
    for meaning in MASKS:
        ours = mfa.flash_attn_func(q, k, v, **meaning)
        monkeypatch.setattr(plan, "PORTABLE", True)
        monkeypatch.setattr(dispatch, "_recipes", {})
        other = mfa.flash_attn_func(q, k, v, **meaning)
        monkeypatch.setattr(plan, "PORTABLE", False)
        assert chosen[-2] is not None and chosen[-1] is None
        assert (ours - other).abs().max() <= 2**-7 * other.abs().max()


def test_wrong_pages_and_lengths_stay_inside(chosen):
    """Page numbers and lengths that no cache holds: any answer, no fault."""
    q, pages = random(3, 200, 4, 128), random(2, 9, 256, 2, 128, seed=1)
    table = torch.tensor([[-1, 2**31 - 1, 9], [-(2**31), 3, 8], [0, 1, 2]], dtype=torch.int32)
    for lengths in ([700, -5, 2**31 - 1], [768, 1, 0]):
        used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        mfa.flash_attn_with_kvcache(q, *pages, cache_seqlens=used, block_table=table.cuda())
    torch.cuda.synchronize()
    assert all(chosen)
