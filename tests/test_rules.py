"""The rules as plain Python, against brute force.

A rule is Python that Triton reads. `mini_flash_attention.triton_on_cpu`, which runs what users
write in Triton's language, runs it too. Here it also knows the functions that need a whole tile,
and refuses what a GPU would do differently or not survive: numbers past 32 bits, division of
negative ones, loads that leave open what they give.
"""

import functools
import importlib
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_flash_attention import reference, rules, triton_on_cpu
from mini_flash_attention.plan.scores import choose_score_mode
from mini_flash_attention.rules import window
from mini_flash_attention.rules.window import Window
from mini_flash_attention.triton_on_cpu import LANGUAGE, Names, Pointer, Rebuilder, Tile, tensor

tl = pytest.importorskip("triton.language")
from mini_flash_attention.rules.dropout import Dropout  # noqa: E402
from mini_flash_attention.rules.scores import INTERPRETED, Modification  # noqa: E402
from mini_flash_attention.rules.sequence import Lengths  # noqa: E402
from mini_flash_attention.rules.work import Grid  # noqa: E402

LOG2E = math.log2(math.e)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1

searched = settings(deadline=None, derandomize=True, max_examples=300)
sampled = settings(searched, max_examples=60)  # where an example is many calls

# -- Triton's language, stricter and with what a score_mod may not call ---------------------------


class Int32(int):
    """A number as the GPU counts: in 32 bits, and with // and % that round towards zero."""


def checked(operator):
    def apply(self, other):
        result = getattr(int, operator)(self, other)
        if result is NotImplemented:
            return result
        assert INT_MIN <= result <= INT_MAX, f"{self} {operator} {other} overflows"
        rounds = operator.endswith(("floordiv__", "mod__")) and (self < 0 or other < 0)
        assert not rounds, f"{self} {operator} {other} depends on how it is rounded"
        return Int32(result)

    return apply


for operator in ("add", "sub", "mul", "floordiv", "mod"):
    for name in (f"__{operator}__", f"__r{operator}__"):
        setattr(Int32, name, checked(name))


def or_number(of_tiles, of_numbers):
    """A function that stays among numbers where it is given nothing else: quick, and `Int32`."""

    def apply(*operands):
        for x in operands:
            if isinstance(x, (Tile, torch.Tensor)):
                return of_tiles(*operands)
        result = of_numbers(*operands)
        return Int32(result) if isinstance(result, int) else result

    return apply


def load(pointer, mask=True, other=None):
    """One number may also come from a list."""
    if isinstance(pointer.index, int) and mask is True:
        assert 0 <= pointer.index < len(pointer.memory), f"a load at {pointer.index}"
        return Int32(pointer.memory[pointer.index])
    assert other is not None or tensor(mask).all(), "a masked load without `other` gives anything"
    return triton_on_cpu.load(pointer, mask, other)


def cast(x, dtype):
    """Tests have fp64 where kernels have fp32, and it stays that: a rule without its rounding."""
    return x if x.dtype is torch.float64 else LANGUAGE.cast(x, dtype)


def philox(seed, *counter):
    """Four words of 32 bits each: Philox4x32-10 as its authors give it (Salmon et al., 2011)."""
    words = [tensor(x).numpy().astype(np.uint64) & 0xFFFFFFFF for x in counter]
    keys = [int(seed) & 0xFFFFFFFF, int(seed) >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        one, two = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        low, high = [x & 0xFFFFFFFF for x in (one, two)], [x >> 32 for x in (one, two)]
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
        weyl = (0x9E3779B9, 0xBB67AE85)
        keys = [(key + step) & 0xFFFFFFFF for key, step in zip(keys, weyl, strict=True)]
    return [Tile(torch.from_numpy(x.astype(np.int64))) for x in words]


def extended(names, **more):
    return Names(**{**vars(names), **more})


language = extended(
    LANGUAGE,
    load=load,
    cast=cast,
    where=or_number(LANGUAGE.where, lambda condition, a, b: a if condition else b),
    minimum=or_number(LANGUAGE.minimum, min),
    maximum=or_number(LANGUAGE.maximum, max),
    arange=functools.partial(torch.arange, dtype=torch.int32),
    # Like the maximum of two, the largest of all is a number where there is any.
    max=lambda x, axis, keep_dims=False: functools.reduce(
        torch.fmax, x.split(1, axis) if keep_dims else x.unbind(axis)
    ),
    sum=lambda x, axis, keep_dims=False: torch.sum(x, axis, keep_dims),
    expand_dims=torch.unsqueeze,
    philox=philox,
)
of_gluon = extended(
    language,
    arange=lambda start, end, layout: language.arange(start, end),
    reshape=torch.reshape,
    convert_layout=lambda x, layout, assert_trivial=False: x,
    SliceLayout=lambda *_: None,
)


class Rules(Rebuilder):
    """Rebuilds rules, and what kernels in Gluon have in their place."""

    def value(self, x):
        if x is INTERPRETED:
            return True  # there an instruction of the GPU's is spelt out
        if getattr(x, "__name__", None) == "triton.experimental.gluon.language":
            return of_gluon
        return super().value(x)

    def of_triton(self, names, x):
        return super().of_triton(language if names is LANGUAGE else names, x)


RULES = Rules()
MODULES = sorted(path.stem for path in Path(rules.__file__).parent.glob("[!_]*.py"))


def functions_of(name):
    """The rules that a module has: compiled ones, and functions of Python's that it defines."""
    module = importlib.import_module(f"{rules.__name__}.{name}")
    return {
        rule: x
        for rule, x in vars(module).items()
        if hasattr(x, "fn")
        or (isinstance(x, types.FunctionType) and x.__module__ == module.__name__)
    }


def plain(name):
    """The rules of rules/<name>.py as functions of Python."""
    made = {rule: RULES.function(x) for rule, x in functions_of(name).items()}
    return types.SimpleNamespace(**made)


dropout, heads, mask, paging, rotary, scores, sequence, softmax, split, tile_order, work = (
    plain(name) for name in MODULES if name != "window"
)


@pytest.mark.parametrize("name", MODULES)
def test_every_rule_has_a_test(name):
    assert functions_of(name)
    for rule in functions_of(name):
        assert f"{name}.{rule}(" in Path(__file__).read_text(), f"{name}.{rule} has none"


@pytest.mark.parametrize("name", MODULES)
def test_interpreter_finds_its_language(name):
    """It looks for `tl` in the module of every function it runs, used or not."""
    for rule, x in functions_of(name).items():
        assert not hasattr(x, "fn") or x.fn.__globals__.get("tl") is tl, rule


# -- window ---------------------------------------------------------------------------------------

SIZES = st.integers(1, 40)


@given(seqlen_q=SIZES, seqlen_k=SIZES, left=st.integers(0, 40), right=st.integers(0, 40))
@searched
def test_window(seqlen_q, seqlen_k, left, right):
    """Of tensors, as the CPU path asks, and of numbers, as the host and kernels do."""
    sides = Window(*map(Int32, (seqlen_k - seqlen_q, left, right)), None, Int32(seqlen_k))
    i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)[None, :]
    first, last = window.first_visible(i, sides), window.last_visible(i, sides)
    expected = reference.visibility(seqlen_q, seqlen_k, False, (left, right))
    assert torch.equal((j >= first) & (j <= last), expected)
    assert (last - first == left + right).all(), "the window's ends, whether or not keys are there"
    for n in range(seqlen_q):
        assert window.first_visible(Int32(n), sides) == mask.first_visible(Int32(n), sides)
        assert window.last_visible(Int32(n), sides) == mask.last_visible(Int32(n), sides)
        ends = mask.first_visible(Int32(n), sides), mask.last_visible(Int32(n), sides)
        assert ends == (first[n], last[n])


