"""PyTorch's registry: the same functions behind its own.

The registry's kernels are put behind PyTorch's operators for CPU tensors here, so that everything
but the GPU is tested without one.
"""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import dense, kvcache, varlen
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import mini_flash_attention as mfa
from mini_flash_attention.integrations import torch as registry

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_importing_the_package_imports_no_integration():
    code = (
        "import sys, mini_flash_attention as m; print([x for x in sys.modules if m.__name__ in x])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert b"mini_flash_attention.api" in done.stdout, done.stderr
    assert b"integrations" not in done.stdout and b"__main__" not in done.stdout


# -- torch.nn.attention's registry ----------------------------------------------------------------

needs_registry = pytest.mark.skipif(
    not hasattr(attention, "restore_flash_attention_impl"), reason="this torch has no registry"
)
aten = torch.ops.aten


def arguments_of(operator):
    return {a.name for a in operator.default._schema.arguments}


@pytest.fixture
def active():
    """Ours behind PyTorch's functions on a GPU."""
    registry.register("mini")
    attention.activate_flash_attention_impl("mini")
    yield
    attention.restore_flash_attention_impl()


@pytest.fixture
def on_cpu():
    """Ours behind PyTorch's operators, for CPU tensors."""
    overrides = registry.Overrides("CPU")
    yield
    overrides.remove()


def test_without_a_registry(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(NotImplementedError, match=r"register: torch: expected a version .*update"):
        registry.register()


@needs_registry
def test_names_of_others_are_left_alone():
    registry.register("mini")
    registry.register("mini")
    assert attention.list_flash_attention_impls().count("mini") == 1
    with pytest.raises(ValueError, match=r"register: name: expected none of .*'FA4'"):
        registry.register("FA4")


@needs_registry
def test_activated_and_restored():
    def there():
        return torch._C._dispatch_has_kernel_for_dispatch_key(
            "aten::_flash_attention_forward", "CUDA"
        )

    before = there()
    registry.register("mini")
    assert there() == before, "registering activates nothing"
    for _ in range(2):
        attention.activate_flash_attention_impl("mini")
        assert attention.current_flash_attention_impl() == "mini"
        assert there()
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert there() == before, "PyTorch's own is back"


def heads_first(case):
    """q, k and v of a dense case as SDPA takes them."""
    return [case.arguments[name].transpose(1, 2) for name in "qkv"]


def heads_last(tensors):
    return [x.transpose(1, 2) for x in tensors]


def leaves(tensors):
    """The same tensors, wanting gradients."""
    return [x.detach().requires_grad_() for x in tensors]


@pytest.mark.parametrize("lengths", [(10, 10), (7, 20), (20, 7), (1, 33)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nheads_k", [4, 2, 1])
def test_sdpa_operator(on_cpu, lengths, causal, nheads_k):
    """Causal is bottom right, also where lengths differ: see causal_lower_right of torch."""
    case = dense(
        0, 2, *lengths, 4, nheads_k, 32, torch.float32, "cpu", causal=causal, softmax_scale=0.3
    )
    q, k, v = leaves(heads_first(case))
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3)
    case.check(out.detach().transpose(1, 2), lse)
    dout, _ = case.dresults()
    found = torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2))
    case.check_gradients(dict(zip("qkv", heads_last(found), strict=True)), dout)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_formulas(on_cpu, causal):
    """As PyTorch has them. The gradient of a sum is expanded: all its strides are 0."""
    tensors = leaves(torch.randn(2, 4, 9, 16) for _ in "qkv")
    out, *_ = aten._scaled_dot_product_flash_attention(*tensors, 0.0, causal)
    found = torch.autograd.grad(out.sum(), tensors)
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(*(x.double() for x in tensors), is_causal=causal)
    for ours, theirs in zip(found, torch.autograd.grad(exact.sum(), tensors), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)


def layouts():
    """(2, 4, 10, 16) in the ways that models hold it."""
    yield "batch, heads, seqlen", torch.randn(2, 4, 10, 16)
    yield "batch, seqlen, heads", torch.randn(2, 10, 4, 16).transpose(1, 2)
    yield "packed", torch.randn(2, 10, 3, 4, 16)[:, :, 0].transpose(1, 2)
    yield "seqlen, batch, heads", torch.randn(10, 2, 4, 16).permute(1, 2, 0, 3)
    yield "expanded", torch.randn(1, 4, 10, 16).expand(2, -1, -1, -1)


def assert_laid_out_as(results, wanted):
    for result, meta in zip(results, wanted, strict=True):
        if isinstance(meta, torch.Tensor):
            assert (result.shape, result.dtype) == (meta.shape, meta.dtype)
            assert result.stride() == meta.stride()
        else:
            assert result == meta


@pytest.mark.parametrize("query", [x for _, x in layouts()], ids=[name for name, _ in layouts()])
def test_results_are_those_that_compiled_code_expects(on_cpu, query):
    """Compiled code asks PyTorch's functions for tensors without memory."""

    def without_memory(*tensors):
        return [torch.empty_strided(x.shape, x.stride(), device="meta") for x in tensors]

    forward = aten._scaled_dot_product_flash_attention
    backward = aten._scaled_dot_product_flash_attention_backward
    given = query, torch.randn(2, 10, 2, 16).transpose(1, 2), query[:, :2]
    results, wanted = forward(*given), forward(*without_memory(*given))
    assert_laid_out_as(results, wanted)
    saved = query, *given, *results[:2]
    rest = (None, None, 10, 10, 0.0, False, *results[6:8])
    assert_laid_out_as(backward(*saved, *rest), backward(*without_memory(*saved), *rest))

    packed = [x.transpose(1, 2).flatten(0, 1) for x in given]
    cu = torch.tensor([0, 10, 20], dtype=torch.int32)
    arguments = (cu, cu, 10, 10, 0.0, False)
    results = aten._flash_attention_forward(*packed, *arguments, False)
    wanted = aten._flash_attention_forward(*without_memory(*packed), *arguments, False)
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in wanted]
    assert results[0].stride() == wanted[0].stride()
    saved = packed[0], *packed, *results[:2]
    rest = (*arguments, *results[2:4])
    backward = aten._flash_attention_backward
    assert_laid_out_as(backward(*saved, *rest), backward(*without_memory(*saved), *rest))


