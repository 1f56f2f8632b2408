"""The barriers between the Hopper kernel's producer and its consumers, in schedules at random.

Gluon has no interpreter, a deadlock hangs the card, and a tile that comes too early may show once
in a million calls. So the kernel's own functions run here as Python, on a GPU that has barriers,
asynchronous copies and products, but no numbers: a tile is where it was loaded from, and a result
is the list of tiles that it is made of. Copies end in any order. The four warps of a consumer are
one thread here: its products keep them together.

`Kernel` rebuilds the functions, FAKES is their GPU, STUBS leave out what only computes, and a
`Launch` runs the programs of a random call in a random order.
"""

import ast
import functools
import inspect
import itertools
import random
import re
import sys
import textwrap
import types
from collections import defaultdict
from typing import Any, NamedTuple

import pytest

from mini_flash_attention.plan.configs import HOPPER_TILES

forward = pytest.importorskip("mini_flash_attention.kernels.hopper.forward")

# Consumers, and buffers for their queries. For head_dim 64 and many keys `plan.hopper` takes three
# consumers with two buffers each.
CASES = sorted({(x.consumers, x.q_buffers) for x in HOPPER_TILES.values()} | {(3, 6)})
SCHEDULES = 400  # of each case, of some 900 steps
FOREVER = 30_000  # steps
BLOCK_N = 32  # so few keys that a consumer passes by several tiles of the others
SPEEDS = (0.01, 0.1, 1, 1, 5, 30)  # of an actor for some time, and of a copy

now: Any = types.SimpleNamespace(launch=None, actor=None)  # who is at work


# -- The GPU --------------------------------------------------------------------------------------


class Actor:
    """A role of a program. It can take its next step once its `wait`, if any, is over."""

    def __init__(self, program, name, warps, steps):
        self.program, self.threads, self.steps = program, 32 * warps, steps
        self.name = f"{name} of program {program.number}"
        self.wait, self.speed = None, 1
        self.seen = defaultdict(int)  # by mbarrier, the phases that it knows to be over
        self.products = []  # that it hasn't waited for
        self.stores = 0  # by TMA, on their way
        self.unfenced = []  # places that it wrote to, which nothing asynchronous may see yet


class Copy:
    """A load or store on its way, and what is to be done at its end. Some take very long."""

    def __init__(self, end):
        self.end, self.speed = end, now.launch.random.choice(SPEEDS)


class Program:
    def __init__(self, number):
        self.number, self.named_barriers = number, {}


class Mbarrier:
    """Its phase ends when all have arrived and all bytes that they announced are there."""

    def init(self, count):
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def arrive(self, announced=0):
        assert self.missing > 0, "one arrival too many"
        self.missing -= 1
        self.loaded(-announced)

    def loaded(self, count):
        self.bytes -= count
        if self.missing == self.bytes == 0:
            self.missing, self.phase = self.count, self.phase + 1


class NamedBarrier:
    """Its phase ends when exactly so many threads have come."""

    def __init__(self, threads):
        self.threads, self.come, self.phase = threads, [], 0

    def arrive(self, actor):
        assert actor not in self.come, f"{actor.name} comes twice in a phase"
        self.come.append(actor)
        threads = sum(actor.threads for actor in self.come)
        assert threads <= self.threads, f"{actor.name} is one too many"
        if threads == self.threads:
            self.come, self.phase = [], self.phase + 1


class Anything:
    """A number, tile, layout or dtype that the protocol does not depend on, so it never branches
    on one.
    """

    def ignore(self, *_, **__):
        return self

    __getattr__ = __call__ = ignore
    __radd__ = __ge__ = __lt__ = __and__ = ignore

    def __bool__(self):
        raise AssertionError("nobody knows which way to go")


ANY = Anything()


class Tile(tuple):
    """What was loaded: for each box the row where it begins, the descriptor's name, and `at`."""

    __slots__ = ()

    def __mul__(self, factor):
        return self