# -- mask -----------------------------------------------------------------------------------------

BOUNDS = st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40))
# The first key there is. Whoever has one gives a left bound too, however far.
PADS = st.none() | st.integers(0, 300)


def window_of(diagonal, bounds, pad, seqlen_k):
    """A window as kernels make it of what they are given."""
    left, right = (None if x is None else Int32(x) for x in bounds)
    first_key = None if pad is None or left is None else Int32(min(pad, seqlen_k))
    return Window(Int32(diagonal), left, right, first_key, Int32(seqlen_k))


@given(seqlen_q=SIZES, seqlen_k=SIZES, bounds=BOUNDS, pad=PADS)
@searched
def test_is_visible(seqlen_q, seqlen_k, bounds, pad):
    sides = window_of(seqlen_k - seqlen_q, bounds, pad, seqlen_k)
    i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k + 9)[None, :]
    i, j = Tile(i.int()), Tile(j.int())
    visible = mask.is_visible(i, j, sides).values.expand(seqlen_q, -1)
    left_right = tuple(-1 if w is None else w for w in bounds)
    expected = reference.visibility(seqlen_q, seqlen_k, False, left_right)
    expected = expected & (j.values >= (sides.first_key or 0))[:, :-9]
    assert torch.equal(visible[:, :seqlen_k], expected)
    assert not visible[:, seqlen_k:].any(), "keys past the end"
    assert torch.equal(mask.num_visible(i, sides).values.clamp(min=0), visible.sum(1, True))
    first, last = mask.bounds(i, sides)
    between = ((j >= first) & (j <= last)).values
    assert torch.equal(between.expand(seqlen_q, -1), visible)


