"""Checks of lengths and page numbers, and of Triton, that are off or out of sight in daily use."""

import os
import subprocess
import sys

import pytest
import torch
from calls import described
from cases import ints
from torch._subclasses.fake_tensor import FakeTensorMode

import mini_flash_attention as mfa
from mini_flash_attention import device_checks, settings


def tokens(*shape):
    return torch.zeros(*shape, 2, 16, dtype=torch.float16)


# Two sequences each. Where keys are paged there are 6 pages of 4 tokens, 2 to a sequence.


def varlen():
    return mfa.flash_attn_varlen_func, {
        "q": tokens(6), "k": tokens(8), "v": tokens(8), "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 3, 7), "max_seqlen_q": 3, "max_seqlen_k": 4,
    }  # fmt: skip


def paged_varlen():
    function, arguments = varlen()
    paged = {"k": tokens(6, 4), "v": tokens(6, 4), "block_table": torch.tensor([[5, 0], [2, 3]])}
    paged["block_table"] = paged["block_table"].int()
    # Lengths 3 and 8 that start anywhere: only differences count.
    return function, arguments | paged | {"cu_seqlens_k": ints(90, 93, 101), "max_seqlen_k": 8}


def kvcache():
    return mfa.flash_attn_with_kvcache, {
        "q": tokens(2, 1), "k_cache": tokens(2, 8), "v_cache": tokens(2, 8),
        "k": tokens(2, 2), "v": tokens(2, 2), "cache_seqlens": ints(6, 0),
    }  # fmt: skip


def paged_kvcache():
    function, arguments = kvcache()
    table = torch.tensor([[5, 0], [2, -1]]).int()  # keys of sequence 1 end in its first page
    paged = {"k_cache": tokens(6, 4), "v_cache": tokens(6, 4), "block_table": table}
    return function, arguments | paged


def packed_kvcache():
    """Two and three queries that bring their keys, to the last and the first of three rows."""
    function, arguments = kvcache()
    return function, arguments | {
        "q": tokens(5), "k": tokens(5), "v": tokens(5), "k_cache": tokens(3, 8),
        "v_cache": tokens(3, 8), "cu_seqlens_q": ints(0, 2, 5), "max_seqlen_q": 3,
        "cache_batch_idx": ints(2, 0), "cache_leftpad": ints(8, 0), "rotary_cos": torch.ones(8, 4),
        "rotary_sin": torch.ones(8, 4), "causal": True,
    }  # fmt: skip


def packed_paged_kvcache():
    function, arguments = packed_kvcache()
    _, paged = paged_kvcache()
    changes = {name: paged[name] for name in ("k_cache", "v_cache", "block_table")}
    return function, arguments | changes | {"cache_batch_idx": None, "cache_leftpad": ints(6, 3)}


CALLS = [varlen, paged_varlen, kvcache, paged_kvcache, packed_kvcache, packed_paged_kvcache]

