"""What a tensor argument has to be, alone and beside q.

Nothing here looks at what a device tensor holds, so no check waits for the GPU.
"""

from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from . import kind_of, wrong_type, wrong_value

MAX_HEAD_DIM = 256
HALVES = (torch.float16, torch.bfloat16)
DTYPES = {"cuda": HALVES, "cpu": (*HALVES, torch.float32)}
PAGED = "with a block_table k and v are pages"
SHAPES = {
    3: ("(total, heads, head_dim)", f"batched tensors go to flash_attn_func; {PAGED}"),
    4: ("(batch, seqlen, heads, head_dim)", "packed tensors go to flash_attn_varlen_func"),
    0: ("(num_blocks, page_size, heads, head_dim)", PAGED),
}


def strided_tensor(
    function: str, name: str, x: Any, q: torch.Tensor | None = None, wanted: str = "a torch.Tensor"
) -> None:
    """x is a tensor whose memory holds what it says, on q's device."""
    if not isinstance(x, torch.Tensor):
        raise wrong_type(function, name, wanted, kind_of(x))
    if x.is_nested:
        hint = "flash_attn_varlen_func takes .values() and .offsets() of a jagged one"
        raise wrong_type(function, name, "a dense tensor", "a nested one", hint)
    if x.layout is not torch.strided:
        raise wrong_type(function, name, "a dense tensor", f"{x.layout}", "use .to_dense()")
    if x.is_neg():
        raise wrong_type(function, name, "plain memory", "a lazy negation", "call .resolve_neg()")
    if q is not None and x.device != q.device:
        raise wrong_value(function, name, f"a tensor on {q.device}, as q", x.device)


def rows(function: str, name: str, x: torch.Tensor, wanted: str = "contiguous rows") -> None:
    """What lies side by side in x's last dimension does so in memory."""
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        raise wrong_value(function, name, wanted, f"strides {x.stride()}", "call .contiguous()")


def shape(
    function: str, name: str, x: torch.Tensor, *allowed: tuple[int, ...], hint: str = ""
) -> None:
    """x has one of these shapes."""
    if tuple(x.shape) not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise wrong_value(function, name, f"shape {wanted}", tuple(x.shape), hint)


def dtype(function: str, name: str, x: torch.Tensor, *allowed: torch.dtype) -> None:
    """x has one of these dtypes."""
    if x.dtype not in allowed:
        wanted = " or ".join(dict.fromkeys(map(str, allowed)))
        raise wrong_type(function, name, f"dtype {wanted}", x.dtype, "cast it")


def tensor(
    function: str, name: str, x: Any, rank: int, like: torch.Tensor | None = None,
    paged: bool = False,
) -> None:  # fmt: skip
    """x is a plain strided tensor of this rank; dtype, device and last stride that kernels take."""
    strided_tensor(function, name, x, like)
    if x.dim() != rank:
        names, hint = SHAPES[0 if paged else rank]
        raise wrong_value(function, name, f"{rank} dimensions {names}", tuple(x.shape), hint)
    if like is not None and x.dtype is not like.dtype:
        raise wrong_type(function, name, f"dtype {like.dtype}, as q", x.dtype, "cast it")
    rows(function, name, x, "a contiguous last dimension")


def index_tensor(
    function: str, name: str, x: Any, q: torch.Tensor, sizes: tuple[int | str, ...]
) -> None:
    """x holds int32 numbers on q's device in these sizes, "any" among them, rows contiguous."""
    strided_tensor(function, name, x, q, "an int32 torch.Tensor")
    if x.dtype is not torch.int32:
        raise wrong_type(function, name, "dtype torch.int32", x.dtype, "call .int()")
    pairs = zip(sizes, x.shape, strict=False)
    if x.dim() != len(sizes) or any(size not in ("any", n) for size, n in pairs):
        raise wrong_value(function, name, f"shape {sizes}", tuple(x.shape))
    rows(function, name, x)


