"""One call, validated: the form of it that every kernel and the CPU path understand."""

from typing import Any, NamedTuple

import torch

from .rules.window import Window

MAX_SPLITS = 128
NARROW = 16  # keys to the left; a window of fewer may change how scores are worked out


class Scores(NamedTuple):
    """What becomes of scores between their scale and the mask, in this order."""

    softcap: float = 0.0  # 0: none
    alibi_slopes: torch.Tensor | None = None  # (nheads,) or (batch, nheads), fp32
    score_mod: Any = None  # a function, @triton.jit on a GPU
    aux: tuple[torch.Tensor, ...] | None = None  # tensors it is handed too
    s_aux: torch.Tensor | None = None  # (nheads,): logits in the denominator alone
    score_mod_bwd: Any = None  # the gradient of score_mod

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


class Options(NamedTuple):
    """What the caller chose. `left` and `right` are None where the window is open."""

    softmax_scale: float
    left: int | None
    right: int | None
    windowed: bool  # a left bound was asked for, whether or not it can cut
    need_lse: bool
    num_splits: int = 0
    split_size: int = 0  # keys of a split, 0 where num_splits decides
    deterministic: bool = False  # gradients are the same in every run
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None  # (1,), int64


class DeviceLengths(NamedTuple):
    """Lengths that lie on the device."""

    cu_seqlens_q: torch.Tensor | None = None  # (batch + 1,): q is packed
    cu_seqlens_k: torch.Tensor | None = None  # (batch + 1,): k is packed, or key lengths if paged
    seqused_q: torch.Tensor | None = None  # (batch,): query rows in use
    seqused_k: torch.Tensor | None = None  # (batch,): keys in use before any are appended


class Cache(NamedTuple):
    """Where keys lie in a cache, and what is appended to it."""

    block_table: torch.Tensor | None = None  # (batch, max_blocks): k and v are paged
    page_size: int = 0  # 0 unless paged
    cache_batch_idx: torch.Tensor | None = None  # (batch,): rows of a dense cache or block table
    cache_leftpad: torch.Tensor | None = None  # (batch,): the first key in use
    k_new: torch.Tensor | None = None  # (batch, appended, nheads_k, head_dim), or packed like q
    v_new: torch.Tensor | None = None
    appended: int = 0  # -1: as many tokens as a sequence has queries
    rotary: Rotary | None = None


class Problem(NamedTuple):
    """A validated call. Lengths are in tokens."""

    function: str
    q: torch.Tensor  # (batch, seqlen_q, nheads, head_dim), packed (total_q, nheads, head_dim)
    k: torch.Tensor  # like q with nheads_k; paged (num_blocks, page_size, nheads_k, head_dim)
    v: torch.Tensor  # like k, with a head_dim of its own
    out: torch.Tensor | None  # the caller's
    batch: int
    seqlen_q: int  # upper bound of the query lengths
    seqlen_k: int  # upper bound of the key lengths, what is appended included
    options: Options
    scores: Scores = Scores()
    lengths: DeviceLengths = DeviceLengths()
    cache: Cache = Cache()

    @property
    def window(self) -> Window:
        """What the queries of the longest sequence see."""
        left, right = self.options.left, self.options.right
        return Window(self.seqlen_k - self.seqlen_q, left, right, None, self.seqlen_k)

    @property
    def cache_rows(self) -> int:
        """Rows that cache_batch_idx chooses from."""
        table = self.cache.block_table
        return int((self.k if table is None else table).shape[0])

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
        return shape_of_lse(self.q) if self.options.need_lse else None


def shape_of_lse(q: torch.Tensor) -> tuple[int, ...]:
    """(batch, nheads, seqlen_q), or (nheads, total_q) where q is packed."""
    *outer, nheads, _ = q.shape
    return (*outer[:-1], nheads, outer[-1])


def empty_out(q: torch.Tensor, head_dim: int = 0, device: str | None = None) -> torch.Tensor:
    """A new output for q: its layout, but head_dim contiguous even if q overlaps itself.

    head_dim: another than q's. device: "meta" where the layout is all that is wanted.
    """
    if head_dim and head_dim != q.shape[-1]:
        return q.new_empty((*q.shape[:-1], head_dim), device=device)
    # Without an argument where it can be: this is paid in every call.
    out = torch.empty_like(q) if device is None else torch.empty_like(q, device=device)
    if out.stride(-1) != 1:
        out = torch.empty_like(q, memory_format=torch.contiguous_format, device=device)
    return out
