"""flash-attn's modules and FlashAttention-3's: what imports, and that it computes the same."""

import copy
import importlib
import importlib.metadata
import importlib.util
import inspect
import pickle
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from cases import ints

import mini_flash_attention as mfa
from mini_flash_attention import reference
from mini_flash_attention.integrations import flash_attn as stand_in
from mini_flash_attention.integrations.flash_attn import (
    bert_padding,
    interface2,
    interface3,
    losses,
    private,
    rotary,
    rotary_embedding,
)

SENTENCE = "mini_flash_attention stands in for flash_attn"


def ours(name):
    return name.partition(".")[0] in ("flash_attn", "flash_attn_interface")


@pytest.fixture
def flash_attn(monkeypatch):
    """The stand-in, whatever was imported before."""
    for name in filter(ours, list(sys.modules)):
        monkeypatch.delitem(sys.modules, name)
    yield stand_in.install()
    stand_in.uninstall()


# -- names and signatures -------------------------------------------------------------------------

# flash-attn 2.8.3's, FlashAttention-3's, and flash-attn 1.0.9's where it says unpadded.
TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
    " alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
FUNCTIONS = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {TAIL}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,"
        " cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,"
        " softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
        " rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}
# Without defaults, as they are there.
MEANING = "softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes"
PRIVATE = {
    "flash_attn_forward": f"q, k, v, dropout_p, {MEANING}, return_softmax",
    "flash_attn_varlen_forward": (
        f"q, k, v, {LENGTHS}, dropout_p, softmax_scale, causal, window_size_left=-1,"
        " window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,"
        " block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False"
    ),
    "flash_attn_backward": (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, {MEANING}, deterministic,"
        " rng_state=None"
    ),
    "flash_attn_varlen_backward": (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {LENGTHS}, dropout_p, {MEANING},"
        " deterministic, rng_state=None, zero_tensors=False"
    ),
}
UNPADDED = (
    "dropout_p, softmax_scale=None, causal=False, return_attn_probs=False, deterministic=False"
)
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
MIDDLE = f"{DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0"
LAST = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
SPLITS = "num_splits=0, pack_gqa=None, sm_margin=0"
CROSS_ENTROPY = (
    "label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, ignore_index=-100,"
    " inplace_backward=False, process_group=None"
)
SIGNATURES = {
    "flash_attn": FUNCTIONS,
    "flash_attn.flash_attn_interface": FUNCTIONS
    | {
        "flash_attn_unpadded_func": f"q, k, v, {LENGTHS}, {UNPADDED}",
        "flash_attn_unpadded_kvpacked_func": f"q, kv, {LENGTHS}, {UNPADDED}",
        "flash_attn_unpadded_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {UNPADDED}",
        "maybe_contiguous": "x",
        "round_multiple": "x, m",
        **{f"{before}_{name}": x for name, x in PRIVATE.items() for before in ("", "_wrapped")},
    },
    "flash_attn.bert_padding": {
        "index_first_axis": "input, indices",
        "index_first_axis_residual": "input, indices",
        "index_put_first_axis": "values, indices, first_axis_dim",
        "pad_input": "hidden_states, indices, batch, seqlen",
        "unpad_input": "hidden_states, attention_mask, unused_mask=None",
        "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    },
    "flash_attn.layers.rotary": {
        "apply_rotary": (
            "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False,"
            " inplace=False, conjugate=False"
        ),
        "apply_rotary_emb": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,"
            " max_seqlen=None"
        ),
        "apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
        "apply_rotary_emb_qkv_": (
            "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0,"
            " num_heads_q=None"
        ),
        "apply_rotary_emb_torch": "x, cos, sin, interleaved=False",
        "RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
        "RotaryEmbedding.forward": (
            "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None"
        ),
    },
    "flash_attn.losses.cross_entropy": {
        "CrossEntropyLoss": (
            "ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0,"
            " lse_square_scale=0.0, inplace_backward=False, process_group=None,"
            " return_z_loss=False"
        ),
        "CrossEntropyLoss.forward": "self, input, target, precomputed_lse=None",
    },
    "flash_attn.ops.triton.cross_entropy": {
        "cross_entropy_loss": f"logits, labels, precomputed_lse=None, {CROSS_ENTROPY}",
    },
    "flash_attn_interface": {
        "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
        "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, qv=None, {MIDDLE}, {LAST}",
        "flash_attn_qkvpacked_func": (
            f"qkv, softmax_scale=None, causal=False, {MIDDLE}, deterministic=False,"
            " num_heads_q=None, sm_margin=0, return_attn_probs=False"
        ),
        "flash_attn_varlen_func": (
            f"q, k, v, {LENGTHS}, seqused_q=None, seqused_k=None, softmax_scale=None,"
            f" causal=False, qv=None, {MIDDLE}, {LAST}"
        ),
        "flash_attn_with_kvcache": (
            "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,"
            " cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,"
            " cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,"
            f" {DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1),"
            " attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,"
            f" {SPLITS}, return_softmax_lse=False"
        ),
        "get_scheduler_metadata": (
            "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim,"
            " cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None,"
            " cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0,"
            f" causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, {SPLITS}"
        ),
    },
}


def parameters(function):
    return [
        (p.name, p.kind.name, repr(p.default))
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, table in SIGNATURES.items() for name in table]
)
def test_signatures_are_the_official_ones(flash_attn, module, name):
    official = parameters(eval(f"lambda {SIGNATURES[module][name]}: None"))
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    found = parameters(function)
    assert found[: len(official)] == official
    assert {kind for _, kind, _ in found[len(official) :]} <= {"KEYWORD_ONLY", "VAR_KEYWORD"}
    assert function.__doc__


def test_every_name_has_its_signature_tested():
    listed = {module: set(contents.names) for module, contents in stand_in.CONTENTS.items()}
    tested = {module: {n for n in table if "." not in n} for module, table in SIGNATURES.items()}
    tested["flash_attn"].add("__version__")
    tested["flash_attn.layers.rotary"].add("apply_rotary_emb_func")  # an alias
    for module, more in (
        ("flash_attn.losses.cross_entropy", "cross_entropy_loss"),
        ("flash_attn.ops.triton.rotary", "apply_rotary"),
    ):
        tested.setdefault(module, set()).add(more)
    tested["flash_attn_interface"] |= {"maybe_contiguous", "round_multiple"}
    assert {m: names for m, names in listed.items() if names} == tested


def test_functions_are_this_package_s(flash_attn):
    for name in FUNCTIONS.keys() - {"flash_attn_with_kvcache"}:
        assert getattr(flash_attn, name) is getattr(mfa, name)
    for name in FUNCTIONS:
        assert getattr(flash_attn, name) is getattr(flash_attn.flash_attn_interface, name)
    assert flash_attn.layers.rotary.apply_rotary is flash_attn.ops.triton.rotary.apply_rotary
    alias = flash_attn.layers.rotary.apply_rotary_emb_func
    assert alias is flash_attn.layers.rotary.apply_rotary_emb


def test_with_kvcache_takes_every_keyword_of_this_package_s():
    q, k_cache, v_cache = (torch.randn(2, n, 2, 8) for n in (1, 9, 9))
    options = {
        "cache_seqlens": torch.tensor([5, 9], dtype=torch.int32), "causal": True,
        "window_size": (3, 0), "softcap": 5.0, "softmax_scale": 0.4, "num_splits": 2,
        "alibi_slopes": torch.tensor([0.1, 0.2]), "s_aux": torch.randn(2),
        "cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32), "return_softmax_lse": True,
        "cache_leftpad": torch.tensor([0, 2], dtype=torch.int32), "rotary_interleaved": False,
        "rotary_cos": torch.randn(12, 4), "rotary_sin": torch.randn(12, 4),
    }  # fmt: skip
    new = [torch.randn(2, 1, 2, 8) for _ in "kv"]
    options["cache_seqlens"] -= 1
    results = [
        function(q, k_cache.clone(), v_cache.clone(), *new, **options)
        for function in (mfa.flash_attn_with_kvcache, interface2.flash_attn_with_kvcache)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    into = torch.empty_like(q)
    packed = {"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=torch.int32), "max_seqlen_q": 1}
    out = interface2.flash_attn_with_kvcache(q[:, 0], k_cache, v_cache, out=into[:, 0], **packed)
    assert torch.equal(out, mfa.flash_attn_with_kvcache(q, k_cache, v_cache)[:, 0])
    assert torch.equal(out, into[:, 0])


# -- imports --------------------------------------------------------------------------------------


def test_every_form_of_import_works(flash_attn):
    scope = {}
    exec(
        "import flash_attn.bert_padding\n"
        "import flash_attn.layers.rotary as rotary\n"
        "from flash_attn import bert_padding, flash_attn_func, flash_attn_interface, layers\n"
        "from flash_attn.flash_attn_interface import flash_attn_varlen_func\n"
        "from flash_attn.bert_padding import pad_input, unpad_input\n"
        "from flash_attn_interface import flash_attn_combine\n",
        scope,
    )
    assert scope["flash_attn"] is flash_attn
    assert scope["flash_attn_func"] is mfa.flash_attn_func
    assert scope["rotary"] is scope["layers"].rotary
    for name in stand_in.CONTENTS:
        assert importlib.util.find_spec(name).name == name
        assert importlib.import_module(name) is sys.modules[name]
        assert "mini_flash_attention" in sys.modules[name].__doc__


def test_star_imports(flash_attn):
    scope = {}
    exec("from flash_attn import *", scope)
    assert scope.keys() >= FUNCTIONS.keys()
    exec("from flash_attn.bert_padding import *\nfrom flash_attn_interface import *", scope)
    assert scope["unpad_input"] is bert_padding.unpad_input
    assert scope["flash_attn_func"] is interface3.flash_attn_func


MISSING_MODULES = {
    "flash_attn.cute": "flash_attn.cute",
    "flash_attn.cute.interface": "flash_attn.cute",
    "flash_attn.flash_attn_triton": "flash_attn.flash_attn_triton",
    "flash_attn.layers.patch_embed": "flash_attn.layers.patch_embed",
    "flash_attn.modules.mha": "flash_attn.modules",
    "flash_attn.ops.triton.layer_norm": "flash_attn.ops.triton.layer_norm",
}


@pytest.mark.parametrize("name", MISSING_MODULES)
def test_missing_modules(flash_attn, name):
    missing = MISSING_MODULES[name]
    message = f"^{SENTENCE} and has no {missing}$"
    for statement in (f"import {name}", f"from {name} import x"):
        with pytest.raises(ModuleNotFoundError, match=message) as caught:
            exec(statement)
        assert caught.value.name == missing, "as ModuleNotFoundError says it"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module(name)
    assert importlib.util.find_spec(missing) is None
    assert missing not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "flash_attn.cute",
        "flash_attn.nothing",
        "flash_attn.bert_padding.nothing",
        "flash_attn.flash_attn_interface.flash_attn_gpu",
        "flash_attn.layers.patch_embed",
        "flash_attn_interface._flash_attn_backward",
    ],
)
def test_missing_names(flash_attn, name):
    module, _, attribute = name.rpartition(".")
    root = name.partition(".")[0]
    message = f"^mini_flash_attention stands in for {root} and has no {name}$"
    with pytest.raises(ImportError, match=message) as caught:
        exec(f"from {module} import {attribute}")
    assert caught.value.name == module
    found = sys.modules[module]
    assert not hasattr(found, attribute)
    assert getattr(found, attribute, 3) == 3
    with pytest.raises(AttributeError, match=message):
        getattr(found, attribute)


