"""Draws the results of the suites prefill and backward: TFLOP/s over the sequence length.

    python tools/plot_results.py [--results FOLDER] [--check]

Reads bench/results/h200/<suite>.json and writes <suite>.svg beside it. With --check nothing is
written, and the exit status is 1 if a drawing is out of date. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Head_dim, mask and tokens of a dense workload.
DENSE = {"prefill": r"prefill/d(\d+)/(\w+)/s(\d+)", "backward": r"d(\d+)/(\w+)/(\d+)"}
FOLDER = Path(__file__).resolve().parent.parent / "bench" / "results" / "h200"
# Lines, the last on top: name, colour, width.
LINES = {
    "fa2": ("FA2", "#b8b8b8", 2),
    "cudnn": ("cuDNN", "#7fb069", 2),
    "fa3": ("FA3", "#e08e45", 2),
    "mini": ("this package", "#2b59c3", 3),
}
WIDTH, HEIGHT, GAP, TOP, LEFT = 260, 170, 34, 40, 44
MOST = 800  # TFLOP/s at the top of a panel

Panel = dict[str, list[tuple[int, float]]]  # by implementation: (tokens, TFLOP/s)


def panels(result: dict[str, Any], dense: str) -> dict[tuple[int, str], Panel]:
    """By head_dim and mask: `dense` finds them in a workload's name."""
    found: dict[tuple[int, str], Panel] = {}
    for row in result["rows"]:
        cell = re.fullmatch(dense, row["workload"])
        if cell and row["implementation"] in LINES and "tflops" in row:
            panel = found.setdefault((int(cell[1]), cell[2]), {})
            panel.setdefault(row["implementation"], []).append((int(cell[3]), row["tflops"]))
    return found


def text(x: float, y: float, words: str, anchor: str = "middle", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'


def drawn(panel: Panel, title: str, x0: float, y0: float) -> Iterator[str]:
    """A panel whose upper left corner is x0, y0."""
    tokens = sorted({n for points in panel.values() for n, _ in points})
    step = WIDTH / max(1, len(tokens) - 1)

    def place(n: int, rate: float) -> str:
        return f"{x0 + step * tokens.index(n):.1f},{y0 + HEIGHT * (1 - rate / MOST):.1f}"

    yield text(x0 + WIDTH / 2, y0 - 8, title, weight="bold")
    for rate in range(0, MOST + 1, 200):
        y = y0 + HEIGHT * (1 - rate / MOST)
        yield f'<path d="M{x0:g} {y:g}h{WIDTH}" stroke="#e4e4e4"/>'
        yield text(x0 - 6, y + 4, str(rate), "end")
    for n in tokens:
        label = f"{n // 1024}k" if n >= 1024 else str(n)
        yield text(x0 + step * tokens.index(n), y0 + HEIGHT + 15, label)
    for name, (_, colour, width) in LINES.items():
        points = " ".join(place(n, rate) for n, rate in sorted(panel.get(name, [])))
        style = f'fill="none" stroke="{colour}" stroke-width="{width}"'
        yield f'<polyline points="{points}" {style}/>'


def svg(result: dict[str, Any], dense: str) -> str:
    found = panels(result, dense)
    dims, masks = sorted({d for d, _ in found}), sorted({m for _, m in found}, reverse=True)
    width = LEFT + len(dims) * (WIDTH + GAP + 10)
    height = TOP + len(masks) * (HEIGHT + GAP + 20)
    parts = ['<rect width="100%" height="100%" fill="white"/>']
    for n, (label, colour, _) in enumerate(LINES.values()):
        x = LEFT + 150 * n
        parts.append(f'<path d="M{x} 12h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(text(x + 30, 16, label, "start"))
    parts.append(text(width - 20, 16, f"TFLOP/s, {result['gpu']}, bf16", "end"))
    for column, head_dim in enumerate(dims):
        for line, mask in enumerate(masks):
            title = f"head_dim {head_dim}, {'causal' if mask == 'causal' else 'no mask'}"
            x0, y0 = LEFT + column * (WIDTH + GAP + 10), TOP + 12 + line * (HEIGHT + GAP + 20)
            parts += drawn(found.get((head_dim, mask), {}), title, x0, y0)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="11">', *parts, "</svg>\n"])


def main(argv: Sequence[str] | None = None) -> int:
    """Draws or checks the drawing; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    options = parser.parse_args(argv)
    outdated = 0
    for suite, dense in DENSE.items():
        results, drawing = options.results / f"{suite}.json", options.results / f"{suite}.svg"
        if not results.is_file():
            continue
        fresh = svg(json.loads(results.read_text()), dense)
        if not drawing.is_file() or drawing.read_text() != fresh:
            outdated += 1
            if not options.check:
                drawing.write_text(fresh)
    return int(options.check and outdated > 0)


if __name__ == "__main__":
    sys.exit(main())
