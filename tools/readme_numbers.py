"""Writes the measured numbers of README.md and docs/results.md from the benchmark's result files.

    python tools/readme_numbers.py [--check] [--results FOLDER] [--readme FILE]
                                   [--results-page FILE]

FOLDER is bench/results/h200 by default. The tool replaces what stands between the comments in the
two documents: the ratios and the summary in the README, and all tables in the results page. With
--check it writes nothing, and the exit status is 1 if a document is out of date. Suites without a
result file are left out. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("prefill", "backward", "varlen", "portable", "decode", "chunked", "features", "host")
BEGIN = "<!-- numbers, {}: written by tools/readme_numbers.py, not by hand -->"
END = "<!-- end of numbers -->"

# What the columns are called; others appear under their own name, after these.
NAMES = {
    "mini": "this package",
    "deterministic": "deterministic",
    "fa2": "FA2 (SDPA)",
    "cudnn": "cuDNN (SDPA)",
    "sdpa": "SDPA",
    "fa3": "FA3",
    "portable": "portable kernel",
    "flashinfer": "FlashInfer",
    "flex": "FlexAttention",
}
MASKS = {"none": "–", "full": "–", "causal": "causal"}
MOST_DECODE_ROWS = 16  # a suite with more workloads gets a line for each group of them

Row = dict[str, Any]
Rows = Mapping[tuple[str, str], Row]  # by workload and implementation
Results = Mapping[str, dict[str, Any]]  # by suite


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks both documents; returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes the measured numbers of the documents.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "h200")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results-page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    options = parser.parse_args(argv)
    files = {suite: options.results / f"{suite}.json" for suite in SUITES}
    results = {suite: read(file) for suite, file in files.items() if file.is_file()}
    if not results:
        print(f"readme_numbers: no results in {options.results} (make bench writes them)")
        return 0 if options.check else 1

    documents = {
        options.readme: {"ratios": ratios(results), "summary": summary(results)},
        options.results_page: {"tables": tables(results)},
    }
    outdated: dict[Path, str] = {}
    for file, blocks in documents.items():
        text = fresh = file.read_text()
        for block, content in blocks.items():
            try:
                fresh = replaced(fresh, block, content)
            except ValueError as error:
                print(f"readme_numbers: {file}: {error}")
                return 1
        if fresh != text:
            outdated[file] = fresh
    for file, fresh in outdated.items():
        if options.check:
            print(f"readme_numbers: {file} is out of date: python tools/readme_numbers.py")
        else:
            file.write_text(fresh)
    return 1 if outdated and options.check else 0


def replaced(text: str, block: str, content: str) -> str:
    """The text with new content in the named block."""
    begin = BEGIN.format(block)
    before, found, rest = text.partition(begin)
    old, end, after = rest.partition(END)
    if not found or not end or begin in rest or "<!--" in old:
        raise ValueError(f"expected {begin} and then {END}, once")
    return f"{before}{begin}\n{content}\n{END}{after}"


def read(file: Path) -> dict[str, Any]:
    """A results file; rows that failed carry "error" in place of their figures."""
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def tables(results: Results) -> str:
    """The block of the results page: every table, by suite."""
    writers = {
        "prefill": hopper, "backward": backward, "varlen": layouts, "portable": prefill,
        "decode": decode, "chunked": chunked, "features": features, "host": host,
    }  # fmt: skip
    parts: list[str] = []
    origin = ""
    for suite, result in results.items():
        if origin != (origin := where_from(result)):
            parts.append(origin)
        parts += writers[suite](result, by_name(result["rows"]))
    return "\n\n".join(parts)


def where_from(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    shown = {"torch": "torch", "triton": "Triton", "cuda": "CUDA", "cudnn": "cuDNN", "fa3": "FA3"}
    software = ", ".join(f"{shown[n]} {versions[n]}" for n in shown if n in versions)
    return f"One {result['gpu']}, {result['date']}, commit `{result['commit']}`; {software}."


def by_name(rows: Iterable[Row]) -> Rows:
    return {(row["workload"], row["implementation"]): row for row in rows}


def implementations(rows: Rows) -> list[str]:
    """Ours first, then the peers that were measured."""
    present = {implementation for _, implementation in rows}
    return [n for n in NAMES if n in present] + sorted(present - set(NAMES))


def name(implementation: str) -> str:
    return NAMES.get(implementation, implementation)


def rate(rows: Rows, workload: str, implementation: str) -> float | None:
    """TFLOP/s or GB/s; None where it was not measured or failed."""
    row = rows.get((workload, implementation), {})
    value = row.get("tflops", row.get("gigabytes_per_second"))
    return None if value is None else float(value)


def figure(rows: Rows, workload: str, implementation: str) -> str:
    value = rate(rows, workload, implementation)
    if value is not None:
        return f"{value:,.0f}"
    return "failed" if "error" in rows.get((workload, implementation), {}) else ""


def ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else ""


def table(head: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown: the first `words` columns to the left, the others to the right."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


# -- the README ------------------------------------------------------------------------------------

SUMMARY = {
    "prefill": "prefill",
    "backward": "gradients",
    "varlen": "packed and paged prefill",
    "decode": "decoding",
    "chunked": "16 to 512 queries beside a cache",
    "portable": "prefill, portable kernel",
}
SUMMARY_PEERS = ("fa3", "cudnn", "fa2", "flashinfer")
PLOTTED = ("fa3", "cudnn", "fa2")


def speedups(rows: Rows, peer: str, prefix: str = "") -> dict[str, float]:
    """Our speed over a peer's, for each workload that both were measured on."""
    pairs = {
        workload: (rate(rows, workload, "mini"), rate(rows, workload, peer))
        for workload, _ in rows
        if workload.startswith(prefix)
    }
    return {w: ours / theirs for w, (ours, theirs) in pairs.items() if ours and theirs}


