"""Which kernel, with which tiles: a pure function of a call's shapes and of the GPU.

Every heuristic of the package stands here, and none looks at a length on the device.
"""

import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from .problem import Problem
from .refusals import MAX_SPLITS
from .rules.window import first_visible
from .tiles import LARGE_DECODE, SHARED_KB, SMALL, SMALL_DECODE, TILES, Tiles


class Gpu(NamedTuple):
    name: str
    arch: int  # compute capability, 90 for 9.0
    multiprocessors: int


class Forward(NamedTuple):
    """A launch of the forward kernel."""

    tiles: Tiles
    rows: int  # query tiles per unit
    units: int  # (batch, head) pairs; heads alone when q is packed
    per_group: int  # units whose keys share the L2 cache


class HopperTiles(NamedTuple):
    """What the Hopper kernel is compiled for."""

    consumers: int  # of 64 query rows each
    block_n: int
    q_tiles: int  # of 64 rows in shared memory; twice as many as consumers, results go through them


class Decode(NamedTuple):
    """A launch of the decode kernel."""

    tiles: Tiles
    shares: bool  # whether `splits` equal shares of the batch's keys, or parts of each sequence
    splits: int
    split_tiles: int  # key tiles of a part; 0 for a sequence's tiles / splits
    programs: int
    rows: int  # of a program's tile that are in use
    overlapped: bool  # the fold's launch begins before this one ends (SM 90)

    @property
    def slots(self) -> int:
        """Places for what is not a whole: two for a share, which may begin and end with such."""
        return 2 * self.programs if self.shares else self.programs if self.splits > 1 else 0


class Hopper(NamedTuple):
    """A launch of the Hopper kernel."""

    tiles: HopperTiles
    rows: int  # query tiles per unit
    units: int  # as in Forward; of `group` heads each
    per_group: int
    programs: int
    group: int  # heads of a KV head packed into the rows of a tile
    parts: Decode | None  # what is to be folded where keys are split


@cache
def gpu(device: torch.device) -> Gpu:
    """What `device` is; a stand-in for the CPU, where the interpreter runs the kernels."""
    if device.type == "cpu":
        return Gpu("Triton interpreter", 80, 2)
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    if arch < 80:
        raise NotImplementedError(
            f"mini_flash_attention: device: expected compute capability 8.0 or newer, "
            f"got {properties.major}.{properties.minor} ({properties.name})"
        )
    return Gpu(properties.name, arch, properties.multi_processor_count)


