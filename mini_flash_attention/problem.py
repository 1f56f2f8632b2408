"""One call, described: the form of it that every kernel and the CPU path understand.

`dense`, `varlen` and `kvcache` turn the arguments of the three public functions into a `Problem`.
"""

from typing import Any, NamedTuple

import torch

from . import features, memory
from . import refusals as check
from .refusals import NARROW as NARROW  # kernels ask for it here
from .refusals import refuse
from .rules.window import Window

# What kernels call the tensors of flash_attn_with_kvcache that they know under another name.
CACHE_NAMES = {
    "k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v", "seqused_k": "cache_seqlens",
}  # fmt: skip


class Scores(NamedTuple):
    """What becomes of scores between their scale and the mask, in this order."""

    softcap: float = 0.0  # 0: none
    alibi_slopes: torch.Tensor | None = None  # (nheads,) or (batch, nheads), fp32
    score_mod: Any = None  # a function, @triton.jit on a GPU
    aux: tuple[torch.Tensor, ...] | None = None  # tensors it is handed too
    s_aux: torch.Tensor | None = None  # (nheads,): logits in the denominator alone

    @property
    def changed(self) -> bool:
        """Whether scores are more than scaled."""
        return self.softcap > 0 or self.alibi_slopes is not None or self.score_mod is not None


class Rotary(NamedTuple):
    """Rotation of q and of new keys by where they stand."""

    cos: torch.Tensor  # (positions, rotary_dim / 2)
    sin: torch.Tensor
    interleaved: bool  # pairs (0, 1), (2, 3), ... instead of halves
    moving: bool  # query t stands t tokens after the first; else all stand there


class Problem(NamedTuple):
    """A checked call. Lengths in tokens; `left` and `right` are None where the window is open."""

    function: str
    q: torch.Tensor  # (batch, seqlen_q, nheads, head_dim), packed (total_q, nheads, head_dim)
    k: torch.Tensor  # like q with nheads_k; paged (num_blocks, page_size, nheads_k, head_dim)
    v: torch.Tensor  # like k, with a head_dim of its own
    out: torch.Tensor | None  # the caller's
    cu_seqlens_q: torch.Tensor | None  # (batch + 1,): q is packed
    cu_seqlens_k: torch.Tensor | None  # (batch + 1,): k is packed, or key lengths if paged
    seqused_k: torch.Tensor | None  # (batch,): keys in use before any are appended
    block_table: torch.Tensor | None  # (batch, max_blocks): k and v are paged
    k_new: torch.Tensor | None  # (batch, appended, nheads_k, head_dim), or packed like q
    v_new: torch.Tensor | None
    batch: int
    seqlen_q: int  # upper bound of the query lengths
    seqlen_k: int  # upper bound of the key lengths, what is appended included
    appended: int  # -1: as many tokens as a sequence has queries
    page_size: int  # 0 unless paged
    softmax_scale: float
    left: int | None
    right: int | None
    num_splits: int
    split_size: int  # keys of a part, 0 where num_splits decides
    need_lse: bool
    windowed: bool  # a left bound was asked for, whether or not it can cut
    scores: Scores = Scores()
    cache_batch_idx: torch.Tensor | None = None  # (batch,): rows of a dense cache or block table
    cache_leftpad: torch.Tensor | None = None  # (batch,): the first key in use
    rotary: Rotary | None = None
    seqused_q: torch.Tensor | None = None  # (batch,): query rows in use

    @property
    def window(self) -> Window:
        """What the queries of the longest sequence see."""
        return Window(self.seqlen_k - self.seqlen_q, self.left, self.right, None, self.seqlen_k)

    @property
    def cache_rows(self) -> int:
        """Rows that cache_batch_idx chooses from."""
        return int((self.k if self.block_table is None else self.block_table).shape[0])

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[-2] // self.k.shape[-2]

    def new_out(self) -> torch.Tensor:
        """The caller's out, or a new one."""
        return empty_out(self.q, self.v.shape[-1]) if self.out is None else self.out

    @property
    def lse_shape(self) -> tuple[int, ...] | None:
        """Of softmax_lse, where it is wanted."""
        return shape_of_lse(self.q) if self.need_lse else None


def shape_of_lse(q: torch.Tensor) -> tuple[int, ...]:
    """(batch, nheads, seqlen_q), or (nheads, total_q) where q is packed."""
    *outer, nheads, _ = q.shape
    return (*outer[:-1], nheads, outer[-1])


def empty_out(q: torch.Tensor, head_dim: int = 0) -> torch.Tensor:
    """A new output for q: its layout, but head_dim contiguous even if q overlaps itself.

    head_dim: another than q's.
    """
    if head_dim and head_dim != q.shape[-1]:
        return q.new_empty((*q.shape[:-1], head_dim))
    out = torch.empty_like(q)
    if out.stride(-1) != 1:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out


