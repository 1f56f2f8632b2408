"""The stub files agree with the source and with what calls return, and mypy understands them."""

import ast
import inspect
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch

import mini_flash_attention as mfa
from mini_flash_attention import packed, settings

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mini_flash_attention"
STUBS = ["api", "packed"]

# The argument that decides what a call returns, as each overload has it.
FLAGS = {"return_attn_probs", "return_softmax_lse"}
OVERLOADS = ["Literal[False] = False", "Literal[True] = ...", "bool = False"]


# -- the stubs and the source ---------------------------------------------------------------------


def functions(path):
    """The public functions of a file: name -> definitions."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
            found.setdefault(node.name, []).append(node)
    return found


def aliases(path):
    return [ast.unparse(n) for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign)]


def without_flag(function):
    """("annotation = default" of the flag, the other arguments)."""
    arguments = function.args
    names = [a.arg for a in arguments.args]
    (flag,) = FLAGS & set(names)
    place = names.index(flag)
    default = place - len(names)  # the last argument has the last default
    found = f"{ast.unparse(arguments.args[place].annotation)} = "
    found += ast.unparse(arguments.defaults[default])
    arguments.args[place].annotation, arguments.defaults[default] = None, ast.Constant(None)
    return found, ast.unparse(arguments)


@pytest.mark.parametrize("module", STUBS)
def test_a_stub_differs_from_its_source_in_the_flag_alone(module):
    source, stub = PACKAGE / f"{module}.py", PACKAGE / f"{module}.pyi"
    assert aliases(stub) == aliases(source)
    source, stub = functions(source), functions(stub)
    assert stub.keys() == source.keys()
    for name, (function,) in source.items():
        if len(stub[name]) == 1:
            (only,) = stub[name]
            assert ast.unparse(only.args) == ast.unparse(function.args)
            assert ast.unparse(only.returns) == ast.unparse(function.returns)
            continue
        flag, others = without_flag(function)
        assert flag == "bool = False"
        assert [without_flag(overload) for overload in stub[name]] == [
            (flag, others) for flag in OVERLOADS
        ]


def test_stubs_are_known_and_as_short_as_modules():
    files = {path.stem: path for path in PACKAGE.rglob("*.pyi")}
    assert files.keys() == set(STUBS)
    assert max(len(path.read_text().splitlines()) for path in files.values()) <= 350


# -- what calls return ----------------------------------------------------------------------------

TENSORS = """
import torch
from torch import Tensor

import mini_flash_attention as mfa

