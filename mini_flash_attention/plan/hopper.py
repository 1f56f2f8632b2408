"""The Hopper kernel: whether it takes a call, its tiles, and what is packed into them."""

from typing import NamedTuple

import torch

from .. import settings
from ..problem import MAX_SPLITS, Problem
from . import decode
from .configs import HOPPER_TILES, HopperTiles, Tiles
from .decode import Decode
from .forward import work
from .gpu import Gpu
from .layout import size_class
from .scores import ScoreMode, choose_score_mode

# With fewer keys the larger tiles of three consumers are a loss, under a mask.
MANY_KEYS = 1024  # of a query in the mean
HOPPER_FLOPS = 4 << 30  # some 10 µs; below, descriptors cost the CPU more than the GPU gains


class Hopper(NamedTuple):
    """The plan of a launch of the Hopper kernel."""

    tiles: HopperTiles
    num_m_blocks: int  # blocks of query rows, for each head
    batch_heads: int  # as in Forward; each stands for `group` heads
    l2_group: int
    programs: int
    group: int  # heads of a KV head packed into the rows of a tile
    partials: Decode | None  # what is to be combined where keys are split
    score_mode: ScoreMode
    skip_max: bool  # most full blocks go without maxima (`kernels/hopper/mma.py`)
    lazy_rescale: bool  # o and l are rescaled only where the maximum has grown by much
    tma_epilogue: bool  # TMA writes the rows, from their queries' shared memory
    zero_v_tail: bool  # values outside of a sequence are replaced by zeros


def hopper(p: Problem, out: torch.Tensor, gpu: Gpu) -> Hopper | None:
    """The plan of the Hopper kernel for a call, or None where the portable kernel has to do it.

    out: its strides are looked at, its memory is not.
    """
    if settings.PORTABLE or gpu.arch != 90 or not _takes(p, out, gpu):
        return None
    head_dim, options = p.q.shape[-1], p.options
    tiles = HOPPER_TILES[size_class(head_dim)]
    group, splits = _packing(p, gpu, tiles.block_n)
    alone = group == splits == 1
    if alone and decode.decodes(p, gpu):
        return None
    keys = p.seqlen_k - (min(p.seqlen_q, p.seqlen_k) // 2 if options.right is not None else 0)
    keys = keys if options.left is None else min(keys, options.left + 1)
    large = p.cache.page_size % tiles.block_n == 0  # or no pages
    simple = large and p.scores.score_mod is None  # which does what is unknown, and takes registers
    if alone and simple and head_dim <= 64 and keys >= MANY_KEYS:
        tiles = tiles._replace(consumers=3, q_buffers=6)
    # With one split the batch decides nothing: a sequence gets the same bits in all of them.
    if options.num_splits != 1 and 4 * p.q.numel() * p.seqlen_k < HOPPER_FLOPS:
        return None
    num_m_blocks, batch_heads, l2_group = work(p, gpu, 64 * tiles.consumers, group)
    work_tiles = num_m_blocks * batch_heads
    if work_tiles >= 2**31 - gpu.multiprocessors:
        return None
    programs, partials = min(gpu.multiprocessors, work_tiles * splits), None
    if splits > 1:
        block = Tiles(64 * tiles.consumers, tiles.block_n, 0, 0)
        partials = decode.split_sequences(block, p.seqlen_q * group, work_tiles, splits, gpu)
    own = ["linear"] * (head_dim <= 128 and not _no_registers(p, gpu))
    score_mode = choose_score_mode(p, "bounded", "folded", *own)
    unmodified = score_mode.mode == "" and not p.scores.changed
    # Past a dense tensor's end TMA finds zeros. Elsewhere there are others' keys, or what was never
    # written; and the page of a key before every window may belong to another sequence by now.
    others = (p.lengths.cu_seqlens_k, p.lengths.seqused_k, p.cache.block_table)
    # TMA stores O from the buffer of its queries, which is released only after the next work tile's
    # first product. So the buffers of two have to fit, or the producer would wait for ever.
    return Hopper(
        tiles, num_m_blocks, batch_heads, l2_group, programs, group, partials, score_mode,
        skip_max=unmodified and head_dim <= 128 and p.q.dtype is torch.bfloat16,  # for its range
        lazy_rescale=head_dim > 64,  # fewer columns are as soon moved as asked for
        tma_epilogue=tiles.q_buffers >= 2 * tiles.consumers,
        zero_v_tail=options.left is not None or any(x is not None for x in others),
    )  # fmt: skip


def _takes(p: Problem, out: torch.Tensor, gpu: Gpu) -> bool:
    """Whether the kernel can do the call at all."""
    nheads, head_dim = p.q.shape[-2:]
    if head_dim % 8 or not 32 < head_dim <= 256 or p.v.shape[-1] != head_dim or not p.seqlen_k:
        return False
    if p.cache.cache_batch_idx is not None or p.cache.cache_leftpad is not None:
        return False
    # A tile lies in one page or is made of whole ones, of 16 keys or more; for those the producer
    # needs registers that consumers of rows of 256, or three of them, can't spare.
    block_n, page_size = HOPPER_TILES[size_class(head_dim)].block_n, p.cache.page_size
    small = page_size >= 16 and block_n % page_size == 0 and head_dim <= 128
    if page_size % block_n and not small:
        return False
    if gpu.triton >= (3, 8) and head_dim > 128 and p.scores.score_mod is not None:
        return False  # there are no registers for it beside rows of 256
    if p.options.windowed and _no_registers(p, gpu):
        return False
    lse_in_32_bits = p.lengths.cu_seqlens_q is not None or nheads * p.seqlen_q < 2**31
    return lse_in_32_bits and all(map(tma, (p.q, p.k, p.v, out)))


def _no_registers(p: Problem, gpu: Gpu) -> bool:
    """Whether Triton, from 3.8 on, has none left for ALiBi beside three consumers. How many there
    are must change no bits, so two don't get any either.
    """
    return gpu.triton >= (3, 8) and p.q.shape[-1] <= 64 and p.scores.alibi_slopes is not None


def _packing(p: Problem, gpu: Gpu, block_n: int) -> tuple[int, int]:
    """(heads packed into a work tile, where that saves a quarter of the tiles; splits of the keys,
    where tiles are few and keys many).
    """
    group, options = p.group, p.options
    free = p.lengths.cu_seqlens_q is None and not options.num_splits and not options.split_size
    tight = options.windowed and p.q.shape[-1] > 128  # packed rows have no registers for its mask
    simple = not (p.scores.changed or p.scores.s_aux is not None or tight)
    if not (simple and free) or p.seqlen_q <= (64 if 64 % group else 16 // group):
        return 1, 1  # by the last, a tile of the decode kernel's serves a whole group better
    packed, alone = (-(-p.seqlen_q * n // 128) * (p.q.shape[-2] // n) for n in (group, 1))
    if 64 % group or 4 * packed > 3 * alone:
        group, packed = 1, alone
    seen = decode.visible_keys(p)
    most = min(MAX_SPLITS, seen // (4 * block_n))
    splits = max(1, min(most, gpu.multiprocessors // max(1, p.batch * packed)))
    return group, splits if seen - seen // splits > decode.SPLIT_KEYS else 1


def tma(x: torch.Tensor) -> bool:
    """Whether a TMA descriptor can stand for x, as far as shape and strides say: TMA wants strides
    of whole 16 bytes and 32-bit coordinates.
    """
    steps = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return x.numel() > 0 and all(s % 8 == 0 and 0 < s < 2**31 for s in steps)
