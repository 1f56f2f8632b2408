"""What only training asks for: whether there are gradients, autocast, dropout's numbers."""

from typing import Any

import torch

from .problem import Problem
from .validate.tensors import transformed


def wants_gradient(arguments: dict[str, Any]) -> bool:
    """Whether autograd, or a transform of torch.func, wants to know what happens to a tensor."""
    if transformed():
        return True
    given = filter(torch.is_tensor, (*arguments.values(), *arguments.get("score_mod_args", ())))
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def autocasts(arguments: dict[str, Any]) -> bool:
    """Whether torch.autocast is on and q, k or v are in fp32; they are cast then, as those of
    PyTorch's attention.
    """
    q = arguments["q"]
    if "k_cache" in arguments or not isinstance(q, torch.Tensor):
        return False
    kind = q.device.type
    if kind not in ("cuda", "cpu") or not torch.is_autocast_enabled(kind):
        return False
    given = {name: arguments[name] for name in ("q", "k", "v")}
    wide = [n for n, x in given.items() if isinstance(x, torch.Tensor) and x.dtype is torch.float32]
    dtype = torch.get_autocast_dtype(kind)
    if not wide or dtype is torch.float32:
        return False
    arguments |= {name: given[name].to(dtype) for name in wide}
    return True


def seed(q: Any) -> torch.Tensor | None:
    """A number from PyTorch's generator. It stays on the device, so that each replay of a CUDA
    graph gets its own.
    """
    if not isinstance(q, torch.Tensor):  # refused later
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def kept(p: Problem, b: int, seqlen_k: int, shape: torch.Size) -> torch.Tensor:
    """What dropout multiplies weights by, those of keys before every window too: 0, or 1 / (1 - p)
    where they are kept. shape: that of the weights (B, H, Sq, keys) of sequences from b on.
    """
    assert p.options.dropout_seed is not None
    seed, size = int(p.options.dropout_seed), (*shape[1:3], seqlen_k)
    generators = (torch.Generator().manual_seed(seed ^ n) for n in range(b, b + shape[0]))
    numbers = [torch.rand(size, generator=generator) for generator in generators]
    return (torch.stack(numbers) >= p.options.dropout_p) / (1 - p.options.dropout_p)
