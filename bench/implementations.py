"""Who computes it: one adapter for each implementation, ours and the peers.

An adapter answers two questions: ``available`` (None, or why it can't run here) and ``prepare``
(a call ready to be timed, or None where it can't do the workload). Everything that is not the
call itself (views, lengths, masks) is done in ``prepare``. All read the same memory: tokens
before heads, as in our own interface; peers that name heads first get a transposed view.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.workloads import EVERYTHING, Tensors, Workload, int32, offsets


def first(result: Any) -> torch.Tensor:
    """The output of a call that may return more than the output."""
    return result[0] if isinstance(result, tuple) else result


def tokens_first(result: Any) -> torch.Tensor:
    return first(result).transpose(1, 2)


class Prepared(NamedTuple):
    call: Callable[[], Any]  # what is timed
    output: Callable[[Any], torch.Tensor] = first  # its result in q's layout; not timed


@dataclass(frozen=True)
class Implementation:
    name: str
    available: Callable[[], str | None]
    prepare: Callable[[Workload, Tensors], Prepared | None]
    # Entered around the calls, outside what is timed.
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    on_request: bool = False  # runs only when named
    attends: bool = True  # no: a yardstick, whose result is not looked at
    features: bool = False  # has soft cap, ALiBi, sinks and score_mod, under our names
    compiles: bool = False  # for each workload anew

    def ready(self, workload: Workload, tensors: Tensors) -> Prepared | None:
        """``prepare``, if it has the workload's feature."""
        return self.prepare(workload, tensors) if self.features or not workload.feature else None


def missing(module: str) -> str | None:
    """Why ``module`` can't be used here, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer's import may fail in any way: that is its answer
        return f"import {module}: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


def cache_arguments(tensors: Tensors) -> dict[str, Any]:
    """What flash_attn_with_kvcache, ours and FlashAttention-3's, is told about a cache."""
    cache: dict[str, Any] = {"cache_seqlens": tensors.seqlens_k}
    if tensors.cache_batch_idx is not None:
        cache["cache_batch_idx"] = tensors.cache_batch_idx
    if tensors.leftpads is not None:
        cache["cache_leftpad"] = tensors.leftpads
    return cache


# -- ours --------------------------------------------------------------------------------------


def prepare_mini(workload: Workload, tensors: Tensors) -> Prepared | None:
    mini = importlib.import_module("mini_flash_attention")
    q, k, v = tensors.q, tensors.k, tensors.v
    mask: dict[str, Any] = {"causal": workload.causal, "window_size": workload.window}
    mask |= workload.scores(q.device)
    if workload.feature == "score_mod":
        mask["score_mod"] = importlib.import_module("bench.score_mods").unchanged
    if workload.kind == "dense":
        return Prepared(lambda: mini.flash_attn_func(q, k, v, **mask))
    if workload.num_splits is not None:
        mask["num_splits"] = workload.num_splits
    if workload.kind == "decode":
        cache = {"block_table": tensors.block_table, **cache_arguments(tensors)}
        return Prepared(lambda: mini.flash_attn_with_kvcache(q, k, v, **cache, **mask))
    lengths = (
        *(tensors.cu_seqlens_q, tensors.cu_seqlens_k),
        *(max(workload.seqlens_q), max(workload.seqlens_k)),
    )
    table = tensors.block_table
    return Prepared(
        lambda: mini.flash_attn_varlen_func(q, k, v, *lengths, block_table=table, **mask)
    )


@contextmanager
def portable() -> Iterator[None]:
    """Ours without the Hopper kernel."""
    settings: Any = importlib.import_module("mini_flash_attention.settings")
    before, settings.PORTABLE = settings.PORTABLE, True
    try:
        yield
    finally:
        settings.PORTABLE = before


def prepare_portable(workload: Workload, tensors: Tensors) -> Prepared | None:
    return None if workload.kind == "decode" else prepare_mini(workload, tensors)


def portable_available() -> str | None:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if not hopper or os.environ.get("MINI_FLASH_ATTENTION_PORTABLE") == "1":
        return "here it is what mini runs"
    return missing("mini_flash_attention")


_all_maxima: dict[Any, Any] = {}  # calls that `maxima` remembers


