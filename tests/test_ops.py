"""The functions as operators: compiled, exported, counted, and none where nobody looks."""

from functools import partial

import cases
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import mini_flash_attention as mfa
from mini_flash_attention import ops, ops_backward, settings
from mini_flash_attention.kernels import workspace

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from test_features import distance_bias  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if GPU else ("cpu", torch.float32)
OPS = torch.ops.mini_flash_attention
# Code for the CPU would need a C++ compiler; what a graph holds is decided before.
BACKEND = "inductor" if GPU else "aot_eager"
ints = partial(cases.ints, device=DEVICE)
pytestmark = pytest.mark.skipif(settings.INTERPRETED, reason="nothing new, slowly")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def dense(tokens=8):
    arguments = (random(2, tokens, 4, 32), random(2, tokens, 2, 32), random(2, tokens, 2, 32))
    return lambda q, k, v: mfa.flash_attn_func(q, k, v, causal=True, softcap=3.0), arguments


@triton.jit
def squeezed(score, batch, head, q_idx, kv_idx, args):
    return tl.sigmoid(score) * tl.load(args[0] + kv_idx, mask=kv_idx < 8, other=0.0)


@triton.jit
def squeezed_backward(grad, score, batch, head, q_idx, kv_idx, args):
    s = tl.sigmoid(score)
    return grad * s * (1.0 - s) * tl.load(args[0] + kv_idx, mask=kv_idx < 8, other=0.0)


def modified(tokens=8):
    _, arguments = dense(tokens)
    return lambda q, k, v: mfa.flash_attn_func(q, k, v, score_mod=distance_bias), arguments


def varlen(tokens=16):
    arguments = (random(tokens, 4, 32), random(tokens, 2, 32), random(tokens, 2, 32))

    def call(q, k, v, cu_seqlens, longest):
        return mfa.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, return_attn_probs=True
        )[:2]

    return call, (*arguments, ints(0, 5, tokens), tokens - 5)


def decoding(tokens=1):
    def call(q, k_cache, v_cache, k, v, lengths, table):
        return mfa.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table, causal=True
        )

    caches = random(6, 16, 2, 32), random(6, 16, 2, 32)
    new = random(2, tokens, 2, 32), random(2, tokens, 2, 32)
    return call, (random(2, tokens, 4, 32), *caches, *new, ints(3, 20), ints(0, 2, 5, 1).view(2, 2))


OLD = torch.__version__ < "2.13"
HANDED_ON = pytest.mark.skipif(OLD, reason="Dynamo hands no kernels on")
CALLS = [dense, varlen, decoding, pytest.param(modified, marks=HANDED_ON)]


def copies(arguments):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


def same(call, other, arguments):
    """The same results and, where the call writes to its arguments, the same there."""
    one, two = copies(arguments), copies(arguments)
    torch.testing.assert_close(other(*two), call(*one), rtol=0, atol=0)
    torch.testing.assert_close(two, one, rtol=0, atol=0)


@pytest.mark.parametrize("make", CALLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(make, dynamic):
    call, arguments = make()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=BACKEND)
    same(call, compiled, arguments)


