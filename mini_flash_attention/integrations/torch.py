"""Behind PyTorch's own functions.

    from mini_flash_attention.integrations.torch import register
    register()
    torch.nn.attention.activate_flash_attention_impl("mini")
    ...
    torch.nn.attention.restore_flash_attention_impl()

In between, five operators of PyTorch's flash attention are ours on CUDA tensors, and with them
whatever ends there, forward and backward: `F.scaled_dot_product_attention`,
`torch.nn.attention.varlen.varlen_attn`, attention of jagged tensors, and ring attention.

It stays PyTorch's choice which calls of `F.scaled_dot_product_attention` end there: those in fp16
and bf16 without a mask, and causal ones only with as many queries as keys. On Hopper and data
centre Blackwell GPUs it may prefer cuDNN; `torch.nn.attention.sdpa_kernel` says otherwise:

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):

After `torch.use_deterministic_algorithms(True)` gradients are the same bits in every run. Dropout
raises NotImplementedError.
"""

from typing import Any

import torch
from torch.library import Library
from torch.nn import attention

from .. import backward, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from ..problem import empty_out
from ..validate import invalid, not_differentiable, not_implemented, wrong_value

_names: set[str] = set()


def register(name: str = "mini") -> None:
    """Make `torch.nn.attention.activate_flash_attention_impl(name)` activate this package.

    Again with the same name it changes nothing.

    Raises:
        NotImplementedError: this torch keeps no such registry.
        ValueError: another implementation has that name.
    """
    if not hasattr(attention, "register_flash_attention_impl"):
        wanted = "a version with torch.nn.attention.register_flash_attention_impl"
        hint = "update torch, or call flash_attn_func yourself"
        raise invalid(NotImplementedError, "register", "torch", wanted, torch.__version__, hint)
    taken = attention.list_flash_attention_impls()
    if name in taken and name not in _names:
        raise wrong_value("register", "name", f"none of {taken}", repr(name), "choose another")
    attention.register_flash_attention_impl(name, register_fn=Overrides)
    _names.add(name)


class Overrides:
    """Our kernels in the place of PyTorch's, until `remove()`."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        self._library: Library | None = Library("aten", "IMPL", dispatch_key)
        for operator, kernel in OPERATORS.items():
            self._library.impl(operator, kernel, dispatch_key)

    def remove(self) -> None:
        """Give the operators back; with the library go its kernels."""
        self._library = None


# -- the operators --------------------------------------------------------------------------------

# A causal mask of theirs is aligned at the bottom right, as ours: torch.nn.attention.bias calls
# them for such a mask, and SDPA, whose causal mask begins top left, only where both are the same.
#
# Arguments that are left at their defaults don't arrive, and later versions of torch may have
# more. `more` catches those; one that is set asks for something we know nothing of.

SDPA = "scaled_dot_product_attention"
FORWARD = "_flash_attention_forward"
BACKWARD = "_flash_attention_backward"


def _scaled_dot_product_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **more: Any,
) -> tuple[Any, ...]:
    """(batch, heads, seqlen, head_dim) throughout; LSE (batch, nheads, seqlen_q)."""
    _refuse(SDPA, dropout_p, return_debug_mask, more)
    out = empty_out(query, value.shape[-1])  # laid out like query, as compiled code expects
    q, k, v, transposed = (x.transpose(1, 2) for x in (query, key, value, out))
    with torch.no_grad():  # autograd is PyTorch's here, and will ask for the backward pass
        _, lse, _ = flash_attn_func(
            q, k, v, 0.0, scale, is_causal, return_attn_probs=True, out=transposed
        )
    return out, lse, None, None, query.shape[2], key.shape[2], *_undrawn(query)


def _flash_attention_forward(query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    return *_attend(None, query, *arguments, **options), *_undrawn(query)


def _flash_attention_forward_no_dropout_inplace(
    out: torch.Tensor, *arguments: Any, **options: Any
) -> torch.Tensor:
    return _attend(out, *arguments, **options)[1]


def _attend(
    out: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, LSE) of batched tensors (batch, seqlen, heads, head_dim) or packed ones."""
    _refuse(FORWARD, dropout_p, return_debug_mask, more)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        unknown = {"seqused_k": seqused_k, "alibi_slopes": alibi_slopes, "block_table": block_table}
        for name, x in unknown.items():
            if x is not None:  # PyTorch does not tell the backward pass of it
                raise not_differentiable(FORWARD, name)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size": (window_size_left, window_size_right),
        "alibi_slopes": alibi_slopes,
        "block_table": block_table,
        "num_splits": num_splits or 0,
        "out": out,
    }
    with torch.no_grad():
        if cum_seq_q is None:  # the form of ours that has all these arguments; the same kernels
            result, lse = flash_attn_with_kvcache(
                query, key, value, cache_seqlens=seqused_k, return_softmax_lse=True, **options
            )
            return result, lse
        if block_table is not None and seqused_k is not None:
            cum_seq_k = None  # where pages lie says nothing of how many keys there are
        result, lse, _ = flash_attn_varlen_func(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, return_attn_probs=True,
            seqused_k=seqused_k, **options,
        )  # fmt: skip
        return result, lse


def _scaled_dot_product_flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, ...]:
    _refuse(SDPA, dropout_p, False, more)
    gradients = [empty_out(x) for x in (query, key, value)]
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    tensors = [x.transpose(1, 2) for x in (grad_out, query, key, value, out)]
    _differentiate(tensors, logsumexp, is_causal, scale, dq=dq, dk=dk, dv=dv)
    return tuple(gradients)


def _flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, ...]:
    _refuse(BACKWARD, dropout_p, False, more)
    options: dict[str, Any] = {"window_size": (window_size_left, window_size_right)}
    if cum_seq_q is not None:
        options |= {"cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_k}
        options |= {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
    tensors = [grad_out, query, key, value, out]
    return _differentiate(tensors, logsumexp, is_causal, scale, **options)


def _differentiate(
    tensors: list[torch.Tensor],
    logsumexp: torch.Tensor,
    causal: bool,
    scale: float | None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value.

    tensors: grad_out, query, key, value and out, (..., seqlen, heads, head_dim).
    """
    grad_out, query, key, value, out = tensors
    if grad_out.stride(-1) != 1:  # that of a sum is expanded
        grad_out = grad_out.contiguous()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.no_grad():
        return backward(
            grad_out, query, key, value, out, logsumexp, softmax_scale=scale, causal=causal,
            deterministic=deterministic, **options,
        )  # fmt: skip


def _refuse(function: str, dropout_p: float, return_debug_mask: bool, more: dict[str, Any]) -> None:
    if dropout_p:
        raise not_implemented(function, "dropout_p", "0.0")
    if return_debug_mask:
        raise not_implemented(function, "return_debug_mask", "False")
    for name, x in more.items():
        if x is not None:
            raise not_implemented(function, name, "None")


def _undrawn(query: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Seed, offset and mask of a dropout that did not happen: memory that nobody reads."""
    seed, offset = (query.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return seed, offset, query.new_empty(0)


OPERATORS = {
    "_scaled_dot_product_flash_attention": _scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_backward": _scaled_dot_product_flash_attention_backward,
    "_flash_attention_forward": _flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_attention_forward_no_dropout_inplace,
    "_flash_attention_backward": _flash_attention_backward,
}
