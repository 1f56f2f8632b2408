"""The public functions' arguments, each call as a whole, turned into a `Problem`."""

from typing import Any

import torch

from ..problem import NARROW, Cache, DeviceLengths, Options, Problem, Rotary, Scores
from . import kind_of, memory, options, tensors, wrong_type, wrong_value


def dense(
    q: Any, k: Any, v: Any, dropout_p: Any, softmax_scale: Any, causal: Any,
    window_size: Any, softcap: Any, alibi_slopes: Any, deterministic: Any, return_attn_probs: Any,
    s_aux: Any, out: Any, score_mod: Any = None, score_mod_args: Any = (),
    score_mod_bwd: Any = None, dropout_seed: Any = None,
    function: str = "flash_attn_func",
) -> Problem:  # fmt: skip
    """The call `flash_attn_func(...)`. dropout_seed: made by `dispatch.py`."""
    tensors.qkv(function, q, k, v, "k v", 4, False)
    if k.shape[0] != q.shape[0]:
        raise wrong_value(function, "k", f"batch {q.shape[0]}, as q", k.shape[0])
    dropped = options.dropout(function, dropout_p)
    options.flags(function, deterministic=deterministic, return_attn_probs=return_attn_probs)
    batch = q.shape[0]
    seqlen_q = options.bounded(function, "q", q.shape[1])
    seqlen_k = options.bounded(function, "k", k.shape[1])
    left, right, asked = options.window(function, causal, window_size, seqlen_q, seqlen_k)
    scores = Scores(softcap, alibi_slopes, score_mod, score_mod_args, s_aux, score_mod_bwd)
    training = (deterministic, dropped, dropout_seed)
    chosen = Options(softmax_scale, left, right, asked, return_attn_probs, 0, 0, *training)
    return _validated(Problem(function, q, k, v, out, batch, seqlen_q, seqlen_k, chosen, scores))


def varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any,
    max_seqlen_k: Any, dropout_p: Any, softmax_scale: Any, causal: Any, window_size: Any,
    softcap: Any, alibi_slopes: Any, deterministic: Any, return_attn_probs: Any, block_table: Any,
    seqused_k: Any, s_aux: Any, num_splits: Any, out: Any, score_mod: Any = None,
    score_mod_args: Any = (), seqused_q: Any = None, score_mod_bwd: Any = None,
    dropout_seed: Any = None, function: str = "flash_attn_varlen_func",
) -> Problem:  # fmt: skip
    """The call `flash_attn_varlen_func(...)`."""
    tensors.qkv(function, q, k, v, "k v", 3, block_table is not None)
    batch, seqlen_q = _packed(function, cu_seqlens_q, max_seqlen_q, q)
    if cu_seqlens_k is not None:
        tensors.index_tensor(function, "cu_seqlens_k", cu_seqlens_k, q, (batch + 1,))
    elif block_table is None or seqused_k is None:
        hint = "only paged keys with seqused_k can go without"
        raise wrong_type(function, "cu_seqlens_k", "an int32 torch.Tensor", "None", hint)
    for name, used in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if used is not None:
            tensors.index_tensor(function, name, used, q, (batch,))
    page_size, capacity = _pages(function, "k", k, block_table, batch, q)
    seqlen_k = min(options.length(function, "max_seqlen_k", max_seqlen_k), capacity)
    dropped = options.dropout(function, dropout_p)
    options.flags(function, deterministic=deterministic, return_attn_probs=return_attn_probs)
    splits = options.splits(function, num_splits)
    left, right, asked = options.window(function, causal, window_size, seqlen_q, seqlen_k)
    scores = Scores(softcap, alibi_slopes, score_mod, score_mod_args, s_aux, score_mod_bwd)
    training = (deterministic, dropped, dropout_seed)
    chosen = Options(softmax_scale, left, right, asked, return_attn_probs, splits, 0, *training)
    lengths = DeviceLengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    cache = Cache(block_table, page_size)
    p = Problem(function, q, k, v, out, batch, seqlen_q, seqlen_k, chosen, scores, lengths, cache)
    return _validated(p)


