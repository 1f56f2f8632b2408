"""The judgement of one argument, or of a few that must fit each other.

Every message reads *function: argument: expected X, got Y (what to do)*. Nothing here looks at
what a device tensor holds, so no check waits for the GPU.
"""

import math
import numbers
import operator
from typing import Any, NoReturn

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from .rules.window import Window, first_visible, last_visible

MAX_HEAD_DIM = 256
MAX_SPLITS = 128
NARROW = 16  # keys to the left; a window of fewer may change how scores are worked out
MAX_LENGTH = 2**31 - 2**16
MAX_REAL = 1e30  # kernels compute in fp32
HALVES = (torch.float16, torch.bfloat16)
DTYPES = {"cuda": HALVES, "cpu": (*HALVES, torch.float32)}


def refuse(
    error: type[Exception], function: str, argument: str, expected: str, got: object, hint: str = ""
) -> NoReturn:
    advice = f" ({hint})" if hint else ""
    raise error(f"{function}: {argument}: expected {expected}, got {got}{advice}")


def later(function: str, argument: str, value: str) -> NoReturn:
    raise NotImplementedError(
        f"{function}: {argument}: not implemented yet; pass {value} or leave it out"
    )


# -- one argument at a time -------------------------------------------------------------------

PAGED = "with a block_table k and v are pages"
SHAPES = {
    3: ("(total, heads, head_dim)", f"batched tensors go to flash_attn_func; {PAGED}"),
    4: ("(batch, seqlen, heads, head_dim)", "packed tensors go to flash_attn_varlen_func"),
    0: ("(num_blocks, page_size, heads, head_dim)", PAGED),
}


def kind_of(x: object) -> str:
    """The type of x by name, with its module where that is not Python's own."""
    cls = type(x)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"


def plain(
    function: str, name: str, x: Any, q: torch.Tensor | None = None, wanted: str = "a torch.Tensor"
) -> None:
    """x is a tensor whose memory holds what it says, on q's device."""
    if not isinstance(x, torch.Tensor):
        refuse(TypeError, function, name, wanted, kind_of(x))
    if x.is_nested:
        hint = "flash_attn_varlen_func takes .values() and .offsets() of a jagged one"
        refuse(TypeError, function, name, "a dense tensor", "a nested one", hint)
    if x.layout is not torch.strided:
        refuse(TypeError, function, name, "a dense tensor", f"{x.layout}", "use .to_dense()")
    if x.is_neg():
        refuse(TypeError, function, name, "plain memory", "a lazy negation", "call .resolve_neg()")
    if q is not None and x.device != q.device:
        refuse(ValueError, function, name, f"a tensor on {q.device}, as q", x.device)


def rows(function: str, name: str, x: torch.Tensor, wanted: str = "contiguous rows") -> None:
    """What lies side by side in x's last dimension does so in memory."""
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        refuse(ValueError, function, name, wanted, f"strides {x.stride()}", "call .contiguous()")


def shape(
    function: str, name: str, x: torch.Tensor, *allowed: tuple[int, ...], hint: str = ""
) -> None:
    """x has one of these shapes."""
    if tuple(x.shape) not in allowed:
        wanted = " or ".join(map(str, allowed))
        refuse(ValueError, function, name, f"shape {wanted}", tuple(x.shape), hint)


def tensor(
    function: str, name: str, x: Any, rank: int, like: torch.Tensor | None = None,
    paged: bool = False,
) -> None:  # fmt: skip
    """x is a plain strided tensor of this rank; dtype, device and last stride that kernels take."""
    plain(function, name, x, like)
    if x.dim() != rank:
        names, hint = SHAPES[0 if paged else rank]
        refuse(ValueError, function, name, f"{rank} dimensions {names}", tuple(x.shape), hint)
    if like is not None and x.dtype is not like.dtype:
        refuse(TypeError, function, name, f"dtype {like.dtype}, as q", x.dtype, "cast it")
    rows(function, name, x, "a contiguous last dimension")


def index_tensor(
    function: str, name: str, x: Any, q: torch.Tensor, sizes: tuple[int | str, ...]
) -> None:
    """x holds int32 numbers on q's device in these sizes, "any" among them, rows contiguous."""
    plain(function, name, x, q, "an int32 torch.Tensor")
    if x.dtype is not torch.int32:
        refuse(TypeError, function, name, "dtype torch.int32", x.dtype, "call .int()")
    pairs = zip(sizes, x.shape, strict=False)
    if x.dim() != len(sizes) or any(size not in ("any", n) for size, n in pairs):
        refuse(ValueError, function, name, f"shape {sizes}", tuple(x.shape))
    rows(function, name, x)


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
        refuse(TypeError, function, name, wanted, kind_of(x))
    if not least <= n <= most:
        refuse(ValueError, function, name, bounds, n)
    return n


def length(function: str, name: str, x: Any, wanted: str = "an int") -> int:
    """A length as int."""
    return whole(function, name, x, 0, 2**31 - 1, "0 <= length < 2**31", wanted)


def bounded(function: str, name: str, n: int) -> int:
    """n tokens, few enough that kernels count them, and a tile beyond, in 32 bits."""
    if n > MAX_LENGTH:
        refuse(ValueError, function, name, f"at most {MAX_LENGTH} tokens", n)
    return n


def flags(function: str, **arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, bool):
            refuse(TypeError, function, name, "a bool", kind_of(x))


