"""Finds registers that a kernel's machine code reads before anything has written them.

The compiler of machine code is not always right: with ptxas 12.8, a matrix product took its
tile from an address that nobody had worked out (bench/NOTES.md, 113). Addresses of products
lie in uniform registers (UR, one for a whole warp), so those are looked at. This knows the
instructions of compute capability 8.0 to 9.0.
"""

import re
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);")
REGISTER = re.compile(r"(gdesc\[|desc\[)?\bUR(\d+)\b")
WRITTEN = re.compile(r"(?:!?U?P[T\d]+, )*UR")  # what is named first, after predicates
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


class Step(NamedTuple):
    """An instruction: what it reads and writes, and where it may go on."""

    text: str
    reads: list[int]
    writes: list[int]
    then: list[int]


def steps(sass: str) -> list[Step]:
    lines = LINE.findall(sass)
    place = {int(address, 16): n for n, (address, *_) in enumerate(lines)}
    found = []
    for n, (address, predicate, operation, operands) in enumerate(lines):
        reads, writes = list[int](), list[int]()
        name, *words = operation.split(".")
        pair = [0, 1] if {"64", "WIDE"} & set(words) else [0]
        for at, (kind, number) in enumerate(REGISTER.findall(operands)):
            if not kind and at == 0 and WRITTEN.match(operands):
                writes = [int(number) + m for m in pair]
            elif kind == "gdesc[":  # two descriptors, the first for an A in shared memory
                both = re.match(r"R\d+, gdesc", operands)
                reads += [int(number) + m for m in range(0 if both else 2, 4)]
            else:
                reads += [int(number) + m for m in ([0, 1] if kind else [0])]
        sometimes = bool(predicate) or operands.startswith(("P", "!P", "UP", "!UP"))
        then = [] if name in ("EXIT", "RET", "BRX", "BRA") and not sometimes else [n + 1]
        if name == "BRA" and (target := TARGET.search(operands)):
            then.append(place[int(target[1], 16)])
        found.append(Step(f"{address} {operation} {operands}", reads, writes, then))
    return found


def unwritten(sass: str) -> list[str]:
    """Instructions that some way through the code reaches with a register of theirs unwritten."""
    code = steps(sass)
    written: dict[int, frozenset[int]] = {0: frozenset()} if code else {}  # on every way so far
    todo = list(written)
    while todo:
        n = todo.pop()
        after = written[n].union(code[n].writes)
        for m in code[n].then:
            known = written.get(m)
            met = after if known is None else known & after
            if m < len(code) and met != known:
                written[m] = met
                todo.append(m)
    return [code[n].text for n in sorted(written) if set(code[n].reads) - written[n]]
