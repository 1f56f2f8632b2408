"""What is measured: workloads by name, their work in FLOPs or bytes, and their tensors.

A workload says nothing about who computes it or how it is timed. torch is imported only where
tensors are made, so that the suites can be listed anywhere.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Kind = Literal["dense", "varlen", "paged", "decode"]
Window = tuple[int, int]

EVERYTHING: Window = (-1, -1)
TOKENS = 16 * 1024  # batch * seqlen of every prefill cell
WIDTH = 2048  # heads * head_dim of every prefill cell
SPARE_PAGES = 8  # pages of the pool that no sequence owns


def visible_area(seqlen_q: int, seqlen_k: int, causal: bool, window: Window = EVERYTHING) -> int:
    """Pairs (query, key) that see each other: causal and windows align to the bottom right."""
    left, right = window
    if causal:
        right = 0

    def positive(n: int) -> int:  # the sum of the positive integers below n
        return n * (n - 1) // 2 if n > 0 else 0

    def up_to(distance: int) -> int:  # pairs whose key stands at most so far after the query
        # The first query has so many keys up to there, each one after it one more, and none has
        # more than seqlen_k.
        keys = seqlen_k - seqlen_q + distance + 1
        over = keys - seqlen_k
        counted = positive(keys + seqlen_q) - positive(keys)
        return counted - (positive(over + seqlen_q) - positive(over))

    area = up_to(right) if right >= 0 else seqlen_q * seqlen_k
    return area - (up_to(-left - 1) if left >= 0 else 0)


def visible_keys(seqlen_q: int, seqlen_k: int, causal: bool, window: Window = EVERYTHING) -> int:
    """Keys that at least one query sees: what a kernel has to read."""
    left = window[0]
    if seqlen_q == 0:
        return 0
    # The right edge hides no key: the last query stands at the last key.
    return seqlen_k - max(0, seqlen_k - seqlen_q - left) if left >= 0 else seqlen_k


@dataclass(frozen=True)
class Tensors:
    """One set of inputs. Token-packed q (total, heads, head_dim) when ``cu_seqlens_q`` is there."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqlens_k: torch.Tensor  # (batch,) int32, on the device: where the keys end
    block_table: torch.Tensor | None
    cache_batch_idx: torch.Tensor | None = None  # (batch,) int32: rows of the cache
    leftpads: torch.Tensor | None = None  # (batch,) int32: where the keys begin

    @property
    def out_shape(self) -> tuple[int, ...]:
        """That of q, with v's head_dim."""
        return (*self.q.shape[:-1], self.v.shape[-1])

    def of_queries(
        self, workload: Workload, entry: int, packed_or_dense: torch.Tensor
    ) -> torch.Tensor:
        """The rows of batch entry ``entry`` in q or in an output."""
        if self.cu_seqlens_q is None:
            return packed_or_dense[entry]
        start = sum(workload.seqlens_q[:entry])
        return packed_or_dense[start : start + workload.seqlens_q[entry]]

    def of_keys(self, workload: Workload, entry: int, keys_or_values: torch.Tensor) -> torch.Tensor:
        """The rows of batch entry ``entry`` in k or v, pages put in order."""
        length = workload.seqlens_k[entry]
        if self.block_table is not None:
            assert workload.page_size is not None
            used = self.block_table[entry, : -(-length // workload.page_size)].long()
            return keys_or_values[used].flatten(0, 1)[:length]
        if self.cu_seqlens_k is not None:
            start = sum(workload.seqlens_k[:entry])
            return keys_or_values[start : start + length]
        row = entry if self.cache_batch_idx is None else int(self.cache_batch_idx[entry])
        start = workload.leftpads[entry] if workload.leftpads else 0
        return keys_or_values[row, start : start + length]


class Data(NamedTuple):
    """What q and k are like, and so their scores. ``data.py`` says how each kind is made."""

    kind: Literal["normal", "first", "anywhere", "recency", "model"] = "normal"
    nats: float = 0.0  # what keys score that stand out
    one_in: int = 1  # of so many KV heads has them
    layer: int = 0  # of the model


NORMAL = Data()


@dataclass(frozen=True)
class Workload:
    """One call, described: every kind is a list of sequences with their lengths.

    ``dense``: q, k, v (batch, seqlen, heads, head_dim). ``varlen``: tokens packed, cu_seqlens.
    ``paged``: queries packed, keys in pages behind a block table. ``decode``: queries dense,
    keys in a cache, dense or (with ``page_size``) paged. A dense cache may have more rows than
    the batch has sequences, and keys may begin behind some slots that are not in use.
    """

    name: str
    kind: Kind
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    heads: int
    heads_k: int
    head_dim: int
    causal: bool = False
    window: Window = EVERYTHING
    dtype: str = "bfloat16"
    page_size: int | None = None
    graph: bool = False  # timed as a CUDA graph
    cell: str = ""  # workloads of one cell are timed together, round by round
    feature: str = (
        ""  # what becomes of scores: softcap, alibi, sinks, score_mod (which does nothing)
    )
    head_dim_v: int = 0  # 0: as head_dim
    cache_rows: int = 0  # of a dense cache, from which cache_batch_idx picks; 0: one a sequence
    leftpads: tuple[int, ...] = ()  # slots before the first of seqlens_k keys; (): none
    num_splits: int | None = None  # None: what each implementation does unasked
    data: Data = NORMAL

    def __post_init__(self) -> None:
        if len(self.seqlens_q) != len(self.seqlens_k) or not self.seqlens_q:
            raise ValueError(f"{self.name}: seqlens_q and seqlens_k need one length a sequence")
        if self.heads % self.heads_k:
            raise ValueError(f"{self.name}: heads must be a multiple of heads_k")
        if self.kind in ("dense", "decode") and len(set(self.seqlens_q)) != 1:
            raise ValueError(f"{self.name}: {self.kind} queries have one length")
        if self.kind == "dense" and len(set(self.seqlens_k)) != 1:
            raise ValueError(f"{self.name}: dense keys have one length")
        if (self.page_size is not None) != (self.kind == "paged" or self.decodes_pages):
            raise ValueError(f"{self.name}: page_size goes with paged keys")
        if (self.cache_rows or self.leftpads) and (self.kind != "decode" or self.decodes_pages):
            raise ValueError(f"{self.name}: cache_rows and leftpads go with a dense cache")
        if self.cache_rows and self.cache_rows < self.batch:
            raise ValueError(f"{self.name}: cache_rows must be at least one a sequence")
        if self.leftpads and len(self.leftpads) != self.batch:
            raise ValueError(f"{self.name}: leftpads need one a sequence")
        plain = self.kind in ("dense", "decode") and self.uniform and not self.rearranged
        if self.data != NORMAL and (not plain or self.page_size is not None):
            raise ValueError(f"{self.name}: data go with dense keys of one length")

    @property
    def decodes_pages(self) -> bool:
        return self.kind == "decode" and self.page_size is not None

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    @property
    def uniform(self) -> bool:
        return len(set(self.seqlens_q)) == len(set(self.seqlens_k)) == 1

    @property
    def d_v(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def rearranged(self) -> bool:
        """Whether the cache's rows or first slots are not those of a plain cache."""
        return bool(self.cache_rows or self.leftpads)

    @property
    def cold(self) -> bool:
        """Whether keys lie in a cache, which no call may find in the L2."""
        return self.kind == "decode" or (self.graph and self.seqlens_q != self.seqlens_k)

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each sequence's keys end, counted from its first slot."""
        pads = self.leftpads or (0,) * self.batch
        return tuple(pad + length for pad, length in zip(pads, self.seqlens_k, strict=True))

    @property
    def group(self) -> str:
        """The name without its last part: what a geometric mean runs over."""
        return self.name.rpartition("/")[0]

    @property
    def variant(self) -> tuple[object, ...]:
        """Workloads that may share compiled kernels: all but the lengths and the batch."""
        shared_heads = self.heads // self.heads_k
        window = (self.window[0] >= 0, self.window[1] >= 0)
        return (
            *(self.kind, self.head_dim, self.causal, window),
            *(self.dtype, self.page_size, shared_heads, self.feature),
            *(self.d_v, self.cache_rows > 0, bool(self.leftpads), self.num_splits),
        )

    @cached_property
    def flops(self) -> int:
        """Two matrix products over the visible area, a multiply and an add each."""
        area = sum(
            visible_area(q, k, self.causal, self.window)
            for q, k in zip(self.seqlens_q, self.seqlens_k, strict=True)
        )
        return 2 * area * self.heads * (self.head_dim + self.d_v)

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of K and V that have to be read once."""
        keys = sum(
            visible_keys(q, k, self.causal, self.window)
            for q, k in zip(self.seqlens_q, self.seqlens_k, strict=True)
        )
        return keys * self.heads_k * (self.head_dim + self.d_v) * self.itemsize

    @property
    def itemsize(self) -> int:
        return {"float16": 2, "bfloat16": 2, "float32": 4}[self.dtype]

    @property
    def tensor_bytes(self) -> int:
        """About how much memory one set of inputs takes."""
        rows = sum(self.seqlens_k)
        if self.kind == "decode":
            rows = (self.cache_rows or self.batch) * max(self.ends)
        keys_and_values = rows * self.heads_k * (self.head_dim + self.d_v)
        queries = sum(self.seqlens_q) * self.heads * self.head_dim
        return (keys_and_values + queries) * self.itemsize

    @property
    def unit(self) -> Literal["tflops", "gigabytes_per_second"]:
        """Decoding is bound by reading the cache, prefill by arithmetic."""
        return "gigabytes_per_second" if self.kind == "decode" else "tflops"

    def rate(self, milliseconds: float) -> float:
        if self.kind == "decode":
            return self.kv_bytes / milliseconds * 1e-6
        return self.flops / milliseconds * 1e-9

    def scores(self, device: torch.device) -> dict[str, Any]:
        """The feature's arguments, as flash-attn names them; without the score_mod."""
        import torch

        heads = torch.arange(1, self.heads + 1, device=device)
        arguments: dict[str, dict[str, Any]] = {
            "softcap": {"softcap": 30.0},
            "alibi": {"alibi_slopes": 2.0 ** (-8.0 * heads / self.heads)},
            "sinks": {"s_aux": torch.sin(heads.float())},
        }
        return arguments.get(self.feature, {})

    def tensors(self, device: torch.device, copy: int = 0) -> Tensors:
        """Random normal inputs, changed to what ``data`` says; the seed comes from the name and the
        number of the copy.
        """
        import torch

        from bench.data import shape

        seed = zlib.crc32(f"{self.name}#{copy}".encode())
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        packed = self.kind in ("varlen", "paged")
        rows_q = (sum(self.seqlens_q),) if packed else (self.batch, self.seqlens_q[0])
        block_table = batch_idx = None
        rows_k: tuple[int, ...]
        if self.page_size is not None:
            counts = [-(-length // self.page_size) for length in self.seqlens_k]
            pages = sum(counts) + SPARE_PAGES
            shuffled = torch.randperm(pages, generator=generator, device=device).int()
            block_table = block_table_of(counts, shuffled)
            rows_k = (pages, self.page_size)
        elif packed:
            rows_k = (sum(self.seqlens_k),)
        else:
            rows_k = (self.cache_rows or self.batch, max(self.ends))
        if self.cache_rows:
            chosen = torch.randperm(self.cache_rows, generator=generator, device=device)
            batch_idx = chosen[: self.batch].int()
        normal_inputs = Tensors(
            q=normal(*rows_q, self.heads, self.head_dim),
            k=normal(*rows_k, self.heads_k, self.head_dim),
            v=normal(*rows_k, self.heads_k, self.d_v),
            cu_seqlens_q=offsets(self.seqlens_q, device) if packed else None,
            cu_seqlens_k=offsets(self.seqlens_k, device) if packed else None,
            seqlens_k=int32(self.ends, device),
            block_table=block_table,
            cache_batch_idx=batch_idx,
            leftpads=int32(self.leftpads, device) if self.leftpads else None,
        )
        return shape(self, normal_inputs, generator)


def int32(values: Sequence[int], device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.int32, device=device)


def offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """cu_seqlens of sequences with these lengths."""
    return int32([0, *accumulate(lengths)], device)


def block_table_of(counts: Sequence[int], pages: torch.Tensor) -> torch.Tensor:
    """Pages dealt out in their order, so many to each sequence; 0 where a row has no more."""
    import torch

    owned = torch.tensor(counts, device=pages.device)[:, None]
    column = torch.arange(max(counts), device=pages.device)[None]
    dealt = (owned.cumsum(0) - owned + column).clamp(max=len(pages) - 1)
    return torch.where(column < owned, pages[dealt], 0)


def ragged_lengths(total: int, count: int, seed: int = 1) -> tuple[int, ...]:
    """``count`` lengths of at least 1 that add up to ``total``: a seeded random cut of it."""
    cuts = sorted(random.Random(seed).sample(range(1, total), count - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))


def prefill_cell(head_dim: int, causal: bool, seqlen: int) -> Iterator[Workload]:
    """The dense workload first, then the same tokens packed, ragged and paged."""
    batch = TOKENS // seqlen
    heads = WIDTH // head_dim
    cell = f"d{head_dim}/{'causal' if causal else 'none'}/s{seqlen}"

    def workload(
        prefix: str, kind: Kind, lengths: tuple[int, ...], page: int | None = None
    ) -> Workload:
        return Workload(
            name=f"{prefix}/{cell}",
            kind=kind,
            seqlens_q=lengths,
            seqlens_k=lengths,
            heads=heads,
            heads_k=heads,
            head_dim=head_dim,
            causal=causal,
            page_size=page,
            cell=cell,
        )

    equal = (seqlen,) * batch
    yield workload("dense", "dense", equal)
    yield workload("varlen", "varlen", equal)
    if batch > 1:
        yield workload("ragged", "varlen", ragged_lengths(TOKENS, batch))
    for page in (16, 256):
        yield workload(f"paged/p{page}", "paged", equal, page)


def small(name: str, kind: Kind, lengths: tuple[int, ...], **changes: object) -> Workload:
    """A workload of a few microseconds on a GPU."""
    fields: dict[str, object] = {
        "seqlens_q": (1,) * len(lengths) if kind == "decode" else lengths,
        "seqlens_k": lengths,
        "heads": 8,
        "heads_k": 2,
        "head_dim": 64,
        "causal": True,
    }
    return Workload(name=name, kind=kind, **{**fields, **changes})  # type: ignore[arg-type]


PORTABLE = tuple(
    workload
    for head_dim, causal, seqlen in product((64, 128), (False, True), (1024, 4096, 16384))
    for workload in prefill_cell(head_dim, causal, seqlen)
)


def decode_cell(
    batch: int,
    heads: int,
    heads_k: int,
    seqlen: int,
    pages: tuple[int, ...] = (),
    seqlen_q: int = 1,
    dtype: str = "bfloat16",
    lengths: tuple[int, ...] = (),
) -> Iterator[Workload]:
    """A cache of head_dim 128 read once, in a CUDA graph: dense, then the same in pages."""
    queries = f"/q{seqlen_q}" if seqlen_q > 1 else ""
    cell = f"b{batch}/h{heads}-{heads_k}{queries}/{'ragged' if lengths else seqlen}"
    for page in (None, *pages):
        yield Workload(
            name=f"decode/{cell}/{f'p{page}' if page else 'dense'}",
            kind="decode",
            seqlens_q=(seqlen_q,) * batch,
            seqlens_k=lengths or (seqlen,) * batch,
            heads=heads,
            heads_k=heads_k,
            head_dim=128,
            causal=True,
            dtype=dtype,
            page_size=page,
            graph=True,
            cell=cell,
        )


def uniform_lengths(count: int, longest: int, seed: int = 1) -> tuple[int, ...]:
    """``count`` lengths drawn from 1 to ``longest``."""
    draw = random.Random(seed)
    return tuple(draw.randint(1, longest) for _ in range(count))


RAGGED = uniform_lengths(64, 16 * 1024)

PAGES = (1, 16, 64, 256)
PAGED = ((1, 32, 1024), (16, 32, 4096), (1, 32, 128 * 1024), (16, 64, 16 * 1024))

DECODE = tuple(
    workload
    for cell in (
        # batch 24, 24 heads of fp16: the table of a small educational project
        *(decode_cell(24, 24, 24, s, (16,), dtype="float16") for s in (512, 2048, 8192)),
        # grouped heads, from latency to bandwidth; batch 64 x 128k would take 34 GB
        *(
            decode_cell(batch, heads, 8, seqlen, PAGES if (batch, heads, seqlen) in PAGED else ())
            for heads, batch, seqlen in product(
                (32, 64), (1, 4, 16, 64), (1024, 4096, 16 * 1024, 128 * 1024)
            )
            if batch * seqlen < 64 * 128 * 1024
        ),
        decode_cell(64, 32, 8, 8192, PAGES),
        # ragged, and an even batch of as many keys
        decode_cell(64, 32, 8, 0, (16,), lengths=RAGGED),
        decode_cell(64, 32, 8, sum(RAGGED) // 64 // 256 * 256, (16,)),
        # several query tokens: speculative decoding
        *(decode_cell(16, 32, 8, 4096, (16,), seqlen_q=n) for n in (4, 8)),
    )
    for workload in cell
)

# More query tokens of a long cache than decoding has: a prompt in chunks, a tree of drafts.
CHUNKED = tuple(
    workload
    for batch, seqlen_q, seqlen in (
        *((1, 32, 4096), (1, 32, 32768), (1, 128, 32768), (1, 512, 32768)),
        *((4, 16, 8192), (4, 64, 8192), (16, 32, 4096), (64, 32, 1024)),
    )
    for workload in decode_cell(batch, 32, 8, seqlen, (16,), seqlen_q=seqlen_q)
)


def dense_cell(
    name: str, batch: int, seqlen: int, heads: int, head_dim: int, *, causal: bool,
    heads_k: int = 0, window: tuple[int, int] = EVERYTHING, dtype: str = "bfloat16",
) -> Workload:  # fmt: skip
    mask = "causal" if causal else "none"
    return Workload(
        name=f"{name}/d{head_dim}/{mask}/s{seqlen}",
        kind="dense",
        seqlens_q=(seqlen,) * batch,
        seqlens_k=(seqlen,) * batch,
        heads=heads,
        heads_k=heads_k or heads,
        head_dim=head_dim,
        causal=causal,
        window=window,
        dtype=dtype,
    )


PREFILL = (
    *(
        dense_cell("prefill", TOKENS // s, s, WIDTH // d, d, causal=causal)
        for d, causal, s in product(
            (64, 128, 256), (False, True), (512, 1024, 2048, 4096, 8192, 16384)
        )
    ),
    # batch 48, 24 heads of fp16: the table of a small educational project
    *(
        dense_cell("table", 48, s, 24, 128, causal=False, dtype="float16")
        for s in (256, 512, 1024, 2048, 4096)
    ),
    dense_cell("gqa", 4, 4096, 32, 128, heads_k=8, causal=True),
    dense_cell("window", 1, 16384, 16, 128, causal=True, window=(4096, 0)),
)


def mixed_lengths(total: int, shortest: int, longest: int, seed: int = 1) -> tuple[int, ...]:
    """Lengths drawn from shortest to longest, until they are ``total`` tokens."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, draw.randint(shortest, longest)))
    return tuple(lengths)


MIXED = mixed_lengths(2 * TOKENS, 32, 4096)

VARLEN = (
    *(
        Workload(
            name=f"varlen/d{d}/{'causal' if causal else 'none'}",
            kind="varlen",
            seqlens_q=MIXED,
            seqlens_k=MIXED,
            heads=WIDTH // d,
            heads_k=WIDTH // d,
            head_dim=d,
            causal=causal,
        )
        for d, causal in product((64, 128, 256), (False, True))
    ),
    *(  # 1 k new tokens after 8 k that lie in the cache
        Workload(
            name=f"prefix/d128/p{page}",
            kind="paged",
            seqlens_q=(1024,) * 8,
            seqlens_k=(9 * 1024,) * 8,
            heads=32,
            heads_k=8,
            head_dim=128,
            causal=True,
            page_size=page,
        )
        for page in (16, 256)
    ),
)

# One of each kind, small: shows within seconds that the harness runs on a machine.
SMOKE = (
    small("smoke/dense", "dense", (100, 100)),
    small("smoke/window", "dense", (100, 100), window=(30, 0)),
    small("smoke/varlen", "varlen", (1, 37, 100)),
    small("smoke/paged", "paged", (1, 37, 100), page_size=16),
    small("smoke/prefix", "paged", (50, 100), seqlens_q=(7, 20), page_size=16),
    small("smoke/decode", "decode", (100, 100)),
    small("smoke/decode-graph", "decode", (100, 100), graph=True),
    small("smoke/decode-ragged", "decode", (1, 37, 100)),
    small("smoke/decode-paged", "decode", (1, 37, 100), page_size=16, graph=True),
    small("smoke/mixed", "paged", (20, 37, 100), seqlens_q=(20, 1, 3), page_size=16, graph=True),
    small("smoke/one-split", "paged", (20, 100), seqlens_q=(20, 1), page_size=16, num_splits=1),
    small("smoke/varlen-window", "varlen", (1, 37, 100), window=(30, 0)),
    small("smoke/head-dim-v", "dense", (100, 100), head_dim=192, head_dim_v=128),
    small("smoke/varlen-head-dim-v", "varlen", (1, 37, 100), head_dim=192, head_dim_v=128),
    small("smoke/cache-batch-idx", "decode", (37, 100), seqlens_q=(20, 20), cache_rows=5),
    small("smoke/cache-leftpad", "decode", (37, 100), seqlens_q=(20, 20), leftpads=(63, 5)),
)

# Calls so small that only the CPU's side of them takes time.
HOST = (
    small("host/dense", "dense", (64,), head_dim=128),
    # As small as a call of the Hopper kernel gets.
    small("host/large", "dense", (512,), heads=64, heads_k=64),
    small("host/varlen", "varlen", (32, 32), head_dim=128),
    small("host/paged", "paged", (32, 32), head_dim=128, page_size=16),
    small("host/decode", "decode", (64,), head_dim=128),
    small("host/decode-paged", "decode", (64,), head_dim=128, page_size=16),
    small("host/decode-parts", "decode", (4096,), head_dim=128),  # two launches
)

FEATURED = ("", "softcap", "alibi", "sinks", "score_mod")


def with_features(plain: Workload) -> Iterator[Workload]:
    """The call with each feature, timed beside the one without."""
    for feature in FEATURED:
        name = f"{plain.name}/{feature or 'plain'}"
        yield replace(plain, name=name, feature=feature, cell=plain.name)


FEATURES = tuple(
    workload
    for plain in (
        *(
            dense_cell("features", TOKENS // s, s, WIDTH // d, d, causal=causal)
            for d, (s, causal) in product(
                (64, 128, 256), ((4096, False), (4096, True), (16384, True))
            )
        ),
        *(replace(w, name=f"features/{w.name}") for w in decode_cell(16, 32, 8, 4096, (16,))),
    )
    for workload in with_features(plain)
)
