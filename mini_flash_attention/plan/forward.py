"""The forward kernel: its tiles, and the order in which they run."""

from typing import NamedTuple

from ..problem import Problem
from .configs import SMALL, TILES, Tiles
from .gpu import Gpu
from .layout import size_class


class Forward(NamedTuple):
    """The plan of a launch of the portable forward kernel."""

    tiles: Tiles
    num_m_blocks: int  # blocks of query rows, for each head
    batch_heads: int  # (batch, head) pairs; heads alone when q is packed
    l2_group: int  # heads whose keys share the L2 cache


def forward_tiles(arch: int, head_dim: int, window: bool, page_size: int, packed: bool) -> Tiles:
    """Tiles of the forward kernel; each fits the shared memory, and hardly any spills."""
    size = size_class(head_dim)
    choice = TILES.get(arch, SMALL)[size]
    if window or head_dim & (head_dim - 1) or (packed and size == 64):
        return choice.window
    if not page_size:
        return choice.dense
    return choice.paged if page_size % choice.large_pages.block_n else choice.large_pages


# Keys and values of the heads that run at the same time should fit in the L2 cache: 50 MB on an
# H100 and H200, of which half is left after the two halves of the chip each keep their copy.
L2_BYTES = 32 << 20


def forward(p: Problem, gpu: Gpu) -> Forward:
    """The plan of the portable forward kernel for a call."""
    head_dim = max(p.q.shape[-1], p.v.shape[-1])
    tight = head_dim <= 64 or gpu.arch in (100, 103)  # for a score_mod's registers
    more = p.options.windowed or (p.scores.score_mod is not None and tight)
    packed = p.lengths.cu_seqlens_q is not None
    tiles = forward_tiles(gpu.arch, head_dim, more, p.cache.page_size, packed)
    return Forward(tiles, *work(p, gpu, tiles.block_m))


def work(p: Problem, gpu: Gpu, block_m: int, packed: int = 1) -> tuple[int, int, int]:
    """(num_m_blocks, batch_heads, l2_group), with `packed` heads in the rows."""
    nheads, head_dim = p.q.shape[-2] // packed, p.q.shape[-1]
    batched = p.lengths.cu_seqlens_q is None
    if batched:
        num_m_blocks, batch_heads = -(-p.seqlen_q * packed // block_m), p.batch * nheads
    else:
        # rules/sequence.py counts tiles through all sequences; each may leave one unused.
        num_m_blocks, batch_heads = p.q.shape[0] // block_m + p.batch, nheads
    bytes_of_head = 2 * p.seqlen_k * head_dim * p.k.element_size() * packed // p.group
    l2_group = min(batch_heads, L2_BYTES // max(1, bytes_of_head))
    if p.options.right is None and batched:  # no tile is the longest: side by side in time
        l2_group = min(l2_group, -(-gpu.multiprocessors // max(1, num_m_blocks)))
    return num_m_blocks, batch_heads, max(1, l2_group)