def test_optional_imports_fall_back(flash_attn):
    scope = {}
    exec(
        "try:\n"
        "    from flash_attn.cute import flash_attn_func\n"
        "except ImportError:\n"
        "    from flash_attn import flash_attn_func\n"
        "try:\n"
        "    from flash_attn.flash_attn_interface import flash_attn_gpu as gpu\n"
        "except ImportError:\n"
        "    gpu = None\n",
        scope,
    )
    assert scope["flash_attn_func"] is mfa.flash_attn_func and scope["gpu"] is None


def test_rearrange_is_that_of_einops(flash_attn, monkeypatch):
    for name in ("rearrange", "repeat"):
        # Without einops, whether or not it is installed here.
        vars(flash_attn.bert_padding).pop(name, None)
        with pytest.raises(ImportError, match=rf"{SENTENCE} .*{name} without einops \(pip install"):
            exec(f"from flash_attn.bert_padding import {name}")
    stand_in.uninstall()
    monkeypatch.setitem(sys.modules, "einops", a_module_of_einops())
    stand_in.install()
    scope = {}
    exec("from flash_attn.bert_padding import *\nfrom flash_attn.bert_padding import repeat", scope)
    assert scope["rearrange"]() == "rearrange" and scope["repeat"]() == "repeat"


def a_module_of_einops():
    einops = ModuleType("einops")
    einops.rearrange, einops.repeat = (lambda: "rearrange"), (lambda: "repeat")
    return einops


def test_the_version_passes_for_a_release(flash_attn):
    assert tuple(int(n) for n in flash_attn.__version__.split(".")) >= (2, 8, 0)
    version = pytest.importorskip("packaging.version")
    assert version.parse("2.8.0") <= version.parse(flash_attn.__version__) < version.parse("3")


