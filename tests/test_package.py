"""What is built for an index, what an installation lacks, and how a run of the tests ends."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import mini_flash_attention as mfa

ROOT = Path(__file__).resolve().parent.parent
NAME = f"mini_flash_attention-{mfa.__version__}"
SWITCH = "TRITON_INTERPRET"


def python(*arguments, cwd=ROOT, **environment):
    """A process that finds the package in cwd. It has TRITON_INTERPRET only if that is passed."""
    own = (SWITCH, "PYTEST_")
    inherited = {name: x for name, x in os.environ.items() if not name.startswith(own)}
    environment = {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


# -- what is built --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source distribution, the wheel, and the former unpacked."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    done = python("-m", "hatchling", "build", "-d", folder)
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(folder / f"{NAME}.tar.gz", folder)
    return folder


def files(folder):
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_source_distribution_holds_what_is_tracked(built):
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    assert {"tests/cases.py", "bench/results/h200/host.json", "constraints.txt"} <= tracked
    assert not tracked - files(built / NAME)


def test_the_wheel_holds_the_package_alone(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        names = set(archive.namelist())
    package = {name for name in names if not name.startswith(f"{NAME}.dist-info/")}
    assert package == {f"mini_flash_attention/{name}" for name in files(ROOT / mfa.__name__)}
    assert "mini_flash_attention/py.typed" in package


def test_the_description_has_no_link_that_leads_nowhere(built):
    """A package index shows the README without the files beside it."""
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        metadata = message_from_string(archive.read(f"{NAME}.dist-info/METADATA").decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown = metadata.get_payload()
    links = {target for target in re.findall(r"\]\(([^)]+)\)", shown) if not target.startswith("#")}
    assert all(target.startswith("https://") for target in links), links
    readme = (ROOT / "README.md").read_text()
    assert len(shown.split()) > 0.9 * len(readme.split()), "the text is all there"
    assert re.findall("^```python\n.*?^```$", readme, re.M | re.S) == re.findall(
        "^```python\n.*?^```$", shown, re.M | re.S
    )


def test_links_become_absolute_where_the_source_is_known():
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = "![a](x.svg) [b](y.md#z) [c](https://c) [d](#e)\n```\n[b](y.md)\n```\n"
    assert hook.description(text, "https://host/us/") == (
        "![a](https://host/us/raw/main/x.svg) [b](https://host/us/blob/main/y.md#z) "
        "[c](https://c) [d](#e)\n```\n[b](y.md)\n```\n"
    )
    assert hook.description(text, None) == " b [c](https://c) [d](#e)\n```\n[b](y.md)\n```\n"


@pytest.mark.slow
def test_tests_pass_from_the_source_distribution(built):
    """All are found, and those are run that need documents, results, tools or the package alone."""
    unpacked = built / NAME
    done = python("-c", "import mini_flash_attention as m; print(m.__file__)", cwd=unpacked)
    assert Path(done.stdout.strip()).is_relative_to(unpacked), done.stdout + done.stderr
    pytests = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = python(*pytests, "--collect-only", cwd=unpacked)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "tests/test_generate.py" in found.stdout and "tests/test_bench.py" in found.stdout
    for some in (["tests/test_docs.py", "-k", "measured or exist"], ["tests/test_plan.py"]):
        done = python(*pytests, *some, cwd=unpacked)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_extra_brings_what_the_interpreter_needs(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        said = message_from_string(archive.read(f"{NAME}.dist-info/METADATA").decode())
    needed = [x for x in said.get_all("Requires-Dist") if "extra == 'interpreter'" in x]
    assert len(needed) == 1 and needed[0].startswith("numpy")


# -- Triton's interpreter, and what keeps it from running -----------------------------------------

CALL = """
import os, sys, warnings
import torch

def call():
    import mini_flash_attention
    q = torch.ones(1, 1, 1, 16, dtype=torch.float16)
    out = mini_flash_attention.flash_attn_func(q, q, q)
    assert torch.equal(out, q)
    ran = "mini_flash_attention.kernels.portable.forward" in sys.modules
    print("kernels" if ran else "PyTorch")