def worst_cell(by_peer: Mapping[str, Mapping[str, float]]) -> str:
    """The smallest speedup over any of the peers, and its workload."""
    cells = [
        (speedup, peer, workload)
        for peer, of_peer in by_peer.items()
        for workload, speedup in of_peer.items()
    ]
    speedup, peer, workload = min(cells)
    return f"{speedup:.2f} × {name(peer)}, `{workload}`"


def paragraph(sentence: str) -> str:
    return textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False)


def ratios(results: Results) -> str:
    """One sentence for the plot: the geometric mean over each peer, and the worst cell."""
    rows = by_name(results.get("prefill", {}).get("rows", []))
    found = {peer: speedups(rows, peer, "prefill/") for peer in PLOTTED}
    by_peer = {peer: of_peer for peer, of_peer in found.items() if of_peer}
    if not by_peer:
        return ""
    calls = max(map(len, by_peer.values()))
    parts = [f"{geometric_mean(s.values()):.2f} × {name(peer)}" for peer, s in by_peer.items()]
    return paragraph(
        f"In the {calls} calls of the plot this package's speed is {', '.join(parts)} (geometric "
        f"means); the worst cell is {worst_cell(by_peer)}."
    )


def summary(results: Results) -> str:
    """A line for each suite: the mean and the worst speedup over each peer; what features cost."""
    lines = []
    for suite, words in SUMMARY.items():
        rows = by_name(results.get(suite, {}).get("rows", []))
        found = {peer: speedups(rows, peer) for peer in SUMMARY_PEERS}
        by_peer = {peer: of_peer for peer, of_peer in found.items() if of_peer}
        if not by_peer:
            continue
        cells = [mean_and_worst(list(of_peer.values())) for of_peer in found.values()]
        ours = sum(implementation == "mini" for _, implementation in rows)
        lines.append([words, str(ours), *cells, worst_cell(by_peer)])
    if not lines:
        return ""
    head = ["suite", "calls", *map(name, SUMMARY_PEERS), "worst cell"]
    parts = [table(head, lines)]
    rows = by_name(results.get("features", {}).get("rows", []))
    shares = {words: shares_of_plain(rows, feature) for feature, words in FEATURES.items()}
    left = [f"{words} {mean_and_worst(some)}" for words, some in shares.items() if some]
    if left:
        kept = "Prefill with a feature, as a share of the plain call's speed, mean (worst)"
        parts.append(paragraph(f"{kept}: {', '.join(left)}."))
    return "\n\n".join(parts)


def mean_and_worst(shares: Sequence[float]) -> str:
    return f"{geometric_mean(shares):.2f} ({min(shares):.2f})" if shares else ""


def shares_of_plain(rows: Rows, feature: str) -> list[float]:
    """Our speed with a feature over the plain call's, for each dense call of the suite."""
    shares = []
    for workload in dict.fromkeys(workload for workload, _ in rows):
        if not re.fullmatch(rf"features/d\d+/\w+/s\d+/{feature}", workload):
            continue
        plain = workload.removesuffix(feature) + "plain"
        ours, base = rate(rows, workload, "mini"), rate(rows, plain, "mini")
        if ours and base:
            shares.append(ours / base)
    return shares