def test_distributions_are_listed_by_module_and_one_by_name(flash_attn):
    """transformers asks which distribution provides a module, diffusers and Transformer Engine for
    a version by name. The latter goes on to import flash_attn_2_cuda where the version is not above
    2.8.3, and flash_attn_3 where flash-attn-3 has any: so that one has none.
    """
    provided = importlib.metadata.packages_distributions()
    assert "flash-attn" in provided["flash_attn"]
    assert "flash-attn-3" in provided["flash_attn_interface"]
    listed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    assert listed["flash-attn"].startswith("2.8.3+")
    assert importlib.metadata.entry_points() is not None
    stand_in.uninstall()
    names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
    before = names.count("flash-attn")
    stand_in.install()
    names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
    assert names.count("flash-attn") == before + 1
    for name in ("flash-attn", "flash_attn", "Flash_Attn"):
        assert importlib.metadata.version(name) == "2.8.3+mini"
    version = pytest.importorskip("packaging.version")
    assert version.parse("2.8.3+mini") > version.parse("2.8.3")
    if names.count("flash-attn-3") == 1:
        for name in ("flash-attn-3", "flash_attn_3", "flash_attn_interface"):
            with pytest.raises(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(name)


def test_modules_can_be_inspected_reloaded_and_copied(flash_attn):
    assert "def unpad_input" in inspect.getsource(flash_attn.bert_padding)
    assert inspect.getsource(flash_attn.layers.rotary.apply_rotary_emb).startswith("def ")
    assert inspect.getmodule(flash_attn.bert_padding) is flash_attn.bert_padding
    for module in (flash_attn, flash_attn.bert_padding, sys.modules["flash_attn_interface"]):
        del module.__doc__
        assert importlib.reload(module) is module and module.__doc__
        assert copy.copy(module) is copy.deepcopy(module) is module
        assert pickle.loads(pickle.dumps(module)) is module
    embedding = flash_attn.layers.rotary.RotaryEmbedding(8)
    assert pickle.loads(pickle.dumps(embedding)).dim == copy.deepcopy(embedding).dim == 8


def test_install_and_uninstall_twice(flash_attn):
    assert stand_in.install() is flash_attn
    del sys.modules["flash_attn.bert_padding"]
    stand_in.install()
    assert sys.modules["flash_attn.bert_padding"] is flash_attn.bert_padding
    finders = len(sys.meta_path)
    stand_in.uninstall()
    stand_in.uninstall()
    assert len(sys.meta_path) == finders - 1
    assert not any(map(ours, sys.modules))
    assert stand_in.install() is not flash_attn


def test_a_blocked_name_is_taken(flash_attn):
    stand_in.uninstall()
    sys.modules["flash_attn"] = None
    assert stand_in.install().__version__ == stand_in.VERSION


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn.cute", "flash_attn_interface"])
def test_flash_attn_itself_is_left_alone(flash_attn, monkeypatch, name):
    stand_in.uninstall()
    real = ModuleType(name)
    real.__version__ = "2.7.4"
    monkeypatch.setitem(sys.modules, name, real)
    finders = list(sys.meta_path)
    with pytest.raises(RuntimeError, match=rf"install: flash_attn.*{name}, version 2.7.4.*before"):
        stand_in.install()
    assert sys.meta_path == finders
    stand_in.uninstall()
    assert set(filter(ours, sys.modules)) == {name}


def test_both_ways_to_import_the_integration():
    code = (
        "from mini_flash_attention.integrations.flash_attn import install\n"
        "from mini_flash_attention.integrations import flash_attn\n"
        "assert flash_attn.install is install\n"
        "real = install()\n"
        "import flash_attn\n"
        "assert flash_attn is real\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr


# -- what programs import -------------------------------------------------------------------------

# Counted in the Python files of public applications: module below flash_attn -> its names, where an
# empty one is `import module`.
VARLEN, FUNC, CACHE = "flash_attn_varlen_func", "flash_attn_func", "flash_attn_with_kvcache"
QKV, KV = "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func"
PAD, PAD3 = "pad_input unpad_input", "index_first_axis pad_input unpad_input"
BACKWARD, FORWARD = "_flash_attn_backward", "_flash_attn_forward"
PACKED = "_flash_attn_varlen_backward _flash_attn_varlen_forward"
CE = "CrossEntropyLoss"
APPLICATIONS = {
    "Bagel": {"": VARLEN},
    "Pointcept": {"": ""},
    "lmdeploy": {"": VARLEN},
    "Wan2.1": {"": f" {VARLEN}"},
    "mamba": {"": CACHE, "layers.rotary": "RotaryEmbedding"},
    "mdlm": {"": "", "layers.rotary": ""},
    "nano-vllm": {"": f"{VARLEN} {CACHE}"},
    "HunyuanVideo": {"": "", "flash_attn_interface": f"{FORWARD} {VARLEN}"},
    "Open-Sora": {"": FUNC, "flash_attn_interface": f"{BACKWARD} {FORWARD}"},
    "ms-swift": {"flash_attn_interface": f" {PACKED}"},
    "DeepSpeed": {"": "", "flash_attn_interface": f"{BACKWARD} {FORWARD} {VARLEN}"},
    "MoBA": {"": f"{FUNC} {VARLEN}", "flash_attn_interface": PACKED},
    "diffusers": {
        "": f"{FUNC} {VARLEN}",
        "flash_attn_interface": "_wrapped_flash_attn_backward _wrapped_flash_attn_forward",
    },
    "gpt-neox": {
        "flash_attn_interface": f"{FUNC} {VARLEN}",
        "flash_attn_triton": FUNC,
        "ops.activations": "swiglu",
    },
    "text-generation-inference": {
        "": " bert_padding flash_attn_interface",
        "flash_attn_triton": FUNC,
    },
    "Lumina-T2X": {"": f"{FUNC} {VARLEN}", "bert_padding": PAD3},
    "FastChat": {
        "": "__version__",
        "bert_padding": PAD,
        "flash_attn_interface": f"{FUNC} {KV} {QKV}",
    },
    "Megatron-LM": {
        "": f" {FUNC} {VARLEN} {CACHE}",
        "cute": VARLEN,
        "layers.rotary": "apply_rotary_emb",
    },
    "OpenRLHF": {
        "bert_padding": f"{PAD3} rearrange",
        "ops.triton.cross_entropy": "cross_entropy_loss",
        "utils.distributed": "all_gather",
    },
    "FlagEmbedding": {"": f" {FUNC} {VARLEN}", "bert_padding": PAD3, "flash_attn_interface": QKV},
    "duo-attention": {
        "": f"{FUNC} {VARLEN} {CACHE}",
        "bert_padding": PAD3,
        "flash_attn_interface": VARLEN,
    },
    "llm-foundry": {
        "": f" bert_padding {FUNC} flash_attn_interface",
        "bert_padding": PAD,
        "losses.cross_entropy": CE,
        "ops.triton.layer_norm": "rms_norm_fn",
    },
    "verl": {
        "": f"{FUNC} {VARLEN}",
        "bert_padding": f"{PAD3} rearrange",
        "layers.rotary": "apply_rotary_emb",
        "ops.triton.cross_entropy": "cross_entropy_loss",
    },
    "axolotl": {
        "bert_padding": "pad_input",
        "cute": f"{FUNC} {VARLEN} {CACHE}",
        "cute.interface": "_validate_head_dims",
        "flash_attn_interface": f"{FUNC} {QKV}",
        "losses.cross_entropy": CE,
        "ops.triton.cross_entropy": "cross_entropy_loss",
    },
    "ModernBERT": {
        "": f" flash_attn_qkvpacked_func {QKV}",
        "bert_padding": PAD,
        "layers.rotary": "RotaryEmbedding apply_rotary_emb_torch",
        "losses.cross_entropy": CE,
        "ops.triton.layer_norm": "RMSNorm layer_norm_fn",
        "ops.triton.rotary": "apply_rotary",
    },
    "InternVideo": {
        "": f"{FUNC} {VARLEN} {CACHE}",
        "bert_padding": PAD3,
        "flash_attn_interface": f"flash_attn_gpu {QKV} maybe_contiguous round_multiple",
        "modules.mlp": "FusedMLP",
        "ops.rms_norm": "DropoutAddRMSNorm",
    },
    "InternVL": {
        "": f"__version__ bert_padding {FUNC} flash_attn_interface {VARLEN}",
        "bert_padding": PAD3,
        "flash_attn_interface": (
            f"{BACKWARD} {FUNC} flash_attn_unpadded_qkvpacked_func {VARLEN} {KV} {QKV}"
        ),
        "flash_attn_triton": FUNC,
    },
    "hyena-dna": {
        "losses.cross_entropy": CE,
        "modules.block": "Block",
        "modules.embedding": "GPT2Embeddings ParallelGPT2Embeddings",
        "modules.mha": "MHA ParallelMHA",
        "modules.mlp": "FusedMLP Mlp ParallelFusedMLP",
        "ops.fused_dense": "ColumnParallelLinear FusedDense",
        "ops.layer_norm": "dropout_add_layer_norm",
        "utils.distributed": "all_gather_raw sync_shared_params",
        "utils.generation": "GenerationMixin",
    },
    "InternEvo": {
        "": f"{FUNC} {VARLEN} {KV}",
        "bert_padding": PAD3,
        "flash_attn_interface": (
            f"FlashAttnVarlenKVPackedFunc flash_attn_unpadded_func"
            f" flash_attn_unpadded_kvpacked_func {KV}"
        ),
        "losses.cross_entropy": CE,
        "modules.embedding": "ParallelGPT2Embeddings VocabParallelEmbedding",
        "modules.mha": "FlashCrossAttention FlashSelfAttention",
        "modules.mlp": "ParallelFusedMLP",
        "ops.layer_norm": "dropout_add_layer_norm",
    },
    "FastVideo": {
        "": f" {FUNC} {VARLEN} {QKV}",
        "bert_padding": PAD,
        "cute": f"{FUNC} {VARLEN} utils",
        "cute.block_sparsity": "BlockSparseTensorsTorch fast_sampling",
        "cute.interface": f"_flash_attn_bwd _flash_attn_fwd {FUNC}",
        "flash_attn_interface": f"{BACKWARD} {PACKED}",
        "layers.rotary": "apply_rotary_emb",
    },
    "contrastors": {
        "": f"flash_attn_kvpacked_func flash_attn_qkvpacked_func {KV} {QKV}",
        "bert_padding": PAD3,
        "flash_attn_interface": f"flash_attn_kvpacked_func {KV}",
        "layers.rotary": (
            "RotaryEmbedding apply_rotary_emb_func apply_rotary_emb_kv_ apply_rotary_emb_qkv_"
        ),
        "losses.cross_entropy": CE,
        "ops.activations": "swiglu",
        "ops.fused_dense": "FusedDense",
        "ops.layer_norm": (
            "dropout_add_layer_norm dropout_add_layer_norm_parallel_residual layer_norm"
        ),
        "ops.rms_norm": (
            "RMSNorm dropout_add_rms_norm dropout_add_rms_norm_parallel_residual rms_norm"
        ),
    },
}
WHOLE = {
    "Bagel", "Pointcept", "lmdeploy", "Wan2.1", "mamba", "mdlm", "nano-vllm", "Lumina-T2X",
    "FastChat", "FlagEmbedding", "duo-attention", "verl", "HunyuanVideo", "Open-Sora", "ms-swift",
    "DeepSpeed", "MoBA", "diffusers",
}  # fmt: skip


def statements(imports):
    for below, names in imports.items():
        module = f"flash_attn.{below}" if below else "flash_attn"
        for name in names.split(" "):
            yield f"from {module} import {name}" if name else f"import {module}"


def test_applications_import_whole_or_learn_what_is_missing(flash_attn, monkeypatch):
    """With einops, which flash-attn brings along and verl's `rearrange` is."""
    stand_in.uninstall()
    monkeypatch.setitem(sys.modules, "einops", a_module_of_einops())
    stand_in.install()
    assert len(APPLICATIONS) == 31
    assert len({s for imports in APPLICATIONS.values() for s in statements(imports)}) == 84
    failed = {}
    for application, imports in APPLICATIONS.items():
        for statement in statements(imports):
            try:
                exec(statement, {})
            except ImportError as error:
                failed.setdefault(application, {})[statement] = str(error)
    for messages in failed.values():
        assert all(m.startswith(f"{SENTENCE} and has no flash_attn.") for m in messages.values())
    assert APPLICATIONS.keys() - failed.keys() == WHOLE and len(WHOLE) >= 18


# -- flash_attn.bert_padding ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(4, 7), (1, 1), (3, 5)])
def test_padding_there_and_back(shape, dtype):
    g = torch.Generator().manual_seed(sum(shape))
    mask = torch.rand(shape, generator=g) < 0.6
    mask[0] = shape == (1, 1)  # a sequence without tokens, where there are others
    hidden = torch.randn(*shape, 2, 3, generator=g)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, mask.to(dtype))
    assert torch.equal(rows, hidden[mask])
    assert torch.equal(hidden.flatten(0, 1)[indices], rows)
    lengths = [int(row.sum()) for row in mask]
    assert cu_seqlens.dtype is used.dtype is torch.int32
    assert indices.dtype is torch.int64
    assert cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert used.tolist() == lengths
    assert longest == max(lengths) and type(longest) is int
    assert torch.equal(
        bert_padding.pad_input(rows, indices, *shape), hidden * mask[..., None, None]
    )


def test_padding_with_places_kept_free():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    hidden = torch.arange(8).view(2, 4, 1)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, mask, unused)
    assert rows.flatten().tolist() == indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 3, 7] and longest == 4
    assert used.tolist() == [2, 1]


def test_padding_of_nothing():
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(
        torch.zeros(0, 4, 2), torch.zeros(0, 4)
    )
    assert rows.shape == (0, 2) and cu_seqlens.tolist() == [0] and longest == 0
    assert bert_padding.pad_input(rows, indices, 0, 4).shape == (0, 4, 2)
    assert used.shape == (0,)


def test_padding_has_gradients():
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows, indices, *_ = bert_padding.unpad_input(hidden, mask)
    (bert_padding.pad_input(rows * 2, indices, 2, 3) * 3).sum().backward()
    assert torch.equal(hidden.grad, 6.0 * mask[..., None].expand(2, 3, 4))


def test_masks_must_fit():
    unpad = bert_padding.unpad_input
    with pytest.raises(ValueError, match=r"unpad_input: attention_mask: expected shape \(2, 3\)"):
        unpad(torch.zeros(2, 3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="unpad_input: unused_mask"):
        unpad(torch.zeros(2, 3, 4), torch.ones(2, 3), torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match=r"sequences: attention_mask_in_length: .*\(2, 3\)"):
        bert_padding.unpad_input_for_concatenated_sequences(
            torch.zeros(2, 3, 4), torch.ones(2, 2, dtype=torch.int64)
        )


def test_several_sequences_in_a_row():
    """Rows of flash-attn's documentation: 2 + 3 tokens, 3 + 2, and 6."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    hidden = torch.arange(18).view(3, 6, 1)
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        hidden, lengths
    )
    assert rows.flatten().tolist() == indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype is torch.int32
    assert longest == 6 and type(longest) is int
    padded = bert_padding.pad_input(rows, indices, 3, 6)
    assert torch.equal(padded, hidden * (torch.arange(6) < lengths.sum(1, True))[..., None])


def test_rows_with_their_residual():
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([3, 0, 4])
    rows, residual = bert_padding.index_first_axis_residual(hidden, indices)
    assert torch.equal(rows, hidden[indices]) and torch.equal(residual, hidden)
    assert torch.autograd.gradcheck(
        lambda x: bert_padding.index_first_axis_residual(x * 2, indices), hidden
    )


def test_padded_sequences_through_flash_attn(flash_attn):
    """As libraries write it: unpad, attend, pad."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 6, 2, 16, generator=g) for _ in "qkv")
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    packed, indices, cu_seqlens, longest, _ = flash_attn.bert_padding.unpad_input(q, mask)
    kv = torch.stack([flash_attn.bert_padding.unpad_input(x, mask)[0] for x in (k, v)], 1)
    out = flash_attn.flash_attn_varlen_kvpacked_func(
        packed, kv, cu_seqlens, cu_seqlens, longest, longest, causal=True
    )
    out = flash_attn.bert_padding.pad_input(out, indices, 3, 6)
    for b, n in enumerate((6, 2, 4)):
        alone = mfa.flash_attn_func(*(x[b : b + 1, :n] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(out[b : b + 1, :n], alone)
        assert not out[b, n:].any()


# -- flash_attn.flash_attn_interface --------------------------------------------------------------


def test_old_names(flash_attn):
    interface = flash_attn.flash_attn_interface
    qkv = torch.randn(9, 3, 2, 8)
    q, k, v = qkv.unbind(1)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    new = mfa.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, 0.0, 0.3, True, return_attn_probs=True)
    tail = (0.0, 0.3, True, True)  # dropout_p, softmax_scale, causal, return_attn_probs
    for old in (
        interface.flash_attn_unpadded_func(q, k, v, cu, cu, 5, 5, *tail),
        interface.flash_attn_unpadded_kvpacked_func(q, qkv[:, 1:], cu, cu, 5, 5, *tail),
        interface.flash_attn_unpadded_qkvpacked_func(qkv, cu, 5, *tail),
    ):
        assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1]) and old[2] is None
    out = interface.flash_attn_unpadded_func(q[:2], k, v, cu.clamp(max=2), cu, 2, 5, 0.0)
    assert torch.equal(out, mfa.flash_attn_varlen_func(q[:2], k, v, cu.clamp(max=2), cu, 2, 5))


