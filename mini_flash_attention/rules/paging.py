"""Key number -> place in the cache through the block table."""

import triton
import triton.language as tl


@triton.jit
def lookup(entry, in_use, num_pages):
    """Pages that table entries name, and which of them can be read.

    An entry may hold anything where `in_use` is false and is not trusted where it is true: a page
    that does not exist is never touched and reads as zeros.
    """
    page = tl.load(entry, mask=in_use, other=-1)
    return page, (page >= 0) & (page < num_pages)
