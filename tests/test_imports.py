"""Which way the imports point, what importing costs and needs, and the public surface."""

import ast
import graphlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mini_flash_attention

PACKAGE = "mini_flash_attention"
ROOT = Path(mini_flash_attention.__file__).parent

# Who may import what, from the public functions down to the rules. A name that ends in a dot
# stands for every module of that folder.
ARROWS = {
    "": {"api", "api_backward", "packed"},
    "__main__": {"", "plan.", "reference", "settings"},
    "integrations": set(),
    "integrations.flash_attn": {"", "integrations.flash_attn.", "validate"},
    "integrations.flash_attn.": {
        "",
        "api",
        "integrations.flash_attn.",
        "validate",
        "validate.tensors",
    },
    "integrations.torch": {"", "problem", "validate"},
    "integrations.transformers": {"api", "validate"},
    "packed": {"api", "validate", "validate.tensors"},
    "api": {"dispatch", "entries", "validate.options"},
    "api_backward": {"api", "dispatch", "entries"},
    "dispatch": {
        "autograd",
        "entries",
        "execution",
        "execution_backward",
        "ops",
        "ops_backward",
        "recipes",
        "training",
        "validate.options",
    },
    "ops": {
        "entries",
        "execution",
        "execution_backward",
        "problem",
        "recipes",
        "validate.backward",
    },
    "autograd": {"entries", "execution", "execution_backward", "recipes", "validate.backward"},
    "execution_backward": {
        "cpu_backward",
        "entries",
        "execution",
        "kernels.backward",
        "plan.backward",
        "plan.gpu",
        "problem",
        "recipes",
        "settings",
        "validate.",
    },
    "execution": {
        "cpu",
        "device_checks",
        "entries",
        "plan.gpu",
        "problem",
        "recipes",
        "settings",
        "validate.",
    },
    "recipes": {
        "entries",
        "kernels.",
        "plan.gpu",
        "problem",
        "settings",
        "training",
        "triton_on_cpu",
        "validate",
        "validate.tensors",
    },
    "entries": {"problem", "validate.backward", "validate.calls"},
    "validate": set(),
    "validate.": {"problem", "rules.window", "validate", "validate."},
    "device_checks": {"problem", "settings", "validate"},
    "cpu_backward": {"cpu", "plan.backward", "problem", "rules.window", "training"},
    "cpu": {"problem", "rules.window", "training", "triton_on_cpu", "validate.memory"},
    "triton_on_cpu": {"validate"},
    "plan": {"plan.", "problem"},
    "plan.": {"plan", "plan.", "problem", "rules.window", "settings"},
    "problem": {"rules.window"},
    "settings": {"validate"},
    "reference": set(),
    "kernels": set(),
    "kernels.attention": {
        "kernels.cache.",
        "kernels.decode.",
        "kernels.hopper.",
        "kernels.launch",
        "kernels.portable.",
        "plan",
        "plan.",
        "problem",
        "settings",
    },
    "kernels.backward": {
        "kernels.hopper.",
        "kernels.launch",
        "kernels.portable.",
        "plan.",
        "problem",
        "settings",
    },
    "kernels.gluon": set(),
    "kernels.launch": {"plan.layout", "problem", "settings", "validate.memory"},
    "kernels.tma": {"kernels.gluon", "kernels.launch", "plan.layout"},
    "kernels.workspace": set(),
    "kernels.portable": set(),
    "kernels.portable.": {"kernels.launch", "kernels.portable.", "plan.", "problem", "rules."},
    "kernels.decode": set(),
    "kernels.decode.": {
        "kernels.decode.",
        "kernels.launch",
        "kernels.portable.",
        "plan.",
        "problem",
        "rules.",
    },
    "kernels.cache": set(),
    "kernels.cache.": {"kernels.launch", "plan.", "problem", "rules."},
    "kernels.hopper": set(),
    "kernels.hopper.": {
        "kernels.gluon",
        "kernels.hopper.",
        "kernels.launch",
        "kernels.tma",
        "plan.",
        "problem",
        "rules.",
    },
    "kernels.hopper.backward": {
        "kernels.gluon",
        "kernels.hopper.",
        "kernels.launch",
        "kernels.portable.backward_preprocess",
        "kernels.tma",
        "plan.",
        "problem",
        "rules.",
    },
    "rules": set(),
    "rules.": {"rules."},
    "rules.scores": {"settings"},
    "training": {"problem", "validate.tensors"},
    "ops_backward": {"autograd", "entries", "execution_backward", "ops", "problem"},
}
# And from outside, beside the standard library.
OUTSIDE = {
    "rules.": {"triton"},
    "rules.window": set(),
    "kernels.": {"torch", "triton"},
    "kernels.portable.": {"torch", "triton"},
    "kernels.decode.": {"torch", "triton"},
    "kernels.cache.": {"torch", "triton"},
    "kernels.hopper.": {"torch", "triton"},
    "settings": {"triton"},
    "integrations.transformers": {"torch", "transformers"},
}
# Triton may be missing, so it is imported no earlier than a kernel is wanted.
NEEDS_TRITON = {
    "rules.",
    *(f"kernels.{x}" for x in ("", "portable.", "decode.", "cache.", "hopper.")),
}
# Operators are defined for whoever traces a call, a torch.autograd.Function for who differentiates,
# kernels imported by who launches one, a library by who registers with it.
LATE = {
    ("dispatch", f"{PACKAGE}.autograd"),
    ("dispatch", f"{PACKAGE}.ops"),
    ("execution_backward", f"{PACKAGE}.kernels.backward"),
    ("recipes", f"{PACKAGE}.kernels.attention"),
    ("integrations.transformers", "transformers"),
}


