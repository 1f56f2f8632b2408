"""Decoding: whether a call is decoded, with which tiles, and how keys are split and combined."""

from functools import lru_cache
from typing import NamedTuple

from ..problem import MAX_SPLITS, Problem
from ..rules.window import first_visible
from .configs import LARGE_DECODE, SHARED_KB, SMALL_DECODE, Tiles
from .gpu import Gpu
from .layout import size_class

# Up to here all query tokens of a KV head fit in a tile or two, and reading keys is the cost.
DECODE_SEQLEN_Q = 16
# What splitting keys costs once, in keys that a tile of the forward kernel sees meanwhile.
SPLIT_KEYS = 1500


class Decode(NamedTuple):
    """The plan of a launch of the decode kernel."""

    tiles: Tiles
    stream_k: bool  # `splits` equal shares of the batch's keys; else splits of each sequence
    splits: int
    split_tiles: int  # key blocks of a split; 0 for a sequence's blocks / splits
    programs: int
    rows: int  # of a program's tile that are in use
    overlapped: bool  # the combine begins before this launch ends (SM 90)

    @property
    def num_partials(self) -> int:
        """Partial results: two for a share, which may begin and end inside a sequence."""
        return 2 * self.programs if self.stream_k else self.programs if self.splits > 1 else 0


def decodes(p: Problem, gpu: Gpu) -> bool:
    """Whether a call goes to the decode kernel: it has few queries, or asks for splits.

    Packed queries can be few by chance: with num_splits=1, which promises the same bits in any
    batch, they stay with the forward kernel, and so do packed keys, which are of a prefill.
    """
    few, options, lengths = p.seqlen_q <= DECODE_SEQLEN_Q, p.options, p.lengths
    if lengths.cu_seqlens_q is not None:
        in_cache = lengths.cu_seqlens_k is None or p.cache.page_size > 0
        few = few and options.num_splits == 0 and in_cache
    elif not few and options.num_splits == 0:
        few = _splits_pay(p, gpu)
    return p.seqlen_q > 0 and (few or options.num_splits > 1 or options.split_size > 0)


def visible_keys(p: Problem) -> int:
    """Keys of a sequence that any query sees; to the right of the last query there is none."""
    return p.seqlen_k - (0 if p.options.left is None else max(0, first_visible(0, p.window)))


