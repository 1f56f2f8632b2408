"""The demo's engine, on a tiny model of random weights: the ways to decode give the same tokens."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

FILE = Path(__file__).resolve().parent.parent / "examples" / "generate.py"
PROMPT_LENGTHS = [5, 19, 1, 8, 30, 3, 17]
HEADS, KV_HEADS, HEAD_DIM, VOCAB, HIDDEN, WIDE, LAYERS = 4, 2, 16, 40, 32, 48, 2
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["generate"]


def tiny_model():
    """What `Llama` reads of transformers' model."""
    random = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (WIDE, HIDDEN),
            "mlp.up_proj": (WIDE, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDE),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    weights = {f"{k}.weight": torch.randn(s, generator=random) * 0.4 for k, s in shapes.items()}
    for name in ["norm", *(f"layers.{i}.{norm}" for i in range(LAYERS) for norm in NORMS)]:
        weights[f"model.{name}.weight"] = torch.ones(HIDDEN)
    config = SimpleNamespace(
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=LAYERS,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 1e4},
    )
    return SimpleNamespace(config=config, dtype=torch.float32, state_dict=lambda: weights)


def answers(generate, way):
    """Tokens and logits of every sequence, decoded in one of three ways."""
    stock = tiny_model()
    options = generate.Options(
        prompts=[""] * len(PROMPT_LENGTHS),
        max_tokens=12,
        device=torch.device("cpu"),
        dtype=torch.float32,
        page_size=4,
        pages=18,
        batch=4,
        graph=way != "rows in use",
    )
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (n,), generator=random).tolist() for n in PROMPT_LENGTHS]
    model, cache = generate.Llama(stock), generate.make_cache(stock.config, prompts, options)
    cache.storage.fill_(float("nan"))  # whatever is read without having been written shows
    with mock.patch.object(generate.Options, "compares_logits", True):  # keep them
        engine = generate.Engine(model, cache, {0, 1, 2}, options)
        if way == "graph":
            pretend_to_capture(engine.decoder)
        sequences = generate.as_sequences(prompts)
        rows = {len(served) for served in engine.run(sequences)}
    assert engine.preemptions and len(rows) > 2  # the steps differ in what they have to do
    assert len(cache.free_pages) == options.pages
    return [(s.generated, torch.stack(s.logits), s.finish_reason) for s in sequences]


def pretend_to_capture(decoder):
    """`capture` without a GPU; a replay computes the step again, into the recorded tensor."""
    before = decoder.cache.storage.clone()
    with mock.patch.object(torch, "cuda", mock.MagicMock()):
        decoder.capture()
    assert torch.equal(decoder.cache.storage.nan_to_num(), before.nan_to_num())
    batch, recorded = decoder.fixed, decoder.logits
    assert not recorded.isnan().any()

    @torch.inference_mode()
    def replay():
        recorded.copy_(decoder.model.forward(batch, decoder.cache))

    decoder.graph.replay = replay


@pytest.mark.parametrize("way", ["padded rows", "graph"])
def test_every_way_to_decode_gives_the_same_answers(generate, way):
    expected = answers(generate, "rows in use")
    assert len({reason for _, _, reason in expected}) == 2  # some end by themselves, some don't
    for ours, theirs in zip(answers(generate, way), expected, strict=True):
        assert ours[0] == theirs[0] and ours[2] == theirs[2]
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-4)


def table(generate, capsys, device):
    """What `print_table` prints of a run on `device`; nothing runs there."""
    options = SimpleNamespace(device=torch.device(device))
    cache = SimpleNamespace(most_used=3, num_pages=8)
    phases = {"prefill": generate.Phase(1, 9, 0.5), "decode": generate.Phase(4, 8, 0.2)}
    engine = SimpleNamespace(options=options, cache=cache, preemptions=0, **phases)
    generate.print_table(engine, None, generate.StockRun(**phases), num_layers=2)
    return capsys.readouterr().out


def test_the_table_says_where_both_run_the_same_attention(generate, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = table(generate, capsys, "cpu")
    assert on_cpu.count("(PyTorch)") == 4  # every row, ours and transformers'
    assert "both rows" in on_cpu and "batching" in on_cpu
    rows = on_cpu.strip().splitlines()[:5]
    assert len({len(row) for row in rows}) == 1  # the columns are aligned
    on_gpu = table(generate, capsys, "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for with_kernels in (on_gpu, table(generate, capsys, "cpu")):
        assert with_kernels.count("mini_flash_attention  ") == 2
        assert "(PyTorch)" not in with_kernels and "batching" not in with_kernels
