"""Which tile of work a program takes.

Work is a table: `tiles` rows of queries by `units` heads. Programs start in the order of their
number, so the order decides two things: how well the last wave is balanced (the longest tiles go
first, which under a causal mask are the last ones of a sequence) and what the L2 cache holds
(units are taken `per_group` at a time, as many as fit).
"""

import triton
import triton.language as tl


@triton.jit
def place(program, tiles, units, per_group):
    """Program number -> (tile, unit): groups of units, in a group the last tile of each first."""
    first_unit = program // (tiles * per_group) * per_group
    inside = program - first_unit * tiles
    width = tl.minimum(per_group, units - first_unit)
    return tiles - 1 - inside // width, first_unit + inside % width
