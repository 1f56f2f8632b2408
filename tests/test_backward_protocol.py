"""The barriers of the Hopper backward kernels, in schedules at random.

The kernels' own functions run on the GPU of `test_protocol.py`. Actors here also know of what has
happened: an arrival at a barrier passes on what the actor has done and heard of, and whoever waits
there hears of it. An actor may read a tile if it has heard of the write, and write to it if it has
heard of all reads. A missing barrier shows even where events happen to come in the right order.

A result is the list of the products in its sum, and a product the set of the tiles that it is made
of. `Kernels` rebuilds the functions, and a `Launch` runs the programs of a random call.
"""

import inspect
import itertools
import random
import re
import sys
import types
from collections import defaultdict
from typing import NamedTuple

import pytest
import test_protocol as gpu
from test_protocol import ANY, Copy, Descriptor, Place, now, settled

backward = pytest.importorskip("mini_flash_attention.kernels.hopper.backward")
jobs, pieces = backward.roles.jobs, backward.roles.pieces

SCHEDULES = 4  # of each case and number of blocks
TOTALS = (0, 1, 2, 3, 5, 8)  # blocks of a program
DELTA, TURNS = 10**6, 2 * 10**6  # addresses of arrays; L begins at 0


# -- The GPU --------------------------------------------------------------------------------------


def hear(known, more):
    """`known` has the number of messages that have come from each actor, directly or not."""
    for actor, count in more.items():
        known[actor] = max(count, known.get(actor, 0))


def pass_on(known):
    """Tell `known` of all that this actor has done and heard of."""
    now.actor.seen[now.actor] += 1
    hear(known, now.actor.seen)


def done_now():
    """What this actor does now is part of its next message."""
    return {now.actor: now.actor.seen[now.actor]}


def assert_heard(done, what):
    for actor, count in done.items():
        heard = actor is now.actor or now.actor.seen[actor] > count
        assert heard, f"{now.actor.name} has not heard that {actor.name} has {what} this"


class Hearsay:
    """What a barrier passes on in each phase."""

    def __init__(self, *given):
        super().__init__(*given)
        self.known = defaultdict(dict)

    def arrive(self, *given):
        pass_on(self.known[self.phase])
        super().arrive(*given)


class Mbarrier(Hearsay, gpu.Mbarrier):
    pass


class NamedBarrier(Hearsay, gpu.NamedBarrier):
    pass


class Value(gpu.Result):
    """Registers. `tiles` has a set of tiles for each product."""

    __slots__ = ()

    def combined(self, other):
        more = settled(other) if isinstance(other, Value) else ()
        return Value(settled(self) + more, None)

    __mul__ = __add__ = combined

    def __neg__(self):
        return self


ZEROS = Value((), None)


def sources(x):
    """What an operand is made of."""
    if isinstance(x, Value):
        return frozenset().union(*settled(x))
    return frozenset((name, row, head) for _, name, _, row, head, _ in x)


class Buffer(Place):
    """A `Place` with its last write, and with the last read of each actor since then."""

    def __init__(self, shape):
        super().__init__(shape)
        self.written, self.reads = {}, {}

    def slice(self, *_):
        return self

    def check(self):
        super().check()
        assert_heard(self.written, "written")

    def overwrite(self):
        self.check()
        assert not self.readers, f"{now.actor.name} overwrites what {self.readers} reads"
        assert_heard(self.reads, "read")
        self.reads = {}

    def begin_load(self, barrier, row=0):
        self.overwrite()
        super().begin_load(barrier, row)

    def end_read(self, reader):
        self.readers.remove(reader)
        self.reads |= done_now()

    def load(self, layout):
        content = yield from super().load(layout)
        assert self.written, f"{now.actor.name} reads what nobody has written"
        self.reads |= done_now()
        return content

    def store(self, content):
        yield
        self.overwrite()
        self.content = Value(settled(content), None) if content else ZEROS
        self.arrival, self.fenced, self.written = None, False, done_now()
        now.actor.unfenced.append(self)


def allocate_shared_memory(dtype, shape, layout):
    yield
    return gpu.Array(Mbarrier if dtype == "int64" else lambda: Buffer(shape[1:]), shape)


def wait(barrier, parity, pred=True):
    if pred:
        yield from gpu.wait(barrier, parity)
        hear(now.actor.seen, barrier.known[barrier.phase - 1])


