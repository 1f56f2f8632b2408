"""What an option has to be: numbers, flags, the window, functions."""

import math
import numbers
import operator
from typing import Any

import torch

from ..problem import MAX_SPLITS, NARROW
from ..rules.window import Window, first_visible, last_visible
from . import kind_of, wrong_type, wrong_value
from .tensors import strided_tensor

MAX_LENGTH = 2**31 - 2**16
MAX_REAL = 1e30  # kernels compute in fp32


def integer(x: Any) -> int | None:
    """x as int, None if it is none; a tensor of no dimensions is read, which waits for its GPU."""
    if isinstance(x, bool) or (isinstance(x, torch.Tensor) and x.dim()):
        return None
    try:
        return operator.index(x)
    except (TypeError, RuntimeError):
        return None


def whole(
    function: str, name: str, x: Any, least: int, most: int, bounds: str, wanted: str = "an int"
) -> int:
    """x as int, from least to most."""
    n = integer(x)
    if n is None:
        raise wrong_type(function, name, wanted, kind_of(x))
    if not least <= n <= most:
        raise wrong_value(function, name, bounds, n)
    return n


def length(function: str, name: str, x: Any, wanted: str = "an int") -> int:
    """A length as int."""
    return whole(function, name, x, 0, 2**31 - 1, "0 <= length < 2**31", wanted)


def bounded(function: str, name: str, n: int) -> int:
    """n tokens, few enough that kernels count them, and a tile beyond, in 32 bits."""
    if n > MAX_LENGTH:
        raise wrong_value(function, name, f"at most {MAX_LENGTH} tokens", n)
    return n


def flags(function: str, **arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, bool):
            raise wrong_type(function, name, "a bool", kind_of(x))


def either(function: str, name: str, x: Any, other: str, y: Any) -> Any:
    """The value of an argument that has two names."""
    if x is not None and y is not None:
        raise wrong_type(function, other, f"None beside {name}", "both", "they are one argument")
    return y if x is None else x


def real(function: str, name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise wrong_type(function, name, "a finite number", kind_of(x))
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_REAL:
        raise wrong_value(function, name, f"a number from {-MAX_REAL:g} to {MAX_REAL:g}", x)
    return number


def dropout(function: str, dropout_p: Any) -> float:
    """The share of weights to drop."""
    if isinstance(dropout_p, bool):
        hint = "the fourth argument is dropout_p; write causal=True"
        raise wrong_type(function, "dropout_p", "a number", f"{dropout_p}", hint)
    if not 0 <= real(function, "dropout_p", dropout_p) < 1:
        raise wrong_value(function, "dropout_p", "0 <= dropout_p < 1", dropout_p)
    return float(dropout_p)


def scale(function: str, softmax_scale: Any, head_dim: int, alibi: bool = False) -> float:
    """The factor; beside ALiBi its inverse has to be a number of fp32 too."""
    if softmax_scale is None:
        return head_dim**-0.5
    number = real(function, "softmax_scale", softmax_scale)
    if alibi and 0 < abs(number) < 1e-20:
        wanted = "0, or 1e-20 and more, with alibi_slopes"
        raise wrong_value(function, "softmax_scale", wanted, softmax_scale)
    return number


def softcap(function: str, softcap: Any) -> float:
    """The cap, 0 for none."""
    cap = real(function, "softcap", softcap)
    if cap < 0 or 0 < cap < 1e-6:
        raise wrong_value(function, "softcap", "0 (none) or 1e-6 and more", softcap)
    return cap


def pair(window_size: Any) -> Any:
    """A list, or a tensor of two elements, as a tuple for `window`; anything else unchanged."""
    if type(window_size) is torch.Tensor and window_size.shape == (2,):
        window_size = window_size.tolist()
    return tuple(window_size) if isinstance(window_size, list) else window_size


def window(
    function: str, causal: Any, window_size: Any, seqlen_q: int, seqlen_k: int
) -> tuple[int | None, int | None, bool]:
    """(left, right), and whether left was given.

    None where open, as is a bound that can cut nothing off at these lengths, unless it is NARROW:
    a sequence is to get the same bits beside longer ones.
    """
    flags(function, causal=causal)
    try:
        left, right = (
            -1 if w is None else None if isinstance(w, torch.Tensor) else integer(w)
            for w in pair(window_size)
        )
    except (TypeError, ValueError):
        left = right = None
    if left is None or right is None:
        raise wrong_type(function, "window_size", "two ints (left, right)", window_size)
    if left < -1 or right < -1:
        raise wrong_value(function, "window_size", "-1 (open) or more", window_size)
    if causal:
        right = 0
    sees = Window(seqlen_k - seqlen_q, left, right, None, seqlen_k)
    # What the last query still sees cuts nothing off for any, nor what the first one sees.
    open_left = left < 0 or (first_visible(seqlen_q - 1, sees) <= 0 and left >= NARROW)
    open_right = right < 0 or last_visible(0, sees) >= seqlen_k - 1
    return None if open_left else left, None if open_right else right, left >= 0


def splits(function: str, num_splits: Any) -> int:
    bounds = f"0 (automatic) to {MAX_SPLITS}"
    return whole(function, "num_splits", num_splits, 0, MAX_SPLITS, bounds)


def split_size(function: str, size: Any, num_splits: int) -> int:
    """Keys of a split, 0 unless the caller asks for splits of a fixed size."""
    if size is None:
        return 0
    name = "fixed_split_size"
    number = whole(function, name, size, 1, MAX_LENGTH, "1 or more keys", "an int or None")
    if num_splits:
        raise wrong_value(function, name, "None with num_splits", "both", "drop one")
    return number


def score_mod(function: str, score_mod: Any, extra: Any, q: torch.Tensor) -> None:
    """A function that is or can be compiled, and tensors for it."""
    _compilable(function, "score_mod", score_mod, q)
    if not isinstance(extra, (tuple, list)):
        raise wrong_type(function, "score_mod_args", "a tuple of tensors", kind_of(extra))
    for n, x in enumerate(extra):
        if score_mod is None:
            raise wrong_value(function, "score_mod_args", "() without a score_mod", len(extra))
        if not isinstance(x, torch.Tensor):
            raise wrong_type(function, "score_mod_args", "tensors", f"{kind_of(x)} at {n}")
        strided_tensor(function, "score_mod_args", x, q)


def score_mod_bwd(function: str, score_mod_bwd: Any, score_mod: Any, q: torch.Tensor) -> None:
    """A function like score_mod, which is there too."""
    if score_mod_bwd is not None and score_mod is None:
        raise wrong_value(function, "score_mod_bwd", "None without a score_mod", "a function")
    _compilable(function, "score_mod_bwd", score_mod_bwd, q)


def _compilable(function: str, name: str, x: Any, q: torch.Tensor) -> None:
    """x is None, or a function that is or can be compiled."""
    compiled = x is None or (hasattr(x, "fn") and hasattr(x, "arg_names"))
    if not (compiled or (q.device.type == "cpu" and callable(x))):
        raise wrong_type(function, name, "a function", kind_of(x), "decorate it with @triton.jit")
