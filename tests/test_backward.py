"""The backward pass against the definition: every feature, its traps, and what autograd sees of it.

On CPU tensors, in Triton's interpreter, and on a GPU behind the portable kernels and Hopper's.
"""

import pytest
import torch
from cases import Case, dense, randn, varlen

import mini_flash_attention as mfa
from mini_flash_attention import cpu_backward, plan, recipes, reference, settings
from mini_flash_attention.execution_backward import BackwardTensors
from mini_flash_attention.plan import backward as planning
from mini_flash_attention.plan.gpu import Gpu
from mini_flash_attention.problem import DeviceLengths, Options, Problem, Scores
from mini_flash_attention.validate import calls as parse

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from examples.score_mods import same_document  # noqa: E402

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
NHEADS, NHEADS_K, BATCH = 4, 2, 3
NAN, INF = float("nan"), float("inf")
MASKS = [{}, {"causal": True}, {"window_size": (7, 3)}]


def on(name, there, reason):
    return pytest.param(name, marks=(pytest.mark.gpu, pytest.mark.skipif(not there, reason=reason)))


PLACES = ["cpu", on("portable", GPU, "needs a GPU"), on("hopper", HOPPER, "needs a Hopper GPU")]


@pytest.fixture(params=PLACES)
def place(request, monkeypatch, poisoned):
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


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """The same bits, but for a dQ to which programs of the Hopper kernel add in any order."""
    if x.is_cuda and not settings.PORTABLE:
        return torch.allclose(x.float(), y.float(), rtol=2**-6, atol=2**-8)
    return torch.equal(x, y)


def check(case: Case, dlse: bool = False) -> None:
    """`backward` keeps the promise and writes every element and nothing else; autograd, which calls
    it once more, gets the same.
    """
    given = case.dresults()[: 1 + dlse]
    found = case.backward(*given)
    case.check_gradients(found, *given)
    again = case.differentiate(*given)
    assert all(same(found[name], again[name]) for name in "qkv")
    if "s_aux" in again:
        case.check_gradients(again, *given)


# -- the oracle -----------------------------------------------------------------------------------


def bend(score, batch, head, q_idx, kv_idx):
    return 4.0 * torch.sigmoid(score) - 0.1 * (q_idx - kv_idx).abs() + 0.3 * head + batch


def bend_backward(grad, score, batch, head, q_idx, kv_idx):
    s = torch.sigmoid(score)
    return grad * 4.0 * s * (1.0 - s)


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", [(5, 9), (9, 9), (1, 12)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 1.5},
        {"s_aux": 1, "softmax_scale": -0.3},
        {"alibi_slopes": 1, "score_mod": bend},
        {"softcap": 2.0, "alibi_slopes": 1, "s_aux": 1, "score_mod": bend, "batch": 2},
    ],
)
def test_the_definition_is_what_autograd_makes_of_attention(options, lengths, mask, with_dlse):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=g).requires_grad_()

    options = dict(options)
    leaves = [draw(lengths[0], 4, 8), draw(lengths[1], 2, 8), draw(lengths[1], 2, 6)]
    for name in ("alibi_slopes", "s_aux"):
        if name in options:
            options[name] = draw(4)
    if "s_aux" in options:
        leaves.append(options["s_aux"])
    out, lse = reference.attention(*leaves[:3], **mask, **options)
    dout, dlse = draw(*out.shape).detach(), draw(*lse.shape).detach()
    wanted = torch.autograd.grad((out, lse), leaves, (dout, dlse * with_dlse))
    if "score_mod" in options:
        options["score_mod_bwd"] = bend_backward
    with torch.no_grad():
        found = reference.gradients(
            *leaves[:3], dout, dlse if with_dlse else None, **mask, **options
        )
    for x, ref in zip(found, wanted, strict=False):
        torch.testing.assert_close(x, ref, rtol=1e-10, atol=1e-12)
    assert (found[3] is None) == ("s_aux" not in options)


def test_the_definition_gives_0_where_nothing_is_seen():
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (9, 4, 4))
    dout, dlse = torch.randn_like(q), torch.randn(2, 9, dtype=torch.float64)
    found = reference.gradients(q, k, v, dout, dlse, s_aux=torch.randn(2), causal=True, softcap=2.0)
    assert not found[0][:5].any() and found[0][6:].any()
    assert all(x.isfinite().all() for x in found)
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (9, 0, 0))
    for gradient in reference.gradients(q, k, v, dout, dlse, s_aux=torch.randn(2)):
        assert not gradient.any()


# -- features -------------------------------------------------------------------------------------


@triton.jit
def passed_on(grad, score, batch, head, q_idx, kv_idx):
    return grad


@triton.jit
def far_away(score, batch, head, q_idx, kv_idx):
    """A bias of the place, of the head and of the sequence."""
    far = tl.abs(q_idx - kv_idx).to(tl.float32)
    return score - 0.05 * far * (head + 1).to(tl.float32) + 0.1 * batch


@triton.jit
def bounded(score, batch, head, q_idx, kv_idx):
    return 4.0 * tl.sigmoid(score)


@triton.jit
def bounded_backward(grad, score, batch, head, q_idx, kv_idx):
    s = tl.sigmoid(score)
    return grad * 4.0 * s * (1.0 - s)


@triton.jit
def weighted(score, batch, head, q_idx, kv_idx, args):
    """Times a number of the key, plus one of the head."""
    weight = tl.load(args[0] + kv_idx, mask=kv_idx < 1024, other=0.0)
    return score * weight + tl.load(args[1] + head)


@triton.jit
def weighted_backward(grad, score, batch, head, q_idx, kv_idx, args):
    return grad * tl.load(args[0] + kv_idx, mask=kv_idx < 1024, other=0.0)


@triton.jit
def same_document_backward(grad, score, batch, head, q_idx, kv_idx, args):
    return grad


