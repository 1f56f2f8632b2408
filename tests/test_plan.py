"""Which launch is chosen: tables of cases, on GPUs that need not be there."""

import itertools
import json

import pytest
import torch

from mini_flash_attention import plan, problem, settings
from mini_flash_attention.plan import layout
from mini_flash_attention.plan.scores import choose_score_mode
from mini_flash_attention.problem import Cache, Options, Problem
from mini_flash_attention.validate import calls, options

H200 = plan.gpu.Gpu("H200", 90, 132)
L4 = plan.gpu.Gpu("L4", 89, 58)


def call(
    batch, nheads, nheads_k, seqlen_k, page_size=0, *, seqlen_q=1, head_dim=128, num_splits=0,
    split_size=0, left=None,
):  # fmt: skip
    """flash_attn_with_kvcache as the kernels see it, on tensors without memory."""
    q = torch.empty(batch, seqlen_q, nheads, head_dim, dtype=torch.bfloat16, device="meta")
    rows = (batch * seqlen_k // page_size, page_size) if page_size else (batch, seqlen_k)
    k = torch.empty(*rows, nheads_k, head_dim, dtype=torch.bfloat16, device="meta")
    options = Options(1.0, left, None, left is not None, False, num_splits, split_size)
    return Problem(
        "", q, k, k, None, batch, seqlen_q, seqlen_k, options, cache=Cache(page_size=page_size)
    )


def replace(p, **changes):
    """p with other values for its own fields and those of its groups."""
    for name in ("options", "lengths", "cache"):
        group = getattr(p, name)
        own = {field: changes.pop(field) for field in group._fields if field in changes}
        p = p._replace(**{name: group._replace(**own)})
    return p._replace(**changes)


@pytest.mark.parametrize(
    ("gpu", "arguments", "shares", "splits", "block_n"),
    [
        # one program for each sequence and head fills the GPU once: nothing to fold
        (H200, (16, 32, 8, 4096), False, 1, 128),
        (H200, (16, 32, 8, 4096, 16), False, 1, 128),
        # or several times over, with little to do for each
        (H200, (64, 32, 8, 1024), False, 1, 64),
        (H200, (23, 24, 24, 960, 16), False, 1, 64),
        # enough to do that a last wave, filled in part, would cost more than the counting
        (H200, (24, 24, 24, 2048, 16), True, 11, 64),
        (H200, (24, 24, 24, 2048), True, 11, 128),
        (H200, (33, 8, 8, 2048), True, 16, 128),
        (H200, (64, 32, 8, 2048, 16), True, 33, 64),
        (L4, (64, 32, 8, 2048, 16), True, 14, 32),
        # which whole sequences that fit in one wave have not
        (H200, (16, 32, 8, 16384), False, 1, 128),
        (H200, (16, 32, 8, 32768), True, 16, 128),
        # a lot to do: equal shares, in the largest number that runs at a time
        (H200, (64, 32, 8, 8192), True, 16, 128),
        (H200, (64, 32, 8, 8192, 256), True, 33, 64),
        (H200, (64, 32, 8, 8192, 16), True, 33, 64),
        (H200, (24, 24, 24, 8192), True, 11, 128),
        # too few programs: parts of each sequence
        (H200, (1, 32, 8, 1024), False, 16, 64),
        (H200, (1, 32, 8, 1024, 16), False, 16, 32),  # less to look up
        (H200, (1, 32, 8, 1024, 64), False, 16, 64),
        (H200, (4, 32, 8, 1024), False, 4, 64),
        (H200, (1, 32, 8, 131072), False, 16, 128),
        (H200, (1, 32, 8, 131072, 16), False, 33, 64),
        (H200, (8, 64, 8, 16384), False, 2, 128),
        (H200, (1, 32, 8, 64, 16), False, 1, 64),  # a tile: nothing to fold
        (H200, (1, 32, 8, 65, 16), False, 3, 32),
        (H200, (1, 1, 1, 100), False, 2, 64),
        (H200, (1, 1, 1, 0), False, 1, 64),
        (L4, (1, 32, 8, 131072), False, 7, 64),
        (L4, (64, 32, 8, 8192, 16), True, 14, 32),
    ],
)
def test_decode(gpu, arguments, shares, splits, block_n):
    chosen = plan.decode.decode(call(*arguments), gpu)
    assert (chosen.stream_k, chosen.splits, chosen.tiles.block_n) == (shares, splits, block_n)
    batch, nheads_k = arguments[0], arguments[2]
    assert chosen.programs == splits * nheads_k * (1 if shares else batch)


@pytest.mark.parametrize(
    ("batch", "threshold"),
    [(16, plan.decode.STREAM_K_WORK), (17, plan.decode.WAVES_WORK), (64, plan.decode.WAVES_WORK)],
)
def test_equal_shares_begin_at_so_many_bytes(batch, threshold):
    """16 sequences of 8 heads are one wave on 132 multiprocessors, 17 are more."""
    a_key = 2 * 128 * 2
    first = -(-threshold * H200.multiprocessors // (batch * 8 * a_key))
    for seqlen_k, shares in ((first - 1, False), (first, True), (4 * first, True)):
        assert plan.decode.decode(call(batch, 32, 8, seqlen_k), H200).stream_k is shares
        narrow = call(batch, 32, 8, 2 * seqlen_k, head_dim=64)
        assert plan.decode.decode(narrow, H200).stream_k is shares


def test_nothing_is_loaded_ahead_of_a_single_tile():
    stages = [
        plan.decode.decode(call(1, 32, 8, n), H200).tiles.num_stages for n in (64, 1024, 1025)
    ]
    assert stages == [2, 2, 3]
    # Measured: slower where a tile is a page or more, faster in larger pages.
    stages = [
        plan.decode.decode(call(1, 32, 8, 1024, n), H200).tiles.num_stages for n in (16, 64, 256)
    ]
    assert stages == [3, 3, 2]


def test_parts_that_were_asked_for_are_no_more_than_tiles():
    """Beyond, they are empty and take memory. Two at least, so that results take the same way."""
    tiles = plan.decode.decode_tiles(90, 128, 4)[1].block_n
    for n, most in ((1, 2), (2 * tiles, 2), (2 * tiles + 1, 3), (128 * tiles, 128)):
        assert plan.decode.decode(call(8, 32, 8, n, num_splits=128), H200).splits == most
    assert plan.decode.decode(call(8, 32, 8, 1, num_splits=1), H200).splits == 1
    assert plan.decode.decode(call(8, 32, 8, 4096, num_splits=128, left=63), H200).splits == 2


def test_the_larger_head_dim_decides():
    """Of q and v: tiles have to hold both."""
    p = call(24, 24, 24, 4096)
    for d, d_v in ((64, 128), (128, 64), (128, 256), (256, 64)):
        q, k, v = (
            p.q[..., :1].expand(-1, -1, -1, d),
            *(p.k[..., :1].expand(-1, -1, -1, n) for n in (d, d_v)),
        )
        chosen = plan.decode.decode(replace(p, q=q, k=k, v=v), H200)
        assert chosen == plan.decode.decode(call(24, 24, 24, 4096, head_dim=max(d, d_v)), H200)
        tiles = plan.forward.forward(replace(p, q=q, k=k, v=v), H200).tiles
        assert (
            tiles == plan.forward.forward(call(24, 24, 24, 4096, head_dim=max(d, d_v)), H200).tiles
        )


OFFSETS = torch.tensor([0, 1, 2]).int()


@pytest.mark.parametrize(
    ("changes", "decodes"),
    [
        ({}, True),
        ({"seqlen_q": 16}, True),
        ({"seqlen_q": 0}, False),
        ({"seqlen_q": 0, "num_splits": 2}, False),
        ({"seqlen_q": 0, "split_size": 64}, False),
        ({"num_splits": 1}, True),
        ({"num_splits": 1, "seqlen_q": 17}, False),
        ({"num_splits": 2, "seqlen_q": 17}, True),
        ({"split_size": 64, "seqlen_q": 17}, True),
        # packed queries, of a cache: few by chance, unless the same bits are promised
        ({"cu_seqlens_q": OFFSETS}, True),
        ({"cu_seqlens_q": OFFSETS, "page_size": 16}, True),
        ({"cu_seqlens_q": OFFSETS, "seqlen_q": 16}, True),
        ({"cu_seqlens_q": OFFSETS, "seqlen_q": 17}, False),
        ({"cu_seqlens_q": OFFSETS, "seqlen_q": 0}, False),
        ({"cu_seqlens_q": OFFSETS, "num_splits": 1}, False),
        ({"cu_seqlens_q": OFFSETS, "num_splits": 2}, True),
        ({"cu_seqlens_q": OFFSETS, "num_splits": 2, "seqlen_q": 2048}, True),
        ({"cu_seqlens_q": OFFSETS, "split_size": 64}, True),
        ({"cu_seqlens_q": OFFSETS, "split_size": 64, "seqlen_q": 2048}, True),
        # packed keys are of a prefill, those in pages are not
        ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS}, False),
        ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, "page_size": 16}, True),
        ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, "num_splits": 1}, False),
        ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, "num_splits": 3}, True),
    ],
)
def test_what_decodes(changes, decodes):
    assert plan.decode.decodes(replace(call(2, 32, 8, 4096), **changes), H200) is decodes