@given(
    first=st.integers(0, 150), rows=st.integers(1, 130), after=st.integers(0, 150),
    seqlen_k=st.integers(0, 300), bounds=BOUNDS, block=st.sampled_from([1, 2, 16, 32, 128]),
    pad=PADS,
)  # fmt: skip
@settings(searched, max_examples=3000)
def test_n_block_range(first, rows, after, seqlen_k, bounds, block, pad):
    """begin..end are exactly the tiles that a row sees something of, full those all see whole.

    But for the tile of the first key there is, which may be read although rows see nothing of it.
    """
    diagonal = seqlen_k - (first + rows + after)  # rows of queries stand between others
    sides = window_of(diagonal, bounds, pad, seqlen_k)
    left, right = bounds
    pad = sides.first_key
    blocks = mask.n_block_range(Int32(first), Int32(first + rows - 1), sides, block)
    begin, full_begin, full_end, end = blocks
    assert 0 <= begin <= full_begin <= full_end <= end
    assert not any(bound % block for bound in blocks)

    i = torch.arange(first, first + rows)[:, None] + diagonal  # where each query stands
    tiles = -(-(seqlen_k + 1) // block)
    j = torch.arange(tiles * block)[None, :]
    seen = (j < seqlen_k).expand(rows, -1)
    if left is not None:
        seen = seen & (j >= i - left) & (j >= (pad or 0))
    if right is not None:
        seen = seen & (j <= i + right)
    per_tile = seen.view(rows, tiles, block)
    number = torch.arange(tiles) * block
    read, wanted = (number >= begin) & (number < end), per_tile.any(0).any(-1)
    if pad is not None and not wanted.any():
        read = read & (number != pad // block * block)
    assert torch.equal(wanted, read)
    assert torch.equal(per_tile.all(0).all(-1), (number >= full_begin) & (number < full_end))


# -- tile order -----------------------------------------------------------------------------------


@given(tiles=st.integers(1, 20), units=st.integers(1, 20), per_group=st.integers(1, 25))
@searched
def test_m_block_and_head(tiles, units, per_group):
    """Every tile of every unit once; units group by group; inside a group the last tiles first."""
    order = [
        tile_order.m_block_and_head(Int32(n), Int32(tiles), units, per_group)
        for n in range(tiles * units)
    ]
    assert sorted(order) == [(tile, unit) for tile in range(tiles) for unit in range(units)]
    assert order == sorted(order, key=lambda at: (at[1] // per_group, -at[0], at[1]))


# -- sequence -------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=12)
GARBAGE = st.lists(
    st.integers(-5, 200) | st.sampled_from([INT_MIN, INT_MAX]) | st.integers(INT_MIN, INT_MAX),
    min_size=2, max_size=12,
)  # fmt: skip
BLOCKS = st.sampled_from([1, 2, 16, 64, 128])


def programs_for(cu_seqlens, total, block):
    """(entry, tile inside it) of every program that kernels start for these sequences."""
    batch = len(cu_seqlens) - 1
    pointer = Pointer(cu_seqlens)
    return [
        sequence.find(Int32(tile), pointer, batch, total, block)
        for tile in range(total // block + batch)
    ]


@given(lengths=LENGTHS, padding=st.integers(0, 80), block=BLOCKS)
@searched
def test_every_row_has_one_program(lengths, padding, block):
    """Also the rows after the last sequence, which belong to its programs and become zeros."""
    cu_seqlens = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    total = cu_seqlens[-1] + padding
    programs = [0] * total
    for b, tile in programs_for(cu_seqlens, total, block):
        start, rows = sequence.query_span(b, Pointer(cu_seqlens), total)
        assert (start, rows) == (cu_seqlens[b], lengths[b])
        assert (start, rows) == sequence.span(b, Pointer(cu_seqlens), total)
        assert tile >= 0
        end = total if b == len(lengths) - 1 else start + rows
        for row in range(start + tile * block, min(start + (tile + 1) * block, end)):
            programs[row] += 1
    assert programs == [1] * total


@given(lengths=LENGTHS, first=st.integers(-5, 200), block=BLOCKS)
@searched
def test_no_row_is_left_out_before_a_wrong_first_entry(lengths, first, block):
    cu_seqlens = [first, *(sum(lengths[: b + 1]) for b in range(len(lengths)))]
    total = cu_seqlens[-1]
    written = [False] * total
    for b, tile in programs_for(cu_seqlens, total, block):
        start, rows = sequence.query_span(b, Pointer(cu_seqlens), total)
        assert start == sequence.query_start(b, Pointer(cu_seqlens), total)
        end = total if b == len(lengths) - 1 else start + rows
        for row in range(start + tile * block, min(start + (tile + 1) * block, end)):
            written[row] = True
    assert all(written)


@given(lengths=LENGTHS, block=BLOCKS)
@searched
def test_first_tile(lengths, block):
    """Room for all tiles of a sequence, and at most one left unused."""
    cu_seqlens = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    first = [
        sequence.first_tile(b, Pointer(cu_seqlens), cu_seqlens[-1], block)
        for b in range(len(cu_seqlens))
    ]
    assert first[0] == 0
    for b, length in enumerate(lengths):
        assert 0 <= first[b + 1] - first[b] - -(-length // block) <= 1


@given(cu_seqlens=GARBAGE, total=st.integers(0, 200), block=BLOCKS)
@searched
def test_garbage_stays_inside(cu_seqlens, total, block):
    """Any content ends, names an entry that exists, and spans rows that exist."""
    for b, tile in programs_for(cu_seqlens, total, block):
        assert 0 <= b < len(cu_seqlens) - 1
        start, rows = sequence.span(b, Pointer(cu_seqlens), total)
        assert 0 <= start <= start + rows <= total
        # Not even a tile counted from a wrong start begins before the tensor.
        assert start + tile * block >= 0
        row = sequence.query_start(b, Pointer(cu_seqlens), total) + tile * block
        assert row + block <= total + 2 * block, "plan.backward.ROOM counts on it"


@given(used=GARBAGE, appended=st.integers(0, 9), capacity=st.integers(0, 100))
@searched
def test_used_length(used, appended, capacity):
    for b, n in enumerate(used):
        length = sequence.used_length(b, Pointer(used), appended, capacity)
        assert length == min(max(n, 0) + appended, capacity)


@given(pads=GARBAGE, length=st.integers(0, 99))
@searched
def test_first_key(pads, length):
    """What the device says, kept between the first key and one after the last."""
    for b, pad in enumerate(pads):
        assert int(sequence.first_key(b, Pointer(pads), length)) == min(max(pad, 0), length)


@given(table=GARBAGE, rows=st.integers(0, 9))
@searched
def test_cache_row(table, rows):
    """Rows that exist are the cache's own; for others it says so, and none is out of bounds."""
    for b, entry in enumerate(table):
        row, there = sequence.cache_row(b, Pointer(table), rows)
        assert there == (entry in range(rows))
        assert row == (entry if there else 0)


@given(x=st.integers(-9, 9), low=st.integers(-9, 9), high=st.integers(-9, 9))
@searched
def test_clamp(x, low, high):
    clamped = sequence.clamp(x, low, high)
    assert clamped == (low if high < low else sorted((low, x, high))[1])


@given(tiles=st.integers(0, 40), size=st.integers(1, 50), spare=st.integers(0, 3))
@searched
def test_parts(tiles, size, spare):
    """The tiles of a sequence in order, none left out, no part larger than asked."""
    at = 0
    for n in range(-(-tiles // size) + spare):
        low, high = split.part(Int32(tiles), Int32(size), Int32(n))
        assert low == at <= high <= low + size
        at = high
    assert at == tiles


@given(total=st.integers(1, 300), programs=st.integers(1, 140))
@searched
def test_shares(total, programs):
    """All tiles of a batch in order, as even as can be, and every tile knows whose it is."""
    cuts = min(programs, total)
    at, sizes = 0, []
    for n in range(programs):
        low, high = split.share(Int32(total), Int32(n), Int32(cuts))
        assert low == at <= high
        assert all(
            split.share_of(Int32(t), Int32(total), Int32(cuts)) == n for t in range(at, high)
        )
        sizes += [high - low] if n < cuts else []
        assert n < cuts or low == high
        at = high
    assert at == total and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


# -- work -----------------------------------------------------------------------------------------

NO_LENGTHS = Lengths(*[None] * len(Lengths._fields))


@given(
    batch=st.integers(1, 4), nheads=st.integers(1, 4), seqlen_q=st.integers(1, 300),
    per_group=st.integers(1, 9), block=st.sampled_from([64, 128]),
)  # fmt: skip
@sampled
def test_dense_work_tiles(batch, nheads, seqlen_q, per_group, block):
    """Every tile of every head of every entry once, none past the sequence's end."""
    tiles = -(-seqlen_q // block)
    lengths = NO_LENGTHS._replace(seqlen_q=seqlen_q, total_q=0)
    table = Grid(batch, nheads, Int32(tiles), per_group)
    found = []
    for number in range(tiles * batch * nheads):
        b, head, offset_q, num_rows, writable, m_row = work.work_tile(
            Int32(number), lengths, table, block
        )
        assert (offset_q, num_rows, writable) == (0, seqlen_q, seqlen_q) and m_row < seqlen_q
        found.append((b, head, m_row // block))
    wanted = [(b, h, t) for b in range(batch) for h in range(nheads) for t in range(tiles)]
    assert sorted(found) == wanted


@given(length=st.integers(0, 90), used=st.integers(-3, 99) | st.sampled_from([INT_MIN, INT_MAX]))
@searched
def test_used_queries(length, used):
    assert sequence.used_queries(1, Pointer([7, used]), length) == min(max(used, 0), length)
    assert sequence.used_queries(1, None, length) == length


@given(
    lengths=LENGTHS, padding=st.integers(0, 80), longest=st.integers(0, 80), block=BLOCKS,
    nheads=st.integers(1, 3),
    used=st.none() | st.lists(st.integers(-3, 90), min_size=12, max_size=12),
)  # fmt: skip
@sampled
def test_packed_work_tiles(lengths, padding, longest, block, nheads, used):
    """Every row is written by one tile for each head, also those that are not in use; queries past
    max_seqlen_q or seqused_q don't count.
    """
    cu_seqlens = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    total = cu_seqlens[-1] + padding
    tiles = total // block + len(lengths)
    written = dict.fromkeys(((h, row) for h in range(nheads) for row in range(total)), 0)
    packed = NO_LENGTHS._replace(
        cu_seqlens_q=Pointer(cu_seqlens), seqused_q=used and Pointer(used), seqlen_q=longest,
        total_q=total,
    )  # fmt: skip
    table = Grid(len(lengths), nheads, Int32(tiles), 2)
    for number in range(tiles * nheads):
        b, head, offset_q, num_rows, writable, m_row = work.work_tile(
            Int32(number), packed, table, block
        )
        most = min(lengths[b], longest)
        assert (offset_q, num_rows) == (cu_seqlens[b], min(most, max(used[b], 0)) if used else most)
        for row in range(m_row, min(m_row + block, int(writable))):
            written[int(head), int(offset_q) + row] += 1
    assert set(written.values()) <= {1}


@given(
    lengths=LENGTHS, used=st.lists(st.integers(-3, 90), min_size=12, max_size=12),
    longest=st.integers(0, 80), appended=st.integers(0, 5), length_q=st.integers(0, 90),
)  # fmt: skip
@sampled
def test_key_span(lengths, used, longest, appended, length_q):
    """appended < 0: a sequence brings as many keys as it has queries."""
    cu_seqlens = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    total, capacity = cu_seqlens[-1], longest + appended
    alone = NO_LENGTHS._replace(seqlen_k=longest, total_k=0, appended=appended)
    packed = alone._replace(cu_seqlens_k=Pointer(cu_seqlens), total_k=total, appended=0)
    cached = alone._replace(seqused_k=Pointer(used), seqlen_k=capacity)
    both = packed._replace(seqused_k=Pointer(used))
    for b, length in enumerate(lengths):
        assert work.key_span(b, packed, length_q) == (cu_seqlens[b], min(length, longest))
        for new, more in ((appended, appended), (-1, length_q)):
            found = work.key_span(b, cached._replace(appended=Int32(new)), Int32(length_q))
            assert found == (0, min(max(used[b], 0) + more, capacity))
        wanted = cu_seqlens[b], min(max(used[b], 0), length, longest)
        assert work.key_span(b, both, length_q) == wanted
    assert work.key_span(0, alone, length_q) == (0, longest)


@given(table=GARBAGE, rows=st.integers(0, 9), length_k=st.integers(0, 99))
@searched
def test_keys_of_a_cache_row(table, rows, length_k):
    """A row that does not exist has no keys."""
    lengths = NO_LENGTHS._replace(cache_batch_idx=Pointer(table), cache_rows=rows)
    for b, entry in enumerate(table):
        wanted = (entry, length_k) if entry in range(rows) else (0, 0)
        assert work.cache_row(b, lengths, length_k) == wanted


@given(
    tile=st.integers(0, 5), rows_q=st.integers(0, 300), length_k=st.integers(0, 300),
    # Wide enough for full tiles of 64 keys.
    bounds=st.tuples(st.none() | st.integers(0, 250), st.none() | st.integers(0, 250)),
    pad=PADS, group=st.sampled_from([1, 2, 4, 64]),
)  # fmt: skip
@sampled
def test_n_block_range_of_a_tile_of_rows(tile, rows_q, length_k, bounds, pad, group):
    """As `mask.n_block_range` has it for the rows that are there; nothing where there are none."""
    sides = window_of(length_k - rows_q, bounds, pad, length_k)
    first = Int32(128 * tile)
    found = work.n_block_range(first, Int32(rows_q * group), sides, 128, 64, group)
    if first >= rows_q * group:
        assert found.begin == found.end and found.full_end <= found.end
    else:
        last = (min(first + 128, rows_q * group) - 1) // group
        assert found == mask.n_block_range(Int32(first // group), Int32(last), sides, 64)
    if group == 1:
        assert found == work.n_block_range(first, Int32(rows_q), sides, 128, 64)


@given(
    tile=st.integers(0, 3), consumers=st.sampled_from([2, 3]), rows_q=st.integers(1, 600),
    length_k=st.integers(0, 900), bounds=BOUNDS, block=st.sampled_from([64, 128]),
    group=st.sampled_from([1, 4, 64]),
)  # fmt: skip
@sampled
def test_a_consumer_sees_no_tile_that_is_not_loaded(
    tile, consumers, rows_q, length_k, bounds, block, group
):
    """What 64 rows see lies among the tiles of all rows, and what they pass by is at the end."""
    sides = window_of(length_k - rows_q, bounds, None, length_k)
    rows, first = Int32(rows_q * group), 64 * consumers * tile
    loaded = work.n_block_range(Int32(first), rows, sides, 64 * consumers, block, group)
    ranges = [
        work.n_block_range(Int32(first + 64 * n), rows, sides, 64, block, group)
        for n in range(consumers)
    ]
    seen = [own for own in ranges if own.begin < own.end]
    assert all(loaded.begin <= own.begin and own.end <= loaded.end for own in seen)
    assert max((own.end for own in seen), default=loaded.begin) == loaded.end


# -- queries and keys exchanged: which queries see a block of keys ---------------------------------


def exchanged(sides, length_q):
    """The same window seen from the keys."""
    return Window(Int32(-sides.diagonal), sides.right, sides.left, None, Int32(length_q))


@given(seqlen_q=SIZES, seqlen_k=SIZES, bounds=BOUNDS)
@searched
def test_a_window_seen_from_the_keys(seqlen_q, seqlen_k, bounds):
    """Query i sees key j where key j, in the place of a query, sees query i."""
    sides = window_of(seqlen_k - seqlen_q, bounds, None, seqlen_k)
    i, j = torch.arange(seqlen_q + 9)[None, :], torch.arange(seqlen_k)[:, None]
    i, j = Tile(i.int()), Tile(j.int())
    seen = mask.is_visible(j, i, exchanged(sides, seqlen_q)).values.expand(seqlen_k, -1)
    left_right = tuple(-1 if w is None else w for w in bounds)
    expected = reference.visibility(seqlen_q, seqlen_k, False, left_right)
    assert torch.equal(seen[:, :seqlen_q].T, expected)
    assert not seen[:, seqlen_q:].any(), "queries past the end"


@given(
    tile=st.integers(0, 5), length_q=st.integers(0, 300), length_k=st.integers(0, 300),
    bounds=st.tuples(st.none() | st.integers(0, 250), st.none() | st.integers(0, 250)),
    blocks=st.sampled_from([(64, 64), (64, 128), (128, 32), (16, 16)]),
)  # fmt: skip
@settings(searched, max_examples=1000)
def test_n_block_range_of_queries(tile, length_q, length_k, bounds, blocks):
    """The blocks of queries that see something of a block of keys, and those that see all of it."""
    block_n, block_m = blocks
    sides = window_of(length_k - length_q, bounds, None, length_k)
    first = Int32(block_n * tile)
    found = work.n_block_range(first, Int32(length_k), exchanged(sides, length_q), block_n, block_m)
    left_right = tuple(-1 if w is None else w for w in bounds)
    visible = reference.visibility(length_q, length_k, False, left_right)
    if first >= length_k:
        assert found.begin == found.end and found.full_end <= found.end
        return
    tiles = -(-(length_q + 1) // block_m)
    seen = torch.zeros(tiles * block_m, visible[:, first : first + block_n].shape[1], dtype=bool)
    seen[:length_q] = visible[:, first : first + block_n]
    per_tile = seen.view(tiles, block_m, -1).flatten(1)
    number = torch.arange(tiles) * block_m
    assert torch.equal(per_tile.any(1), (number >= found.begin) & (number < found.end))
    full = (number >= found.full_begin) & (number < found.full_end)
    assert torch.equal(per_tile.all(1), full)


@given(
    length_q=st.integers(1, 300), length_k=st.integers(1, 300),
    bounds=st.tuples(st.none() | st.integers(0, 250), st.none() | st.integers(0, 250)),
    blocks=st.sampled_from([(128, 64), (128, 128), (32, 16)]),
)  # fmt: skip
@sampled
def test_later_n_blocks(length_q, length_k, bounds, blocks):
    """Blocks of keys take turns 0, 1, 2 ... at a block of queries, the last one first."""
    block_n, block_m = blocks
    sides = window_of(length_k - length_q, bounds, None, length_k)
    left_right = tuple(-1 if w is None else w for w in bounds)
    visible = reference.visibility(length_q, length_k, False, left_right)
    for m_row in range(0, length_q, block_m):
        keys = visible[m_row : m_row + block_m].any(0)
        came = [n for n in range(0, length_k, block_n) if keys[n : n + block_n].any()]
        turns = [
            work.later_n_blocks(Int32(n), Int32(m_row), Int32(length_q), sides, block_m, block_n)
            for n in came[::-1]
        ]
        assert turns == list(range(len(came)))


@given(
    lengths_q=st.lists(st.integers(0, 70), min_size=4, max_size=4),
    lengths_k=st.lists(st.integers(0, 70), min_size=4, max_size=4), padding=st.integers(0, 80),
    longest=st.tuples(st.integers(0, 80), st.integers(0, 80)), block=BLOCKS,
    used=st.tuples(*[st.none() | st.lists(st.integers(-3, 90), min_size=4, max_size=4)] * 2),
)  # fmt: skip
@sampled
def test_lengths_seen_from_the_keys(lengths_q, lengths_k, padding, longest, block, used):
    """Every row of keys is written once, and each tile knows its sequence's keys and queries."""
    cu_q, cu_k = ([sum(x[:b]) for b in range(5)] for x in (lengths_q, lengths_k))
    total_k = cu_k[-1] + padding
    pointers = [None if x is None else Pointer(x) for x in used]
    by_key = NO_LENGTHS._replace(
        cu_seqlens_q=Pointer(cu_k), seqused_q=pointers[1], seqlen_q=longest[1], total_q=total_k,
        cu_seqlens_k=Pointer(cu_q), seqused_k=pointers[0], seqlen_k=longest[0],
        total_k=cu_q[-1] + 3, appended=0,
    )  # fmt: skip
    most_q, most_k = (
        [min(n, most, max(given[b], 0) if given else n) for b, n in enumerate(lengths)]
        for lengths, most, given in zip((lengths_q, lengths_k), longest, used, strict=True)
    )
    tiles = total_k // block + 4
    written = [0] * total_k
    for number in range(tiles):
        b, _, offset_k, num_rows, writable, m_row = work.work_tile(
            Int32(number), by_key, Grid(4, 1, Int32(tiles), 1), block
        )
        assert (offset_k, num_rows) == (cu_k[b], most_k[b])
        assert work.key_span(b, by_key, 0) == (cu_q[b], most_q[b])
        for row in range(m_row, min(m_row + block, int(writable))):
            written[int(offset_k) + row] += 1
    assert written == [1] * total_k


# -- paging and heads -----------------------------------------------------------------------------


@given(
    table=st.lists(st.integers(-2, 9) | st.sampled_from([INT_MIN, INT_MAX]), max_size=9),
    num_pages=st.integers(0, 8), data=st.data(),
)  # fmt: skip
@searched
def test_lookup(table, num_pages, data):
    """Pages that exist are real; no entry past those in use is read, wherever it lies."""
    used = data.draw(st.integers(0, len(table)))
    entries = Pointer(torch.tensor(table, dtype=torch.int32))
    column = Tile(torch.arange(len(table) + 20, dtype=torch.int32))
    page, real = (x.values for x in paging.lookup(entries + column, column < used, num_pages))
    assert real[:used].tolist() == [entry in range(num_pages) for entry in table[:used]]
    assert not real[used:].any()
    assert page[real].tolist() == [entry for entry in table[:used] if entry in range(num_pages)]
    named = paging.page_of(entries + column, column < used).values
    assert named.tolist() == table[:used] + [-1] * (len(table) + 20 - used)
    for n in range(used):  # and one at a time
        assert paging.lookup(entries + n, True, num_pages) == (table[n], real[n])
        assert paging.page_of(entries + n, True) == table[n]


@given(nheads_k=st.integers(1, 6), group=st.integers(1, 6), tokens=st.integers(1, 5))
@searched
def test_heads(nheads_k, group, tokens):
    served = torch.arange(nheads_k).repeat_interleave(group).tolist()
    assert [heads.kv_head(head, group) for head in range(nheads_k * group)] == served
    packed = [(token, head) for token in range(tokens) for head in range(group)]
    assert [heads.unpack(row, group) for row in range(tokens * group)] == packed


# -- rotary -------------------------------------------------------------------------------------


@st.composite
def rotations(draw):
    """(head_dim, rotary_dim, interleaved)."""
    head_dim = draw(st.integers(2, 33))
    return head_dim, 2 * draw(st.integers(0, head_dim // 2)), draw(st.booleans())


@given(
    shape=rotations(), seed=st.integers(0, 99), rows_cos=st.integers(1, 5),
    tokens=st.lists(
        st.tuples(
            st.integers(0, 9) | st.sampled_from([INT_MIN, INT_MAX, -1]),
            st.booleans(),
        ),
        min_size=1, max_size=6,
    ),
)  # fmt: skip
@searched
def test_rotary(shape, seed, rows_cos, tokens):
    """Pairs turn as complex numbers do; the rest of a row is as it was, absent rows are zeros.

    Any position is one of the tables', and nothing outside of a row or a table is read.
    """
    head_dim, rotary_dim, interleaved = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(tokens), head_dim, generator=generator)
    cos, sin = torch.randn(2, rows_cos, rotary_dim // 2, generator=generator)
    sin = sin.clone()  # memory of its own: what lies behind cos is outside
    position, there = torch.tensor([t for t, _ in tokens]), torch.tensor([ok for _, ok in tokens])
    offset = torch.arange(len(tokens)).where(there, 10**6) * head_dim
    rotated = rotary.load(
        Pointer(x), offset, there, position, Pointer(cos), Pointer(sin), rows_cos, head_dim,
        1 << (head_dim - 1).bit_length(), rotary_dim, interleaved,
    )  # fmt: skip
    row = position.clamp(0, rows_cos - 1)
    turn = torch.complex(cos, sin)[row]
    pairs = x[:, :rotary_dim]
    one = pairs[:, ::2] if interleaved else pairs[:, : rotary_dim // 2]
    two = pairs[:, 1::2] if interleaved else pairs[:, rotary_dim // 2 :]
    turned = torch.complex(one, two) * turn
    parts = (turned.real, turned.imag)
    wanted = torch.stack(parts, -1).flatten(1) if interleaved else torch.cat(parts, 1)
    wanted = torch.cat([wanted, x[:, rotary_dim:]], 1).where(there[:, None], 0.0)
    torch.testing.assert_close(rotated[:, :head_dim], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(rotated[:, rotary_dim:head_dim], wanted[:, rotary_dim:])
    assert not rotated[:, head_dim:].any(), "columns that only pad a tile"


# -- scores -------------------------------------------------------------------------------------


@given(x=st.lists(st.floats(-800, 800) | st.floats(-1e-3, 1e-3), min_size=1, max_size=9))
@searched
def test_tanh(x):
    x = torch.tensor(x, dtype=torch.float64)
    torch.testing.assert_close(scores.tanh(x), torch.tanh(x), rtol=0, atol=1e-15)


def asks_for_all(score, b, head, q_idx, kv_idx, aux=None):
    """A score_mod that gives a score away by every argument, and by what it is handed."""
    more = 0.0 if aux is None else aux[0]
    return 0.5 * score + 3.0 * b + 0.25 * head - 0.01 * q_idx + 0.002 * kv_idx * kv_idx + more


@given(
    softmax_scale=st.sampled_from([1.0, 0.125, 3.0, 1e-4]),
    softcap=st.sampled_from([0.0, 0.5, 30.0]), slope=st.none() | st.floats(-2, 2),
    score_mod=st.sampled_from([None, asks_for_all]), handed=st.booleans(),
    first=st.integers(-9, 90), start=st.integers(0, 3).map(lambda n: 16 * n),
    own=st.sampled_from([(), ("bounded",), ("bounded", "folded")]), seed=st.integers(0, 99),
)  # fmt: skip
@searched
def test_modify(softmax_scale, softcap, slope, score_mod, handed, first, start, own, seed):
    """What the softmax scales is the definition's score, whichever steps are left to it."""
    aux = (torch.tensor(7.0),) if handed and score_mod else None
    slopes = None if slope is None else torch.tensor([slope])
    asked = types.SimpleNamespace(softcap=softcap, alibi_slopes=slopes, score_mod=score_mod)
    q = torch.empty(0, dtype=torch.bfloat16)
    options = types.SimpleNamespace(softmax_scale=softmax_scale, left=None)
    call = types.SimpleNamespace(scores=asked, options=options, q=q)
    scale, (_, factor, cap), mode = choose_score_mode(call, *own)

    generator = torch.Generator().manual_seed(seed)
    raw = 20 * torch.randn(5, 16, generator=generator, dtype=torch.float64)
    folded = factor if mode == "folded" else 1.0
    assert folded in (1.0, 0.125)
    i, n = torch.arange(first, first + 5)[:, None], torch.arange(16)[None, :]
    modification = Modification(factor, cap, slope, aux)
    modified = scores.modify(raw * folded, 2, 3, i, start, n, modification, mode, score_mod)
    if not softcap and slope is None and score_mod is None:
        assert torch.equal(modified, raw)

    wanted, j = raw * softmax_scale, start + n
    if softcap:
        wanted = softcap * torch.tanh(wanted / softcap)
    if slope is not None:
        wanted = wanted - slope * (i - j).abs()
    if score_mod is not None:
        wanted = score_mod(wanted, 2, 3, i.clamp(min=0), j, aux)  # none before the first key
    close = 1e-10 if slope is None else 1e-5  # slopes and distances are fp32
    torch.testing.assert_close(modified * (scale / LOG2E), wanted, rtol=close, atol=close)


@given(i=st.integers(-9, 9), handed=st.booleans())
@searched
def test_apply(i, handed):
    """A score_mod is told of no query before the first key, and handed what there is."""
    told = []
    aux = (Pointer([7.0]),) if handed else None
    given = scores.apply(1.0, 2, 3, i, 4, aux, lambda *x: told.append(x) or 5.0)
    assert given == 5.0 and told == [(1.0, 2, 3, max(i, 0), 4, *([aux] if handed else []))]


def bends(score, b, head, q_idx, kv_idx, aux=None):
    """A score_mod whose derivative depends on the score and on what it is handed."""
    more = 1.0 if aux is None else aux[0]
    return more * torch.sin(score) - 0.01 * (q_idx - kv_idx).abs() * head + b


def bends_backward(grad, score, b, head, q_idx, kv_idx, aux=None):
    assert (q_idx >= 0).all()
    return grad * (1.0 if aux is None else aux[0]) * torch.cos(score)


@given(
    softmax_scale=st.sampled_from([1.0, 0.125, -0.5, 3.0]),
    softcap=st.sampled_from([0.0, 0.5, 30.0]),
    slope=st.none() | st.floats(-2, 2), modified=st.booleans(), handed=st.booleans(),
    first=st.integers(-9, 90), start=st.integers(0, 3).map(lambda n: 16 * n),
    seed=st.integers(0, 99),
)  # fmt: skip
@searched
def test_differentiate(softmax_scale, softcap, slope, modified, handed, first, start, seed):
    """Times the scale, it is what autograd makes of soft cap, ALiBi and a score_mod."""
    aux = (torch.tensor(1.5),) if handed and modified else None
    slopes = None if slope is None else torch.tensor([slope])
    score_mod, score_mod_bwd = (bends, bends_backward) if modified else (None, None)
    asked = types.SimpleNamespace(softcap=softcap, alibi_slopes=slopes, score_mod=score_mod)
    options = types.SimpleNamespace(softmax_scale=softmax_scale, left=None)
    call = types.SimpleNamespace(scores=asked, options=options, q=torch.empty(0))
    _, (_, factor, cap), mode = choose_score_mode(call)

    generator = torch.Generator().manual_seed(seed)
    raw, grad = 5 * torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    i, n = torch.arange(first, first + 5)[:, None], torch.arange(16)[None, :]
    modification = Modification(factor, cap, slope, aux)
    biased = scores.bias(raw, i, start, n, modification, mode, score_mod)
    where = (2, 3, i, start + n)
    found = scores.differentiate(grad, raw, biased, *where, modification, mode, score_mod_bwd)

    leaf = raw.clone().requires_grad_()
    wanted, i, j = leaf * softmax_scale, i, start + n
    if softcap:
        wanted = softcap * torch.tanh(wanted / softcap)
    if slope is not None:
        wanted = wanted - slope * (i - j).abs()
    if modified:
        torch.testing.assert_close(biased, wanted.detach(), rtol=1e-5, atol=1e-5)
        wanted = bends(wanted, 2, 3, i.clamp(min=0), j, aux)
    (wanted,) = torch.autograd.grad(wanted, leaf, grad)
    close = 1e-10 if slope is None else 1e-4  # slopes and distances are fp32
    torch.testing.assert_close(found * softmax_scale, wanted, rtol=close, atol=close)


@pytest.mark.parametrize(
    ("asked", "dtype", "mode"),
    [
        ({}, torch.bfloat16, ""),
        ({"softcap": 50.0}, torch.bfloat16, "bounded"),
        ({"softcap": 50.0}, torch.float16, "softcap"),  # no room for the weights
        ({"softcap": 50.0, "left": 15}, torch.bfloat16, "softcap"),  # a rounded weight shows
        ({"softcap": 50.0, "left": 16}, torch.bfloat16, "bounded"),
        ({"softcap": 60.0}, torch.bfloat16, "softcap"),
        ({"softcap": 50.0, "alibi_slopes": torch.ones(1)}, torch.bfloat16, "softcap"),
        ({"softcap": 50.0, "score_mod": asks_for_all}, torch.bfloat16, "softcap"),
        ({"alibi_slopes": torch.ones(1)}, torch.bfloat16, "linear"),
        ({"alibi_slopes": torch.ones(1)}, torch.float16, "linear"),
        ({"alibi_slopes": torch.ones(1), "score_mod": asks_for_all}, torch.bfloat16, ""),
        ({"score_mod": asks_for_all}, torch.bfloat16, "folded"),
        ({"score_mod": asks_for_all}, torch.float16, ""),
    ],
)
def test_modes_of_a_kernels_own(asked, dtype, mode):
    given = {"softcap": 0.0, "alibi_slopes": None, "score_mod": None} | asked
    options = types.SimpleNamespace(softmax_scale=0.125, left=asked.get("left"))
    call = types.SimpleNamespace(
        scores=types.SimpleNamespace(**given), options=options, q=torch.empty(0, dtype=dtype)
    )
    usual = "softcap" if "softcap" in asked else ""
    assert choose_score_mode(call, "bounded", "linear", "folded").mode == mode
    for own in ((), ("",)):
        assert choose_score_mode(call, *own).mode == usual
    options.softmax_scale = 128**-0.5
    assert choose_score_mode(call, "folded").mode == usual


# -- dropout --------------------------------------------------------------------------------------


def test_philox():
    """The known answers of its authors' library."""
    for word, answer in (
        (0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ):
        found = philox(word << 32 | word, *[torch.tensor([word])] * 4)
        assert [f"{int(x.values):08x}" for x in found] == answer.split()


def dropped(seed, p, b, head, rows, columns):
    """Which weights of these queries and keys are dropped."""
    i, j = (Tile(torch.arange(*x, dtype=torch.int32)) for x in (rows, columns))
    facts = Dropout(seed, int(p * 2**31), 1 / (1 - p))
    i, j = (Tile(x.values[index]) for x, index in ((i, (..., None)), (j, (None, ...))))
    return ~dropout.is_kept(facts, b, head, i, j).values


@given(
    seed=st.integers(0, 2**63 - 1), p=st.sampled_from([0.1, 0.5, 0.9]), b=st.integers(0, 99),
    head=st.integers(0, 99), row=st.integers(0, 2**20), column=st.integers(0, 2**20),
)  # fmt: skip
@sampled
def test_dropout(seed, p, b, head, row, column):
    """The share that is asked for, decided by the place alone and anew for each place."""
    rows, columns = (row, row + 64), (column, column + 64)
    whole = dropped(seed, p, b, head, rows, columns)
    assert abs(whole.float().mean() - p) < 5 * (p * (1 - p) / whole.numel()) ** 0.5
    part = dropped(seed, p, b, head, (row + 5, row + 30), (column + 3, column + 20))
    assert torch.equal(part, whole[5:30, 3:20])
    assert torch.equal(dropped(seed, p, b, head, rows, columns), whole)
    others = [(seed ^ 1, b, head), (seed, b + 1, head), (seed, b, head + 1), (seed, head, b)]
    for other_seed, *where in others:
        if (other_seed, *where) != (seed, b, head):
            both = whole & dropped(other_seed, p, *where, rows, columns)
            assert abs(both.float().mean() - p * p) < 5 * (p * p / both.numel()) ** 0.5
    for moved in (dropped(seed, p, b, head, columns, rows).mT, whole.roll(1, 0), whole.roll(1, 1)):
        if row != column:
            both = (whole & moved).float().mean()
            assert abs(both - p * p) < 5 * (p * p / whole.numel()) ** 0.5


# -- softmax --------------------------------------------------------------------------------------


def state(s, v, scale, widths):
    """m, l and o of scores s [M, N], which arrive in tiles of these widths, in s's precision."""
    m = torch.full(s.shape[:1], -math.inf, dtype=s.dtype)
    l = torch.zeros_like(m)  # noqa: E741
    o = torch.zeros(len(s), v.shape[1], dtype=s.dtype)
    tiles = zip(s.split(widths, 1), v.split(widths), strict=True) if widths else ()
    for s_tile, v_tile in tiles:
        m, alpha, p = softmax.rescale(m, s_tile, scale * LOG2E)
        l = l * alpha + p.sum(1)  # noqa: E741
        o = o * alpha[:, None] + p @ v_tile
    return m, l, o


def online(s, v, scale, widths, sink=None):
    """The same, finished: output and LSE."""
    return softmax.finish(*state(s, v, scale, widths), scale * LOG2E, sink)


# A logit beside the scores; -inf is none.
SINKS = st.none() | st.sampled_from([-math.inf, 0.0, -1e12, 3e4, 1e12]) | st.floats(-90, 90)


def as_logit(sink):
    return None if sink is None else torch.tensor(sink, dtype=torch.float64)


@st.composite
def rows(draw, largest):
    """12 scores: a masked start and end (or all of it), around a level, some far from it."""
    level = st.sampled_from([0.0, -60.0, -2.5e5, 88.0, 3e4])
    far = st.sampled_from([-math.inf, -largest, largest])
    begin, end = draw(st.integers(0, 12)), draw(st.integers(0, 12) | st.just(12))
    row = [draw(level)] * 12 if draw(st.booleans()) else [draw(level) for _ in range(12)]
    row = [s + draw(st.floats(-20, 20)) if draw(st.integers(0, 9)) else draw(far) for s in row]
    return [s if begin <= j < end else -math.inf for j, s in enumerate(row)]


@given(
    # The largest score that fp16 inputs of head_dim 256 can make is about 1e12.
    scores=st.lists(rows(largest=1e12), min_size=1, max_size=4),
    widths=st.sampled_from([[12], [1] * 12, [4, 4, 4], [5, 7]]),
    scale=st.sampled_from([1.0, 0.125, 1e-4, 3.0]),
    sink=SINKS,
)
@settings(searched, max_examples=600)
def test_softmax(scores, widths, scale, sink):
    """Equal to softmax in one piece, whatever the tiles; 0 and -inf where no key was seen.

    A sink is a key more, without a value, for a row that saw any.
    """
    s = torch.tensor(scores, dtype=torch.float64)
    v = torch.linspace(-1, 1, 12 * 3, dtype=torch.float64).view(12, 3)
    out, lse = online(s, v, scale, widths, as_logit(sink))
    empty = (s == -math.inf).all(1)
    with_sink = s * scale
    if sink is not None:
        with_sink = torch.cat([with_sink, as_logit(sink).expand(len(s), 1)], 1)
    weights = with_sink.softmax(1)[:, :12].masked_fill(empty[:, None], 0.0)
    wanted_lse = with_sink.logsumexp(1).masked_fill(empty, -math.inf)
    torch.testing.assert_close(out, weights @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)
    assert (lse[empty] == -math.inf).all() and (out[empty] == 0).all()


@given(
    scores=st.lists(rows(largest=1e12), min_size=1, max_size=4),
    widths=st.sampled_from([[12], [4, 4, 4], [1, 11], [0, 12, 0], [0, 0, 5, 7]]),
    sink=SINKS,
)
@searched
def test_merge(scores, widths, sink):
    """Parts folded are the whole, also where one is empty or sees nothing; a sink counts once."""
    sink = as_logit(sink)
    s = torch.tensor(scores, dtype=torch.float64)
    v = torch.linspace(-1, 1, 12 * 3, dtype=torch.float64).view(12, 3)
    scale = 0.5 * LOG2E
    parts = []
    for s_part, v_part in zip(s.split(widths, 1), v.split(widths), strict=True):
        m, l, o = state(s_part, v_part, 0.5, [len(v_part)] if len(v_part) else [])  # noqa: E741
        parts.append((m, l, softmax.finish(m, l, o, scale, None)[0]))
    whole, whole_lse = online(s, v, 0.5, [12], sink)
    for row in range(len(s)):
        m, l, o = (torch.stack([p[n][row] for p in parts]) for n in range(3))  # noqa: E741
        folded = torch.full([1], -math.inf), torch.zeros(1), torch.zeros(1, 3)
        for two in (slice(0, 2), slice(2, None)):  # some now, the others later
            if len(m[two]):
                folded = softmax.merge(*folded, m[two], l[two], o[two], scale)
        out, lse = softmax.finish(*folded, scale, sink)
        torch.testing.assert_close(out[0], whole[row], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse[0], whole_lse[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [-math.inf, -3.4e38])
@pytest.mark.parametrize("found", [math.nan, math.inf])
def test_merge_does_not_read_a_result_that_saw_no_key(m, found):
    partial_m, partial_l = torch.tensor([m, 1.0, m]), torch.tensor([0.0, 2.0, 0.0])
    partial_o = torch.tensor([[found], [5.0], [-found]])
    state = torch.full([1], -math.inf), torch.zeros(1), torch.zeros(1, 1)
    merged = softmax.merge(*state, partial_m, partial_l, partial_o, 1.0)
    assert softmax.finish(*merged, 1.0, None)[0].item() == 5.0
    merged = softmax.merge(*state, partial_m[::2], partial_l[::2], partial_o[::2], 1.0)
    out, lse = softmax.finish(*merged, 1.0, None)
    assert (out.item(), lse.item()) == (0.0, -math.inf)


@pytest.mark.parametrize("score", [0.0, -2.5e5, 1e5, 3e38])
def test_softmax_is_exact_for_equal_scores_in_fp32(score):
    """Large scores lose nothing: every weight is exp2(0) = 1."""
    s = torch.full((1, 8), score)
    out, lse = online(s, torch.arange(8.0)[:, None], 1e-4, [4, 4])
    assert out.item() == 3.5
    assert lse.item() == pytest.approx(score * 1e-4 + math.log(8), rel=1e-6)


def hopper_softmax():
    """What the Hopper kernel has of its own."""
    pytest.importorskip("triton.experimental.gluon")
    return RULES.value(importlib.import_module("mini_flash_attention.kernels.hopper.softmax"))


class Words(torch.Tensor):
    """A tensor that Triton's cast of bits works on."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):
        assert not bitcast or dtype.itemsize == self.dtype.itemsize
        return self.view(dtype) if bitcast else super().to(dtype)


@given(
    size=st.integers(-60, 120), scale=st.integers(-60, 100), widths=st.sampled_from([[12], [5, 7]]),
    steps=st.lists(st.integers(-9, 0) | st.none(), min_size=12, max_size=12),
    sign=st.sampled_from([1, -1]), ones=st.integers(1, 7), lazy=st.booleans(),
)  # fmt: skip
@searched
def test_the_hopper_kernels_own_softmax(size, scale, widths, steps, sign, ones, lazy):
    """It agrees with the rule for scores of any size: ties, neighbours, and what no row sees."""
    hopper = hopper_softmax()
    level = sign * 2.0**size * (1 + ones / 8)
    s = torch.tensor([[-math.inf if n is None else level + n * abs(level) / 1024 for n in steps]])
    v, factor = torch.linspace(-1, 1, 12)[:, None], 2.0**scale * 1.4426950408889634
    m, l, o = torch.tensor([hopper.LOWEST]), torch.zeros(1), torch.zeros(1, 1)  # noqa: E741
    for s_tile, v_tile in zip(s.split(widths, 1), v.split(widths), strict=True):
        scores = s_tile.as_subclass(Words)
        arguments = m.as_subclass(Words), scores, None, torch.tensor(factor), lazy
        m, alpha, scores, *terms = hopper.rescale(*arguments)
        p = hopper.exp2_scores(scores, hopper.Exponent(*terms), "", scores)
        m, alpha, p = (x.as_subclass(torch.Tensor) for x in (m, alpha, p))
        assert ((p >= 0) & (p <= 2**14)).all(), "weights that fp16 holds"
        l, o = l * alpha + p.sum(1), o * alpha[:, None] + p @ v_tile  # noqa: E741
    out, lse = softmax.finish(m, l, o, torch.tensor(factor), None)
    wanted, wanted_lse = online(s, v, torch.tensor(factor / LOG2E), widths)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("steep", [0.0, 0.3, 40.0, 3e4])
def test_the_hopper_kernels_softmax_of_biased_scores(steep, lazy):
    """Like the rule's of scores that the bias was added to, also where it dwarfs them."""
    hopper = hopper_softmax()
    generator = torch.Generator().manual_seed(1)
    s = 4 * torch.randn(64, 48, generator=generator)
    s[3, :20], s[5] = -math.inf, -math.inf
    biases = -steep * torch.rand(3, 64, 4, generator=generator)
    v, scale = torch.linspace(-1, 1, 48)[:, None], torch.tensor(0.125 * LOG2E)
    m = torch.full([64], hopper.LOWEST)
    l, o, whole = torch.zeros(64), torch.zeros(64, 1), []  # noqa: E741
    for s_tile, v_tile, bias in zip(s.split(16, 1), v.split(16), biases, strict=True):
        arguments = (x.as_subclass(Words) for x in (m, s_tile, bias))
        m, alpha, scores, *terms = hopper.rescale(*arguments, scale, lazy)
        p = hopper.exp2_scores(scores, hopper.Exponent(*terms), "", s_tile.as_subclass(Words))
        m, alpha, p = (x.as_subclass(torch.Tensor) for x in (m, alpha, p))
        assert ((p >= 0) & (p <= 2**14)).all(), "weights that fp16 holds"
        l, o = l * alpha + p.sum(1), o * alpha[:, None] + p @ v_tile  # noqa: E741
        whole.append((s_tile.view(64, 2, 4, 2) + bias[:, None, :, None]).view(64, 16))
    out, lse = softmax.finish(m, l, o, scale, None)
    wanted, wanted_lse = online(torch.cat(whole, 1), v, 0.125, [16, 16, 16])
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("start", [0, 128, 192, 256, 320, 384, 512])
@pytest.mark.parametrize("first", [256, 320, -70])
@pytest.mark.parametrize("slope", [0.7, -0.3])
def test_the_hopper_kernels_own_alibi(first, start, slope):
    """What it does to scores and what it leaves to the maximum are ALiBi, on both sides."""
    s = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    modification = Modification(8.0, 0.0, slope / 8.0, None)
    biased = hopper_softmax().alibi_bias(s.as_subclass(Words), first, start, modification, 128)
    found, bias = (x.as_subclass(torch.Tensor) for x in biased)
    found = (found.view(64, 16, 4, 2) + bias[:, None, :, None]).view(64, 128)
    i, j = torch.arange(64)[:, None] + first, torch.arange(128)[None, :] + start
    wanted = s - slope * (i - j).abs()
    torch.testing.assert_close(found, wanted)
    if j.max() < first or start >= first + 64:
        assert bias.any(), "one addition a score"
        near = 127 if start < first else 0  # beside the queries nothing is large
        at = found[:, near] - bias[:, near // 2 % 4]
        assert (at - s[:, near]).abs().max() <= 7.01 * abs(slope)


@given(scale=st.floats(1e-3, 75), seed=st.integers(0, 99), ends=st.booleans())
@searched
def test_bounded_scores_need_no_maximum(scale, seed, ends):
    """Scores of a soft cap against 0: weights fit in fp32, and their sums are the rule's."""
    generator = torch.Generator().manual_seed(seed)
    s = 2 * torch.rand(3, 12, generator=generator) - 1
    s = s.sign() if ends else s
    s[0, 3:], s[1, :7], s[2] = -1.0, -math.inf, -math.inf
    v, scale = torch.linspace(-1, 1, 12)[:, None], torch.tensor(scale)
    for size in (1e-15, 1.0, 1e10):
        p = torch.exp2(s * scale)
        out, lse = softmax.finish(torch.zeros(3), p.sum(1), p @ (v * size), scale, None)
        wanted, wanted_lse = online(s.double(), v.double(), scale.item() / LOG2E, [12])
        torch.testing.assert_close(out.double() / size, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@given(s=st.floats(-1, 1, width=32), scale=st.floats(1e-3, 75))
@searched
def test_one_key_without_a_maximum_gives_exactly_its_value(s, scale):
    """P is rounded to bf16 and l is not; the rounding is undone for rows that see one key."""
    p = torch.exp2(torch.tensor([s, s, s]) * scale)
    v = torch.tensor([1.9921875, -3.0e-8, 257.0]).bfloat16()
    o = p.bfloat16().float()[:, None] * v
    factor = softmax.single_key_factor(p, torch.tensor([1, 2, 0]), torch.bfloat16)
    assert factor[1:].tolist() == [1.0, 1.0]
    out, _ = softmax.finish(torch.zeros(3), p, o * factor[:, None], torch.tensor(scale), None)
    assert torch.equal(out[0].bfloat16(), v)


def machine(text, inputs):
    """The first exponential of `softmax.EXP2`, its instructions carried out one by one on fp32."""
    to_float = lambda n: (n & 0xFFFFFFFF).astype(np.uint32).view(np.float32)  # noqa: E731
    to_int = lambda x: x.view(np.uint32).astype(np.int64)  # noqa: E731
    registers = {"$4": inputs}

    def value(word):
        if word.startswith("0f"):
            return to_float(np.array([int(word[2:], 16)]))
        return registers[word] if word in registers else int(word)

    steps = {
        "max.NaN.f32": np.maximum,
        "add.rn.f32": np.add,
        "sub.rn.f32": np.subtract,
        "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
        "mul.rn.f32": np.multiply,
        "mov.b32": lambda a: a,
        "shl.b32": lambda a, n: to_float(to_int(a) << n),
    }
    for line in text[text.index("{") + 1 : text.index("}")].split(";"):
        name, *words = line.replace(",", " ").split() or [".reg"]
        if name != ".reg":
            registers[words[0]] = steps[name](*map(value, words[1:]))
    return registers["$0"]


def test_the_hopper_kernels_own_exponential():
    """Right to a third of the LSE's promise for all that a bounded score can be, 0 for -inf."""
    hopper = hopper_softmax()
    x = np.linspace(-126, 60, 400_001, dtype=np.float32)
    found = machine(hopper.EXP2, x).astype(np.float64)
    assert np.abs(found / np.exp2(x.astype(np.float64)) - 1).max() < 4e-6
    ends = machine(hopper.EXP2, np.array([-np.inf, -1e30, 0, 40, np.nan], np.float32))
    assert ends[:4].tolist() == [0, 0, 1, 2.0**40]
    assert np.isnan(ends[4]), "what is no number stays none"


def test_nan_reaches_its_own_row_only():
    s = torch.zeros(3, 4, dtype=torch.float64)
    s[1, 2] = math.nan
    out, lse = online(s, torch.ones(4, 2, dtype=torch.float64), 1.0, [2, 2])
    assert out.isnan().any(1).tolist() == lse.isnan().tolist() == [False, True, False]