def modules():
    """Dotted name below the package -> path; a package goes by its folder's name."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def row_of(name, table):
    """The row of a table that holds for this module, by its own name or its folder's."""
    folder = name.rpartition(".")[0] + "."
    return name if name in table or folder not in table else folder


def imports(source, name, is_package):
    """(module, imported as the file is) of each import; ours as names below the package."""
    tree = ast.parse(source)
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    here = [PACKAGE, *filter(None, name.split("."))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = len(here) - node.level + is_package if node.level else 0
            base = ".".join([*here[:up], *filter(None, [node.module])])
            # `from ..rules import mask` imports a module, `from .launch import strides` does not.
            below = [f"{base}.{alias.name}" for alias in node.names]
            found = [m if m.removeprefix(f"{PACKAGE}.") in MODULES else base for m in below]
        else:
            continue
        yield from ((module, node not in inside) for module in found)


def test_the_scanner_sees_every_form():
    source = """
import torch.nn.functional as F
from . import stream_k, nothing
from ...rules import mask as m, tile_order
from ...problem import Problem
from ... import plan
from mini_flash_attention.validate import invalid
def late():
    import triton
"""
    found = dict(imports(source, "kernels.decode.decode", is_package=False))
    ours = [
        "kernels.decode.stream_k",
        "kernels.decode",
        "rules.mask",
        "rules.tile_order",
        "problem",
    ]
    expected = {f"{PACKAGE}.{name}": True for name in [*ours, "plan", "validate"]}
    assert found == expected | {"torch.nn.functional": True, "triton": False}
    found = dict(imports("from . import api\nfrom .plan import x", "", is_package=True))
    assert found == {f"{PACKAGE}.api": True, f"{PACKAGE}.plan": True}


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name):
    row = row_of(name, ARROWS)
    assert row in ARROWS, f"{name}.py is new: say in ARROWS what it may import"
    allowed = ARROWS[row]
    outside = OUTSIDE.get(row_of(name, OUTSIDE), {"torch"}) | sys.stdlib_module_names
    path = MODULES[name]
    for module, early in imports(path.read_text(), name, path.name == "__init__.py"):
        if module == PACKAGE or module.startswith(f"{PACKAGE}."):
            ours = module.removeprefix(PACKAGE).removeprefix(".")
            known = ours in allowed or row_of(ours, allowed) in allowed
            # `from .kernels import forward` passes through the folder.
            assert known or f"{ours}." in allowed, f"{name} imports {ours}"
        else:
            top = module.partition(".")[0]
            assert top in outside, f"{name} imports {module}"
            if early and top == "triton":
                assert row_of(name, NEEDS_TRITON) in NEEDS_TRITON, f"{name} imports it at once"
        assert not early or (name, module) not in LATE, f"{name} imports {module} at once"