def dense(
    q: Any, k: Any, v: Any, dropout_p: Any, softmax_scale: Any, causal: Any,
    window_size: Any, softcap: Any, alibi_slopes: Any, deterministic: Any, return_attn_probs: Any,
    s_aux: Any, out: Any, score_mod: Any = None, score_mod_args: Any = (),
) -> Problem:  # fmt: skip
    """The call `flash_attn_func(...)`."""
    function = "flash_attn_func"
    check.qkv(function, q, k, v, "k v", 4, False)
    if k.shape[0] != q.shape[0]:
        refuse(ValueError, function, "k", f"batch {q.shape[0]}, as q", k.shape[0])
    check.dropout(function, dropout_p)
    check.flags(function, deterministic=deterministic, return_attn_probs=return_attn_probs)
    batch = q.shape[0]
    seqlen_q = check.bounded(function, "q", q.shape[1])
    seqlen_k = check.bounded(function, "k", k.shape[1])
    left, right, asked = check.window(function, causal, window_size, seqlen_q, seqlen_k)
    scores = Scores(softcap, alibi_slopes, score_mod, score_mod_args, s_aux)
    p = Problem(
        function, q, k, v, out, None, None, None, None, None, None, batch, seqlen_q, seqlen_k, 0, 0,
        softmax_scale, left, right, 0, 0, return_attn_probs, asked, scores,
    )  # fmt: skip
    return _judged(p)


def varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any,
    max_seqlen_k: Any, dropout_p: Any, softmax_scale: Any, causal: Any, window_size: Any,
    softcap: Any, alibi_slopes: Any, deterministic: Any, return_attn_probs: Any, block_table: Any,
    seqused_k: Any, s_aux: Any, num_splits: Any, out: Any, score_mod: Any = None,
    score_mod_args: Any = (), seqused_q: Any = None,
) -> Problem:  # fmt: skip
    """The call `flash_attn_varlen_func(...)`."""
    function = "flash_attn_varlen_func"
    check.qkv(function, q, k, v, "k v", 3, block_table is not None)
    batch, seqlen_q = _packed(function, cu_seqlens_q, max_seqlen_q, q)
    if cu_seqlens_k is not None:
        check.index_tensor(function, "cu_seqlens_k", cu_seqlens_k, q, (batch + 1,))
    elif block_table is None or seqused_k is None:
        hint = "only paged keys with seqused_k can go without"
        refuse(TypeError, function, "cu_seqlens_k", "an int32 torch.Tensor", "None", hint)
    for name, used in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if used is not None:
            check.index_tensor(function, name, used, q, (batch,))
    page_size, capacity = _pages(function, "k", k, block_table, batch, q)
    seqlen_k = min(check.length(function, "max_seqlen_k", max_seqlen_k), capacity)
    check.dropout(function, dropout_p)
    check.flags(function, deterministic=deterministic, return_attn_probs=return_attn_probs)
    splits = check.splits(function, num_splits)
    left, right, asked = check.window(function, causal, window_size, seqlen_q, seqlen_k)
    scores = Scores(softcap, alibi_slopes, score_mod, score_mod_args, s_aux)
    p = Problem(
        function, q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, None, None,
        batch, seqlen_q, seqlen_k, 0, page_size, softmax_scale, left, right, splits, 0,
        return_attn_probs, asked, scores, seqused_q=seqused_q,
    )  # fmt: skip
    return _judged(p)


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
    packed = cu_seqlens_q is not None
    names = "k_cache v_cache"
    check.qkv(function, q, k_cache, v_cache, names, 3 if packed else 4, block_table is not None, 4)
    if packed:
        batch, seqlen_q = _packed(function, cu_seqlens_q, max_seqlen_q, q)
    else:
        if max_seqlen_q is not None:
            hint = "it belongs to packed queries"
            got = check.kind_of(max_seqlen_q)
            refuse(ValueError, function, "max_seqlen_q", "None without cu_seqlens_q", got, hint)
        batch, seqlen_q = q.shape[:2]
    check.flags(
        function, rotary_interleaved=rotary_interleaved, return_softmax_lse=return_softmax_lse
    )
    splits = check.splits(function, num_splits)
    split_size = check.split_size(function, fixed_split_size, splits)
    if cache_batch_idx is not None:
        check.index_tensor(function, "cache_batch_idx", cache_batch_idx, q, (batch,))
    if cache_leftpad is not None:
        check.index_tensor(function, "cache_leftpad", cache_leftpad, q, (batch,))
    rows = batch if cache_batch_idx is None else "any"
    page_size, capacity = _pages(function, "k_cache", k_cache, block_table, rows, q)
    if k_cache.shape[0] != batch and block_table is None and cache_batch_idx is None:
        hint = "cache_batch_idx says which rows of a larger cache to use"
        refuse(ValueError, function, "k_cache", f"batch {batch}", k_cache.shape[0], hint)
    appended = _append(function, q, k_cache, v_cache, k, v, cache_seqlens, packed)
    if appended > capacity:
        refuse(ValueError, function, "k", f"at most the cache's {capacity} tokens", appended)
    seqused, seqlen_k = None, capacity
    if isinstance(cache_seqlens, torch.Tensor):
        check.index_tensor(function, "cache_seqlens", cache_seqlens, q, (batch,))
        seqused = cache_seqlens
    elif cache_seqlens is not None:
        wanted = "an int or an int32 torch.Tensor"
        seqlen_k = check.length(function, "cache_seqlens", cache_seqlens, wanted)
        if appended < 0:
            name, wanted = "cache_seqlens", "a tensor where packed keys are appended"
            refuse(TypeError, function, name, wanted, "an int")
        seqlen_k += appended
        if seqlen_k > capacity:
            hint = "the keys to append count too" if appended else ""
            wanted = f"at most the cache's {capacity} tokens"
            refuse(ValueError, function, "cache_seqlens", wanted, seqlen_k, hint)
    left, right, asked = check.window(function, causal, window_size, seqlen_q, seqlen_k)
    rotary = None
    if features.rotary(function, rotary_cos, rotary_sin, q, k):
        moving = causal or any(w not in (None, -1) for w in window_size)
        rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved, moving)
    if cache_leftpad is not None:  # what stands before it lies outside of a window
        left, asked = max(seqlen_k, NARROW) if left is None else left, True
    scores = Scores(softcap, alibi_slopes, score_mod, score_mod_args, s_aux)
    p = Problem(
        function, q, k_cache, v_cache, out, cu_seqlens_q, None, seqused, block_table, k, v, batch,
        seqlen_q, seqlen_k, appended, page_size, softmax_scale, left, right, splits, split_size,
        return_softmax_lse, asked, scores, cache_batch_idx, cache_leftpad, rotary,
    )  # fmt: skip
    return _judged(p)


