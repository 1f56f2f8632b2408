"""The three public functions. Names, order and meaning of the arguments are flash-attn 2.8's."""

from collections.abc import Callable
from typing import Any

import torch

from . import dispatch
from .entries import DENSE, KVCACHE, VARLEN
from .validate.options import either

# A list[int] is not a list[int | None] to type checkers, because lists can be written to.
Window = tuple[int | None, int | None] | list[int | None] | list[int] | list[None] | torch.Tensor


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_args: tuple[torch.Tensor, ...] = (),
    score_mod_bwd: Callable[..., Any] | None = None,
    out: torch.Tensor | None = None,
) -> Any:
    """Attention of a batch of sequences of one length: softmax(q kᵀ · softmax_scale) v.

    Source: FlashAttention-2 (arXiv:2307.08691), Algorithm 1. fp16 and bf16 on a GPU of compute
    capability 8.0 or newer; those and fp32 on the CPU. Every tensor may have any strides as long
    as the last dimension is contiguous; none is copied.

    Args:
        q: (batch, seqlen_q, nheads, head_dim), head_dim from 1 to 256.
        k, v: (batch, seqlen_k, nheads_k, head_dim), nheads_k a divisor of nheads: query heads
            `g * nheads / nheads_k` and the following share KV head g. v may have a head_dim of
            its own, which is then that of the result.
        dropout_p: the share of weights to drop, as in training: those that stay are divided by
            `1 - dropout_p`. Which ones depends on PyTorch's generator and on where a weight stands.
        softmax_scale: factor on the scores; `head_dim ** -0.5` by default. Any finite number.
        causal: query i sees key j when `j <= i + seqlen_k - seqlen_q`: the last query stands on
            the last key.
        window_size: (left, right) in tokens: query i sees the keys from
            `i + seqlen_k - seqlen_q - left` to `i + seqlen_k - seqlen_q + right`. -1 or None is
            unbounded. `causal` sets right to 0. A list or a tensor of two ints also works;
            reading a tensor on a GPU waits for that GPU.
        softcap: scaled scores become `softcap * tanh(score / softcap)`; 0 is none.
        alibi_slopes: (nheads,) or (batch, nheads), fp32: `slope * distance` is subtracted from a
            score, distance the tokens between the key and where the query stands
            (arXiv:2108.12409).
        s_aux: (nheads,), fp32 or q's dtype: a sink of each head, a logit that takes part in the
            softmax's sum (and in the LSE) and has no value. `learnable_sink` is another name.
        score_mod: a `@triton.jit` function `(score, batch, head, q_idx, kv_idx) -> score`, compiled
            into the kernel and applied after softcap and ALiBi, before the mask. q_idx and kv_idx
            are positions in the sequence: the last query has that of the last key, queries before
            the first key have 0, and kv_idx may be up to 127 past the last key. All arguments
            broadcast against one another. It may return -inf, but nothing else that is not finite.
            On the CPU it runs on tensors, with PyTorch's functions for those of `tl`. Values
            captured from a closure must be `tl.constexpr` or helper functions, and helpers need
            distinct names.
        score_mod_args: tensors that score_mod gets as a tuple, a sixth argument, and reads with
            `tl.load(args[0] + index)`. What it reads there is its own responsibility.
        score_mod_bwd: the gradient of score_mod, a function of the same kind,
            `(grad, score, batch, head, q_idx, kv_idx) -> grad`, with args last if there are any.
            `score` is what score_mod is given. Without it a score_mod refuses gradients.
        deterministic: the same gradients in every run, bit for bit. The forward pass always gives
            the same bits.
        return_attn_probs: return `(out, softmax_lse, None)` instead of `out`. Probabilities are
            never materialised; the third entry keeps flash-attn's shape of the result.
        out: tensor like q to write the result to, sharing no memory with q, k and v; it takes no
            part in gradients.

    Returns:
        out, shaped like q (with v's head_dim), in q's dtype; with `return_attn_probs` also
        softmax_lse, (batch, nheads, seqlen_q) in fp32, natural logarithm. A query that sees no
        key gives 0 and an LSE of -inf.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and what to do.
        NotImplementedError: second derivatives, and gradients of alibi_slopes and score_mod_args.
    """
    s_aux = either("flash_attn_func", "s_aux", s_aux, "learnable_sink", learnable_sink)
    arguments = {
        "q": q, "k": k, "v": v, "dropout_p": dropout_p, "softmax_scale": softmax_scale,
        "causal": causal, "window_size": window_size, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "deterministic": deterministic,
        "return_attn_probs": return_attn_probs, "s_aux": s_aux, "score_mod": score_mod,
        "score_mod_args": score_mod_args, "score_mod_bwd": score_mod_bwd, "out": out,
    }  # fmt: skip
    result, lse = dispatch.run(DENSE, arguments)
    return (result, lse, None) if return_attn_probs else result


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_args: tuple[torch.Tensor, ...] = (),
    score_mod_bwd: Callable[..., Any] | None = None,
    num_splits: int = 0,
    out: torch.Tensor | None = None,
) -> Any:
    """Attention of sequences of different lengths, packed one after the other.

    Arguments not listed are those of `flash_attn_func`; so are dtypes, meaning and errors.

    Args:
        q: (total_q, nheads, head_dim).
        k, v: (total_k, nheads_k, head_dim); with `block_table` the paged caches
            (num_blocks, page_size, nheads_k, head_dim), page_size 1 or more.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32, starting at 0: sequence b is the rows
            `cu_seqlens[b]` to `cu_seqlens[b + 1]`. With `block_table` only the differences of
            `cu_seqlens_k` matter, and with `seqused_k` as well it may be None.
        max_seqlen_q, max_seqlen_k: at least the longest length, as int; a tensor of no
            dimensions is read, which waits for the GPU if it lives there, and so can't be done in
            a CUDA graph. Queries past
            `max_seqlen_q` give 0, keys past `max_seqlen_k` are not seen.
        block_table: (batch, max_blocks), int32: key j of sequence b lies in page
            `block_table[b, j // page_size]`. Entries past a sequence's end may hold anything.
            `page_table` is another name.
        seqused_q: (batch,), int32: how many query rows of each sequence are in use, counted from
            the first. Masks align to the last row in use. Other rows give 0 and an LSE of -inf.
        seqused_k: (batch,), int32: keys of each sequence in use.
        num_splits: programs that share the keys of one sequence; 0 decides from the shapes. With
            1 a sequence gets the same bits whatever else is in the batch.

    Returns:
        out, shaped like q; with `return_attn_probs` `(out, softmax_lse, None)` with softmax_lse
        (nheads, total_q). Rows of q that belong to no sequence give 0 and -inf.

    Lengths and page numbers are clamped on the device to what the tensors hold: bad ones give a
    wrong answer, never an access outside the tensors. Nothing is read back to the host.
    """
    name = "flash_attn_varlen_func"
    s_aux = either(name, "s_aux", s_aux, "learnable_sink", learnable_sink)
    block_table = either(name, "block_table", block_table, "page_table", page_table)
    arguments = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "dropout_p": dropout_p,
        "softmax_scale": softmax_scale, "causal": causal, "window_size": window_size,
        "softcap": softcap, "alibi_slopes": alibi_slopes, "deterministic": deterministic,
        "return_attn_probs": return_attn_probs, "block_table": block_table, "seqused_q": seqused_q,
        "seqused_k": seqused_k, "s_aux": s_aux, "score_mod": score_mod,
        "score_mod_args": score_mod_args, "score_mod_bwd": score_mod_bwd, "num_splits": num_splits,
        "out": out,
    }  # fmt: skip
    result, lse = dispatch.run(VARLEN, arguments)
    return (result, lse, None) if return_attn_probs else result


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_args: tuple[torch.Tensor, ...] = (),
    fixed_split_size: int | None = None,
    out: torch.Tensor | None = None,
) -> Any:
    """Attention of new tokens to a KV cache, which it may extend first, in place.

    Arguments not listed are those of `flash_attn_func`; so are dtypes, meaning and errors.

    Args:
        q: (batch, seqlen_q, nheads, head_dim), any seqlen_q; with `cu_seqlens_q` packed,
            (total_q, nheads, head_dim).
        k_cache, v_cache: (batch, seqlen_cache, nheads_k, head_dim), or (batch_cache, ...) with
            `cache_batch_idx`; with `block_table` the pages
            (num_blocks, page_size, nheads_k, head_dim), page_size 1 or more.
        k, v: (batch, seqlen_new, nheads_k, head_dim), or (total_q, nheads_k, head_dim) beside
            packed queries, written to the caches at `cache_seqlens` and then attended to. What
            does not fit into the cache is not written. They must not share memory with the caches.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), fp32 or q's dtype: the first
            rotary_dim elements of k's and q's heads are rotated by where the token stands
            (arXiv:2104.09864), queries from `cache_seqlens` on, all at `cache_seqlens` if neither
            causal nor windowed. Positions past the table are rotated like its last.
        rotary_interleaved: whether elements 0 and 1, 2 and 3, ... are rotated together, or those
            of the two halves of rotary_dim.
        cache_seqlens: keys in use before k and v: an int, or (batch,) int32 on the device. It is
            not changed. None means the whole cache. 0 gives 0 and an LSE of -inf.
        cache_batch_idx: (batch,), int32: the row of the caches that each sequence uses, or of the
            block table, which then has any number of rows. A row that does not exist counts as
            empty.
        cache_leftpad: (batch,), int32: the first key of each sequence that is in use.
        block_table: as in `flash_attn_varlen_func`.
        cu_seqlens_q, max_seqlen_q: as in `flash_attn_varlen_func`: one call for sequences that
            prefill and sequences that decode.
        num_splits: programs that share the keys of one sequence. 0 decides from the shapes, and
            shares the keys of large batches out evenly whatever their lengths. Any other number
            gives a sequence the same bits whatever else is in the batch; beside packed queries
            more than 1 does so for one `max_seqlen_q`.
        fixed_split_size: keys per program instead, rounded up to whole tiles (of at most 128
            keys). The same bits too, and parts that stay as they are while the sequence grows.
        return_softmax_lse: return `(out, softmax_lse)`, softmax_lse (batch, nheads, seqlen_q), or
            (nheads, total_q).

    Returns:
        out, shaped like q, or `(out, softmax_lse)`.

    No length or page number is read back to the host, so a call can be captured in a CUDA graph
    and replayed after `cache_seqlens` and `block_table` changed in place.
    """
    name = "flash_attn_with_kvcache"
    s_aux = either(name, "s_aux", s_aux, "learnable_sink", learnable_sink)
    block_table = either(name, "block_table", block_table, "page_table", page_table)
    arguments = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin, "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad,
        "block_table": block_table, "softmax_scale": softmax_scale, "causal": causal,
        "window_size": window_size, "softcap": softcap, "rotary_interleaved": rotary_interleaved,
        "alibi_slopes": alibi_slopes, "num_splits": num_splits,
        "return_softmax_lse": return_softmax_lse, "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q, "s_aux": s_aux, "score_mod": score_mod,
        "score_mod_args": score_mod_args, "fixed_split_size": fixed_split_size, "out": out,
    }  # fmt: skip
    result, lse = dispatch.run(KVCACHE, arguments)
    return (result, lse) if return_softmax_lse else result
