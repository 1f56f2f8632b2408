"""`python -m mini_flash_attention`: what it prints, and that it notices a broken kernel."""

import os
import re
import subprocess
import sys

import pytest
import torch

import mini_flash_attention as mfa
import mini_flash_attention.__main__ as cli
from mini_flash_attention import dispatch, plan, settings

H200 = plan.gpu.Gpu("H200", 90, 132)
L4 = plan.gpu.Gpu("L4", 89, 58)


def run(*arguments):
    """The command in a process of its own that sees no GPU."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(cli.VARIABLES)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"MINI_FLASH_ATTENTION_CHECK": "1"}
    command = [sys.executable, "-m", "mini_flash_attention", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_the_cpu_path_is_checked():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:8])
    assert said["mini_flash_attention"] == mfa.__version__
    assert said["torch"] == torch.__version__
    assert said["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert said["GPU"].startswith("none")
    assert "PyTorch's own" in said["prefill"] and "PyTorch's own" in said["decoding"]
    assert "MINI_FLASH_ATTENTION_CHECK=1" in said["environment"]
    for library in ("transformers", "flash-attn", "torch's registry"):
        assert library in done.stdout
    for check in cli.CHECKS:
        (line,) = (x for x in done.stdout.splitlines() if x.startswith(f"{check.name} "))
        assert "error" in line and "promise" in line and line.endswith("ok"), line
        assert "CPU" in line
    assert done.stdout.endswith("all well\n")


@pytest.mark.parametrize(
    ("argument", "status", "out", "error"),
    [
        ("--version", 0, rf"^mini_flash_attention {re.escape(mfa.__version__)}\n$", "^$"),
        ("--help", 0, r"^usage: python -m mini_flash_attention \[-h\] \[--version\]\n", "^$"),
        ("--gpu", 2, "^$", "error: unrecognized arguments: --gpu\n$"),
        ("dense", 2, "^$", "error: unrecognized arguments: dense\n$"),
    ],
)
def test_arguments_are_answered_without_a_check(argument, status, out, error, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([argument])
    assert ended.value.code == status
    said = capsys.readouterr()
    assert re.search(out, said.out) and re.search(error, said.err)


def test_a_process_has_the_arguments_and_gives_the_status():
    done = run("dense")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.endswith("error: unrecognized arguments: dense\n")


@pytest.fixture
def here(monkeypatch):
    """A process that sees no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fail(*arguments, **options):
    raise RuntimeError("no kernel today")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda q, *arguments, **options: q + float("nan"), "error nan"),
        (lambda q, *arguments, **options: q, "error"),
        (fail, "RuntimeError: no kernel today"),
    ],
)
def test_a_broken_kernel_is_noticed(here, monkeypatch, capsys, broken, said):
    monkeypatch.setattr(cli, "attend", broken)
    assert cli.main() == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.endswith("FAILED")]
    assert [line.split()[0] for line in failed] == ["dense", "causal"]
    assert all(said in line for line in failed)
    assert sum(line.endswith("ok") for line in lines) == len(cli.CHECKS) - 2
    assert lines[-1] == "2 failed"


def described(check):
    """The call of a check as the plan sees it."""
    calls = []
    run = dispatch.run

    def record(entry, arguments):
        calls.append(entry.parse(**arguments))
        return run(entry, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "run", record)
        cli.errors(check, "cpu", torch.float16)  # which the interpreter takes too
    (call,) = calls
    return call


@pytest.mark.parametrize("check", [*cli.CHECKS, cli.HOPPER], ids=lambda c: f"{c.name}-{c.kernels}")
def test_checks_reach_the_kernels_that_they_name(check):
    p = described(check)
    hopper = plan.hopper.hopper(p, p.new_out(), H200)
    decodes = hopper is None and plan.decode.decodes(p, H200)
    assert decodes == ("decode" in check.kernels)
    assert (p.cache.appended > 0) == ("append" in check.kernels)
    if not decodes:
        assert (hopper is not None) == (check.kernels == "Hopper")
    elif "combine" in check.kernels:
        assert plan.decode.decode(p, H200).splits > 1


def test_the_choice_is_explained(monkeypatch):
    monkeypatch.setattr(settings, "INTERPRETED", False)
    monkeypatch.setattr(settings, "PORTABLE", False)
    assert [x.split()[0] for x in cli.chosen(H200)] == ["Hopper", "decode"]
    assert "9.0" in cli.chosen(L4)[0] and cli.chosen(L4)[0].startswith("portable")
    assert "no GPU" in cli.chosen(None)[0]
    monkeypatch.setattr(settings, "PORTABLE", True)
    assert "MINI_FLASH_ATTENTION_PORTABLE" in cli.chosen(H200)[0]
    monkeypatch.setattr(settings, "INTERPRETED", True)
    assert "TRITON_INTERPRET" in cli.chosen(H200)[1]


def test_a_gpu_that_is_too_old_counts_as_none(monkeypatch):
    def too_old(device):
        raise NotImplementedError("expected compute capability 8.0 or newer")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cli, "gpu_of", too_old)
    assert cli.find_gpu() == (None, "expected compute capability 8.0 or newer")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_kernel_is_checked(capsys):
    assert cli.main() == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    for check in cli.CHECKS:
        assert check.kernels in said
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert ("causal        Hopper" in said) == (hopper and not settings.PORTABLE)