def operands(case):
    """A varlen case as `_flash_attention_forward` takes it."""
    a = case.arguments
    lengths = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return [a[name] for name in ("q", "k", "v", *lengths)]


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 4)])
def test_packed_operator(on_cpu, window):
    case = varlen(
        0, [5, 0, 12, 1], [9, 4, 7, 30], 0, 4, 2, 16, torch.float32, "cpu", window_size=window
    )
    options = {"window_size_left": window[0], "window_size_right": window[1]}
    causal = window == (-1, 0)  # which is how varlen_attn says it
    *tensors, cu_q, cu_k, max_q, max_k = operands(case)
    tensors = leaves(tensors)
    rest = (cu_q, cu_k, max_q, max_k, 0.0, causal, False)
    out, lse, *_ = aten._flash_attention_forward(*tensors, *rest, **options)
    case.check(out.detach(), lse)
    dout, _ = case.dresults()
    found = torch.autograd.grad(out, tensors, dout)
    case.check_gradients(dict(zip("qkv", found, strict=True)), dout)
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        into = torch.full_like(out, float("nan"))
        again = aten._flash_attention_forward_no_dropout_inplace(
            into, *operands(case), 0.0, causal, False, **options
        )
        assert torch.equal(into, out) and torch.equal(again, lse)


@pytest.mark.skipif(
    "block_table" not in arguments_of(aten._flash_attention_forward), reason="not in this torch"
)
def test_paged_operator(on_cpu):
    case = varlen(0, [5, 1, 12], [9, 4, 30], 4, 4, 2, 16, torch.float32, "cpu", causal=True)
    q, k, v, cu_q, cu_k, *longest = operands(case)
    options = {"block_table": case.arguments["block_table"], "seqused_k": cu_k.diff()}
    for offsets in (None, torch.zeros_like(cu_k)):  # which say nothing beside seqused_k
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_q, offsets, *longest, 0.0, True, False, num_splits=1, **options
        )
        case.check(out, lse)


def test_batched_operator(on_cpu):
    case = dense(0, 2, 7, 12, 4, 2, 16, torch.float32, "cpu", causal=True, window_size=(5, 0))
    tensors = leaves(case.arguments[name] for name in "qkv")
    out, lse, *_ = aten._flash_attention_forward(
        *tensors, None, None, 7, 12, 0.0, True, False, window_size_left=5
    )
    case.check(out.detach(), lse)
    dout, _ = case.dresults()
    found = torch.autograd.grad(out, tensors, dout)
    case.check_gradients(dict(zip("qkv", found, strict=True)), dout)


