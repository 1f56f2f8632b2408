"""The documents: their examples run, their numbers are those measured, what they name is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mini_flash_attention"
DOCUMENTS = ["README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
PAGES = ["docs/hopper.md", "docs/decode.md", "docs/numerics.md"]  # why it is built so
DOCUMENTS += ["docs/guide.md", "docs/features.md", "docs/results.md", *PAGES]
RESULTS = ROOT / "bench" / "results" / "h200"

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")  # the file, and the heading in it
# What stands in backquotes and looks like a file or a folder; a call or a pattern does not.
FILE = re.compile(r"`([\w./-]+(?:\.(?:pyi?|md|toml|txt|json)|/))`")
MEMBER = re.compile(r"`(\w+)\.(?!pyi?`)(\w+)`")


def text(name):
    return (ROOT / name).read_text()


def run(code, interpret=False):
    """What a separate process prints, without a GPU; in Triton's interpreter if `interpret`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", code]
    # Triton reads the source of a function, which run_example() says is in a document, here.
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def examples(name):
    """The Python blocks of a document: (number of the line above, source)."""
    for found in BLOCK.finditer(text(name)):
        yield text(name).count("\n", 0, found.start(1)), found[1]


def run_example(name, lines_above, source, interpret=False):
    """What an example prints; tracebacks show the document's own lines."""
    code = "\n" * lines_above + source
    return run(f"exec(compile({code!r}, {name!r}, 'exec'), {{}})", interpret)


EXAMPLES = [
    pytest.param(name, *found, id=f"{name} line {found[0] + 1}")
    for name in ("README.md", "docs/guide.md")
    for found in examples(name)
]


def skip_without_imports(source):
    """Skips an example that imports a library which is not installed here."""
    for library in ("triton", "transformers"):
        if re.search(rf"^(import|from) {library}\b", source, re.MULTILINE):
            pytest.importorskip(library)


@pytest.mark.parametrize(("name", "lines_above", "source"), EXAMPLES)
def test_examples_run_and_print(name, lines_above, source):
    skip_without_imports(source)
    printed = run_example(name, lines_above, source)
    assert printed.strip() and "False" not in printed  # comparisons that an example prints hold


@pytest.mark.parametrize(("name", "lines_above", "source"), EXAMPLES)
def test_examples_run_in_the_interpreter(name, lines_above, source):
    pytest.importorskip("triton")
    pytest.importorskip("numpy")
    skip_without_imports(source)
    printed = run_example(name, lines_above, source, interpret=True)
    assert printed.strip() and "False" not in printed


def test_the_examples_are_whole():
    """Every function has one, and so has every other library; none overwrites its library."""
    sources = [source for _, source in examples("README.md")]
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        assert any(f" = {name}(" in source for source in sources), name
    sources = [source for _, source in examples("docs/guide.md")]
    for name in ("flash_attn", "torch", "transformers"):
        assert any(f"from mini_flash_attention.integrations.{name} import" in s for s in sources)
    for name in DOCUMENTS:
        assert "from mini_flash_attention.integrations import" not in text(name), name


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md"])
def test_the_front_pages_stay_short(name):
    lines = text(name).splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 100 and "|" not in line and "](" not in line]


def test_the_example_of_compiling_without_a_gpu_runs():
    pytest.importorskip("triton")
    printed = "".join(
        run_example("CONTRIBUTING.md", *found) for found in examples("CONTRIBUTING.md")
    )
    assert "bytes of shared memory" in printed and "cubin" in printed