def size_class(head_dim: int) -> int:
    """Tiles are chosen for these three; head_dim is at most 256."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def forward_tiles(arch: int, head_dim: int, window: bool, page_size: int, packed: bool) -> Tiles:
    """Tiles of the forward kernel; each fits the shared memory, and hardly any spills."""
    size = size_class(head_dim)
    choice = TILES.get(arch, SMALL)[size]
    if window or head_dim & (head_dim - 1) or (packed and size == 64):
        return choice.window
    if not page_size:
        return choice.plain
    return choice.paged if page_size % choice.large_pages.block_n else choice.large_pages


# Keys and values of the heads that run at the same time should fit in the L2 cache: 50 MB on an
# H100 and H200, of which half is left after the two halves of the chip each keep their copy.
L2_BYTES = 32 << 20


def forward(p: Problem, gpu: Gpu) -> Forward:
    """The launch of the forward kernel for a call."""
    head_dim = max(p.q.shape[-1], p.v.shape[-1])
    tight = head_dim <= 64 or gpu.arch in (100, 103)  # for a score_mod's registers
    more = p.windowed or (p.scores.score_mod is not None and tight)
    tiles = forward_tiles(gpu.arch, head_dim, more, p.page_size, p.cu_seqlens_q is not None)
    return Forward(tiles, *_work(p, gpu, tiles.block_m))


def _work(p: Problem, gpu: Gpu, block_m: int, packed: int = 1) -> tuple[int, int, int]:
    """Tiles of query rows of a unit, units, and units per group; `packed` heads in the rows."""
    nheads, head_dim = p.q.shape[-2] // packed, p.q.shape[-1]
    if p.cu_seqlens_q is None:
        rows, units = -(-p.seqlen_q * packed // block_m), p.batch * nheads
    else:
        # rules/sequence.py counts tiles through all sequences; each may leave one unused.
        rows, units = p.q.shape[0] // block_m + p.batch, nheads
    bytes_of_unit = 2 * p.seqlen_k * head_dim * p.k.element_size() * packed // p.group
    per_group = min(units, L2_BYTES // max(1, bytes_of_unit))
    if p.right is None and p.cu_seqlens_q is None:  # no tile is the longest: side by side in time
        per_group = min(per_group, -(-gpu.multiprocessors // max(1, rows)))
    return rows, units, max(1, per_group)


PORTABLE = os.environ.get("MINI_FLASH_ATTENTION_PORTABLE") == "1"  # without the Hopper kernel
# By head_dim, measured (bench/NOTES.md). Three consumers hide one another's waiting best, but have
# registers for head_dim 64 alone; with few keys their larger tiles are a loss, under a mask.
HOPPER_TILES = {64: HopperTiles(2, 128, 4), 128: HopperTiles(2, 128, 4), 256: HopperTiles(2, 64, 3)}
MANY_KEYS = 1024  # of a query in the mean
HOPPER_FLOPS = 4 << 30  # some 10 µs; below, descriptors cost the CPU more than the GPU gains


def hopper(p: Problem, out: torch.Tensor, gpu: Gpu) -> Hopper | None:
    """The launch of the Hopper kernel for a call, or None where the forward kernel has to do it.

    TMA wants strides of whole 16 bytes and 32-bit coordinates.
    """
    nheads, head_dim = p.q.shape[-2:]
    if PORTABLE or gpu.arch != 90 or head_dim % 8 or not 32 < head_dim <= 256:
        return None
    if p.v.shape[-1] != head_dim or p.cache_batch_idx is not None or p.cache_leftpad is not None:
        return None
    tiles = HOPPER_TILES[size_class(head_dim)]
    keys = p.seqlen_k - (min(p.seqlen_q, p.seqlen_k) // 2 if p.right is not None else 0)
    keys = keys if p.left is None else min(keys, p.left + 1)
    group, splits = _packing(p, gpu, tiles.block_n)
    alone = group == splits == 1
    if alone and decodes(p, gpu):
        return None
    large = p.page_size % tiles.block_n == 0  # or no pages
    simple = large and p.scores.score_mod is None  # which does what is unknown, and takes registers
    if alone and simple and head_dim <= 64 and keys >= MANY_KEYS:
        tiles = tiles._replace(consumers=3, q_tiles=6)
    # A tile lies in one page or is made of whole ones, of 16 keys or more; for those the producer
    # needs registers that consumers of rows of 256, or three of them, can't spare.
    small = p.page_size >= 16 and tiles.block_n % p.page_size == 0 and head_dim <= 128
    if not (large or small) or not p.seqlen_k or not all(map(tma, (p.q, p.k, p.v, out))):
        return None
    # With one split the batch decides nothing: a sequence gets the same bits in all of them.
    if p.num_splits != 1 and 4 * p.q.numel() * p.seqlen_k < HOPPER_FLOPS:
        return None
    rows, units, per_group = _work(p, gpu, 64 * tiles.consumers, group)
    lse_in_32_bits = p.cu_seqlens_q is not None or nheads * p.seqlen_q < 2**31
    if rows * units >= 2**31 - gpu.multiprocessors or not lse_in_32_bits:
        return None
    programs, parts = min(gpu.multiprocessors, rows * units * splits), None
    if splits > 1:
        block = Tiles(64 * tiles.consumers, tiles.block_n, 0, 0)
        parts = _parts(block, p.seqlen_q * group, rows * units, splits, gpu)
    return Hopper(tiles, rows, units, per_group, programs, group, parts)


def _packing(p: Problem, gpu: Gpu, block_n: int) -> tuple[int, int]:
    """Heads to pack into the Hopper kernel's tiles, where that leaves a quarter of them out, and
    parts to split keys into, where tiles are few and keys many.
    """
    group, free = p.group, p.cu_seqlens_q is None and not p.num_splits and not p.split_size
    tight = p.windowed and p.q.shape[-1] > 128  # packed rows have no registers for its mask
    simple = not (p.scores.changed or p.scores.s_aux is not None or tight)
    if not (simple and free) or p.seqlen_q <= (64 if 64 % group else 16 // group):
        return 1, 1  # by the last, a tile of the decode kernel's serves a whole group better
    packed, alone = (-(-p.seqlen_q * n // 128) * (p.q.shape[-2] // n) for n in (group, 1))
    if 64 % group or 4 * packed > 3 * alone:
        group, packed = 1, alone
    seen = _visible(p)
    most = min(MAX_SPLITS, seen // (4 * block_n))
    splits = max(1, min(most, gpu.multiprocessors // max(1, p.batch * packed)))
    return group, splits if seen - seen // splits > SPLIT_KEYS else 1


def tma(x: torch.Tensor) -> bool:
    """Whether a TMA descriptor can stand for x, as far as shape and strides say."""
    steps = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return x.numel() > 0 and all(s % 8 == 0 and 0 < s < 2**31 for s in steps)


# Up to here all query tokens of a KV head fit in a tile or two, and reading keys is the cost.
DECODE_SEQLEN_Q = 16
# What splitting keys costs once, in keys that a tile of the forward kernel sees meanwhile.
SPLIT_KEYS = 1500


def decodes(p: Problem, gpu: Gpu) -> bool:
    """Whether a call is the decode kernel's: few queries or parts asked for.

    Packed queries can be few by chance: with num_splits=1, which promises the same bits in any
    batch, they stay with the forward kernel, and so do packed keys, which are of a prefill.
    """
    few = p.seqlen_q <= DECODE_SEQLEN_Q
    if p.cu_seqlens_q is not None:
        few = few and p.num_splits == 0 and (p.cu_seqlens_k is None or p.page_size > 0)
    elif not few and p.num_splits == 0:
        few = _splits_pay(p, gpu)
    return p.seqlen_q > 0 and (few or p.num_splits > 1 or p.split_size > 0)


def _visible(p: Problem) -> int:
    """Keys of a sequence that any query sees; to the right of the last query there is none."""
    return p.seqlen_k - (0 if p.left is None else max(0, first_visible(0, p.window)))


def _splits_pay(p: Problem, gpu: Gpu) -> bool:
    """Whether the forward kernel's tiles would leave so much of the GPU idle, or be so empty, that
    packing the heads of a group and splitting keys is faster, although a tile takes longer.
    """
    nheads, nheads_k, most = p.q.shape[-2], p.k.shape[-2], gpu.multiprocessors
    slower = 2.5 if p.q.shape[-1] > 64 else 1.5  # than the Hopper kernel's tiles, measured
    waves = -(-p.batch * nheads * -(-p.seqlen_q // 128) // most)
    units = p.batch * nheads_k * -(-p.seqlen_q * p.group // 128)
    packed = units / most if units <= most else -(-units // most)  # more are not split
    seen = p.seqlen_k if p.left is None else min(p.seqlen_k, p.left + 128)  # by a tile
    return not p.scores.changed and waves * seen - packed * slower * _visible(p) > SPLIT_KEYS


def decode_tiles(arch: int, head_dim: int, rows: int, changed: bool = False) -> tuple[Tiles, Tiles]:
    """Wide and narrow tiles for `rows` query rows of a KV head.

    changed: whether scores are more than scaled, which takes registers.
    """
    size = size_class(head_dim)
    choice = (LARGE_DECODE if arch in SHARED_KB else SMALL_DECODE)[size]
    most = 32 if size == 256 or arch not in SHARED_KB else 64
    many = choice.many
    if many and rows > (32 if arch == 90 else 64) and not changed:  # 64 x 64 fits on Hopper alone
        if rows <= 64 < many.block_m:
            many = many._replace(block_m=64, num_warps=many.num_warps // 2)
        return many, many
    block_m = min(most, 16 if rows <= 16 else 32 if rows <= 32 else 64)
    narrow = choice.narrow if block_m == 16 else choice.rows
    # Registers end: wide tiles of 32 rows fit at head_dim 128 alone, of 64 rows nowhere.
    fits = block_m == 16 or (block_m == 32 and size == 128)
    wide = choice.wide if fits else narrow
    return wide._replace(block_m=block_m), narrow._replace(block_m=block_m)


def programs_at_a_time(arch: int, tiles: Tiles, head_dim: int) -> int:
    """Decode programs on a multiprocessor: registers allow two, if shared memory does."""
    columns = max(16, 1 << (head_dim - 1).bit_length())
    needed = (tiles.num_stages - 1) * 2 * tiles.block_n * columns * 2 + (12 << 10)
    fits = 2 * needed <= SHARED_KB.get(arch, 100) << 10
    return 2 if fits and tiles.block_m * columns < 128 * 128 else 1  # whose sums take half of them


@lru_cache(maxsize=4096)
def shares(units: int, resident: int) -> int:
    """Into how many shares to cut a batch's keys if `units` programs work on each.

    Programs run in waves of `resident`: the number that fills its waves best, the smallest of
    those within 3 %.
    """
    if units <= resident // 8:
        return resident // units

    def filled(n: int) -> float:
        return n * units / (-(-n * units // resident) * resident)

    best = max(filled(n) for n in range(1, 17))
    return next(n for n in range(1, 17) if filled(n) >= best - 0.03)


MAX_SHARED_BATCH = 4096  # in shares every program counts the key tiles of all sequences
# Bytes of keys and values for each multiprocessor to read. From the first on equal shares pay for
# the counting, and from the second where whole sequences would fill a last wave in part. Below the
# third folding more parts costs more than more programs gain.
SHARED_WORK = 8 << 20
WAVES_WORK = 2 << 20
SMALL_WORK = 512 << 10


def decode(p: Problem, gpu: Gpu) -> Decode:
    """The launch of the decode kernel for a call."""
    nheads_k, head_dim = p.k.shape[-2], max(p.q.shape[-1], p.v.shape[-1])
    rows = p.seqlen_q * p.group
    wide, narrow = decode_tiles(gpu.arch, head_dim, rows, p.scores.changed)
    blocks = nheads_k * -(-rows // narrow.block_m)  # row blocks of a sequence
    units = p.batch * blocks
    visible = _visible(p)
    key_tiles = -(-visible // narrow.block_n)
    # Asked for: the same tiles in every batch, and so the same bits.
    if p.split_size:
        size = -(-p.split_size // narrow.block_n)
        # A window's first key may lie inside a tile: that makes one more. At least two parts, so
        # that a result always takes the same way, whatever the cache's capacity.
        n = max(2, -(-(key_tiles + (p.left is not None)) // size))
        return _parts(narrow, rows, units, n, gpu)._replace(split_tiles=size)
    if p.num_splits:  # parts beyond a tile each would take memory for nothing
        most = max(2, key_tiles + (p.left is not None))
        return _parts(narrow, rows, units, min(p.num_splits, most), gpu)
    work = units * visible * 2 * head_dim * p.k.element_size() // gpu.multiprocessors
    small_pages = p.page_size > 0 and p.page_size % narrow.block_n > 0
    enough = WAVES_WORK if units > gpu.multiprocessors else SHARED_WORK
    if 1 < p.batch <= MAX_SHARED_BATCH and work >= enough:
        # Counting takes registers.
        tiles = decode_tiles(gpu.arch, head_dim, rows, True)[p.page_size > 0 or rows > 16]
        blocks = nheads_k * -(-rows // tiles.block_m)
        resident = gpu.multiprocessors * programs_at_a_time(gpu.arch, tiles, head_dim)
        most = p.batch * max(1, -(-visible // tiles.block_n) + (p.left is not None))
        n = min(shares(blocks, resident), most)
        if most * n < 2**31:  # which is how far the kernel counts
            return Decode(tiles, True, n, 0, n * blocks, min(rows, tiles.block_m), gpu.arch >= 90)
    if units > gpu.multiprocessors:
        return _parts(narrow, rows, units, 1, gpu)
    if 2 * units > gpu.multiprocessors:
        return _parts(wide, rows, units, 1, gpu)
    tiles = narrow if small_pages or work < SMALL_WORK else wide
    resident = gpu.multiprocessors
    if work >= SMALL_WORK:
        resident *= programs_at_a_time(gpu.arch, tiles, head_dim)
    elif small_pages and rows <= 16 and visible > tiles.block_n:  # less to look up first
        tiles = tiles._replace(block_n=max(16, tiles.block_n // 2))
    most = min(MAX_SPLITS, -(-visible // tiles.block_n))
    if not 0 < p.page_size <= tiles.block_n and most * units <= resident:  # none to load ahead
        tiles = tiles._replace(num_stages=2)
    return _parts(tiles, rows, units, max(1, min(most, resident // max(1, units))), gpu)


def _parts(tiles: Tiles, rows: int, units: int, splits: int, gpu: Gpu) -> Decode:
    in_use, overlapped = min(rows, tiles.block_m), gpu.arch >= 90 and splits > 1
    return Decode(tiles, False, splits, 0, units * splits, in_use, overlapped)