@contextmanager
def maxima() -> Iterator[None]:
    """Ours with a Hopper kernel that follows the maximum of every block.

    A remembered call is not planned again, so the calls of each plan are remembered apart.
    """
    planning: Any = importlib.import_module("mini_flash_attention.plan.hopper")
    recipes: Any = importlib.import_module("mini_flash_attention.recipes")
    choose, remembered = planning.hopper, recipes._recipes

    def hopper(*call: Any) -> Any:
        plan = choose(*call)
        return None if plan is None else plan._replace(skip_max=False)

    planning.hopper, recipes._recipes = hopper, _all_maxima
    try:
        yield
    finally:
        planning.hopper, recipes._recipes = choose, remembered


FEW = 16  # query tokens at most, of a sequence that decodes


def prepare_two(workload: Workload, tensors: Tensors) -> Prepared | None:
    """A batch that prefills and decodes in two calls of ours, one for each.

    What a user does where one call for both is slower.
    """
    if workload.kind != "paged":
        return None
    lengths = list(enumerate(zip(workload.seqlens_q, workload.seqlens_k, strict=True)))
    few = [entry for entry, (q, k) in lengths if q <= FEW and q < k]
    many = [entry for entry, _ in lengths if entry not in few]
    if not few or not many:
        return None
    rows = [rows_of(workload, entries, tensors.q.device) for entries in (few, many)]
    calls = []
    for entries, taken in zip((few, many), rows, strict=True):
        part, given = part_of(workload, tensors, entries, taken)
        prepared = prepare_mini(part, given)
        if prepared is None:
            return None
        calls.append(prepared.call)

    def together(results: Any) -> torch.Tensor:
        out = tensors.q.new_empty(tensors.out_shape)
        for taken, result in zip(rows, results, strict=True):
            out[taken] = first(result).reshape(len(taken), *out.shape[1:])
        return out

    return Prepared(lambda: [call() for call in calls], together)


def rows_of(workload: Workload, entries: list[int], device: torch.device) -> torch.Tensor:
    """The rows of these batch entries in packed queries."""
    ends = [0, *accumulate(workload.seqlens_q)]
    rows = [row for entry in entries for row in range(ends[entry], ends[entry + 1])]
    return torch.tensor(rows, device=device)


def part_of(
    workload: Workload, tensors: Tensors, entries: list[int], rows: torch.Tensor
) -> tuple[Workload, Tensors]:
    """Some entries of a paged batch as a workload; dense queries where they have one length."""
    seqlens_q = tuple(workload.seqlens_q[entry] for entry in entries)
    seqlens_k = tuple(workload.seqlens_k[entry] for entry in entries)
    decodes = len(set(seqlens_q)) == 1 and seqlens_q[0] <= FEW
    part = replace(
        workload,
        kind="decode" if decodes else "paged",
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
    )
    q, device = tensors.q[rows], tensors.q.device
    if decodes:
        q = q.view(len(entries), seqlens_q[0], *q.shape[1:])
    assert tensors.block_table is not None
    given = replace(
        tensors,
        q=q,
        cu_seqlens_q=None if decodes else offsets(seqlens_q, device),
        cu_seqlens_k=None if decodes else offsets(seqlens_k, device),
        seqlens_k=int32(seqlens_k, device),
        block_table=tensors.block_table[torch.tensor(entries, device=device)],
    )
    return part, given


# -- PyTorch -----------------------------------------------------------------------------------

MOST_SEQUENCES = 65535  # FlashAttention-2 has the batch in the second dimension of its grid


def only(backend: SDPBackend) -> Callable[[], AbstractContextManager[Any]]:
    """SDPA may use this back end and no other: it fails rather than fall back."""
    return lambda: sdpa_kernel(backend)


def fa2_available() -> str | None:
    built = torch.backends.cuda.is_flash_attention_available()
    return None if built else "this PyTorch is built without it"


def cudnn_available() -> str | None:
    return None if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN"