class Result(NamedTuple):
    """What a product made of which tiles. Scores: of queries and keys; after their softmax also
    whether their maximum was looked for. Outputs: such weights and values, any number of pairs.
    """

    tiles: tuple
    product: Any
    type = ANY


class Place:
    """Of a tile in shared memory."""

    def __init__(self, shape):
        self.shape, self.dtype, self.content = shape, ANY, Tile()
        self.loads = 0  # on their way
        self.readers = []  # products and stores that may still look at it
        self.arrival = None  # of what was loaded last: a barrier and its phase
        self.fenced = True  # whether something asynchronous would see what was written last

    def reshape(self, _):
        return self

    def permute(self, _):
        return self

    def slice(self, first, length, axis=0):
        return Slice(self, first)

    def begin_load(self, barrier, row=0):
        assert not self.readers, f"{self.content} is overwritten, which {self.readers} reads"
        assert self.fenced, "the load may come before what was written here"
        if not isinstance(self.content, Tile):
            self.content = Tile()
        self.content = Tile(box for box in self.content if box[0] != row)
        self.loads, self.arrival = self.loads + 1, (barrier, barrier.phase)

    def end_load(self, box):
        self.content = Tile(sorted((*self.content, box)))
        self.loads -= 1

    def read(self, reader):
        """What an asynchronous reader finds, who stays until taken from the list."""
        self.check()
        assert self.fenced, f"{reader} may not see what was written"
        self.readers.append(reader)
        return self.content

    def check(self):
        """Whoever reads has to have waited for the load: that it is over may be luck."""
        assert not self.loads, f"{now.actor.name} reads what is on its way"
        if self.arrival is not None:
            barrier, phase = self.arrival
            assert now.actor.seen[barrier] > phase, f"{now.actor.name} has not waited for this"

    def load(self, _):
        yield
        self.check()
        return self.content

    def store(self, content):
        yield
        assert not self.loads and not self.readers, f"{self.content} is in use"
        self.content, self.arrival, self.fenced = content, None, False
        now.actor.unfenced.append(self)


class Slice:
    """A part of a `Place`, to load into; what is written to it leaves a tile what it is."""

    def __init__(self, place, first):
        self.place, self.first = place, first
        self.load, self.store = place.load, place.store

    def slice(self, first, length, axis):
        return self

    def begin_load(self, barrier):
        self.place.begin_load(barrier, self.first)


class Field:
    """A number in shared memory. Nothing may depend on it before it is written."""

    value = ANY

    def load(self, _):
        yield
        return self.value

    def store(self, value):
        yield
        self.value = value


class Array:
    """In shared memory."""

    def __init__(self, make, shape):
        self.items, self.shape = [make() for _ in range(shape[0])], shape

    def index(self, n):
        assert 0 <= n < len(self.items)
        return self.items[n]


class Descriptor:
    def __init__(self, name, rows, columns):
        self.name, self.dtype, self.layout = name, ANY, ANY
        self.block_shape = [1, rows, 1, columns]
        self.block_type = types.SimpleNamespace(nbytes=2 * rows * columns)


def allocate_shared_memory(dtype, shape, layout):
    makers = {"int64": Mbarrier, "int32": Field}
    return Array(makers.get(dtype, lambda: Place(shape[1:])), shape)


@functools.cache
def barrier_operation(ptx):
    found = re.match(r"bar\.(sync|arrive) \$1, (\d+);", ptx)
    return (found[1], int(found[2])) if found else (None, 0)


def named_barrier(operation, number, new, first):
    """Come to a barrier, `new` if it is not in use; `first` is the first that kernels may use.
    Returns it, and the phase in which this was.
    """
    yield
    barrier = now.actor.program.named_barriers.setdefault(number, new)
    assert first <= number < 16 and barrier.threads == new.threads, "it is another's barrier"
    phase = barrier.phase
    barrier.arrive(now.actor)
    if operation == "sync":
        yield lambda: barrier.phase > phase
    return barrier, phase


