"""The barriers between the Hopper kernel's producer and its consumers, in schedules at random.

Gluon has no interpreter, a deadlock hangs the card, and a tile that comes too early may show once
in a million calls. So what kernels/hopper.py, handover.py, forward_hopper.py and attend_hopper.py
wait for, and where they arrive, stands here again under their names and in their order. Loads and
stores end in any order. The four warps of a consumer are one thread here: its products keep them
together.
"""

import itertools
import random

import pytest
from test_plan import on_hopper, prefill

from mini_flash_attention import plan

STAGES = pytest.importorskip("mini_flash_attention.kernels.hopper").STAGES.value
THREE = on_hopper(prefill(head_dim=64, seqlen=16384)).tiles
CASES = sorted({(x.consumers, x.q_tiles) for x in (*plan.HOPPER_TILES.values(), THREE)})
SCHEDULES = 1000  # of each case
PRODUCER, COPIES = "producer", "copies"  # consumers are numbers
WARP, CONSUMER = 32, 128  # threads


class Mbarrier:
    """Its phase ends when all have arrived and all loads that they announced are there."""

    def __init__(self, count):
        self.count = self.missing = count
        self.loads = self.phase = 0

    def arrive(self, loads=0):
        assert self.missing > 0, "one arrival too many"
        self.missing -= 1
        self.loaded(-loads)

    def loaded(self, loads=1):
        self.loads -= loads
        if self.missing == self.loads == 0:
            self.missing, self.phase = self.count, self.phase + 1

    def wait(self, parity):
        """Until the last phase to end has this parity: it may be an older one."""
        return lambda: self.phase & 1 != parity


class NamedBarrier:
    """Its phase ends when exactly so many threads have come."""

    def __init__(self, threads):
        self.threads, self.come, self.phase = threads, set(), 0

    def arrive(self, who):
        assert who not in self.come, f"{who} comes twice in a phase"
        self.come.add(who)
        threads = sum(WARP if x == PRODUCER else CONSUMER for x in self.come)
        assert threads <= self.threads, f"{who} is one too many"
        if threads == self.threads:
            self.come, self.phase = set(), self.phase + 1

    def sync(self, who):
        phase = self.phase
        self.arrive(who)
        return lambda: self.phase > phase


class Place:
    """Of a tile, or a turn's words: the number of what it holds, and who still needs that."""

    def __init__(self):
        self.number, self.users = None, set()

    def write(self):
        assert not self.users, f"{self.number} is overwritten, which {self.users} still need"
        self.number = None
        self.users.add(COPIES)

    def written(self, number):
        self.number = number
        self.users.remove(COPIES)

    def read(self, who, number):
        assert self.number == number, f"{who} finds {self.number} instead of {number}"
        self.users.add(who)


class Ring:
    def __init__(self, consumers):
        self.tiles = [Place() for _ in range(STAGES)]
        self.full = [Mbarrier(1) for _ in range(STAGES + 1)]
        self.freed = [NamedBarrier(consumers * CONSUMER + WARP) for _ in range(STAGES)]