@pytest.mark.parametrize(
    ("gpu", "batch", "seqlen_q", "seqlen_k", "more", "decodes"),
    [
        # a few dozen query tokens of a long cache: the forward kernel would leave the GPU idle
        (H200, 1, 17, 4096, {}, True),
        (H200, 1, 32, 32768, {}, True),
        (H200, 1, 128, 32768, {}, True),
        (H200, 4, 32, 8192, {}, True),
        (L4, 1, 32, 32768, {}, True),
        # or fill its tiles to a quarter
        (H200, 16, 32, 4096, {}, True),
        (H200, 64, 32, 1024, {}, True),
        # too short to be worth the folding
        (H200, 1, 64, 2048, {}, False),
        (H200, 1, 17, 1024, {}, False),
        (H200, 1, 64, 64, {}, False),
        # the forward kernel's tiles are as many as multiprocessors, or nearly
        (H200, 4, 64, 8192, {}, False),
        (H200, 1, 256, 32768, {}, False),
        (H200, 4, 128, 8192, {}, False),
        (H200, 1, 4096, 8192, {}, False),
        # packed, they are more than multiprocessors, and would not be split
        (H200, 5, 512, 8192, {}, False),
        # a window's keys are few, for the other kernel fewer still
        (H200, 1, 2000, 100000, {"left": 1024}, False),
        (H200, 1, 32, 32768, {"left": 500}, False),
        # what changes scores takes the registers that the larger tiles need
        (H200, 1, 32, 32768, {"scores": problem.Scores(softcap=30.0)}, False),
        # asked for the same bits in every batch
        (H200, 1, 17, 32768, {"num_splits": 1}, False),
    ],
)
def test_what_decodes_with_many_queries(gpu, batch, seqlen_q, seqlen_k, more, decodes):
    p = replace(call(batch, 32, 8, seqlen_k, seqlen_q=seqlen_q), **more)
    assert plan.decode.decodes(p, gpu) is decodes