def inline_asm_elementwise(ptx, constraints, args, *_):
    """Of a named barrier, else a move."""
    operation, threads = barrier_operation(ptx)
    if operation is None:
        assert ptx == "mov.b32 $0, $1;"
        return args[0]
    yield from named_barrier(operation, args[0], NamedBarrier(threads), 8)
    return ANY


def atomic_add(counter, value, sem):
    yield
    counter.value += value
    return counter.value - value


def atomic_xchg(counter, value, sem):
    yield
    counter.value = value


def warp_specialize(partitions, warps, registers):
    """The first partition takes the kernel's own four warps, the last is the producer."""
    now.launch.plan(*partitions[-1][1])
    for (role, args), n in zip(partitions, [4, *warps], strict=True):
        name = f"{role.__name__} {args[0]}" if role.__name__ == "consume" else role.__name__
        now.launch.actors.append(Actor(now.actor.program, name, n, role(*args)))


def wait(barrier, parity, pred=True):
    """Until the last phase to end has this parity: it may be an older one."""
    if pred:
        yield lambda: barrier.phase & 1 != parity
        now.actor.seen[barrier] = barrier.phase


def expect(barrier, announced, pred=True):
    if pred:
        yield
        barrier.arrive(announced)


def arrive(barrier):
    yield
    barrier.arrive()


def tma_load(desc, at, barrier, place, pred=True):
    if not pred:
        return
    yield
    place.begin_load(barrier)
    whole, first = (place.place, place.first) if isinstance(place, Slice) else (place, 0)

    def end():
        whole.end_load((first, desc.name, *at))
        barrier.loaded(desc.block_type.nbytes)

    now.launch.copies.append(Copy(end))


def tma_store(desc, at, place):
    yield
    actor, reader = now.actor, f"the store of {now.actor.name}"
    now.launch.stored[tuple(at)] = place.read(reader)
    actor.stores += 1

    def end():
        place.readers.remove(reader)
        actor.stores -= 1

    now.launch.copies.append(Copy(end))


def store_wait(pending):
    actor = now.actor
    yield lambda: actor.stores <= pending


def fence_async_shared():
    for place in now.actor.unfenced:
        place.fenced = True
    now.actor.unfenced.clear()


class Product:
    """Places that it reads until it has been waited for."""

    def __init__(self, actor, places):
        self.actor, self.places = actor, places

    def __repr__(self):
        return f"a product of {self.actor.name}"


def settled(result):
    assert result.product not in now.actor.products, "nobody has waited for this product"
    return result.tiles


def warpgroup_mma(a, b, accumulator, use_acc=True, is_async=False):
    yield
    product = Product(now.actor, [x for x in (a, b) if isinstance(x, Place)])
    now.actor.products.append(product)
    if isinstance(a, Place):  # Q Kᵀ
        return Result((a.read(product), b.read(product)), product)
    return Result((*accumulator.tiles, (settled(a), b.read(product))), product)


def warpgroup_mma_wait(pending, deps):
    """The oldest end first."""
    yield
    products = now.actor.products
    while len(products) > pending:
        product = products.pop(0)
        for place in product.places:
            place.readers.remove(product)
    return deps[0] if len(deps) == 1 else deps


def load(address, mask=True, other=None):
    """From the memory of the GPU."""
    return now.launch.memory[address] if mask else other


