"""Calls as everybody makes them: the suites ``serving``, ``short`` and ``shapes``.

``serving`` is what an inference engine sends: prefills and decodes in one packed call, decoding
alone, drafts to verify. ``short`` has many short sequences, ``shapes`` head_dims, lengths, windows
and caches beside the usual ones.

A suite begins with calls chosen by hand. After them come calls drawn from distributions. Each
distribution is a function whose docstring says what it stands for, and has a seed of its own.
Cells may be added at the end of a suite. None may be changed or removed: tests/test_bench.py holds
their checksum. All are timed as CUDA graphs, since many take less time than the CPU needs to launch
them. The CPU's side is measured by ``--host``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from bench.workloads import MIXED, TOKENS, Kind, Workload, dense_cell

SEED = 24
PAGES = (16, 64, 128)


class Heads(NamedTuple):
    """Query heads, KV heads and head_dim of a model."""

    heads: int
    heads_k: int
    head_dim: int

    def __str__(self) -> str:
        return f"h{self.heads}-{self.heads_k}-d{self.head_dim}"


LLAMA = Heads(32, 8, 128)

MODELS = (
    LLAMA,  # Llama 3 8B, Mistral 7B, Mixtral 8x7B
    Heads(64, 8, 128),  # Llama 3 70B, Qwen 2.5 72B
    Heads(32, 8, 64),  # Llama 3.2 1B
    Heads(24, 8, 128),  # Llama 3.2 3B
    Heads(14, 2, 64),  # Qwen 2.5 0.5B
    Heads(28, 4, 128),  # Qwen 2.5 7B
    Heads(40, 8, 128),  # Qwen 2.5 14B
    Heads(32, 4, 128),  # Qwen 3 30B-A3B
    Heads(64, 4, 128),  # Qwen 3 235B-A22B
    Heads(32, 2, 128),  # GLM-4 9B
    Heads(16, 8, 256),  # Gemma 2 9B
    Heads(32, 16, 128),  # Gemma 2 27B
    Heads(8, 4, 256),  # Gemma 3 4B
    Heads(64, 8, 64),  # gpt-oss 20B and 120B
    Heads(40, 10, 128),  # Phi-3 medium
    Heads(96, 8, 128),  # Command R+
    Heads(48, 4, 128),  # StarCoder2 15B
    Heads(48, 1, 128),  # StarCoder
    Heads(71, 1, 64),  # Falcon 7B
    Heads(32, 32, 64),  # SmolLM2 1.7B
)


def seeded(name: str) -> random.Random:
    """Numbers for one purpose, which no other purpose's change moves."""
    return random.Random(f"{SEED}/{name}")


def call(
    name: str,
    kind: Kind,
    seqlens_q: Sequence[int],
    seqlens_k: Sequence[int],
    heads: Heads,
    **changes: Any,
) -> Workload:
    """A causal call as a CUDA graph."""
    return Workload(
        name=name,
        kind=kind,
        seqlens_q=tuple(seqlens_q),
        seqlens_k=tuple(seqlens_k),
        heads=heads.heads,
        heads_k=heads.heads_k,
        head_dim=heads.head_dim,
        **{"causal": True, "graph": True, **changes},
    )


def layout(page: int | None) -> str:
    return f"p{page}" if page else "dense"


# -- serving, by hand --------------------------------------------------------------------------


def mixed(prefills: int, prompt: int, decodes: int, num_splits: int = 0) -> Iterator[Workload]:
    """Prompts and, behind them, one token each of sequences with 2k to 8k cached keys."""
    draw = seeded("mixed")
    # Behind what is cached stands the new token's own key.
    keys = [draw.randint(2048, 8192) + 1 for _ in range(decodes)]
    cell = f"{'one-split' if num_splits == 1 else 'mixed'}/{prefills}x{prompt}+{decodes}"
    for page in PAGES:
        yield call(
            f"serving/{cell}/p{page}",
            "paged",
            (*(prompt,) * prefills, *(1,) * decodes),
            (*(prompt,) * prefills, *keys),
            LLAMA,
            page_size=page,
            num_splits=num_splits,
            cell=cell,
        )


def decoding(
    name: str, batch: int, heads: Heads, keys: int, page: int | None = None, queries: int = 1
) -> Workload:
    """Sequences of one length, a few queries each."""
    new = f"-q{queries}" if queries > 1 else ""
    return call(
        f"serving/{name}/{heads}/b{batch}{new}-s{keys}-{layout(page)}",
        "decode",
        (queries,) * batch,
        (keys,) * batch,
        heads,
        page_size=page,
    )


MIXES = ((4, 2000, 60), (1, 512, 60), (1, 2000, 200))
STARCODER = Heads(48, 1, 128)

