"""Tensors whose class only stands for data that lies elsewhere: no kernel gets their address.

On a GPU each of these calls would read at address 0 and lose the process its card.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from calls import CALLS, contents, unwritten
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import mini_flash_attention as mfa
from mini_flash_attention import recipes, settings


class Wrapper(torch.Tensor):
    """As DTensor and the quantised classes are made: with sizes, and nothing behind them."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(
            cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device
        )

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} ran on a tensor without memory")


class Plain(torch.Tensor):
    """A subclass that has memory, as Parameter has."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fake(x):
    with FakeTensorMode():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def arguments_of(call):
    function, arguments = call()
    per_head = {name: torch.rand(4) for name in ("alibi_slopes", "s_aux")}
    aux = (torch.rand(3),)
    mod = {"score_mod": lambda s, b, h, i, j, args: s, "score_mod_args": aux}
    if "cu_seqlens_k" in arguments:
        per_head["seqused_q"] = torch.tensor([1, 2], dtype=torch.int32)
        per_head["seqused_k"] = torch.tensor([1, 2], dtype=torch.int32)
    return function, arguments | per_head | mod | {"out": torch.zeros_like(arguments["q"])}


TENSORS = [
    pytest.param(call, name, id=f"{call.__name__}-{name}")
    for call in CALLS
    for name, x in arguments_of(call)[1].items()
    if isinstance(x, (torch.Tensor, tuple))
]


def check_refused(call, name, convert, kind):
    function, arguments = arguments_of(call)
    x = arguments[name]
    arguments[name] = (convert(x[0]),) if isinstance(x, tuple) else convert(x)
    before = contents({k: v for k, v in arguments.items() if k != name})
    with pytest.raises(TypeError) as caught:
        function(**arguments)
    text = str(caught.value)
    wanted = f"{function.__name__}: {name}: expected a tensor with memory of its own, got "
    assert text.startswith(wanted) and f"{kind} (" in text and ".to_local()" in text, text
    assert unwritten(before, {k: v for k, v in arguments.items() if k != name})


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_wrappers(call, name):
    check_refused(call, name, Wrapper, "Wrapper")


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_fake_tensors_after_their_mode(call, name):
    check_refused(call, name, fake, "FakeTensor")


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_distributed_tensors(call, name, mesh):
    def convert(x):
        return distribute_tensor(x, mesh, [Replicate()])

    check_refused(call, name, convert, "DTensor")


def test_local_tensors_work(mesh):
    q = torch.randn(1, 5, 2, 16)
    local = distribute_tensor(q, mesh, [Replicate()]).to_local()
    assert torch.equal(mfa.flash_attn_func(local, local, local), mfa.flash_attn_func(q, q, q))


def test_freed_memory():
    """As a sharded parameter's, between two uses."""
    q = torch.randn(1, 5, 2, 16)
    q.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"flash_attn_func: q: .*got torch\.Tensor"):
        mfa.flash_attn_func(q, q, q)


def test_memory_freed_after_the_call_was_remembered():
    launch = pytest.importorskip("mini_flash_attention.kernels.launch")
    q = torch.randn(1, 5, 2, 16)
    made = launch.Launch(SimpleNamespace(__name__="kernel"), 1, ("q",), (), 4)
    assert made.addresses({"q": q})[0] == [q.data_ptr()]
    assert made.addresses({"q": q[:0]})[0] == [0], "an empty tensor has nothing to read"
    q.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"q: expected a tensor with memory of its own"):
        made.addresses({"q": q})


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer, Plain])
@torch.no_grad()
def test_classes_that_have_memory_work(kind):
    q = torch.randn(1, 5, 2, 16)
    x = q.as_subclass(kind) if kind is Plain else kind(q)
    torch.testing.assert_close(
        mfa.flash_attn_func(x, x, x).as_subclass(torch.Tensor), mfa.flash_attn_func(q, q, q)
    )


def test_a_call_that_is_remembered_looks_again(monkeypatch):
    """Two tensors of a class may differ in whether they have memory."""

    class Either(Wrapper):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            with torch._C._DisableTorchDispatch():
                return function(*args, **(kwargs or {}))

    monkeypatch.setattr(settings, "INTERPRETED", True)
    monkeypatch.setattr(settings, "require_triton", lambda: None)  # as Triton's switch is not set
    monkeypatch.setattr(recipes, "_recipes", {})
    monkeypatch.setattr(recipes, "make", recipe_without_launches(recipes.make))
    q = torch.randn(1, 5, 2, 16)
    mfa.flash_attn_func(q.as_subclass(Either), q, q)
    assert len(recipes._recipes) == 1
    with pytest.raises(TypeError, match=r"memory of its own, got .*Either"):
        mfa.flash_attn_func(Either(q), q, q)
    mfa.flash_attn_func(q, q, q)
    plain = [recipe for recipe in recipes._recipes.values() if not recipe.subclassed]
    assert len(plain) == 1, "a plain call is not to pay for it"


def recipe_without_launches(original):
    def made(entry, p, arguments):
        return original(entry, p, arguments)._replace(launches=[])

    return made