x = torch.ones(2, 3, 2, 16)
y = torch.ones(6, 2, 16)
qkv, kv = torch.stack((x, x, x), 2), torch.stack((x, x), 2)
packed_qkv, packed_kv = torch.stack((y, y, y), 1), torch.stack((y, y), 1)
starts = torch.tensor([0, 3, 6], dtype=torch.int32)
used = torch.tensor([3, 2], dtype=torch.int32)
longest = torch.tensor(3)
unknown = bool(x.any())
widths = [1, 2]
three, texts = (1, 2, 3), ["1", "2"]
"""
REQUIRED = {
    "flash_attn_func": "x, x, x",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_kvpacked_func": "x, kv",
    "flash_attn_varlen_func": "y, y, y, starts, starts, 3, longest",
    "flash_attn_varlen_qkvpacked_func": "packed_qkv, starts, longest",
    "flash_attn_varlen_kvpacked_func": "y, packed_kv, starts, starts, longest, 3",
    "flash_attn_with_kvcache": "x, x, x",
}
WINDOWS = [
    "(1, 2)", "(1, None)", "(None, None)", "[1, 2]", "[1, None]", "[None, None]", "widths",
    "torch.tensor([1, 2])",
]  # fmt: skip
# Keywords that not all functions have.
VARLEN = "seqused_q=used, seqused_k=used, num_splits=1"
MORE = {
    "flash_attn_func": ["learnable_sink=torch.ones(2), score_mod=lambda score, *_: score"],
    "flash_attn_qkvpacked_func": ["s_aux=torch.ones(2), out=torch.empty_like(x)"],
    "flash_attn_kvpacked_func": ["score_mod=lambda score, *_: score, score_mod_args=(x,)"],
    "flash_attn_varlen_func": [VARLEN, "block_table=None, page_table=None"],
    "flash_attn_varlen_qkvpacked_func": [VARLEN, "out=torch.empty_like(y)"],
    "flash_attn_varlen_kvpacked_func": [VARLEN, "s_aux=torch.ones(2)"],
    "flash_attn_with_kvcache": ["cache_seqlens=3, fixed_split_size=64", "cache_seqlens=used"],
}


def by_position(name, value):
    """The arguments of a call that reaches the flag by position."""
    parameters = list(inspect.signature(getattr(mfa, name)).parameters.values())
    (place,) = (n for n, p in enumerate(parameters) if p.name in FLAGS)
    required = REQUIRED[name].split(", ")
    defaults = [repr(p.default) for p in parameters[len(required) : place]]
    return ", ".join([*required, *defaults, value])


def calls():
    """(source of a call, source of the type of its result)."""
    for name, required in REQUIRED.items():
        cached = name == "flash_attn_with_kvcache"
        flag = "return_softmax_lse" if cached else "return_attn_probs"
        more = "tuple[Tensor, Tensor]" if cached else "tuple[Tensor, Tensor, None]"
        results = {"False": "Tensor", "True": more, "unknown": f"Tensor | {more}"}
        yield f"mfa.{name}({required})", "Tensor"
        for value, result in results.items():
            yield f"mfa.{name}({required}, causal=True, {flag}={value}, softcap=1.0)", result
            yield f"mfa.{name}({by_position(name, value)})", result
            yield f"mfa.{name}({by_position(name, value)}, s_aux=None)", result
            for keywords in MORE[name]:
                yield f"mfa.{name}({required}, {flag}={value}, {keywords})", result
        for window in WINDOWS:
            yield f"mfa.{name}({required}, window_size={window})", "Tensor"
            yield f"mfa.{name}({required}, window_size={window}, {flag}=True)", more
    whole = "mfa.flash_attn_func(x, x, x, return_attn_probs=True)[:2]"
    yield f"mfa.merge_attention_states(*{whole}, *{whole})", "tuple[Tensor, Tensor]"


TYPED = "\n".join(f"assert_type({call}, {result})" for call, result in calls())
REFUSED = """
mfa.flash_attn_func(x, x)  # type: ignore[call-overload]
mfa.flash_attn_func(x, x, x, window_size=1)  # type: ignore[call-overload]
mfa.flash_attn_func(x, x, x, window_size=three)  # type: ignore[arg-type]
mfa.flash_attn_func(x, x, x, window_size=texts)  # type: ignore[arg-type]
mfa.flash_attn_func(x, x, x, score_mod="unchanged")  # type: ignore[call-overload]
mfa.flash_attn_func(x, x, x, num_splits=2)  # type: ignore[call-overload]
mfa.flash_attn_func(x, x, x, return_attn_probs="yes")  # type: ignore[call-overload]
mfa.flash_attn_func(x, x, x, return_attn_probs=True).shape  # type: ignore[attr-defined]
mfa.flash_attn_func(x, x, x, return_attn_probs=unknown).shape  # type: ignore[union-attr]
a, b = mfa.flash_attn_func(x, x, x, return_attn_probs=True)  # type: ignore[misc]
mfa.flash_attn_qkvpacked_func(qkv, num_splits=2)  # type: ignore[call-overload]
mfa.flash_attn_kvpacked_func(x, kv, block_table=used)  # type: ignore[call-overload]
mfa.flash_attn_varlen_func(y, y, y, starts, starts)  # type: ignore[call-overload]
mfa.flash_attn_varlen_qkvpacked_func(qkv, starts, 3, page_table=used)  # type: ignore[call-overload]
mfa.flash_attn_varlen_kvpacked_func(y, kv, starts, None, 3, 3)  # type: ignore[call-overload]
mfa.flash_attn_with_kvcache(x, x, x, return_attn_probs=True)  # type: ignore[call-overload]
mfa.flash_attn_with_kvcache(x, x, x, cache_seqlens=[3, 2])  # type: ignore[call-overload]
c, d, e = mfa.flash_attn_with_kvcache(x, x, x, return_softmax_lse=True)  # type: ignore[misc]
"""


def fits(x, wanted):
    """Whether x is of a type that `calls` names."""
    parts = typing.get_args(wanted)
    if isinstance(wanted, types.UnionType):
        return any(fits(x, part) for part in parts)
    if typing.get_origin(wanted) is tuple:
        return type(x) is tuple and len(x) == len(parts) and all(map(fits, x, parts))
    return x is None if wanted is None else isinstance(x, wanted)


@pytest.mark.skipif(settings.INTERPRETED, reason="kernels take no undecorated score_mod")
def test_calls_return_what_their_types_say():
    scope = {}
    exec(TENSORS, scope)
    for call, result in calls():
        assert fits(eval(call, scope), eval(result, scope)), call
    assert not fits(torch.ones(1), tuple[torch.Tensor, torch.Tensor])
    assert not fits((torch.ones(1), None), tuple[torch.Tensor, torch.Tensor])


# -- what the packed functions do with their arguments --------------------------------------------


@pytest.mark.parametrize("name", [name for name in REQUIRED if "packed" in name])
def test_packed_functions_pass_every_argument_on(name, monkeypatch):
    other = "flash_attn_varlen_func" if "varlen" in name else "flash_attn_func"
    signature = inspect.signature(getattr(mfa, other))
    passed = {}
    monkeypatch.setattr(
        packed, other, lambda *a, **k: passed.update(signature.bind(*a, **k).arguments)
    )
    outer = (6,) if "varlen" in name else (2, 3)
    tensors = {"q": (2, 16), "qkv": (3, 2, 16), "kv": (2, 2, 16)}
    names = list(inspect.signature(getattr(mfa, name)).parameters)
    given = {n: torch.ones(*outer, *tensors[n]) if n in tensors else object() for n in names}
    getattr(mfa, name)(**given)
    missing = {"block_table", "page_table"} if "varlen" in name else set()
    assert signature.parameters.keys() - passed.keys() == missing
    for argument, value in passed.items():
        if argument in ("q", "k", "v"):
            assert value.shape == (*outer, 2, 16)
        else:  # one length and one offsets tensor may be those of queries and keys both
            short = argument.removesuffix("_q").removesuffix("_k")
            assert value is given.pop(argument, given.get(short)), argument
    left = given.keys() - tensors.keys()
    assert left == ({"cu_seqlens", "max_seqlen"} if "varlen_qkv" in name else set())


# -- what mypy says -------------------------------------------------------------------------------


def mypy(*arguments, module="mypy"):
    """(exit status, what it prints), with the project's configuration."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_infers_the_types_and_refuses_what_does_not_fit(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"from typing_extensions import assert_type\n{TENSORS}{TYPED}{REFUSED}")
    status, printed = mypy(program)
    assert (status, printed) == (0, "Success: no issues found in 1 source file\n"), printed
    # An import that is not followed would make everything Any: a wrong type is found.
    program.write_text(f"{TENSORS}wrong: str = mfa.flash_attn_func(x, x, x)\n")
    status, printed = mypy(program)
    assert status == 1 and 'expression has type "Tensor"' in printed


@pytest.mark.slow
def test_mypy_checks_the_source_beside_the_stubs():
    """Of a module that has a stub file, mypy reads the source only if the source is named."""
    status, printed = mypy(*(PACKAGE / f"{module}.py" for module in STUBS))
    assert (status, printed) == (0, "Success: no issues found in 2 source files\n"), printed


@pytest.mark.slow
def test_stubtest_finds_stubs_and_modules_alike():
    modules = [f"mini_flash_attention.{module}" for module in STUBS]
    options = ["--concise", "--mypy-config-file", "pyproject.toml"]
    status, printed = mypy(*modules, *options, module="mypy.stubtest")
    assert (status, printed) == (0, ""), printed
