"""The GPU that a call is planned for."""

from functools import cache
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    name: str
    arch: int  # compute capability, 90 for 9.0
    multiprocessors: int
    triton: tuple[int, int] = (3, 6)  # the compiler's version, once it is wanted


@cache
def gpu_of(device: torch.device) -> Gpu:
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