def test_a_window_counts_as_far_as_it_reaches():
    """The rest of a long cache is never read, so it is no reason to split."""
    wide, narrow = (plan.decode.decode(call(1, 32, 8, 131072, left=n), H200) for n in (None, 255))
    assert wide.splits > narrow.splits == 4


@pytest.mark.parametrize("seqlen_q", [1, 8, 16])
@pytest.mark.parametrize("asked", [{"num_splits": 1}, {"num_splits": 7}, {"split_size": 512}])
def test_what_is_asked_for_does_not_depend_on_the_batch(asked, seqlen_q):
    plans = [
        plan.decode.decode(call(batch, 32, 8, 8192, seqlen_q=seqlen_q, **asked), H200)
        for batch in (1, 5, 64, 1000)
    ]
    assert len({(p.tiles, p.stream_k, p.splits, p.split_tiles) for p in plans}) == 1
    assert not plans[0].stream_k


@pytest.mark.parametrize("asked", [{"num_splits": 7}, {"split_size": 512}, {}])
def test_what_is_asked_for_is_folded_alike_in_any_batch(asked):
    """A warp a row, and other parts at once, only where nobody was promised the same bits."""
    combine = pytest.importorskip("mini_flash_attention.kernels.decode.combine")
    folds = []
    for batch in (1, 1000):
        p = call(batch, 32, 8, 8192, seqlen_q=8, **asked)
        chosen = plan.decode.decode(p, H200)
        launch = combine.launch(p, p.q, None, chosen, p.group)
        folds.append((launch.options["num_warps"], launch.constants[-3]))
    assert (folds[0] == folds[1]) is bool(asked) and folds[0] == (8, 32)