@pytest.mark.parametrize("make", [dense, varlen])
def test_other_lengths_compile_nothing_anew(make):
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    call, arguments = make(24)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counted)
    same(call, compiled, arguments)
    for tokens in (32, 48, 99):
        same(call, compiled, make(tokens)[1])
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("make", CALLS)
def test_reduce_overhead(make):
    """CUDA graphs as torch.compile makes them."""
    call, arguments = make()
    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        one, two = copies(arguments), copies(arguments)
        wanted, got = call(*one), compiled(*two)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        torch.testing.assert_close(two, one, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_reduce_overhead_with_a_workspace():
    """Parts of keys, and a counter: PyTorch's graphs allow no memory of theirs to be kept."""
    cache = random(2, 1, 8, 64), random(2, 4000, 2, 64), random(2, 4000, 2, 64)
    prompt = [random(2, 1024, 16, 128) for _ in range(3)]
    step = torch.compile(mfa.flash_attn_with_kvcache, fullgraph=True, mode="reduce-overhead")
    whole = torch.compile(mfa.flash_attn_func, fullgraph=True, mode="reduce-overhead")
    rooms = len(workspace._rooms)
    for _ in range(4):
        got = step(*cache).clone(), whole(*prompt).clone()  # a later call may overwrite them
        assert len(workspace._rooms) == rooms
        wanted = mfa.flash_attn_with_kvcache(*cache), mfa.flash_attn_func(*prompt)
        rooms = len(workspace._rooms)
        for one, two in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


class Layer(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *arguments):
        return self.call(*arguments)


@pytest.mark.parametrize("make", [dense, varlen, decoding])
def test_exported(make):
    call, arguments = make()
    exported = torch.export.export(Layer(call), tuple(copies(arguments)))
    named = {str(node.target) for node in exported.graph.nodes}
    assert any(name.startswith("mini_flash_attention.") for name in named)
    same(call, exported.module(), arguments)


def sinks(tokens=8):
    """Everything that has a gradient, and an LSE that has one."""

    def call(q, k, v, sink):
        out, lse, _ = mfa.flash_attn_func(
            q, k, v, s_aux=sink, window_size=(3, 1), return_attn_probs=True
        )
        return out, lse

    return call, (*dense(tokens)[1], torch.randn(4, device=DEVICE))


def differentiable(tokens=8):
    """A score_mod with its gradient."""

    def call(q, k, v, scales):
        return mfa.flash_attn_func(
            q, k, v, score_mod=squeezed, score_mod_args=(scales,), score_mod_bwd=squeezed_backward
        )

    return call, (*dense(tokens)[1], torch.rand(8, device=DEVICE))


# Calls, and how many of their tensors have gradients.
TRAINED = [
    (dense, 3), (varlen, 3), (sinks, 4), pytest.param(differentiable, 3, marks=HANDED_ON)
]  # fmt: skip


def differentiated(call, arguments, count, given=None):
    """(results, gradients) of a call, for those `given` of its results."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments[:count]]
    results = call(*leaves, *arguments[count:])
    results = results if isinstance(results, tuple) else (results,)
    given = given or [torch.randn_like(x) for x in results]
    return [x.detach() for x in results], torch.autograd.grad(results, leaves, given), given


@pytest.mark.parametrize(("make", "count"), TRAINED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients(make, count, dynamic):
    call, arguments = make()
    *wanted, given = differentiated(call, arguments, count)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=BACKEND)
    *got, _ = differentiated(compiled, arguments, count, given)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("make", [dense, varlen])
def test_compiled_dropout(make):
    """The graph draws anew in every call, and its gradients are those of what was drawn."""

    def call(q, k, v, *lengths):
        if lengths:
            cu, longest = lengths
            return mfa.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, 0.4, causal=True)
        return mfa.flash_attn_func(q, k, v, 0.4, causal=True)

    arguments = make()[1]
    compiled = torch.compile(
        call, fullgraph=True, backend="aot_eager"
    )  # which draws as PyTorch does
    torch.manual_seed(0)
    *wanted, given = differentiated(call, arguments, 3)
    torch.manual_seed(0)
    *got, _ = differentiated(compiled, arguments, 3, given)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    (another,), _, _ = differentiated(compiled, arguments, 3, given)
    assert not torch.equal(another, got[0][0])


def test_compiled_gradients_of_some_arguments():
    call, (q, k, v) = dense()
    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)
    for wanted in ("q", "k", "v", "qv"):
        given = [
            x.detach().clone().requires_grad_(name in wanted)
            for name, x in zip("qkv", (q, k, v), strict=True)
        ]
        leaves = [x for x in given if x.requires_grad]
        ours, theirs = (torch.autograd.grad(f(*given).sum(), leaves) for f in (compiled, call))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_gradients_of_other_lengths_compile_nothing_anew():
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    call, _ = varlen()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (24, 32, 48, 99):
        arguments = varlen(tokens)[1]
        *wanted, given = differentiated(call, arguments, 3)
        *got, _ = differentiated(compiled, arguments, 3, given)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_compiled_gradients_of_packed_rows_in_use():
    """Rows of nobody hold NaN, which reaches nothing; max_seqlen lies in a tensor."""
    q, k, v = random(19, 4, 32), random(19, 2, 32), random(19, 2, 32)
    for x in (q, k, v):
        x[16:] = x[3:5] = float("nan")

    def call(q, k, v, cu_seqlens, used, longest):
        return mfa.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, seqused_q=used, seqused_k=used
        )

    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)
    longest = torch.tensor(11, device=DEVICE)
    arguments = (q, k, v, ints(0, 5, 16), ints(3, 11), longest)
    (_,), wanted, given = differentiated(call, arguments, 3)
    given[0][16:] = given[0][3:5] = float("nan")
    for function in (call, compiled):
        (_,), got, _ = differentiated(function, arguments, 3, given)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        assert all(x.isfinite().all() and not x[16:].any() and not x[3:5].any() for x in got)


def test_a_compiled_call_without_gradients_needs_no_lse():
    call, (q, k, v) = dense()
    graphs = []

    def looked_at(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, fullgraph=True, backend=looked_at)
    q.requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v), rtol=0, atol=0)
    (node,) = [x for x in graphs[0].graph.nodes if "mini_flash_attention" in str(x.target)]
    assert node.kwargs["need_lse"] is False


def operators():
    """Each operator with arguments, and how many of its tensors have gradients."""
    scores = (None, True, [-1, -1], 2.0, torch.rand(4, device=DEVICE), random(4), None, [], True)
    training = (None, False, 0.25, torch.tensor([7], device=DEVICE))
    q, k, v = dense()[1]
    yield OPS.dense.default, (q, k, v, *scores, *training), 3
    q, k, v, cu_seqlens, longest = varlen()[1]
    lengths = (cu_seqlens, cu_seqlens, longest, longest, None, None, 0)
    late = (ints(2, 11), None, None)
    yield OPS.varlen.default, (q, k, v, *lengths, *scores, *late, *training), 3
    q, k_cache, v_cache, k, v, used, table = decoding()[1]
    lengths = (None, None, used, None, None, None, table, 0, None)
    yield OPS.kvcache.default, (q, k_cache, v_cache, *lengths, *scores), 0
    rotary = (None, None, True)
    yield OPS.kvcache_append.default, (q, k_cache, v_cache, k, v, *rotary, *lengths, *scores), 0
    scores = (None, True, [-1, -1], 2.0, torch.rand(4, device=DEVICE), False, None, [], None)
    scores += (0.0, None)
    q, k, v = dense()[1]
    out, lse, _ = mfa.flash_attn_func(q, k, v, causal=True, softcap=2.0, return_attn_probs=True)
    given = (out, lse, random(*out.shape), torch.randn_like(lse))
    yield OPS.dense_backward.default, (q, k, v, *given, *scores), 0
    q, k, v, cu_seqlens, longest = varlen()[1]
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    out, lse, _ = mfa.flash_attn_varlen_func(
        q, k, v, *lengths, causal=True, softcap=2.0, return_attn_probs=True
    )
    given = (out, lse, random(*out.shape), None)
    arguments = (q, k, v, *given, *scores, *lengths, ints(2, 11), None)
    yield OPS.varlen_backward.default, arguments, 0


@pytest.mark.parametrize("number", range(len(ops.SCHEMAS) + len(ops_backward.BACKWARD)))
def test_opcheck(number):
    """Schema, autograd's registration, fakes and tracing, as torch.library checks them."""
    operator, arguments, differentiated = list(operators())[number]
    for wanted in (0, differentiated) if differentiated else (0,):
        given = [x.requires_grad_(n < wanted) if n < 3 else x for n, x in enumerate(arguments)]
        found = torch.library.opcheck(operator, tuple(given))
        assert set(found.values()) == {"SUCCESS"} and len(found) == 4


def test_flops_are_counted():
    q, k, v = dense()[1]
    with FlopCounterMode(display=False) as counter:
        mfa.flash_attn_func(q, k, v)
    assert counter.get_total_flops() == 4 * 2 * 4 * 8 * 8 * 32
    call, arguments = varlen()
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    assert counter.get_total_flops() == 4 * 4 * (5 * 5 + 11 * 11) * 32
    call, arguments = decoding()
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    assert counter.get_total_flops() == 4 * 4 * (3 + 1 + 20 + 1) * 32


@pytest.mark.parametrize("make", [dense, varlen])
def test_flops_of_gradients_are_counted(make):
    """Five products instead of two."""
    call, arguments = make()
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        differentiated(call, arguments, 3)
    assert counter.get_total_flops() == forward + 5 * forward // 2


def test_what_a_mode_sees_is_checked():
    q, k, v = dense()[1]
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="k: expected head_dim 32"):
        mfa.flash_attn_func(q, k[..., :16], v)


