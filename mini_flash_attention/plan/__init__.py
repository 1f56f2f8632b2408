"""Which kernel, with which tiles: pure functions of a call's shapes and of the GPU.

Every decision of the package is made here. None reads a length on the device.
"""

import torch

from ..problem import Problem
from . import decode as decoding
from . import forward as forwarding
from . import hopper as hoppers
from .decode import Decode
from .forward import Forward
from .gpu import Gpu
from .hopper import Hopper


def attention(
    p: Problem, out: torch.Tensor, gpu: Gpu, gluon: bool = True
) -> Forward | Hopper | Decode:
    """The plan of the kernel that computes a call. gluon: whether kernels in Gluon can run."""
    if p.options.dropout_p:
        return forwarding.forward(p, gpu)
    hopper = hoppers.hopper(p, out, gpu) if gluon else None
    if hopper:
        return hopper
    if decoding.decodes(p, gpu):
        return decoding.decode(p, gpu)
    return forwarding.forward(p, gpu)