def prepare_sdpa(
    workload: Workload, tensors: Tensors, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION
) -> Prepared | None:
    """scaled_dot_product_attention: dense keys of one length; its causal mask is top-left."""
    dense = workload.kind == "dense" or (workload.kind == "decode" and workload.uniform)
    if not dense or workload.page_size is not None or workload.window != EVERYTHING:
        return None
    if workload.rearranged:
        return None
    seqlen_q, seqlen_k = workload.seqlens_q[0], workload.seqlens_k[0]
    causal = workload.causal and seqlen_q > 1  # a single last query sees every key
    if causal and seqlen_q != seqlen_k:
        return None
    q, k, v = (t.transpose(1, 2) for t in (tensors.q, tensors.k, tensors.v))
    grouped = workload.heads != workload.heads_k
    if q.is_cuda and not takes(backend, q, k, v, causal, grouped):
        return None
    return Prepared(
        lambda: sdpa(q, k, v, is_causal=causal, enable_gqa=grouped),
        tokens_first,
    )


def takes(
    backend: SDPBackend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    grouped: bool,
) -> bool:
    """Whether SDPA would give this call to the back end, alone allowed."""
    can_use = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
    }
    with only(backend)():
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, grouped)
        return can_use[backend](params)


def prepare_fa2(workload: Workload, tensors: Tensors) -> Prepared | None:
    """SDPA where it can, else the operator under it: varlen, windows, a bottom-right mask."""
    if workload.d_v != workload.head_dim or workload.batch > MOST_SEQUENCES:
        return None
    through_sdpa = prepare_sdpa(workload, tensors, SDPBackend.FLASH_ATTENTION)
    if through_sdpa is not None:
        return through_sdpa
    if workload.page_size is not None or workload.rearranged:
        return None
    if workload.kind == "decode" and not workload.uniform:
        return None
    forward = torch.ops.aten._flash_attention_forward
    window: dict[str, int] = {}
    if workload.window != EVERYTHING:
        left, right = workload.window
        window = {"window_size_left": left, "window_size_right": 0 if workload.causal else right}
    arguments = (
        *(tensors.q, tensors.k, tensors.v, tensors.cu_seqlens_q, tensors.cu_seqlens_k),
        *(max(workload.seqlens_q), max(workload.seqlens_k)),
        *(0.0, workload.causal, False),  # dropout, mask, debug mask
    )
    return Prepared(lambda: forward(*arguments, **window))


def prepare_flex(workload: Workload, tensors: Tensors) -> Prepared | None:
    """FlexAttention, compiled for this shape: dense only."""
    if workload.kind != "dense":
        return None
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 1000  # a benchmark is one function at many shapes
    seqlen_q, seqlen_k = workload.seqlens_q[0], workload.seqlens_k[0]
    left, right = workload.window
    right = 0 if workload.causal else right
    offset = seqlen_k - seqlen_q

    def sees(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        distance = key - query - offset
        after = distance <= right if right >= 0 else distance <= seqlen_k
        return after & (distance >= -left) if left >= 0 else after

    mask = None
    if left >= 0 or right >= 0:
        mask = create_block_mask(sees, None, None, seqlen_q, seqlen_k, device=tensors.q.device)
    q, k, v = (t.transpose(1, 2) for t in (tensors.q, tensors.k, tensors.v))
    grouped = workload.heads != workload.heads_k
    flex = torch.compile(flex_attention, dynamic=False)
    return Prepared(lambda: flex(q, k, v, block_mask=mask, enable_gqa=grouped), tokens_first)


# -- FlashAttention-3 --------------------------------------------------------------------------


def fa3_available() -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        return "its kernels are for compute capability 9"
    return missing("flash_attn_interface")


def fa3_has(head_dim: int, d_v: int) -> bool:
    """Whether there is a kernel for these head_dims."""
    equal = d_v == head_dim <= 256
    apart = (128 < head_dim <= 192 and 96 < d_v <= 128) or (head_dim <= 64 and d_v <= 512)
    return head_dim % 8 == d_v % 8 == 0 and (equal or apart)


def prepare_fa3(workload: Workload, tensors: Tensors) -> Prepared | None:
    if not fa3_has(workload.head_dim, workload.d_v):
        return None
    fa3 = importlib.import_module("flash_attn_interface")
    q, k, v = tensors.q, tensors.k, tensors.v
    mask: dict[str, Any] = {"causal": workload.causal, "window_size": workload.window}
    if workload.kind == "dense":
        return Prepared(lambda: fa3.flash_attn_func(q, k, v, **mask))
    longest_q, longest_k = max(workload.seqlens_q), max(workload.seqlens_k)
    cu_q, cu_k = tensors.cu_seqlens_q, tensors.cu_seqlens_k
    if workload.num_splits is not None:
        mask["num_splits"] = workload.num_splits
    elif workload.kind == "paged":
        mask["num_splits"] = 1  # as its own varlen function has it; decoding keeps its heuristic
    if workload.kind == "varlen":
        return Prepared(
            lambda: fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, **mask)
        )
    cache = {"page_table": tensors.block_table, **cache_arguments(tensors)}
    if workload.kind == "paged":
        cache |= {"cu_seqlens_q": cu_q, "max_seqlen_q": longest_q}
    return Prepared(lambda: fa3.flash_attn_with_kvcache(q, k, v, **cache, **mask))


