"""Every kernel compiles for every architecture, with the oldest and the newest Triton supported.

No GPU is needed. `compile_variants.py` does the work, in a process for each pair of architecture
and Triton. It lists the variants and says how they are shared out: each is compiled somewhere, and
those that need the most registers and shared memory for every architecture.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registers import unwritten

HERE = Path(__file__).parent
# Bytes of shared memory that a program can have (CUDA C++ Programming Guide, compute capabilities).
SHARED = {
    arch: kb << 10 for arch, kb in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
}
LONGEST_FIRST = sorted(SHARED, key=lambda arch: arch != 90)  # which has kernels of its own
TENSOR_MEMORY = 512  # columns, on SM 100
# Bytes that a thread may spill, none by default: the most that any variant of these kernels does.
# The most of all are of Triton 3.9 on SM 90: for dkdv head_dim 128 with all features; for dq_hopper
# head_dim 256 with a window, with Triton 3.6 it is 232.
SPILLS = {"preprocess": 8, "dkdv": 432, "dq": 120}
SPILLS |= {"backward_hopper": 80, "dkdv_hopper": 8, "dq_hopper": 480}
TRITONS = ("3.6.0", "3.9.0")


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS[::-1], ids="triton-{}".format)
@pytest.mark.parametrize("arch", LONGEST_FIRST, ids="sm_{}".format)
def test_fits(version: str, arch: int) -> None:
    """No kernel spills more registers than SPILLS, or needs more memory than there is on the chip.

    Of those that are dealt out to it. With Triton 3.9 dense causal kernels of head_dims between 64
    and 128 spill 32 to 48 bytes on SM 120, which gets none of them (bench/NOTES.md, 119).
    """
    folder = Path(sys.prefix) / f"triton-{version}"
    if not folder.is_dir():
        pytest.skip(f"Triton {version} is not installed beside the tests (tools/make_env.py)")
    results = compiled(arch, TRITONS.index(version), folder)
    wrong = [line for result in results if (line := complaint(result, SHARED[arch]))]
    assert results and not wrong, f"{len(wrong)} of {len(results)} kernels:\n" + "\n".join(wrong)


def compiled(arch: int, turn: int, triton: Path) -> list[dict[str, Any]]:
    """What compile_variants.py prints, run with this Triton."""
    env = {name: x for name, x in os.environ.items() if not name.startswith("TRITON_")}
    env["PYTHONPATH"] = os.pathsep.join((str(triton), str(HERE.parent)))
    env["TRITON_CACHE_DIR"] = str(Path(sys.prefix) / "triton-cache")
    command = [sys.executable, str(HERE / "compile_variants.py"), str(arch), "--round", str(turn)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def complaint(result: dict[str, Any], shared: int) -> str:
    """What is wrong with a compiled kernel, in one line; empty if nothing is."""
    if "error" in result:
        return f"{result['variant']}: {result['error']}"
    problems = []
    # Loads of two bytes at a time cost far more than the registers that they make spill.
    may_spill = SPILLS.get(result["kernel"], 0)
    if result["spilled"] > may_spill and "unaligned" not in result["variant"]:
        problems.append(f"spills {result['spilled']} bytes a thread")
    if result.get("narrow"):
        problems.append(f"has {result['narrow']} loads of two bytes")
    if result["shared"] > shared:
        problems.append(f"needs {result['shared']} bytes of shared memory, there are {shared}")
    if result["tensor_memory"] > TENSOR_MEMORY:
        problems.append(f"needs {result['tensor_memory']} columns of tensor memory")
    if result["unwritten"]:
        problems.append(f"reads {result['unwritten']} registers that may not be written yet")
    if result.get("groups") != result.get("to_issue"):
        problems.append(f"issues its products in {result['groups']} groups of {result['to_issue']}")
    if result.get("reused"):
        problems.append(f"keeps numbers in the places of {result['reused']} barriers")
    if result.get("hidden", 0) < result.get("to_hide", 0):
        problems.append(f"hides {result['hidden']} exponentials of {result['to_hide']}")
    if result.get("ahead", 0) < result.get("to_be_ahead", 0):
        problems.append(f"finds {result['ahead']} maxima of {result['to_be_ahead']} ahead of a sum")
    if result.get("moves", 0) > result.get("may_move", 0):
        problems.append(f"multiplies {result['moves']} times after a sum, of {result['may_move']}")
    if result.get("repairs"):
        problems.append(f"puts weights right with {result['repairs']} instructions")
    if not problems:
        return ""
    how = f"{result['num_warps']} warps, {result['num_stages']} stages"
    return f"{result['variant']}: {result['kernel']} ({how}) {' and '.join(problems)}"


def test_no_kernel_is_left_out() -> None:
    listed = (HERE / "compile_variants.py").read_text()
    kernels = (HERE.parent / "mini_flash_attention" / "kernels").rglob("*.py")
    names = [
        name for file in kernels for name in re.findall(r"def (\w+)_kernel\(", file.read_text())
    ]
    assert len(names) >= 4 and all(f'("{name}", ' in listed for name in names)


def test_registers_read_before_they_are_written() -> None:
    jump, low, high, product = (
        "/*0000*/ @P0 BRA 0x20 ;",
        "/*0010*/ UMOV UR8, 0x2000 ;",
        "/*0020*/ UIADD3 UR6, UP0, UR8, 0x20, URZ ;",
        "/*0030*/ HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56 ;",
    )
    upper, end = "/*0028*/ UMOV UR7, 0xc0000010 ;", "/*0040*/ EXIT ;"
    straight = jump.replace("@P0 BRA 0x20", "NOP")
    assert unwritten("\n".join((straight, low, high, upper, product, end))) == []
    [found] = unwritten("\n".join((jump, low, high, upper, product, end)))
    assert "UR8, 0x20" in found
    [found] = unwritten("\n".join((straight, low, high, product, end)))
    assert "gdesc[UR4]" in found