def qkv(
    function: str, q: Any, k: Any, v: Any, names: str, rank: int, paged: bool, rank_k: int = 0
) -> None:
    """q, k and v fit one another in dtype, device, heads and head_dim."""
    rank_k = 4 if paged else rank_k or rank
    k_name, v_name = names.split()
    tensor(function, "q", q, rank)
    kind = q.device.type
    if kind not in DTYPES:
        raise wrong_value(function, "q", "a tensor on a CUDA device or the CPU", q.device)
    if q.dtype not in DTYPES[kind]:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in DTYPES[kind])
        raise wrong_type(function, "q", f"dtype {wanted} on {kind}", q.dtype, "cast q, k and v")
    tensor(function, k_name, k, rank_k, q, paged)
    tensor(function, v_name, v, rank_k, q, paged)
    nheads, head_dim = q.shape[-2:]
    nheads_k, head_dim_k = k.shape[-2:]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise wrong_value(function, "q", f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    if head_dim_k != head_dim:
        raise wrong_value(function, k_name, f"head_dim {head_dim}, as q", head_dim_k)
    if k.shape[:-1] != v.shape[:-1]:
        wanted = f"{tuple(k.shape[:-1])} before head_dim, as {k_name}"
        raise wrong_value(function, v_name, wanted, tuple(v.shape[:-1]))
    if not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
        raise wrong_value(function, v_name, f"head_dim from 1 to {MAX_HEAD_DIM}", v.shape[-1])
    if nheads_k == 0 or nheads % nheads_k:
        hint = "each KV head serves nheads / nheads_k query heads"
        wanted = f"a number of heads that divides q's {nheads}"
        raise wrong_value(function, k_name, wanted, nheads_k, hint)


def per_head(
    function: str, name: str, x: Any, q: torch.Tensor, shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:  # fmt: skip
    """x has a contiguous row of numbers, one for each head."""
    strided_tensor(function, name, x, q)
    dtype(function, name, x, *dtypes)
    shape(function, name, x, *shapes)
    rows(function, name, x)


def rotary(function: str, cos: Any, sin: Any, q: torch.Tensor, k: Any) -> bool:
    """Whether there is a rotation: both tables are (positions, rotary_dim / 2), contiguous, in q's
    dtype or fp32.
    """
    if cos is None and sin is None:
        return False
    if k is None:
        raise wrong_value(function, "rotary_cos", "k and v to append", "none", "rotate q yourself")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, torch.Tensor) or not isinstance(cos, torch.Tensor):
            hint = "rotary_cos and rotary_sin go together"
            raise wrong_type(function, name, "a torch.Tensor", kind_of(x), hint)
        strided_tensor(function, name, x, q)
        if x.dtype not in (q.dtype, torch.float32) or x.dtype is not cos.dtype:
            wanted = f"dtype {q.dtype} or torch.float32"
            raise wrong_type(function, name, wanted, x.dtype, "cast it")
        fits = x.dim() == 2 and x.shape == cos.shape and 0 < 2 * x.shape[1] <= q.shape[-1]
        if not fits or not x.shape[0]:
            wanted = f"shape (positions, rotary_dim / 2), rotary_dim at most {q.shape[-1]}"
            raise wrong_value(function, name, wanted, tuple(x.shape))
        if not x.is_contiguous():
            got, hint = f"strides {x.stride()}", "call .contiguous()"
            raise wrong_value(function, name, "a contiguous table", got, hint)
    return True


def refuse_tracing() -> None:
    """Refuse torch.jit.trace, which hands over sizes as tensors and records none of our kernels."""
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            "mini_flash_attention: torch.jit.trace, and the ONNX export that is based on it: "
            "not supported; use torch.export or torch.compile"
        )


def transformed() -> bool:
    """Whether the caller runs under torch.func (vmap, grad, ...) or forward-mode AD."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None
