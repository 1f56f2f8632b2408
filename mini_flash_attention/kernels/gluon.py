"""All that kernels import of Gluon, and what differs between Triton's versions."""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia import hopper as _hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["TensorDescriptor", "gl", "gluon"]
mbarrier, tma, fence_async_shared = _hopper.mbarrier, _hopper.tma, _hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = _hopper.warpgroup_mma, _hopper.warpgroup_mma_wait
NEWER = hasattr(tma, "async_load")  # Triton 3.8 renamed copies
tma_load: Any = tma.async_load if NEWER else tma.async_copy_global_to_shared
tma_store: Any = tma.async_store if NEWER else tma.async_copy_shared_to_global


def _reduce_add(desc: Any, coord: Any, source: Any, _semantic: Any = None) -> None:
    """cp.reduce.async.bulk.tensor: up to 3.7 Triton has the operation and no function for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, source.handle)


tma_add: Any = tma.async_atomic_add if NEWER else _core.builtin(_reduce_add)
