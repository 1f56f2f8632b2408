"""Key number -> place in the cache through the block table."""

import triton
import triton.language as tl


@triton.jit
def page_of(entry, in_use):
    """The page that a table entry names, -1 where the entry is not in use: it may hold anything."""
    return tl.load(entry, mask=in_use, other=-1)


@triton.jit
def lookup(entry, in_use, num_pages):
    """Pages that table entries name, and which of them can be read.

    An entry is not trusted: a page that does not exist is never touched and reads as zeros.
    """
    page = page_of(entry, in_use)
    return page, (page >= 0) & (page < num_pages)