def either(function: str, name: str, x: Any, other: str, y: Any) -> Any:
    """The value of an argument that has two names."""
    if x is not None and y is not None:
        refuse(TypeError, function, other, f"None beside {name}", "both", "they are one argument")
    return y if x is None else x


def real(function: str, name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        refuse(TypeError, function, name, "a finite number", kind_of(x))
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_REAL:
        refuse(ValueError, function, name, f"a number from {-MAX_REAL:g} to {MAX_REAL:g}", x)
    return number


def dropout(function: str, dropout_p: Any) -> None:
    if isinstance(dropout_p, bool):
        hint = "the fourth argument is dropout_p; write causal=True"
        refuse(TypeError, function, "dropout_p", "a number", f"{dropout_p}", hint)
    if not 0 <= real(function, "dropout_p", dropout_p) < 1:
        refuse(ValueError, function, "dropout_p", "0 <= dropout_p < 1", dropout_p)
    if dropout_p:
        later(function, "dropout_p", "0.0")


def scale(function: str, softmax_scale: Any, head_dim: int, alibi: bool = False) -> float:
    """The factor; beside ALiBi its inverse has to be a number of fp32 too."""
    if softmax_scale is None:
        return head_dim**-0.5
    number = real(function, "softmax_scale", softmax_scale)
    if alibi and 0 < abs(number) < 1e-20:
        wanted = "0, or 1e-20 and more, with alibi_slopes"
        refuse(ValueError, function, "softmax_scale", wanted, softmax_scale)
    return number


def softcap(function: str, softcap: Any) -> float:
    """The cap, 0 for none."""
    cap = real(function, "softcap", softcap)
    if cap < 0 or 0 < cap < 1e-6:
        refuse(ValueError, function, "softcap", "0 (none) or 1e-6 and more", softcap)
    return cap


def pair(window_size: Any) -> Any:
    """A list, or a tensor of two elements, as a tuple for `window`; anything else unchanged."""
    if type(window_size) is torch.Tensor and window_size.shape == (2,):
        window_size = window_size.tolist()
    return tuple(window_size) if isinstance(window_size, list) else window_size


def window(
    function: str, causal: Any, window_size: Any, seqlen_q: int, seqlen_k: int
) -> tuple[int | None, int | None, bool]:
    """(left, right), None where open, as is a bound that can cut nothing off at these lengths, unless
    it is NARROW, for a sequence is to get the same bits beside longer ones; whether left was given.
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
        refuse(TypeError, function, "window_size", "two ints (left, right)", window_size)
    if left < -1 or right < -1:
        refuse(ValueError, function, "window_size", "-1 (open) or more", window_size)
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
    """Keys of a part, 0 if nobody asked for parts of a fixed size."""
    if size is None:
        return 0
    name = "fixed_split_size"
    number = whole(function, name, size, 1, MAX_LENGTH, "1 or more keys", "an int or None")
    if num_splits:
        refuse(ValueError, function, name, "None with num_splits", "both", "drop one")
    return number


# -- what the arguments must be to each other ---------------------------------------------------


def qkv(
    function: str, q: Any, k: Any, v: Any, names: str, rank: int, paged: bool, rank_k: int = 0
) -> None:
    """q, k and v fit one another in dtype, device, heads and head_dim."""
    rank_k = 4 if paged else rank_k or rank
    k_name, v_name = names.split()
    tensor(function, "q", q, rank)
    kind = q.device.type
    if kind not in DTYPES:
        refuse(ValueError, function, "q", "a tensor on a CUDA device or the CPU", q.device)
    if q.dtype not in DTYPES[kind]:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in DTYPES[kind])
        refuse(TypeError, function, "q", f"dtype {wanted} on {kind}", q.dtype, "cast q, k and v")
    tensor(function, k_name, k, rank_k, q, paged)
    tensor(function, v_name, v, rank_k, q, paged)
    nheads, head_dim = q.shape[-2:]
    nheads_k, head_dim_k = k.shape[-2:]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        refuse(ValueError, function, "q", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    if head_dim_k != head_dim:
        refuse(ValueError, function, k_name, f"head_dim {head_dim}, as q", head_dim_k)
    if k.shape[:-1] != v.shape[:-1]:
        wanted = f"{tuple(k.shape[:-1])} before head_dim, as {k_name}"
        refuse(ValueError, function, v_name, wanted, tuple(v.shape[:-1]))
    if not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
        refuse(ValueError, function, v_name, f"head_dim from 1 to {MAX_HEAD_DIM}", v.shape[-1])
    if nheads_k == 0 or nheads % nheads_k:
        hint = "each KV head serves nheads / nheads_k query heads"
        wanted = f"a number of heads that divides q's {nheads}"
        refuse(ValueError, function, k_name, wanted, nheads_k, hint)


def differentiable(function: str, *tensors: torch.Tensor | None) -> None:
    """Refuse whoever expects a gradient, a tangent or a vmap: it would be lost in silence."""
    given = (t for t in tensors if isinstance(t, torch.Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise NotImplementedError(
            f"{function}: backward: not implemented yet; "
            "call it under torch.no_grad() or detach its tensors"
        )
    if transformed():
        raise NotImplementedError(
            f"{function}: torch.func transforms and forward-mode AD: not implemented"
        )


def traced() -> None:
    """Refuse torch.jit.trace, which hands over sizes as tensors and records none of our kernels."""
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            "mini_flash_attention: torch.jit.trace, and the ONNX export that is based on it: "
            "not supported; use torch.export or torch.compile"
        )


def transformed() -> bool:
    """Whether the caller runs under torch.func (vmap, grad, ...) or forward-mode AD."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None
