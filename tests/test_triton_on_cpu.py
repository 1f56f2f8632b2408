"""Functions in Triton's language on CPU tensors: each is held to a formula in PyTorch's.

Each also compiles, so no test is about what a GPU does not take. With TRITON_INTERPRET=1 the same
calls go through the kernels in Triton's interpreter.
"""

import functools
import math
import sys

import pytest
import torch

import mini_flash_attention as mfa
from mini_flash_attention import reference, settings, triton_on_cpu

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language import float32 as single  # noqa: E402
from triton.language import where as choose  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

HERE = sys.modules[__name__]  # a module that functions reach others through
SEQLEN_Q, SEQLEN_K, NHEADS, HEAD_DIM = 9, 13, 2, 16
HALF = tl.constexpr(0.5)
NUMBER = 0.75  # functions may read it as a module's attribute only

on_tensors = pytest.mark.skipif(settings.INTERPRETED, reason="runs in Triton's interpreter")


@triton.jit
def doubled(x):
    return x * 2.0


@triton.jit
def halved_by_default(x, FACTOR: tl.constexpr = HALF):
    return x * FACTOR


@triton.jit
def countdown(x, N: tl.constexpr):
    if N > 0:
        x = count_on(x + 1.0, N)
    return x


@triton.jit
def count_on(x, N: tl.constexpr):
    return countdown(x, N - 1)


# -- factories, and what their functions mean -----------------------------------------------------


def closure_constants(scale=0.25, shift=3):
    """A float, an int, a dtype and a tuple."""
    SCALE, SHIFT = tl.constexpr(scale), tl.constexpr(shift)
    DTYPE, PAIR = tl.constexpr(tl.float32), tl.constexpr((0.5, tl.float32))

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        far = tl.where(q_idx > kv_idx + SHIFT, (q_idx - kv_idx).to(DTYPE), PAIR[0])
        return score * SCALE - far.to(PAIR[1])

    return score_mod, lambda s, b, h, i, j: s * scale - ((i - j).where(i > j + shift, 0.5))


def closure_helpers(first=0.5, second=0.125):
    """A helper that calls a helper, each with a constant of its own."""
    FIRST, SECOND = tl.constexpr(first), tl.constexpr(second)

    @triton.jit
    def inner(x):
        return x * SECOND

    @triton.jit
    def outer(x):
        return inner(x) + FIRST

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        return outer(score) - inner(kv_idx)

    return score_mod, lambda s, b, h, i, j: s * second + first - j * second


def imports_inside():
    import triton.language as of_triton

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        return of_triton.where(q_idx == kv_idx, score, of_triton.exp2(-of_triton.abs(score)))

    return score_mod, lambda s, b, h, i, j: s.where(i == j, 2.0 ** -s.abs())


def imported_names():
    from triton.language import exp2 as power

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        return choose(q_idx == kv_idx, score, power(-(kv_idx.to(single))))

    return score_mod, lambda s, b, h, i, j: s.where(i == j, 2.0**-j)


def globals_and_defaults():
    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx, FACTOR: tl.constexpr = HALF):
        return tl.where(head == 0, halved_by_default(doubled(score)), score * FACTOR)

    return score_mod, lambda s, b, h, i, j: s.where(h == 0, s / 2)


def attributes_of_modules():
    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        x = HERE.doubled(score) * HERE.NUMBER + HERE.HALF
        return HERE.tl.maximum(x, triton.language.math.exp2(score)) * math.pi

    return score_mod, lambda s, b, h, i, j: torch.maximum(1.5 * s + 0.5, 2.0**s) * math.pi


def functions_of_math():
    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        x = tl.math.fma(score, 0.5, 1.0) + tl.fdiv(score, 4.0) + tl.sqrt(2.0)
        return tl.minimum(tl.clamp(x, -1.0, 2.0), 1.5) + tl.exp(-tl.abs(score)) + tl.sigmoid(score)

    def formula(s, b, h, i, j):
        x = s * 0.5 + 1 + s / 4 + math.sqrt(2)
        return x.clamp(-1, 1.5) + (-s.abs()).exp() + s.sigmoid()

    return score_mod, formula


def functions_of_libdevice():
    CAP = tl.constexpr(2.0)

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        return CAP * libdevice.tanh(score / CAP) + tl.extra.libdevice.log1p(tl.abs(score))

    return score_mod, lambda s, b, h, i, j: 2 * (s / 2).tanh() + s.abs().log1p()


def decided_at_compile_time():
    FLAG, OFF = tl.constexpr(True), tl.constexpr(None)

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        tl.static_assert(HALF < 1)
        for n in tl.static_range(3):
            score = score + n * HALF
        if FLAG:
            score = score * 2.0
        return score if OFF is None else -score

    return score_mod, lambda s, b, h, i, j: (s + 1.5) * 2


def functions_that_call_one_another():
    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx, N: tl.constexpr = 2):
        if N > 0:
            score = score_mod(score * 0.5, batch, head, q_idx, kv_idx, N - 1)
        else:
            score = countdown(score, 3)
        return score

    return score_mod, lambda s, b, h, i, j: s / 4 + 3


