"""All that kernels import of Gluon, and what differs between Triton's versions."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as _hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["TensorDescriptor", "gl", "gluon"]
mbarrier, tma, fence_async_shared = _hopper.mbarrier, _hopper.tma, _hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = _hopper.warpgroup_mma, _hopper.warpgroup_mma_wait
NEWER = hasattr(tma, "async_load")  # Triton 3.8 renamed copies
tma_load: Any = tma.async_load if NEWER else tma.async_copy_global_to_shared
tma_store: Any = tma.async_store if NEWER else tma.async_copy_shared_to_global
