"""The launches of one call: new keys into the cache, queries rotated, attention, the combine."""

import torch

from .. import plan, settings
from ..plan import forward as forwarding
from ..plan.decode import Decode
from ..plan.forward import Forward
from ..plan.gpu import Gpu
from ..plan.hopper import Hopper
from ..problem import Problem, empty_out
from .cache import append
from .decode import combine, decode
from .launch import Launch
from .portable import forward


def launches_of(p: Problem, gpu: Gpu) -> tuple[list[Launch], dict[str, int], bool]:
    """The launches in order, the elements of their workspace, and whether the results have to be
    cleared first, for rows that no program writes.
    """
    out = p.out if p.out is not None else empty_out(p.q, p.v.shape[-1], "meta")
    launches = append.launches(p)
    if p.cache.rotary is not None:
        p = p._replace(q=empty_out(p.q, device="meta"))
    if not out.numel():
        return launches, {}, False
    chosen = plan.attention(p, out, gpu, gluon=not settings.INTERPRETED)
    more, workspace = _attention(p, out, gpu, chosen)
    clears = isinstance(chosen, Decode) and p.lengths.cu_seqlens_q is not None
    return [*launches, *more], workspace, clears


def _attention(
    p: Problem, out: torch.Tensor, gpu: Gpu, chosen: Forward | Hopper | Decode
) -> tuple[list[Launch], dict[str, int]]:
    lse = None if p.lse_shape is None else torch.empty(p.lse_shape, device="meta")
    if isinstance(chosen, Forward):
        return [forward.launch(p, out, lse, chosen)], {}
    if isinstance(chosen, Decode):
        launches, workspace = [decode.launch(p, out, lse, chosen)], decode.workspace(p, chosen)
        if workspace:
            launches.append(combine.launch(p, out, lse, chosen, p.group))
        return launches, workspace
    from .hopper import forward as hopper  # Gluon has no interpreter

    fallback = forward.launch(p, out, lse, forwarding.forward(p, gpu))
    combined, workspace = None, dict[str, int]()
    if chosen.partials:
        workspace = decode.workspace(p, chosen.partials)
        combined = combine.launch(p, out, lse, chosen.partials, chosen.group)
    launch = hopper.launch(p, out, lse, chosen, fallback, combined)
    return [launch], workspace | {"counter": 1}