def inline_asm_elementwise(ptx, constraints, args, *_):
    """Of a named barrier, of the wait for all additions, else a move."""
    if ptx.startswith("cp.async.bulk.wait_group 0;"):
        stores = now.launch.stores[now.actor]
        yield lambda: all(store.is_written for store in stores)
    operation, threads = gpu.barrier_operation(ptx)
    if operation is None:
        return args[0]
    new, first = NamedBarrier(threads), 3  # Triton takes those before
    barrier, phase = yield from gpu.named_barrier(operation, args[0], new, first)
    if operation == "sync":
        hear(now.actor.seen, barrier.known[phase])
    return ANY


def fence_async_shared():
    for place in now.actor.unfenced:
        place.fenced, place.written = True, done_now()
    now.actor.unfenced.clear()


def warpgroup_mma(a, b, accumulator, use_acc=True, is_async=False):
    yield
    product = gpu.Product(now.actor, [x for x in (a, b) if isinstance(x, Place)])
    now.actor.products.append(product)
    a, b = (sources(x.read(product) if isinstance(x, Place) else x) for x in (a, b))
    return Value((*(accumulator.tiles if use_acc else ()), a | b), product)


def warpgroup_mma_wait(pending, deps):
    """The oldest end first."""
    yield
    products = now.actor.products
    while len(products) > pending:
        product = products.pop(0)
        for place in product.places:
            place.end_read(product)
    return deps[0] if len(deps) == 1 else deps


class Store:
    """A store or an addition by TMA. It has read its place some time before it has written."""

    def __init__(self, place):
        self.place, self.actor = place, now.actor
        self.is_read = self.is_written = self.is_over = False
        now.launch.copies.append(Copy(self.end_read))

    def __repr__(self):
        return f"a store of {self.actor.name}"

    def end_read(self):
        self.is_read = True
        now.launch.copies.append(Copy(self.end_write))

    def end_write(self):
        self.is_written = True


def tma_store(desc, at, place):
    yield
    store = Store(place)
    now.launch.stores[now.actor].append(store)
    now.launch.result(desc.name, tuple(at), place.read(store), store)


def store_wait(pending):
    """Wait until all stores but the last `pending` have read their places."""
    stores = now.launch.stores[now.actor]
    awaited = [store for store in stores[: len(stores) - pending] if not store.is_over]
    yield lambda: all(store.is_read for store in awaited)
    for store in awaited:
        store.is_over = True
        store.place.end_read(store)


def load(address, mask=True, other=None, volatile=False):
    """L or delta, or the number of turns that are over."""
    yield
    if volatile:
        return now.launch.turns[address]
    if not mask:
        return ZEROS
    name = "delta" if address >= DELTA else "lse"
    head, row = divmod(address % DELTA, now.launch.call.seqlen_q)
    return Value((frozenset([(name, row, head)]),), None)


def atomic_add(address, value, sem):
    yield
    now.launch.turns[address] += value


class Language(gpu.Language):
    allocate_shared_memory = staticmethod(allocate_shared_memory)
    inline_asm_elementwise = staticmethod(inline_asm_elementwise)
    load, atomic_add = staticmethod(load), staticmethod(atomic_add)
    zeros, arange = staticmethod(lambda *_: ZEROS), staticmethod(lambda *_: 0)
    broadcast = staticmethod(lambda a, b: (a, b))
    minimum = staticmethod(lambda a, b: a if isinstance(a, Value) else min(a, b))
    exp2 = reshape = permute = expand_dims = staticmethod(lambda x, *_: x)


FAKES = {
    "gl": Language(),
    "mbarrier": types.SimpleNamespace(**vars(gpu.FAKES["mbarrier"]) | {"wait": wait}),
    "tma": types.SimpleNamespace(store_wait=store_wait),
    "tma_store": tma_store,
    "tma_add": tma_store,
    "fence_async_shared": fence_async_shared,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "hide": lambda x, *_: x,
}


# -- The kernels, and calls -----------------------------------------------------------------------

IN_STEPS: dict = {}  # what `Kernels` made of functions before


class Kernels(gpu.Kernel):
    """The functions of the kernels as Python. Edits may also be new values of constants."""

    def __init__(self, edits):
        self.scopes, self.edits = {}, dict(edits)
        self.all = types.SimpleNamespace(**self.scope(backward))
        self.of_keys = self.all.roles.jobs
        self.of_queries = types.SimpleNamespace(**self.scopes[f"{self.HOPPER}.backward_dq"])
        assert not self.edits, "there are no such functions"

    def plain(self, name, value, module, scope):
        path = f"{module.__name__}.{name}".removeprefix(f"{self.HOPPER}.")
        if name in FAKES:
            return FAKES[name]
        if path in self.edits and isinstance(value, backward.gl.constexpr):
            return self.edits.pop(path)
        function = getattr(value, "fn", None)
        for used in function.__code__.co_names if inspect.isfunction(function) else ():
            if used in vars(module) and used not in scope:  # `Steps` has to know it
                scope[used] = None
                scope[used] = self.plain(used, vars(module)[used], module, scope)
        return scope.get(name) or super().plain(name, value, module, scope)

    @staticmethod
    def in_steps(function, scope, edits):
        if edits:
            return gpu.Kernel.in_steps(function, scope, edits)
        if function not in IN_STEPS:
            IN_STEPS[function] = gpu.Kernel.in_steps(function, scope, {})
        same = IN_STEPS[function]
        return types.FunctionType(same.__code__, scope, same.__name__, same.__defaults__)