def test_batched_operator_with_lengths(on_cpu):
    case = kvcache(0, 3, [9, 0, 30], 0, 0, 4, 2, 16, torch.float32, "cpu", causal=True)
    a = case.arguments
    out, lse, *_ = aten._flash_attention_forward(
        a["q"], a["k_cache"], a["v_cache"], None, None, 3, a["k_cache"].shape[1], 0.0, True, False,
        seqused_k=a["cache_seqlens"],
    )  # fmt: skip
    case.check(out, lse)


def varlen_attn(*tensors, causal):
    """PyTorch's, which has said causal in two ways."""
    function = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    if not causal:
        return function(*tensors)
    if "window_size" in inspect.signature(function).parameters:
        return function(*tensors, window_size=(-1, 0))
    return function(*tensors, is_causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attn(on_cpu, causal):
    case = varlen(1, [5, 12], [9, 30], 0, 4, 4, 16, torch.float32, "cpu", 0, causal=causal)
    ours, *_ = case.run()
    *tensors, cu_q, cu_k, max_q, max_k = operands(case)
    tensors = leaves(tensors)
    out = varlen_attn(*tensors, cu_q, cu_k, max_q, max_k, causal=causal)
    assert torch.equal(out, ours)
    dout, _ = case.dresults()
    found = torch.autograd.grad(out, tensors, dout)
    case.check_gradients(dict(zip("qkv", found, strict=True)), dout)


def test_jagged_tensors(on_cpu, monkeypatch):
    """SDPA of jagged tensors takes flash attention on a GPU alone: it is told to here."""
    sdpa = pytest.importorskip("torch.nested._internal.sdpa")
    lengths = [5, 1, 12]
    tensors = leaves(torch.randn(sum(lengths), 4, 16) for _ in "qkv")
    offsets = torch.tensor([0, 5, 6, 18])
    nested = [
        torch.nested.nested_tensor_from_jagged(x, offsets, max_seqlen=12).transpose(1, 2)
        for x in tensors
    ]
    dout = torch.randn(18, 4, 16)
    monkeypatch.setattr(sdpa, "_select_sdp_backend", lambda *given: SDPBackend.FLASH_ATTENTION)
    out = F.scaled_dot_product_attention(*nested, is_causal=True).transpose(1, 2).values()
    found = torch.autograd.grad(out, tensors, dout)
    parts = []
    for rows in zip(*(x.split(lengths) for x in tensors), strict=True):
        q, k, v = (x.transpose(0, 1) for x in rows)
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, dout))


@pytest.mark.parametrize("causal", [False, True])
def test_ring_attention(on_cpu, causal):
    """As context parallelism calls the operators: a block of keys at a time, backward with the
    result and the LSE of all of them.
    """
    case = dense(0, 2, 8, 8, 4, 4, 16, torch.float32, "cpu", causal=causal)
    q, k, v = heads_first(case)
    dout, _ = case.dresults()
    forward = aten._scaled_dot_product_flash_attention
    backward = aten._scaled_dot_product_flash_attention_backward
    halves = slice(0, 4), slice(4, 8)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    out, lse = torch.empty_like(q), torch.empty(2, 4, 8)
    for mine in halves:
        blocks = [(keys, causal and keys == mine) for keys in halves if not causal or keys <= mine]
        parts = [forward(q[:, :, mine], k[:, :, n], v[:, :, n], 0.0, cut) for n, cut in blocks]
        merged = parts[0][0].transpose(1, 2), parts[0][1]
        for part_out, part_lse, *_ in parts[1:]:
            merged = mfa.merge_attention_states(*merged, part_out.transpose(1, 2), part_lse)
        out[:, :, mine], lse[:, :, mine] = merged[0].transpose(1, 2), merged[1]
        for (keys, cut), part in zip(blocks, parts, strict=True):
            found = backward(
                dout.transpose(1, 2)[:, :, mine], q[:, :, mine], k[:, :, keys], v[:, :, keys],
                out[:, :, mine], lse[:, :, mine], None, None, 4, 4, 0.0, cut, *part[6:8],
            )  # fmt: skip
            for x, at, gradient in zip((dq, dk, dv), (mine, keys, keys), found, strict=True):
                x[:, :, at] += gradient
    case.check(out.transpose(1, 2), lse)
    case.check_gradients(dict(zip("qkv", heads_last((dq, dk, dv)), strict=True)), dout)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_gradients(on_cpu, monkeypatch, wanted):
    """Asked for as everywhere in PyTorch."""
    seen = []

    def backward(*tensors, deterministic, **options):
        seen.append(deterministic)
        return mfa.backward(*tensors, deterministic=deterministic, **options)

    monkeypatch.setattr(registry, "backward", backward)
    query = torch.randn(1, 2, 5, 16, requires_grad=True)
    torch.use_deterministic_algorithms(wanted)
    try:
        aten._scaled_dot_product_flash_attention(query, query, query)[0].sum().backward()
        packed = query[0].transpose(0, 1)
        rest = (None, None, 5, 5, 0.0, False, False)
        aten._flash_attention_forward(*[packed[None]] * 3, *rest)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [wanted] * 2


