"""The backward kernels: their tiles, and the order in which they run."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import settings
from ..problem import Problem
from .configs import Tiles
from .forward import L2_BYTES
from .gpu import Gpu
from .hopper import tma
from .layout import padded, size_class


class BackwardTensors(NamedTuple):
    """What the backward pass of a `Problem` reads besides, and what it writes."""

    out: torch.Tensor
    dout: torch.Tensor
    lse: torch.Tensor
    dlse: torch.Tensor | None
    delta: torch.Tensor  # like lse
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Work(NamedTuple):
    """The programs of a kernel: blocks of rows by heads of the batch."""

    tiles: Tiles
    num_blocks: int  # for each head
    batch_heads: int  # heads alone where rows are packed
    l2_group: int  # heads whose tensors share the L2 cache

    @property
    def programs(self) -> int:
        return self.num_blocks * self.batch_heads


class Backward(NamedTuple):
    """The plan of the portable backward kernels."""

    preprocess: Work
    dkdv: Work
    dq: Work


class HopperBackward(NamedTuple):
    """The plan of the Hopper backward kernels."""

    preprocess: Work  # and what narrows dQ afterwards, if it has no kernel of its own
    work: Work  # blocks of keys
    dq: Work | None  # blocks of queries, where dQ has a kernel of its own
    columns: int  # of a tile of Q and K
    columns_v: int


class Choice(NamedTuple):
    """Tiles for a head_dim. Both kernels have block_m queries and block_n keys in a tile."""

    dkdv: Tiles
    dq: Tiles


# HOPPER is measured on an H200 (bench/NOTES.md). SMALL fits the 99 KB of shared memory of SM 86, 89
# and 120, of which none has run it; with four warps dq would spill up to 128 bytes a thread.
HOPPER = {
    64: Choice(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 3)),
    128: Choice(Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
    256: Choice(Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 3)),
}
SMALL = {
    64: Choice(Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)),
    128: Choice(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    256: Choice(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2)),
}
TILES = {90: HOPPER}
# Rows past the last one that a block of LSE and delta may reach: the unused block of a packed
# sequence begins up to a block after its end.
ROOM = 2 * max(choice.dq.block_m for table in (HOPPER, SMALL) for choice in table.values())
# What heads that are worked on together may have in the L2 cache (bench/NOTES.md, 125).
HOPPER_L2_BYTES = 8 << 20
PREPROCESS_ROWS = {64: 128, 128: 64, 256: 32}


def backward(p: Problem, gpu: Gpu) -> Backward:
    """The plan of the portable backward kernels for a call."""
    size = size_class(max(p.q.shape[-1], p.v.shape[-1]))
    choice = TILES.get(gpu.arch, SMALL)[size]
    nheads = p.q.shape[-2]
    packed_q = p.lengths.cu_seqlens_q is not None
    rows = Tiles(PREPROCESS_ROWS[size_class(p.v.shape[-1])], 0, 4, 1)
    tiles = choice.dkdv
    if p.scores.score_mod is not None or p.options.dropout_p:  # which need registers (NOTES 127)
        tiles = tiles._replace(block_m=min(64, tiles.block_m))
    dkdv, dq = key_work(p, tiles, L2_BYTES), query_work(p, choice.dq, L2_BYTES)
    batch_heads = nheads * (1 if packed_q else p.batch)
    preprocess = Work(rows, -(-p.q.shape[-3] // rows.block_m), batch_heads, 1)
    return Backward(preprocess, dkdv, dq)


def hopper(
    p: Problem, dout: torch.Tensor, results: Sequence[torch.Tensor], gpu: Gpu
) -> HopperBackward | None:
    """The plan of the Hopper backward kernels, or None where the portable ones have to do it."""
    head_dim, head_dim_v = p.q.shape[-1], p.v.shape[-1]
    simple = not (p.scores.changed or p.options.dropout_p)
    simple &= abs(p.options.softmax_scale) > 1e-20  # the LSE is divided by it
    fits = head_dim % 8 == 0 and head_dim_v % 8 == 0 and dout.numel() < 2**31
    if settings.PORTABLE or gpu.arch != 90 or not (simple and fits):
        return None
    if not all(map(tma, (p.q, p.k, p.v, dout, *results))):
        return None
    columns, columns_v = _columns(head_dim, head_dim_v), _columns(head_dim_v, head_dim)
    preprocess = backward(p, gpu).preprocess
    if max(head_dim, head_dim_v) > 128:
        tiles = Tiles(64, 64, 4, 1)
        work = spread(p, key_work(p, tiles, HOPPER_L2_BYTES), gpu)
        dq = spread(p, query_work(p, tiles._replace(block_m=128), HOPPER_L2_BYTES), gpu)
        return HopperBackward(preprocess, work, dq, columns, columns_v)
    if head_dim != head_dim_v or head_dim <= 32:
        return None
    tiles = Tiles(128 if columns == 64 else 64, 128, 4, 1)
    work = spread(p, key_work(p, tiles, HOPPER_L2_BYTES, accumulates=True), gpu)
    return HopperBackward(preprocess, work, None, columns, columns_v)


def _columns(head_dim: int, other: int) -> int:
    """Columns of a tile: 192 lie in pieces (`kernels/hopper/backward_pieces.py`)."""
    return 192 if 128 < head_dim <= 192 else padded(head_dim, other)


def spread(p: Problem, work: Work, gpu: Gpu) -> Work:
    """The work with heads in groups large enough for the longest programs to fill the GPU, where a
    mask makes some longer than others; otherwise few programs run at the end of the last group.
    """
    if p.options.left is None and p.options.right is None:
        return work
    least = min(work.batch_heads, gpu.multiprocessors // work.num_blocks)
    return work._replace(l2_group=max(work.l2_group, least))


def key_work(p: Problem, tiles: Tiles, l2_bytes: int, accumulates: bool = False) -> Work:
    """Blocks of keys. accumulates: to dQ, in fp32."""
    packed = p.batch if p.lengths.cu_seqlens_k is not None else 0
    row = _row_bytes(p)  # of a query and its dO
    if accumulates:
        row += 4 * p.q.shape[-1]
    group = l2_bytes // max(1, row * _length(p.q, p.seqlen_q, p.batch) * p.group)
    return _work(tiles, tiles.block_n, p.k.shape[-3], packed, p.batch, p.k.shape[-2], group)


def query_work(p: Problem, tiles: Tiles, l2_bytes: int) -> Work:
    """Blocks of queries. All of a head's share its keys and values."""
    packed = p.batch if p.lengths.cu_seqlens_q is not None else 0
    group = l2_bytes // max(1, _row_bytes(p) * _length(p.k, p.seqlen_k, p.batch) // p.group)
    return _work(tiles, tiles.block_m, p.q.shape[-3], packed, p.batch, p.q.shape[-2], group)


def _length(x: torch.Tensor, longest: int, batch: int) -> int:
    """Rows of an average sequence; those of packed ones may differ much."""
    return longest if x.dim() == 4 else -(-x.shape[0] // batch)


def _row_bytes(p: Problem) -> int:
    """Bytes of a query and its dO, of a key and its value."""
    return (p.q.shape[-1] + p.v.shape[-1]) * p.q.element_size()


def _work(
    tiles: Tiles, block: int, tokens: int, packed: int, batch: int, nheads: int, l2_group: int
) -> Work:
    """packed: 0, or how many sequences the tokens are packed from."""
    if packed:  # rules/sequence.py counts blocks through all sequences; each may leave one unused
        num_blocks, batch_heads = tokens // block + packed, nheads
    else:
        num_blocks, batch_heads = -(-tokens // block), batch * nheads
    return Work(tiles, num_blocks, batch_heads, max(1, min(batch_heads, l2_group)))
