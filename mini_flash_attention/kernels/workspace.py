"""Memory that kernels need beside a call's tensors: one workspace for each (thread, stream)."""

import threading
from collections.abc import Hashable, Mapping
from typing import Any

import torch

_rooms: dict[Hashable, dict[str, torch.Tensor]] = {}
FLOATS = ("partials", "dq_accum")
MAX_ROOMS, MAX_KEPT = 16, 8 << 20  # elements of 4 bytes


def find(workspace: Mapping[str, int], tensors: dict[str, Any], stream: int | None) -> None:
    """Put a recipe's workspace among its tensors, and keep it for the next call.

    The counter is a zero to draw work tiles from, which a kernel leaves zero again. Kernels of
    one stream run one after the other and share what is kept; threads don't, for their launches may
    lie between one another's. A CUDA graph, which may be replayed on any stream, has its own.
    """
    room, device = {}, tensors["q"].device
    if stream is not None and not torch.cuda.is_current_stream_capturing():
        room = _rooms.setdefault((device, stream, threading.get_ident()), {})
        if len(_rooms) > MAX_ROOMS:
            _rooms.pop(list(_rooms)[0], None)  # noqa: RUF015 (another thread may add one meanwhile)
    for name, elements in workspace.items():
        x = room.get(name)
        if x is None or x.numel() < elements:
            make: Any = torch.zeros if name == "counter" else torch.empty
            dtype = torch.float32 if name in FLOATS else torch.int32
            x = make(elements, dtype=dtype, device=device)
            if elements <= MAX_KEPT:
                room[name] = x
        tensors[name] = x