@pytest.mark.parametrize(("queries", "longest"), [(5, 3), (9, 4), (5, 5)])
def test_old_names_refuse_the_causal_mask_that_has_changed(queries, longest):
    """flash-attn 1 aligned it to the first key, and later releases to the last."""
    q, k = torch.randn(queries, 2, 8), torch.randn(9, 2, 8)
    cu_q = torch.tensor([0, queries - longest, queries], dtype=torch.int32)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    arguments = (cu_q, cu, longest, 5, 0.0, None, True)
    with pytest.raises(NotImplementedError, match=f"unpadded_func: causal: .*{queries} queries"):
        interface2.flash_attn_unpadded_func(q, k, k, *arguments)
    with pytest.raises(NotImplementedError, match="unpadded_kvpacked_func: causal: expected False"):
        interface2.flash_attn_unpadded_kvpacked_func(q, torch.stack((k, k), 1), *arguments)


def test_helpers():
    x = torch.randn(3, 4)
    assert interface2.maybe_contiguous(None) is None and interface2.maybe_contiguous(x) is x
    assert interface2.maybe_contiguous(x.T).is_contiguous()
    assert [interface2.round_multiple(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


# -- the private functions of flash_attn.flash_attn_interface --------------------------------------

SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
# softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
MEANINGS = {
    "plain": (0.3, False, -1, -1, 0.0, None),
    "causal": (0.3, True, -1, -1, 0.0, None),
    "window": (0.3, True, 3, 0, 0.0, None),
    "cap": (0.5, False, 2, 4, 3.0, None),
    "slopes": (0.5, True, -1, -1, 0.0, SLOPES),
}


def named(meaning):
    """What the public functions call it."""
    scale, causal, left, right, softcap, slopes = meaning
    return {
        "softmax_scale": scale, "causal": causal, "window_size": (left, right),
        "softcap": softcap, "alibi_slopes": slopes,
    }  # fmt: skip


def leaves(*shapes):
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("wrapped", ["", "_wrapped"])
@pytest.mark.parametrize("meaning", MEANINGS.values(), ids=MEANINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_private_functions(flash_attn, meaning, packed, wrapped):
    """As autograd Functions of other libraries call them; results as in the public functions."""
    interface, kind = flash_attn.flash_attn_interface, "_varlen" if packed else ""
    forward = getattr(interface, f"{wrapped}_flash_attn{kind}_forward")
    backward = getattr(interface, f"{wrapped}_flash_attn{kind}_backward")
    if packed:
        cu_q, cu_k = ints(0, 4, 4, 9), ints(0, 6, 8, 13)
        tensors, lengths = leaves((11, 4, 8), (14, 2, 8), (14, 2, 8)), (cu_q, cu_k, 5, 6)
        public = mfa.flash_attn_varlen_func
    else:
        tensors, lengths = leaves((2, 5, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8)), ()
        public = mfa.flash_attn_func
    options = named(meaning) | {"return_attn_probs": True}
    expected, expected_lse, _ = public(*tensors, *lengths, **options)
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, dout)
    with torch.no_grad():
        out, lse, mask, state = forward(*tensors, *lengths, 0.0, *meaning, False)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert mask.shape == (0,) and mask.dtype is out.dtype
    assert state.shape == (2,) and state.dtype is torch.int64
    # Into parts of one tensor, as for packed projections.
    buffers = [torch.full((*x.shape[:-2], 3, *x.shape[-2:]), float("nan")) for x in tensors]
    into = [x.select(-3, n) for n, x in enumerate(buffers)]
    given = (dout, *tensors, out, lse)
    softmax_d = backward(*given, *into, *lengths, 0.0, *meaning, False, rng_state=state)
    for x, gradient in zip(into, gradients, strict=True):
        assert torch.equal(x, gradient)
    assert sum(int(x.isnan().sum()) for x in buffers) == 2 * sum(x.numel() for x in tensors)
    assert softmax_d.dtype is torch.float32 and softmax_d.shape == lse.shape
    torch.testing.assert_close(softmax_d, (dout * out).sum(-1).transpose(-1, -2))
    again = backward(*given, None, None, None, *lengths, 0, *meaning, True)
    assert torch.equal(again, softmax_d) and not again.requires_grad


def test_private_functions_have_gradients_where_they_are_wanted():
    q, k, v = leaves((2, 5, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    out, *_ = private._flash_attn_forward(q, k, v, 0.0, *MEANINGS["causal"], False)
    expected = mfa.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True)
    found, wanted = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected))
    assert all(map(torch.equal, found, wanted))


def test_private_functions_compile():
    """Within a Function, as libraries have them."""
    meaning = MEANINGS["window"]

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse, _, state = private._flash_attn_forward(q, k, v, 0.0, *meaning, False)
            ctx.save_for_backward(q, k, v, out, lse, state)
            return out

        @staticmethod
        def backward(ctx, dout):
            *given, state = ctx.saved_tensors
            gradients = [torch.empty_like(x) for x in given[:3]]
            private._flash_attn_backward(
                dout, *given, *gradients, 0.0, *meaning, False, rng_state=state
            )
            return tuple(gradients)

    tensors = leaves((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8))

    def loss(*tensors):
        return Attention.apply(*tensors).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss))
    assert all(map(torch.equal, found, expected))


def test_private_forward_of_pages():
    """And of sequences that are shorter than their place."""
    q, cu, lengths = torch.randn(5, 4, 8), ints(0, 2, 5), ints(3, 6)
    k, v = (torch.randn(4, 3, 2, 8) for _ in "kv")
    call = (q, k, v, cu, ints(0, 3, 9), 3, 6)
    options = {"block_table": ints(3, 0, 1, 2).view(2, 2), "seqused_k": lengths}
    out, lse, *_ = private._flash_attn_varlen_forward(*call, 0.0, 0.3, True, **options)
    expected, expected_lse, _ = mfa.flash_attn_varlen_func(
        *call, softmax_scale=0.3, causal=True, return_attn_probs=True, **options
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match="backward: not implemented for block_table"):
        private._flash_attn_varlen_forward(*call, 0.0, 0.3, True, **options)


