"""The three functions against the definition, on whatever runs here.

On the CPU twice: PyTorch behind the functions, and, with TRITON_INTERPRET=1, the GPU kernels in
Triton's interpreter. `tests/test_gpu.py` runs the same cases on a GPU.
"""

import pytest
import torch
from cases import dense, kvcache, varlen

import mini_flash_attention
from mini_flash_attention import plan, recipes, settings

MASKS = [
    {},
    {"causal": True},
    {"window_size": (5, 0), "causal": True},
    {"window_size": (7, 3)},
    {"window_size": (-1, 2)},
    {"window_size": (4, -1)},
]
HEADS = [(2, 2), (4, 2), (3, 1)]
DTYPES = [torch.float16, torch.float32]


@pytest.mark.parametrize("meaning", MASKS, ids=str)
@pytest.mark.parametrize(("nheads", "nheads_k"), HEADS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (65, 65), (33, 97), (97, 33), (1, 80)])
def test_dense(meaning, nheads, nheads_k, seqlen_q, seqlen_k):
    dtype = DTYPES[(seqlen_q + nheads) % 2]
    case = dense(1, 2, seqlen_q, seqlen_k, nheads, nheads_k, 16, dtype, "cpu", **meaning)
    case.check(*case.run())


def test_causal_masks_of_equal_lengths_are_not_materialised(monkeypatch):
    """On the CPU they are PyTorch's own, which takes half the time."""
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *x, **more: asked.append(more) or attend(*x, **more),
    )
    sizes = (4, 2, 16, torch.float32, "cpu")
    for seqlen_k, meaning in (
        (33, {"causal": True}),
        (33, {"window_size": (-1, 0)}),
        (40, {"causal": True}),
        (33, {"causal": True, "window_size": (5, 0)}),
    ):
        case = dense(1, 2, 33, seqlen_k, *sizes, **meaning)
        case.check(*case.run())
    case = varlen(1, [9, 7], [9, 12], 0, *sizes, causal=True)
    case.check(*case.run())
    own = [more["is_causal"] for more in asked]
    assert own == [] if settings.INTERPRETED else [True, True, False, False, True, False]
    assert all(more["attn_mask"] is None for more in asked if more["is_causal"])


@pytest.mark.parametrize("meaning", MASKS, ids=str)
@pytest.mark.parametrize("page_size", [0, 1, 5, 16, 128])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([70, 0, 3, 1], [70, 9, 40, 0]), ([20, 64], [90, 30])]
)
def test_varlen(meaning, page_size, lengths_q, lengths_k):
    dtype = DTYPES[page_size % 2]
    case = varlen(2, lengths_q, lengths_k, page_size, 4, 2, 32, dtype, "cpu", **meaning)
    case.check(*case.run())


@pytest.mark.parametrize("meaning", MASKS, ids=str)
@pytest.mark.parametrize("page_size", [0, 1, 7, 16, 64])
@pytest.mark.parametrize(("seqlen_q", "appended"), [(1, 1), (3, 0), (40, 3)])
def test_kvcache(meaning, page_size, seqlen_q, appended):
    dtype = DTYPES[(page_size + appended) % 2]
    case = kvcache(3, seqlen_q, [50, 0, 17], appended, page_size, 4, 2, 16, dtype, "cpu", **meaning)
    case.check(*case.run())


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_splits(num_splits, seqlen_q):
    case = kvcache(
        5, seqlen_q, [120, 0, 17], 0, 16, 4, 2, 16, torch.float16, "cpu",
        num_splits=num_splits, causal=True,
    )  # fmt: skip
    case.check(*case.run())


@pytest.mark.parametrize("fixed_split_size", [1, 130])
@pytest.mark.parametrize("window_size", [(-1, -1), (70, 0)])
def test_parts_of_a_fixed_size(fixed_split_size, window_size):
    case = kvcache(
        5, 2, [120, 0, 17], 0, 16, 4, 2, 16, torch.float16, "cpu", causal=True,
        window_size=window_size,
    )  # fmt: skip
    case.check(*case.run(fixed_split_size=fixed_split_size))