def integers():
    """Division is toward zero, as C's, and a remainder has the sign of what was divided."""

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        far = q_idx - kv_idx - 20
        x = (far // 3).to(tl.float32) + 0.25 * (far % 4).to(tl.float32)
        return score + x + (20 // (far - 1)).to(tl.float32) + far / 8

    def formula(s, b, h, i, j):
        far = (i - j - 20).double()
        return s + (far / 3).trunc() + 0.25 * far.fmod(4) + (20 / (far - 1)).trunc() + far / 8

    return score_mod, formula


def assignments():
    """`+=` gives a name to another tensor and leaves the first as it was."""

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        x = score
        x += 1.0
        x *= 0.5
        shifted = kv_idx
        shifted += q_idx
        return score - x + shifted * 0.1

    return score_mod, lambda s, b, h, i, j: s - (s + 1) / 2 + (i + j) * 0.1


@triton.jit
def of_the_key_alone(score, batch, head, q_idx, kv_idx):
    return kv_idx * 0.1


FACTORIES = [
    closure_constants, closure_helpers, imports_inside, globals_and_defaults,
    attributes_of_modules, functions_of_math, decided_at_compile_time,
    functions_that_call_one_another, integers, assignments,
]  # fmt: skip
if not settings.INTERPRETED:  # Triton's interpreter knows neither
    FACTORIES += [imported_names, functions_of_libdevice]
every_factory = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)


def random_qkv():
    g = torch.Generator().manual_seed(5)
    options = {"generator": g, "dtype": torch.float32, "device": "cpu"}
    q = 3 * torch.randn(2, SEQLEN_Q, NHEADS, HEAD_DIM, **options)
    k, v = torch.randn(2, 2, SEQLEN_K, NHEADS, HEAD_DIM, **options)
    return q, k, v


def attend(score_mod, **more):
    return mfa.flash_attn_func(*random_qkv(), causal=True, score_mod=score_mod, **more)


def check(score_mod, formula, **more):
    out = attend(score_mod, **more)
    for b, qkv in enumerate(zip(*random_qkv(), strict=True)):
        ref, _ = reference.attention(*qkv, causal=True, score_mod=formula, batch=b)
        torch.testing.assert_close(out[b].double(), ref, atol=2e-5, rtol=0)


@every_factory
def test_means_what_it_says(factory):
    check(*factory())


@every_factory
@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_torch_do_not_matter(factory, default):
    score_mod, _ = factory()
    usual, dtype = attend(score_mod), torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        out = attend(score_mod)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    assert torch.equal(out, usual)


@pytest.mark.skipif(settings.INTERPRETED, reason="the interpreter broadcasts")
def test_a_result_has_the_shape_of_the_score():
    """A kernel would not compile."""
    with pytest.raises(ValueError, match=r"score_mod: result: expected the score's shape.*0 \* sc"):
        attend(of_the_key_alone)


def test_every_call_has_its_own_constants():
    """Two functions of one factory are two functions."""
    for scale in (0.25, -0.5):
        check(*closure_constants(scale))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_factory
def test_means_the_same_on_a_gpu(factory):
    score_mod, formula = factory()
    q, k, v = (x.half() for x in random_qkv())
    on_gpu = (x.cuda() for x in (q, k, v))
    out = mfa.flash_attn_func(*on_gpu, causal=True, score_mod=score_mod).cpu()
    for b, qkv in enumerate(zip(q, k, v, strict=True)):
        ref, _ = reference.attention(*qkv, causal=True, score_mod=formula, batch=b)
        torch.testing.assert_close(out[b].double(), ref, atol=1e-2, rtol=0)


# -- what is given, and what comes back -----------------------------------------------------------


def test_reads_tensors():
    """Behind a pointer lies memory: a view's own, before it and behind it."""

    def make():
        LAST = tl.constexpr(SEQLEN_K - 1)

        @triton.jit
        def score_mod(score, batch, head, q_idx, kv_idx, args):
            bias = tl.load(args[0] + kv_idx, cache_modifier=".ca")
            before = tl.load(q_idx + args[1] - SEQLENS, mask=q_idx >= 0)
            last = tl.load(args[0] + kv_idx + 10, mask=kv_idx + 10 <= LAST, other=-1)
            return score + bias + before * 0.5 + last

        return score_mod

    numbers = torch.randn(2 * SEQLEN_K, generator=torch.Generator().manual_seed(1))
    bias, behind = numbers[:SEQLEN_K], numbers[SEQLEN_K:]

    def formula(s, b, h, i, j):
        last = bias[(j + 10).clamp(max=SEQLEN_K - 1)].where(j + 10 < SEQLEN_K, -1)
        return s + bias[j] + bias[i] * 0.5 + last

    check(make(), formula, score_mod_args=(bias, behind))


SEQLENS = tl.constexpr(SEQLEN_K)


def test_reads_nothing_where_the_mask_is_false():
    """Not even of a tensor without elements."""

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx, args):
        return score * tl.load(args[0] + kv_idx, mask=kv_idx < 0, other=2.0)

    check(score_mod, lambda s, b, h, i, j: 2 * s, score_mod_args=(torch.empty(0),))
    nothing = triton_on_cpu.load(triton_on_cpu.Pointer(torch.ones(3), torch.empty(0).int()))
    assert nothing.shape == (0,)  # without a mask, for a sequence without keys


