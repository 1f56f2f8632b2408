"""Tiles of work on their way from the Hopper kernel's producer to its consumers, and back.

The producer tells of a tile in a turn. Two turns at most are under way. A consumer whose rows have
outgrown their reference (`softmax.outgrown`) wants the tile again, and gets it two turns later, or
next if there is no other work.
"""

from typing import Any, NamedTuple

from ..gluon import gl, gluon, mbarrier
from .pipeline import FOUR, ONE


class Turns(NamedTuple):
    """WORDS numbers for each of two turns; what says that they are there, and are done with."""

    words: Any
    full: Any
    empty: Any


# What the words are, and, said by each consumer, whether it wants the tile of work again.
(
    B, HEAD, FIRST_Q, ROWS_Q, WRITABLE, FIRST, LENGTH_K, BEGIN, TILES, NUMBER, AGAIN,
) = map(gl.constexpr, range(11))  # fmt: skip
WORDS = gl.constexpr(AGAIN.value + 3)


@gluon.jit
def say(turns, turn, n, word, LAYOUT: gl.constexpr):
    turns.words.index(turn % 2 * WORDS + n).store(
        gl.full([1], gl.to_tensor(word), gl.int32, LAYOUT)
    )


@gluon.jit
def word(turns, turn, n, LAYOUT: gl.constexpr = FOUR):
    return gl.max(turns.words.index(turn % 2 * WORDS + n).load(LAYOUT), 0)


@gluon.jit
def ended(turns, turn, C: gl.constexpr):
    """Wait until the consumers are through with the turn two before; whether one wants it again."""
    mbarrier.wait(turns.empty.index(turn % 2), (turn // 2 & 1) ^ 1)
    again = turn < 0
    for c in gl.static_range(C.CONSUMERS if C.FAST else 0):
        again |= word(turns, turn, AGAIN + c, ONE) > 0
    return again


@gluon.jit
def take(turns, turn, number, total, C: gl.constexpr):
    """The tile of work for this turn, and whether it is one again and not the `number`-th.

    C.FAST: whether any can be wanted again. Where there is no more work, so can the last turn's.
    """
    again = ended(turns, turn, C)
    mine = gl.where(again, word(turns, turn, NUMBER, ONE), number) if C.FAST else number
    if C.FAST and mine >= total:
        again = ended(turns, turn + 1, C)
        mine = gl.where(again, word(turns, turn + 1, NUMBER, ONE), number)
        for c in gl.static_range(C.CONSUMERS):
            say(turns, turn, AGAIN + c, word(turns, turn + 1, AGAIN + c, ONE), ONE)
            say(turns, turn + 1, AGAIN + c, 0, ONE)
    return mine, again


@gluon.jit
def tell(turns, turn, words):
    """The producer, who has taken the turn, hands its words to the consumers."""
    for n in gl.static_range(AGAIN):
        say(turns, turn, n, words[n], ONE)
    mbarrier.arrive(turns.full.index(turn % 2))


@gluon.jit
def hear(turns, turn):
    """A consumer waits for them; it may read them until it says that it has heard."""
    mbarrier.wait(turns.full.index(turn % 2), turn // 2 & 1)


@gluon.jit
def heard(turns, turn):
    mbarrier.arrive(turns.empty.index(turn % 2))
