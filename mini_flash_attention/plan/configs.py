"""Tables of tiles, by head_dim and architecture: what the plan chooses from."""

from typing import NamedTuple


class Tiles(NamedTuple):
    """What a kernel is compiled for."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """Tiles for a head_dim: plain, and where windows or pages take registers."""

    dense: Tiles
    window: Tiles  # also for a head_dim that is no power of two, and packed queries up to 64
    paged: Tiles
    large_pages: Tiles  # pages of whole tiles


def _choice(*tiles: tuple[int, int, int, int]) -> Choice:
    return Choice(*map(Tiles._make, tiles))


# Tiles of the forward kernel by head_dim. HOPPER is measured on an H200 (bench/NOTES.md); SMALL
# fits the 99 KB of shared memory of SM 86, 89 and 120. tests/test_compile.py looks for spills on
# every architecture.
HOPPER = {
    64: _choice((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    128: _choice((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3)),
    256: _choice((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)),
}
BLACKWELL = {
    64: _choice((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    128: _choice((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    256: _choice((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
}
SMALL = {
    64: _choice((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    128: _choice((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    256: _choice((64, 32, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2)),
}
TILES = {90: HOPPER, 100: BLACKWELL, 103: BLACKWELL}


class DecodeChoice(NamedTuple):
    """Tiles of the decode kernel for a head_dim, block_m left open.

    Both keep about as many keys on their way as shared memory holds: wide ones with one program on
    a multiprocessor, narrow ones with two, which hide one another's waiting.
    """

    wide: Tiles
    narrow: Tiles
    rows: Tiles  # narrow, for more than 16 rows
    many: Tiles | None = None  # for more than 32, which wait for products; block_m is the largest


def _decode(*tiles: tuple[int, int, int, int]) -> DecodeChoice:
    return DecodeChoice(*map(Tiles._make, tiles))


# Shared memory of 160 KB and more, and the 99 KB of SM 86, 89 and 120. Measured at head_dim 128.
LARGE_DECODE = {
    64: _decode((0, 128, 8, 4), (0, 64, 4, 4), (0, 32, 4, 4), (64, 64, 4, 3)),
    128: _decode((0, 128, 8, 3), (0, 64, 4, 3), (0, 32, 8, 4), (128, 64, 8, 3)),
    256: _decode((0, 64, 8, 3), (0, 32, 4, 3), (0, 32, 8, 3), (64, 32, 8, 3)),
}
SMALL_DECODE = {
    64: _decode((0, 128, 8, 3), (0, 64, 4, 3), (0, 32, 4, 4)),
    128: _decode((0, 64, 8, 3), (0, 32, 4, 3), (0, 32, 8, 3)),
    256: _decode((0, 32, 8, 3), (0, 16, 4, 3), (0, 16, 4, 3)),
}
SHARED_KB = {80: 164, 90: 228, 100: 228, 103: 228}  # of a multiprocessor; 100 where not listed


class HopperTiles(NamedTuple):
    """What the Hopper kernel is compiled for."""

    consumers: int  # of 64 query rows each
    block_n: int
    q_buffers: (
        int  # of 64 rows in shared memory; with twice as many as consumers, TMA stores O from them
    )


# By head_dim, measured (bench/NOTES.md). Three consumers hide one another's waiting best, but have
# registers for head_dim 64 alone (`MANY_KEYS` in plan/hopper.py).
HOPPER_TILES = {64: HopperTiles(2, 128, 4), 128: HopperTiles(2, 128, 4), 256: HopperTiles(2, 64, 3)}