def of_slopes(q, k, v):
    return mfa.flash_attn_func(q, k, v, alibi_slopes=torch.ones(4, device=DEVICE).requires_grad_())


def of_a_score_mod(q, k, v):
    return mfa.flash_attn_func(q, k, v, score_mod=distance_bias)


def of_a_cache(q, k, v):
    return mfa.flash_attn_with_kvcache(q, k, v)


def of_pages(q, k, v):
    return mfa.flash_attn_varlen_func(
        q.flatten(0, 1), k, v, ints(0, 8, 16), ints(0, 8, 16), 8, 8, block_table=ints(0, 1)[:, None]
    )


def of_out(q, k, v):
    return mfa.flash_attn_func(q, k, v, out=torch.empty_like(q))


REFUSED = [
    (of_slopes, "alibi_slopes, which has no gradient"), (of_a_cache, "a KV cache"),
    (of_pages, "block_table"), (of_out, "out"),
    pytest.param(of_a_score_mod, "a score_mod without score_mod_bwd", marks=HANDED_ON),
]  # fmt: skip


@pytest.mark.parametrize(("call", "what"), REFUSED)
def test_gradients_are_refused(call, what):
    """Where a compiler or a mode looks on, as everywhere."""
    _, (q, k, v) = dense()
    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)
    with pytest.raises(Exception, match=f"backward: not implemented for {what}"):
        compiled(q.requires_grad_(), k, v)
    with (
        FlopCounterMode(display=False),
        pytest.raises(NotImplementedError, match=f"backward: not implemented for {what}"),
    ):
        call(q, k, v)