"""


def after(preparation, **environment):
    """A call, and the same again, in a process that was prepared for it."""
    pytest.importorskip("triton")
    lines = [CALL, "warnings.simplefilter('always')", preparation, "call()", "call()"]
    return python("-W", "ignore", "-c", "\n".join(lines), **environment)


def test_the_interpreter_runs():
    pytest.importorskip("numpy")
    done = after("", TRITON_INTERPRET="1")
    assert done.stdout.split() == ["kernels", "kernels"], done.stderr


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "numpy",
            "numpy: expected a module that Triton imports, got none "
            r"\(pip install 'mini-flash-attention\[interpreter\]'\)$",
        ),
        ("triton", r"triton: expected 3\.6 or newer, got none \(pip install --upgrade triton"),
        (
            "triton._C.libtriton",
            r"triton: expected 3\.6 or newer, got one that can't be imported: .*libtriton",
        ),
    ],
)
def test_what_is_missing_is_named(missing, message):
    done = after(f"sys.modules[{missing!r}] = None", TRITON_INTERPRET="1")
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(f"ImportError: mini_flash_attention: {message}", last), done.stderr


SET = "os.environ['TRITON_INTERPRET'] = '1'"


@pytest.mark.parametrize(
    "first", ["import mini_flash_attention", "call()", "import triton; call()"]
)
def test_a_switch_that_came_too_late_is_told_once(first):
    done = after(f"{first}\n{SET}")
    assert set(done.stdout.split()) == {"PyTorch"}, done.stderr
    said = "RuntimeWarning: mini_flash_attention: TRITON_INTERPRET=1 was set too late"
    assert done.stderr.count(said) == 1, done.stderr


@pytest.mark.parametrize(
    ("preparation", "environment"),
    [
        (f"import triton\n{SET}", {}),
        ("import mini_flash_attention; del os.environ['TRITON_INTERPRET']", {SWITCH: "1"}),
    ],
)
def test_a_switch_that_only_one_of_two_saw_is_refused(preparation, environment):
    done = after(preparation, **environment)
    message = f"RuntimeError: mini_flash_attention: {SWITCH}: expected the same value when"
    assert done.stderr.strip().splitlines()[-1].startswith(message), done.stderr


# -- how a run of the tests ends ------------------------------------------------------------------

SKIPS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(30))
@pytest.mark.skipif(True, reason="needs a GPU")
def test_gpu(n):
    pass

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(20))
def test_hopper(n):
    pytest.skip("needs a Hopper GPU")

@pytest.mark.skip(reason="needs patience")
def test_other():
    pass

@pytest.mark.xfail(reason="known")
def test_known():
    raise AssertionError

def test_passes():
    pass
"""
FAILS = """
def test_fails():
    raise AssertionError("as it says")
"""


@pytest.mark.parametrize(
    ("workers", "failing"),
    [([], False), (["-n", "2"], True)],
    ids=["alone", "in parallel, with a failure"],
)
def test_skips_for_want_of_a_gpu_are_counted(tmp_path, workers, failing):
    """In two lines just before the last. The others are listed by name, as failures are."""
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    (tests / "test_skips.py").write_text(SKIPS + FAILS * failing)
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", *workers]
    done = python(*arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == failing, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    listed = [line for line in lines if line.startswith("SKIPPED")]
    assert listed == ["SKIPPED tests/test_skips.py::test_other - Skipped: needs patience"]
    assert any(line.startswith("XFAIL tests/test_skips.py::test_known") for line in lines)
    assert failing == any(line.startswith("FAILED tests/test_skips.py::test") for line in lines)
    assert lines[-3] == "Skipped and not listed: 30 × needs a GPU, 20 × needs a Hopper GPU"
    assert lines[-2].endswith("python -m pytest -m gpu")
    assert re.search("1 passed, 51 skipped, 1 xfailed", lines[-1])