# -- the Hopper kernel -----------------------------------------------------------------------------


def hopper(result: Mapping[str, Any], rows: Rows) -> list[str]:
    """Dense calls, ours and the peers', and the geometric means of their ratios."""
    columns = implementations(rows)
    cells, others = dense_cells(rows, r"prefill/d(\d+)/(\w+)/s(\d+)")
    return [
        "**Forward pass on Hopper, TFLOP/s** (bf16, batch × tokens = 16,384, heads × head_dim = "
        "2,048):",
        dense_table(rows, columns, cells),
        means(rows, [cell.string for cell in cells], columns),
        means(
            rows,
            [cell.string for cell in cells if int(cell[3]) >= LONG],
            columns,
            " (2,048 tokens and more, where CPU launch time does not matter)",
        ),
        "Other dense calls at head_dim 128:",
        other_table(rows, columns, {w: OTHERS.get(w.split("/")[0], w) for w in others}),
    ]


OTHERS = {
    "table": "batch 48, 24 heads of fp16, no mask",
    "gqa": "32 query heads, 8 KV heads, causal",
    "window": "causal, a window of 4,096",
}


def dense_cells(rows: Rows, pattern: str) -> tuple[list[re.Match[str]], list[str]]:
    """Workloads whose names give head_dim, mask and tokens, and the others."""
    workloads = list(dict.fromkeys(workload for workload, _ in rows))
    cells = [m for w in workloads if (m := re.fullmatch(pattern, w))]
    return cells, [w for w in workloads if not re.fullmatch(pattern, w)]


def dense_table(rows: Rows, columns: Sequence[str], cells: Sequence[re.Match[str]]) -> str:
    lines = []
    for cell in cells:
        head_dim, mask, tokens = cell.groups()
        line = [head_dim, MASKS.get(mask, mask), f"{int(tokens):,}"]
        line += [figure(rows, cell.string, n) for n in columns]
        ours = rate(rows, cell.string, "mini")
        lines.append([*line, ratio(ours, rate(rows, cell.string, "fa3"))])
    head = ["head_dim", "mask", "tokens", *map(name, columns), "ours / FA3"]
    return table(head, lines, words=3)


def other_table(rows: Rows, columns: Sequence[str], others: Mapping[str, str]) -> str:
    """others: what each workload is called. Its name ends with the tokens, if it has one length."""
    lines = []
    for workload, words in others.items():
        tokens = re.search(r"/s?(\d+)$", workload)
        line = [words, tokens[1] if tokens else "", *(figure(rows, workload, n) for n in columns)]
        lines.append([*line, ratio(rate(rows, workload, "mini"), rate(rows, workload, "fa3"))])
    return table(["call", "tokens", *map(name, columns), "ours / FA3"], lines, words=1)


def backward(result: Mapping[str, Any], rows: Rows) -> list[str]:
    """Gradients of q, k and v, ours and the peers'."""
    columns = implementations(rows)
    cells, others = dense_cells(rows, r"d(\d+)/(\w+)/(\d+)")
    names = {w: BACKWARD.get(w.split("/")[0], w) for w in others}
    names = {w: f"{words}{', causal' * ('/causal' in w)}" for w, words in names.items()}
    return [
        "**Gradients on Hopper, TFLOP/s** (bf16, batch × tokens = 16,384, heads × head_dim = "
        "2,048; five products of the definition, half of them under a causal mask):",
        dense_table(rows, columns, cells),
        means(rows, [cell.string for cell in cells], columns),
        "Other calls:",
        other_table(rows, columns, names),
    ]


BACKWARD = {
    "gqa": "head_dim 128, 32 query heads, 8 KV heads",
    "packed": "head_dim 128, packed, log-normal lengths to 8,192",
    "packed-gqa": "the same, 32 query heads, 8 KV heads",
    "mla": "head_dim 192, v of 128",
    "short": "head_dim 128",
}


LONG = 2048  # tokens of a call that takes any GPU longer than a call takes a CPU


