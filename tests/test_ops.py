"""The functions as operators: compiled, exported, counted, and none where nobody looks."""

from functools import partial

import cases
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mini_flash_attention as mfa
from mini_flash_attention import ops, settings
from mini_flash_attention.kernels import workspace

triton = pytest.importorskip("triton")
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
CALLS = [
    dense, varlen, decoding,
    pytest.param(modified, marks=pytest.mark.skipif(OLD, reason="Dynamo hands no kernels on")),
]  # fmt: skip


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


def operators():
    scores = (None, True, [-1, -1], 2.0, torch.rand(4, device=DEVICE), random(4), None, [], True)
    q, k, v = dense()[1]
    yield OPS.dense.default, (q, k, v, *scores)
    q, k, v, cu_seqlens, longest = varlen()[1]
    lengths = (cu_seqlens, cu_seqlens, longest, longest, None, None, 0)
    yield OPS.varlen.default, (q, k, v, *lengths, *scores)
    q, k_cache, v_cache, k, v, used, table = decoding()[1]
    lengths = (None, None, used, None, None, None, table, 0, None)
    yield OPS.kvcache.default, (q, k_cache, v_cache, *lengths, *scores)
    rotary = (None, None, True)
    yield OPS.kvcache_append.default, (q, k_cache, v_cache, k, v, *rotary, *lengths, *scores)


@pytest.mark.parametrize("number", range(len(ops.SCHEMAS)))
def test_opcheck(number):
    """Schema, autograd's registration, fakes and tracing, as torch.library checks them."""
    operator, arguments = list(operators())[number]
    found = torch.library.opcheck(operator, arguments)
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


def test_what_a_mode_sees_is_checked():
    q, k, v = dense()[1]
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="k: expected head_dim 32"):
        mfa.flash_attn_func(q, k[..., :16], v)


def test_gradients_are_refused():
    call, (q, k, v) = dense()
    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)
    with pytest.raises(Exception, match="not implemented yet"):
        compiled(q.requires_grad_(), k, v)


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
