"""Which work tile a program takes: longest first, and heads in groups that share the L2 cache.

Work is a table: `num_m_blocks` blocks of query rows by `batch_heads` heads. Programs start in the
order of their number, so the order decides two things: how well the last wave is balanced (the
longest tiles go first, which under a causal mask are the last ones of a sequence) and what the L2
cache holds (heads are taken `l2_group` at a time, as many as fit).
"""

import triton
import triton.language as tl


@triton.jit
def m_block_and_head(program, num_m_blocks, batch_heads, l2_group):
    """Program number -> (block of rows, head): in groups of heads; the last block of each first."""
    first_head = program // (num_m_blocks * l2_group) * l2_group
    inside = program - first_head * num_m_blocks
    width = tl.minimum(l2_group, batch_heads - first_head)
    return num_m_blocks - 1 - inside // width, first_head + inside % width
