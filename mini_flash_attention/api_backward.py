"""The backward pass as a function, for those who build on it."""

from collections.abc import Callable
from typing import Any

import torch

from . import dispatch
from .api import Window
from .entries import DENSE_BACKWARD, VARLEN_BACKWARD


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    *,
    dsoftmax_lse: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | torch.Tensor | None = None,
    max_seqlen_k: int | torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_args: tuple[torch.Tensor, ...] = (),
    score_mod_bwd: Callable[..., Any] | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients (dq, dk, dv) of `flash_attn_func`, or of `flash_attn_varlen_func`.

    What autograd calls, for those who build on it: out and softmax_lse may be those of attention to
    more keys than k and v hold, as in ring attention. Then dq, dk and dv are the part that these
    keys have in the gradients, and the parts of all keys add up.

    Arguments not listed are those of the two functions. A sink has no argument: it is in
    softmax_lse, and its own gradient is `-(exp(s_aux - softmax_lse) * delta).sum()` over the
    queries of a head, with delta the row sums of `dout * out`, less dsoftmax_lse.

    Args:
        dout: like out; any strides as long as the last dimension is contiguous.
        out, softmax_lse: what the forward call returned.
        dsoftmax_lse: the gradient of softmax_lse, like it, if it has one.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: packed sequences, as in
            `flash_attn_varlen_func`; without them the call is one of `flash_attn_func`.
        deterministic: the same bits in every run.
        dq, dk, dv: tensors like q, k and v to write the gradients to.

    Returns:
        (dq, dk, dv), like q, k and v. Rows that no sequence uses are 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and what to do.
    """
    arguments = {
        "q": q, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse, "dout": dout,
        "dropout_p": 0.0, "dropout_seed": None,
        "dsoftmax_lse": dsoftmax_lse, "softmax_scale": softmax_scale, "causal": causal,
        "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "deterministic": deterministic, "score_mod": score_mod, "score_mod_args": score_mod_args,
        "score_mod_bwd": score_mod_bwd, "dq": dq, "dk": dk, "dv": dv,
    }  # fmt: skip
    lengths = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k, "seqused_q": seqused_q, "seqused_k": seqused_k,
    }  # fmt: skip
    packed = any(x is not None for x in lengths.values())
    entry = VARLEN_BACKWARD if packed else DENSE_BACKWARD
    gradients = dispatch.run_backward(entry, arguments | lengths if packed else arguments)
    return gradients[:3]
