"""Every argument of the three functions beside every way that keys can lie, against the definition.

On the CPU, in Triton's interpreter, and on a GPU with the portable kernels and with Hopper's.
"""

import pytest
import torch
from cases import dense, kvcache, varlen

import mini_flash_attention as mfa
from mini_flash_attention import plan, recipes, reference, settings

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from examples.score_mods import alibi, draft_tree, same_document, soft_distance  # noqa: E402

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
NHEADS, NHEADS_K, BATCH = 4, 2, 3
PLACES = ["cpu", *["portable"] * GPU, *["hopper"] * HOPPER]


@triton.jit
def distance_bias(score, batch, head, q_idx, kv_idx):
    """ALiBi with a slope of its own for each head, and a soft preference for a sequence."""
    far = tl.abs(q_idx - kv_idx).to(tl.float32)
    return score - 0.05 * far * (head + 1).to(tl.float32) + 0.1 * batch


def slopes(device):
    return (0.5 ** torch.arange(1, NHEADS + 1)).to(device)


def features(name, device, dtype):
    g = torch.Generator().manual_seed(7)
    sink = torch.randn(NHEADS, generator=g).to(dtype).to(device)
    per_batch = torch.rand(BATCH, NHEADS, generator=g).to(device)
    documents = torch.randint(0, 3, (2048,), generator=g).int().to(device)
    return {
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi_slopes": slopes(device)},
        "alibi of each sequence": {"alibi_slopes": per_batch},
        "sinks": {"s_aux": sink},
        "score_mod": {"score_mod": distance_bias},
        "soft distance": {"score_mod": soft_distance, "softmax_scale": -0.3},
        "documents": {"score_mod": same_document, "score_mod_args": (documents,)},
        "all": {
            "softcap": 5.0, "alibi_slopes": per_batch, "s_aux": sink.float(),
            "score_mod": distance_bias,
        },
    }[name]  # fmt: skip


NAMES = [
    "softcap", "alibi", "alibi of each sequence", "sinks", "score_mod", "soft distance",
    "documents", "all",
]  # fmt: skip
MASKS = [{}, {"causal": True}, {"window_size": (7, 3)}]


@pytest.fixture(params=PLACES)
def place(request, monkeypatch):
    """(device, dtype, head_dim, how many times the CPU's lengths)."""
    monkeypatch.setattr(recipes, "_recipes", {})
    monkeypatch.setattr(settings, "PORTABLE", request.param == "portable")
    monkeypatch.setattr(plan.hopper, "HOPPER_FLOPS", 0)
    if request.param == "cpu":
        return "cpu", torch.float16, 32, 1
    return "cuda", torch.bfloat16, 64, 9


def one_of_three(device, *numbers):
    """A GPU, which compiles each combination, and the interpreter take a third of them."""
    if (device == "cuda" or settings.INTERPRETED) and sum(numbers) % 3:
        pytest.skip("one of three")


def check(case, **more):
    case.check(*case.run(**more))
    if case.arguments["q"].is_cuda and "k" not in case.arguments:
        first, again = case.run(**more), case.run(**more)  # as the recipe kept it
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