# -- FlashInfer --------------------------------------------------------------------------------

FLASHINFER_PAGE = 16  # tokens; its parts of a sequence are whole pages
FLASHINFER_HEAD_DIMS = ((64, 64), (128, 128), (256, 256))  # of q and of v


@cache
def flashinfer_workspace(device: torch.device) -> torch.Tensor:
    """What all its wrappers use, one after the other."""
    return torch.zeros(256 << 20, dtype=torch.uint8, device=device)


def flashinfer_available() -> str | None:
    return missing("flashinfer") if torch.cuda.is_available() else "it needs a GPU"


def prepare_flashinfer(workload: Workload, tensors: Tensors) -> Prepared | None:
    """Packed and paged batches and decoding, planned for the very batch beforehand.

    It has windows to the left under a causal mask, and no option for one split.
    """
    left, right = workload.window
    mask: dict[str, Any] = {"causal": workload.causal}
    if workload.window != EVERYTHING:
        if not workload.causal or left < 0 or right > 0:
            return None
        mask["window_left"] = left
    head_dims = (workload.head_dim, workload.d_v)
    if workload.kind == "dense" or workload.rearranged or workload.num_splits == 1:
        return None
    if workload.kind == "varlen":
        known = head_dims in (*FLASHINFER_HEAD_DIMS, (192, 128))
        return flashinfer_packed(workload, tensors, mask) if known else None
    if head_dims not in FLASHINFER_HEAD_DIMS:
        return None
    if workload.kind == "paged":
        assert tensors.block_table is not None and tensors.cu_seqlens_q is not None
        layout = page_layout(workload, tensors.k, tensors.block_table)
        queries = tensors.cu_seqlens_q.cpu()
        return flashinfer_prefill(tensors, (queries, *layout), (tensors.k, tensors.v), mask)
    return flashinfer_decode(workload, tensors, mask)


def page_layout(workload: Workload, k: torch.Tensor, table: torch.Tensor) -> tuple[Any, ...]:
    """Which pages of k hold each sequence, as ``plan`` takes it, on the host; then the shapes."""
    page_size, heads_k = k.shape[1:3]
    lengths = torch.tensor(workload.seqlens_k, dtype=torch.int32)
    pages = (lengths + page_size - 1) // page_size
    starts = torch.zeros(workload.batch + 1, dtype=torch.int32)
    starts[1:] = pages.cumsum(0)
    rows = zip(table.cpu(), pages.tolist(), strict=True)
    used = torch.cat([row[:n] for row, n in rows])
    shapes = (workload.heads, heads_k, workload.head_dim, page_size)
    return (starts, used, lengths - (pages - 1) * page_size, *shapes)


def flashinfer_packed(workload: Workload, tensors: Tensors, mask: dict[str, Any]) -> Prepared:
    """Keys packed like the queries."""
    flashinfer = importlib.import_module("flashinfer")
    q, k, v, out = tensors.q, tensors.k, tensors.v, tensors.q.new_empty(tensors.out_shape)
    assert tensors.cu_seqlens_q is not None and tensors.cu_seqlens_k is not None
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(flashinfer_workspace(q.device), "NHD")
    wrapper.plan(
        *(tensors.cu_seqlens_q.cpu(), tensors.cu_seqlens_k.cpu()),
        *(workload.heads, workload.heads_k, workload.head_dim, workload.d_v),
        **{"q_data_type": q.dtype, "kv_data_type": k.dtype, **mask},
    )
    return Prepared(lambda: wrapper.run(q, k, v, out=out), lambda _: out)