class Program:
    """One of the kernel's programs. Its threads are generators: others may go on at every yield.

    What they yield has to be true before they go on themselves, unless it is None.
    """

    def __init__(self, consumers, q_tiles, seed):
        self.consumers, self.q_tiles = consumers, q_tiles
        self.through = q_tiles >= 2 * consumers
        self.queries = [Place() for _ in range(q_tiles)]
        self.q_full = [Mbarrier(1) for _ in range(2 * consumers)]
        self.q_free = [Mbarrier(1) for _ in range(q_tiles)]
        self.keys, self.values = Ring(consumers), Ring(consumers)
        self.words, self.words_full = [Place(), Place()], [Mbarrier(1), Mbarrier(1)]
        self.words_empty = [Mbarrier(consumers), Mbarrier(consumers)]
        self.turn = [NamedBarrier(2 * CONSUMER) for _ in range(consumers)]
        self.copies = []  # on their way: what their ends do
        self.random = draw = random.Random(seed)
        tiles = [min(draw.randrange(8), draw.randrange(8)) for _ in range(draw.randint(1, 8))]
        # Tiles of keys in each tile of work, and how many of them each consumer passes by.
        self.work = [
            (n, [draw.choice((0, draw.randrange(max(n, 1)))) for _ in range(consumers)])
            for n in tiles
        ]
        # Which consumers can't do with a tile of work the first time, and how each was done last.
        share = draw.choice((0, 0, 0.3, 1))
        self.hard = [[n > 0 and draw.random() < share for _ in range(consumers)] for n in tiles]
        self.done, self.times = [[None] * consumers for _ in tiles], [0] * len(tiles)
        self.told, self.again = [None, None], [[False] * consumers, [False] * consumers]
        # Shares of values to be cleared in part, and of results that leave through shared memory.
        self.parts, self.whole = draw.choice((0, 0.2)), draw.choice((0, 0.8, 1))

    def run(self):
        threads = {which: self.consume(which) for which in range(self.consumers)}
        threads[PRODUCER] = self.produce()
        actors, waits = (*threads, COPIES), dict.fromkeys(threads)
        for step in itertools.count():
            if step % 100 == 0:
                speeds = {who: self.random.choice((0.1, 1, 1, 5, 30)) for who in actors}
            ready = [who for who in threads if waits[who] is None or waits[who]()]
            ready += [COPIES] * bool(self.copies)
            if not ready:
                break
            (who,) = self.random.choices(ready, [speeds[who] for who in ready])
            if who == COPIES:
                self.copies.pop(self.random.randrange(len(self.copies)))()
            elif waits[who] is not None:  # over; before its next step others may do much
                waits[who] = None
            elif (wait := next(threads[who], COPIES)) is COPIES:
                del threads[who]
            else:
                waits[who] = wait
        assert not threads, f"deadlock of {list(threads)}"
        assert self.done == self.hard, "a tile of work was not done in the way that it takes"
        assert self.times == [1 + any(hard) for hard in self.hard], "a tile was done too often"

    def load(self, place, number, barrier):
        barrier.arrive(loads=1)
        place.write()
        self.copies.append(lambda: (place.written(number), barrier.loaded()))

    def store(self, place, which):
        place.users.add((COPIES, which))
        self.copies.append(lambda: place.users.remove((COPIES, which)))

    def store_wait(self, which):
        return lambda: not any((COPIES, which) in place.users for place in self.queries)

    def arrival(self, worked, which):
        """The barrier of a consumer's queries, and the parity to wait for."""
        return self.q_full[worked % 2 * self.consumers + which], worked // 2 & 1

    def my_turn(self, which):
        return self.turn[which].sync(which) if self.consumers == 3 else None

    def your_turn(self, which):
        if self.consumers == 3:
            self.turn[(which + 1) % self.consumers].arrive(which)

    def fill(self, ring, n, part=None):
        """Or `fill_part`, `part` its `times`: a tile is none until that has cleared it."""
        stage = n % STAGES
        barrier, number = (stage, n) if part is None else (STAGES, None)
        if n >= STAGES:
            yield ring.freed[stage].sync(PRODUCER)
        yield self.load(ring.tiles[stage], number, ring.full[barrier])
        if part is not None:
            yield ring.full[STAGES].wait(part & 1)
            yield ring.tiles[stage].write()
            yield ring.tiles[stage].written(n)
            yield ring.full[stage].arrive()

    def filled(self, ring, n, wanted=True):
        return ring.full[n % STAGES].wait(n // STAGES & 1) if wanted else None

    def read(self, ring, n, which):
        """Issue products, which read until they have been waited for: right before `free`."""
        ring.tiles[n % STAGES].read(which, n)

    def free(self, ring, n, which):
        ring.tiles[n % STAGES].users.discard(which)
        ring.freed[n % STAGES].arrive(which)

    def pass_by(self, which, n):
        yield self.filled(self.keys, n)
        yield self.my_turn(which)
        yield self.your_turn(which)
        yield self.free(self.keys, n, which)
        yield self.filled(self.values, n)
        yield self.free(self.values, n, which)

    def ended(self, turn):
        yield self.words_empty[turn % 2].wait((turn // 2 & 1) ^ 1)

    def take(self, turn, number):
        """The tile of work for this turn, and whether it is wanted again."""
        here, other = turn % 2, (turn + 1) % 2
        yield from self.ended(turn)
        if any(self.again[here]):
            return self.told[here], True
        if number < len(self.work):
            return number, False
        yield from self.ended(turn + 1)
        if not any(self.again[other]):
            return number, False
        self.again[here], self.again[other] = self.again[other], [False] * self.consumers
        yield
        return self.told[other], True

    def tell(self, turn, number):
        yield self.words[turn % 2].write()
        self.told[turn % 2] = number
        yield self.words[turn % 2].written(turn)
        yield self.words_full[turn % 2].arrive()

    def hear(self, turn, which):
        yield self.words_full[turn % 2].wait(turn // 2 & 1)
        yield self.words[turn % 2].read(which, turn)

    def produce(self):
        done = worked = cleared = turn = number = 0
        while True:
            mine, again = yield from self.take(turn, number)
            yield from self.tell(turn, mine)
            if mine == len(self.work):  # no more work
                return
            tiles, _ = self.work[mine]
            if tiles > 0:
                for c in range(self.consumers):
                    nth = worked * self.consumers + c
                    slot = nth % self.q_tiles
                    yield self.q_free[slot].wait((nth // self.q_tiles & 1) ^ 1)
                    yield self.load(self.queries[slot], nth, self.arrival(worked, c)[0])
                worked += 1
            for j in range(tiles + 1):
                if j < tiles:
                    yield from self.fill(self.keys, done + j)
                part = self.random.random() < self.parts
                if j > 0:
                    yield from self.fill(self.values, done + j - 1, cleared if part else None)
                    cleared += part
            done, turn, number = done + tiles, turn + 1, number + (not again)

    def consume(self, which):
        if which == self.consumers - 1:
            yield self.your_turn(which)
        done = worked = turn = 0
        yield from self.hear(0, which)
        while (number := self.told[turn % 2]) < len(self.work):
            tiles, _ = self.work[number]
            careful, again = self.again[turn % 2][which], False
            if tiles > 0:
                yield from self.attend(which, worked, done, number)
                again = self.hard[number][which] and not careful
                self.again[turn % 2][which] = again
                if self.through:
                    tile = self.queries[(worked * self.consumers + which) % self.q_tiles]
                    if not again and self.random.random() < self.whole:
                        yield self.store(tile, which)
                    yield tile.users.remove(which)
                worked += 1
            self.times[number] += which == 0
            if not again:
                self.done[number][which] = careful
            done += tiles
            self.words[turn % 2].users.remove(which)
            yield self.words_empty[turn % 2].arrive()
            turn += 1
            yield from self.hear(turn, which)
        yield self.store_wait(which)

    def attend(self, which, worked, done, number):
        tiles, passed = self.work[number]
        nth = worked * self.consumers + which
        slot = nth % self.q_tiles
        full, parity = self.arrival(worked, which)
        yield full.wait(parity)
        yield self.queries[slot].read(which, nth)
        stop, own = done + tiles, done + passed[which]
        for n in range(done, own):
            yield from self.pass_by(which, n)
        done = own
        yield self.filled(self.keys, done)
        yield self.my_turn(which)
        yield self.read(self.keys, done, which)
        yield self.your_turn(which)
        if self.through and worked > 0:
            yield self.store_wait(which)
            yield self.q_free[(nth - self.consumers) % self.q_tiles].arrive()
        yield self.free(self.keys, done, which)
        yield self.filled(self.keys, done + 1, done + 1 < stop)
        for n in range(done + 1, stop):
            yield self.my_turn(which)
            yield self.read(self.keys, n, which)
            yield self.filled(self.values, n - 1)
            yield self.read(self.values, n - 1, which)
            yield self.your_turn(which)
            yield self.free(self.keys, n, which)
            yield self.filled(self.keys, n + 1, n + 1 < stop)
            yield self.free(self.values, n - 1, which)
        if not self.through:
            self.queries[slot].users.remove(which)
            yield self.q_free[slot].arrive()
        yield self.filled(self.values, stop - 1)
        yield self.read(self.values, stop - 1, which)
        yield self.free(self.values, stop - 1, which)


def search(program, case):
    for seed in range(SCHEDULES):
        program(*case, seed).run()


@pytest.mark.parametrize("case", CASES)
def test_every_schedule_ends_and_every_tile_is_read_in_time(case):
    search(Program, case)


class SharedArrivals(Program):
    """Queries arrive at the barrier of their place, at which consumers take turns."""

    def arrival(self, worked, which):
        nth = worked * self.consumers + which
        return self.q_full[nth % self.q_tiles], nth // self.q_tiles & 1


class Hasty(Program):
    """Tiles that are passed by are freed before they are there."""

    def pass_by(self, which, n):
        yield self.my_turn(which)
        yield self.your_turn(which)
        yield self.free(self.keys, n, which)
        yield self.free(self.values, n, which)


class Hurried(Program):
    """Without more work the producer ends, whatever is wanted of the last turns."""

    def take(self, turn, number):
        yield from self.ended(turn)
        return number, False


# Where each consumer has two places, they and their barriers are its own.
WRONG = [(SharedArrivals, (c, n)) for c, n in CASES if n < 2 * c] + [
    (wrong, x) for wrong in (Hasty, Hurried) for x in CASES
]


@pytest.mark.parametrize(("program", "case"), WRONG)
def test_what_is_wrong_shows(program, case):
    with pytest.raises(AssertionError):
        search(program, case)