def means(rows: Rows, workloads: Sequence[str], columns: Sequence[str], which: str = "") -> str:
    """A sentence: ours over each peer's, as geometric means."""
    parts = []
    for peer in (n for n in columns if n != "mini"):
        pairs = [(rate(rows, w, "mini"), rate(rows, w, peer)) for w in workloads]
        shares = [ours / theirs for ours, theirs in pairs if ours and theirs]
        if shares:
            parts.append(f"{geometric_mean(shares):.2f} × {name(peer)}")
    return f"Over these {len(workloads)} calls{which}, as a geometric mean: {', '.join(parts)}."


def layouts(result: Mapping[str, Any], rows: Rows) -> list[str]:
    """Packed sequences and paged prefixes."""
    columns = implementations(rows)
    lines = []
    for workload in dict.fromkeys(workload for workload, _ in rows):
        kind, head_dim, rest = workload.split("/")
        words = f"after 8k cached tokens, pages of {rest[1:]}"
        if kind == "varlen":
            words = f"packed, 32 to 4,096 tokens, {'causal' if rest == 'causal' else 'no mask'}"
        line = [words, head_dim[1:], *(figure(rows, workload, n) for n in columns)]
        lines.append([*line, ratio(rate(rows, workload, "mini"), rate(rows, workload, "fa3"))])
    head = ["call", "head_dim", *map(name, columns), "ours / FA3"]
    return ["**Packed and paged calls on Hopper, TFLOP/s** (bf16):", table(head, lines)]


FEATURES = {
    "softcap": "soft cap",
    "alibi": "ALiBi",
    "sinks": "sinks",
    "score_mod": "a score_mod that does nothing",
}


def features(result: Mapping[str, Any], rows: Rows) -> list[str]:
    """What a feature leaves of the plain call's speed."""
    lines = []
    for cell in dict.fromkeys(workload.rpartition("/")[0] for workload, _ in rows):
        dense = re.fullmatch(r"features/d(\d+)/(\w+)/s(\d+)", cell)
        if dense is None:
            continue
        head_dim, mask, tokens = dense.groups()
        plain = rate(rows, f"{cell}/plain", "mini")
        shares = [ratio(rate(rows, f"{cell}/{n}", "mini"), plain) for n in FEATURES]
        figures = [figure(rows, f"{cell}/plain", "mini"), *shares]
        lines.append([head_dim, MASKS.get(mask, mask), f"{int(tokens):,}", *figures])
    return [
        "**What features cost on Hopper**: the plain call in TFLOP/s, and how much of it is left:",
        table(["head_dim", "mask", "tokens", "plain", *FEATURES.values()], lines, words=3),
    ]


# -- prefill ---------------------------------------------------------------------------------------


def prefill(result: Mapping[str, Any], rows: Rows) -> list[str]:
    """Dense calls against the peers; packed and paged ones against our own dense speed."""
    columns = implementations(rows)
    peers = [n for n in columns if n != "mini"]
    against = "fa2" if "fa2" in peers else peers[0] if peers else None
    head = ["head_dim", "mask", "tokens", *map(name, columns)]
    head += [f"ours / {name(against)}"] if against else []
    lines = []
    for workload in dict.fromkeys(workload for workload, _ in rows):
        cell = re.fullmatch(r"dense/d(\d+)/(\w+)/s(\d+)", workload)
        if cell is None:
            continue
        head_dim, mask, tokens = cell.groups()
        line = [head_dim, MASKS.get(mask, mask), f"{int(tokens):,}"]
        line += [figure(rows, workload, n) for n in columns]
        if against:
            line.append(ratio(rate(rows, workload, "mini"), rate(rows, workload, against)))
        lines.append(line)
    return [
        "**Forward pass of the portable kernel, TFLOP/s** (bf16, batch × tokens = 16,384, "
        "heads × head_dim = 2,048):",
        table(head, lines, words=3),
        *of_dense(rows),
    ]


PREFIXES = {
    "varlen": "packed, equal lengths",
    "ragged": "packed, random lengths",
    "paged/p16": "paged keys, page of 16",
    "paged/p256": "paged keys, page of 256",
}