def test_private_functions_copy_what_is_not_contiguous():
    q, k, v, dout = (torch.randn(1, 5, 8, 4).transpose(2, 3) for _ in range(4))
    meaning = MEANINGS["causal"]
    out, lse, *_ = private._flash_attn_forward(q, k, v, 0.0, *meaning, False)
    dense = [x.contiguous() for x in (q, k, v)]
    expected, *_ = private._flash_attn_forward(*dense, 0.0, *meaning, False)
    assert torch.equal(out, expected)
    grads = [[torch.empty(1, 5, 4, 8) for _ in "qkv"] for _ in range(2)]
    strided = out.transpose(2, 3).contiguous().transpose(2, 3)
    private._flash_attn_backward(dout, q, k, v, strided, lse, *grads[0], 0.0, *meaning, False)
    given = (dout.contiguous(), *dense, out, lse)
    private._flash_attn_backward(*given, *grads[1], 0.0, *meaning, False)
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("shape", [(2, 5, 4, 8), (2, 4, 4, 8), (2, 1, 4, 8), (1, 5, 1, 8)])
def test_private_backward_takes_diffusers_lse(shape):
    """Which exchanges two dimensions of it; flash-attn reads its memory."""
    q, k, v, dout = torch.randn(4, *shape).unbind()
    meaning = MEANINGS["plain"]
    out, lse, *_ = private._flash_attn_forward(q, k, v, 0.0, *meaning, False)
    grads = [[torch.empty(shape) for _ in "qkv"] for _ in range(3)]
    strided = torch.empty(shape[0], shape[2], shape[1] + 3)[..., : shape[1]].copy_(lse)
    for into, statistics in zip(grads, (lse, lse.permute(0, 2, 1), strided), strict=True):
        given = (dout, q, k, v, out, statistics)
        private._flash_attn_backward(*given, *into, 0.0, *meaning, False)
    for x, y, z in zip(*grads, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_private_functions_refuse():
    q, cu = torch.randn(1, 5, 2, 8), ints(0, 5)
    meaning, lengths = MEANINGS["plain"], (cu, cu, 5, 5)
    out, lse, *_ = private._flash_attn_forward(q, q, q, 0.0, *meaning, False)
    given = (q, q, q, q, out, lse, None, None, None)
    packed = tuple(x[0] if isinstance(x, torch.Tensor) else x for x in given)
    forward, varlen = private._flash_attn_forward, private._flash_attn_varlen_forward
    for message, call in (
        ("forward: dropout_p: not", lambda: forward(q, q, q, 0.1, *meaning, False)),
        ("forward: return_softmax: not", lambda: forward(q, q, q, 0.0, *meaning, True)),
        ("varlen_forward: dropout_p: ", lambda: varlen(q, q, q, *lengths, 0.1, 0.3, False)),
        (
            "varlen_forward: leftpad_k: ",
            lambda: varlen(q, q, q, *lengths, 0.0, 0.3, False, leftpad_k=cu),
        ),
        (
            "_flash_attn_backward: dropout_p: ",
            lambda: private._flash_attn_backward(*given, 0.1, *meaning, False),
        ),
        (
            "varlen_backward: dropout_p: ",
            lambda: private._flash_attn_varlen_backward(*packed, *lengths, 0.1, *meaning, False),
        ),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()
    with pytest.raises(TypeError, match=r"softmax_lse: expected a .*Tensor, got NoneType"):
        private._flash_attn_backward(*given[:5], None, *[None] * 3, 0.0, *meaning, False)
    with pytest.raises(TypeError, match=r"dout: expected a torch\.Tensor, got int"):
        private._flash_attn_backward(3, *given[1:], 0.0, *meaning, False)


def merged(out, lse, block_out, block_lse):
    """As ring-flash-attention puts blocks together, in fp32, with a dimension for head_dim."""
    block_lse = block_lse.transpose(-2, -1)[..., None]
    if out is None:
        return block_out.float(), block_lse
    out = out - torch.sigmoid(block_lse - lse) * (out - block_out.float())
    return out, lse - F.logsigmoid(lse - block_lse)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ring_attention(flash_attn, packed, causal, ranks, deterministic):
    """All ranks of a ring in one process: each has a block of every sequence, and sees the blocks
    of keys of the ranks before it. Arguments by name, unknown ones from the signature.
    """
    interface = flash_attn.flash_attn_interface
    kind, lengths = ("_varlen", [6, 12]) if packed else ("", [12, 12])
    forward = getattr(interface, f"_flash_attn{kind}_forward")
    backward = getattr(interface, f"_flash_attn{kind}_backward")
    q, k, v = leaves((sum(lengths), 4, 8), (sum(lengths), 2, 8), (sum(lengths), 2, 8))
    cu = F.pad(ints(*lengths).cumsum(0), (1, 0)).int()
    expected, expected_lse, _ = mfa.flash_attn_varlen_func(
        q, k, v, cu, cu, 12, 12, softmax_scale=0.3, causal=causal, return_attn_probs=True
    )
    dout = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), dout)
    starts = cu.tolist()[:-1]
    share = [n // ranks for n in lengths]

    def rows(rank):
        """Where a rank's tokens stand."""
        firsts = [at + n * rank for at, n in zip(starts, share, strict=True)]
        return torch.cat([torch.arange(i, i + n) for i, n in zip(firsts, share, strict=True)])

    def local(x, rank):
        x = x.detach()[rows(rank)]
        return x if packed else x.unflatten(0, (2, -1))

    def call(function, step, **tensors):
        given = dict.fromkeys(inspect.signature(function).parameters) | {
            "dropout_p": 0, "softmax_scale": 0.3, "causal": causal and step == 0, "softcap": 0.0,
            "window_size_left": -1, "window_size_right": -1, **tensors,
        }  # fmt: skip
        if packed:
            ends = F.pad(ints(*share).cumsum(0), (1, 0)).int()
            given |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
            given |= {"max_seqlen_q": max(share), "max_seqlen_k": max(share)}
        return function(**given)

    found = [torch.zeros_like(x) for x in (q, k, v)]
    for rank in range(ranks):
        sources = [(step, (rank - step) % ranks) for step in range(ranks)]
        sources = [(step, n) for step, n in sources if not causal or step <= rank]
        queries = local(q, rank)
        out = lse = None
        for step, n in sources:
            block = call(forward, step, q=queries, k=local(k, n), v=local(v, n))
            out, lse = merged(out, lse, *block[:2])
        lse = lse.squeeze(-1).transpose(-2, -1)
        whole = expected_lse[:, rows(rank)]
        whole = whole if packed else whole.unflatten(1, (2, -1)).transpose(0, 1)
        torch.testing.assert_close(out.flatten(0, -3), expected[rows(rank)], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, whole, atol=1e-5, rtol=1e-5)
        for step, n in sources:
            blocks = [torch.empty_like(local(x, at)) for x, at in ((q, rank), (k, n), (v, n))]
            call(
                backward, step, dout=local(dout, rank), q=queries, k=local(k, n), v=local(v, n),
                out=out, softmax_lse=lse, dq=blocks[0], dk=blocks[1], dv=blocks[2],
                deterministic=deterministic,
            )  # fmt: skip
            for x, at, gradient in zip(found, (rank, n, n), blocks, strict=True):
                x[rows(at)] += gradient.flatten(0, -3)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_reaches_the_backward_pass(monkeypatch, wanted):
    """From every signature that has the argument."""
    seen = []

    def spy(*arguments, deterministic, **options):
        seen.append(deterministic)

    for module, names in (
        (private, "backward"),
        (interface2, f"{VARLEN} {KV} {QKV}"),
        (interface3, "dense varlen"),
    ):
        for name in names.split():
            monkeypatch.setattr(module, name, spy)
    x, cu = torch.randn(1, 5, 2, 8), ints(0, 5)
    packed, three = (x[0], x[0], x[0]), torch.stack((x, x, x), 2)
    option = {"deterministic": wanted}
    interface2.flash_attn_unpadded_func(*packed, cu, cu, 5, 5, 0.0, **option)
    interface2.flash_attn_unpadded_kvpacked_func(x[0], three[0, :, 1:], cu, cu, 5, 5, 0.0, **option)
    interface2.flash_attn_unpadded_qkvpacked_func(three[0], cu, 5, 0.0, **option)
    interface3.flash_attn_func(x, x, x, **option)
    interface3.flash_attn_qkvpacked_func(three, **option)
    interface3.flash_attn_varlen_func(*packed, cu, cu, 5, 5, **option)
    given = (x, x, x, x, x, torch.zeros(1, 2, 5), None, None, None)
    private._flash_attn_backward(*given, 0.0, *MEANINGS["plain"], wanted)
    given = (*[x[0]] * 5, torch.zeros(2, 5), None, None, None)
    private._flash_attn_varlen_backward(*given, cu, cu, 5, 5, 0.0, *MEANINGS["plain"], wanted)
    assert seen == [wanted] * 8


# -- flash_attn.layers.rotary ---------------------------------------------------------------------


def complex_rotation(x, cos, sin, interleaved):
    """The definition: pairs are complex numbers, multiplied by cos + i sin.

    x (..., tokens, heads, head_dim), cos and sin (..., tokens, rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    x, rest = x.double().split((rotary_dim, x.shape[-1] - rotary_dim), -1)
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    turn = torch.complex(cos.double(), sin.double())[..., None, :]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)
    return torch.cat((turned, rest), -1)


def tables(positions, rotary_dim, dtype=torch.float64):
    frequency = 100.0 ** -torch.linspace(0, 1, rotary_dim // 2, dtype=torch.float64)
    angle = torch.arange(positions)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def close(a, b):
    limit = 1e-12 if a.dtype is torch.float64 else 2 * torch.finfo(a.dtype).eps
    a, b = a.detach().double(), b.detach().double()
    torch.testing.assert_close(a, b, atol=limit * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 6])
@pytest.mark.parametrize("offsets", [0, 3, [0, 5, 2]])
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary(dtype, interleaved, rotary_dim, offsets, inplace):
    cos, sin = tables(12, rotary_dim, dtype)
    x = torch.randn(3, 7, 2, 16).to(dtype)
    first = torch.tensor(offsets) if isinstance(offsets, list) else torch.full((3,), offsets)
    at = first[:, None] + torch.arange(7)
    expected = complex_rotation(x, cos[at], sin[at], interleaved)
    given = x.clone()
    seqlen_offsets = offsets if isinstance(offsets, int) else first.int()
    out = rotary.apply_rotary_emb(given, cos, sin, interleaved, inplace, seqlen_offsets)
    assert out.dtype is dtype and torch.equal(given, out if inplace else x)
    assert (out.data_ptr() == given.data_ptr()) == inplace
    close(out, expected)
    back = rotary.apply_rotary(
        out, cos, sin, seqlen_offsets, interleaved=interleaved, conjugate=True
    )
    limit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(back, x, atol=limit * float(x.abs().max()), rtol=0)
    close(rotary.apply_rotary_emb_torch(x, cos[at], sin[at], interleaved), expected)


def test_rotary_of_other_dtypes():
    """As programs call it: x in fp32 with tables in bf16, and the other way round."""
    cos, sin = tables(7, 8)
    x = torch.randn(2, 7, 2, 8)
    for dtype, table in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        given, (c, s) = x.to(dtype), (cos.to(table), sin.to(table))
        expected = complex_rotation(given, c, s, False)
        out = rotary.apply_rotary_emb(given, c, s)
        assert out.dtype is dtype
        close(out, expected)
        out = rotary.apply_rotary_emb_torch(given, c, s)
        assert out.dtype is torch.float32
        close(out, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 2, [1, 0, 3, 2]])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rotary_of_packed_sequences(interleaved, offsets, index):
    lengths = [3, 0, 5, 1]
    cu = torch.tensor([0, 3, 3, 8, 9], dtype=index)
    cos, sin = tables(9, 8)
    x = torch.randn(11, 2, 8, dtype=torch.float64)  # two rows belong to no sequence
    given = offsets if isinstance(offsets, int) else torch.tensor(offsets, dtype=index)
    firsts = [offsets] * 4 if isinstance(offsets, int) else offsets
    out = rotary.apply_rotary_emb(
        x, cos, sin, interleaved, seqlen_offsets=given, cu_seqlens=cu, max_seqlen=5
    )
    at = torch.cat(
        [torch.arange(first, first + n) for first, n in zip(firsts, lengths, strict=True)]
    )
    close(out[:9], complex_rotation(x[:9], cos[at], sin[at], interleaved))
    assert torch.equal(out[9:], x[9:])
    into = x.clone()
    rotary.apply_rotary(into, cos, sin, given, cu, 5, interleaved, inplace=True)
    assert torch.equal(into, out)


def test_rotary_past_the_table():
    cos, sin = tables(6, 8)
    x = torch.randn(2, 4, 2, 8, dtype=torch.float64)
    out = rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([4, 2]))
    assert torch.equal(out[0, 2:], x[0, 2:])
    close(out[1], complex_rotation(x[1], cos[2:], sin[2:], False))


PARTIAL = [(16, False), (6, True)]


@pytest.mark.parametrize(("rotary_dim", "interleaved"), PARTIAL)
@pytest.mark.parametrize("offsets", [1, torch.tensor([2, 0])])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_of_rotary(rotary_dim, interleaved, offsets, inplace):
    cos, sin = tables(6, rotary_dim)
    x = torch.randn(2, 3, 2, 16, dtype=torch.float64, requires_grad=True)

    def call(x, cos, sin):
        return rotary.apply_rotary_emb(x * 1.5, cos, sin, interleaved, inplace, offsets)

    assert torch.autograd.gradcheck(call, (x, cos, sin))
    assert torch.autograd.gradgradcheck(call, (x, cos, sin))
    if not inplace:
        assert torch.autograd.gradcheck(call, (x, cos.requires_grad_(), sin.requires_grad_()))


@pytest.mark.parametrize("shape", [(2, 3, 3, 2, 8), (2, 3, 6, 8)])
@pytest.mark.parametrize("own", [False, True])
def test_rotary_of_qkv(shape, own):
    """In one tensor; the second has 4 query heads and one head of keys and values."""
    heads = None if len(shape) == 5 else 4
    cos, sin = tables(5, 6)
    own_k = (cos * 2, sin * 3) if own else (None, None)
    offsets = torch.tensor([2, 1], dtype=torch.int32)
    at = offsets[:, None] + torch.arange(3)
    qkv = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parts = (0, 1) if heads is None else (slice(4), slice(4, 5))
    expected = qkv.detach().clone()
    for part, (c, s) in zip(parts, ((cos, sin), own_k if own else (cos, sin)), strict=True):
        expected[:, :, part] = complex_rotation(qkv.detach()[:, :, part], c[at], s[at], True)

    def call(x):
        return rotary.apply_rotary_emb_qkv_(x * 1, cos, sin, *own_k, True, offsets, heads)

    close(call(qkv), expected)
    assert torch.autograd.gradcheck(call, qkv)
    given = qkv.detach().clone()
    out = rotary.apply_rotary_emb_qkv_(given, cos, sin, *own_k, True, offsets, heads)
    assert out.data_ptr() == given.data_ptr() and torch.equal(given, call(qkv))


def test_rotary_of_kv():
    cos, sin = tables(5, 8)
    kv = torch.randn(2, 3, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    out = rotary.apply_rotary_emb_kv_(kv * 1, cos, sin, seqlen_offsets=2)
    close(out[:, :, 0], complex_rotation(kv[:, :, 0], cos[2:], sin[2:], False))
    assert torch.equal(out[:, :, 1], kv[:, :, 1])
    assert torch.autograd.gradcheck(
        lambda x: rotary.apply_rotary_emb_kv_(x * 1, cos, sin, seqlen_offsets=2), kv
    )


def test_parts_of_one_tensor_rotated_one_after_the_other():
    """As mamba does it: q and kv are views of one projection, rotated in place while training."""
    torch.manual_seed(0)
    embedding = rotary_embedding.RotaryEmbedding(8)
    projection = torch.nn.Linear(12, 3 * 16)
    x = torch.randn(2, 5, 12)

    def attend(rotate):
        q, kv = projection(x).split((16, 32), -1)
        q, kv = rotate(q.unflatten(-1, (2, 8)), kv.unflatten(-1, (2, 2, 8)))
        loss = (q * kv[:, :, 0] * kv[:, :, 1]).square().sum()
        return torch.autograd.grad(loss, projection.weight)[0]

    def plain(q, kv):
        cos, sin = embedding._cos_cached, embedding._sin_cached
        q, k = (rotary.apply_rotary_emb_torch(x, cos, sin) for x in (q, kv[:, :, 0]))
        return q, torch.stack((k, kv[:, :, 1]), 2)

    torch.testing.assert_close(attend(embedding), attend(plain))


@pytest.mark.parametrize("scale_base", [None, 512])
@pytest.mark.parametrize("offset", [0, 3])
def test_rotary_embedding(scale_base, offset):
    embedding = rotary_embedding.RotaryEmbedding(8, 100.0, scale_base=scale_base)
    qkv = torch.randn(2, 5, 3, 2, 16)
    position = torch.arange(offset, offset + 5).double()
    angle = position[:, None] * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    scale = torch.ones_like(angle)
    if scale_base is not None:  # XPos, centred on half of the table
        zeta = (torch.arange(0, 8, 2).double() / 8 + 0.4) / 1.4
        scale = zeta ** ((position - (offset + 5) // 2) / scale_base)[:, None]
    q, k = (
        complex_rotation(qkv[:, :, n], angle.cos() * s, angle.sin() * s, False)
        for n, s in ((0, scale), (1, 1 / scale))
    )
    out = embedding(qkv.clone(), seqlen_offset=offset)
    limits = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out, torch.stack((q, k, qkv[:, :, 2]), 2).float(), **limits)
    given, kv = qkv[:, :, 0].clone(), qkv[:, :, 1:].clone()
    apart = embedding(given, kv, offset)
    torch.testing.assert_close(apart[0], q.float(), **limits)
    torch.testing.assert_close(apart[1][:, :, 0], k.float(), **limits)
    assert torch.equal(apart[0], given) and torch.equal(apart[1], kv), "in place"
    offsets = torch.full((2,), offset)
    for rotated in (
        embedding(qkv.clone(), seqlen_offset=offsets),
        embedding(qkv.clone(), seqlen_offset=offsets, max_seqlen=offset + 5),
        embedding(qkv.flatten(2, 3), seqlen_offset=offset, num_heads_q=2).unflatten(2, (3, 2)),
    ):
        torch.testing.assert_close(rotated, out)


def test_the_tables_of_a_rotary_embedding():
    embedding = rotary_embedding.RotaryEmbedding(8, scale_base=512, pos_idx_in_fp32=True)
    assert not list(embedding.parameters()) and not embedding.state_dict()
    embedding._update_cos_sin_cache(4, device=torch.device("cpu"), dtype=torch.float32)
    assert embedding._seq_len_cached == 4 and embedding._cos_cached.shape == (4, 4)
    kept = embedding._cos_cached
    embedding._update_cos_sin_cache(3, device=torch.device("cpu"), dtype=torch.float32)
    assert embedding._cos_cached is kept
    embedding._update_cos_sin_cache(2000, device=torch.device("cpu"), dtype=torch.float32)
    exact = embedding._sin_cached, embedding._sin_k_cached
    embedding.bfloat16()
    embedding._update_cos_sin_cache(2001, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(embedding._sin_cached[:2000], exact[0]), "frequencies stay fp32"
    assert torch.equal(embedding._sin_k_cached[:2000], exact[1])
    with torch.inference_mode():
        embedding(torch.randn(1, 3000, 3, 1, 8))
    qkv = torch.randn(1, 5, 3, 1, 8, requires_grad=True)
    embedding(qkv * 1).sum().backward()
    assert qkv.grad.isfinite().all(), "tables of inference mode are made again to train"


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_rotary(inplace):
    cos, sin = tables(6, 8, torch.float32)
    x = torch.randn(2, 4, 2, 8, requires_grad=True)
    offsets = torch.tensor([2, 0])

    def call(x):
        return rotary.apply_rotary_emb(x * 2, cos, sin, True, inplace, offsets).square().sum()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(call(x), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), expected)


def test_rotary_refuses():
    cos, sin = tables(4, 8)
    x = torch.zeros(2, 3, 2, 8)
    for message, arguments in (
        (r"apply_rotary: x: expected 4 dimensions, got \(3, 2, 8\)", (x[0], cos, sin)),
        (r"apply_rotary: cos: expected shape \(positions, .* up to 6", (x[..., :6], cos, sin)),
        (r"apply_rotary: sin: expected shape \(4, 4\), as cos, got \(4, 3\)", (x, cos, sin[:, :3])),
        ("apply_rotary: cos: expected a table of 5 positions or more", (x, cos, sin, 2)),
        ("apply_rotary: seqlen_offsets: expected 0 or more, got -1", (x, cos, sin, -1)),
        (r"apply_rotary: seqlen_offsets: .*\(2,\)", (x, cos, sin, torch.zeros(3).int())),
    ):
        with pytest.raises(ValueError, match=message):
            rotary.apply_rotary(*arguments)
    with pytest.raises(ValueError, match="apply_rotary_emb_kv_: kv: expected shape"):
        rotary.apply_rotary_emb_kv_(x, cos, sin)
    for heads in (None, 1):
        with pytest.raises(ValueError, match=f"qkv_: qkv: expected .* num_heads_q={heads}"):
            rotary.apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=heads)
    with pytest.raises(NotImplementedError, match="RotaryEmbedding: pos_idx_in_fp32"):
        rotary_embedding.RotaryEmbedding(8, pos_idx_in_fp32=False)
    with pytest.raises(ValueError, match="RotaryEmbedding: max_seqlen: expected a length"):
        rotary_embedding.RotaryEmbedding(8)(
            torch.zeros(2, 3, 3, 2, 8), seqlen_offset=torch.zeros(2).int()
        )


# -- flash_attn.losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logit_scale", [1.0, 0.5])
@pytest.mark.parametrize("z", [0.0, 1e-2])
def test_cross_entropy(dtype, smoothing, logit_scale, z):
    """Against the definition: log-sum-exp, less the label's logit, less the mean logit."""
    torch.manual_seed(0)
    logits = torch.randn(7, 13).to(dtype).requires_grad_()
    labels = torch.tensor([3, 12, -100, 0, 5, -100, 7])
    scaled = logits.double() * logit_scale
    lse = scaled.logsumexp(1)
    real = labels >= 0
    picked = scaled[torch.arange(7), labels.clamp(min=0)]
    z_expected = (z * lse**2) * real
    expected = (lse - (1 - smoothing) * picked - smoothing * scaled.mean(1)) * real + z_expected
    arguments = {"label_smoothing": smoothing, "logit_scale": logit_scale, "lse_square_scale": z}
    result, z_losses = losses.cross_entropy_loss(logits, labels, **arguments)
    assert result.dtype is z_losses.dtype is torch.float32 and not z_losses.requires_grad
    torch.testing.assert_close(result.double(), expected)
    torch.testing.assert_close(z_losses.double(), z_expected.detach())
    weights = torch.randn(7)
    gradients = [torch.autograd.grad((x * weights).sum(), logits)[0] for x in (result, expected)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][~real].any()
    again, _ = losses.cross_entropy_loss(
        logits, labels.int(), lse.float(), inplace_backward=True, **arguments
    )
    assert torch.equal(again, result)
    for reduction, reduce in (
        ("none", lambda x: x),
        ("sum", torch.sum),
        ("mean", lambda x: x.sum() / 5),
    ):
        module = losses.CrossEntropyLoss(reduction=reduction, return_z_loss=True, **arguments)
        loss, z_loss = module(logits, labels)
        torch.testing.assert_close(loss, reduce(result))
        torch.testing.assert_close(z_loss, reduce(z_losses))
        assert not z_loss.requires_grad
        module.return_z_loss = False
        assert torch.equal(module(logits, labels, lse.float()), loss)


def test_cross_entropy_is_that_of_pytorch():
    logits, labels = torch.randn(6, 9, dtype=torch.float64), torch.tensor([1, 2, 0, 7, 7, 8])
    for reduction in ("mean", "sum", "none"):
        module = losses.CrossEntropyLoss(7, reduction, 0.2, inplace_backward=True)
        plain = F.cross_entropy(
            logits, labels, ignore_index=7, reduction=reduction, label_smoothing=0.2
        )
        torch.testing.assert_close(module(logits, labels), plain)


def test_cross_entropy_refuses():
    logits, labels = torch.randn(6, 9), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"cross_entropy_loss: process_group: .*None"):
        losses.cross_entropy_loss(logits, labels, process_group=object())
    with pytest.raises(NotImplementedError, match="CrossEntropyLoss: process_group: not impl"):
        losses.CrossEntropyLoss(process_group=object())
    with pytest.raises(ValueError, match=r"CrossEntropyLoss: reduction: .*'mean'.* got 'max'"):
        losses.CrossEntropyLoss(reduction="max")
    with pytest.raises(ValueError, match=r"loss: logits: .*\(batch, vocab_size\), got \(2, 3, 9\)"):
        losses.cross_entropy_loss(logits.view(2, 3, 9), labels)
    with pytest.raises(ValueError, match=r"loss: labels: expected shape \(6,\), got \(5,\)"):
        losses.cross_entropy_loss(logits, labels[1:])


