"""Every environment variable that the package reads, and what it asks of Triton."""

import os
import warnings
from functools import cache

from .validate import invalid

CHECK = "MINI_FLASH_ATTENTION_CHECK"
# Read lengths, positions and page numbers back before every call (`device_checks.py`).
CHECKED = os.environ.get(CHECK) == "1"
# Go without the Hopper kernel.
PORTABLE = os.environ.get("MINI_FLASH_ATTENTION_PORTABLE") == "1"
# Triton's own switch, as Triton reads it when it is imported: kernels run on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST_TRITON = (3, 6)


@cache
def triton_version() -> tuple[int, int]:
    """(major, minor), once `require_triton` has found one."""
    from triton import __version__

    major, minor = map(int, __version__.split(".")[:2])
    return major, minor


@cache
def require_triton() -> None:
    """Refuse, before a kernel is imported, where it could not run: Triton is missing or too old,
    a module that it imports is missing, or TRITON_INTERPRET was changed after it was read.
    """
    package, wanted = "mini_flash_attention", ".".join(map(str, OLDEST_TRITON)) + " or newer"
    hint = "pip install --upgrade triton; tensors on the CPU need none"
    try:
        import triton
    except ImportError as error:
        name = (error.name or "triton").partition(".")[0]
        if name != "triton":
            what = "'mini-flash-attention[interpreter]'" if name == "numpy" else name
            expected = "a module that Triton imports"
            hint = f"pip install {what}"
            raise invalid(ImportError, package, name, expected, "none", hint) from error
        got = "none" if error.name == name else f"one that can't be imported: {error}"
        raise invalid(ImportError, package, name, wanted, got, hint) from error
    found = triton.__version__
    if tuple(int(n) for n in found.split(".")[:2]) < OLDEST_TRITON:
        raise invalid(ImportError, package, "triton", wanted, found, hint)
    compiles = isinstance(triton.language.sigmoid, triton.JITFunction)
    if len({INTERPRETED, triton.knobs.runtime.interpret, not compiles}) > 1:
        expected = "the same value when Triton and this package are imported"
        got, hint = "two different ones", "set it before Python starts"
        raise invalid(RuntimeError, package, "TRITON_INTERPRET", expected, got, hint)


def warn_of_late_switch() -> None:
    """Warn once per process that TRITON_INTERPRET=1 was set too late."""
    if not INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1":
        _warn_once("TRITON_INTERPRET=1 was set too late to matter (set it before Python starts)")


@cache
def _warn_once(message: str) -> None:
    # Level 6 is the caller of a public function.
    warnings.warn(f"mini_flash_attention: {message}", RuntimeWarning, stacklevel=6)
