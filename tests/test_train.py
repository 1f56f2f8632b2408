"""The training example, small: packed documents stay apart, and both twins learn alike."""

import importlib.util
import math
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch

FILE = Path(__file__).resolve().parent.parent / "examples" / "train.py"
SIZES = "layers=1 width=32 heads=2 head-dim=16 seqlen=128 steps=30"
SMALL = [f"--{size}" for size in SIZES.split()]


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documents(train):
    return train.read_documents()


@pytest.fixture
def run(train, documents, tmp_path, capsys, monkeypatch):
    """Runs the example: (exit status, what it prints). The drawing is tmp_path / "train.svg"."""
    monkeypatch.setattr(train, "read_documents", lambda: documents)  # others may edit them
    svg = str(tmp_path / "train.svg")

    def call(*arguments):
        status = train.main([*SMALL, "--device", "cpu", "--svg", svg, *arguments])
        return status, capsys.readouterr().out

    return call


def small(train, *arguments):
    return train.parse_arguments([*SMALL, "--device", "cpu", *arguments])


def trained(train, documents, *arguments):
    """The twins after their steps."""
    options = small(train, *arguments)
    steps = list(islice(train.batches(documents, options), options.steps))
    runs = [train.Run(name, options) for name in ("ours", "sdpa")]
    train.train(runs, steps, options)
    return runs


def pieces(batch):
    """The documents of a step, as they were before packing."""
    ends = batch.cu_seqlens.tolist()
    for start, end in pairwise(ends):
        fed, predicted = batch.tokens[start:end].tolist(), batch.targets[start:end].tolist()
        assert fed[1:] == predicted[:-1]
        assert batch.positions[start:end].tolist() == list(range(end - start))
        yield bytes([*fed, predicted[-1]])


def test_documents_are_the_repository(documents):
    assert len(documents) > 300
    assert all(document[0] == 0 and 0 not in document[1:] for document in documents)
    starts = {document[1:].split(b"\n")[0] for document in documents}
    assert {b"# Design", b"## Glossary", b"def flash_attn_func("} <= starts


def test_packed_documents_never_mix(train, documents):
    documents = documents[::8]
    options = small(train)
    everything = b"\n".join(documents)  # so nothing is found across two of them
    predictions = sum(len(document) - 1 for document in documents)
    seen = []
    for batch in islice(train.batches(documents, options), predictions // options.seqlen + 1):
        ends = batch.cu_seqlens
        assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == options.seqlen
        assert batch.max_seqlen == options.seqlen // 4
        assert ends.diff().min() > 0 and ends.diff().max() <= batch.max_seqlen
        assert len(batch.tokens) == len(batch.targets) == len(batch.positions) == options.seqlen
        seen += pieces(batch)
    assert all(piece in everything for piece in seen)
    # Every document comes once before any comes again: each is predicted to its end.
    whole, part = [], b"\0"
    for piece in seen:
        part = piece if piece[0] == 0 else part + piece[1:]
        whole.append(part)
    assert set(documents) <= set(whole)


@pytest.mark.parametrize("name", ["ours", "sdpa"])
def test_a_document_does_not_depend_on_the_others(train, documents, name):
    batch = next(train.batches(documents, small(train)))
    start, end = batch.cu_seqlens[1:3].tolist()
    inside = torch.arange(128).ge(start) & torch.arange(128).lt(end)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 128, 2, 16)
    out = getattr(train, name)(q, k, v, batch)
    k[inside], v[inside] = torch.randn(2, end - start, 2, 16)
    changed = (getattr(train, name)(q, k, v, batch) != out).flatten(1).any(1)
    assert torch.equal(changed, inside)


def test_both_attend_alike(train, documents):
    for arguments in ((), ("--one-sequence",)):
        batch = next(train.batches(documents, small(train, *arguments)))
        q, k, v = torch.randn(3, 128, 2, 16)
        torch.testing.assert_close(train.ours(q, k, v, batch), train.sdpa(q, k, v, batch))


