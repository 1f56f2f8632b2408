"""Random calls and gradients (fuzz.py), and whether that harness finds mistakes.

Without a GPU twice, as test_functions.py: through PyTorch, and in Triton's interpreter.
"""

import os

import fuzz
import pytest
import torch

import mini_flash_attention as mfa
from mini_flash_attention import settings


@pytest.mark.parametrize("number", range(2 * fuzz.COMBINATIONS))
def test_cpu(number):
    fuzz.check(0, number, "cpu")


@pytest.mark.parametrize("number", range(fuzz.COMBINATIONS))
def test_gradients_on_the_cpu(number):
    fuzz.check_backward(0, number, "cpu")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backward", [False, True])
def test_gpu(backward, capsys):
    jobs = min(12, os.cpu_count() or 1)
    asked = ["--cases", "300", "--device", "cuda", "--jobs", str(jobs)]
    status = fuzz.main(asked + ["--backward"] * backward)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.startswith("300 cases, 0 failures, ")


def wrong_number(out, given):
    out[0, 0, 0, 0] += 0.05


def wrong_lse(out, given):
    given["lse"][0, 0, 0] += 0.01


def nan_in_lse(out, given):
    given["lse"].masked_fill_(given["lse"] == float("-inf"), float("nan"))


def beside_the_output(out, given):
    out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()


def between_rows_of_the_output(out, given):
    out.as_strided((1,), (1,), out.storage_offset() + out.shape[-1]).zero_()


def unused_slot(out, given):
    cache = given["v_cache"]
    cache[cache.isnan()] = 0


def lost_key(out, given):
    cache = given["k_cache"]
    cache[cache == given["k"][0, 0, 0, 0]] = float("nan")


def length(out, given):
    given["cache_seqlens"] += 1


def query(out, given):
    given["q"][-1] = 0


def fault(out, given):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


# What each needs of a case: words of `fuzz.build`, and their values.
MISTAKES = [
    (wrong_number, {}),
    (wrong_lse, {"lse": True}),
    (nan_in_lse, {"lse": True, "empty": True}),
    (beside_the_output, {"own_out": False}),
    (beside_the_output, {"own_out": True}),
    (between_rows_of_the_output, {"own_out": True}),
    (unused_slot, {}),
    (lost_key, {"appended": 1}),
    (length, {}),
    (query, {}),
    (fault, {}),
]


def case_with(wanted):
    """The number of the first case that is so, and has a key."""
    for number in range(1000):
        words = fuzz.build(0, number, False)[1]
        words["kind"] += " of features" * (number % fuzz.COMBINATIONS >= fuzz.DECODING)
        wanted = {"kind": "decode", **wanted}
        words["empty"] = 0 in words["lengths"] and not words["appended"]
        if words["lengths"][0] and wanted.items() <= words.items():
            return number
    raise AssertionError(f"no case has {wanted}")


@pytest.mark.parametrize(("mistake", "wanted"), MISTAKES)
def test_mistakes_are_found(mistake, wanted, monkeypatch):
    right = mfa.flash_attn_with_kvcache

    def mistaken(**given):
        result = right(**given)
        out, given["lse"] = result if given["return_softmax_lse"] else (result, None)
        mistake(out, given)
        return result

    number = case_with(wanted)
    monkeypatch.setattr(mfa, "flash_attn_with_kvcache", mistaken)
    with pytest.raises(AssertionError, match=f"fuzz.py --seed 0 --case {number} --device cpu\n"):
        fuzz.check(0, number, "cpu")


def wrong_gradient(found, given):
    found[0].view(-1)[0] += 0.1


def nan_for_nobody(found, given):
    found[2][-1] = float("nan")


def unwritten_gradient(found, given):
    found[1][0] = float("nan")


def beside_a_gradient(found, given):
    found[1].as_strided((1,), (1,), found[1].storage_offset() - 1).zero_()


def between_rows_of_a_gradient(found, given):
    found[1].as_strided((1,), (1,), found[1].storage_offset() + found[1].shape[-1]).zero_()


def changed_query(found, given):
    given["q"].view(-1)[0] += 1


MISTAKEN_GRADIENTS = [
    (wrong_gradient, {}),
    (nan_for_nobody, {"kind": "varlen"}),
    (unwritten_gradient, {}),
    (beside_a_gradient, {"own": False}),
    (beside_a_gradient, {"own": True}),
    (between_rows_of_a_gradient, {"own": True}),
    (changed_query, {}),
]


@pytest.mark.parametrize(("mistake", "wanted"), MISTAKEN_GRADIENTS)
def test_mistaken_gradients_are_found(mistake, wanted, monkeypatch):
    right = mfa.backward

    def mistaken(dout, **given):
        found = right(dout, **given)
        mistake(found, given)
        return found

    for number in range(1000):
        case, words = fuzz.build_backward(0, number, False)
        there = all(case.arguments[name].numel() for name in "qkv")
        if there and wanted.items() <= words.items() and words.get("padding", 1):
            break
    monkeypatch.setattr(mfa, "backward", mistaken)
    line = f"fuzz.py --backward --seed 0 --case {number} --device cpu\n"
    with pytest.raises(AssertionError, match=line):
        fuzz.check_backward(0, number, "cpu")


def test_failures_are_listed_and_counted(monkeypatch, capsys):
    right, calls, lost = fuzz.check, [], "CUDA error: the context is lost"

    def sometimes(seed, number, device):
        calls.append(number)
        if number in (1, 97):
            raise AssertionError(f"case {number} of seed {seed}")
        if number == 2:
            raise AssertionError(lost)

    monkeypatch.setattr(fuzz, "check", sometimes)
    assert fuzz.main(["--cases", "100", "--seed", "5", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["case 1 of seed 5", "case 97 of seed 5", lost]
    # 98 would have followed 2 on the GPU that is lost.
    assert printed[3].startswith("99 cases, 3 failures, ")
    assert 98 not in calls
    monkeypatch.setattr(fuzz, "check", right)
    for more in ([], ["--backward"]):
        assert fuzz.main(["--case", "3", "--device", "cpu", *more]) == 0
        assert capsys.readouterr().out.startswith("1 cases, 0 failures, ")


@pytest.mark.skipif(settings.INTERPRETED, reason="nothing new, slowly")
def test_processes(capsys):
    for more in ([], ["--backward"]):
        assert fuzz.main(["--cases", "4", "--device", "cpu", "--jobs", "2", *more]) == 0
        assert capsys.readouterr().out.startswith("4 cases, 0 failures, ")
