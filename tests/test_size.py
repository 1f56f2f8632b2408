"""The budgets of CONTRIBUTING.md: room for each chapter, and no code golf to stay inside it."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mini_flash_attention"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
# Lines of code, by the beginning of a file's path; the longest beginning counts.
BUDGETS = {
    "": ("host", 2010),
    "rules/": ("rules", 400),
    "kernels/portable/": ("portable", 600),
    "kernels/hopper/": ("Hopper", 1200),
    "kernels/decode/": ("decode", 450),
    "kernels/": ("cache, launch and TMA", 450),
    # What launches and the append kernel are told.
    "plan/layout.py": ("cache, launch and TMA", 450),
    "plan/scores.py": ("cache, launch and TMA", 450),
    "plan/append.py": ("cache, launch and TMA", 450),
    "api_backward.py": ("backward", 1050),
    "training.py": ("backward", 1050),
    "ops_backward.py": ("backward", 1050),
    "autograd.py": ("backward", 1050),
    "execution_backward.py": ("backward", 1050),
    "cpu_backward.py": ("backward", 1050),
    "plan/backward": ("backward", 1050),
    "validate/backward": ("backward", 1050),
    "kernels/portable/backward": ("backward", 1050),
    "kernels/hopper/backward": ("Hopper backward", 1000),
    "integrations/": ("integrations", 1500),
    # What no call needs: the command line, the oracle, the tool that finds a wrong length.
    "__main__.py": ("command line and reference", 350),
    "reference.py": ("command line and reference", 350),
    "device_checks.py": ("command line and reference", 350),
}
TOKENS_A_LINE = 11
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 80
PARAMETERS = FIELDS = 12
# Their signatures are not ours: the public functions and those of other libraries, and validation,
# which mirrors the first. A kernel's entry takes what its launch has.
MIRRORED = re.compile(r"api(_backward)?\.py|packed\.py|validate/calls\.py|integrations/")


def significant(path):
    """Tokens that are code: no comments, no docstrings, no layout."""
    source = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout and token.string and token.start[0] not in docstrings:
            yield token


def code_lines(path):
    return len({n for t in significant(path) for n in range(t.start[0], t.end[0] + 1)})


def chapters():
    """Code lines of each chapter, and its budget."""
    lines = {name: [0, budget] for name, budget in BUDGETS.values()}
    for file, path in FILES.items():
        chapter, _ = BUDGETS[max((b for b in BUDGETS if file.startswith(b)), key=len)]
        lines[chapter][0] += code_lines(path)
    return lines


def functions():
    """(file, function) for every function of the package."""
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file, node


def parameters(function):
    a = function.args
    return len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)


@pytest.mark.parametrize(("chapter", "lines"), chapters().items())
def test_every_chapter_keeps_to_its_budget(chapter, lines):
    count, budget = lines
    assert count <= budget, f"{chapter}: {count} lines of code"


def test_lines_are_not_packed():
    tokens = sum(1 for path in FILES.values() for _ in significant(path))
    assert tokens / sum(map(code_lines, FILES.values())) <= TOKENS_A_LINE


def test_files_and_functions_are_short():
    lengths = {file: len(path.read_text().splitlines()) for file, path in FILES.items()}
    assert not {file: n for file, n in lengths.items() if n > LINES_OF_A_FILE}
    for file, function in functions():
        body = function.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert lines <= LINES_OF_A_FUNCTION, f"{file}: {function.name} has {lines}"


def test_nothing_takes_a_dozen_things_by_position():
    """Bundles have names, and one subject each; what a kernel is compiled for may have more."""
    for file, function in functions():
        if MIRRORED.match(file) or function.name.endswith("_kernel"):
            continue
        count = parameters(function)
        assert count <= PARAMETERS, f"{file}: {function.name} has {count}"
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            bundle = isinstance(node, ast.ClassDef) and [ast.unparse(x) for x in node.bases]
            if bundle == ["NamedTuple"] and node.name != "Facts":
                fields = sum(isinstance(x, ast.AnnAssign) for x in node.body)
                assert fields <= FIELDS, f"{file}: {node.name} has {fields}"


def test_no_bundle_is_read_by_number():
    """`lengths[10]` says nothing; up to four things may go without names."""
    for file, path in FILES.items():
        if file.startswith(("kernels/", "rules/")):
            numbers = re.findall(r"\w\[(\d+)\]", path.read_text())
            assert all(int(n) < 4 for n in numbers), file


if __name__ == "__main__":
    for name, (count, budget) in chapters().items():
        print(f"{name:28} {count:5} of {budget}")
    for file, path in FILES.items():
        tokens = sum(1 for _ in significant(path))
        print(f"{file:45} {code_lines(path):5} {tokens / max(1, code_lines(path)):5.1f}")