SERVING_BY_HAND = (
    *(workload for mix in MIXES for workload in mixed(*mix)),
    *(
        decoding("few", batch, heads, keys)
        for heads, batch, keys in product(
            (Heads(64, 8, 128), Heads(32, 2, 128)), (1, 2, 4, 8), (2048, 4096, 8192)
        )
    ),
    decoding("one", 1, Heads(8, 1, 256), 8000, 16),
    decoding("one", 1, LLAMA, 130_000, 64),
    decoding("one", 1, LLAMA, 131_072),
    decoding("draft", 1, LLAMA, 32_000, 64, queries=4),
    decoding("draft", 1, STARCODER, 32_000, 64, queries=4),
    decoding("one", 1, STARCODER, 32_000, 64),
    # As in the mixes above, with the same bits for a sequence in any batch.
    *(workload for mix in MIXES for workload in mixed(*mix, num_splits=1)),
)


# -- short, by hand ----------------------------------------------------------------------------


def packed(count: int, seqlen: int, **changes: Any) -> Workload:
    """Short prompts."""
    kind = "one-split" if "num_splits" in changes else "packed"
    lengths = (seqlen,) * count
    return call(f"short/{kind}/{count}x{seqlen}", "varlen", lengths, lengths, LLAMA, **changes)


def tiny(count: int, keys: int, **changes: Any) -> Workload:
    """One query each, on so many keys: attention over the items of a table, a user's history."""
    kind = "one-split" if "num_splits" in changes else "tiny"
    name = f"short/{kind}/{count}x1-on-{keys}"
    return call(name, "varlen", (1,) * count, (keys,) * count, Heads(8, 2, 128), **changes)


def images(count: int, patches: int) -> Iterator[Workload]:
    """A vision transformer's batch, dense and packed, without a mask."""
    cell, lengths, heads = f"vit/{count}x{patches}", (patches,) * count, Heads(16, 16, 64)
    kinds: tuple[tuple[str, Kind], ...] = (("dense", "dense"), ("packed", "varlen"))
    for name, kind in kinds:
        yield call(f"short/{cell}/{name}", kind, lengths, lengths, heads, causal=False, cell=cell)


PACKED = ((1024, 16), (512, 64), (128, 200))
TINY = ((65536, 1), (65536, 16), (8192, 512))

SHORT_BY_HAND = (
    *(packed(*shape) for shape in PACKED),
    *(tiny(*shape) for shape in TINY),
    *(workload for shape in ((60, 257), (127, 257), (512, 64)) for workload in images(*shape)),
    *(packed(*shape, num_splits=1) for shape in PACKED),
    *(tiny(*shape, num_splits=1) for shape in TINY),
)


# -- shapes, by hand ---------------------------------------------------------------------------


