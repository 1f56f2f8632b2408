"""What can be checked beyond a call's arguments: the numbers on the device.

Kernels clamp lengths, positions and page numbers to what the tensors hold, so a bad one gives a
wrong answer in silence. With MINI_FLASH_ATTENTION_CHECK=1 `values` reads them back before every
call, which waits for the GPU, and says which number is wrong. A tool for finding a mistake, not
for service.
"""

from itertools import pairwise
from typing import NoReturn

import torch

from .problem import Problem, Rotary
from .settings import CHECK
from .validate import wrong_value


def values(p: Problem) -> None:
    """Refuse lengths, positions and page numbers that the kernels would clamp."""
    if p.q.is_cuda and torch.cuda.is_current_stream_capturing():
        hint = "the checks read lengths back, which a graph can't"
        _wrong(p, CHECK, "0 during CUDA-graph capture", 1, hint)
    queries, lengths, cache = [p.seqlen_q] * p.batch, p.lengths, p.cache
    if lengths.cu_seqlens_q is not None:
        queries = _differences(p, "cu_seqlens_q", lengths.cu_seqlens_q, p.q.shape[0])
        if lengths.seqused_q is not None:
            wanted = "0 to the {end} queries of sequence {b}"
            _up_to(p, "seqused_q", lengths.seqused_q, queries, wanted)
            queries = lengths.seqused_q.tolist()
        if max(queries, default=0) > p.seqlen_q:
            _wrong(p, "max_seqlen_q", f"at least {max(queries)}", p.seqlen_q)
    new = queries if cache.appended < 0 else [cache.appended] * p.batch
    keys = _key_lengths(p, new)
    longest = max(keys, default=0)
    hint = "the keys to append count too" if cache.appended else ""
    if cache.cache_batch_idx is not None:
        last = p.cache_rows - 1
        _up_to(
            p, "cache_batch_idx", cache.cache_batch_idx, [last] * p.batch, "rows from 0 to {end}"
        )
    if cache.block_table is not None:
        room = cache.block_table.shape[1] * cache.page_size
        if longest > room:
            _wrong(p, "block_table", f"columns for {longest} tokens", f"room for {room}", hint)
        _pages(p, cache.block_table, keys)
    if longest > p.seqlen_k:
        if _used(p) == "cache_seqlens":
            _wrong(p, "cache_seqlens", f"at most the cache's {p.seqlen_k} tokens", longest, hint)
        _wrong(p, "max_seqlen_k", f"at least {longest}", p.seqlen_k)
    if cache.cache_leftpad is not None:
        _up_to(p, "cache_leftpad", cache.cache_leftpad, keys, "0 to the {end} keys of sequence {b}")
    if cache.rotary is not None:
        _positions(p, cache.rotary, queries, new, keys)


def _wrong(p: Problem, argument: str, expected: str, got: object, hint: str = "") -> NoReturn:
    raise wrong_value(p.function, argument, expected, got, hint)


def _used(p: Problem) -> str:
    """What the caller knows `p.lengths.seqused_k` as."""
    return "cache_seqlens" if p.function == "flash_attn_with_kvcache" else "seqused_k"


def _differences(p: Problem, name: str, cu_seqlens: torch.Tensor, total: int | None) -> list[int]:
    """Lengths of sequences; total is None where they are no rows and so may start anywhere."""
    ends = cu_seqlens.tolist()
    if total is not None and ends[0] != 0:
        _wrong(p, name, "0 in entry 0", ends[0])
    for b, (start, end) in enumerate(pairwise(ends)):
        if end < start:
            _wrong(p, name, "entries that never decrease", f"{end} after {start} in entry {b + 1}")
    if total is not None and ends[-1] > total:
        _wrong(p, name, f"an end at {total} tokens or before", ends[-1])
    return [end - start for start, end in pairwise(ends)]


def _key_lengths(p: Problem, new: list[int]) -> list[int]:
    """Keys of each sequence, the new ones to append included."""
    lengths, cu_seqlens_k = [p.seqlen_k] * p.batch, p.lengths.cu_seqlens_k
    if cu_seqlens_k is not None:
        total = None if p.cache.page_size else p.k.shape[0]
        lengths = _differences(p, "cu_seqlens_k", cu_seqlens_k, total)
    if p.lengths.seqused_k is None:
        return lengths
    used = p.lengths.seqused_k.tolist()
    for b, (n, length) in enumerate(zip(used, lengths, strict=True)):
        if n < 0:
            _wrong(p, _used(p), "0 or more", f"{n} in entry {b}")
        if cu_seqlens_k is not None and n > length:
            _wrong(p, _used(p), f"at most the {length} of cu_seqlens_k", f"{n} in entry {b}")
    return [n + more for n, more in zip(used, new, strict=True)]


def _pages(p: Problem, block_table: torch.Tensor, lengths: list[int]) -> None:
    num_pages, cache = p.k.shape[0], p.cache
    pads = [0] * p.batch if cache.cache_leftpad is None else cache.cache_leftpad.tolist()
    rows = block_table.tolist()
    if cache.cache_batch_idx is not None:
        rows = [rows[row] for row in cache.cache_batch_idx.tolist()]
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        unused = max(pads[b], 0) // cache.page_size  # before the first key in use
        for column, page in enumerate(row[: -(-length // cache.page_size)]):
            if column >= unused and not 0 <= page < num_pages:
                wanted = f"pages from 0 to {num_pages - 1} for the {length} keys of sequence {b}"
                _wrong(p, "block_table", wanted, f"{page} in column {column}")


def _up_to(p: Problem, name: str, x: torch.Tensor, ends: list[int], wanted: str) -> None:
    """Every number of x is one from 0 to its end."""
    for b, (n, end) in enumerate(zip(x.tolist(), ends, strict=True)):
        if not 0 <= n <= end:
            _wrong(p, name, wanted.format(end=end, b=b), f"{n} in entry {b}")


def _positions(
    p: Problem, rotary: Rotary, queries: list[int], new: list[int], lengths: list[int]
) -> None:
    """The tables reach as far as queries and new keys stand."""
    rows = rotary.cos.shape[0]
    for b, (asking, more, length) in enumerate(zip(queries, new, lengths, strict=True)):
        after = max(asking if rotary.moving else min(asking, 1), more)
        end = length - more + after
        if after and end > rows:
            _wrong(p, "rotary_cos", f"a table for the {end} positions of sequence {b}", rows)