def flashinfer_prefill(
    tensors: Tensors,
    layout: tuple[Any, ...],
    pages: tuple[torch.Tensor, torch.Tensor],
    options: dict[str, Any],
    backend: str = "auto",
) -> Prepared:
    """Several queries of each sequence, or some of one and some of many."""
    flashinfer = importlib.import_module("flashinfer")
    room = flashinfer_workspace(tensors.q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(room, "NHD", backend=backend)
    dtypes = {"q_data_type": tensors.q.dtype, "kv_data_type": pages[0].dtype}
    wrapper.plan(*layout, **dtypes, **options)
    q, out = tensors.q, tensors.q.new_empty(tensors.out_shape)
    flat_q, flat_out = (x.view(-1, *x.shape[-2:]) for x in (q, out))
    return Prepared(lambda: wrapper.run(flat_q, pages, out=flat_out), lambda _: out)


def flashinfer_decode(
    workload: Workload, tensors: Tensors, mask: dict[str, Any]
) -> Prepared | None:
    """A dense cache is pages in a row; several queries go through its FA2 kernels, which split."""
    q, k, v, table = tensors.q, tensors.k, tensors.v, tensors.block_table
    batch, seqlen_q = q.shape[:2]
    if table is None:
        if k.shape[1] % FLASHINFER_PAGE:
            return None
        k, v = (x.reshape(-1, FLASHINFER_PAGE, *x.shape[2:]) for x in (k, v))
        table = torch.arange(k.shape[0], dtype=torch.int32).view(batch, -1)
    layout = page_layout(workload, k, table)
    if seqlen_q > 1:
        queries = torch.arange(batch + 1, dtype=torch.int32) * seqlen_q
        return flashinfer_prefill(tensors, (queries, *layout), (k, v), mask, "fa2")
    flashinfer = importlib.import_module("flashinfer")
    tensor_cores = workload.heads // workload.heads_k >= 4
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        flashinfer_workspace(q.device), "NHD", use_tensor_cores=tensor_cores
    )
    window = {name: left for name, left in mask.items() if name != "causal"}
    wrapper.plan(*layout, **{"q_data_type": q.dtype, "kv_data_type": k.dtype, **window})
    out = torch.empty_like(q)
    flat_q, flat_out = q.flatten(0, 1), out.flatten(0, 1)
    return Prepared(lambda: wrapper.run(flat_q, (k, v), out=flat_out), lambda _: out)


# -- a yardstick -------------------------------------------------------------------------------

LEAST_READ = 1 << 28  # bytes; below, its two launches and what it adds up count too much


def prepare_read(workload: Workload, tensors: Tensors) -> Prepared | None:
    """Add up a dense cache: how fast this card reads so many bytes."""
    dense = workload.kind == "decode" and workload.uniform and workload.page_size is None
    if not dense or workload.rearranged or workload.kv_bytes < LEAST_READ:
        return None
    return Prepared(lambda: (torch.sum(tensors.k), torch.sum(tensors.v)))


IMPLEMENTATIONS = (
    Implementation("mini", lambda: missing("mini_flash_attention"), prepare_mini, features=True),
    Implementation("portable", portable_available, prepare_portable, portable, features=True),
    Implementation("maxima", portable_available, prepare_portable, maxima, on_request=True),
    Implementation("two", lambda: missing("mini_flash_attention"), prepare_two),
    Implementation("fa2", fa2_available, prepare_fa2, only(SDPBackend.FLASH_ATTENTION)),
    Implementation("cudnn", cudnn_available, prepare_sdpa, only(SDPBackend.CUDNN_ATTENTION)),
    Implementation("fa3", fa3_available, prepare_fa3),
    Implementation("read", lambda: None, prepare_read, attends=False),
    Implementation("flex", lambda: None, prepare_flex, on_request=True, compiles=True),
    Implementation("flashinfer", flashinfer_available, prepare_flashinfer, on_request=True),
)
