"""The same three functions on CPU tensors, through PyTorch's scaled_dot_product_attention.

Outside the GPU kernels a well-kept library beats our own code. What is left to do here is to cut
out the keys that are in use, sequence by sequence, and to say who sees whom.
"""

from typing import Any

import torch
import torch.nn.functional as F

from . import training, triton_on_cpu
from .problem import Problem, Rotary
from .rules.window import Window, first_visible, last_visible
from .validate.memory import overlaps_itself


def run(p: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Append p's new keys; (out, softmax_lse or None) of attention then."""
    out = p.new_out()
    lse = None
    if p.lse_shape is not None:
        lse = torch.full(p.lse_shape, float("-inf"), dtype=torch.float32, device="cpu")
    if p.cache.k_new is not None:
        p = _append(p)
    cache, leftpad, packed = p.cache, p.cache.cache_leftpad, p.lengths.cu_seqlens_q is not None
    own = (*p.lengths, cache.block_table, cache.cache_batch_idx, leftpad)
    if all(x is None for x in own):  # nothing that is a sequence's own
        k, v = p.k[:, : p.seqlen_k], p.v[:, : p.seqlen_k]
        result, result_lse = _attention(p, p.q, k, v, 0)
        out.copy_(result)
        if lse is not None:
            lse.copy_(result_lse)
        return out, lse
    out.zero_()
    for b in range(p.batch):
        at = queries_of(p, b)
        k, v = _keys(p, b)
        pad = 0 if leftpad is None else min(max(int(leftpad[b]), 0), k.shape[0])
        result, result_lse = _attention(p, p.q[at][None], k[None], v[None], b, pad)
        out[at] = result[0]
        if lse is not None:
            lse[(..., at) if packed else at] = result_lse[0]
    return out, lse


def _attention(
    p: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: int, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, Sq, H, D), (B, Sk, Hk, D) -> out (B, Sq, H, Dv), LSE (B, H, Sq), empty if not wanted.

    b is the number of the first sequence; keys before `pad` are not there.
    """
    seqlen_q, seqlen_k, options = q.shape[1], k.shape[1], p.options
    if overlaps_itself(q):  # SDPA lays its output out like q, which then overwrites itself
        q = q.contiguous()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    window = Window(seqlen_k - seqlen_q, options.left, options.right, pad, seqlen_k)
    skipped = 0 if options.left is None else max(pad, first_visible(0, window))
    k, v = k[:, :, skipped:], v[:, :, skipped:]  # what lies before every window
    if not k.shape[2] or not q.numel():
        empty = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device="cpu")
        return q.new_zeros((*q.shape[:3], v.shape[3])).transpose(1, 2), empty
    dropout_p = options.dropout_p
    plain = not (p.scores.changed or p.scores.s_aux is not None or dropout_p)
    # PyTorch's causal mask is aligned top left, which is the same for equal lengths, and is not
    # materialised: 2.4 times as fast at 8k tokens.
    causal = plain and options.left is None and options.right == 0 and seqlen_q == seqlen_k
    seen = None
    if options.need_lse or not causal:
        seen = visible(window, seqlen_q, skipped)
    if plain:
        result = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if causal else seen, is_causal=causal,
            scale=options.softmax_scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        if seen is not None:
            result = result.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        if not options.need_lse:
            return result.transpose(1, 2), q.new_empty(0)
    scores = q.float() @ _to_heads(k, q).float().mT * options.softmax_scale
    scores = biased(p, scores, b, skipped)
    if p.scores.score_mod is not None:
        scores = modified(p, p.scores.score_mod, b, skipped, scores)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    if plain:
        return result.transpose(1, 2), lse
    empty = lse == float("-inf")
    if p.scores.s_aux is not None:
        sink = p.scores.s_aux.float()[:, None]
        lse = torch.logaddexp(lse, sink).masked_fill(empty, float("-inf"))
    weights = (scores - lse.masked_fill(empty, 0.0)[..., None]).exp()
    if dropout_p:
        weights = weights * training.kept(p, b, k.shape[2] + skipped, weights.shape)[..., skipped:]
    out = (weights @ _to_heads(v, q).float()).masked_fill(empty[..., None], 0.0)
    return out.to(q.dtype).transpose(1, 2), lse


def _to_heads(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KV heads of x (B, Hk, S, D) repeated for the query heads they serve."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _stands(seqlen_q: int, seqlen_k: int, skipped: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(seqlen_q, 1) and (seqlen_k - skipped,): where queries and keys stand."""
    i = torch.arange(seqlen_k - seqlen_q, seqlen_k, device="cpu")[:, None]
    return i, torch.arange(skipped, seqlen_k, device="cpu")


def biased(p: Problem, s: torch.Tensor, b: int, skipped: int) -> torch.Tensor:
    """Scores (B, H, Sq, Sk) after soft cap and ALiBi; b is the number of the first sequence."""
    softcap, slopes = p.scores.softcap, p.scores.alibi_slopes
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        slopes = slopes if slopes.dim() == 1 else slopes[b : b + s.shape[0], :]
        i, j = _stands(s.shape[2], skipped + s.shape[3], skipped)
        s = s - slopes[..., None, None] * (i - j).abs()
    return s


def modified(p: Problem, function: Any, b: int, skipped: int, *scores: torch.Tensor) -> Any:
    """What a score_mod, or its gradient, makes of scores (B, H, Sq, Sk) of sequences from b on."""
    batch, nheads, seqlen_q, keys = scores[0].shape
    i, j = _stands(seqlen_q, skipped + keys, skipped)
    numbers = torch.arange(b, b + batch, device="cpu")[:, None, None, None]
    heads = torch.arange(nheads, device="cpu")[:, None, None]
    aux = () if p.scores.aux is None else (p.scores.aux,)
    return triton_on_cpu.call(function, *scores, numbers, heads, i.clamp(min=0), j, *aux)


def visible(window: Window, seqlen_q: int, skipped: int) -> torch.Tensor | None:
    """(seqlen_q, keys from `skipped` on) bool: whether a query sees a key; None if all see all."""
    i = torch.arange(seqlen_q, device="cpu")[:, None]
    j = torch.arange(skipped, window.seqlen_k, device="cpu")
    seen = None
    if window.left is not None:
        seen = j >= first_visible(i, window)
    if window.right is not None:
        before = j <= last_visible(i, window)
        seen = before if seen is None else seen & before
    return seen


def queries_of(p: Problem, b: int) -> int | slice:
    """Where in q the query rows in use of sequence b lie."""
    lengths, most = p.lengths, p.seqlen_q
    if lengths.cu_seqlens_q is None:
        return b
    if lengths.seqused_q is not None:
        most = min(max(int(lengths.seqused_q[b]), 0), most)
    return rows_of(b, lengths.cu_seqlens_q, p.q, most)


def rows_of(b: int, cu_seqlens: torch.Tensor, x: torch.Tensor, most: int) -> slice:
    """Rows of packed x that are sequence b, at most so many, whatever cu_seqlens holds."""
    total = x.shape[0]
    start = min(max(int(cu_seqlens[b]), 0), total)
    return slice(start, min(max(int(cu_seqlens[b + 1]), start), start + most, total))


def _keys(p: Problem, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v (length, nheads_k, head_dim) of sequence b, from the first of its cache; zeros on a page
    that isn't there.
    """
    length, lengths, cache = p.seqlen_k, p.lengths, p.cache
    if lengths.cu_seqlens_k is not None:
        start, end = lengths.cu_seqlens_k[b : b + 2].tolist()
        length = min(max(end - start, 0), length)
    if lengths.seqused_k is not None:
        appended = p.q[queries_of(p, b)].shape[0] if cache.appended < 0 else cache.appended
        length = min(min(max(int(lengths.seqused_k[b]), 0), length) + appended, length)
    row = _row(p, b)
    length = length if row >= 0 else 0
    if cache.page_size:
        if not p.k.shape[0]:  # no page at all
            return p.k.new_zeros(length, *p.k.shape[2:]), p.v.new_zeros(length, *p.v.shape[2:])
        page, slot, real = _locate(p, b, torch.arange(length, device="cpu"))
        missing = ~real[:, None, None]
        return p.k[page, slot].masked_fill(missing, 0.0), p.v[page, slot].masked_fill(missing, 0.0)
    if lengths.cu_seqlens_k is not None:
        rows = rows_of(b, lengths.cu_seqlens_k, p.k, length)
        return p.k[rows], p.v[rows]
    k, v = (x[row : row + 1, :length].flatten(0, 1) for x in (p.k, p.v))
    return k, v


def _row(p: Problem, b: int) -> int:
    """The row of the caches, or of the block table, that sequence b uses; -1 if there is none."""
    if p.cache.cache_batch_idx is None:
        return b
    row = int(p.cache.cache_batch_idx[b])
    return row if 0 <= row < p.cache_rows else -1


def _locate(p: Problem, b: int, j: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages, or rows of the cache, and slots of keys j of sequence b; whether they exist: one that
    does not becomes 0.
    """
    row, table, page_size = _row(p, b), p.cache.block_table, p.cache.page_size
    page, slot = torch.full_like(j, row), j
    if table is not None and row >= 0:
        page, slot = table[row, j // page_size].long(), j % page_size
    real = (page >= 0) & (page < p.k.shape[0])
    return page.where(real, 0), slot, real


def _append(p: Problem) -> Problem:
    """Write k_new and v_new into the caches, where they fit; p, with its queries rotated too."""
    *_, k_new, v_new, appended, rotary = p.cache
    assert k_new is not None and v_new is not None
    q = p.q if rotary is None else p.q.clone()
    starts = [p.seqlen_k - appended] * p.batch  # where the new keys of each sequence go
    if p.lengths.seqused_k is not None:
        starts = p.lengths.seqused_k.clamp(0, p.seqlen_k).tolist()
    for b, start in enumerate(starts):
        at = queries_of(p, b)
        k, v = (x[at][: p.seqlen_k - start] for x in (k_new, v_new))
        j = torch.arange(start, start + k.shape[0], device="cpu")
        if rotary is not None:
            k = _rotated(rotary, k, j)
            t = torch.arange(q[at].shape[0], device="cpu") * rotary.moving
            q[at] = _rotated(rotary, q[at], start + t)
        page, slot, real = _locate(p, b, j)
        p.k[page[real], slot[real]] = k[real]
        p.v[page[real], slot[real]] = v[real]
    return p._replace(q=q)


def _rotated(rotary: Rotary, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """x (tokens, heads, head_dim) of tokens at these positions."""
    rows = position.clamp(0, rotary.cos.shape[0] - 1)
    cos, sin = (table[rows][:, None].float() for table in (rotary.cos, rotary.sin))
    half = cos.shape[-1]
    shape, pair = ((half, 2), -1) if rotary.interleaved else ((2, half), -2)
    one, two = x[..., : 2 * half].float().unflatten(-1, shape).unbind(pair)
    turned = torch.stack((one * cos - two * sin, two * cos + one * sin), pair).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], -1)
