"""The judgement of arguments that change scores or positions: `refusals.py`, continued."""

from typing import Any

import torch

from .refusals import kind_of, plain, refuse, rows, shape


def score_mod(function: str, score_mod: Any, extra: Any, q: torch.Tensor) -> None:
    """A function that is or can be compiled, and tensors for it."""
    if score_mod is not None:
        compiled = hasattr(score_mod, "fn") and hasattr(score_mod, "arg_names")
        if not (compiled or (q.device.type == "cpu" and callable(score_mod))):
            hint = "decorate it with @triton.jit"
            refuse(TypeError, function, "score_mod", "a function", kind_of(score_mod), hint)
    if not isinstance(extra, (tuple, list)):
        refuse(TypeError, function, "score_mod_args", "a tuple of tensors", kind_of(extra))
    for n, x in enumerate(extra):
        if score_mod is None:
            refuse(ValueError, function, "score_mod_args", "() without a score_mod", len(extra))
        if not isinstance(x, torch.Tensor):
            refuse(TypeError, function, "score_mod_args", "tensors", f"{kind_of(x)} at {n}")
        plain(function, "score_mod_args", x, q)


def per_head(
    function: str, name: str, x: Any, q: torch.Tensor, shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:  # fmt: skip
    """x has a contiguous row of numbers, one for each head."""
    plain(function, name, x, q)
    if x.dtype not in dtypes:
        wanted = " or ".join(dict.fromkeys(map(str, dtypes)))
        refuse(TypeError, function, name, f"dtype {wanted}", x.dtype, "cast it")
    shape(function, name, x, *shapes)
    rows(function, name, x)


def rotary(function: str, cos: Any, sin: Any, q: torch.Tensor, k: Any) -> bool:
    """Whether there is a rotation: both tables are (positions, rotary_dim / 2), contiguous, in q's
    dtype or fp32.
    """
    if cos is None and sin is None:
        return False
    if k is None:
        refuse(ValueError, function, "rotary_cos", "k and v to append", "none", "rotate q yourself")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, torch.Tensor) or not isinstance(cos, torch.Tensor):
            hint = "rotary_cos and rotary_sin go together"
            refuse(TypeError, function, name, "a torch.Tensor", kind_of(x), hint)
        plain(function, name, x, q)
        if x.dtype not in (q.dtype, torch.float32) or x.dtype is not cos.dtype:
            wanted = f"dtype {q.dtype} or torch.float32"
            refuse(TypeError, function, name, wanted, x.dtype, "cast it")
        fits = x.dim() == 2 and x.shape == cos.shape and 0 < 2 * x.shape[1] <= q.shape[-1]
        if not fits or not x.shape[0]:
            wanted = f"shape (positions, rotary_dim / 2), rotary_dim at most {q.shape[-1]}"
            refuse(ValueError, function, name, wanted, tuple(x.shape))
        if not x.is_contiguous():
            got, hint = f"strides {x.stride()}", "call .contiguous()"
            refuse(ValueError, function, name, "a contiguous table", got, hint)
    return True
