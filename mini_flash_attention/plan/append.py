"""The append kernel: how many tokens a program copies."""

from typing import NamedTuple

from ..problem import Problem


class Append(NamedTuple):
    """The plan of a launch of the append kernel."""

    tokens: int  # that a sequence brings, at most
    block: int  # of a program
    tiles: int  # blocks of the whole batch, for each head


def append(p: Problem, rotated: bool, queries: bool = False) -> Append:
    """How p's new keys or values are written, or its rotated queries."""
    tokens = p.seqlen_q if queries or p.cache.appended < 0 else p.cache.appended
    block = 1 if tokens == 1 else 8 if rotated else 16
    tiles = p.batch * -(-tokens // block)
    if p.lengths.cu_seqlens_q is not None:  # rules/sequence.py counts them through all sequences
        tiles = p.q.shape[0] // block + p.batch
    return Append(tokens, block, tiles)