class Language:
    """What is said in Triton and Gluon. All that is not here is `Anything`."""

    int32, int64 = "int32", "int64"
    allocate_shared_memory = staticmethod(allocate_shared_memory)
    inline_asm_elementwise = staticmethod(inline_asm_elementwise)
    atomic_add, atomic_xchg = staticmethod(atomic_add), staticmethod(atomic_xchg)
    warp_specialize, load = staticmethod(warp_specialize), staticmethod(load)
    static_range, minimum, maximum = range, min, max
    program_id = staticmethod(lambda axis: now.actor.program.number)
    num_programs = staticmethod(lambda axis: now.launch.programs)
    cdiv = staticmethod(lambda a, b: -(-a // b))
    where = staticmethod(lambda condition, a, b: a if condition is ANY or condition else b)
    full = staticmethod(lambda shape, value, *_: value)
    zeros = staticmethod(lambda *_: Result((), None))
    to_tensor = staticmethod(lambda x: x)
    max = sum = convert_layout = staticmethod(lambda x, *_: x)

    def __getattr__(self, name):
        return ANY


LANGUAGE = Language()
FAKES = {
    "gl": LANGUAGE,
    "tl": LANGUAGE,
    "mbarrier": types.SimpleNamespace(
        MBarrierLayout=ANY, init=Mbarrier.init, wait=wait, expect=expect, arrive=arrive
    ),
    "tma": types.SimpleNamespace(store_wait=store_wait),
    "tma_load": tma_load,
    "tma_store": tma_store,
    "fence_async_shared": fence_async_shared,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}


# -- The kernel -----------------------------------------------------------------------------------


def softmax_step(m, s, exponent, start, partial, exact, *_):
    return m, ANY, Result((*settled(s), bool(exact)), s.product), exponent


def rescale_o(sums, o, alpha, LAZY_RESCALE):
    settled(o)
    return sums, o


# What only computes, by the names of modules and functions.
STUBS = {
    "softmax.softmax_step": softmax_step,
    "softmax.exp2_scores": lambda scores, *_: scores,
    "softmax.convert_p": lambda p, like: p,
    "softmax.row_sums": lambda p, BLOCK_N: 0,
    "softmax.rescale_o": rescale_o,
    "softmax.sums_overflow": lambda m, sums, o, *_: now.launch.overflows(settled(o)),
    "mma.unround_single_keys": lambda o, *_: o,
    "epilogue.store": lambda *args: now.launch.result(*args),
    "rules.softmax.finish": lambda m, sums, o, *_: (o, ANY),
}


class Steps(ast.NodeTransformer):
    """Makes generators of functions: where the GPU's fakes `yield`, others may go on. Threads would
    need no rewriting, but take longer to switch and stay behind after a deadlock.
    """

    def __init__(self, scope):
        self.scope = scope

    def callee(self, node):
        """What a call calls. What is no global lies in shared memory, as far as it matters."""
        if isinstance(node, ast.Name):
            return self.scope.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.callee(node.value)
            return getattr(Place if owner is None else owner, node.attr, None)
        return None

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return node.func.value  # there are no dtypes
        if inspect.isgeneratorfunction(self.callee(node.func)):
            return ast.YieldFrom(node)
        return node


class Kernel:
    """The functions of the Hopper kernel as Python.

    edits: for functions, as "module.name", texts to replace, each of which is there once.
    """

    HOPPER, RULES = forward.__package__, forward.work.__package__

    def __init__(self, edits=None):
        self.scopes, self.edits = {}, dict(edits or {})
        self.forward = self.scope(forward)["forward_hopper_kernel"]
        self.work_tile = self.scopes[forward.produce.fn.__module__]["work_tile"]
        assert not self.edits, "there are no such functions"

    def scope(self, module):
        """The names of a module, as its functions shall find them."""
        if module.__name__ not in self.scopes:
            scope = self.scopes[module.__name__] = {}
            for name, value in vars(module).items():
                scope[name] = self.plain(name, value, module, scope)
        return self.scopes[module.__name__]

    def plain(self, name, value, module, scope):
        if name in FAKES:
            return FAKES[name]
        if isinstance(value, forward.gl.constexpr):
            return value.value
        if isinstance(value, types.ModuleType):
            own = value.__name__.startswith((f"{self.HOPPER}.", f"{self.RULES}."))
            return types.SimpleNamespace(**self.scope(value)) if own else value
        function = getattr(value, "fn", None)  # of what `@gluon.jit` and `@triton.jit` make
        if not inspect.isfunction(function):
            return value
        if function.__module__ != module.__name__:
            return self.scope(sys.modules[function.__module__])[name]
        path = f"{module.__name__}.{name}".removeprefix(f"{self.HOPPER}.")
        path = path.replace(self.RULES, "rules")
        if path in STUBS:
            return STUBS[path]
        if path.startswith("rules."):
            return types.FunctionType(function.__code__, scope, name, function.__defaults__)
        return self.in_steps(function, scope, self.edits.pop(path, {}))

    @staticmethod
    def in_steps(function, scope, edits):
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in edits.items():
            assert source.count(old) == 1, f"{function.__name__} has no longer, or twice: {old}"
            source = source.replace(old, new)
        tree = ast.parse(source)
        tree.body[0].decorator_list = []
        ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)  # for tracebacks
        tree = ast.fix_missing_locations(Steps(scope).visit(tree))
        exec(compile(tree, function.__code__.co_filename, "exec"), scope)
        return scope[function.__name__]


# -- Calls ----------------------------------------------------------------------------------------


class Work(NamedTuple):
    """A tile of work, as `producer.work_tile` says."""

    tile: Any
    keys: Any
    offset_k: Any
    length_k: Any

    def num_blocks(self):
        return (self.keys.end - self.keys.begin) // BLOCK_N

    def starts(self, count):
        """Where the first `count` tiles of keys begin, the last first."""
        return range(self.keys.begin, self.keys.begin + count * BLOCK_N, BLOCK_N)[::-1]


class Call:
    """One at random: what the kernel is compiled for, and its arguments."""

    def __init__(self, case, draw):
        consumers, q_buffers = case
        through, skip_max = q_buffers >= 2 * consumers, draw.random() < 0.6
        columns, packed = 64 if through else 256, draw.random() < 0.3
        self.C = forward.Facts(
            D=columns, BLOCK_N=BLOCK_N, CONSUMERS=consumers, Q_BUFFERS=q_buffers, GROUP=1,
            VARLEN=packed, SPLIT=not packed and draw.random() < 0.3, SKIP_MAX=skip_max,
            PAGE_SIZE=draw.choice((0, 0, BLOCK_N // 2, 2 * BLOCK_N)),
            ZERO_V_TAIL=draw.random() < 0.5, HEAD_DIM=columns,
            SCORE_MODE="" if skip_max else draw.choice(("", "folded", "bounded")),
            LAZY_RESCALE=True, TMA_EPILOGUE=through,
        )  # fmt: skip
        self.left, self.right = draw.choice((None, None, 2 * BLOCK_N)), draw.choice((None, 0))
        self.total, fewest = 0, draw.choice((1, 4))
        while not fewest <= self.total <= 8:
            self.choose_lengths(64 * consumers, draw)
        self.programs = min(self.total, draw.choice((1, 1, 2)))
        self.counter = types.SimpleNamespace(value=0)

    def choose_lengths(self, block_m, draw):
        """Sequences and heads, which make `total` tiles of work."""
        self.batch, (self.nheads, self.group) = draw.randint(1, 4), draw.choice(((1, 1), (2, 2)))
        blocks = [draw.choice((0, 1, 1, 2, 2, 3, 5, 7)) for _ in range(self.batch)]
        used_k = [max(0, n * BLOCK_N - draw.randrange(BLOCK_N)) for n in blocks]
        lengths_q = [draw.randint(0, 2 * block_m) for _ in range(self.batch)]
        starts_q = list(itertools.accumulate(lengths_q, initial=0))
        self.pages = 8 * BLOCK_N // (self.C.PAGE_SIZE or 8 * BLOCK_N)  # of a sequence
        self.table = draw.sample(range(100), self.batch * self.pages)
        self.memory = [*used_k, *starts_q, *self.table]
        self.seqlen_q, self.total_q = max(lengths_q), starts_q[-1]
        self.num_m_blocks, units = -(-self.seqlen_q // block_m), self.batch * self.nheads
        if self.C.VARLEN:
            self.num_m_blocks, units = self.total_q // block_m + self.batch, self.nheads
        self.l2_group = draw.randint(1, units)
        self.splits = draw.randint(2, 3) if self.C.SPLIT else 1
        self.total = self.num_m_blocks * units * self.splits

    def arguments(self, kernel):
        box = min(BLOCK_N, self.C.PAGE_SIZE or BLOCK_N)
        descriptors = {
            f"{name}_desc": Descriptor(name, rows, self.C.D)
            for name, rows in (("q", 64), ("k", box), ("v", box), ("o", 64))
        }
        addresses = {
            "seqused_k": 0,
            "cu_seqlens_q": self.batch if self.C.VARLEN else None,
            "block_table": 2 * self.batch + 1 if self.C.PAGE_SIZE else None,
        }
        names = inspect.signature(kernel).parameters
        others = {"seqlen_k": 8 * BLOCK_N, "stride_table": self.pages, "appended": 0, "scale": ANY}
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return dict.fromkeys(names) | own | descriptors | addresses | others

    def queries(self, work, which):
        tile = work.tile
        row_q = tile.offset_q + tile.m_row + 64 * which
        return Tile([(0, "q", 0 if self.C.VARLEN else tile.b, row_q, tile.head, 0)])

    def keys(self, work, start, name="k"):
        """The tile of keys, or values, from `start`."""
        b, head, size = work.tile.b, work.tile.head // self.group, self.C.PAGE_SIZE
        if not size:
            return Tile([(0, name, b, work.offset_k + start, head, 0)])
        boxes = []
        for n in range(0, BLOCK_N, min(size, BLOCK_N)):
            inside = start + n < work.length_k
            page = self.table[b * self.pages + (start + n) // size] if inside else -1
            boxes.append((n, name, page, (start + n) % size, head, 0))
        return Tile(boxes)

    def last_key(self, work, which):
        """The last key that a consumer's rows see, -1 if none."""
        tile = work.tile
        consumer_row = tile.m_row + 64 * which
        if consumer_row >= tile.num_rows:
            return -1
        if self.right is None:
            return work.length_k - 1
        row = min(consumer_row + 64, tile.num_rows) - 1
        return min(row + work.length_k - tile.num_rows + self.right, work.length_k - 1)


class Launch:
    """Of the kernel for a call at random. The programs' actors take steps in a random order."""

    def __init__(self, kernel, case, seed):
        self.kernel, self.random = kernel, random.Random(f"{case} {seed}")
        self.call = Call(case, self.random)
        self.programs, self.memory = self.call.programs, self.call.memory
        self.consumers = range(self.call.C.CONSUMERS)
        self.actors, self.copies = [], []  # copies on their way: what their ends do
        self.stored = {}  # by TMA, and where
        self.works, self.overflowing = {}, {}
        self.attempts = defaultdict(list)  # of a consumer at a tile of work: whether it asks again

    def run(self):
        now.launch = self
        arguments = self.call.arguments(self.kernel.forward)
        for number in range(self.programs):
            now.actor = Actor(Program(number), "kernel", 4, self.kernel.forward(**arguments))
            for _ in now.actor.steps:
                pass
        for step in range(FOREVER):
            if step % 100 == 0:
                for actor in self.actors:
                    actor.speed = self.random.choice(SPEEDS)
            ready = [who for who in self.actors if who.wait is None or who.wait()] + self.copies
            if not ready:
                break
            (who,) = self.random.choices(ready, [who.speed for who in ready])
            if isinstance(who, Copy):
                self.copies.remove(who)
                who.end()
                continue
            now.actor = who
            try:
                who.wait = next(who.steps)
            except StopIteration:
                self.actors.remove(who)
        else:
            raise AssertionError("it goes on forever")
        assert not self.actors, f"deadlock of {[who.name for who in self.actors]}"
        assert not self.stored, "something was written, and nobody knows about it"
        assert self.call.counter.value == 0, "the next launch begins in the middle"
        for key in self.works:
            hard = [(key, which) in self.overflowing.values() for which in self.consumers]
            for which in self.consumers:
                asked = [hard[which]] * any(hard) + [False]
                assert self.attempts[key, which] == asked, "a tile of work was done how often?"

    def plan(self, loads, lengths, table, shared, C):
        """Before a program begins: what there is to do, and whose sums will overflow at first."""
        if self.works:
            return
        share = self.random.choice((0, 0, 0.3, 1)) if C.SKIP_MAX else 0
        for number in range(self.call.total):
            work = Work(*self.kernel.work_tile(number, loads, lengths, table, C))
            tile, key = work.tile, self.key(work.tile, work.tile.m_row, work.keys.result_idx)
            self.works[key] = work
            for which in self.consumers:
                inside = tile.m_row + 64 * which < tile.num_rows and work.num_blocks() > 0
                if inside and self.random.random() < share:
                    last = self.call.keys(work, work.keys.begin)
                    self.overflowing[self.call.queries(work, which), last] = key, which
        assert len(self.works) == self.call.total

    @staticmethod
    def key(tile, m_row, result_idx):
        return tile.b, tile.head, m_row, result_idx

    def overflows(self, terms):
        """`softmax.sums_overflow` of these terms. Nobody should ask for a tile a second time."""
        return bool(terms) and (terms[-1][0][0], terms[-1][0][1]) in self.overflowing

    def result(self, o, m, sums, lse_tile, which, whole, redo, tile, rows, stores, C):
        """`epilogue.store`: check that o is made of the tiles that it should be made of."""
        key = self.key(tile, tile.consumer_row - 64 * which, tile.result_idx)
        assert key in self.works, f"there is no such work: {key}"
        work, terms, attempts = self.works[key], settled(o), self.attempts[key, which]
        assert (tile.num_blocks, tile.num_rows) == (work.num_blocks(), work.tile.num_rows)
        expected = [
            (self.call.queries(work, which), self.call.keys(work, x), self.call.keys(work, x, "v"))
            for x in work.starts(len(terms))
        ]
        assert [(q, k, v) for (q, k, _), v in terms] == expected
        seen = (self.call.last_key(work, which) // BLOCK_N + 1) - work.keys.begin // BLOCK_N
        assert len(terms) >= min(max(seen, 1), tile.num_blocks), "keys were passed by"
        if attempts and attempts[-1]:
            assert all(exact for (_, _, exact), _ in terms), "sums will overflow again"
        if whole:
            at = 0 if C.VARLEN else tile.b, work.tile.offset_q + tile.consumer_row, tile.head, 0
            assert self.stored.pop(at) is o, "another result was written"
        attempts.append(bool(redo))


# -- Tests ----------------------------------------------------------------------------------------


@functools.cache
def kernel(wrong=None):
    return Kernel(WRONG[wrong][1] if wrong else {})


def search(kernel, case):
    for seed in range(SCHEDULES):
        try:
            Launch(kernel, case, seed).run()
        except AssertionError as error:
            raise AssertionError(f"{case}, seed {seed}: {error}") from error


@pytest.mark.parametrize("case", CASES)
def test_every_schedule_ends_and_every_tile_is_read_in_time(case):
    search(kernel(), case)


# Edits of functions that make the kernel wrong, and the cases in which they do. Each shows in one
# schedule of twenty, or more.
TWICE = [(c, n) for c, n in CASES if n >= 2 * c]  # each consumer has two buffers for queries
IN_TURN = [(c, n) for c, n in CASES if n < 2 * c]
WRONG = {
    # The wait of NOTES 111: where two share a barrier, either may take the other's phase for its.
    "queries arrive at the barrier of their buffer": (
        IN_TURN,
        {
            "pipeline.q_full": {
                "worked % 2 * CONSUMERS + which": (
                    "q_buffer_index(q_buffers, worked, which, CONSUMERS)"
                )
            },
            "mma.wait_q": {
                "worked // 2 & 1": "(worked * C.CONSUMERS + which) // C.Q_BUFFERS & 1",
            },
        },
    ),
    "what is passed by is freed before it is there": (
        CASES,
        {
            "pipeline.skip_block": {
                "consumer_wait(keys, n, True)": "pass",
                "consumer_wait(values, n, True)": "pass",
            }
        },
    ),
    "the producer ends without asking for the last turns": (
        CASES,
        {"scheduler.next_work_tile": {"if C.SKIP_MAX and tile_idx >= total": "if False"}},
    ),
    "what was asked for at the end still is": (
        CASES,
        {
            "scheduler.next_work_tile": {
                "store_field(sched, work_idx + 1, REDO + c, 0, ONE_WARP)": "pass"
            }
        },
    ),
    "fields are freed before all are read": (
        CASES,
        {
            "consumer.consume": {
                "scheduler.consumer_release(sched, work_idx)": "pass",
                "tile = epilogue.tile_of": (
                    "scheduler.consumer_release(sched, work_idx); tile = epilogue.tile_of"
                ),
            }
        },
    ),
    "a tile of values is not freed": (
        CASES,
        {"mma.mainloop": {"pipeline.consumer_release(values, n - 1, CONSUMERS)": "pass"}},
    ),
    "a tile of values is not waited for": (
        CASES,
        {"mma.mainloop": {"pipeline.consumer_wait(values, n - 1, True)": "pass"}},
    ),
    "keys are freed while a product reads them": (
        CASES,
        {
            "mma.mainloop": {
                "s = warpgroup_mma_wait(1, deps=[s])": "pass",
                "pipeline.consumer_release(keys, n, CONSUMERS)": (
                    "pipeline.consumer_release(keys, n, CONSUMERS)\n"
                    "        s = warpgroup_mma_wait(1, deps=[s])"
                ),
            }
        },
    ),
    "the parity of another tile": (
        CASES,
        {"pipeline.consumer_wait": {"n // STAGES & 1": "(n + 1) // STAGES & 1"}},
    ),
    "a stage is filled before it is free": (
        CASES,
        {"pipeline.load_stage": {"n >= STAGES": "n > STAGES"}},
    ),
    "a buffer of queries is filled before it is free": (
        CASES,
        {"producer.load_queries": {"mbarrier.wait(": "_ = ("}},
    ),
    "a tail is cleared before it is there": (
        CASES,
        {"pipeline.load_stage_zero_tail": {"times & 1": "times & 1 ^ 1"}},
    ),
    "a product may not see that a tail was cleared": (
        CASES,
        {"pipeline.load_stage_zero_tail": {"fence_async_shared()": "pass"}},
    ),
    "queries are freed one tile of work early": (
        TWICE,
        {"mma.release_previous_q": {"worked - 1": "worked"}},
    ),
    "queries are freed before the rows in their buffer are written out": (
        TWICE,
        {"mma.release_previous_q": {"tma.store_wait(0)": "pass"}},
    ),
    "a tile that is done again does without maxima again": (
        CASES,
        {"mma.own_blocks": {"scheduler.REDO + which) == 0": "scheduler.REDO + which) >= 0"}},
    ),
    "a tile that is done again draws": (
        CASES,
        {"producer.produce": {" & (not redo if SKIP_MAX else True)": ""}},
    ),
}


@pytest.mark.parametrize(
    ("wrong", "case"), [(wrong, case) for wrong, (cases, _) in WRONG.items() for case in cases]
)
def test_what_is_wrong_shows(wrong, case):
    edited = kernel(wrong)
    with pytest.raises(AssertionError, match="seed"):
        search(edited, case)
