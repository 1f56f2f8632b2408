"""What can be checked beyond a call's arguments: the numbers on the device, and Triton itself.

Kernels clamp lengths and page numbers to what the tensors hold, so a bad one gives a wrong answer
in silence. With MINI_FLASH_ATTENTION_CHECK=1 `values` reads them back before every call, which
waits for the GPU, and says which number is wrong. A tool for finding a mistake, not for service.
"""

import os
from functools import lru_cache

import torch

from .problem import Problem
from .refusals import refuse

SWITCH = "MINI_FLASH_ATTENTION_CHECK"
ON = os.environ.get(SWITCH) == "1"
OLDEST_TRITON = (3, 6)


def values(p: Problem) -> None:
    """Refuse lengths and page numbers that the kernels would clamp."""
    if p.q.is_cuda and torch.cuda.is_current_stream_capturing():
        hint = "the checks read lengths back, and a graph can't"
        refuse(ValueError, p.function, SWITCH, "0 during CUDA-graph capture", 1, hint)
    if p.cu_seqlens_q is not None:
        queries = _differences(p, "cu_seqlens_q", p.cu_seqlens_q, p.q.shape[0])
        if max(queries, default=0) > p.seqlen_q:
            refuse(ValueError, p.function, "max_seqlen_q", f"at least {max(queries)}", p.seqlen_q)
    keys = _key_lengths(p)
    if p.page_size and max(keys, default=0) > _room(p):
        wanted = f"columns for {max(keys)} tokens"
        got = f"{_room(p)} in pages of {p.page_size}"
        refuse(ValueError, p.function, "block_table", wanted, got, _appended(p))
    if p.cu_seqlens_k is not None and max(keys, default=0) > p.seqlen_k:
        refuse(ValueError, p.function, "max_seqlen_k", f"at least {max(keys)}", p.seqlen_k)
    if p.block_table is not None:
        _pages(p, p.block_table, keys)


def _differences(p: Problem, name: str, cu_seqlens: torch.Tensor, total: int | None) -> list[int]:
    """Lengths between neighbours; where they are rows of a tensor (of total), 0 to total."""
    ends = cu_seqlens.tolist()
    if total is not None and ends[0] != 0:
        refuse(ValueError, p.function, name, "a start at 0", ends[0])
    lengths = [end - start for start, end in zip(ends, ends[1:])]  # noqa: B905
    for b, length in enumerate(lengths):
        if length < 0:
            got = f"{ends[b]} before {ends[b + 1]} at entry {b + 1}"
            refuse(ValueError, p.function, name, "entries that never decrease", got)
    if total is not None and ends[-1] > total:
        refuse(ValueError, p.function, name, f"at most the {total} tokens there are", ends[-1])
    return lengths


def _key_lengths(p: Problem) -> list[int]:
    """Keys that each sequence has in the end, those to append included."""
    lengths = [p.seqlen_k] * p.batch
    if p.cu_seqlens_k is not None:
        total = None if p.page_size else p.k.shape[0]
        lengths = _differences(p, "cu_seqlens_k", p.cu_seqlens_k, total)
    if p.seqused_k is None:
        return lengths
    name = "cache_seqlens" if p.function == "flash_attn_with_kvcache" else "seqused_k"
    used = p.seqused_k.tolist()
    for b, (length, n) in enumerate(zip(lengths, used, strict=True)):
        if n < 0:
            refuse(ValueError, p.function, name, "lengths of 0 or more", f"{n} in entry {b}")
        # A block table is to be named where it is what is too short, so the caller looks at it.
        if n + p.appended > length and (p.cu_seqlens_k is not None or not p.page_size):
            wanted, got = f"at most {length} in entry {b}", n + p.appended
            refuse(ValueError, p.function, name, wanted, got, _appended(p))
    return [n + p.appended for n in used]


def _room(p: Problem) -> int:
    """Tokens that one row of the block table can reach."""
    return 0 if p.block_table is None else p.block_table.shape[1] * p.page_size


def _appended(p: Problem) -> str:
    return "the keys to append count too" if p.appended else ""


def _pages(p: Problem, block_table: torch.Tensor, lengths: list[int]) -> None:
    num_pages = p.k.shape[0]
    for b, (row, length) in enumerate(zip(block_table.tolist(), lengths, strict=True)):
        for column, page in enumerate(row[: -(-length // p.page_size)]):
            if not 0 <= page < num_pages:
                wanted = f"pages from 0 to {num_pages - 1} for the {length} keys of row {b}"
                got = f"{page} in column {column}"
                refuse(ValueError, p.function, "block_table", wanted, got)


@lru_cache(maxsize=None)
def require_triton() -> None:
    """Say what is missing before a kernel is imported, where Triton has no wheel or is too old."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    hint = "pip install --upgrade triton; tensors on the CPU need none"
    try:
        import triton
    except ImportError as error:
        raise ImportError(
            f"mini_flash_attention: triton: expected {oldest} or newer for tensors on a GPU, "
            f"got none ({hint})"
        ) from error
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        raise ImportError(
            f"mini_flash_attention: triton: expected {oldest} or newer, "
            f"got {triton.__version__} ({hint})"
        )