def test_compiled_gradients(on_cpu):
    tensors = leaves(torch.randn(2, 4, 9, 16) for _ in "qkv")

    def attend(q, k, v):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0].square().sum()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, attend))
    assert all(map(torch.equal, found, expected))


def test_no_gradient_is_lost_in_silence(on_cpu):
    """PyTorch's formulas know nothing of some arguments, and of second derivatives."""
    query = torch.randn(1, 5, 2, 16, requires_grad=True)
    arguments = (query, query, query, None, None, 5, 5, 0.0, False, False)
    unknown = {
        "seqused_k": torch.tensor([3], dtype=torch.int32),
        "alibi_slopes": torch.ones(2),
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
    }
    for name in unknown.keys() & arguments_of(aten._flash_attention_forward):
        given = {name: unknown[name]}
        with pytest.raises(NotImplementedError, match=f"backward: not implemented for {name}; "):
            aten._flash_attention_forward(*arguments, **given)
        with torch.no_grad():
            aten._flash_attention_forward(*arguments, **given)
    out = aten._flash_attention_forward(*arguments)[0]
    (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .*_backward is not impl"):
        gradient.sum().backward()


def test_refused_arguments(on_cpu):
    x = torch.randn(1, 2, 5, 16)
    call = aten._scaled_dot_product_flash_attention
    with pytest.raises(NotImplementedError, match="scaled_dot_product_attention: dropout_p: "):
        call(x, x, x, 0.1)
    with pytest.raises(NotImplementedError, match="return_debug_mask: not implemented yet"):
        call(x, x, x, return_debug_mask=True)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward: dropout_p: "):
        aten._flash_attention_forward(x, x, x, None, None, 2, 2, 0.1, False, False)
    with pytest.raises(NotImplementedError, match="attention: novelty: not implemented yet"):
        registry._scaled_dot_product_flash_attention(x, x, x, novelty=1)
    results = registry._scaled_dot_product_flash_attention(x, x, x, novelty=None)
    saved = (x, x, x, x, *results[:6])
    for function in (
        registry._scaled_dot_product_flash_attention_backward, registry._flash_attention_backward
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=r"attention.*: dropout_p: not implemented"):
            function(*saved, 0.1, False, *results[6:8])
        with pytest.raises(NotImplementedError, match=r"attention.*: novelty: not implemented"):
            function(*saved, 0.0, False, *results[6:8], novelty=1)


# -- the same on a GPU ----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Names of our functions, as PyTorch reaches them."""
    seen = []

    def spied(name):
        function = getattr(mfa, name)

        def spy(*arguments, **options):
            seen.append(name)
            return function(*arguments, **options)

        return spy

    for name in (
        "backward", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"
    ):  # fmt: skip
        monkeypatch.setattr(registry, name, spied(name))
    return seen


def on_gpu(test):
    for mark in (*GPU, needs_registry):
        test = mark(test)
    return test


@on_gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seqlen", "nheads_k", "head_dim"), [(300, 4, 64), (300, 2, 128), (77, 1, 40), (1024, 8, 128)]
)
def test_sdpa_on_a_gpu(active, calls, causal, seqlen, nheads_k, head_dim):
    nheads = 16 if seqlen == 1024 else 4  # enough for the Hopper kernel
    case = dense(
        0, 2, seqlen, seqlen, nheads, nheads_k, head_dim, torch.bfloat16, "cuda", causal=causal
    )
    q, k, v = heads_first(case)
    options = {"is_causal": causal, "enable_gqa": True}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, **options)
    assert calls == ["flash_attn_func"]
    assert out.shape == q.shape and out.stride() == q.stride()
    with sdpa_kernel(SDPBackend.MATH):
        ref = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
        plain = F.scaled_dot_product_attention(q, k, v, **options)
    assert calls == ["flash_attn_func"], "other back ends stay PyTorch's"
    rounded = ref.to(q.dtype)
    promise = 2 * (plain - ref).abs().max() + 2 * (rounded + 0.3 - 0.3 - rounded).abs().max()
    assert (out - ref).abs().max() <= promise