# In the interpreter `make quick` runs these alone: each kernel, each layout of keys, each argument.
QUICK = {
    "dense": (dense, {"seqlen_q": 17, "seqlen_k": 33}, "softcap"),
    "more queries than keys": (dense, {"seqlen_q": 33, "seqlen_k": 17}, "score_mod"),
    "packed": (varlen, {"page_size": 0}, "sinks"),
    "packed, paged": (varlen, {"page_size": 16}, "alibi"),
    "packed, in parts": (varlen, {"page_size": 0, "num_splits": 3}, "documents"),
    "packed, queries in use": (varlen, {"page_size": 16, "used_q": True}, "soft distance"),
    "values of another head_dim": (varlen, {"page_size": 16, "head_dim_v": 48}, "sinks"),
    "decoding": (kvcache, {"seqlen_q": 1, "appended": 0, "page_size": 0}, "alibi"),
    "decoding, paged, in parts": (
        kvcache, {"seqlen_q": 2, "appended": 2, "page_size": 16, "num_splits": 3}, "all"
    ),
    "rotary": (kvcache, {"seqlen_q": 2, "appended": 3, "page_size": 16, "rotary": "pairs"}, ""),
    "rows, left padding": (
        kvcache,
        {"seqlen_q": 2, "appended": 2, "page_size": 0, "rows": True, "leftpad": True}, "softcap",
    ),
    "many queries": (kvcache, {"seqlen_q": 20, "appended": 2, "page_size": 16}, "sinks"),
    "packed queries of a cache": (
        kvcache, {"seqlen_q": [3, 0, 18], "appended": 1, "page_size": 16}, ""
    ),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", QUICK)
def test_one_of_each_kind(name, place):
    make, words, feature = QUICK[name]
    device, dtype, head_dim, n = place
    if make is dense:
        words = {"batch": BATCH, **{side: length * n for side, length in words.items()}}
    elif make is varlen:
        words = {"lengths_q": [5 * n, 0, 19 * n], "lengths_k": [12 * n, 7 * n, 40 * n], **words}
    else:
        words = {"lengths": [5 * n, 30 * n, 0], **words}
    words |= features(feature, device, dtype) if feature else {}
    splits = {"num_splits": words.pop("num_splits")} if "num_splits" in words else {}
    sizes = {"nheads": NHEADS, "nheads_k": NHEADS_K, "head_dim": head_dim, "dtype": dtype}
    check(make(seed=1, **sizes, device=device, causal=True, **words), **splits)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dense(name, mask, place):
    device, dtype, head_dim, n = place
    meaning = features(name, device, dtype) | mask
    dims = [head_dim] if device == "cpu" else [64, 128, 256]
    for d in dims:
        check(dense(1, BATCH, 17 * n, 33 * n, NHEADS, NHEADS_K, d, dtype, device, **meaning))
        check(dense(1, BATCH, 33 * n, 17 * n, NHEADS, NHEADS_K, d, dtype, device, **meaning))


@pytest.mark.parametrize("softcap", [0.5, 20.0, 51.0, 53.0])
def test_soft_caps_with_and_without_running_maxima(softcap, place):
    """Below 52 weights need none in bf16, also where all scores lie at the cap's two ends."""
    device, dtype, head_dim, n = place
    dtype = torch.float32 if device == "cpu" else dtype  # of which fp16 is no part
    for scale in (0.1, 30.0):
        meaning = {"softcap": softcap, "causal": True, "softmax_scale": scale}
        lengths = (17 * n, 33 * n, NHEADS, NHEADS_K)
        check(dense(3, BATCH, *lengths, head_dim, dtype, device, **meaning))


@pytest.mark.parametrize("softcap", [0.5, 15.0, 50.0])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_row_that_sees_one_key_gives_exactly_its_value(softcap, scale, place):
    """The first token of a causal prompt is such a row."""
    device, dtype, head_dim, n = place
    for d in [head_dim] if device == "cpu" else [64, 128, 256, 96]:
        q = torch.randn(2, 33 * n, 6, d, dtype=dtype, device=device)
        k, v = torch.randn(2, 2, 33 * n, 3, d, dtype=dtype, device=device)
        options = {"softcap": softcap, "softmax_scale": scale}
        out = mfa.flash_attn_func(q, k[:, :1], v[:, :1], **options)
        assert torch.equal(out, v[:, :1].repeat_interleave(2, 2).expand_as(out))
        for window in ((-1, -1), (20, 0)):
            out = mfa.flash_attn_func(q, k, v, causal=True, window_size=window, **options)
            assert torch.equal(out[:, 0], v[:, 0].repeat_interleave(2, 1))
        out = mfa.flash_attn_func(q, k[:, :9], v[:, :9], causal=True, **options)
        first = out.shape[1] - 9  # the first query that sees a key
        assert torch.equal(out[:, first], v[:, 0].repeat_interleave(2, 1))
        assert not out[:, :first].any()


def test_what_is_no_number_shows_under_a_soft_cap(place):
    """A key of NaN makes NaN of every row that sees it, wherever in a tile it stands."""
    device, dtype, head_dim, n = place
    dtype = torch.float32 if device == "cpu" else dtype
    q, k, v = (torch.randn(1, 33 * n, 1, head_dim, dtype=dtype, device=device) for _ in "qkv")
    for key in (0, 1, 2, 7, 33 * n - 2):
        bad = k.clone()
        bad[:, key, :, 0] = float("nan")
        out = mfa.flash_attn_func(q, bad, v, softcap=30.0, causal=True)
        assert out[:, :key].isfinite().all() and out[:, key:].isnan().all()


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("page_size", [0, 16, 128])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_varlen(name, mask, page_size, splits, place):
    device, dtype, head_dim, n = place
    one_of_three(device, NAMES.index(name), MASKS.index(mask), splits, page_size // 16)
    meaning = features(name, device, dtype) | mask
    lengths = [5 * n, 0, 19 * n], [12 * n, 7 * n, 40 * n]
    case = varlen(2, *lengths, page_size, NHEADS, NHEADS_K, head_dim, dtype, device, **meaning)
    check(case, num_splits=splits)


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_decoding(name, mask, page_size, splits, place):
    device, dtype, head_dim, n = place
    one_of_three(device, NAMES.index(name), MASKS.index(mask), splits, page_size // 16)
    meaning = features(name, device, dtype) | mask
    for seqlen_q, appended in ((1, 0), (2, 2)):
        case = kvcache(
            3, seqlen_q, [5 * n, 50 * n, 0], appended, page_size, NHEADS, NHEADS_K, head_dim, dtype,
            device, splits, **meaning,
        )  # fmt: skip
        check(case)


CACHES = {
    "rotary pairs": {"appended": 3, "rotary": "pairs"},
    "rotary halves": {"appended": 1, "rotary": "halves"},
    "left padding": {"leftpad": True},
    "left padding, appended": {"leftpad": True, "appended": 2},
    "rows": {"rows": True},
    "rows, appended": {"rows": True, "appended": 2},
    "narrow values": {"head_dim_v": 16, "appended": 1},
    "wide values": {"head_dim_v": 72, "num_splits": 3},
    "packed": {"seqlen_q": [3, 0, 18]},
    "packed, appended": {"seqlen_q": [3, 0, 18], "appended": 1, "rotary": "pairs"},
    "packed, few": {"seqlen_q": [1, 0, 5]},
    "packed, few, appended": {"seqlen_q": [1, 0, 5], "appended": 1, "rotary": "halves"},
    "packed, split": {"seqlen_q": [1, 2, 5], "num_splits": 3},
    "packed, rows": {"seqlen_q": [1, 2, 5], "rows": True, "leftpad": True, "appended": 1},
    "many queries": {
        "seqlen_q": 20, "leftpad": True, "rows": True, "appended": 2, "rotary": "pairs",
        "head_dim_v": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", CACHES)
def test_caches(name, mask, page_size, place):
    device, dtype, head_dim, n = place
    words = {"seqlen_q": 2, "appended": 0} | CACHES[name]
    case = kvcache(
        3, lengths=[5 * n, 30 * n, 0], page_size=page_size, nheads=NHEADS, nheads_k=NHEADS_K,
        head_dim=head_dim, dtype=dtype, device=device, **words, **mask,
    )  # fmt: skip
    case.check(*case.run())


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("appended", [0, 2])
@pytest.mark.parametrize("seqlen_q", [2, 20])
def test_rows_that_do_not_exist_count_as_empty(seqlen_q, appended, page_size, place):
    """Of a cache or of a block table; nothing is written for them either."""
    device, dtype, head_dim, n = place
    case = kvcache(
        3, seqlen_q, [5 * n, 7, 30 * n], appended, page_size, NHEADS, NHEADS_K, head_dim, dtype,
        device, rows=True, causal=True,
    )  # fmt: skip
    rows, last = case.arguments["cache_batch_idx"], len(case.rows) - 1
    case.rows = [case.rows[last]]  # the others are made bad
    rows[0], rows[1] = -1, 2**31 - 1
    before = [case.arguments[name].clone() for name in ("k_cache", "v_cache")]
    out, lse = case.run()
    assert not out[:last].any() and (lse[:last] == float("-inf")).all()
    (at, lse_at, q, k, v) = case.rows[0]
    ref, ref_lse = reference.attention(q, k, v, causal=True)
    torch.testing.assert_close(out[at].double(), ref, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse[lse_at].double(), ref_lse, rtol=1e-4, atol=1e-4)
    changed = [
        (x.isnan() != y.isnan()).any(-1).sum().item()
        for x, y in zip(before, (case.arguments["k_cache"], case.arguments["v_cache"]), strict=True)
    ]
    assert changed == [appended * NHEADS_K] * 2


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths_q", [[70, 0, 33], [3, 1, 8]], ids=str)
def test_queries_in_use(lengths_q, mask, page_size, splits, place):
    """Rows past seqused_q give 0 and -inf, whatever they hold; masks end with the last in use.

    The seed decides how many are. The interpreter takes one for each of the others' combinations.
    """
    device, dtype, head_dim, n = place
    one = (MASKS.index(mask) + splits + page_size // 16) % 3
    for seed in [one] if settings.INTERPRETED and device == "cpu" else range(3):
        case = varlen(
            seed, lengths_q, [40 * n, 7, 30], page_size, NHEADS, NHEADS_K, head_dim, dtype, device,
            used_q=True, **mask,
        )  # fmt: skip
        case.check(*case.run(num_splits=splits))


@pytest.mark.parametrize("splits", [0, 1])
def test_hostile_numbers_of_queries_in_use(splits, place):
    device, dtype, head_dim, _ = place
    case = varlen(5, [9, 4, 6], [20, 7, 30], 16, NHEADS, NHEADS_K, head_dim, dtype, device)
    used = torch.tensor([2**31 - 1, -(2**31), -1], dtype=torch.int32, device=device)
    out, lse = case.run(num_splits=splits, seqused_q=used)
    assert not out[9:].any() and (lse[:, 9:] == float("-inf")).all()
    torch.testing.assert_close(out[:9], case.run(num_splits=splits)[0][:9], rtol=0, atol=0)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("head_dim_v", [16, 48, 96])
def test_values_of_another_head_dim(head_dim_v, mask, place):
    device, dtype, head_dim, n = place
    sizes = (NHEADS, NHEADS_K, head_dim, dtype, device)
    check(dense(1, 2, 17 * n, 33 * n, *sizes, head_dim_v=head_dim_v, **mask))
    for page_size in (0, 16):
        check(varlen(2, [5, 0, 19], [12, 7, 40], page_size, *sizes, head_dim_v=head_dim_v, **mask))


UNALIKE = [(24, 15), (36, 12), (36, 28), (40, 16), (40, 32), (72, 16)]


@pytest.mark.parametrize("head_dims", UNALIKE, ids=str)
def test_tiles_of_keys_and_values_that_are_not_as_wide(head_dims, place):
    """Where they are loaded through registers, K and V share shared memory (bench/NOTES.md, 113).
    Pairs of multiples of 8 are not loaded so any more (119). The interpreter, which has no shared
    memory and sees the padding alone, takes each pair with one mask.
    """
    device, dtype, _, n = place
    sizes = (NHEADS, NHEADS_K, head_dims[0], dtype, device)
    masks = [{}, {"causal": True}, {"window_size": (9, 3)}]
    if settings.INTERPRETED and device == "cpu":
        masks = [masks[UNALIKE.index(head_dims) % 3]]
    for page_size in (0, 16):
        for mask in masks:
            words = {"head_dim_v": head_dims[1], **mask}
            check(varlen(2, [17, 0, 40], [24, 18 * n, 40], page_size, *sizes, **words))
            check(kvcache(3, 40, [24, 18 * n, 0], 0, page_size, *sizes, 2, **words))


def test_a_tree_of_drafts(place):
    """Speculative decoding: the nodes of a tree attend to the context and their ancestors."""
    device, dtype, head_dim, n = place
    context, nodes = [30 * n, 7 * n, 11], 6
    parents = [[-1, 0, 0, 1, 1, 2], [-1, 0, 1, 2, 3, 4], [-1, -1, -1, 0, 1, 2]]
    ancestors = torch.zeros(BATCH, 32, dtype=torch.int32)
    for b, row in enumerate(parents):
        for node, parent in enumerate(row):
            above = ancestors[b, parent] if parent >= 0 else 0
            ancestors[b, node] = above | (1 << node)
    args = (torch.tensor(context).int().to(device), ancestors.to(device))
    for page_size in (0, 16):
        case = kvcache(
            3, nodes, context, nodes, page_size, NHEADS, NHEADS_K, head_dim, dtype, device,
            score_mod=draft_tree, score_mod_args=args,
        )  # fmt: skip
        out, lse = case.run()
        case.check(out, lse)
        for b, row in enumerate(parents):  # by another definition: the keys of a path alone
            for node in range(nodes):
                path, at = [], node
                while at >= 0:
                    path, at = [context[b] + at, *path], row[at]
                keys = [*range(context[b]), *path]
                q, k, v = case.rows[b][2:]
                ref, _ = reference.attention(q[node : node + 1], k[keys], v[keys])
                assert (out[b, node].double() - ref[0]).abs().max() < 0.02


def test_alibi_as_a_score_mod_is_alibi(place):
    device, dtype, head_dim, n = place
    case = dense(1, BATCH, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, causal=True)
    built_in = case.run(alibi_slopes=slopes(device))
    args = (slopes(device),)
    own = case.run(score_mod=alibi, score_mod_args=args)
    assert (built_in[0].float() - own[0].float()).abs().max() < 0.01
    torch.testing.assert_close(built_in[1], own[1], rtol=0, atol=1e-3)


def test_functions_of_one_name_are_told_apart(place):
    device, dtype, head_dim, n = place

    def make(text):
        source = f"@triton.jit\ndef f(score, batch, head, q_idx, kv_idx):\n    return {text}\n"
        names = {"triton": triton, "tl": tl, "__name__": "made"}
        import linecache

        file = f"<{text}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        exec(compile(source, file, "exec"), names)
        return names["f"]

    case = dense(1, 2, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device)
    plain = case.run()[1]
    for text, wanted in (("score + 1.0", 1.0), ("score + 2.0", 2.0)):
        lse = case.run(score_mod=make(text))[1]
        torch.testing.assert_close(lse, plain + wanted, rtol=0, atol=1e-3)


def test_merging_two_halves_of_the_keys(place):
    device, dtype, head_dim, n = place
    case = dense(1, BATCH, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device)
    q, k, v = (case.arguments[x] for x in "qkv")
    sink = torch.randn(NHEADS, generator=torch.Generator().manual_seed(1)).to(device)
    want, want_lse, _ = mfa.flash_attn_func(q, k, v, return_attn_probs=True, s_aux=sink)
    a = mfa.flash_attn_func(q, k[:, :10], v[:, :10], return_attn_probs=True)[:2]
    b = mfa.flash_attn_func(q, k[:, 10:], v[:, 10:], return_attn_probs=True, s_aux=sink)[:2]
    out, lse = mfa.merge_attention_states(*a, *b)
    assert out.dtype is dtype
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(out, want, rtol=0, atol=0.02)
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], float("-inf"))
    out, lse = mfa.merge_attention_states(*nothing, *a)
    assert torch.equal(out, a[0]) and torch.equal(lse, a[1])
    out, lse = mfa.merge_attention_states(*nothing, *nothing)
    assert not out.any() and torch.equal(lse, nothing[1])


def test_packed_tensors(place):
    device, dtype, head_dim, n = place
    qkv = torch.randn(2, 17 * n, 3, NHEADS, head_dim).to(dtype).to(device)
    q, k, v = qkv.unbind(2)
    want = mfa.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(mfa.flash_attn_qkvpacked_func(qkv, causal=True), want)
    assert torch.equal(mfa.flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), want)
    cu = torch.tensor([0, 17 * n, 34 * n]).int().to(device)
    flat, sizes = qkv.flatten(0, 1), (17 * n, 17 * n)
    want = mfa.flash_attn_varlen_func(*flat.unbind(1), cu, cu, *sizes, causal=True)
    one = mfa.flash_attn_varlen_qkvpacked_func(flat, cu, 17 * n, causal=True)
    two = mfa.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, *sizes, causal=True)
    assert torch.equal(one, want) and torch.equal(two, want)
    with pytest.raises(ValueError, match="qkv: expected shape"):
        mfa.flash_attn_qkvpacked_func(qkv[:, :, :2])


def test_other_names_of_arguments(place):
    device, dtype, head_dim, _ = place
    sizes = (NHEADS, NHEADS_K, head_dim, dtype, device)
    case = varlen(2, [5, 9], [12, 40], 16, *sizes)
    sink = torch.zeros(NHEADS, device=device)
    want = case.run(s_aux=sink)
    arguments = {**case.arguments, "page_table": case.arguments["block_table"]}
    del arguments["block_table"]
    own = mfa.flash_attn_varlen_func(**arguments, learnable_sink=sink, return_attn_probs=True)
    assert torch.equal(own[0], want[0]) and torch.equal(own[1], want[1])
    with pytest.raises(TypeError, match="learnable_sink: expected None beside s_aux"):
        case.run(s_aux=sink, learnable_sink=sink)
