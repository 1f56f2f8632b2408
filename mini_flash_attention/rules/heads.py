"""Which KV head serves a query head; a group of query heads packed into rows of one tile."""

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter wants to see it)


@triton.jit
def kv_head(head, group):
    """Grouped-query attention: `group` query heads in a row share one KV head."""
    return head // group


@triton.jit
def unpack(row, group):
    """Row of a tile that holds whole groups -> (query token, head inside the group)."""
    return row // group, row % group
