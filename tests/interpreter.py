"""Triton's interpreter without what it does in vain, which is more than half of its time.

It changes its language anew before every call of a device function, though a launch has changed it
already, and works out in 64 bits whether sums of integers overflow, for an assertion that it makes
in debug mode alone. What the kernels compute, and how, is not touched.
"""

from typing import Any

from triton import language as tl
from triton.runtime import interpreter

change, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
changed: set[int] | None = None  # modules of the language, while a launch runs


def change_once(function: Any) -> Any:
    """What a launch does first goes through whole, and so does a module that it had not seen."""
    mine = {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}
    if changed is not None:
        if mine <= changed:
            return None
        changed.update(mine)
    return change(function)


def launch(*arguments: Any, **options: Any) -> None:
    global changed
    changed = set()
    try:
        execute(*arguments, **options)
    finally:
        changed = None


def hasten() -> None:
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = change_once, launch
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    assert not options.debug  # else the overflow would have been told
    interpreter.interpreter_builder.options = options