def _judged(p: Problem) -> Problem:
    """p with what the caller passed for scores, scale and out, once that is found to fit."""
    function, q, (softcap, alibi_slopes, score_mod, aux, s_aux) = p.function, p.q, p.scores
    features.score_mod(function, score_mod, aux, q)
    nheads, head_dim = q.shape[-2:]
    if alibi_slopes is not None:
        shapes = ((nheads,), (p.batch, nheads))
        features.per_head(function, "alibi_slopes", alibi_slopes, q, shapes, (torch.float32,))
    if s_aux is not None:
        features.per_head(function, "s_aux", s_aux, q, ((nheads,),), (torch.float32, q.dtype))
    cap = check.softcap(function, softcap)
    others = (alibi_slopes, s_aux, *(aux or ()), *(p.rotary or ()))
    check.differentiable(function, q, p.k, p.v, p.k_new, p.v_new, p.out, *others)
    memory.out(function, p.out, q, p.v.shape[-1])
    scale = check.scale(function, p.softmax_scale, head_dim, alibi_slopes is not None)
    scores = Scores(cap, alibi_slopes, score_mod, tuple(aux or ()) or None, s_aux)
    return p._replace(softmax_scale=scale, scores=scores)


def _packed(function: str, cu_seqlens_q: Any, longest: Any, q: torch.Tensor) -> tuple[int, int]:
    """(batch, upper bound of the query lengths) that cu_seqlens_q and max_seqlen_q describe."""
    check.index_tensor(function, "cu_seqlens_q", cu_seqlens_q, q, ("any",))
    batch = cu_seqlens_q.shape[0] - 1
    if batch < 0 or (batch == 0 and q.shape[0] > 0):
        wanted = "batch + 1 entries, starting at 0"
        refuse(ValueError, function, "cu_seqlens_q", wanted, f"{batch + 1} for {q.shape[0]} tokens")
    longest = check.length(function, "max_seqlen_q", longest)
    return int(batch), min(longest, check.bounded(function, "q", q.shape[0]))


def _pages(
    function: str, name: str, k: torch.Tensor, table: Any, rows: int | str, q: torch.Tensor
) -> tuple[int, int]:
    """(page_size, tokens that one row of the block table can reach); (0, tokens of k) without."""
    if table is None:
        return 0, check.bounded(function, name, k.shape[-3])
    check.index_tensor(function, "block_table", table, q, (rows, "any"))
    page_size = k.shape[1]
    if page_size < 1:
        refuse(ValueError, function, "block_table", "pages of at least one token", page_size)
    return page_size, check.bounded(function, "block_table", table.shape[1] * page_size)


def _append(
    function: str, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    k: Any, v: Any, cache_seqlens: Any, packed: bool,
) -> int:  # fmt: skip
    """Number of tokens that k and v append to every sequence; -1: as many as it has queries."""
    if (k is None) != (v is None):
        name = "v" if v is None else "k"
        refuse(ValueError, function, name, "k and v together", "one of them", "pass both or none")
    if k is None:
        return 0
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        check.tensor(function, name, x, 3 if packed else 4, q)
        hint = "a packed sequence brings a key for each query" if packed else ""
        check.shape(function, name, x, (q.shape[0], *k.shape[1:-2], *cache.shape[-2:]), hint=hint)
        if memory.overlaps_itself(cache):
            got, hint = f"strides {cache.stride()}", "an expanded cache can't be written"
            refuse(ValueError, function, f"{name}_cache", "memory of its own", got, hint)
    if cache_seqlens is None:
        hint = "it says where the new keys go"
        refuse(ValueError, function, "cache_seqlens", "lengths when k, v are given", "None", hint)
    return -1 if packed else int(k.shape[1])