@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
@pytest.mark.parametrize(("seqlen_q", "window_size"), [(1, (-1, -1)), (1, (40, 0)), (12, (-1, -1))])
def test_equal_shares(multiprocessors, seqlen_q, window_size, monkeypatch):
    """Sequences that end inside shares, span several or have no key; more shares than tiles."""
    monkeypatch.setattr(plan.gpu, "gpu_of", lambda device: plan.gpu.Gpu("few", 80, multiprocessors))
    monkeypatch.setattr(plan.decode, "STREAM_K_WORK", 0)
    monkeypatch.setattr(plan.decode, "WAVES_WORK", 0)
    monkeypatch.setattr(recipes, "_recipes", {})
    case = kvcache(
        7, seqlen_q, [128, 0, 1, 70, 0, 100], 0, 16, 8, 1, 64, torch.float16, "cpu", causal=True,
        window_size=window_size,
    )  # fmt: skip
    decode, planned = plan.decode.decode, []
    monkeypatch.setattr(plan.decode, "decode", lambda *a: planned.append(decode(*a)) or planned[-1])
    case.check(*case.run())
    assert not settings.INTERPRETED or planned[0].stream_k


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("paged", [False, True])
def test_nothing_before_a_window_reaches_an_output(seqlen_q, paged):
    """An engine may have given those pages to another sequence."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, seqlen_q, 2, 16, dtype=torch.float16, generator=g)
    caches = torch.randn(2, 1, 100, 1, 16, dtype=torch.float16, generator=g)
    poisoned = caches.clone()
    poisoned[:, :, :80] = float("nan")
    table = torch.arange(10, dtype=torch.int32)[None] if paged else None
    outs = [
        mini_flash_attention.flash_attn_with_kvcache(
            q,
            *(c.view(10, 10, 1, 16) if paged else c for c in pair),
            cache_seqlens=100,
            block_table=table,
            window_size=(4, 0),
            causal=True,
        )
        for pair in (caches, poisoned)
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("num_splits", [0, 2])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_a_query_without_keys_gives_0_whatever_the_values_hold(softcap, num_splits):
    """The first query stands before the first key, and the tile that it is in meets NaN."""
    q, k = (torch.ones(1, n, 1, 16, dtype=torch.float16) for n in (2, 1))
    out, lse = mini_flash_attention.flash_attn_with_kvcache(
        q, k, torch.full_like(k, float("nan")), causal=True, softcap=softcap,
        num_splits=num_splits, return_softmax_lse=True,
    )  # fmt: skip
    assert not out[:, 0].any() and out[:, 1].isnan().all()
    assert lse[0, 0, 0] == float("-inf")


@pytest.mark.parametrize("num_splits", [1, 2, 4])
def test_splits_of_huge_equal_logits(num_splits):
    """Parts weigh by what they hold, even where an LSE in fp32 has no digits left to say it."""
    q = torch.full((1, 1, 1, 32), 448.0, dtype=torch.float16)
    k = torch.full((1, 100, 1, 32), -1880.0, dtype=torch.float16)
    v = torch.ones(1, 100, 1, 32, dtype=torch.float16)
    v[:, 64:] = -1
    out = mini_flash_attention.flash_attn_with_kvcache(
        q, k, v, num_splits=num_splits, softmax_scale=0.5
    )
    assert (out - 0.28).abs().max() < 1e-3


@pytest.mark.parametrize("make", [list, torch.tensor], ids=["list", "tensor"])
def test_windows_that_are_no_tuples(make):
    """flash-attn takes a tensor of two elements; its values count, not its shape."""
    sizes = (2, 1, 16, torch.float16, "cpu")
    cases = [
        dense(1, 1, 20, 30, *sizes),
        varlen(2, [9, 20], [15, 30], 0, *sizes),
        varlen(2, [9, 20], [15, 30], 16, *sizes),
        kvcache(3, 3, [20, 7], 3, 16, *sizes),
    ]
    for case in cases:
        for window in ((2, 1), (0, 0), (-1, 3), (2, 1)):
            case.meaning["window_size"] = window
            case.check(*case.run(window_size=make(window)))


def test_an_overlapping_query():
    q = torch.randn(64, dtype=torch.float16).as_strided((1, 4, 1, 8), (64, 1, 8, 1))
    k = torch.randn(1, 9, 1, 8, dtype=torch.float16)
    out = mini_flash_attention.flash_attn_func(q, k, k)
    same = mini_flash_attention.flash_attn_func(q.contiguous(), k, k)
    assert torch.allclose(out, same, atol=2e-3)


@pytest.mark.parametrize("head_dim", [1, 3, 8, 17, 40, 64, 96, 128, 256])
def test_head_dims(head_dim):
    case = dense(4, 1, 20, 30, 2, 1, head_dim, torch.float16, "cpu", causal=True)
    case.check(*case.run())