@on_tensors
def test_python_functions_stay_pythons():
    """On the CPU a function need not be Triton's: its tensors are PyTorch's."""
    factor = 0.5

    def plain(score, batch, head, q_idx, kv_idx):
        far = torch.stack([x.expand(3, 4) for x in (q_idx[:1, :1], kv_idx[:1])]).sum()
        return factor * score - (q_idx - kv_idx) // 3 + 0 * far

    class Bias:
        def __call__(self, *arguments):
            return plain(*arguments)

        def method(self, *arguments):
            return plain(*arguments)

    def formula(s, b, h, i, j):
        return s / 2 - ((i - j) / 3).floor()

    partial = functools.partial(lambda x, *arguments: plain(*arguments), None)
    for score_mod in (plain, partial, Bias(), Bias().method):
        check(score_mod, formula)


@on_tensors
def test_constants_may_be_plain_numbers_here():
    """A GPU refuses them, in Triton's words."""
    factor = 0.5

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        return score * factor

    check(score_mod, lambda s, b, h, i, j: s / 2)


# -- what is refused ------------------------------------------------------------------------------


def refused(kind):
    @triton.jit
    def tiled(score, batch, head, q_idx, kv_idx):
        return score - tl.max(score, 1)

    @triton.jit
    def unknown(score, batch, head, q_idx, kv_idx):
        return libdevice.j0(score)

    @triton.jit
    def branching(score, batch, head, q_idx, kv_idx):
        if q_idx > kv_idx:
            score = score * 2.0
        return score

    @triton.jit
    def chained(score, batch, head, q_idx, kv_idx):
        return tl.where((q_idx > kv_idx) and (head > 0), score, 0.0)

    @triton.jit
    def asserting(score, batch, head, q_idx, kv_idx):
        tl.static_assert(HALF > 1, "too small")
        return score

    @triton.jit
    def nothing(score, batch, head, q_idx, kv_idx):
        score * 2.0

    return locals()[kind]


@on_tensors
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("tiled", AttributeError, r"^score_mod: tl\.max: expected an elementwise function, got"),
        ("unknown", AttributeError, r"^score_mod: libdevice\.j0: expected an elementwise"),
        ("branching", ValueError, r"^score_mod: condition: expected one value, got .*tl\.where"),
        ("chained", ValueError, r"^score_mod: condition: expected one value, got .* & and \|"),
        ("asserting", AssertionError, "^too small$"),
        ("nothing", TypeError, "^score_mod: result: expected a tensor or a number, got NoneType$"),
    ],
)
def test_refused(kind, error, message):
    with pytest.raises(error, match=message):
        attend(refused(kind))


@on_tensors
@pytest.mark.parametrize(("shift", "got"), [(-1, "-1 to 11"), (1, "1 to 13")])
def test_reads_nothing_outside_a_tensor(shift, got):
    """Where a GPU would read what is not the caller's."""
    SHIFT = tl.constexpr(shift)

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx, args):
        return score + tl.load(args[0] + kv_idx + SHIFT)

    message = rf"^score_mod: tl\.load: expected indices from 0 to 12, got {got} \(mask"
    with pytest.raises(IndexError, match=message):
        attend(score_mod, score_mod_args=(torch.zeros(SEQLEN_K),))


def test_two_helpers_of_one_name():
    """Triton calls functions by module and name, and takes the second for the first."""

    def make(factor):
        FACTOR = tl.constexpr(factor)

        @triton.jit
        def helper(x):
            return x * FACTOR

        return helper

    double, triple = make(2.0), make(3.0)

    @triton.jit
    def score_mod(score, batch, head, q_idx, kv_idx):
        return triple(score) - double(score)

    with pytest.raises(
        ValueError, match=r"^score_mod: helpers: expected a different name for each"
    ):
        attend(score_mod)


# -- the compiler ---------------------------------------------------------------------------------


@triton.jit
def kernel(x, SCORE_MOD: tl.constexpr):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    at = x + i * 16 + j
    score = SCORE_MOD(tl.load(at), tl.program_id(0), tl.program_id(1), i, j)
    tl.store(at, score + tl.zeros([16, 16], tl.float32))


@on_tensors
@every_factory
def test_compiles(factory):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    score_mod, _ = factory()
    given = {"x": "*fp32", "SCORE_MOD": "constexpr"}, {"SCORE_MOD": score_mod}, {}
    compiled = compile(ASTSource(kernel, *given), target=GPUTarget("cuda", 80, 32))
    assert "tt.store" in compiled.asm["ttir"]


def test_a_function_is_rebuilt_once():
    """However often it is reached, and by itself too."""
    score_mod, _ = functions_that_call_one_another()
    rebuilder = triton_on_cpu.Rebuilder()
    made = rebuilder.function(score_mod)
    assert rebuilder.function(score_mod) is made
    assert {f.__name__ for f in rebuilder.made.values()} == {"score_mod", "countdown", "count_on"}