def of_dense(rows: Rows) -> list[str]:
    """Our packed and paged speed as a share of our dense speed on as many tokens."""
    workloads = dict.fromkeys(workload for workload, _ in rows)
    dense = [w.removeprefix("dense/") for w in workloads if w.startswith("dense/")]
    groups = list(dict.fromkeys(cell.rpartition("/")[0] for cell in dense))
    lines = []
    for prefix, words in PREFIXES.items():
        line = [words]
        for group in groups:
            shares = []
            for cell in dense:
                ours, base = (rate(rows, f"{kind}/{cell}", "mini") for kind in (prefix, "dense"))
                if cell.startswith(f"{group}/") and ours and base:
                    shares.append(ours / base)
            line.append(f"{geometric_mean(shares):.2f}" if shares else "")
        if any(line[1:]):
            lines.append(line)
    if not lines:
        return []
    head = ["our speed ÷ our dense speed, by head_dim", *map(group_name, groups)]
    return [
        "The same tokens in other layouts (geometric means over the lengths):",
        table(head, lines),
    ]


def group_name(group: str) -> str:
    head_dim, _, mask = group.partition("/")
    return f"{head_dim.removeprefix('d')}, {'causal' if mask == 'causal' else 'no mask'}"


# -- decoding --------------------------------------------------------------------------------------


def decode(result: Mapping[str, Any], rows: Rows) -> list[str]:
    return bandwidths("Decoding", rows)


def chunked(result: Mapping[str, Any], rows: Rows) -> list[str]:
    return bandwidths("16 to 512 queries beside a cache", rows)


def bandwidths(title: str, rows: Rows) -> list[str]:
    """GB/s of keys and values, a line for each workload, or for each group if there are many."""
    columns = implementations(rows)
    workloads = list(dict.fromkeys(workload for workload, _ in rows))
    groups: dict[str, list[str]] = {}
    for workload in workloads:
        many = len(workloads) > MOST_DECODE_ROWS
        groups.setdefault(workload.rpartition("/")[0] if many else workload, []).append(workload)
    head = ["workload", *map(name, columns)]
    head += ["ours / FA3"] if "fa3" in columns else []
    lines = []
    for group, members in groups.items():
        means = {n: mean_rate(rows, members, n) for n in columns}
        shown = {n: "" if mean is None else f"{mean:,.0f}" for n, mean in means.items()}
        if len(members) == 1:
            shown = {n: figure(rows, members[0], n) for n in columns}
        line = [group.removeprefix("decode/"), *shown.values()]
        lines.append([*line, ratio(means["mini"], means["fa3"])] if "fa3" in means else line)
    text = f"**{title}, GB/s of keys and values**"
    if len(groups) < len(workloads):
        text += " (geometric means; empty where a peer can't do all workloads of a line)"
    return [f"{text}:", table(head, lines)]


def mean_rate(rows: Rows, workloads: Sequence[str], implementation: str) -> float | None:
    """Over workloads that were all measured: means over different ones can't be compared."""
    rates = [rate(rows, workload, implementation) for workload in workloads]
    present = [r for r in rates if r]
    return geometric_mean(present) if len(present) == len(rates) else None


# -- the host --------------------------------------------------------------------------------------

CALLS = {
    "host/dense": "dense",
    "host/large": "dense, large enough for the Hopper kernel",
    "host/varlen": "packed",
    "host/paged": "packed, paged keys",
    "host/decode": "decoding",
    "host/decode-paged": "decoding, paged keys",
    "host/decode-parts": "decoding, keys in parts",
}
NO_WAIT = "None of the calls of this package waits for the GPU."


def host(result: Mapping[str, Any], rows: Rows) -> list[str]:
    """What a call costs the CPU, and the first call of a process."""
    columns = implementations(rows)
    lines = []
    for workload in dict.fromkeys(workload for workload, _ in rows):
        line = [CALLS.get(workload, workload)]
        for implementation in columns:
            row = rows.get((workload, implementation), {})
            failed = "failed" if "error" in row else ""
            line.append(f"{row['microseconds']:.0f}" if "microseconds" in row else failed)
        lines.append(line)
    ours = [row for (_, implementation), row in rows.items() if implementation == "mini"]
    waits = [row["synchronisations"] for row in ours if "synchronisations" in row]
    remarks = []
    if waits:
        what = f"These calls waited for the GPU {sum(waits)} times." if any(waits) else NO_WAIT
        remarks.append(what)
    if result.get("first_call_seconds"):
        seconds = f"{result['first_call_seconds']:.1f} s"
        remarks.append(f"The first call of a process with an empty kernel cache took {seconds}.")
    head = ["call", *map(name, columns)]
    title = "**CPU time of a call, µs** (tiny tensors, not waited for):"
    return [title, table(head, lines), *filter(None, [" ".join(remarks)])]


if __name__ == "__main__":
    sys.exit(main())