def test_no_imports_in_a_circle():
    """Nor late ones: each file can be read before those that import it."""
    ours = {
        name: {
            module.removeprefix(f"{PACKAGE}.")
            for module, _ in imports(path.read_text(), name, path.name == "__init__.py")
            if module.startswith(f"{PACKAGE}.") and module.removeprefix(f"{PACKAGE}.") in MODULES
        }
        - {name}
        for name, path in MODULES.items()
    }
    # A folder's own file stands for it: `from . import decode` inside plan/ means decode.
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graphlib.TopologicalSorter(
        {name: found - folders if name not in folders else found for name, found in ours.items()}
    ).prepare()


def test_every_arrow_leads_somewhere():
    """A table that names modules which are gone would allow what nobody decided."""
    named = set(ARROWS).union(*ARROWS.values(), OUTSIDE)
    for name in named:
        assert name.removesuffix(".") in MODULES, name


# -- importing, in a fresh process ----------------------------------------------------------------

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "transformers"):
            raise ImportError(f"blocked: {name}")

sys.meta_path.insert(0, Block())
"""

TRY_ALL = """
import sys, time, torch
start = time.perf_counter()
import mini_flash_attention as mfa
seconds = time.perf_counter() - start

def tokens(*shape):
    return torch.ones(*shape, 16)

def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)

outs = [
    mfa.flash_attn_func(tokens(2, 3, 4), tokens(2, 5, 2), tokens(2, 5, 2), causal=True),
    mfa.flash_attn_varlen_func(
        tokens(5, 4), tokens(7, 2), tokens(7, 2), ints(0, 2, 5), ints(0, 3, 7), 3, 4
    ),
    mfa.flash_attn_varlen_func(
        tokens(5, 4), tokens(6, 4, 2), tokens(6, 4, 2), ints(0, 2, 5), ints(0, 3, 7), 3, 4,
        block_table=ints(0, 1, 2, 3).view(2, 2),
    ),
    mfa.flash_attn_with_kvcache(
        tokens(2, 1, 4), tokens(2, 8, 2), tokens(2, 8, 2), tokens(2, 1, 2), tokens(2, 1, 2),
        cache_seqlens=ints(3, 7),
    ),
]

def add_nothing(score, batch, head, q_idx, kv_idx, args):
    return score + 0 * args[0].memory.sum()

more = {"softcap": 5.0, "alibi_slopes": torch.ones(4), "score_mod": add_nothing}
more["score_mod_args"] = (torch.ones(2),)
halves = [
    mfa.flash_attn_func(tokens(2, 3, 4), *[tokens(2, 5, 2)] * 2, return_attn_probs=True, **more)[:2]
    for _ in range(2)
]
outs += [
    mfa.flash_attn_qkvpacked_func(tokens(2, 5, 3, 4), **more),
    mfa.flash_attn_kvpacked_func(tokens(2, 3, 4), tokens(2, 5, 2, 2), window_size=(2, 2), **more),
    mfa.flash_attn_varlen_qkvpacked_func(tokens(5, 3, 4), ints(0, 2, 5), 3, **more),
    mfa.flash_attn_varlen_kvpacked_func(
        tokens(5, 4), tokens(7, 2, 2), ints(0, 2, 5), ints(0, 3, 7), 3, 4, num_splits=2, **more
    ),
    mfa.flash_attn_with_kvcache(
        tokens(5, 4), tokens(3, 8, 2), tokens(3, 8, 2), tokens(5, 2), tokens(5, 2),
        torch.ones(8, 4), torch.zeros(8, 4), ints(3, 1), cu_seqlens_q=ints(0, 2, 5),
        max_seqlen_q=3, cache_batch_idx=ints(2, 0), cache_leftpad=ints(1, 0), **more,
    ),
    mfa.merge_attention_states(*halves[0], *halves[1])[0],
]
assert all((out - 1).abs().max() < 1e-6 for out in outs), outs

more["score_mod_bwd"] = lambda grad, score, batch, head, q_idx, kv_idx, args: grad
q, k, v = tokens(2, 3, 4), tokens(2, 5, 2), tokens(2, 5, 2)
given = [x.requires_grad_() for x in (q, k, v)]
dq, dk, dv = torch.autograd.grad(mfa.flash_attn_func(*given, **more).sum(), given)
assert dq.shape == q.shape and (dv.sum(1) - 6).abs().max() < 1e-5, (dq, dk, dv)
assert "mini_flash_attention.ops" not in sys.modules, "plain calls do without operators"
assert not torch.cuda.is_initialized()
"""


def fresh(code):
    """What a new process prints, on a machine without a GPU as far as it can tell."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_triton_and_transformers():
    for name in ("triton", "transformers"):
        blocked = f"try:\n    import {name}\nexcept ImportError as e:\n    print(e)\n"
        assert fresh(BLOCK + blocked).strip() == f"blocked: {name}"
    fresh(BLOCK + TRY_ALL)