@triton.jit
def in_blocks(score, batch, head, q_idx, kv_idx):
    """Squares of scores between tokens of the same dozen; -inf between others."""
    return tl.where(q_idx // 12 == kv_idx // 12, 0.3 * score * score, float("-inf"))


@triton.jit
def in_blocks_backward(grad, score, batch, head, q_idx, kv_idx):
    """Divides by 0 where the score is -inf: what it gives there does not count."""
    return 0.6 * score * grad / (q_idx // 12 == kv_idx // 12).to(tl.float32)


def slopes(device):
    return (0.5 ** torch.arange(1, NHEADS + 1)).to(device)


def features(name, device, dtype):
    g = torch.Generator().manual_seed(7)
    sink = torch.randn(NHEADS, generator=g).to(dtype).to(device)
    per_batch = torch.rand(BATCH, NHEADS, generator=g).to(device)
    documents = torch.randint(0, 3, (2048,), generator=g).int().to(device)
    weights = torch.randn(1024, generator=g).to(device), torch.randn(NHEADS, generator=g).to(device)
    return {
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi_slopes": slopes(device)},
        "alibi of each sequence": {"alibi_slopes": per_batch},
        "sinks": {"s_aux": sink},
        "sinks in fp32": {"s_aux": sink.float()},
        "negative scale": {"softmax_scale": -0.3},
        "no scale": {"softmax_scale": 0.0},
        "bias": {"score_mod": far_away, "score_mod_bwd": passed_on},
        "score_mod": {"score_mod": bounded, "score_mod_bwd": bounded_backward},
        "score_mod with arguments": {
            "score_mod": weighted, "score_mod_args": weights, "score_mod_bwd": weighted_backward,
        },
        "documents": {
            "score_mod": same_document, "score_mod_args": (documents,),
            "score_mod_bwd": same_document_backward,
        },
        "blocks": {"score_mod": in_blocks, "score_mod_bwd": in_blocks_backward},
        "all": {
            "softcap": 5.0, "alibi_slopes": per_batch, "s_aux": sink.float(),
            "softmax_scale": -0.2, "score_mod": bounded, "score_mod_bwd": bounded_backward,
        },
    }[name]  # fmt: skip


NAMES = [
    "softcap", "alibi", "alibi of each sequence", "sinks", "sinks in fp32", "negative scale",
    "no scale", "bias", "score_mod", "score_mod with arguments", "documents", "blocks", "all",
]  # fmt: skip


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dense(name, mask, place):
    device, dtype, head_dim, n = place
    number = NAMES.index(name) + MASKS.index(mask)
    meaning = features(name, device, dtype) | mask
    lengths = [(17 * n, 33 * n), (33 * n, 17 * n)]
    if settings.INTERPRETED:
        lengths = lengths[number % 2 :][:1]
    for d in [head_dim] if device == "cpu" else [(64, 128, 256)[number % 3]]:
        for seqlen_q, seqlen_k in lengths:
            case = dense(
                1, BATCH, seqlen_q, seqlen_k, NHEADS, NHEADS_K, d, dtype, device, **meaning
            )
            check(case, dlse=number % 2 == 0)


PACKED = {
    "all in use": {},
    "queries in use": {"used_q": True},
    "keys in use": {"used_k": True},
    "both in use": {"used_q": True, "used_k": True},
    "longest": {"longest": (9, 20)},
}


@pytest.mark.parametrize("words", PACKED)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", ["", *NAMES])
def test_packed(name, mask, words, place):
    """Rows of no sequence, and those not in use, hold NaN in q, k, v, dO and dLSE."""
    device, dtype, head_dim, n = place
    number = NAMES.index(name) if name else 1
    number += MASKS.index(mask) + list(PACKED).index(words)
    one_of_three(device, number)
    meaning = (features(name, device, dtype) if name else {}) | mask
    lengths = [5 * n, 0, 19 * n], [12 * n, 7 * n, 40 * n]
    case = varlen(
        2, *lengths, 0, NHEADS, NHEADS_K, head_dim, dtype, device, **meaning, **PACKED[words]
    )
    check(case, dlse=number % 2 == 0)


LENGTHS = [
    ([33, 20], [33, 20]),
    ([1, 0, 70, 33, 0], [60, 30, 70, 0, 0]),
    ([0, 0, 0], [5, 0, 3]),
    ([5, 0, 3], [0, 0, 0]),
    ([40], [40]),
    ([1] * 12, list(range(12))),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths, mask, place):
    device, dtype, head_dim, n = place
    one_of_three(device, LENGTHS.index(lengths), MASKS.index(mask))
    scaled = [[x * n for x in side] for side in lengths]
    sizes = (NHEADS, NHEADS_K, head_dim, dtype, device)
    for padding in (0, 3 * n):
        check(varlen(4, *scaled, 0, *sizes, padding=padding, **mask))


WINDOWS = [
    {},
    {"causal": True},
    {"window_size": (5, 0), "causal": True},
    {"window_size": (7, 3)},
    {"window_size": (-1, 2)},
    {"window_size": (4, -1)},
    {"window_size": (0, 0)},
]
HEADS = [(2, 2), (4, 2), (3, 1)]


@pytest.mark.parametrize("mask", WINDOWS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (65, 65), (33, 97), (97, 33), (1, 80), (80, 1)])
def test_masks(mask, heads, lengths, place):
    device, dtype, head_dim, n = place
    one_of_three(device, WINDOWS.index(mask), HEADS.index(heads), sum(lengths))
    if device == "cpu":
        dtype, head_dim = (torch.float16, torch.float32)[sum(lengths) % 2], 16
    check(dense(1, 2, *(x * n for x in lengths), *heads, head_dim, dtype, device, **mask))


HEAD_DIMS = [1, 16, 40, 64, 96, 128, 200, 256]
UNALIKE = [
    (1, 16),
    (16, 40),
    (40, 16),
    (24, 15),
    (96, 64),
    (64, 128),
    (256, 64),
    (40, 200),
    (192, 128),
]


@pytest.mark.parametrize("head_dims", [*((d, d) for d in HEAD_DIMS), *UNALIKE], ids=str)
def test_head_dims(head_dims, place):
    device, dtype, _, n = place
    for seed, mask in enumerate(MASKS[:2]):
        case = dense(
            seed, 1, 20 * n, 30 * n, 4, 2, head_dims[0], dtype, device, head_dims[1], **mask
        )
        check(case, dlse=seed == 1)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype, mask, place):
    device, _, head_dim, n = place
    if dtype is torch.bfloat16 and settings.INTERPRETED and device == "cpu":
        pytest.skip("the interpreter's bf16 products are wrong")
    if dtype is torch.float32 and device == "cuda":
        pytest.skip("fp32 is the CPU's")
    for name in ("softcap", "sinks", "score_mod"):
        meaning = features(name, device, dtype) | mask
        lengths = (17 * n, 33 * n, NHEADS, NHEADS_K)
        check(dense(1, BATCH, *lengths, head_dim, dtype, device, **meaning), dlse=True)


