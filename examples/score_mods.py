"""Functions for `score_mod`: attentions that flash-attn has no argument for, and one that it has.

    from examples.score_mods import same_document

    flash_attn_func(q, k, v, score_mod=same_document, score_mod_args=(documents,))

They work alike in prefill, with packed sequences and in decoding from pages, because queries and
keys are numbered by where they stand: the last query has the number of the last key. Each has its
test in tests/test_features.py.
"""

import triton
import triton.language as tl


@triton.jit
def alibi(score, batch, head, q_idx, kv_idx, args):
    """arXiv:2108.12409: a penalty in proportion to the distance."""
    return score - tl.load(args[0] + head) * tl.abs(q_idx - kv_idx).to(tl.float32)


@triton.jit
def soft_distance(score, batch, head, q_idx, kv_idx):
    """Fades with the logarithm of the distance."""
    return score - 0.3 * tl.log(1.0 + tl.abs(q_idx - kv_idx).to(tl.float32))


@triton.jit
def same_document(score, batch, head, q_idx, kv_idx, args):
    """Tokens see their own document; args[0] holds each position's, 2048 in all."""
    mine = tl.load(args[0] + tl.maximum(q_idx, 0), mask=q_idx < 2048, other=-1)
    theirs = tl.load(args[0] + kv_idx, mask=kv_idx < 2048, other=-1)
    return tl.where(mine == theirs, score, float("-inf"))


@triton.jit
def draft_tree(score, batch, head, q_idx, kv_idx, args):
    """Queries are nodes of a tree of drafts behind a context: each sees that and its ancestors.

    args: tokens of the context (batch,), and (batch, 32) ancestors of each node as bits.
    """
    context = tl.load(args[0] + batch)
    node = tl.minimum(tl.maximum(q_idx - context, 0), 31)
    ancestors = tl.load(args[1] + batch * 32 + node)
    of_tree = tl.minimum(tl.maximum(kv_idx - context, 0), 31)
    seen = (kv_idx < context) | (((ancestors >> of_tree) & 1) == 1)
    return tl.where(seen, score, float("-inf"))