def test_one_sequence_is_one(train, documents):
    options = small(train, "--one-sequence")
    for batch in islice(train.batches(documents, options), 3):
        assert batch.cu_seqlens is None and batch.max_seqlen == options.seqlen
        assert batch.positions.tolist() == list(range(options.seqlen))
        assert torch.equal(batch.tokens[1:], batch.targets[:-1])
    longer = small(train, "--one-sequence", "--seqlen", str(sum(map(len, documents)) + 7))
    assert len(next(train.batches(documents, longer)).tokens) == longer.seqlen


@pytest.mark.parametrize("arguments", [(), ("--one-sequence",)])
def test_the_twins_learn_alike(train, documents, arguments):
    """In float32 30 steps leave the losses within 1e-4 of each other: rounding, and no more."""
    ours, sdpa = trained(train, documents, *arguments)
    for run in (ours, sdpa):
        assert run.losses[-5:].mean() < run.losses[:5].mean() - 1
    assert (ours.losses - sdpa.losses).abs().max() < 1e-4
    torch.testing.assert_close(ours.first, sdpa.first, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_that_of_the_products(train, documents):
    """The twins still agree; weights stay float32, and attention gets bfloat16."""
    dtypes = set()

    def spied(*arguments, original=train.ours):
        dtypes.update(x.dtype for x in arguments[:3])
        return original(*arguments)

    with mock.patch.object(train, "ours", spied):
        ours, sdpa = trained(train, documents, "--dtype", "bfloat16")
    assert dtypes == {torch.bfloat16}
    assert {weight.dtype for run in (ours, sdpa) for weight in run.weights} == {torch.float32}
    assert 0 < (ours.losses - sdpa.losses).abs().max() < 0.05
    assert ours.losses[-5:].mean() < ours.losses[:5].mean() - 1


def test_a_seed_gives_the_same_losses(train, documents):
    short = partial(trained, train, documents, "--steps", "8")
    first, again, other = short(), short(), short("--seed", "2")
    for one, same, different in zip(first, again, other, strict=True):
        assert torch.equal(one.losses, same.losses)
        assert not (one.losses == different.losses).any()
        for weight, others in zip(one.weights, different.weights, strict=True):
            assert weight.dim() < 2 or (weight - others).norm() > weight.norm()  # another start


def test_one_graph_serves_every_step(train, documents):
    """Neither attention breaks it, and the number of documents compiles nothing anew."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def counts(seed):
        batches = train.batches(documents, small(train, "--seed", str(seed)))
        return {len(batch.cu_seqlens) for batch in islice(batches, 8)}

    compiled = partial(torch.compile, backend=backend, fullgraph=True)
    seed = next(seed for seed in range(1, 100) if len(counts(seed)) > 1)
    arguments = ("--steps", "8", "--seed", str(seed))
    with mock.patch.object(torch, "compile", compiled):
        runs = trained(train, documents, *arguments, "--compile")
    assert len(graphs) == len(runs)
    eager = trained(train, documents, *arguments)
    for run, other in zip(runs, eager, strict=True):
        torch.testing.assert_close(run.losses, other.losses, rtol=0, atol=1e-5)


def test_what_is_printed_and_drawn(run, tmp_path):
    status, printed = run()
    assert status == 0
    path = str(tmp_path)  # of any length
    assert all(len(line) <= 100 or path in line for line in printed.splitlines()[3:])
    assert len([line for line in printed.splitlines() if line[:5].strip().isdigit()]) == 15
    for words in ("million weights", "The losses differ by", "tokens/s", "both, -: that guess"):
        assert words in printed
    root = ElementTree.parse(tmp_path / "train.svg").getroot()
    _, _, width, height = map(float, root.get("viewBox").split())
    curves = root.findall("{*}polyline")
    assert len(curves) == 2
    for curve in curves:
        points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
        assert len(points) == 30
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert curves[0].get("points") == curves[1].get("points")  # to a tenth of a pixel


@pytest.mark.parametrize("name", ["ours", "sdpa"])
def test_one_twin_alone(run, name):
    status, printed = run("--attention", name, "--steps", "1")
    assert status == 0 and "differ" not in printed
    assert [line for line in printed.splitlines() if line.startswith(name)]


def test_the_level_is_the_entropy_of_bytes(run):
    _, printed = run("--attention", "sdpa", "--steps", "1")
    level = float(printed.splitlines()[2].split()[-1])
    assert 3 < level < math.log(256)


def test_the_chart_shows_where_curves_part(train):
    curves = {"ours": [4.0] * 50 + [1.0] * 50, "sdpa": [4.0] * 50 + [2.0] * 50}
    lines = train.chart(curves, 3.0).splitlines()
    assert max(map(len, lines)) <= 80
    cells = [line[6:] for line in lines]
    assert cells[0] == "=" * 36 and cells[-2] == " " * 36 + "o" * 36
    assert [row for row in cells[:-1] if "s" in row] == [" " * 36 + "s" * 36]
    assert [line[:6].strip() for line in lines if line[:6].strip()] == ["4.00", "3.00", "1.00"]
    assert [row for row in cells[:-1] if row == "-" * 72]


def wrong(q, k, v, batch, original):
    """Attention whose gradient of k is a tenth too small."""
    return original(q, 0.9 * k + 0.1 * k.detach(), v, batch)


def broken(q, k, v, batch, original):
    return original(q, k, v, batch) * float("nan")


@pytest.mark.parametrize(
    ("attention", "words"), [(wrong, "of their length"), (broken, "MISMATCH: a loss is not finite")]
)
def test_wrong_results_are_told(train, run, monkeypatch, attention, words):
    monkeypatch.setattr(train, "ours", partial(attention, original=train.ours))
    status, printed = run("--steps", "5")
    assert status == 1 and words in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--steps 0", "argument --steps: expected a whole number from 1 to 2**31, got '0'"),
        ("--seqlen 1e3", "argument --seqlen: expected a whole number from 1 to 2**31, got '1e3'"),
        ("--seed -1", "argument --seed: expected a whole number from 1 to 2**31, got '-1'"),
        ("--head-dim 15", "--head-dim: expected an even number up to 256, got 15"),
        ("--head-dim 258", "--head-dim: expected an even number up to 256, got 258"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        (
            "--device cuda",
            "--device: torch finds no GPU it can use (--device cpu works everywhere)",
        ),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("--attention flash", "argument --attention: invalid choice: 'flash'"),
    ],
)
def test_refused_arguments(train, capsys, arguments, words):
    no_gpu = mock.patch.object(torch.cuda, "is_available", return_value=False)
    with no_gpu, pytest.raises(SystemExit) as stopped:
        train.main(arguments.split())
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_defaults(train, capsys):
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        on_gpu = train.parse_arguments([])
        assert train.parse_arguments(["--device", "cpu"]).device.type == "cpu"
        with pytest.raises(SystemExit):
            train.parse_arguments(["--dtype", "float32"])
    assert "--dtype: the kernels of a GPU take bfloat16, got float32" in capsys.readouterr().err
    assert (on_gpu.device.type, on_gpu.dtype, on_gpu.compile) == ("cuda", "bfloat16", True)
    assert (on_gpu.layers, on_gpu.width, on_gpu.head_dim, on_gpu.seqlen) == (12, 768, 64, 8192)
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        on_cpu = train.parse_arguments([])
    assert (on_cpu.device.type, on_cpu.dtype, on_cpu.compile) == ("cpu", "float32", False)
    assert all(getattr(on_cpu, name) == sizes[0] for name, sizes in train.SIZES.items())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arguments", ["", "--one-sequence", "--no-compile"])
def test_on_a_gpu(train, tmp_path, arguments):
    sizes = "--layers 2 --width 256 --heads 4 --head-dim 64 --seqlen 2048 --steps 40"
    svg = str(tmp_path / "train.svg")
    assert train.main([*sizes.split(), "--svg", svg, *arguments.split()]) == 0
