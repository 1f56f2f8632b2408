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
from .layout import size_class


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
    """The plan of the Hopper backward kernel."""

    preprocess: Work  # and what narrows dQ afterwards
    work: Work  # blocks of 128 keys
    block_m: int  # queries of a block
    columns: int  # of a tile of Q and K


class Choice(NamedTuple):
    """Tiles for a head_dim. Both kernels have block_m queries and block_n keys in a tile."""

    dkdv: Tiles
    dq: Tiles


# HOPPER is measured on an H200 (bench/NOTES.md). SMALL fits the 99 KB of shared memory of SM 86, 89
# and 120, of which none has run it; with four warps dq spills up to 128 bytes a thread there.
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
PREPROCESS_ROWS = {64: 128, 128: 64, 256: 32}


def backward(p: Problem, gpu: Gpu) -> Backward:
    """The plan of the portable backward kernels for a call."""
    head_dims = p.q.shape[-1] + p.v.shape[-1]
    size = size_class(max(p.q.shape[-1], p.v.shape[-1]))
    choice = TILES.get(gpu.arch, SMALL)[size]
    nheads = p.q.shape[-2]
    row = head_dims * p.q.element_size()  # bytes of a query and its dO, of a key and its value
    packed_q = p.lengths.cu_seqlens_q is not None
    queries = (p.q.shape[-3], p.batch if packed_q else 0)
    rows = Tiles(PREPROCESS_ROWS[size_class(p.v.shape[-1])], 0, 4, 1)
    dkdv = key_work(p, choice.dkdv)
    dq = _work(choice.dq, choice.dq.block_m, *queries, p.batch, nheads, row * p.seqlen_k // p.group)
    batch_heads = nheads * (1 if packed_q else p.batch)
    preprocess = Work(rows, -(-queries[0] // rows.block_m), batch_heads, 1)
    return Backward(preprocess, dkdv, dq)


def hopper(
    p: Problem, dout: torch.Tensor, results: Sequence[torch.Tensor], gpu: Gpu
) -> HopperBackward | None:
    """The plan of the Hopper backward kernel, or None where the portable kernels have to do it."""
    head_dim = p.q.shape[-1]
    simple = not (p.scores.changed or p.options.dropout_p) and p.v.shape[-1] == head_dim
    if p.options.deterministic:  # the order in which programs add to dQ is no one's
        return None
    simple &= abs(p.options.softmax_scale) > 1e-20  # the LSE is divided by it
    fits = head_dim % 8 == 0 and 32 < head_dim <= 128 and dout.numel() < 2**31
    if settings.PORTABLE or gpu.arch != 90 or not (simple and fits):
        return None
    if not all(map(tma, (p.q, p.k, p.v, dout, *results))):
        return None
    portable = backward(p, gpu)
    columns = size_class(head_dim)
    tiles = Tiles(128 if columns == 64 else 64, 128, 4, 1)
    work = key_work(p, tiles)
    return HopperBackward(portable.preprocess, work, tiles.block_m, columns)


def key_work(p: Problem, tiles: Tiles) -> Work:
    """Blocks of keys."""
    packed = p.batch if p.lengths.cu_seqlens_k is not None else 0
    row = (p.q.shape[-1] + p.v.shape[-1]) * p.q.element_size()  # bytes of a query and its dO
    head_bytes = row * p.seqlen_q * p.group
    return _work(tiles, tiles.block_n, p.k.shape[-3], packed, p.batch, p.k.shape[-2], head_bytes)


def _work(
    tiles: Tiles, block: int, tokens: int, packed: int, batch: int, nheads: int, head_bytes: int
) -> Work:
    """packed: 0, or how many sequences the tokens are packed from."""
    if packed:  # rules/sequence.py counts blocks through all sequences; each may leave one unused
        num_blocks, batch_heads = tokens // block + packed, nheads
    else:
        num_blocks, batch_heads = -(-tokens // block), batch * nheads
    l2_group = min(batch_heads, L2_BYTES // max(1, head_bytes))
    return Work(tiles, num_blocks, batch_heads, max(1, l2_group))
