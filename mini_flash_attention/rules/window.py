"""Where a query's window begins and ends: the one place that knows the inequality.

The last query stands on the last key (bottom-right). With `diagonal = seqlen_k - seqlen_q`, query i
sees the keys `i + diagonal - left .. i + diagonal + right` that exist; causal is right = 0.

Plain arithmetic on numbers, tiles of Triton's or PyTorch's tensors: the host and the CPU path ask
here without Triton, kernels through `mask.py`.
"""

from typing import Any, NamedTuple


class Window(NamedTuple):
    """Which keys the queries of a sequence see; an open side is None."""

    diagonal: Any  # where query 0 stands among the keys: seqlen_k - seqlen_q
    left: Any  # keys before the query's own
    right: Any  # keys after it
    first_key: Any  # None, or the first key in use, which counts only beside `left`
    seqlen_k: Any


def first_visible(i: "Any", window: "Any") -> "Any":
    """The first key of query i's window, for a window with a left side; it may lie before key 0."""
    return i + (window.diagonal - window.left)


def last_visible(i: "Any", window: "Any") -> "Any":
    """The last key of query i's window, for a window with a right side; it may not exist."""
    return i + (window.diagonal + window.right)