def _splits_pay(p: Problem, gpu: Gpu) -> bool:
    """Whether the forward kernel's tiles would leave so much of the GPU idle, or be so empty, that
    packing the heads of a group and splitting keys is faster, although a tile takes longer.
    """
    nheads, nheads_k, most = p.q.shape[-2], p.k.shape[-2], gpu.multiprocessors
    slower = 2.5 if p.q.shape[-1] > 64 else 1.5  # than the Hopper kernel's tiles, measured
    waves = -(-p.batch * nheads * -(-p.seqlen_q // 128) // most)
    batch_heads = p.batch * nheads_k * -(-p.seqlen_q * p.group // 128)
    # More than a wave are not split.
    packed = batch_heads / most if batch_heads <= most else -(-batch_heads // most)
    seen, left = p.seqlen_k, p.options.left  # by a tile
    seen = seen if left is None else min(seen, left + 128)
    return not p.scores.changed and waves * seen - packed * slower * visible_keys(p) > SPLIT_KEYS


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
def stream_k(batch_heads: int, resident: int) -> int:
    """Into how many shares to cut a batch's keys if `batch_heads` programs work on each.

    Programs run in waves of `resident`: the number that fills its waves best, the smallest of
    those within 3 %.
    """
    if batch_heads <= resident // 8:
        return resident // batch_heads

    def filled(n: int) -> float:
        return n * batch_heads / (-(-n * batch_heads // resident) * resident)

    best = max(filled(n) for n in range(1, 17))
    return next(n for n in range(1, 17) if filled(n) >= best - 0.03)


MAX_STREAM_K_BATCH = 4096  # in shares every program counts the key tiles of all sequences
# Bytes of keys and values for each multiprocessor to read. From the first on equal shares pay for
# the counting, and from the second where whole sequences would fill a last wave in part. Below the
# third combining more splits costs more than more programs gain.
STREAM_K_WORK = 8 << 20
WAVES_WORK = 2 << 20
SMALL_WORK = 512 << 10


def decode(p: Problem, gpu: Gpu) -> Decode:
    """The plan of the decode kernel for a call."""
    nheads_k, head_dim = p.k.shape[-2], max(p.q.shape[-1], p.v.shape[-1])
    rows = p.seqlen_q * p.group
    wide, narrow = decode_tiles(gpu.arch, head_dim, rows, p.scores.changed)
    blocks = nheads_k * -(-rows // narrow.block_m)  # row blocks of a sequence
    batch_heads = p.batch * blocks
    visible, one_more = visible_keys(p), p.options.left is not None
    n_block_range = -(-visible // narrow.block_n)
    options, page_size = p.options, p.cache.page_size
    # Asked for: the same tiles in every batch, and so the same bits.
    if options.split_size:
        size = -(-options.split_size // narrow.block_n)
        # A window's first key may lie inside a block: that makes one more. At least two splits, so
        # that a result is always combined, whatever the cache's capacity.
        n = max(2, -(-(n_block_range + one_more) // size))
        return split_sequences(narrow, rows, batch_heads, n, gpu)._replace(split_tiles=size)
    if options.num_splits:  # more splits than blocks would take memory for nothing
        most = max(2, n_block_range + one_more)
        return split_sequences(narrow, rows, batch_heads, min(options.num_splits, most), gpu)
    work = batch_heads * visible * 2 * head_dim * p.k.element_size() // gpu.multiprocessors
    small_pages = page_size > 0 and page_size % narrow.block_n > 0
    enough = WAVES_WORK if batch_heads > gpu.multiprocessors else STREAM_K_WORK
    if 1 < p.batch <= MAX_STREAM_K_BATCH and work >= enough:
        # Counting takes registers.
        tiles = decode_tiles(gpu.arch, head_dim, rows, True)[page_size > 0 or rows > 16]
        blocks = nheads_k * -(-rows // tiles.block_m)
        resident = gpu.multiprocessors * programs_at_a_time(gpu.arch, tiles, head_dim)
        most = p.batch * max(1, -(-visible // tiles.block_n) + one_more)
        n = min(stream_k(blocks, resident), most)
        if most * n < 2**31:  # which is how far the kernel counts
            return Decode(tiles, True, n, 0, n * blocks, min(rows, tiles.block_m), gpu.arch >= 90)
    if batch_heads > gpu.multiprocessors:
        return split_sequences(narrow, rows, batch_heads, 1, gpu)
    if 2 * batch_heads > gpu.multiprocessors:
        return split_sequences(wide, rows, batch_heads, 1, gpu)
    tiles = narrow if small_pages or work < SMALL_WORK else wide
    resident = gpu.multiprocessors
    if work >= SMALL_WORK:
        resident *= programs_at_a_time(gpu.arch, tiles, head_dim)
    elif small_pages and rows <= 16 and visible > tiles.block_n:  # less to look up first
        tiles = tiles._replace(block_n=max(16, tiles.block_n // 2))
    most = min(MAX_SPLITS, -(-visible // tiles.block_n))
    one_each = most * batch_heads <= resident  # then there is none to load ahead
    if one_each and not 0 < page_size <= tiles.block_n:
        tiles = tiles._replace(num_stages=2)
    n = max(1, min(most, resident // max(1, batch_heads)))
    return split_sequences(tiles, rows, batch_heads, n, gpu)


def split_sequences(tiles: Tiles, rows: int, batch_heads: int, splits: int, gpu: Gpu) -> Decode:
    in_use, overlapped = min(rows, tiles.block_m), gpu.arch >= 90 and splits > 1
    return Decode(tiles, False, splits, 0, batch_heads * splits, in_use, overlapped)


def maxnreg(p: Problem, tiles: Tiles) -> int | None:
    """A limit on the registers of a thread, where ptxas would rather spill than lose occupancy."""
    # Tuned without a limit at head_dim 128, where ptxas spills for the sake of a second program.
    crowded = p.cache.page_size > 0 and tiles.num_warps == 8
    return 255 if p.q.shape[-1] <= 64 or p.q.shape[-1] > 128 or crowded else None


MANY_ROWS = 1024  # as many fill the GPU with a warp each, and fewer with more of them


class Combine(NamedTuple):
    """The plan of a launch of the combine kernel: a program for each row."""

    programs: int
    num_warps: int
    at_once: int  # splits that a step of its loop merges


def combine(p: Problem, plan: Decode) -> Combine:
    """How the splits of `plan` are combined."""
    head_dim = p.v.shape[-1]
    programs = plan.rows * (plan.programs if plan.stream_k else plan.programs // plan.splits)
    warps, at_once = 8 if head_dim > 64 else 4 if head_dim > 32 else 1, 32
    if programs >= MANY_ROWS and not (p.options.num_splits or p.options.split_size):
        warps, at_once = 1, 8  # else the same order in any batch
    return Combine(programs, warps, at_once if head_dim <= 128 else at_once // 2)