def test_operators_want_an_lse_for_gradients():
    q, k, v = (x.requires_grad_() for x in dense()[1])
    scores = (None, True, [-1, -1], 0.0, None, None, None, [], False, None, False, 0.0, None)
    with pytest.raises(ValueError, match="need_lse: expected True where gradients are wanted"):
        OPS.dense(q, k, v, *scores)


def test_second_derivatives_of_operators_are_refused():
    call, (q, k, v) = dense()
    q.requires_grad_()
    with FlopCounterMode(display=False):
        (dq,) = torch.autograd.grad(call(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^flash_attn_func: second derivatives"):
        dq.sum().backward()


def test_plain_calls_go_past_the_operators(monkeypatch):
    def refuse(*_):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(ops, "run", refuse)
    call, arguments = dense()
    call(*arguments)


def test_out_is_written():
    q, k, v = dense()[1]
    wanted = mfa.flash_attn_func(q, k, v)

    def call(q, k, v, out):
        return mfa.flash_attn_func(q, k, v, out=out)

    out = torch.full_like(q, float("nan"))
    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)
    assert torch.equal(compiled(q, k, v, out), wanted) and torch.equal(out, wanted)


def lengths_in_tensors(function):
    """A packed call whose max_seqlen arguments are tensors of no dimensions, as transformers'."""
    q, k, v = random(16, 4, 32), random(16, 2, 32), random(16, 2, 32)
    cu_seqlens, longest = ints(0, 5, 16), torch.tensor(11, device=DEVICE)
    if function is mfa.flash_attn_varlen_func:

        def call(q, k, v, cu_seqlens, longest):
            return function(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)

        return call, (q, k, v, cu_seqlens, longest)

    def call(q, k_cache, v_cache, cu_seqlens, longest, lengths):
        return function(
            q, k_cache, v_cache, cache_seqlens=lengths, cu_seqlens_q=cu_seqlens,
            max_seqlen_q=longest, causal=True,
        )  # fmt: skip

    caches = random(2, 24, 2, 32), random(2, 24, 2, 32)
    return call, (q, *caches, cu_seqlens, longest, ints(24, 17))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [mfa.flash_attn_varlen_func, mfa.flash_attn_with_kvcache])
def test_compiled_with_lengths_in_tensors(function, dynamic, fullgraph):
    call, arguments = lengths_in_tensors(function)
    compiled = torch.compile(call, fullgraph=fullgraph, dynamic=dynamic, backend=BACKEND)
    same(call, compiled, arguments)
    fewer = [torch.tensor(7, device=DEVICE) if x is arguments[4] else x for x in arguments]
    same(call, compiled, fewer)  # queries past it give 0, so it is not a constant of the graph


def test_exported_with_lengths_in_tensors():
    call, arguments = lengths_in_tensors(mfa.flash_attn_varlen_func)

    class Layer(torch.nn.Module):
        def forward(self, *given):
            return call(*given)

    same(call, torch.export.export(Layer(), arguments).module(), arguments)


def test_compiled_with_queries_in_use():
    def call(q, k, v, cu_seqlens, used):
        return mfa.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, 11, 11, causal=True, seqused_q=used
        )

    q, k, v = random(16, 4, 32), random(16, 2, 32), random(16, 2, 32)
    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)
    for used in (ints(3, 11), ints(0, 4)):
        same(call, compiled, (q, k, v, ints(0, 5, 16), used))


@pytest.mark.filterwarnings("ignore")
def test_tracing_is_refused():
    """torch.jit.trace hands over sizes as tensors, and would record none of the kernels."""
    for make in (dense, varlen, decoding):
        call, arguments = make()
        tensors = tuple(x for x in arguments if isinstance(x, torch.Tensor))
        rest = tuple(x for x in arguments if not isinstance(x, torch.Tensor))
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace.*torch\.export"):
            torch.jit.trace(lambda *x, call=call, rest=rest: call(*x, *rest), tensors)


@pytest.mark.filterwarnings("ignore")
def test_the_older_onnx_export_is_refused(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return mfa.flash_attn_func(q, k, v)

    _, arguments = dense()
    with pytest.raises(NotImplementedError, match="ONNX"):
        torch.onnx.export(Layer(), arguments, tmp_path / "layer.onnx", dynamo=False)