@pytest.mark.parametrize("mask", WINDOWS, ids=str)
@pytest.mark.parametrize("block", [(16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("lengths", [(90, 90), (50, 100), (100, 50)], ids=str)
def test_many_blocks(lengths, block, mask, monkeypatch, poisoned):
    """Blocks that all see, that some see and that nobody sees, in the few tokens that are quick."""
    tiles = plan.configs.Tiles(*block, 4, 1)
    monkeypatch.setattr(planning, "TILES", {})
    choices = dict.fromkeys((64, 128, 256), planning.Choice(tiles, tiles))
    monkeypatch.setattr(planning, "SMALL", choices)
    monkeypatch.setattr(recipes, "_recipes", {})
    case = dense(1, 1, *lengths, 2, 1, 16, torch.float16, "cpu", **mask)
    given = case.dresults()
    case.check_gradients(case.backward(*given), *given)


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_calls_give_the_same_bits(deterministic, place):
    device, dtype, head_dim, n = place
    lengths = (65 * n, 65 * n, 4, 1)
    case = dense(1, 1, *lengths, head_dim, dtype, device, causal=True)
    case.arguments["deterministic"] = deterministic
    given = case.dresults()
    first, second = case.backward(*given), case.backward(*given)
    assert (torch.equal if deterministic else same)(first["q"], second["q"])
    assert all(torch.equal(first[name], second[name]) for name in "kv"), "nothing is added up there"
    case.check_gradients(first, *given)


# -- which kernels, and in which order -------------------------------------------------------------


H200 = Gpu("H200", 90, 132)


def planned(heads, head_dims, length=4096, packed=False, left=None, right=None, **more):
    """The plan of the Hopper kernels for a call, or None."""
    (nheads, nheads_k), (d, d_v) = heads, head_dims
    softcap, deterministic = more.get("softcap", 0.0), more.get("deterministic", False)
    shapes = ((nheads, d), (nheads_k, d), (nheads_k, d_v), (nheads, d_v))
    q, k, v, dout = (torch.empty(4, length, *shape, dtype=torch.bfloat16) for shape in shapes)
    lengths, longest = DeviceLengths(), length
    if packed:
        q, k, v, dout = (x.flatten(0, 1) for x in (q, k, v, dout))
        cu_seqlens = torch.empty(5, dtype=torch.int32)
        lengths, longest = DeviceLengths(cu_seqlens, cu_seqlens), 3 * length
    options = Options(d**-0.5, left, right, left is not None, True, deterministic=deterministic)
    scores = Scores(softcap=softcap)
    p = Problem("", q, k, v, None, 4, longest, longest, options, scores, lengths)
    return planning.hopper(p, dout, (q, k, v), H200)


@pytest.mark.parametrize(("head_dims", "products"), [
    ((64, 64), 5), ((128, 128), 5), ((96, 96), 5), ((40, 40), 5),
    ((192, 128), 7), ((136, 136), 7), ((256, 256), 7), ((64, 192), 7), ((256, 8), 7),
    ((32, 32), None), ((59, 59), None), ((128, 64), None), ((256, 12), None),
])  # fmt: skip
def test_which_calls_the_hopper_kernels_take(head_dims, products):
    """One kernel for five products, or a kernel for dK and dV and one for dQ, which take seven."""
    for options in ({}, {"right": 0}, {"left": 100, "right": 33}, {"deterministic": True}):
        found = planned((4, 2), head_dims, **options)
        assert products == (found and (5 if found.dq is None else 7))
    assert planned((4, 2), head_dims, softcap=30.0) is None


@pytest.mark.parametrize(("found", "l2_group"), [
    (lambda: planned((16, 16), (64, 64), 1024), 16),  # 512 KB a head, with dQ in fp32
    (lambda: planned((16, 16), (64, 64), 16384), 1),
    (lambda: planned((16, 16), (128, 128), right=0), 4),  # 2 in the L2 cache, of 32 blocks
    (lambda: planned((16, 4), (128, 128), right=0), 4),
    (lambda: planned((16, 16), (128, 128), packed=True), 2),  # by the average length
    (lambda: planned((16, 16), (256, 256), 1024), 8),  # no dQ in fp32
])  # fmt: skip
def test_heads_of_a_group(found, l2_group):
    assert found().work.l2_group == l2_group


# -- tensors in one, and strides ------------------------------------------------------------------


def gradients(function, *leaves, **options):
    """Of the function's out, for a dO that its shape decides."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, **options)
    g = torch.Generator().manual_seed(3)
    dout = randn(g, *out.shape, dtype=out.dtype, device=str(out.device))
    return torch.autograd.grad(out, leaves, dout)


def test_packed_functions(place):
    """The gradient of a tensor of several is the gradients of its parts."""
    device, dtype, head_dim, n = place
    g = torch.Generator().manual_seed(0)
    qkv = randn(g, 2, 17 * n, 3, NHEADS, head_dim, dtype=dtype, device=device)
    q, kv, mask = qkv[:, :, 0], qkv[:, :, 1:], {"causal": True}
    wanted = torch.stack(gradients(mfa.flash_attn_func, *qkv.unbind(2), **mask), 2)
    (found,) = gradients(mfa.flash_attn_qkvpacked_func, qkv, **mask)
    assert same(found, wanted)
    dq, dkv = gradients(mfa.flash_attn_kvpacked_func, q, kv, **mask)
    assert same(dq, wanted[:, :, 0]) and same(dkv, wanted[:, :, 1:])

    cu = torch.tensor([0, 5 * n, 34 * n]).int().to(device)
    flat, longest = qkv.flatten(0, 1), 29 * n
    q, kv, sizes = flat[:, 0], flat[:, 1:], (cu, cu, longest, longest)
    parts = gradients(lambda *x: mfa.flash_attn_varlen_func(*x, *sizes, **mask), *flat.unbind(1))
    wanted = torch.stack(parts, 1)
    (found,) = gradients(
        lambda x: mfa.flash_attn_varlen_qkvpacked_func(x, cu, longest, **mask), flat
    )
    assert same(found, wanted)
    dq, dkv = gradients(
        lambda q, kv: mfa.flash_attn_varlen_kvpacked_func(q, kv, *sizes, **mask), q, kv
    )
    assert same(dq, wanted[:, 0]) and same(dkv, wanted[:, 1:])


def strided(kind, x):
    """x (batch, tokens, heads, head_dim) with other strides."""
    batch, tokens, heads, head_dim = x.shape
    if kind == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "batch last":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    room = x.new_full((batch + 1, tokens + 2, heads + 1, head_dim + {"odd": 1}.get(kind, 8)), NAN)
    view = room[1:, 1:-1, :-1, -head_dim:]
    return view.copy_(x)


STRIDES = ["heads first", "batch last", "odd", "multiples of 8"]


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_give_the_same_bits(kind, place):
    """Of every tensor read, and of those that are written, around which nothing changes."""
    device, dtype, head_dim, n = place
    case = dense(1, 2, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, causal=True)
    q, k, v = (case.arguments[x] for x in "qkv")
    dout, dlse = case.dresults()
    out, lse = case.run()
    plain = mfa.backward(dout, q, k, v, out, lse, dsoftmax_lse=dlse, causal=True)
    tensors = [strided(kind, x) for x in (dout, q, k, v, out)]
    statistics = strided_lse(lse), dlse.mT.contiguous().mT
    into = {
        f"d{x}": strided(kind, torch.full_like(y, NAN))
        for x, y in zip("qkv", (q, k, v), strict=True)
    }
    found = mfa.backward(*tensors, statistics[0], dsoftmax_lse=statistics[1], causal=True, **into)
    for x, ref, (name, given) in zip(found, plain, into.items(), strict=True):
        assert x is given and same(x, ref), name
        x.fill_(NAN)
        whole = torch.empty(0, dtype=x.dtype, device=device).set_(x.untyped_storage())
        assert whole.isnan().all() or kind in STRIDES[:2], f"{name}: written between rows"


def strided_lse(lse):
    """The same numbers in a wider tensor, as a view of some of its heads."""
    room = lse.new_full((lse.shape[0], lse.shape[1] + 2, lse.shape[2] + 3), NAN)
    return room[:, 1:-1, : lse.shape[2]].copy_(lse)


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_of_leaves(kind, place):
    """Gradients have the values of those of contiguous tensors, also as views of one tensor."""
    device, dtype, head_dim, n = place
    g = torch.Generator().manual_seed(0)
    qkv = randn(g, 3, 2, 20 * n, NHEADS, head_dim, dtype=dtype, device=device)
    wanted = gradients(mfa.flash_attn_func, *qkv, causal=True)
    for tensors in ([strided(kind, x) for x in qkv], torch.stack(list(qkv), 2).unbind(2)):
        found = gradients(mfa.flash_attn_func, *tensors, causal=True)
        assert all(map(same, found, wanted))


@pytest.mark.parametrize("name", ["sum", "expanded heads", "one row", "transposed", "odd"])
def test_strides_of_dout(name, place):
    """`out.sum()` gives a number expanded, and other functions what they like."""
    device, dtype, head_dim, n = place
    case = dense(1, 2, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, causal=True)
    dout, _ = case.dresults()
    dout = {
        "sum": lambda: dout[:1, :1, :1, :1].expand_as(dout),
        "expanded heads": lambda: dout[:, :, :1].expand_as(dout),
        "one row": lambda: dout[:1, :1].expand_as(dout),
        "transposed": lambda: dout.mT.contiguous().mT,
        "odd": lambda: strided("odd", dout),
    }[name]()
    found = case.differentiate(dout)
    wanted = case.differentiate(dout.contiguous())
    assert all(same(found[x], wanted[x]) for x in "qkv")
    case.check_gradients(found, dout)


def test_dout_may_be_out(leaves):
    """They are inputs both, and may share memory."""
    out = attend(*leaves)
    found = torch.autograd.grad(out, leaves, out.detach())
    out = attend(*leaves)
    wanted = torch.autograd.grad(out, leaves, out.detach().clone())
    assert all(map(same, found, wanted))


def test_sum(place):
    device, dtype, head_dim, n = place
    case = varlen(1, [9 * n, 20 * n], [9 * n, 20 * n], 0, 4, 2, head_dim, dtype, device, padding=0)
    leaves = {x: case.arguments[x].requires_grad_() for x in "qkv"}
    case.run(**leaves)[0].sum().backward()
    dout = torch.ones_like(leaves["q"])
    case.check_gradients({name: x.grad for name, x in leaves.items()}, dout)


def test_expanded_inputs(place):
    """Heads that share memory: autograd adds up what each gets."""
    device, dtype, head_dim, n = place
    g = torch.Generator().manual_seed(0)
    q = randn(g, 2, 17 * n, 4, head_dim, dtype=dtype, device=device)
    k = randn(g, 2, 17 * n, 1, head_dim, dtype=dtype, device=device)

    def expanded(q, k):
        return mfa.flash_attn_func(q, k.expand(-1, -1, 4, -1), k.expand(-1, -1, 4, -1))

    def copied(q, k):
        return mfa.flash_attn_func(q, k.repeat(1, 1, 4, 1), k.repeat(1, 1, 4, 1))

    for found, wanted in zip(gradients(expanded, q, k), gradients(copied, q, k), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_one_tensor_as_all_three(place):
    device, dtype, head_dim, n = place
    g = torch.Generator().manual_seed(0)
    x = randn(g, 2, 17 * n, 2, head_dim, dtype=dtype, device=device)
    (found,) = gradients(lambda x: mfa.flash_attn_func(x, x, x, causal=True), x)
    parts = gradients(mfa.flash_attn_func, x, x.clone(), x.clone(), causal=True)
    wanted = sum(part.float() for part in parts)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


# -- nothing there --------------------------------------------------------------------------------

EMPTY = {
    "no batch": (0, 5, 7, 4),
    "no queries": (2, 0, 7, 4),
    "no keys": (2, 5, 0, 4),
    "nothing": (0, 0, 0, 4),
    "no query heads": (2, 5, 7, 0),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors(name, place):
    device, dtype, head_dim, _ = place
    batch, seqlen_q, seqlen_k, nheads = EMPTY[name]
    q = torch.ones(batch, seqlen_q, nheads, head_dim, dtype=dtype, device=device)
    k, v = torch.ones(2, batch, seqlen_k, 2, head_dim, dtype=dtype, device=device)
    sink = torch.ones(nheads, device=device)
    leaves = [x.requires_grad_() for x in (q, k, v.clone(), sink)]
    out, lse, _ = mfa.flash_attn_func(*leaves[:3], s_aux=sink, return_attn_probs=True)
    found = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    for x, leaf in zip(found, leaves, strict=True):
        assert x.shape == leaf.shape and not x.any()


def test_no_sequences(place):
    device, dtype, head_dim, _ = place
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    q, k = (torch.ones(n, 2, head_dim, dtype=dtype, device=device) for n in (0, 5))
    leaves = [x.requires_grad_() for x in (q, k, k.clone())]
    out = mfa.flash_attn_varlen_func(*leaves, cu, cu, 3, 3)
    for x, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert x.shape == leaf.shape and not x.any()


# -- traps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_rows_that_see_nothing(sinks, with_dlse, place):
    """The first queries stand before the first key. They get 0 and give 0, exactly."""
    device, dtype, head_dim, n = place
    meaning = features("sinks", device, dtype) if sinks else {}
    case = dense(
        1, 2, 40 * n, 17 * n, NHEADS, NHEADS_K, head_dim, dtype, device, causal=True, **meaning
    )
    given = case.dresults()[: 1 + with_dlse]
    found = case.differentiate(*given)
    case.check_gradients(found, *given)
    empty = 23 * n
    assert not found["q"][:, :empty].any() and found["q"][:, empty + 1 :].any()
    given[0][:, :empty] *= 8
    if with_dlse:
        given[1][..., :empty] = 5.0
    again = case.differentiate(*given)
    assert all(same(found[x], again[x]) for x in found)


@triton.jit
def blind(score, batch, head, q_idx, kv_idx):
    return tl.where(batch == 1, float("-inf"), score)


@pytest.mark.parametrize("lengths", [([100], [128]), ([150, 0, 150], [100] * 3)], ids=str)
def test_tiles_after_the_end_of_a_sequence(lengths, place):
    """Tiles are dealt out as if every sequence had one more: this one would see some queries."""
    device, dtype, head_dim, _ = place
    check(varlen(0, *lengths, 0, 2, 1, head_dim, dtype, device, causal=True))


def test_keys_past_the_end_of_a_tile_are_no_keys(place):
    """Where there is no key a score of 0 would have a gradient that fp16 cannot hold."""
    device, *_ = place
    q, k, v = (torch.zeros(1, n, 1, 64, dtype=torch.float16, device=device) for n in (128, 1, 1))
    q[..., 0], k[..., 0] = -20.0, 8.0  # the score is -20, its weight 1
    v += 4.0
    dout = torch.full_like(q, 300.0)  # delta is 64 * 4 * 300
    out, lse, _ = mfa.flash_attn_func(q, k, v, return_attn_probs=True)
    dq, dk, dv = mfa.backward(dout, q, k, v, out, lse)
    assert torch.equal(dq, torch.zeros_like(q)) and torch.equal(dk, torch.zeros_like(k))
    assert torch.equal(dv, torch.full_like(v, 128 * 300.0))


def test_a_sequence_that_sees_nothing(place):
    device, dtype, head_dim, n = place
    meaning = {"score_mod": blind, "score_mod_bwd": passed_on} | features("sinks", device, dtype)
    case = dense(1, BATCH, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, **meaning)
    check(case, dlse=True)
    given = case.dresults()
    found = case.differentiate(*given)
    assert not any(found[x][1].any() for x in "qkv")


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_huge_scores_stay_finite(equal, softcap, place):
    """Scaled scores beyond 2^20, all alike or far apart."""
    device, dtype, _, n = place
    shape = (1, 33 * n, 2, 64)
    q, k = (torch.full(shape, x, dtype=dtype, device=device) for x in (448.0, -1880.0))
    g = torch.Generator().manual_seed(0)
    if not equal:
        q, k = (1000 * randn(g, *shape, dtype=dtype, device=device) for _ in range(2))
    v = randn(g, *shape, dtype=dtype, device=device)
    assert (q.float().abs().max() * k.float().abs().max() * 8) > 2**20
    for options in ({}, {"causal": True}, {"softmax_scale": -0.125}):
        for x in gradients(mfa.flash_attn_func, q, k, v, softcap=softcap, **options):
            assert x.isfinite().all()


def test_large_dout(place):
    """Gradients are linear in dO, also where it is so large that a masked dP is beyond fp16."""
    device, _, head_dim, n = place
    dtype = torch.float16
    case = dense(1, 2, 33 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, causal=True)
    case.arguments["v"][:, 20 * n :] *= 4096  # beyond 65504 where it meets dO: most see it not
    case.arguments["v"][:, : 20 * n] *= 2.0**-6
    dout, _ = case.dresults()
    dout[:, 20 * n :] = 0  # no query that sees the large values has a gradient
    small = case.backward(dout)
    large = case.backward(dout * 2**10)
    products = torch.einsum(
        "bqhd,bkhd->bhqk", dout.float() * 2**10, case.arguments["v"].repeat_interleave(2, 2).float()
    )
    assert products.abs().max() > 65504
    for name in "qkv":
        assert small[name].isfinite().all()
        scaled = small[name].float() * 2**10
        there = scaled.abs() < 60000
        error = (large[name].float() - scaled)[there].abs().max()
        assert error <= 2**-10 * scaled[there].abs().max()


@pytest.mark.parametrize("feature", ["", "softcap", "score_mod with arguments"])
def test_keys_in_two_halves(feature, place):
    """With the out and LSE of all keys, what the halves give adds up: as in ring attention."""
    device, dtype, head_dim, n = place
    meaning = features(feature, device, dtype) if feature else {}
    case = dense(1, 2, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, **meaning)
    q, k, v = (case.arguments[x] for x in "qkv")
    dout, dlse = case.dresults()
    at, parts = 16 * n, []
    for half in (slice(0, at), slice(at, None)):
        options = dict(meaning)
        if feature.startswith("score_mod"):  # it numbers keys from 0
            weights, heads = options["score_mod_args"]
            options["score_mod_args"] = (weights[half].clone() if half.start else weights, heads)
        parts.append((k[:, half], v[:, half], options))
    results = [
        mfa.flash_attn_func(q, *two, **options, return_attn_probs=True)[:2]
        for *two, options in parts
    ]
    out, lse = mfa.merge_attention_states(*results[0], *results[1])
    halves = [
        mfa.backward(dout, q, *two, out, lse, dsoftmax_lse=dlse, **options)
        for *two, options in parts
    ]
    found = {
        "q": halves[0][0] + halves[1][0],
        "k": torch.cat([halves[0][1], halves[1][1]], 1),
        "v": torch.cat([halves[0][2], halves[1][2]], 1),
    }
    case.check_gradients(found, dout, dlse)


def test_causal_halves_of_the_keys(place):
    """The second half is causal, the first is seen whole."""
    device, dtype, head_dim, n = place
    case = dense(1, 2, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, causal=True)
    q, k, v = (case.arguments[x] for x in "qkv")
    dout, dlse = case.dresults()
    out, lse = case.run()
    at = 16 * n
    old = mfa.backward(dout, q, k[:, :at], v[:, :at], out, lse, dsoftmax_lse=dlse)
    new = mfa.backward(dout, q, k[:, at:], v[:, at:], out, lse, dsoftmax_lse=dlse, causal=True)
    found = {"q": old[0] + new[0]}
    found |= {x: torch.cat([old[i], new[i]], 1) for i, x in ((1, "k"), (2, "v"))}
    case.check_gradients(found, dout, dlse)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("mask", MASKS[1:], ids=str)
def test_what_a_query_does_not_see_reaches_none_of_its_gradients(mask, value, place):
    """An infinite value at a key that later queries alone see."""
    device, dtype, head_dim, n = place
    case = dense(1, 1, 33 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, **mask)
    q, k, v = (case.arguments[x] for x in "qkv")
    dout, _ = case.dresults()
    out, lse = case.run()
    clean = mfa.backward(dout, q, k, v, out, lse, **mask)
    key, right = 20 * n, mask.get("window_size", (0, 0))[1]
    v = v.clone()
    v[:, key] = value
    found = mfa.backward(dout, q, k, v, out, lse, **mask)
    first = key - right  # the first query that sees it
    assert same(found[0][:, :first], clean[0][:, :first])
    assert found[0][:, first].isfinite().logical_not().any()
    assert same(found[2], clean[2]), "dV does not depend on V"
    if "window_size" in mask:  # nor do later queries
        last = key + mask["window_size"][0]
        assert same(found[0][:, last + 1 :], clean[0][:, last + 1 :])


@pytest.mark.parametrize("junk", [-1, -(2**31), 2**31 - 1, 10**6])
def test_junk_in_lengths_stays_inside(junk, place):
    """Numbers may be wrong then; nothing outside of the tensors is read or written."""
    device, dtype, head_dim, n = place
    case = varlen(
        1, [9 * n, 7 * n], [12 * n, 9 * n], 0, 4, 2, head_dim, dtype, device,
        used_q=True, used_k=True, causal=True,
    )  # fmt: skip
    dout, dlse = case.dresults()
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        case.arguments[name].copy_(torch.tensor([junk, 5 * n, junk]))
    for x in case.backward(dout, dlse).values():
        assert x.shape
    for name in ("seqused_q", "seqused_k"):
        case.arguments[name].fill_(junk)
    case.backward(dout, dlse)
    if device == "cuda":
        torch.cuda.synchronize()


# -- autograd -------------------------------------------------------------------------------------


def small(device, dtype):
    """q, k and v."""
    case = dense(1, 2, 5, 9, NHEADS, NHEADS_K, 16, dtype, device)
    return [case.arguments[x] for x in "qkv"]


@pytest.fixture
def leaves(place):
    """q, k and v that require gradients."""
    return [x.requires_grad_() for x in small(place[0], place[1])]


def attend(q, k, v):
    return mfa.flash_attn_func(q, k, v, causal=True)


def loss(q, k, v):
    return attend(q, k, v).float().square().sum()


def test_transforms_agree_with_autograd(leaves):
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    tensors = [x.detach() for x in leaves]
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors)
    assert all(map(same, found, wanted))
    out, pull = torch.func.vjp(attend, *tensors)
    dout = torch.ones_like(out)
    found = pull(dout)
    wanted = torch.autograd.grad(attend(*leaves), leaves, dout)
    assert all(map(same, found, wanted))
    value, found = torch.func.grad_and_value(loss)(*tensors)[::-1]
    torch.testing.assert_close(value, loss(*leaves).detach())


def test_transforms_of_a_packed_call(place):
    device, dtype, head_dim, _ = place
    sink = torch.zeros(NHEADS, device=device)
    case = varlen(1, [5, 9], [12, 9], 0, NHEADS, NHEADS_K, head_dim, dtype, device, s_aux=sink)
    dout, dlse = case.dresults()
    wanted = case.differentiate(dout, dlse)
    case.check_gradients(wanted, dout, dlse)
    given = {x: case.arguments[x] for x in ("q", "k", "v", "s_aux")}
    _, pull = torch.func.vjp(lambda given: case.run(**given), given)
    (found,) = pull((dout, dlse))
    assert all(same(found[x], wanted[x]) for x in wanted)


def mapped(q, k, v):
    return torch.vmap(attend)(q[None], k[None], v[None])


def mapped_gradient(q, k, v):
    return torch.vmap(torch.func.grad(loss))(q[None], k[None], v[None])


def batched_gradient(q, k, v):
    out = attend(q.requires_grad_(), k, v)
    return torch.autograd.grad(out, q, torch.stack([out, out]), is_grads_batched=True)


def forward_mode(q, k, v):
    return torch.func.jvp(attend, (q, k, v), (q, k, v))


def jacobian(q, k, v):
    return torch.func.jacfwd(attend)(q, k, v)


def dual(q, k, v):
    with torch.autograd.forward_ad.dual_level():
        return attend(torch.autograd.forward_ad.make_dual(q, q), k, v)


def twice(q, k, v):
    (dq,) = torch.autograd.grad(loss(q.requires_grad_(), k, v), q, create_graph=True)
    return torch.autograd.grad(dq.float().sum(), q)


def twice_transformed(q, k, v):
    return torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v).float().sum())(q)


def hessian(q, k, v):
    return torch.func.hessian(loss)(q, k, v)


REFUSED = [
    (mapped, r"torch\.vmap"), (mapped_gradient, r"torch\.vmap"), (batched_gradient, r"torch\.vmap"),
    (forward_mode, "forward-mode AD"), (jacobian, "forward-mode AD|torch\\.vmap"),
    (dual, "forward-mode AD"), (twice, "second derivatives"),
    (twice_transformed, "second derivatives"), (hessian, "forward-mode AD|torch\\.vmap"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "what"), REFUSED)
def test_what_has_no_derivative_is_refused_by_name(call, what, place):
    tensors = small(place[0], place[1])
    with pytest.raises(
        NotImplementedError, match=f"^flash_attn_func: ({what}).*: not implemented; .+"
    ):
        call(*tensors)


def test_a_graph_of_gradients_has_their_values(leaves):
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    assert all(x.requires_grad for x in found)
    assert all(map(same, found, wanted))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant, leaves):
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    out = torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=use_reentrant)
    out.float().square().sum().backward()
    assert all(same(x.grad, ref) for x, ref in zip(leaves, wanted, strict=True))


@pytest.mark.parametrize("number", range(4))
def test_a_change_of_a_saved_tensor_is_noticed(number, leaves):
    tensors = [x.detach().clone().requires_grad_() for x in leaves]
    given = [x * 1 for x in tensors]
    out = attend(*given)
    with torch.no_grad():
        [*given, out][number].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["", "sinks in fp32", "alibi", "score_mod with arguments"])
def test_a_graph_keeps_inputs_out_and_lse_alone(name, place):
    device, dtype, head_dim, _ = place
    meaning = features(name, device, dtype) if name else {}
    case = varlen(1, [5, 0, 9], [12, 1, 9], 0, 4, 2, head_dim, dtype, device, **meaning)
    given = {x: case.arguments[x].requires_grad_() for x in "qkv"}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, lse = case.run(**given)
    inputs = [x for x in case.arguments.values() if isinstance(x, torch.Tensor)]
    known = [*inputs, *case.arguments.get("score_mod_args", ()), out, lse]
    assert {x.data_ptr() for x in kept} <= {x.data_ptr() for x in known}
    assert len(kept) <= len(known)
    wanted = [out, lse, *given.values()]
    assert {x.data_ptr() for x in wanted} <= {x.data_ptr() for x in kept}
    size = sum(x.untyped_storage().nbytes() for x in kept)
    assert size <= sum(x.untyped_storage().nbytes() for x in known), "no view of something larger"
    beside = [*vars(out.grad_fn).values(), *out.grad_fn.call.others.values()]
    assert not any(isinstance(x, torch.Tensor) for x in beside)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "s"])
def test_some_gradients(wanted, place):
    device, dtype, head_dim, n = place
    meaning = features("sinks in fp32", device, dtype)
    case = dense(1, BATCH, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, **meaning)
    (dout, _) = case.dresults()
    every = case.differentiate(dout)
    case.check_gradients(every, dout)
    given = {x: case.arguments[x].detach().clone().requires_grad_(x[0] in wanted) for x in every}
    case.run(**given)[0].backward(dout)
    for name, x in given.items():
        assert x.grad is None if name[0] not in wanted else same(x.grad, every[name])


@pytest.mark.parametrize("wanted", ["q", "v", "dout"])
def test_the_function_adds_nothing_to_a_graph(wanted, place):
    """Its results are plain tensors, whatever the tensors that it is given require."""
    device, dtype, head_dim, _ = place
    case = dense(1, 1, 5, 9, NHEADS, NHEADS_K, head_dim, dtype, device)
    dout, _ = case.dresults()
    out, lse = case.run()
    given = {x: case.arguments[x] for x in "qkv"} | {"dout": dout}
    given[wanted].requires_grad_()
    for x in mfa.backward(**given, out=out, softmax_lse=lse):
        assert not x.requires_grad
    assert recipes.GRADIENT not in recipes._recipes


def test_no_graph_where_none_is_wanted(leaves):
    q, k, v = leaves
    with torch.no_grad():
        assert not attend(q, k, v).requires_grad
    assert attend(q, k, v).requires_grad
    with torch.inference_mode():
        assert attend(q, k, v).is_inference()
    assert not attend(q.detach(), k.detach(), v.detach()).requires_grad


def test_the_lse_has_a_gradient_alone(place):
    device, dtype, head_dim, n = place
    case = dense(1, 2, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device, causal=True)
    dout, dlse = case.dresults()
    leaves = [case.arguments[x].requires_grad_() for x in "qkv"]
    _, lse = case.run()
    found = torch.autograd.grad(lse, leaves, dlse)
    nothing = torch.zeros_like(dout)
    case.check_gradients(dict(zip("qkv", (x.detach() for x in found), strict=True)), nothing, dlse)
    assert not found[2].any()


def test_merged_states_have_the_gradients_of_all_keys(place):
    device, dtype, head_dim, n = place
    case = dense(1, 2, 17 * n, 33 * n, NHEADS, NHEADS_K, head_dim, dtype, device)
    dout, _ = case.dresults()
    leaves = q, k, v = [case.arguments[x].requires_grad_() for x in "qkv"]
    at = 16 * n
    halves = [
        mfa.flash_attn_func(q, k[:, half], v[:, half], return_attn_probs=True)[:2]
        for half in (slice(0, at), slice(at, None))
    ]
    out, _ = mfa.merge_attention_states(*halves[0], *halves[1])
    found = torch.autograd.grad(out, leaves, dout)
    whole = torch.autograd.grad(mfa.flash_attn_func(q, k, v), leaves, dout)
    for x, ref in zip(found, whole, strict=True):
        torch.testing.assert_close(x, ref, rtol=0.02, atol=0.02)


# The interpreter has no bf16.
LOWER = [torch.float16] if settings.INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOWER, ids=str)
def test_autocast(dtype, place):
    """fp32 tensors are cast, and their gradients are cast back, as where PyTorch attends."""
    device = place[0]
    tensors = [x.requires_grad_() for x in small(device, torch.float32)]
    cast = [x.detach().to(dtype).requires_grad_() for x in tensors]
    wanted = attend(*cast)
    dout = randn(torch.Generator().manual_seed(0), *wanted.shape, dtype=dtype, device=device)
    with torch.autocast(device, dtype):
        out = attend(*tensors)
    assert out.dtype is dtype and same(out, wanted)
    found = torch.autograd.grad(out, tensors, dout)
    for x, ref in zip(found, torch.autograd.grad(wanted, cast, dout), strict=True):
        assert x.dtype is torch.float32 and same(x, ref.float())
    with torch.autocast(device, dtype), torch.no_grad():
        assert same(attend(*tensors), wanted)
    with torch.autocast(device, dtype):  # what is low already stays as it is
        assert same(attend(*cast), wanted)
    with torch.autocast(device, dtype, enabled=False):
        assert device == "cuda" or attend(*tensors).dtype is torch.float32


# -- dropout --------------------------------------------------------------------------------------


def seeded(function, *arguments, **options):
    torch.manual_seed(5)
    return function(*arguments, **options)


def dropped(share, lengths, nheads, mask, place, cu=None):
    """What weights are multiplied by, (batch, nheads, seqlen_q, seqlen_k), seen by way of values
    that are rows of the identity. With `cu` packed sequences, as if each were a batch entry.
    """
    device, dtype, head_dim, _ = place
    seqlen_q, seqlen_k = lengths
    q = torch.zeros(BATCH, seqlen_q, nheads, head_dim, dtype=dtype, device=device)
    k = q.new_zeros(BATCH, seqlen_k, 1, head_dim)
    v = torch.eye(seqlen_k, dtype=dtype, device=device)[None, :, None].expand(BATCH, -1, -1, -1)
    if cu is None:
        out = seeded(mfa.flash_attn_func, q, k, v, share, **mask)
    else:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        sizes = (*cu, seqlen_q, seqlen_k)
        out = seeded(mfa.flash_attn_varlen_func, *flat, *sizes, share, **mask).view(
            BATCH, seqlen_q, nheads, seqlen_k
        )
    return (out != 0).double().transpose(1, 2) / (1 - share)


@pytest.mark.parametrize("mask", MASKS[:2], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout(share, packed, mask, place):
    """The weights that stay are divided by their share, and gradients are those of what was
    computed. The LSE is that of all weights.
    """
    device, dtype, head_dim, n = place
    seqlen_q, seqlen_k = lengths = (20, 33) if n == 1 else (150, 200)
    case = dense(1, BATCH, *lengths, NHEADS, NHEADS_K, head_dim, dtype, device, **mask)
    leaves = [case.arguments[x].requires_grad_() for x in "qkv"]
    dout, dlse = case.dresults()
    steps = torch.arange(BATCH + 1, dtype=torch.int32, device=device)
    cu = (steps * seqlen_q, steps * seqlen_k)
    multiplied = dropped(share, lengths, NHEADS, mask, place, cu if packed else None)
    if packed:
        flat = [x.flatten(0, 1) for x in leaves]
        sizes = (*cu, *lengths)
        out, lse, _ = seeded(
            mfa.flash_attn_varlen_func, *flat, *sizes, share, **mask, return_attn_probs=True
        )
        out, lse = out.unflatten(0, (BATCH, -1)), lse.unflatten(1, (BATCH, -1)).transpose(0, 1)
    else:
        out, lse, _ = seeded(mfa.flash_attn_func, *leaves, share, **mask, return_attn_probs=True)
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse))

    wide = [x.detach().double().requires_grad_() for x in leaves]
    q, k, v = (x.transpose(1, 2) for x in wide)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.mT * head_dim**-0.5
    visible = reference.visibility(*lengths, mask.get("causal", False), (-1, -1)).to(device)
    scores = scores.masked_fill(~visible, -INF)
    ref = ((scores.softmax(3) * multiplied) @ v).transpose(1, 2)
    ref_lse = scores.logsumexp(3)
    wanted = torch.autograd.grad((ref, ref_lse), wide, (dout.double(), dlse.double()))
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-5, atol=1e-5)
    for x, y in zip((out, *found), (ref, *wanted), strict=True):
        assert (x - y).abs().max() <= 4 * torch.finfo(dtype).eps * y.abs().max()
    seen = multiplied[visible.expand_as(multiplied)] > 0
    assert abs(seen.double().mean() - (1 - share)) < 5 * (share * (1 - share) / len(seen)) ** 0.5


def test_dropout_is_drawn_anew(leaves):
    """From PyTorch's generator, for each call; none is drawn where nothing is dropped."""
    q, k, v = (x.detach() for x in leaves)
    device = q.device.type
    once, again = (seeded(mfa.flash_attn_func, q, k, v, 0.5) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(mfa.flash_attn_func(q, k, v, 0.5), once)
    generator = torch.cuda if device == "cuda" else torch
    before = generator.get_rng_state()
    assert torch.equal(mfa.flash_attn_func(q, k, v, 0.0), mfa.flash_attn_func(q, k, v))
    assert torch.equal(generator.get_rng_state(), before)
    qkv = torch.stack([q[:, :5], k[:, :5].repeat(1, 1, 2, 1), v[:, :5].repeat(1, 1, 2, 1)], 2)
    packed = seeded(mfa.flash_attn_qkvpacked_func, qkv, 0.5)
    assert torch.equal(packed, seeded(mfa.flash_attn_func, *qkv.unbind(2), 0.5))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_with_dropout(use_reentrant, leaves):
    """The second forward pass drops what the first has dropped."""

    def attend(q, k, v):
        return mfa.flash_attn_func(q, k, v, 0.3)

    out = seeded(attend, *leaves)
    dout = torch.ones_like(out)
    wanted = torch.autograd.grad(out, leaves, dout)
    checkpoint = torch.utils.checkpoint.checkpoint
    again = seeded(checkpoint, attend, *leaves, use_reentrant=use_reentrant)
    torch.rand(3, device=again.device)  # the generator moves on
    again.backward(dout)
    assert torch.equal(again, out)
    assert all(same(x.grad, ref) for x, ref in zip(leaves, wanted, strict=True))


# -- the formulas on the CPU, in float64 ----------------------------------------------------------


class Formulas(torch.autograd.Function):
    """The definition, with the gradients of `cpu_backward`."""

    @staticmethod
    def forward(ctx, case, q, k, v):
        rows = [reference.attention(q[b], k[b], v[b], **forward_of(case, b)) for b in range(len(q))]
        out, lse = (torch.stack(x) for x in zip(*rows, strict=True))
        ctx.case = case
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *tensors, out, lse = ctx.saved_tensors
        found = formulas(ctx.case, tensors, out, lse, dout.contiguous(), dlse)
        return None, *found


def forward_of(case, b):
    meaning = case.meaning_of(b)
    meaning.pop("score_mod_bwd", None)
    return meaning


def formulas(case, tensors, out, lse, dout, dlse):
    """(dq, dk, dv) of a call whose tensors are in float64, which the public functions refuse."""
    given = {
        "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
        "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "return_attn_probs": True,
        "s_aux": None, "out": None,
    }  # fmt: skip
    p = parse.dense(**given | case.arguments)
    q, k, v = tensors
    p = p._replace(q=q, k=k, v=v)
    found = [torch.full_like(x, NAN) for x in (lse, q, k, v)]
    cpu_backward.run(p, BackwardTensors(out, dout, lse, dlse, *found))
    return found[1:]


def bend_aux(score, batch, head, q_idx, kv_idx, args):
    return torch.sin(score) * (2.0 + 0.1 * kv_idx) + head


def bend_aux_backward(grad, score, batch, head, q_idx, kv_idx, args):
    return grad * torch.cos(score) * (2.0 + 0.1 * kv_idx)


MEANINGS = [
    {},
    {"causal": True, "softmax_scale": -0.5},
    {"window_size": (2, 1), "softcap": 1.0},
    {"s_aux": torch.tensor([0.3, -1.0]), "alibi_slopes": torch.tensor([[0.1, 0.2], [0.4, 0.3]])},
    {
        "softcap": 2.0, "score_mod": bend_aux, "score_mod_args": (torch.ones(1),),
        "score_mod_bwd": bend_aux_backward,
    },
]  # fmt: skip


@pytest.mark.parametrize("lengths", [(4, 7), (5, 5), (6, 4)], ids=str)
@pytest.mark.parametrize("meaning", MEANINGS)
def test_formulas_are_the_derivatives(meaning, lengths):
    case = dense(1, 2, *lengths, 2, 1, 5, torch.float32, "cpu", 3, **meaning)
    tensors = [case.arguments[x].double().requires_grad_() for x in "qkv"]

    def call(*tensors):
        out, lse = Formulas.apply(case, *tensors)
        return out, lse.masked_fill(lse == -INF, 0.0)  # which has no derivative

    assert torch.autograd.gradcheck(call, tensors)


# -- what only a GPU shows ------------------------------------------------------------------------

REAL = [(63, 65), (128, 128), (129, 257), (300, 77), (513, 1024), (1, 1000), (1000, 1)]


@pytest.fixture(params=PLACES[1:])
def gpu(request, monkeypatch, poisoned):
    monkeypatch.setattr(recipes, "_recipes", {})
    monkeypatch.setattr(settings, "PORTABLE", request.param == "portable")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 80])
@pytest.mark.parametrize("mask", [*WINDOWS[:2], {"window_size": (100, 33)}], ids=str)
def test_real_shapes(mask, head_dim, dtype, gpu):
    for seed, lengths in enumerate(REAL):
        heads = [(4, 4), (6, 2), (4, 1)][seed % 3]
        check(dense(seed, 2, *lengths, *heads, head_dim, dtype, "cuda", **mask), dlse=seed % 2 == 0)
    lengths = [1, 0, 300, 77, 0, 1208], [500, 30, 300, 0, 0, 1742]
    check(varlen(9, *lengths, 0, 6, 2, head_dim, dtype, "cuda", padding=200, **mask))


def test_a_graph_of_both_passes(gpu):
    """Captured once, replayed with other numbers and other lengths."""
    case = varlen(0, [90, 33], [90, 70], 0, 4, 2, 64, torch.bfloat16, "cuda", causal=True)
    leaves = [case.arguments[x].requires_grad_() for x in "qkv"]
    dout, _ = case.dresults()
    case.arguments["deterministic"] = True
    torch.autograd.grad(case.run()[0], leaves, dout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = case.run()
        found = torch.autograd.grad(out, leaves, dout)
    for scale, middle in ((1.0, 90), (0.5, 20), (2.0, 0)):
        with torch.no_grad():
            leaves[0].mul_(scale)
        case.arguments["cu_seqlens_q"][1] = middle
        graph.replay()
        eager = torch.autograd.grad(case.run()[0], leaves, dout)
        assert all(map(torch.equal, found, eager))


def test_no_pass_synchronises(gpu):
    cases = [
        dense(0, 2, 64, 64, 4, 2, 64, torch.bfloat16, "cuda", causal=True),
        varlen(0, [30, 50], [30, 50], 0, 4, 2, 64, torch.bfloat16, "cuda"),
    ]
    given = [case.dresults() for case in cases]
    for case, dresults in zip(cases, given, strict=True):
        case.differentiate(*dresults)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case, dresults in zip(cases, given, strict=True):
            case.differentiate(*dresults)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeats_while_another_stream_is_busy(gpu):
    case = dense(0, 2, 300, 300, 4, 2, 128, torch.bfloat16, "cuda", causal=True)
    case.arguments["deterministic"] = True
    given = case.dresults()
    other, big = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(other):
        for _ in range(200):
            big = (big @ big).clamp(-1, 1)
    first = case.differentiate(*given)
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(200):
        again = case.differentiate(*given)
        with torch.cuda.stream(other):
            beside = case.differentiate(*given)
        torch.cuda.synchronize()
        assert all(
            torch.equal(first[x], again[x]) and torch.equal(first[x], beside[x]) for x in first
        )


def test_many_short_sequences(gpu):
    """One key each: out is v, so dV is dO, and scores have no gradient."""
    count = 66000
    cu = torch.arange(count + 1, device="cuda", dtype=torch.int32)
    q, k, v = torch.randn(3, count, 2, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = mfa.flash_attn_varlen_func(*leaves, cu, cu, 1, 1)
    dq, dk, dv = torch.autograd.grad(out, leaves, q)
    assert torch.equal(dv, q) and dq.abs().max() < 1e-3 and dk.abs().max() < 1e-3


@pytest.mark.slow
def test_more_elements_than_32_bits_count(gpu):
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB")
    q = torch.randn(1, 300000, 64, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 100, 64, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    last = q[:, -64:].clone()
    (dq,) = torch.autograd.grad(mfa.flash_attn_func(q.requires_grad_(), k, v), q, q.detach())
    leaf = last.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(mfa.flash_attn_func(leaf, k, v), leaf, last)
    torch.testing.assert_close(dq[:, -64:], wanted, rtol=1e-2, atol=1e-2)
    del dq, q
    k = torch.randn(1, 300000, 64, 128, device="cuda", dtype=torch.bfloat16)
    out, lse, _ = mfa.flash_attn_func(last, k, k, return_attn_probs=True)
    _, dk, dv = mfa.backward(last, last, k, k, out, lse)
    few = k[:, -64:]
    _, *wanted = mfa.backward(last, last, few, few, out, lse)  # of all keys' out and LSE
    for x, ref in zip((dk, dv), wanted, strict=True):
        torch.testing.assert_close(x[:, -64:], ref, rtol=1e-2, atol=1e-4)