def test_parts_of_a_fixed_size_cover_the_cache():
    for size, seqlen_k, left in itertools.product((1, 64, 100, 5000), (0, 1, 4097), (None, 70)):
        chosen = plan.decode.decode(call(1, 8, 2, seqlen_k, split_size=size, left=left), H200)
        keys = chosen.splits * chosen.split_tiles * chosen.tiles.block_n
        window = seqlen_k if left is None else left + 1 + chosen.tiles.block_n
        assert keys >= min(seqlen_k, window)
        assert size <= chosen.split_tiles * chosen.tiles.block_n < size + chosen.tiles.block_n


def test_parts_of_a_fixed_size_take_one_way():
    """A result is folded whether or not the cache could hold more than a part: the same bits."""
    for seqlen_k in (0, 1, 512, 513, 8192):
        assert plan.decode.decode(call(1, 8, 2, seqlen_k, split_size=512), H200).splits >= 2


def test_facts_are_plain_inside_and_constants_to_kernels():
    """Triton's hooks write them as JSON, and its keys hash them at every unaligned launch."""
    loads = pytest.importorskip("mini_flash_attention.kernels.portable.loads")
    p = call(1, 8, 8, 256)
    facts = loads.config(p, p.q, plan.forward.forward(p, H200).tiles, "softcap")
    assert json.loads(json.dumps(facts)) == list(facts)
    mode = facts.SCORE_MODE
    assert (mode if settings.INTERPRETED else mode.value) == "softcap"


def test_offsets_of_pages_count_what_lies_inside_them():
    """A page's tokens may be further apart than the pages."""
    p = call(1, 8, 8, 1024 * 256, 256)
    strides = (1024, 2**25, 128, 1)
    far = torch.empty_strided(p.k.shape, strides, dtype=torch.bfloat16, device="meta")
    assert not layout.int64_offsets(p, 64)
    assert layout.int64_offsets(replace(p, k=far), 64)
    assert layout.int64_offsets(replace(p, v=far), 64)


