"""Strides as kernels want them."""

import torch


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """(batch or page, token, head) strides; 0 for the batch of a packed tensor.

    A dimension of size 1 is never stepped over and may carry any stride: 0 stands in, so that an
    odd one does not cost the kernel its aligned loads.
    """
    steps = tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))
    return (0, steps[0], steps[1]) if len(steps) == 3 else (steps[0], steps[1], steps[2])