# -- flash_attn_interface -------------------------------------------------------------------------

HINTS = {"pack_gqa": True, "sm_margin": 8, "deterministic": True}
MASKS = [{}, {"causal": True}, {"window_size": (3, 1)}, {"softcap": 2.0, "softmax_scale": 0.3}]


def near(result, expected):
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("meaning", MASKS)
@pytest.mark.parametrize("num_splits", [0, 1, 5])
def test_fa3_dense(meaning, num_splits):
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    out, lse = interface3.flash_attn_func(
        q, k, v, num_splits=num_splits, return_attn_probs=True, **meaning, **HINTS
    )
    for b in range(2):
        expected, expected_lse = reference.attention(q[b], k[b], v[b], **meaning)
        near(out[b], expected)
        near(lse[b], expected_lse)
    assert torch.equal(interface3.flash_attn_func(q, k, v, **meaning), out)


@pytest.mark.parametrize("meaning", MASKS)
@pytest.mark.parametrize("packing", ["three", "heads"])
def test_fa3_qkvpacked(meaning, packing):
    if packing == "three":
        qkv, heads = torch.randn(2, 5, 3, 4, 8), None
        q, k, v = qkv.unbind(2)
    else:
        qkv, heads = torch.randn(2, 5, 8, 8), 4
        q, k, v = qkv.split((4, 2, 2), 2)
    out, lse = interface3.flash_attn_qkvpacked_func(
        qkv, num_heads_q=heads, return_attn_probs=True, **meaning
    )
    expected = interface3.flash_attn_func(q, k, v, return_attn_probs=True, **meaning)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    with pytest.raises(ValueError, match=r"flash_attn_qkvpacked_func: qkv: .* num_heads_q=3"):
        interface3.flash_attn_qkvpacked_func(qkv[:, :, :2], num_heads_q=3)