BAD = {
    "offsets-start-q": (
        varlen, {"cu_seqlens_q": ints(1, 2, 5)}, "cu_seqlens_q: expected 0 .* got 1"
    ),
    "offsets-start-k": (
        varlen, {"cu_seqlens_k": ints(-1, 3, 7)}, "cu_seqlens_k: expected 0 .* got -1"
    ),
    "offsets-decreasing-q": (
        varlen, {"cu_seqlens_q": ints(0, 4, 3)},
        "cu_seqlens_q: expected .*never decrease, got 3 after 4 in entry 2",
    ),
    "offsets-decreasing-k-paged": (
        paged_varlen, {"cu_seqlens_k": ints(0, 9, 1)},
        "cu_seqlens_k: expected .*never decrease, got 1 after 9 in entry 2",
    ),
    "offsets-end-q": (
        varlen, {"cu_seqlens_q": ints(0, 4, 7), "max_seqlen_q": 9},
        "cu_seqlens_q: expected an end at 6 tokens .*, got 7",
    ),
    "offsets-end-k": (
        varlen, {"cu_seqlens_k": ints(0, 4, 9), "max_seqlen_k": 9},
        "cu_seqlens_k: expected an end at 8 tokens .*, got 9",
    ),
    "offsets-start-q-of-a-cache": (
        packed_kvcache, {"cu_seqlens_q": ints(1, 2, 5)}, "cu_seqlens_q: expected 0 .* got 1"
    ),
    "offsets-end-q-of-a-cache": (
        packed_kvcache, {"cu_seqlens_q": ints(0, 3, 6)},
        "cu_seqlens_q: expected an end at 5 tokens .*, got 6",
    ),
    "longest-q": (varlen, {"max_seqlen_q": 2}, "max_seqlen_q: expected at least 3, got 2"),
    "longest-q-of-a-cache": (
        packed_kvcache, {"max_seqlen_q": 2}, "max_seqlen_q: expected at least 3, got 2"
    ),
    "longest-k": (varlen, {"max_seqlen_k": 3}, "max_seqlen_k: expected at least 4, got 3"),
    "longest-k-paged": (paged_varlen, {"max_seqlen_k": 7}, "max_seqlen_k: .*at least 8, got 7"),
    "longest-k-used": (
        paged_varlen, {"cu_seqlens_k": None, "seqused_k": ints(3, 7), "max_seqlen_k": 6},
        "max_seqlen_k: expected at least 7, got 6",
    ),
    "rows-past-the-cache": (
        packed_kvcache, {"cache_batch_idx": ints(2, 3)},
        "cache_batch_idx: expected rows from 0 to 2, got 3 in entry 1",
    ),
    "rows-negative": (
        packed_kvcache, {"cache_batch_idx": ints(-1, 0)},
        "cache_batch_idx: expected rows from 0 to 2, got -1 in entry 0",
    ),
    "padding-negative": (
        packed_paged_kvcache, {"cache_leftpad": ints(0, -1)},
        "cache_leftpad: expected 0 to the 3 keys of sequence 1, got -1 in entry 1",
    ),
    "padding-past-the-keys": (
        packed_kvcache, {"cache_leftpad": ints(8, 4)},
        "cache_leftpad: expected 0 to the 3 keys of sequence 1, got 4 in entry 1",
    ),
    "padding-past-the-cache": (
        kvcache, {"cache_leftpad": ints(0, 9), "cache_seqlens": None, "k": None, "v": None},
        "cache_leftpad: expected 0 to the 8 keys of sequence 1, got 9 in entry 1",
    ),
    "page-past-the-pool": (
        paged_varlen, {"block_table": torch.tensor([[5, 0], [2, 6]]).int()},
        "block_table: expected pages from 0 to 5 for the 8 keys of sequence 1, got 6 in column 1",
    ),
    "page-used-in-part": (
        paged_varlen, {"cu_seqlens_k": ints(0, 3, 8), "block_table": ints(5, 9, 2, -1).view(2, 2)},
        "block_table: expected pages from 0 to 5 for the 5 keys of sequence 1, got -1 in column 1",
    ),
    "page-negative": (
        paged_kvcache, {"block_table": torch.tensor([[5, -1], [2, -1]]).int()},
        "block_table: expected pages .* of sequence 0, got -1 in column 1",
    ),
    "page-of-packed-new-keys": (
        packed_paged_kvcache, {"cache_seqlens": ints(6, 2)},
        "block_table: expected pages from 0 to 5 for the 5 keys of sequence 1, got -1 in column 1",
    ),
    "page-of-a-length-for-all": (paged_kvcache, {"cache_seqlens": 6}, "block_table: .* got -1"),
    "lengths-negative": (
        kvcache, {"cache_seqlens": ints(6, -1)}, "cache_seqlens: .*got -1 in entry 1"
    ),
    "seqused_k-negative": (
        paged_varlen, {"seqused_k": ints(-(2**31), 2)}, "seqused_k: expected 0 or more, got -2147"
    ),
    "seqused_q-more-than-there-are": (
        varlen, {"seqused_q": ints(2, 4)},
        "seqused_q: expected 0 to the 3 queries of sequence 1, got 4 in entry 1",
    ),
    "seqused_k-more-than-there-are": (
        varlen, {"seqused_k": ints(4, 4)}, "seqused_k: .*at most the 3 of cu_seqlens_k, got 4"
    ),
    "room-past-the-cache": (
        kvcache, {"cache_seqlens": ints(0, 9), "k": None, "v": None},
        "cache_seqlens: expected at most the cache's 8 tokens, got 9$",
    ),
    "room-append-past-the-cache": (
        kvcache, {"cache_seqlens": ints(0, 8)},
        "cache_seqlens: .* 8 tokens, got 10 .the keys to append count too",
    ),
    "room-packed-append-past-the-cache": (
        packed_kvcache, {"cache_seqlens": ints(7, 0)},
        "cache_seqlens: .* 8 tokens, got 9 .the keys to append count too",
    ),
    "room-packed-append-of-the-longest": (
        packed_kvcache, {"cache_seqlens": ints(6, 6)},
        "cache_seqlens: .* 8 tokens, got 9 .the keys to append count too",
    ),
    "room-packed-append-past-the-table": (
        packed_paged_kvcache, {"cache_seqlens": ints(6, 6)},
        "block_table: expected columns for 9 tokens, got room for 8 .the keys to append",
    ),
    "room-append-past-the-table": (
        paged_kvcache, {"cache_seqlens": ints(8, 0)},
        "block_table: expected columns for 10 tokens, got room for 8 .the keys to append",
    ),
    "room-past-the-table": (
        paged_kvcache, {"cache_seqlens": ints(9, 0), "k": None, "v": None},
        "block_table: expected columns for 9 tokens, got room for 8$",
    ),
    "rotary-keys-past-the-tables": (
        packed_kvcache, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(7, 4)),
        "rotary_cos: expected a table for the 8 positions of sequence 0, got 7",
    ),
    "rotary-queries-past-the-tables": (
        kvcache, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(8, 4))
        | {"q": tokens(2, 4), "causal": True},
        "rotary_cos: expected a table for the 10 positions of sequence 0, got 8",
    ),
    "rotary-a-length-for-all": (
        kvcache, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(5, 4))
        | {"cache_seqlens": 4},
        "rotary_cos: expected a table for the 6 positions of sequence 0, got 5",
    ),
}  # fmt: skip