def kvcache(
    q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, rotary_cos: Any,
    rotary_sin: Any, cache_seqlens: Any, cache_batch_idx: Any, cache_leftpad: Any, block_table: Any,
    softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, rotary_interleaved: Any,
    alibi_slopes: Any, num_splits: Any, return_softmax_lse: Any, cu_seqlens_q: Any,
    max_seqlen_q: Any, s_aux: Any, fixed_split_size: Any, out: Any, score_mod: Any = None,
    score_mod_args: Any = (),
) -> Problem:  # fmt: skip
    """The call `flash_attn_with_kvcache(...)`."""
    function = "flash_attn_with_kvcache"
    packed, paged = cu_seqlens_q is not None, block_table is not None
    rank = 3 if packed else 4
    tensors.qkv(function, q, k_cache, v_cache, "k_cache v_cache", rank, paged, 4)
    if packed:
        batch, seqlen_q = _packed(function, cu_seqlens_q, max_seqlen_q, q)
    else:
        if max_seqlen_q is not None:
            got, hint = kind_of(max_seqlen_q), "it belongs to packed queries"
            raise wrong_value(function, "max_seqlen_q", "None without cu_seqlens_q", got, hint)
        batch, seqlen_q = q.shape[:2]
    options.flags(
        function, rotary_interleaved=rotary_interleaved, return_softmax_lse=return_softmax_lse
    )
    splits = options.splits(function, num_splits)
    split_size = options.split_size(function, fixed_split_size, splits)
    for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if x is not None:
            tensors.index_tensor(function, name, x, q, (batch,))
    rows = batch if cache_batch_idx is None else "any"
    page_size, capacity = _pages(function, "k_cache", k_cache, block_table, rows, q)
    if k_cache.shape[0] != batch and not paged and cache_batch_idx is None:
        hint = "cache_batch_idx says which rows of a larger cache to use"
        raise wrong_value(function, "k_cache", f"batch {batch}", k_cache.shape[0], hint)
    appended = _append(function, q, k_cache, v_cache, k, v, cache_seqlens, packed)
    if appended > capacity:
        raise wrong_value(function, "k", f"at most the cache's {capacity} tokens", appended)
    seqused, seqlen_k = None, capacity
    if isinstance(cache_seqlens, torch.Tensor):
        tensors.index_tensor(function, "cache_seqlens", cache_seqlens, q, (batch,))
        seqused = cache_seqlens
    elif cache_seqlens is not None:
        wanted = "an int or an int32 torch.Tensor"
        seqlen_k = options.length(function, "cache_seqlens", cache_seqlens, wanted)
        if appended < 0:
            name, wanted = "cache_seqlens", "a tensor where packed keys are appended"
            raise wrong_type(function, name, wanted, "an int")
        seqlen_k += appended
        if seqlen_k > capacity:
            hint = "the keys to append count too" if appended else ""
            wanted = f"at most the cache's {capacity} tokens"
            raise wrong_value(function, "cache_seqlens", wanted, seqlen_k, hint)
    left, right, asked = options.window(function, causal, window_size, seqlen_q, seqlen_k)
    rotary = None
    if tensors.rotary(function, rotary_cos, rotary_sin, q, k):
        moving = causal or any(w not in (None, -1) for w in window_size)
        rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved, moving)
    if cache_leftpad is not None:  # what stands before it lies outside of a window
        left, asked = max(seqlen_k, NARROW) if left is None else left, True
    scores = Scores(softcap, alibi_slopes, score_mod, score_mod_args, s_aux)
    chosen = Options(softmax_scale, left, right, asked, return_softmax_lse, splits, split_size)
    lengths = DeviceLengths(cu_seqlens_q, seqused_k=seqused)
    cache = Cache(block_table, page_size, cache_batch_idx, cache_leftpad, k, v, appended, rotary)
    p = Problem(function, q, k_cache, v_cache, out, batch, seqlen_q, seqlen_k, chosen, scores)
    return _validated(p._replace(lengths=lengths, cache=cache))