@pytest.mark.parametrize("meaning", MASKS)
@pytest.mark.parametrize("used", ["none", "keys", "queries", "both"])
@pytest.mark.parametrize("num_splits", [1, 0, 3, 200])
def test_fa3_varlen(meaning, used, num_splits):
    lengths_q, lengths_k = [4, 0, 6, 1], [7, 3, 6, 9]
    used_q = [3, 0, 0, 1] if used in ("queries", "both") else lengths_q
    used_k = [5, 3, 2, 0] if used in ("keys", "both") else lengths_k
    q = torch.randn(sum(lengths_q), 4, 8)
    k, v = (torch.randn(sum(lengths_k), 2, 8) for _ in "kv")
    cu_q, cu_k = (F.pad(ints(*n).cumsum(0).int(), (1, 0)) for n in (lengths_q, lengths_k))
    options = {} if used_q is lengths_q else {"seqused_q": ints(*used_q)}
    options |= {} if used_k is lengths_k else {"seqused_k": ints(*used_k)}
    call = (q, k, v, cu_q, cu_k, 6, 9)
    out, lse = interface3.flash_attn_varlen_func(
        *call, num_splits=num_splits, return_attn_probs=True, **options, **meaning, **HINTS
    )
    assert out.shape == q.shape and lse.shape == (4, 11)
    expected, expected_lse = torch.zeros(11, 4, 8).double(), torch.full((4, 11), -torch.inf)
    expected_lse = expected_lse.double()
    for b in range(4):
        rows = slice(int(cu_q[b]), int(cu_q[b]) + used_q[b])
        keys = slice(int(cu_k[b]), int(cu_k[b]) + used_k[b])
        expected[rows], expected_lse[:, rows] = reference.attention(
            q[rows], k[keys], v[keys], **meaning
        )
    near(out, expected)
    near(lse, expected_lse)
    alone = interface3.flash_attn_varlen_func(*call, num_splits=num_splits, **options, **meaning)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("meaning", MASKS)
@pytest.mark.parametrize("cache", ["dense", "rows", "pages", "rows of pages"])
@pytest.mark.parametrize("append", [0, 2])
def test_fa3_kvcache(meaning, cache, append):
    """What lies past a sequence's end, in unused rows and in unused pages, is NaN."""
    batch, lengths, capacity, page_size = 3, [5, 0, 9], 12, 4
    rows = [3, 0, 2] if "rows" in cache else [0, 1, 2]
    keys = torch.full((2, 4 if "rows" in cache else 3, capacity, 2, 8), float("nan"))
    for row, n in zip(rows, lengths, strict=True):
        keys[:, row, :n] = torch.randn(2, n, 2, 8)
    k_cache, v_cache = keys.clone()
    options = {}
    if "rows" in cache:
        options["cache_batch_idx"] = ints(*rows)
    if "pages" in cache:
        pages = torch.randperm(keys.shape[1] * capacity // page_size)
        options["page_table"] = pages.argsort().view(keys.shape[1], -1).int()
        k_cache, v_cache = (
            x.flatten(0, 1).unflatten(0, (-1, page_size))[pages] for x in (k_cache, v_cache)
        )
    q = torch.randn(batch, 3, 4, 8)
    new = torch.randn(2, batch, append, 2, 8)
    if append:
        options |= dict(zip("kv", new, strict=True))
    before = [x.clone() for x in (k_cache, v_cache)]
    call = {"cache_seqlens": ints(*lengths), "max_seqlen_q": 3} | options | meaning
    out, lse, *rest = interface3.flash_attn_with_kvcache(
        q, k_cache, v_cache, return_softmax_lse=True, pack_gqa=True, sm_margin=3,
        scheduler_metadata=ints(), **call,
    )  # fmt: skip
    assert [x.numel() for x in rest] == [0, 0]
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        k, v = torch.cat((keys[:, row, :n], new[:, b]), 1)
        expected, expected_lse = reference.attention(q[b], k, v, **meaning)
        near(out[b], expected)
        near(lse[b], expected_lse)
    assert torch.equal(interface3.flash_attn_with_kvcache(q, *before, **call), out)


def test_fa3_kvcache_of_packed_queries_and_rotation():
    k_cache, v_cache = torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    cu, lengths = ints(0, 2, 5), ints(4, 6)
    options = {
        "cache_seqlens": lengths, "cu_seqlens_q": cu, "max_seqlen_q": 3, "causal": True,
        "rotary_cos": torch.randn(9, 4), "rotary_sin": torch.randn(9, 4),
    }  # fmt: skip
    out = interface3.flash_attn_with_kvcache(
        q, k_cache.clone(), v_cache.clone(), k, v, cu_seqlens_k_new=cu, rotary_seqlens=lengths,
        **options,
    )  # fmt: skip
    expected = mfa.flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), k, v, **options)
    assert torch.equal(out, expected)
    for name, other in (("cu_seqlens_k_new", cu.clone()), ("rotary_seqlens", lengths.clone())):
        with pytest.raises(NotImplementedError, match=f"kvcache: {name}: .*itself or leave it out"):
            interface3.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options | {name: other})


def test_fa3_rows_of_a_page_table_that_do_not_exist_are_empty():
    k_cache, v_cache = torch.randn(4, 3, 2, 8), torch.randn(4, 3, 2, 8)
    q = torch.randn(3, 1, 2, 8)
    out, lse, *_ = interface3.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=ints(3, 3, 3), cache_batch_idx=ints(-1, 1, 2),
        page_table=ints(0, 1, 2, 3).view(2, 2), return_softmax_lse=True,
    )  # fmt: skip
    for b in (0, 2):
        assert not out[b].any() and (lse[b] == -torch.inf).all()
    expected, expected_lse = reference.attention(q[1], k_cache[2], v_cache[2])
    near(out[1], expected)
    near(lse[1], expected_lse)