def dense(name: str, heads: Heads, seqlen: int, causal: bool, **changes: Any) -> Workload:
    """About TOKENS tokens in sequences of one length."""
    batch = max(1, TOKENS // seqlen)
    plain = dense_cell(
        *(f"shapes/{name}", batch, seqlen, heads.heads, heads.head_dim),
        causal=causal,
        heads_k=heads.heads_k,
    )
    return replace(plain, graph=True, **changes)


def on_cache(name: str, **changes: Any) -> Workload:
    """512 queries each of eight sequences, on a dense cache of 4,096 slots a row."""
    lengths = tuple(4096 - pad for pad in changes.get("leftpads", (0,) * 8))
    return call(f"shapes/cache/{name}", "decode", (512,) * 8, lengths, LLAMA, **changes)


def pages_of_wide_heads(batch: int, new: int, prefix: int = 0) -> Workload:
    """Prompts at head_dim 256 in pages of 16, behind what is cached of them."""
    name = f"shapes/p16/d256/s{new}{f'-after-{prefix}' if prefix else ''}"
    lengths = ((new,) * batch, (prefix + new,) * batch)
    return call(name, "paged", *lengths, Heads(16, 8, 256), page_size=16)


def windowed(head_dim: int, window: int) -> Workload:
    """A window over packed sequences of many lengths."""
    name = f"shapes/window{window}/packed/d{head_dim}"
    heads = Heads(32, 8, head_dim)
    return call(name, "varlen", MIXED, MIXED, heads, window=(window, 0))


# Every left-padded sequence ends at the last slot, as those of a batch of prompts do.
LEFTPADS = tuple(seeded("leftpads").choices(range(3072), k=8))
MLA = Heads(16, 16, 192)

SHAPES_BY_HAND = (
    *(
        dense(name, Heads(heads, heads_k, d), seqlen, True)
        for name, heads, heads_k, d in (
            *(("mha", 32, 32, 64), ("gqa", 32, 8, 64)),
            *(("mha", 16, 16, 128), ("gqa", 32, 8, 128)),
        )
        for seqlen in (333, 400, 512, 640)
    ),
    *(
        dense("mla", MLA, seqlen, causal, head_dim_v=128)
        for causal, seqlen in product((False, True), (2048, 4096, 8192, 16384))
    ),
    call("shapes/mla/packed/causal", "varlen", MIXED, MIXED, MLA, head_dim_v=128),
    *(
        dense("wide", Heads(16, 16, 192), seqlen, causal)
        for causal, seqlen in product((False, True), (2048, 4096, 8192, 16384))
    ),
    *(
        dense("between", Heads(32, 32, d), seqlen, causal)
        for d, causal, seqlen in product((96, 80), (False, True), (8192, 16384, 32768))
    ),
    on_cache("batch-idx", cache_rows=32),
    on_cache("leftpad", leftpads=LEFTPADS),
    on_cache("both", cache_rows=32, leftpads=LEFTPADS),
    pages_of_wide_heads(4, 4096),
    pages_of_wide_heads(1, 16384),
    pages_of_wide_heads(8, 1024, prefix=8192),
    dense("window128/mha", Heads(32, 32, 64), 16384, True, window=(128, 0)),
    dense("window128/gqa", Heads(64, 8, 64), 16384, True, window=(128, 0)),
    windowed(64, 1024),
    windowed(128, 1024),
)


# -- drawn -------------------------------------------------------------------------------------

Distribution = Callable[[random.Random], Workload]  # named after what is particular about it


def drawn(suite: str, distribution: Distribution, count: int) -> Iterator[Workload]:
    """So many calls from a distribution, numbered."""
    family = f"{suite}/{distribution.__name__}"
    draw = seeded(family)
    for number in range(1, count + 1):
        workload = distribution(draw)
        yield replace(workload, name=f"{family}/{number}-{workload.name}")


def lognormal(draw: random.Random, median: int, spread: float, longest: int) -> int:
    """A length from 1 to ``longest``. Lengths of texts are about log-normal."""
    return max(1, min(longest, round(draw.lognormvariate(math.log(median), spread))))


def batch(draw: random.Random, lengths: list[tuple[int, int]]) -> Workload:
    """Sequences with (queries, keys) of one model in one packed call, in any order."""
    draw.shuffle(lengths)
    heads, page = draw.choice(MODELS), draw.choice(PAGES)
    seqlens_q, seqlens_k = zip(*lengths, strict=True)
    name = f"{heads}-p{page}"
    return call(name, "paged", seqlens_q, seqlens_k, heads, page_size=page, num_splits=0)


def conversation(draw: random.Random) -> tuple[int, int]:
    """Tokens of a prompt, with what was said before, and of its answer so far."""
    prompt = lognormal(draw, 600, 1.1, 16384)
    answer = lognormal(draw, 250, 0.9, 4096)
    return prompt, draw.randint(1, answer)


def chat(draw: random.Random) -> Workload:
    """A chat service: one to four new prompts beside 16 to 128 answers in the making.

    Prompts have 600 tokens in the median and a long tail, since they hold the conversation.
    """
    prompts = [conversation(draw)[0] for _ in range(draw.randint(1, 4))]
    running = [sum(conversation(draw)) for _ in range(draw.randint(16, 128))]
    return batch(draw, [*((n, n) for n in prompts), *((1, n) for n in running)])


def completion(draw: random.Random) -> Workload:
    """Code completion in an editor: a file around the cursor, and an answer of a line or two.

    Answers are short, so a third of the sequences have just arrived; most of their file is cached.
    """
    lengths = []
    for number in range(draw.randint(8, 48)):
        file = lognormal(draw, 1500, 0.9, 16384)
        if number == 0 or draw.random() < 1 / 3:
            lengths.append((min(file, lognormal(draw, 200, 1.2, 4096)), file))
        else:
            lengths.append((1, file + draw.randint(1, 40)))
    return batch(draw, lengths)


def retrieval(draw: random.Random) -> Workload:
    """Questions about documents: prompts of 4k to 32k tokens and short answers.

    Prompts come in chunks of 2,048 tokens, one or two of them beside 4 to 24 answers.
    """
    chunk, lengths = 2048, []
    for _ in range(draw.randint(1, 2)):
        prompt = max(4096, lognormal(draw, 10_000, 0.6, 32_768))
        done = chunk * draw.randint(0, (prompt - 1) // chunk)
        lengths.append((min(chunk, prompt - done), min(done + chunk, prompt)))
    for _ in range(draw.randint(4, 24)):
        prompt = max(4096, lognormal(draw, 10_000, 0.6, 32_768))
        lengths.append((1, prompt + draw.randint(1, 200)))
    return batch(draw, lengths)


def speculative(draw: random.Random) -> Workload:
    """Speculative decoding: each of 1 to 32 sequences verifies a token and a draft of 1 to 7.

    In half of the batches all drafts have one length; in the others each has its own.
    """
    keys = [lognormal(draw, 3000, 1.0, 32_768) for _ in range(draw.choice((1, 2, 4, 8, 16, 32)))]
    equal, common = draw.random() < 0.5, draw.randint(2, 8)
    lengths = [(q, k + q) for k in keys for q in [common if equal else draw.randint(2, 8)]]
    workload = batch(draw, lengths)
    return workload if len(set(workload.seqlens_q)) > 1 else replace(workload, kind="decode")


def answers(draw: random.Random) -> Workload:
    """A chat service between two arrivals: 1 to 64 answers in the making, in pages or dense."""
    count = draw.choice((1, 2, 4, 8, 16, 32, 64))
    lengths = [sum(conversation(draw)) for _ in range(count)]
    heads, page = draw.choice(MODELS), draw.choice((None, *PAGES))
    name = f"{heads}-{layout(page)}"
    return call(name, "decode", (1,) * count, lengths, heads, page_size=page)


ENCODERS = (
    (Heads(12, 12, 64), False),  # BERT base
    (Heads(16, 16, 64), False),  # BERT large, XLM-RoBERTa large
    (Heads(16, 8, 128), True),  # Qwen 3 Embedding 0.6B
)


def texts(draw: random.Random) -> Workload:
    """What an embedding model or a classifier gets: sentences and paragraphs, packed."""
    (heads, causal), count = draw.choice(ENCODERS), draw.choice((64, 256, 1024))
    lengths = [lognormal(draw, 45, 0.9, 512) for _ in range(count)]
    return call(f"{heads}-b{count}", "varlen", lengths, lengths, heads, causal=causal)


VISION = (
    Heads(12, 12, 64),  # ViT-B, DINOv2 base
    Heads(16, 16, 64),  # ViT-L, CLIP
    Heads(16, 16, 72),  # SigLIP so400m
    Heads(16, 16, 80),  # Qwen 2.5 VL
)


def crops(draw: random.Random) -> Workload:
    """Images of all sizes, cut into 4 to 32 patches a side and packed."""
    heads, count = draw.choice(VISION), draw.choice((16, 64, 256))
    lengths = [draw.randint(4, 32) * draw.randint(4, 32) for _ in range(count)]
    return call(f"{heads}-b{count}", "varlen", lengths, lengths, heads, causal=False)


def odd_head_dims(draw: random.Random) -> Workload:
    """Head_dims beside the powers of two, as vision, diffusion and audio models have them."""
    d = draw.choice((40, 48, 56, 72, 88, 104, 112, 120, 144, 160, 176, 208, 224))
    heads, seqlen = Heads(2048 // d, 2048 // d, d), draw.choice((1024, 2048, 4096, 8192))
    return one_length(heads, seqlen, draw.random() < 0.5)


def odd_lengths(draw: random.Random) -> Workload:
    """Lengths that no tile divides."""
    d, group = draw.choice((64, 128, 256)), draw.choice((1, 4))
    seqlen = draw.randint(129, 8191) | 1
    return one_length(Heads(2048 // d, 2048 // d // group, d), seqlen, draw.random() < 0.5)


def model_heads(draw: random.Random) -> Workload:
    """Causal prompts with the heads of a real model."""
    return one_length(draw.choice(MODELS), draw.choice((512, 1024, 2048, 4096, 8192)), True)


def one_length(heads: Heads, seqlen: int, causal: bool) -> Workload:
    """About TOKENS tokens in dense sequences."""
    mask = "causal" if causal else "none"
    return replace(dense("", heads, seqlen, causal), name=f"{heads}-{mask}-s{seqlen}")


SERVING = (
    *SERVING_BY_HAND,
    *drawn("serving", chat, 10),
    *drawn("serving", completion, 6),
    *drawn("serving", retrieval, 6),
    *drawn("serving", speculative, 6),
    *drawn("serving", answers, 6),
)
SHORT = (*SHORT_BY_HAND, *drawn("short", texts, 6), *drawn("short", crops, 4))
SHAPES = (
    *SHAPES_BY_HAND,
    *drawn("shapes", odd_head_dims, 6),
    *drawn("shapes", odd_lengths, 5),
    *drawn("shapes", model_heads, 5),
)