def _validated(p: Problem) -> Problem:
    """p with what the caller passed for scores, scale and out, once that is found to fit."""
    function, q = p.function, p.q
    softcap, alibi_slopes, score_mod, aux, s_aux, score_mod_bwd = p.scores
    options.score_mod(function, score_mod, aux, q)
    options.score_mod_bwd(function, score_mod_bwd, score_mod, q)
    nheads, head_dim = q.shape[-2:]
    if alibi_slopes is not None:
        shapes = ((nheads,), (p.batch, nheads))
        tensors.per_head(function, "alibi_slopes", alibi_slopes, q, shapes, (torch.float32,))
    if s_aux is not None:
        tensors.per_head(function, "s_aux", s_aux, q, ((nheads,),), (torch.float32, q.dtype))
    cap = options.softcap(function, softcap)
    memory.out(function, p.out, q, p.v.shape[-1])
    scale = options.scale(function, p.options.softmax_scale, head_dim, alibi_slopes is not None)
    aux = tuple(aux or ()) or None
    scores = Scores(cap, alibi_slopes, score_mod, aux, s_aux, score_mod_bwd)
    return p._replace(options=p.options._replace(softmax_scale=scale), scores=scores)


def _packed(function: str, cu_seqlens_q: Any, longest: Any, q: torch.Tensor) -> tuple[int, int]:
    """(batch, upper bound of the query lengths) that cu_seqlens_q and max_seqlen_q describe."""
    tensors.index_tensor(function, "cu_seqlens_q", cu_seqlens_q, q, ("any",))
    batch = cu_seqlens_q.shape[0] - 1
    if batch < 0 or (batch == 0 and q.shape[0] > 0):
        wanted = "batch + 1 entries, starting at 0"
        raise wrong_value(function, "cu_seqlens_q", wanted, f"{batch + 1} for {q.shape[0]} tokens")
    longest = options.length(function, "max_seqlen_q", longest)
    return int(batch), min(longest, options.bounded(function, "q", q.shape[0]))


def _pages(
    function: str, name: str, k: torch.Tensor, table: Any, rows: int | str, q: torch.Tensor
) -> tuple[int, int]:
    """(page_size, tokens that one row of the block table can reach); (0, tokens of k) without."""
    if table is None:
        return 0, options.bounded(function, name, k.shape[-3])
    tensors.index_tensor(function, "block_table", table, q, (rows, "any"))
    page_size = k.shape[1]
    if page_size < 1:
        raise wrong_value(function, "block_table", "pages of at least one token", page_size)
    return page_size, options.bounded(function, "block_table", table.shape[1] * page_size)


def _append(
    function: str, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    k: Any, v: Any, cache_seqlens: Any, packed: bool,
) -> int:  # fmt: skip
    """Number of tokens that k and v append to every sequence; -1: as many as it has queries."""
    if (k is None) != (v is None):
        name = "v" if v is None else "k"
        raise wrong_value(function, name, "k and v together", "one of them", "pass both or none")
    if k is None:
        return 0
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        tensors.tensor(function, name, x, 3 if packed else 4, q)
        hint = "a packed sequence brings a key for each query" if packed else ""
        tensors.shape(function, name, x, (q.shape[0], *k.shape[1:-2], *cache.shape[-2:]), hint=hint)
        if memory.overlaps_itself(cache):
            got, hint = f"strides {cache.stride()}", "an expanded cache can't be written"
            raise wrong_value(function, f"{name}_cache", "memory of its own", got, hint)
    if cache_seqlens is None:
        hint = "it says where the new keys go"
        raise wrong_value(function, "cache_seqlens", "lengths when k, v are given", "None", hint)
    return -1 if packed else int(k.shape[1])