def test_importing_is_quick_and_cpu_tensors_need_no_triton():
    """Beside `import torch`: under 0.3 s, at the best of three tries on a machine that is busy.

    Triton alone takes a second, where there is one, and nobody asked for it.
    """
    unasked = "print(seconds, {'triton', 'transformers'} & set(sys.modules) or 'none')"
    for _ in range(3):
        seconds, imported = fresh(TRY_ALL + unasked).split(maxsplit=1)
        assert imported.strip() == "none"
        if float(seconds) < 0.3:
            return
    pytest.fail(f"the import took {seconds} s")


# -- the public surface ---------------------------------------------------------------------------

# Order, names and defaults are flash-attn 2.8's; what goes beyond it follows the star.
CONTRACT = """
def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, *, s_aux=None,
    learnable_sink=None, score_mod=None, score_mod_args=(), score_mod_bwd=None, out=None,
): ...

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None, *, seqused_q=None,
    seqused_k=None, s_aux=None, page_table=None, learnable_sink=None, score_mod=None,
    score_mod_args=(), score_mod_bwd=None, num_splits=0, out=None,
): ...

def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False, *, cu_seqlens_q=None, max_seqlen_q=None, s_aux=None, page_table=None,
    learnable_sink=None, score_mod=None, score_mod_args=(), fixed_split_size=None, out=None,
): ...

def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, *, s_aux=None,
    learnable_sink=None, score_mod=None, score_mod_args=(), score_mod_bwd=None, out=None,
): ...

def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, *, s_aux=None,
    learnable_sink=None, score_mod=None, score_mod_args=(), score_mod_bwd=None, out=None,
): ...

def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, *, seqused_q=None, seqused_k=None, s_aux=None,
    learnable_sink=None, score_mod=None, score_mod_args=(), score_mod_bwd=None, num_splits=0,
    out=None,
): ...

def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, *, seqused_q=None, seqused_k=None, s_aux=None,
    learnable_sink=None, score_mod=None, score_mod_args=(), score_mod_bwd=None, num_splits=0,
    out=None,
): ...

def merge_attention_states(out_a, lse_a, out_b, lse_b): ...

def backward(
    dout, q, k, v, out, softmax_lse, *, dsoftmax_lse=None, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    score_mod=None, score_mod_args=(), score_mod_bwd=None, dq=None, dk=None, dv=None,
): ...
"""


# One length and one offsets tensor, of queries and keys both.
SHORT_FORMS = {"cu_seqlens", "max_seqlen"}


def contract():
    scope = {}
    exec(CONTRACT, scope)
    return {name: f for name, f in scope.items() if inspect.isfunction(f)}


def form(function):
    """Name, kind and default of each parameter; 0 and 0.0, False and 0 are told apart."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, repr(p.default)) for p in parameters]


@pytest.mark.parametrize("name", contract())
def test_signature(name):
    function = getattr(mini_flash_attention, name)
    assert form(function) == form(contract()[name])
    # Each says what it takes beyond the function it refers to.
    others = ["flash_attn_func"]
    if re.search("varlen|kvcache|backward", name):
        others.append("flash_attn_varlen_func")
    documented = [inspect.getdoc(function)]
    if name not in ("flash_attn_func", "merge_attention_states"):
        documented += [inspect.getdoc(getattr(mini_flash_attention, other)) for other in others]
    words = set(re.findall(r"\w+", " ".join(documented)))
    missing = inspect.signature(function).parameters.keys() - words - SHORT_FORMS
    assert not missing, "every argument is explained somewhere"


def test_public_names():
    public = {n for n, x in vars(mini_flash_attention).items() if callable(x) and n[0] != "_"}
    assert public == set(mini_flash_attention.__all__) == set(contract())
    assert all(getattr(mini_flash_attention, n).__doc__ for n in public)
    assert mini_flash_attention.__version__
