"""Rotary position embedding of rows that are loaded.

Source: RoFormer, arXiv:2104.09864, section 3.2.
"""

import triton
import triton.language as tl

from . import sequence


@triton.jit
def load(
    base, offset, row_ok, position, cos, sin, rows_cos,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows at base + offset [N, D], the first ROTARY_DIM elements rotated by their position.

    Element e is turned together with a partner, by the angle that column `angle` of the tables
    holds; they are read again rather than exchanged. No position is trusted.
    """
    d = tl.arange(0, D)
    wanted = row_ok[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(base + offset[:, None] + d[None, :], mask=wanted, other=0.0)
    if ROTARY_DIM:
        HALF: tl.constexpr = ROTARY_DIM // 2
        if INTERLEAVED:
            partner, angle, lower = d ^ 1, d // 2, d % 2 == 0
        else:
            partner, angle, lower = (d + HALF) % ROTARY_DIM, d % HALF, d < HALF
        turned = row_ok[:, None] & (d < ROTARY_DIM)[None, :]
        other = tl.load(base + offset[:, None] + partner[None, :], mask=turned, other=0.0)
        row = sequence.clamp(position, 0, rows_cos - 1).to(tl.int64) * HALF
        c = tl.load(cos + row[:, None] + angle[None, :], mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + row[:, None] + angle[None, :], mask=turned, other=0.0).to(tl.float32)
        other = tl.where(lower[None, :], -other.to(tl.float32), other.to(tl.float32))
        x = x.to(tl.float32) * c + other * s
    return x