@on_gpu
def test_lower_right_masks_on_a_gpu(active, calls):
    from torch.nn.attention.bias import causal_lower_right

    case = dense(0, 2, 70, 200, 4, 4, 64, torch.bfloat16, "cuda", causal=True)
    q, k, v = heads_first(case)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(70, 200))
    assert calls == ["flash_attn_func"]
    expected, lse = case.run()
    assert torch.equal(out.transpose(1, 2), expected)
    case.check(out.transpose(1, 2), lse)


@on_gpu
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attn_on_a_gpu(active, calls, causal):
    case = varlen(
        0, [100, 1, 300], [100, 1, 300], 0, 4, 4, 64, torch.bfloat16, "cuda", 0, causal=causal
    )
    with torch.no_grad():
        out = varlen_attn(*operands(case), causal=causal)
    assert calls == ["flash_attn_varlen_func"]
    expected, lse = case.run()
    assert torch.equal(out, expected)
    case.check(out, lse)
    q, k, v = (case.arguments[name] for name in "qkv")
    with sdpa_kernel(SDPBackend.MATH):
        for rows in (slice(0, 100), slice(100, 101), slice(101, 401)):
            one = [x[rows].transpose(0, 1)[None] for x in (q, k, v)]
            math = F.scaled_dot_product_attention(*one, is_causal=causal)[0].transpose(0, 1)
            torch.testing.assert_close(out[rows], math, atol=2e-2, rtol=2e-2)


@on_gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seqlen", "nheads_k", "head_dim"), [(300, 4, 64), (300, 2, 128), (77, 1, 40), (1024, 8, 128)]
)
def test_sdpa_gradients_on_a_gpu(active, calls, causal, seqlen, nheads_k, head_dim):
    nheads = 16 if seqlen == 1024 else 4  # enough for the Hopper kernel
    case = dense(
        0, 2, seqlen, seqlen, nheads, nheads_k, head_dim, torch.bfloat16, "cuda", causal=causal
    )
    tensors = leaves(heads_first(case))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True)
    dout, _ = case.dresults()
    found = torch.autograd.grad(out, tensors, dout.transpose(1, 2))
    assert calls == ["flash_attn_func", "backward"]
    assert found[0].stride() == tensors[0].stride()
    case.check_gradients(dict(zip("qkv", heads_last(found), strict=True)), dout)


@on_gpu
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_gradients_on_a_gpu(active, calls, causal):
    lengths = [100, 1, 300]
    case = varlen(0, lengths, lengths, 0, 4, 4, 64, torch.bfloat16, "cuda", 0, causal=causal)
    *tensors, cu_q, cu_k, max_q, max_k = operands(case)
    tensors = leaves(tensors)
    out = varlen_attn(*tensors, cu_q, cu_k, max_q, max_k, causal=causal)
    dout, _ = case.dresults()
    found = torch.autograd.grad(out, tensors, dout)
    assert calls == ["flash_attn_varlen_func", "backward"]
    case.check_gradients(dict(zip("qkv", found, strict=True)), dout)


@on_gpu
def test_jagged_tensors_on_a_gpu(active, calls):
    offsets = torch.tensor([0, 100, 101, 401], device="cuda")
    tensors = leaves(torch.randn(3, 401, 4, 64, device="cuda", dtype=torch.bfloat16).unbind())
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in tensors]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*nested).transpose(1, 2).values()
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, dout)
    assert calls == ["flash_attn_varlen_func", "backward"]
    cu = offsets.int()
    expected = mfa.flash_attn_varlen_func(*tensors, cu, cu, 300, 300)
    assert torch.equal(out, expected)
    # On Hopper, dQ is added up in any order.
    wanted = torch.autograd.grad(expected, tensors, dout)
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@on_gpu
def test_dropout_on_a_gpu(active):
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    refused = pytest.raises(NotImplementedError, match="dropout_p: not implemented yet")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), refused:
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)


@on_gpu
def test_restored_on_a_gpu(active, calls):
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attention.restore_flash_attention_impl()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert not calls and q.grad.isfinite().all()
    attention.activate_flash_attention_impl("mini")  # for the fixture to undo


@on_gpu
def test_graph_and_compiled_code_on_a_gpu(active, calls):
    q = torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16)

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        expected = attend(q)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(q)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
        before = len(calls)
        assert torch.equal(torch.compile(attend)(q), expected)
        assert len(calls) > before
    q.requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            (expected,) = torch.autograd.grad(attend(q).sum(), q)
            (found,) = torch.autograd.grad(torch.compile(attend)(q).sum(), q)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected) and calls.count("backward") == 2
