"""Key number -> place in the cache through the block table."""

import triton
import triton.language as tl


@triton.jit
def locate(j, in_use, table, num_pages, PAGE_SIZE: tl.constexpr):
    """(page, slot, real) of keys j, numbers or a tile of them; page and slot in 64 bits.

    Table entries may hold anything where `in_use` is false, and are not trusted where it is true:
    a key on a page that does not exist is not there.
    """
    page = tl.load(table + j // PAGE_SIZE, mask=in_use, other=-1)
    real = (page >= 0) & (page < num_pages)
    return tl.cast(page, tl.int64), tl.cast(j % PAGE_SIZE, tl.int64), real