def numbers(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "readme_numbers.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results of the benchmark are here")
def test_numbers_are_those_measured():
    done = numbers("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_numbers_are_written_once_and_then_fresh(tmp_path):
    results, readme, page = tmp_path / "results", tmp_path / "README.md", tmp_path / "results.md"
    originals = {readme: text("README.md"), page: text("docs/results.md")}
    for file, original in originals.items():
        file.write_text(original)
    options = ["--results", results, "--readme", readme, "--results-page", page]

    def unchanged():
        return all(file.read_text() == original for file, original in originals.items())

    assert numbers(*options).returncode == 1  # nothing to write
    assert unchanged()
    results.mkdir()
    head = {"gpu": "A GPU", "versions": {"torch": "2.13.0"}, "commit": "c0ffee", "date": "today"}
    for suite, workload, unit in (
        ("prefill", "prefill/d128/none/s2048", "tflops"),
        ("varlen", "prefix/d128/p16", "tflops"),
        ("portable", "dense/d64/causal/s1024", "tflops"),
        ("decode", "decode/b1", "gigabytes_per_second"),
        ("chunked", "decode/q32", "gigabytes_per_second"),
        ("host", "host/dense", "microseconds"),
    ):
        row = {"workload": workload, "implementation": "mini", unit: 1233.6}
        (results / f"{suite}.json").write_text(json.dumps(head | {"rows": [row]}))
    assert numbers(*options, "--check").returncode == 1
    assert unchanged()
    done = numbers(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(*options, "--check").returncode == 0
    for line in (
        "| 128 | – | 2,048 | 1,234 |",
        "pages of 16 | 128 | 1,234 |",
        "| 64 | causal | 1,024 | 1,234 |",
        "| b1 | 1,234 |",
        "| q32 | 1,234 |",
        "| dense | 1234 |",
    ):
        assert line in page.read_text()
    assert page.read_text().count("c0ffee") == 1
    rest = re.compile("<!-- numbers.*?end of numbers -->", re.DOTALL)
    for file, original in originals.items():
        assert rest.sub("", file.read_text()) == rest.sub("", original)
    for file in originals:  # each of the two is checked
        fresh = file.read_text()
        file.write_text(fresh.replace("<!-- end of numbers -->", "stale\n<!-- end of numbers -->"))
        done = numbers(*options, "--check")
        assert done.returncode == 1 and str(file) in done.stdout
        file.write_text(fresh.replace("<!-- end of numbers -->", ""))
        assert numbers(*options).returncode == 1
        assert "<!-- end of numbers -->" not in file.read_text()
        file.write_text(fresh)


def test_the_summary_tells_the_losses(tmp_path):
    """The geometric mean and the worst cell against every peer, slower ones included."""
    readme, page = tmp_path / "README.md", tmp_path / "results.md"
    readme.write_text(text("README.md"))
    page.write_text(text("docs/results.md"))
    head = {"gpu": "A GPU", "versions": {}, "commit": "c0ffee", "date": "today"}
    speeds = {  # tokens, and TFLOP/s of each
        512: {"mini": 100, "fa3": 400, "cudnn": 50},
        2048: {"mini": 100, "fa3": 25},
        4096: {"mini": 100, "fa3": 25},
    }
    rows = [
        {"workload": f"prefill/d64/none/s{s}", "implementation": name, "tflops": speed}
        for s, of_call in speeds.items()
        for name, speed in of_call.items()
    ]
    (tmp_path / "prefill.json").write_text(json.dumps(head | {"rows": rows}))
    rows = [
        {"workload": f"features/d64/none/s4096/{name}", "implementation": "mini", "tflops": speed}
        for name, speed in (("plain", 100), ("softcap", 60))
    ]
    (tmp_path / "features.json").write_text(json.dumps(head | {"rows": rows}))
    done = numbers("--results", tmp_path, "--readme", readme, "--results-page", page)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = " ".join(readme.read_text().split())
    worst = "0.25 × FA3, `prefill/d64/none/s512`"
    assert f"| prefill | 3 | 1.59 (0.25) | 2.00 (2.00) | | | {worst} |" in summary
    assert "1.59 × FA3, 2.00 × cuDNN (SDPA) (geometric means)" in summary
    assert f"the worst cell is {worst}." in summary
    assert "mean (worst): soft cap 0.60 (0.60)." in summary


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results of the benchmark are here")
def test_the_drawing_is_of_what_was_measured(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "plot_results.py")]
    assert subprocess.run([*command, "--check"], timeout=60).returncode == 0
    lines = {"prefill": 24, "backward": 24}
    for suite in lines:
        (tmp_path / f"{suite}.json").write_text((RESULTS / f"{suite}.json").read_text())
    options = ["--results", str(tmp_path)]
    assert subprocess.run([*command, *options, "--check"], timeout=60).returncode == 1
    subprocess.run([*command, *options], timeout=60, check=True)
    for suite, count in lines.items():
        assert (tmp_path / f"{suite}.svg").read_text().count("<polyline") == count


def anchors(path):
    """What a link can say after the # for each heading of a document."""
    headings = re.findall("^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_named_exists(name):
    here = ROOT / name
    links = {link for link in LINK.findall(text(name)) if "://" not in link[0]}
    targets = {link: here.parent / link[0] if link[0] else here for link in links}
    missing = {file for (file, _), target in targets.items() if not target.exists()}
    for (file, heading), target in targets.items():
        if heading and target.exists() and heading not in anchors(target):
            missing.add(f"{file}#{heading}")
    # Files of the package may go without its name, results come and go.
    files = {file for file in FILE.findall(text(name)) if not file.startswith("bench/results")}
    missing |= {f for f in files if not any((folder / f).exists() for folder in (ROOT, PACKAGE))}
    # `plan.splits`: a name in a file of the package; those of integrations/ are other libraries'.
    for module, member in MEMBER.findall(text(name)):
        for path in {*PACKAGE.rglob(f"{module}.py")} - {*PACKAGE.glob("integrations/**/*")}:
            if not re.search(rf"\b{member}\b", path.read_text()):
                missing.add(f"{module}.{member}")
    assert not missing


def files_in_the_tree():
    """The paths in DESIGN.md's drawing: files follow their folder, and a folder is indented two
    spaces more than the one that it is in.
    """
    drawing = r"^```\nmini_flash_attention/\n(.*?)^```$"
    (tree,) = re.findall(drawing, text("DESIGN.md"), re.M | re.S)
    folders = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        first = line.split()[0]
        if depth < 3:  # else the line continues the one before
            folders = folders[:depth] + [first] * first.endswith("/")
        yield from ("".join(folders) + name for name in re.findall(r"\b\w+\.py\b", line))


def test_the_design_names_every_file():
    drawn = set(files_in_the_tree()) - {"__main__.py"}
    modules = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if p.name[0] != "_"}
    assert drawn == modules


@pytest.mark.parametrize("name", PAGES)
def test_a_decision_takes_eight_lines(name):
    """Its name in bold first; the experiments that it cites are in the notes."""
    for paragraph in text(name).split("\n\n"):
        if paragraph.startswith("**"):
            assert len(paragraph.strip().splitlines()) <= 8, paragraph
    notes = text("bench/NOTES.md")
    for number in re.findall(r"NOTES (\d+)", text(name)):
        assert re.search(rf"^{number}\.", notes, re.M), number


def test_the_tests_that_are_named_exist():
    """`test_features.py::test_dense` stands in the table for what the package can do."""
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text("docs/features.md"))
    assert named
    for file, test in named:
        assert re.search(rf"^def {test}\(", text(f"tests/{file}"), re.MULTILINE), f"{file}::{test}"