def test_strides_that_are_divisible_by_8():

    def rows(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    for head_dim, nheads, told in ((72, 3, True), (64, 3, False), (36, 3, False), (72, 2, True)):
        assert layout.divisible_by_8(rows(2, 5, nheads, head_dim)) == told, head_dim
    cache = rows(4, 16, 2, 40)
    told = layout.divisible_by_8(rows(9, 6, 64), cache, cache[..., :15], rows(4, 16, 2, 15))
    assert told == 0b0110
    pages_apart = cache.as_strided(cache.shape, (16 * 80 + 4, 80, 40, 1))
    assert not layout.divisible_by_8(pages_apart)
    # What is never stepped over has no say.
    assert layout.divisible_by_8(rows(2, 5, 1, 8).as_strided((2, 5, 1, 8), (40, 8, 3, 1)))
    assert not layout.divisible_by_8(rows(1, 1, 1, 40))


def test_no_count_overflows():
    """Programs count tiles of the whole batch times shares in 32 bits."""
    window = 1985 * 64 - 1
    for batch, seqlen_k, left in ((4096, 2**20, None), (4096, 2**17, window), (2, 2**30, None)):
        chosen = plan.decode.decode(call(batch, 8, 1, seqlen_k, 64, left=left), H200)
        visible = seqlen_k if left is None else left + 1
        tiles = batch * (-(-visible // chosen.tiles.block_n) + (left is not None))
        assert not chosen.stream_k or tiles * chosen.splits < 2**31


@pytest.mark.parametrize(("batch", "seqlen_q"), [(64, 16), (4, 32), (1, 128), (64, 8), (300, 40)])
@pytest.mark.parametrize("changes", [{}, {"scores": problem.Scores(softcap=1.0)}])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_programs_cover_every_row(head_dim, changes, batch, seqlen_q):
    """Whichever tiles are chosen along the way."""
    p = replace(call(batch, 32, 8, 8192, seqlen_q=seqlen_q, head_dim=head_dim), **changes)
    chosen = plan.decode.decode(p, H200)
    blocks = 8 * -(-4 * seqlen_q // chosen.tiles.block_m)
    assert chosen.programs == chosen.splits * blocks * (1 if chosen.stream_k else batch)
    assert chosen.rows == min(4 * seqlen_q, chosen.tiles.block_m)


def test_every_tile_of_work_fits():
    """Whatever the GPU, shared memory holds what is on its way."""
    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    for arch, head_dim, rows in itertools.product(limits, (64, 128, 256), (1, 16, 32, 64, 128)):
        for tiles in plan.decode.decode_tiles(arch, head_dim, rows):
            on_the_way = (tiles.num_stages - 1) * 2 * tiles.block_n * head_dim * 2
            assert on_the_way + tiles.block_m * head_dim * 2 <= limits[arch] << 10


def prefill(batch=4, seqlen=2048, nheads=16, head_dim=128, page_size=0, **changes):
    """A call of many queries, as the kernels see it."""
    p = call(batch, nheads, nheads, seqlen, page_size, seqlen_q=seqlen, head_dim=head_dim)
    return replace(p, **changes)


def on_hopper(p, out=None):
    return plan.hopper.hopper(p, p.q if out is None else out, H200)


@pytest.mark.parametrize(
    ("batch", "nheads", "nheads_k", "seqlen_q", "seqlen_k", "group", "splits"),
    [
        # a tile for four heads instead of one for each, in so many parts that the GPU is full
        (1, 32, 8, 32, 32768, 4, 16),
        (4, 32, 8, 8, 8192, 4, 4),
        (16, 32, 8, 32, 4096, 4, 1),
        (1, 32, 8, 90, 32768, 4, 5),
        (1, 64, 1, 16, 65536, 64, 16),
        # as many tiles of one head each
        (1, 32, 8, 128, 32768, 1, 4),
        (1, 32, 8, 500, 32768, 1, 1),
        # a group that fills no tile, where one head nearly does
        (1, 24, 8, 90, 32768, 1, 5),
        (1, 8, 8, 32, 65536, 1, 16),
        # a prefill as before
        (4, 32, 8, 2048, 2048, 1, 1),
        (1, 8, 8, 1024, 1024, 1, 1),
    ],
)
def test_what_hopper_packs_and_splits(
    batch, nheads, nheads_k, seqlen_q, seqlen_k, group, splits
):  # fmt: skip
    p = call(batch, nheads, nheads_k, seqlen_k, seqlen_q=seqlen_q)
    chosen = on_hopper(p)
    assert chosen.group == group and chosen.num_m_blocks == -(-seqlen_q * group // 128)
    assert chosen.batch_heads == batch * nheads // group
    work_tiles = chosen.num_m_blocks * chosen.batch_heads
    if splits == 1:
        assert chosen.partials is None and chosen.programs == min(132, work_tiles)
    else:
        assert chosen.partials.splits == splits and not chosen.partials.stream_k
        assert chosen.partials.programs == chosen.partials.num_partials == work_tiles * splits
        assert chosen.partials.rows == min(128, seqlen_q * group)
        assert chosen.programs == min(132, chosen.partials.programs)
    if seqlen_q > 16:
        whole = on_hopper(replace(p, num_splits=1))
        assert whole.group == 1 and whole.partials is None, "the same bits in every batch"


@pytest.mark.parametrize(
    "changes",
    [
        {"seqlen_q": 4},  # a tile of the decode kernel
        {"seqlen_k": 1024},  # too little to do
        {"nheads": 24, "seqlen_q": 64},  # a group that fills no tile, and heads that don't either
        {"nheads": 56, "seqlen_q": 8}, {"nheads": 384},
        {"num_splits": 2}, {"split_size": 512}, {"num_splits": 1},
        {"scores": problem.Scores(softcap=1.0)},
        {"left": 9000, "windowed": True, "head_dim": 256},  # registers
    ],
)  # fmt: skip
def test_what_hopper_leaves_to_decoding(changes):
    p = call(1, 32, 8, 65536, seqlen_q=8)
    assert on_hopper(p).group == 4
    shape = {"nheads": 32, "seqlen_q": 8, "head_dim": 128, "seqlen_k": 65536} | changes
    words = ("nheads", "seqlen_k", "seqlen_q", "head_dim")
    p = call(1, nheads_k=8, **{name: shape.pop(name) for name in words})
    assert on_hopper(replace(p, **shape)) is None


def test_an_empty_batch_needs_no_plan():
    assert on_hopper(call(0, 32, 8, 8192, seqlen_q=32)) is None


@pytest.mark.parametrize(
    ("arguments", "block_n"),
    [
        ({}, 128),
        ({"head_dim": 64}, 128),
        ({"head_dim": 40}, 128),
        ({"head_dim": 256}, 64),
        ({"page_size": 256}, 128),
        ({"page_size": 64, "head_dim": 256}, 64),
        ({"page_size": 64}, 128),
        ({"page_size": 16}, 128),
        ({"page_size": 16, "head_dim": 256}, None),
        ({"page_size": 8}, None),  # a tile of keys would be 16 copies
        ({"page_size": 48}, None),  # nor would it be whole pages
        ({"head_dim": 32}, None),
        ({"head_dim": 100}, None),  # rows of whole 16 bytes
        ({"batch": 1, "seqlen": 128}, None),  # little to do
        ({"seqlen_k": 0}, None),
    ],
)
def test_hopper(arguments, block_n):
    chosen = on_hopper(prefill(**arguments))
    assert (chosen.tiles.block_n if chosen else None) == block_n
    assert plan.hopper.hopper(prefill(), prefill().q, plan.gpu.Gpu("B200", 100, 148)) is None


@pytest.mark.parametrize(
    ("seqlen", "changes", "consumers"),
    [
        (512, {}, 2),
        (1024, {}, 3),
        (16384, {}, 3),
        (1024, {"right": 0}, 2),
        (2048, {"right": 0}, 3),
        (16384, {"right": 0, "left": 1000}, 2),
        (16384, {"right": 0, "left": 4096}, 3),
        (8192, {"head_dim": 72}, 2),
        (8192, {"page_size": 16}, 2),
        (8192, {"page_size": 128}, 3),
    ],
)
def test_three_consumers_for_many_keys(seqlen, changes, consumers):
    """At head_dim 64; above there are no registers for a third."""
    shape = {"head_dim": 64, "seqlen": seqlen}
    assert on_hopper(prefill(**shape | changes)).tiles.consumers == consumers


def a_score_mod(score, batch, head, q_idx, kv_idx):
    """What it does is no plan's to know."""
    return score


WITH_SCORE_MOD = problem.Scores(score_mod=a_score_mod)
LESS = {
    "softcap": problem.Scores(softcap=30.0),
    "slopes": problem.Scores(alibi_slopes=torch.ones(16)),
    "sinks": problem.Scores(s_aux=torch.ones(16)),
}


def test_what_hopper_leaves_to_the_portable_kernel():
    """Values of another head_dim, and caches whose rows or first keys are looked up."""
    wide, numbers = prefill(head_dim=256), torch.zeros(4).int()
    p = prefill()
    assert on_hopper(p) and on_hopper(wide)
    for values in (p.v[..., :64], p.v[..., :120], wide.v):
        out = torch.empty(*p.q.shape[:-1], values.shape[-1], dtype=torch.bfloat16, device="meta")
        assert on_hopper(replace(p, v=values), out) is None
    assert on_hopper(replace(p, cache_batch_idx=numbers)) is None
    assert on_hopper(replace(p, cache_leftpad=numbers)) is None
    paged = prefill(page_size=128)
    assert on_hopper(paged) and on_hopper(replace(paged, cache_leftpad=numbers)) is None
    rotation = problem.Rotary(torch.ones(8, 64), torch.ones(8, 64), True, True)
    assert on_hopper(replace(p, rotary=rotation)) == on_hopper(p), "done before"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", LESS)
def test_what_hopper_knows_changes_no_plan(name, head_dim):
    p = prefill(head_dim=head_dim, seqlen=8192)
    changed, whole = on_hopper(replace(p, scores=LESS[name])), on_hopper(p)
    assert changed == whole._replace(score_mode=changed.score_mode, skip_max=changed.skip_max)
    forward = plan.forward.forward(replace(p, scores=LESS[name]), H200)
    assert forward == plan.forward.forward(p, H200)


def test_a_score_mod_takes_registers():
    """No third consumer; else the plan is the same."""
    for head_dim, consumers in ((64, 3), (128, 2), (256, 2)):
        p = prefill(head_dim=head_dim, seqlen=8192)
        plain, own = on_hopper(p), on_hopper(replace(p, scores=WITH_SCORE_MOD))
        assert plain.tiles.consumers == consumers
        assert own.tiles == plan.configs.HOPPER_TILES[head_dim] and own.tiles.consumers == 2
        assert own.num_m_blocks == p.seqlen_q // 128
    for head_dim, smaller in ((40, True), (64, True), (128, False), (256, False)):
        p = prefill(head_dim=head_dim)
        tiles = [
            plan.forward.forward(x, H200).tiles for x in (p, replace(p, scores=WITH_SCORE_MOD))
        ]
        windowed = plan.forward.forward(replace(p, windowed=True), H200).tiles
        assert tiles[1] == (windowed if smaller else tiles[0])


def test_what_tma_can_step_over():
    p = prefill()
    empty = torch.empty(4, 2048, 16, 144, dtype=torch.bfloat16, device="meta")
    for x, fits in (
        (empty[..., :128], True),
        (empty[..., 1:129], True),  # whether its address fits is seen at the call
        (empty.view(4, 2048, -1)[..., : 16 * 132].unflatten(-1, (16, 132))[..., :128], False),
        (p.q.transpose(1, 2).contiguous().transpose(1, 2), True),
        (p.q[:1].expand(4, -1, -1, -1), False),
        (torch.empty_strided(p.q.shape, (2**31, 2048, 128, 1), device="meta"), False),
    ):
        assert plan.hopper.tma(x) is fits
        for name in "qkv":
            assert bool(on_hopper(replace(p, **{name: x}))) is fits
        assert bool(on_hopper(p, x)) is fits


def test_one_split_does_not_depend_on_the_batch():
    """The Hopper kernel and the portable one round differently."""
    for seqlen_q, head_dim in itertools.product((17, 64, 2048), (64, 128, 256)):
        chosen = [
            on_hopper(call(n, 8, 8, 4096, seqlen_q=seqlen_q, head_dim=head_dim, num_splits=1))
            for n in (1, 5, 64)
        ]
        assert all(chosen) and len({x.tiles for x in chosen}) == 1


def test_varlen_says_what_was_asked_for():
    """A small packed call goes to Hopper only if it must not depend on what else is packed."""
    q, offsets = torch.empty(100, 4, 64, dtype=torch.float16), torch.tensor([0, 40, 100]).int()
    for num_splits in (0, 1):
        p = calls.varlen(
            q, q, q, offsets, offsets, 60, 60, 0.0, None, False, (-1, -1), 0.0, None, False,
            False, None, None, None, num_splits, None,
        )  # fmt: skip
        assert bool(on_hopper(p)) is bool(num_splits)


def test_many_packed_tokens_stay_on_hopper():
    q = torch.empty(2**18, 32, 128, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(65, dtype=torch.int32, device="meta")
    p = prefill(q=q, k=q, v=q, cu_seqlens_q=offsets, cu_seqlens_k=offsets, batch=64, seqlen_q=2**14)
    chosen = on_hopper(p)
    assert chosen.num_m_blocks * chosen.batch_heads == (2**18 // 128 + 64) * 32


@pytest.mark.parametrize("seqlen", [512, 4096, 16384])
def test_programs_of_a_group_find_their_keys_in_the_cache(seqlen):
    chosen = on_hopper(prefill(batch=2**14 // seqlen, seqlen=seqlen))
    assert chosen.programs == 132
    assert chosen.l2_group * 2 * seqlen * 128 * 2 <= plan.forward.L2_BYTES


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen", [300, 512, 4096, 16384])
def test_without_a_mask_heads_stand_side_by_side(seqlen, head_dim):
    """Tiles of a head are worked on at the same time, of no more heads than that takes."""
    p = prefill(batch=8, seqlen=seqlen, head_dim=head_dim, nheads=32)
    chosen, masked = on_hopper(p), on_hopper(replace(p, right=0))
    assert chosen.l2_group == min(-(-132 // chosen.num_m_blocks), masked.l2_group)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_results_leave_through_the_place_of_their_queries_where_there_are_two(head_dim):
    """Else queries are loaded ahead into the places that are left."""
    for tiles in (plan.configs.HOPPER_TILES[head_dim], on_hopper(prefill(head_dim=head_dim)).tiles):
        assert tiles.consumers < tiles.q_buffers <= 2 * tiles.consumers
        keys_and_values = 2 * 2 * tiles.block_n * head_dim * 2
        assert keys_and_values + 64 * tiles.q_buffers * head_dim * 2 <= 227 << 10


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_the_hopper_kernel_is_told_of_scores(head_dim):
    slopes = torch.empty(16, device="meta")
    told = {
        problem.Scores(): "",
        problem.Scores(softcap=30.0): "bounded",
        problem.Scores(softcap=60.0): "softcap",
        problem.Scores(softcap=30.0, alibi_slopes=slopes): "softcap",
        problem.Scores(alibi_slopes=slopes): "linear" if head_dim <= 128 else "",
    }
    for scores, way in told.items():
        p = prefill(head_dim=head_dim, scores=scores)
        assert on_hopper(p).score_mode.mode == way


@pytest.mark.parametrize("left", [None, 100])
@pytest.mark.parametrize("newer", [False, True])
def test_the_score_mode_of_alibi_does_not_depend_on_the_batch(newer, left, monkeypatch):
    """Nor does the kernel: a longer sequence beside it brings in a third consumer, and no more."""
    newer_gpu = H200._replace(triton=(3, 8) if newer else (3, 6))
    scores = problem.Scores(alibi_slopes=torch.empty(16, device="meta"))
    windowed = left is not None
    p = prefill(head_dim=64, scores=scores, left=left, right=0, windowed=windowed)
    chosen = []
    for many in (0, 2**31):
        monkeypatch.setattr(plan.hopper, "MANY_KEYS", many)
        chosen.append(plan.hopper.hopper(p, p.q, newer_gpu))
    if newer and windowed:
        assert chosen == [None, None]
    else:
        assert {x.score_mode.mode for x in chosen} == {"" if newer else "linear"}
        assert {x.tiles.consumers for x in chosen} == {2, 3}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [-1, 0, 5, 15, 16, 40, 400])
def test_the_score_mode_of_a_soft_cap_does_not_depend_on_the_batch(left, causal):
    """A sequence gets the same bits beside longer ones, whether or not the window cuts there."""
    modes = set()
    for lengths in ((1, 1), (3, 4), (16, 16), (5, 17), (200, 15), (200, 1000)):
        bounds = options.window("flash_attn_varlen_func", causal, (left, 3), *lengths)
        p = prefill(scores=problem.Scores(softcap=50.0))
        p = replace(p, seqlen_k=lengths[1], left=bounds[0], right=bounds[1])
        modes.add(choose_score_mode(p, "bounded").mode)
    assert modes == {"softcap" if 0 <= left < 16 else "bounded"}