def test_fa3_sinks():
    q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    s_aux = torch.randn(4)
    expected, _ = reference.attention(q[0], k[0], v[0], causal=True, s_aux=s_aux)
    options = {"causal": True, "s_aux": s_aux}
    near(interface3.flash_attn_func(q, k, v, **options)[0], expected)
    near(interface3.flash_attn_with_kvcache(q, k, v, **options)[0], expected)
    cu = ints(0, 5)
    packed = interface3.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 5, 5, **options)
    near(packed, expected)


def test_fa3_has_gradients():
    qkv = torch.randn(2, 5, 3, 4, 8, requires_grad=True)
    q, k, v = qkv.unbind(2)
    meaning = {"softmax_scale": 0.3, "window_size": (3, 1), "softcap": 2.0}
    plain = mfa.flash_attn_func(q, k, v, **meaning)
    expected = torch.autograd.grad(plain.sum(), qkv)
    cu, used = ints(0, 5, 10), ints(5, 5)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    lengths = {"seqused_q": used, "seqused_k": used}
    for out in (
        interface3.flash_attn_func(q, k, v, **meaning),
        interface3.flash_attn_qkvpacked_func(qkv, **meaning),
        interface3.flash_attn_varlen_func(*packed, cu, cu, 5, 5, **lengths, **meaning),
    ):
        torch.testing.assert_close(torch.autograd.grad(out.sum(), qkv), expected)


@pytest.mark.parametrize("name", ["qv", "q_descale", "k_descale", "v_descale", "attention_chunk"])
def test_fa3_refuses(name):
    x = torch.randn(1, 5, 2, 8)
    cu = ints(0, 5)
    calls = {
        interface3.flash_attn_func: (x, x, x),
        interface3.flash_attn_varlen_func: (x[0], x[0], x[0], cu, cu, 5, 5),
        interface3.flash_attn_with_kvcache: (x, x, x),
        interface3.flash_attn_qkvpacked_func: (torch.stack((x, x, x), 2),),
    }
    for function, arguments in calls.items():
        if name not in inspect.signature(function).parameters:
            continue
        with pytest.raises(NotImplementedError, match=f"^flash_attn_.*: {name}: not implemented"):
            function(*arguments, **{name: 4 if name == "attention_chunk" else x})
        function(*arguments, **{name: 0 if name == "attention_chunk" else None})


def test_fa3_scheduler_metadata_changes_nothing():
    k_cache, q, lengths = torch.randn(2, 9, 2, 8), torch.randn(2, 1, 2, 8), ints(4, 9)
    metadata = interface3.get_scheduler_metadata(2, 1, 9, 2, 2, 8, lengths, num_splits=4)
    assert metadata.dtype is torch.int32 and metadata.device == lengths.device
    assert metadata.shape == (0,), "which fits into any buffer"
    out = interface3.flash_attn_with_kvcache(
        q, k_cache, k_cache, cache_seqlens=lengths, scheduler_metadata=metadata
    )
    assert torch.equal(out, mfa.flash_attn_with_kvcache(q, k_cache, k_cache, cache_seqlens=lengths))


# -- flash_attn_combine ---------------------------------------------------------------------------


def parts_of_attention(shape, cuts):
    """(out, lse) of attention to each part of the keys, as flash_attn_combine takes them, and to
    all of them by definition.
    """
    q, k, v = (torch.randn(shape[0], n, shape[2], 8) for n in (shape[1], cuts[-1], cuts[-1]))
    outs, lses, whole = [], [], []
    for first, last in zip((0, *cuts), cuts, strict=False):
        part = [
            reference.attention(q[b], k[b, first:last], v[b, first:last]) for b in range(shape[0])
        ]
        outs.append(torch.stack([out for out, _ in part]))
        lses.append(torch.stack([lse.T for _, lse in part]))
    whole = [reference.attention(q[b], k[b], v[b]) for b in range(shape[0])]
    expected = torch.stack([out for out, _ in whole]), torch.stack([lse.T for _, lse in whole])
    return torch.stack(outs).float(), torch.stack(lses).float(), *expected


@pytest.mark.parametrize("cuts", [(9,), (4, 9), (1, 1, 2, 7, 9)])
@pytest.mark.parametrize("packed", [False, True])
def test_combine(cuts, packed):
    """The third list has a part without keys."""
    outs, lses, expected, expected_lse = parts_of_attention((2, 3, 4), cuts)
    outs[lses == -torch.inf] = float("nan")
    if packed:
        outs, lses = outs.flatten(1, 2), lses.flatten(1, 2)
        expected, expected_lse = expected.flatten(0, 1), expected_lse.flatten(0, 1)
    out, lse = interface3.flash_attn_combine(outs, lses)
    assert out.dtype is lse.dtype is torch.float32
    near(out, expected)
    near(lse, expected_lse)
    half, _ = interface3.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    assert torch.equal(half, out.bfloat16())
    into = torch.empty_like(half)
    written, _ = interface3.flash_attn_combine(outs, lses, into)
    assert written is into and torch.equal(into, half)
    swapped = lses.transpose(-1, -2).contiguous().transpose(-1, -2)  # as the official kernel wants
    near(interface3.flash_attn_combine(outs, swapped)[0], expected)


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -float("inf")])
def test_combine_does_not_read_empty_parts(rubbish):
    outs = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64)
    lses = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    lses[1, 0], lses[:, 1, 2], lses[0, 1, 4, 1] = (-torch.inf,) * 3
    clean, clean_lse = interface3.flash_attn_combine(outs, lses)
    outs[lses == -torch.inf] = rubbish
    outs.requires_grad_()
    out, lse = interface3.flash_attn_combine(outs, lses)
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)
    assert not out[1, 2].any() and (lse[1, 2] == -torch.inf).all()
    assert out.isfinite().all()
    out.sum().backward()
    assert outs.grad.isfinite().all() and not outs.grad[lses == -torch.inf].any()


def test_combine_has_gradients():
    outs = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interface3.flash_attn_combine, (outs, lses))


def test_combine_refuses():
    outs, lses = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 5, 4)
    call = interface3.flash_attn_combine
    with pytest.raises(
        TypeError, match=r"flash_attn_combine: lse_partial: expected a torch.Tensor"
    ):
        call(outs, None)
    with pytest.raises(ValueError, match="combine: out_partial: expected 4 or 5 dimensions"):
        call(outs[0, 0], lses[0, 0])
    with pytest.raises(ValueError, match=r"combine: lse_partial: .*\(3, 2, 5, 4\), got \(3, 2, 4"):
        call(outs, lses.transpose(-1, -2))
    with pytest.raises(TypeError, match="combine: out_partial: expected a float dtype"):
        call(outs.long(), lses)
    with pytest.raises(ValueError, match="combine: out: expected shape"):
        call(outs, lses, outs[0, 0])
    with pytest.raises(
        TypeError, match=r"combine: out: expected dtype torch.bfloat16, as out_dtyp"
    ):
        call(outs, lses, outs[0], torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"combine: lse_partial: .*on cpu, as out_partial, got meta"
    ):
        call(outs, lses.to("meta"))


# -- transformers ---------------------------------------------------------------------------------

TRANSFORMERS = """
import importlib, inspect, sys, torch
from mini_flash_attention import reference
late, versions = sys.argv[1] == "late", sys.argv[2:]
torch.cuda.is_available = lambda: True  # without a CUDA device transformers refuses before it looks
from mini_flash_attention.integrations.flash_attn import install, uninstall
if not late:
    install()
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import modeling_flash_attention_utils as utils
from transformers.utils import is_flash_attn_2_available
assert is_flash_attn_2_available() != late
install()
config = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=97,
)
torch.manual_seed(0)
model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
ids = torch.randint(0, 97, (3, 9))
mask = torch.ones_like(ids)
mask[0, :4] = mask[2, :2] = 0

@torch.no_grad()
def results():
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain, padded = model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]
    return plain, padded, model.generate(ids, attention_mask=mask, **greedy)

eager = results()

for version in versions:
    implementation = "flash_attention_" + version
    model.set_attn_implementation(implementation)
    for a, b in zip(results(), eager, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    module = importlib.import_module({"2": "flash_attn", "3": "flash_attn_interface"}[version])
    assert utils._flash_varlen_fn.__module__.startswith("mini_flash_attention.")
    assert utils._flash_varlen_fn is module.flash_attn_varlen_func
    # A step of continuous batching that only decodes: new keys go to the pages they belong to.
    # Older transformers have no pages in this function.
    if "block_table" not in inspect.getsource(utils._flash_attention_forward):
        continue
    q, k, v = (torch.randn(1, 2, n, 16) for n in (4, 2, 2))
    pages = torch.randn(2, 6, 4, 2, 16)
    table = torch.tensor([[0, 2], [5, 1]], dtype=torch.int32)
    kept = torch.cat([pages[:, table[0].long()].flatten(1, 2)[:, :5],
                      pages[:, table[1].long()].flatten(1, 2)[:, :3]], 1)
    out = utils._flash_attention_forward(
        q, k, v, None, 1, True, attn_implementation=implementation, block_table=table,
        cu_seq_lens_q=torch.tensor([0, 1, 2], dtype=torch.int32),
        cu_seq_lens_k=torch.tensor([0, 6, 10], dtype=torch.int32),
        max_length_q=1, max_length_k=6, k_cache=pages[0], v_cache=pages[1],
    )
    for b, rows in enumerate((slice(0, 5), slice(5, 8))):
        keys, values = (torch.cat((x[rows], new[0, b : b + 1])) for x, new in zip(kept, (k, v)))
        expected, _ = reference.attention(q[0, b : b + 1], keys, values, causal=True)
        torch.testing.assert_close(out[0, b : b + 1].double(), expected, atol=1e-5, rtol=1e-5)
uninstall()
assert not is_flash_attn_2_available()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("when", "versions"), [("early", "23"), ("late", "32")])
def test_transformers_finds_flash_attention(when, versions):
    """Installed before transformers is imported and after; both versions, either first."""
    pytest.importorskip("transformers", "5.17")
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, when, *versions],
        env={"PYTHONPATH": ":".join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