def test_tables_need_not_reach_past_what_is_rotated():
    """Queries that all stand at the first's place, and sequences that bring no tokens."""
    function, arguments = kvcache()
    tables = dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(8, 4))
    device_checks.values(described(function, arguments | tables | {"q": tokens(2, 4)}))
    function, arguments = packed_kvcache()
    tables = dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(4, 4))
    nothing = {"cu_seqlens_q": ints(0, 0, 4), "max_seqlen_q": 4, "cache_leftpad": ints(6, 0)}
    device_checks.values(described(function, arguments | tables | nothing))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_good_numbers_pass(call):
    function, arguments = call()
    device_checks.values(described(function, arguments))
    if "cache_seqlens" in arguments:
        nothing = {"cache_seqlens": ints(0, 0)}
        if "cache_leftpad" in arguments:
            nothing["cache_leftpad"] = ints(0, 0)
        device_checks.values(described(function, arguments | nothing))


@pytest.mark.parametrize("empty", ["no queries", "no keys", "no sequences"])
def test_empty_calls_pass(empty):
    function, arguments = varlen()
    nothing = {"cu_seqlens_q": ints(0, 0, 0), "cu_seqlens_k": ints(0, 0, 0)}
    if empty == "no sequences":
        nothing = {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0), "q": tokens(0)}
    elif empty == "no queries":
        nothing |= {"q": tokens(0), "max_seqlen_q": 0, "max_seqlen_k": 0}
    else:
        nothing |= {"k": tokens(0), "v": tokens(0), "max_seqlen_k": 0}
    device_checks.values(described(function, arguments | nothing))


def test_dense_calls_have_no_numbers_to_check():
    q = tokens(2, 3)
    device_checks.values(described(mfa.flash_attn_func, {"q": q, "k": q, "v": q}))


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers(name):
    call, changes, message = BAD[name]
    function, arguments = call()
    p = described(function, arguments | changes)  # passes: the arguments alone are right
    with pytest.raises(ValueError, match=rf"^{function.__name__}: {message}"):
        device_checks.values(p)


def test_refused_during_capture(monkeypatch):
    """A graph can't wait for a number. Fake tensors stand in for a GPU's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        q = torch.empty(2, 3, 2, 16, dtype=torch.float16, device="cuda")
        p = described(mfa.flash_attn_func, {"q": q, "k": q, "v": q})
    message = "^flash_attn_func: MINI_FLASH_ATTENTION_CHECK: expected 0 during .*capture, got 1"
    with pytest.raises(ValueError, match=message):
        device_checks.values(p)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device_checks.values(p)


CALLED = """
import os, sys, torch
q = torch.zeros(2, 1, 2, 16, dtype=torch.float16)
cache = torch.zeros(2, 8, 2, 16, dtype=torch.float16)
lengths = torch.tensor([9, 1]).int()
name = sys.argv[1]
for switch in (None, "0", "1"):
    os.environ.pop(name, None)
    os.environ.update({} if switch is None else {name: switch})
    for module in [x for x in sys.modules if x.startswith("mini_flash_attention")]:
        del sys.modules[module]
    import mini_flash_attention as mfa
    try:
        mfa.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)
        print("works")
    except ValueError as error:
        print(error)
"""


def test_switch():
    """The environment decides, at import; without the switch the kernels clamp."""
    done = subprocess.run(
        [sys.executable, "-c", CALLED, settings.CHECK],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    unset, zero, one = done.stdout.splitlines()
    assert unset == zero == "works"
    assert one.startswith("flash_attn_with_kvcache: cache_seqlens: expected at most")


# -- Triton, which may be missing or too old -------------------------------------------------------


@pytest.fixture
def unseen_triton():
    """require_triton looks again, in the test and after it."""
    settings.require_triton.cache_clear()
    yield
    settings.require_triton.cache_clear()


def test_triton_of_this_environment_will_do(unseen_triton):
    pytest.importorskip("triton")
    settings.require_triton()


def test_no_triton(monkeypatch, unseen_triton):
    monkeypatch.setitem(sys.modules, "triton", None)  # what makes `import triton` fail
    message = r"^mini_flash_attention: triton: expected 3\.6 or newer, got none \(pip install"
    with pytest.raises(ImportError, match=message):
        settings.require_triton()


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.3.1", True), ("3.5.1", True), ("3.6.0", False), ("3.10.0+git1", False), ("4.0", False)],
)
def test_version_of_triton(monkeypatch, unseen_triton, version, old):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    if old:
        with pytest.raises(ImportError, match=rf"expected 3\.6 or newer, got {version} \(pip"):
            settings.require_triton()
    else:
        settings.require_triton()
