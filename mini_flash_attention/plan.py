"""Which kernel, with which tiles: a pure function of a call's shapes and of the GPU.

Every heuristic of the package stands here, and none looks at a length on the device.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .problem import Problem


class Gpu(NamedTuple):
    name: str
    arch: int  # compute capability, 90 for 9.0
    multiprocessors: int


class Tiles(NamedTuple):
    """What a kernel is compiled for."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Forward(NamedTuple):
    """A launch of the forward kernel."""

    tiles: Tiles
    rows: int  # query tiles per unit
    units: int  # (batch, head) pairs; heads alone when q is packed
    per_group: int  # units whose keys share the L2 cache


@lru_cache(maxsize=None)
def gpu(device: torch.device) -> Gpu:
    """What `device` is; a stand-in for the CPU, where the interpreter runs the kernels."""
    if device.type == "cpu":
        return Gpu("Triton interpreter", 80, 1)
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    if arch < 80:
        raise NotImplementedError(
            f"mini_flash_attention: device: expected compute capability 8.0 or newer, "
            f"got {properties.major}.{properties.minor} ({properties.name})"
        )
    return Gpu(properties.name, arch, properties.multi_processor_count)


# Tiles of the forward kernel by head_dim, without and with what costs registers (windows, pages).
# BIG is for the architectures with 227 KB of shared memory, SMALL fits the 99 KB of the others.
# Chosen on an H200 among those that compile without a spill: bench/NOTES.md.
BIG = {
    64: (Tiles(64, 128, 4, 2), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    256: (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
}
SMALL = {
    64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)),
    128: (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    256: (Tiles(64, 32, 8, 2), Tiles(64, 16, 8, 2)),
}


def forward_tiles(arch: int, head_dim: int, window: bool, paged: bool) -> Tiles:
    """Tiles of the forward kernel; each fits the architecture's shared memory without a spill."""
    table = BIG if arch in (90, 100, 103) else SMALL
    plain, heavy = table[64 if head_dim <= 64 else 128 if head_dim <= 128 else 256]
    return heavy if window or paged else plain


# Keys and values of the heads that run at the same time should fit in the L2 cache: 50 MB on an
# H100 and H200, of which half is left after the two halves of the chip each keep their copy.
L2_BYTES = 32 << 20


def forward(p: Problem, gpu: Gpu) -> Forward:
    """The launch of the forward kernel for a call."""
    nheads, head_dim = p.q.shape[-2:]
    tiles = forward_tiles(gpu.arch, head_dim, p.left >= 0, p.page_size > 0)
    if p.cu_seqlens_q is None:
        rows, units = -(-p.seqlen_q // tiles.block_m), p.batch * nheads
    else:
        # rules/sequence.py counts tiles through all sequences; each may leave one unused.
        rows, units = p.q.shape[0] // tiles.block_m + p.batch, nheads
    group = nheads // p.k.shape[-2]
    bytes_of_unit = 2 * p.seqlen_k * head_dim * p.k.element_size() // group
    return Forward(tiles, rows, units, max(1, min(units, L2_BYTES // max(1, bytes_of_unit))))