class Case(NamedTuple):
    kernel: str
    D: int
    D_V: int
    BLOCK_M: int
    BLOCK_N: int
    GROUP: int
    ORDERED: bool


FUSED, DKDV, DQ = "backward_hopper_kernel", "dkdv_hopper_kernel", "dq_hopper_kernel"
CASES = [
    *(
        Case(FUSED, columns, columns, 8192 // columns, 128, group, ordered)
        for columns in (64, 128)
        for group in (1, 2)
        for ordered in (False, True)
    ),
    Case(DKDV, 192, 128, 64, 64, 2, False),
    Case(DKDV, 256, 256, 64, 64, 1, False),
    Case(DQ, 192, 128, 128, 64, 1, False),
    Case(DQ, 256, 256, 128, 64, 1, False),
]


class Call:
    """A random call. Its first program has `total` blocks, and a window hides parts of them."""

    def __init__(self, case, total, draw):
        self.C = jobs.Facts(
            *case[1:6], VARLEN=False, ADDS_DQ=case.kernel == FUSED, ORDERED=case.ORDERED
        )
        self.counter = types.SimpleNamespace(value=0)
        tile, block = case.BLOCK_N, case.BLOCK_M
        if case.kernel == DQ:
            tile, block = block, tile
        own = draw.choice((tile, 2 * tile)) - draw.choice((0, draw.randrange(tile)))
        others = max(0, total // case.GROUP * block - draw.choice((0, draw.randrange(block))))
        # Row x sees the others from x - a, or an earlier one, to x + others - b.
        below = draw.choice((None, max(0, others - own + draw.randrange(70))))
        above = draw.choice((None, own - draw.randint(1, min(own, 70))))
        if case.kernel == DQ:
            self.seqlen_q, self.seqlen_k, self.left, self.right = own, others, below, above
        else:
            self.seqlen_q, self.seqlen_k, self.left, self.right = others, own, above, below
        self.total_q, self.total_k = self.seqlen_q, self.seqlen_k
        self.batch = self.nheads = self.nheads_k = self.l2_group = self.scale = 1
        self.num_m_blocks = self.num_n_blocks = -(-own // tile)
        self.lse, self.delta, self.turns, self.softmax_scale = 0, DELTA, TURNS, 1
        for name in ("q", "k", "v", "do", "dq", "dk", "dv"):
            rows = case.BLOCK_M if name in ("q", "do") and case.kernel != DQ else 64
            columns = case.D_V if name in ("v", "do", "dv") else case.D
            descriptor = Descriptor(name, rows, pieces.piece_columns(columns))
            setattr(self, f"{name}_desc", descriptor)

    def arguments(self, kernel):
        return {x: getattr(self, x, None) for x in inspect.signature(kernel).parameters}


def made_of(name, row, head, start):
    """The product for dV, dK or dQ of the queries from `row` and the keys from `start`."""
    of_queries, of_keys = ("q", "lse", "do", "delta"), ("k", "v")
    if name == "dv":
        of_queries, of_keys = ("q", "lse", "do"), ("k",)
    return frozenset({(x, row, head) for x in of_queries} | {(x, start, 0) for x in of_keys})


class Launch(gpu.Launch):
    """A launch of a kernel for a random call."""

    def __init__(self, kernels, case, total, seed):
        self.random = random.Random(f"{case} {total} {seed}")
        self.kernels, self.case, self.total = kernels, case, total
        self.kernel = types.SimpleNamespace(forward=getattr(kernels.all, case.kernel))
        self.call = Call(case, total, self.random)
        self.programs = self.call.num_n_blocks
        self.actors, self.copies, self.stored, self.works = [], [], {}, {}
        self.stores, self.turns = defaultdict(list), defaultdict(int)
        self.added = defaultdict(list)  # to dQ, by place
        self.expected, self.totals = {}, []  # what is to be written; blocks of programs

    def run(self):
        super().run()
        assert max(self.totals) == self.total
        assert not self.expected, f"nobody has written {sorted(self.expected)}"
        for store in itertools.chain(*self.stores.values()):
            assert store.is_over, f"nobody has waited for {store}"

    def plan(self, *given):
        """Collect what a program is to write, before it begins."""
        number, C = now.actor.program.number, self.call.C
        if self.case.kernel == DQ:
            rules = self.kernels.of_queries
            job = rules.job_of(number, *given[:4])
            blocks = [rules.first_key(n, job) for n in range(job.num_blocks)]
            for row in (job.tile.m_row, job.tile.m_row + 64):
                used = blocks if row < job.tile.num_rows else []
                self.expect("dq", C.D, row, [(row, 0, start) for start in used])
        else:
            rules = self.kernels.of_keys
            job = rules.work_of(number, *given[:4], C)
            blocks = [rules.nth_block(n, job, C)[::-1] for n in range(rules.num_blocks(job, C))]
            for start in range(job.n_row, job.n_row + C.BLOCK_N, 64):
                used = blocks if start < job.keys.count else []
                self.expect("dv", C.D_V, start, [(*block, start) for block in used])
                self.expect("dk", C.D, start, [(*block, start) for block in used])
            for row, head in blocks if C.ADDS_DQ else ():
                halves = tuple(made_of("dq", row, head, job.n_row + x) for x in (0, 64))
                for x in (0, 1):
                    down, right = (0, C.D // 2 * x) if C.BLOCK_M == 64 else (64 * x, 0)
                    self.expected[number, "dq", (0, head, row + down, right)] = halves
        assert len(set(blocks)) == len(blocks)
        self.totals.append(len(blocks))

    def expect(self, name, columns, row, products):
        for column in range(0, columns, pieces.piece_columns(columns)):
            key = now.actor.program.number, name, (0, row, 0, column)
            self.expected[key] = tuple(made_of(name, *x) for x in products)

    def result(self, name, at, content, store):
        """Check what is written or added."""
        number = now.actor.program.number
        assert (number, name, at) in self.expected, f"{name} at {at} is not to be written"
        right = content and content == (self.expected.pop((number, name, at)), None)
        assert right, f"{name} at {at} is made of {content}"
        for earlier in self.added[name, at] if self.case.ORDERED else ():
            in_turn = earlier.is_written and earlier.actor.program.number < number
            assert in_turn, f"{now.actor.name} adds before {earlier.actor.name} has"
        self.added[name, at].append(store)


# -- Tests ----------------------------------------------------------------------------------------


def search(kernels, cases, schedules=SCHEDULES):
    for seed, case, total in itertools.product(range(schedules), cases, TOTALS):
        if total % case.GROUP == 0:
            try:
                Launch(kernels, case, total, seed).run()
            except AssertionError as error:
                raise AssertionError(f"{case}, {total}, seed {seed}: {error}") from error


@pytest.mark.parametrize("case", CASES)
def test_every_schedule_ends_and_every_tile_is_read_in_time(case):
    search(Kernels({}), [case])


# Statements that wait, let others go on, or make something visible to them.
SYNCHRONISATION = re.compile(
    r"named_barrier\(|mbarrier\.\w+\(|tma\.store_wait\(|fence_async_shared\(|end_turn\(|"
    r"patience = take_turn\(|.* = warpgroup_mma_wait\(\d, deps=\[[\w, ]*\]\)"
)


def faults_of(name):
    """Edits of a module's functions: each such statement left out, and each arrival exchanged with
    the statement above it.
    """
    module = sys.modules[f"{Kernels.HOPPER}.{name}"]
    for function in (getattr(value, "fn", None) for value in vars(module).values()):
        if not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        path = f"{name}.{function.__name__}"
        for above, line in itertools.pairwise(inspect.getsource(function).splitlines()):
            statement = line.strip()
            indent = line[: -len(statement)]
            if SYNCHRONISATION.match(statement) and not path.endswith("_kernel"):
                yield (
                    f"{path}: no {statement}",
                    {path: {f"{above}\n{line}": f"{above}\n{indent}pass"}},
                )
            if "arrive" in statement and re.match(rf"{indent}\w", above):
                yield f"{path}: early {statement}", {path: {f"{above}\n{line}": f"{line}\n{above}"}}


STEP, HAND_OVER, CONSUME = (f"backward_roles.{x}" for x in ("step", "hand_over", "consume"))
WRITE, PRODUCE, END_TURN = (f"backward_roles.{x}" for x in ("write", "produce", "end_turn"))
SYNC_DS = """\
    if which == 1:
        named_barrier("sync", DS_FULL, CONSUMER_THREADS)
    elif n > 0:
        named_barrier("sync", DS_FULL + 1, CONSUMER_THREADS)
"""
SYNC_DQ = 'named_barrier("sync", DQ_EMPTY + which, WRITERS)'
SYNC_BOTH = 'named_barrier("sync", BOTH_CONSUMERS, CONSUMER_THREADS)  # both have read K'
SYNC_DO = '        if n >= STAGES:\n            named_barrier("sync", DO_EMPTY'
STORE_LSE = "        tiles.lse.index(stage).store(lse)\n"
FENCE = "    fence_async_shared()\n"
FAULTS = {
    **dict(faults_of("backward_roles")),
    **dict(faults_of("backward_pieces")),
    **dict(faults_of("backward_dkdv")),
    **dict(faults_of("backward_dq")),
    "dS overwrites what the other consumer reads": {
        STEP: {SYNC_DS: "", "    dv = warpgroup_mma": f"{SYNC_DS}    dv = warpgroup_mma"}
    },
    "dQ begins before the other consumer's dS is there": {
        STEP: {SYNC_DS: "", "    ds_operand =": f"{SYNC_DS}    ds_operand ="}
    },
    "dS is announced before a product may see it": {
        STEP: {FENCE: "", "    # Of block n - LAG": f"{FENCE}    # Of block n - LAG"}
    },
    "consumer 0's dQ is that of the same block": {
        STEP: {"issue_dq(which, (n + LAG)": "issue_dq(which, n"}
    },
    "dQ is written before TMA has read that of the block before": {
        HAND_OVER: {
            SYNC_DQ: "pass",
            f"    {FENCE}": f"        if n > 0:\n            {SYNC_DQ}\n    {FENCE}",
        }
    },
    "dK and dV overwrite K and V while they are read": {
        CONSUME: {SYNC_DQ: "pass", SYNC_BOTH: "pass"}
    },
    "L is written before its stage is empty": {
        PRODUCE: {STORE_LSE: "", SYNC_DO: STORE_LSE + SYNC_DO}
    },
    "the writer waits for one of two additions": {
        WRITE: {"tma.store_wait(which)": "tma.store_wait(1)"}
    },
    "the writer takes consumer 0's half first": {
        WRITE: {"(1, -1, -1):\n            named_barrier": "(2):\n            named_barrier"}
    },
    "a turn ends before its additions": {END_TURN: {"cp.async.bulk.wait_group 0; ": ""}},
    "the programs of the first keys come first": {
        "backward_work.work_of": {"if not C.ORDERED": "if True"}
    },
    "DO_EMPTY is Q_EMPTY + 1": {"backward_roles.DO_EMPTY": 9},
    "DS_FULL + 1 is BOTH_CONSUMERS": {"backward_roles.DS_FULL": 6},
    "a stage is empty without the producer": {"backward_roles.READERS": 256},
    "dV overwrites V while dP reads it": {
        "backward_dkdv.consume_dv": {'"sync", roles.BOTH': '"arrive", roles.BOTH'}
    },
}
HARMLESS = {
    # Either of these two is enough.
    f"{CONSUME}: no {SYNC_DQ}",
    f"{CONSUME}: no {SYNC_BOTH}",
    # P_FULL comes after a wait for the same Q.
    "backward_dkdv.issue_dk: no mbarrier.wait(full.q.index(stage), n // roles.STAGES & 1)",
    # P is written after a wait for Q, for which the stage of Q, and so that of P, has been read.
    'backward_dkdv.compute_ds: early named_barrier("arrive", P_EMPTY + stage, '
    "roles.CONSUMER_THREADS)",
    # The producer waits for K_EMPTY first, where consumers arrive later than at V_EMPTY.
    'backward_dq.step: early named_barrier("arrive", V_EMPTY + n % v_stages(C.D, C.D_V), '
    "roles.READERS)",
    # This one is there for speed.
    'backward_dq.add_blocks: no named_barrier("sync", roles.BOTH_CONSUMERS, '
    "roles.CONSUMER_THREADS)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_shows(fault):
    kernels, module = Kernels(FAULTS[fault]), next(iter(FAULTS[fault])).split(".")[0]
    kernel = {"backward_dkdv": DKDV, "backward_dq": DQ}.get(module, FUSED)
    cases = [case for case in CASES if case.kernel == kernel]
    if fault in HARMLESS:
        search(kernels, cases, schedules=1)
    else:
        with pytest.raises(AssertionError, match="seed"):
            search(kernels, cases)


def test_harmless_faults_exist():
    assert FAULTS.keys() >= HARMLESS
