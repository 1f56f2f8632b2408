"""The backward kernels: their tiles, and the order in which they run."""

from typing import NamedTuple

from ..problem import Problem
from .configs import Tiles
from .forward import L2_BYTES
from .gpu import Gpu
from .layout import size_class


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


class Choice(NamedTuple):
    """Tiles for a head_dim. Both kernels have block_m queries and block_n keys in a tile."""

    dkdv: Tiles
    dq: Tiles


# HOPPER is measured on an H200 (bench/NOTES.md). SMALL fits the 99 KB of shared memory of SM 86, 89
# and 120.
HOPPER = {
    64: Choice(Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 3)),
    128: Choice(Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
    256: Choice(Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2)),
}
SMALL = {
    64: Choice(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: Choice(Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 2)),
    256: Choice(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2)),
}
TILES = {90: HOPPER}
PREPROCESS_ROWS = {64: 128, 128: 64, 256: 32}


def backward(p: Problem, gpu: Gpu) -> Backward:
    """The plan of the portable backward kernels for a call."""
    head_dims = p.q.shape[-1] + p.v.shape[-1]
    size = size_class(max(p.q.shape[-1], p.v.shape[-1]))
    choice = TILES.get(gpu.arch, SMALL)[size]
    nheads, nheads_k = p.q.shape[-2], p.k.shape[-2]
    row = head_dims * p.q.element_size()  # bytes of a query and its dO, of a key and its value
    packed_q, packed_k = p.lengths.cu_seqlens_q is not None, p.lengths.cu_seqlens_k is not None
    queries = (p.q.shape[-3], p.batch if packed_q else 0)
    keys = (p.k.shape[-3], p.batch if packed_k else 0)
    rows = Tiles(PREPROCESS_ROWS[size_class(p.v.shape[-1])], 0, 4, 1)
    dkdv = _work(
        choice.dkdv, choice.dkdv.block_n, *keys, p.batch, nheads_k, row * p.seqlen_q * p.group
    )
    dq = _work(choice.dq, choice.dq.block_m, *queries, p.batch, nheads, row * p.seqlen_k // p.group)
    batch_heads = nheads * (1 if packed_q else p.batch)
    preprocess = Work(rows, -(-queries[0] // rows.block_m), batch_heads, 1)
    return Backward(preprocess, dkdv, dq)


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
