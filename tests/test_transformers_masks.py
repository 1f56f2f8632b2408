"""Masks of transformers' models: cross attention, packing, padding beside a window, refusals.

As in `test_transformers.py`, small models with random weights are compared with their own eager
attention, in fp32 on the CPU.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_transformers import (  # noqa: E402
    FELT,
    PAGES,
    SIZES,
    VOCAB,
    assert_as_good,
    assert_close,
    build,
    coarse_and_exact,
    gpu_params,
    logits,
)

from mini_flash_attention.integrations import transformers as integration  # noqa: E402
from mini_flash_attention.integrations.transformers import Mask, register  # noqa: E402

BATCH = 3
MASKS = ["none", "ones", "left", "right", "middle", "empty row"]
WINDOW = 4


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def tokens(length, batch=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (batch, length), generator=generator)


def padding(kind, length, batch=BATCH):
    """(batch, length), 1 for real tokens; None for the kind "none"."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left":
        mask[0, : length // 3] = 0
        mask[-1, : length // 2] = 0
    elif kind == "right":
        mask[0, -(length // 3) :] = 0
        mask[-1, -(length // 2) :] = 0
    elif kind == "middle":
        mask[0, 3:6] = 0
        mask[1, 0] = mask[1, 2] = mask[1, -3] = 0
        mask[-1, -4:-2] = 0
    elif kind == "empty row":
        mask[1] = 0
    return None if kind == "none" else mask


def given(**inputs):
    """Those that are not None."""
    return {name: x for name, x in inputs.items() if x is not None}


def compare(model, run, real=None):
    """run() gives the same with our attention as with eager attention, where tokens are real."""
    results = {}
    for attention in ("eager", "mini"):
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            results[attention] = run()
    ours, theirs = results["mini"], results["eager"]
    if ours.is_floating_point():
        assert_close(ours, theirs, real)
    else:
        assert ours.tolist() == theirs.tolist()
    return theirs


def lively(model):
    """The model with weights that make scores differ, so that it shows which keys are seen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * 1.2 / parameter[0].numel() ** 0.5
    return model.eval()


# -- cross attention ------------------------------------------------------------------------------

TEXT = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MOONSHINE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def seen(decoder):
    """A vision encoder (17 keys) with this decoder, as Donut and Nougat are."""
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VIT), decoder
    )
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 1, 2
    return config


def whisper():
    sizes = {k: v for k, v in TEXT.items() if k != "max_position_embeddings"}
    return transformers.WhisperConfig(
        **sizes, num_mel_bins=8, max_source_positions=20, max_target_positions=64,
        begin_suppress_tokens=None,
    )  # fmt: skip


# Configuration, and the inputs that make n keys with a mask of this kind.
def text_inputs(n, kind):
    return given(input_ids=tokens(n), attention_mask=padding(kind, n))


def image_inputs(n, kind):
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(n))
    return {"pixel_values": images}


def whisper_inputs(n, kind):
    return {"input_features": torch.randn(BATCH, 8, 40, generator=torch.Generator().manual_seed(n))}


def moonshine_inputs(n, kind):
    length = 1200 + 400 * n
    sound = torch.randn(BATCH, length, generator=torch.Generator().manual_seed(n))
    mask = padding(kind, n + 3)
    if mask is not None:
        mask = mask.repeat_interleave(400, 1)
    return given(input_values=sound, attention_mask=mask)


PAIRS = {
    "bart": (lambda: transformers.BartConfig(**TEXT), text_inputs),
    "mbart": (lambda: transformers.MBartConfig(**TEXT), text_inputs),
    "marian": (lambda: transformers.MarianConfig(**TEXT), text_inputs),
    "pegasus": (lambda: transformers.PegasusConfig(**TEXT), text_inputs),
    "m2m_100": (lambda: transformers.M2M100Config(**TEXT), text_inputs),
    "encoder_decoder": (
        lambda: transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.BertConfig(**BERT), transformers.BertConfig(**BERT)
        ),
        text_inputs,
    ),
    "whisper": (whisper, whisper_inputs),
    "moonshine": (lambda: transformers.MoonshineConfig(**MOONSHINE), moonshine_inputs),
    "vit_bert": (lambda: seen(transformers.BertConfig(**BERT)), image_inputs),
    "vit_gpt2": (
        lambda: seen(transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)),
        image_inputs,
    ),
    "donut": (lambda: seen(transformers.MBartConfig(**TEXT | {"encoder_layers": 2})), image_inputs),
}
CLASSES = {
    "encoder_decoder": "EncoderDecoderModel",
    "whisper": "WhisperForConditionalGeneration",
    "moonshine": "MoonshineForConditionalGeneration",
    "vit_bert": "VisionEncoderDecoderModel",
    "vit_gpt2": "VisionEncoderDecoderModel",
    "donut": "VisionEncoderDecoderModel",
}
MASKLESS = ["whisper", "vit_bert", "vit_gpt2", "donut"]
PAIRS_AND_MASKS = [
    (name, kind) for name in PAIRS for kind in MASKS if name not in MASKLESS or kind == "none"
]


def pair(name):
    """An encoder with a decoder, and its inputs."""
    config, inputs = PAIRS[name]
    config = config()
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    auto = getattr(transformers, CLASSES.get(name, "AutoModelForSeq2SeqLM"))
    torch.manual_seed(0)
    make = auto._from_config if name in CLASSES else auto.from_config
    return lively(make(config, attn_implementation="eager")), inputs


@pytest.mark.parametrize(("name", "kind"), PAIRS_AND_MASKS)
def test_keys_of_another_length(name, kind):
    """Fewer queries than keys, one, and more; queries padded or not; with and without a cache."""
    model, inputs = pair(name)
    for keys, queries in ((12, 5), (12, 1), (7, 16)):
        for queries_kind in ("none", "right") if queries > 1 else ("none",):
            mask = padding(queries_kind, queries)
            real = torch.ones(BATCH, queries, dtype=torch.bool) if mask is None else mask.bool()
            real[1] &= kind != "empty row"
            for use_cache in (True, False):
                options = given(
                    **inputs(keys, kind), decoder_input_ids=tokens(queries, seed=2),
                    decoder_attention_mask=mask, use_cache=use_cache,
                )  # fmt: skip
                compare(model, lambda options=options: model(**options).logits, real)


def test_cross_attention_feels_its_keys():
    """With as many keys as there are queries, and not all, logits differ."""
    model, inputs = pair("bart")
    ids = tokens(5, seed=2)
    with torch.no_grad():
        whole = model.model.encoder(**inputs(20, "none")).last_hidden_state
        parts = [
            model(encoder_outputs=(states,), decoder_input_ids=ids).logits
            for states in (whole, whole[:, :5])
        ]
    assert (parts[0] - parts[1]).abs().max() > FELT


@pytest.mark.parametrize("cache", ["dynamic", "static", "none", "beams"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("bart", "none"), ("bart", "right"), ("bart", "middle"), ("encoder_decoder", "left"),
     ("whisper", "none"), ("moonshine", "right"), ("vit_bert", "none"), ("donut", "none")],
)  # fmt: skip
def test_generate_from_an_encoder(name, kind, cache):
    model, inputs = pair(name)
    options = {
        "none": {"use_cache": False}, "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 3}, "dynamic": {},
    }[cache]  # fmt: skip
    compare(
        model,
        lambda: model.generate(
            **inputs(12, kind), do_sample=False, max_new_tokens=8, min_new_tokens=8,
            decoder_start_token_id=1, pad_token_id=0, **options,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["none", "right", "middle"])
@pytest.mark.parametrize("name", ["bart", "encoder_decoder"])
def test_answers_in_parts_beside_an_encoder(name, kind, cache):
    """Several queries on top of a cache for both attentions, between single ones."""
    model, inputs = pair(name)
    ids = tokens(9, seed=2)
    decoder = model.config.get_text_config(decoder=True)

    def fresh(keys):
        if cache == "dynamic":
            return transformers.DynamicCache()
        return transformers.StaticCache(config=decoder, max_cache_len=keys)

    def run():
        past = transformers.EncoderDecoderCache(fresh(20), fresh(12))
        options, logits = inputs(12, kind), []
        for start, end in ((0, 3), (3, 4), (4, 9)):
            out = model(**options, decoder_input_ids=ids[:, start:end], past_key_values=past)
            options.pop("input_ids", None)
            options["encoder_outputs"] = (out.encoder_last_hidden_state,)
            logits.append(out.logits)
        return torch.cat(logits, 1)

    compare(model, run)


@pytest.mark.parametrize("kind", ["none", "left", "middle"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_decoders_that_are_given_states(name, kind):
    config = {
        "bert": lambda: transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True
        ),
    }[name]()
    model = lively(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    )
    states = torch.randn(BATCH, 12, 32, generator=torch.Generator().manual_seed(3))
    for queries in (5, 1, 16):
        options = given(
            input_ids=tokens(queries), encoder_hidden_states=states,
            encoder_attention_mask=padding(kind, 12),
        )  # fmt: skip
        compare(model, lambda options=options: model(**options).logits)


# -- positions and packing ------------------------------------------------------------------------

LENGTH = 14


def positions(kind, batch=BATCH):
    place = torch.arange(LENGTH).repeat(batch, 1)
    if kind == "jump":
        place[:, 5:] += 4
    elif kind == "stand":
        place[:, 4:7] = 3
        place[:, 7:] -= 3
    elif kind == "restart":  # the second row holds one sequence
        place[:1, 6:] -= 6
        place[2:, 9:] -= 9
    return place


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", ["none", "ones", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_positions(family, kind, cache, batch):
    """One sequence, unless neither a mask nor a cache is there."""
    model = build(family, sliding_window=WINDOW if family == "mistral" else None)
    mask = padding(kind, LENGTH)
    mask = None if mask is None else mask[:batch]
    results = {}
    for where in ("plain", "jump", "stand", "restart"):
        for rows in {1, batch}:
            options = given(
                input_ids=tokens(LENGTH)[:batch], attention_mask=mask, use_cache=cache,
                position_ids=positions(where, batch)[:rows],
            )  # fmt: skip
            real = None if mask is None else mask.bool()
            theirs = compare(model, lambda options=options: model(**options).logits, real)
            results[where] = theirs
    assert (results["plain"] - results["jump"])[0].abs().max() > FELT


def test_packing_is_felt():
    """The same positions cut a row beside nothing, and not beside a mask or a cache."""
    model = build("llama")
    ids, place = tokens(LENGTH, 1), positions("jump", 1)
    ones = torch.ones_like(ids)
    with torch.no_grad():
        packed = model(ids, position_ids=place, use_cache=False).logits
        for options in ({"attention_mask": ones, "use_cache": False}, {"use_cache": True}):
            whole = model(ids, position_ids=place, **options).logits
            assert (packed - whole).abs().max() > FELT


@pytest.mark.parametrize("kind", ["none", "ones", "middle"])
def test_jumps_beside_a_cache(kind):
    model, ids, place = build("llama"), tokens(LENGTH), positions("jump")
    mask = padding(kind, LENGTH)

    def run():
        past, logits = transformers.DynamicCache(config=model.config), []
        for start, end in ((0, 8), (8, 9), (9, 14)):
            options = given(attention_mask=None if mask is None else mask[:, :end])
            part = {"position_ids": place[:, start:end], "past_key_values": past}
            logits.append(model(ids[:, start:end], **part, **options).logits)
        return torch.cat(logits, 1)

    compare(model, run, None if mask is None else mask.bool())


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config={
            **{k: v for k, v in SIZES.items() if k != "head_dim"},
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]
            },
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration
    return lively(model._from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize("kind", ["none", "ones", "left"])
def test_positions_of_images(kind):
    """Three rows of positions, or the text's own before them, which alone can say "packed"."""
    model, ids, mask = qwen2_vl(), tokens(LENGTH), padding(kind, LENGTH)
    place = positions("plain").repeat(3, 1, 1)
    place[0, :, 4:8] = 4
    place[1, :, 4:8] = torch.tensor([4, 4, 5, 5])
    place[2, :, 4:8] = torch.tensor([4, 5, 4, 5])
    place[:, :, 8:] -= 2
    for first in (None, "plain", "restart"):
        rows = place if first is None else torch.cat([positions(first)[None], place])
        for cache in (True, False):
            options = given(attention_mask=mask, position_ids=rows, use_cache=cache)
            compare(
                model,
                lambda options=options: model(ids, **options).logits,
                None if mask is None else mask.bool(),
            )


def test_lengths_in_tensors_go_into_a_graph():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, LENGTH, 16, generator=generator) for _ in range(3))
    starts, longest = torch.tensor([0, 5, LENGTH]), torch.tensor(LENGTH - 5)
    options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    options |= {"max_length_q": longest, "max_length_k": longest}
    run = torch.compile(integration.attention, fullgraph=True, backend="aot_eager")
    packed, _ = run(torch.nn.Identity(), q, k, v, None, **options)
    for start, end in ((0, 5), (5, LENGTH)):
        part = (x[:, :, start:end] for x in (q, k, v))
        alone, _ = integration.attention(torch.nn.Identity(), *part, None)
        assert_close(packed[:, start:end], alone)


# -- padding beside a window ----------------------------------------------------------------------


def windowed(family):
    if family == "modernbert":
        config = transformers.ModernBertConfig(
            **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")},
            local_attention=6, global_attn_every_n_layers=3,
        )  # fmt: skip
        auto = transformers.AutoModelForMaskedLM
        return lively(auto.from_config(config, attn_implementation="eager"))
    return build(family, sliding_window=WINDOW)


def holed():
    """Padding before, between and behind real tokens, once within a window and once wider."""
    rows = ["111000111111", "011011101111", "110111100011", "111111111111", "000010000110"]
    return torch.tensor([[int(c) for c in row] for row in rows])


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "modernbert", "llama"])
def test_padding_in_the_middle(family, monkeypatch):
    model, mask = windowed(family), holed()
    ids = tokens(mask.shape[1], len(mask))
    theirs = compare(model, lambda: model(ids, attention_mask=mask).logits, mask.bool())
    # Were padding dropped before the window is laid, tokens out of sight would be seen.
    monkeypatch.setattr(
        integration, "_scattered", lambda q, k, v, real, options: dropped(q, k, v, real, options)
    )
    model.set_attn_implementation("mini")
    with torch.no_grad():
        difference = (model(ids, attention_mask=mask).logits - theirs)[mask.bool()].abs().max()
    assert (difference > FELT) == (family != "llama")


def dropped(q, k, v, real, options):
    mask = Mask(options["causal"], options["window_size"][0], real.shape[1], real)
    k, v = (real.new_zeros(*real.shape, *x.shape[1:], dtype=x.dtype) for x in (k, v))
    return integration._padded(q, k, v, mask, options)


@pytest.mark.parametrize("cache", ["dynamic", "sliding", "static"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_decoding_over_padding_in_the_middle(family, cache):
    """Steps of one query and of several; the last tokens are real in some rows, or not."""
    model, mask = windowed(family), holed()
    ids = tokens(mask.shape[1], len(mask))

    def run():
        past = {
            "dynamic": lambda: transformers.DynamicCache(),
            "sliding": lambda: transformers.DynamicCache(config=model.config),
            "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=16),
        }[cache]()
        logits = []
        for start, end in ((0, 3), (3, 7), (7, 8), (8, 9), (9, 12)):
            part = {"attention_mask": mask[:, :end], "past_key_values": past}
            logits.append(model(ids[:, start:end], **part).logits)
        return torch.cat(logits, 1)

    compare(model, run, mask.bool())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_generate_over_padding_in_the_middle(family, cache):
    model, mask = windowed(family), holed()[:4]
    ids = tokens(mask.shape[1], len(mask))
    options = {"cache_implementation": cache, "max_new_tokens": 8, "pad_token_id": 0}
    compare(model, lambda: model.generate(ids, attention_mask=mask, do_sample=False, **options))


@pytest.mark.parametrize("kind", ["left", "right"])
def test_padding_at_an_end_is_one_call_a_layer(kind, monkeypatch):
    model, calls = windowed("mistral"), []

    def varlen(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    original = integration.flash_attn_varlen_func
    monkeypatch.setattr(integration, "flash_attn_varlen_func", varlen)
    model.set_attn_implementation("mini")
    with torch.no_grad():
        model(tokens(LENGTH), attention_mask=padding(kind, LENGTH))
    assert len(calls) == SIZES["num_hidden_layers"]
    assert all(call["window_size"] == (WINDOW - 1, 0) for call in calls)
    assert not any("block_table" in call for call in calls)


@pytest.fixture
def reads(monkeypatch):
    """Names of the methods that make the host wait for what a tensor holds."""
    names = []
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__", "__float__"):
        original = getattr(torch.Tensor, name)

        def read(self, *args, name=name, original=original, **kwargs):
            names.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)
    return names


def test_a_mask_is_read_once(reads):
    from transformers.masking_utils import causal_mask_function as full
    from transformers.masking_utils import sliding_window_causal_mask_function

    of, window = integration.attention_mask_of, sliding_window_causal_mask_function(4)
    for kind in ("ones", "left", "middle"):
        mask = padding(kind, LENGTH).bool()
        of(BATCH, LENGTH, LENGTH, mask_function=full, attention_mask=mask)
        of(BATCH, LENGTH, LENGTH, mask_function=window, attention_mask=mask, local_size=4)
        of(BATCH, 1, 20, torch.tensor(13), mask_function=full, attention_mask=mask)
    assert reads == ["tolist"] * 9
    reads.clear()
    for q_length in (1, LENGTH):
        of(BATCH, q_length, LENGTH, LENGTH - q_length, mask_function=full)
        of(BATCH, q_length, LENGTH, LENGTH - q_length, mask_function=window, local_size=4)
        of(BATCH, q_length, 20, torch.tensor(3), mask_function=full)
    assert not reads


@pytest.mark.parametrize("family", gpu_params("mistral", "gemma2", "gpt_oss"))
def test_gpu_padding_in_the_middle(family):
    coarse, exact = coarse_and_exact(family)
    long = torch.rand(2, 300, generator=torch.Generator().manual_seed(4)) > 0.3
    for mask in (holed(), long.long()):
        mask = mask.to(exact.device)
        ids = tokens(mask.shape[1], len(mask)).to(exact.device)
        assert_as_good(
            logits(coarse, "mini", ids, attention_mask=mask),
            logits(coarse, "eager", ids, attention_mask=mask),
            logits(exact, "eager", ids, attention_mask=mask),
            mask,
        )


# -- other masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_mask_for_more_than_there_is(cache):
    """Room in a cache that is called real is not seen before a token is there."""
    model, ids = build("gemma2"), tokens(LENGTH)

    def run():
        past = transformers.StaticCache(config=model.config, max_cache_len=20)
        if cache == "dynamic":
            past = transformers.DynamicCache(config=model.config)
        logits = []
        for start, end in ((0, 6), (6, 7), (7, 14)):
            mask = torch.ones(BATCH, end if cache == "dynamic" else 20, dtype=torch.long)
            part = {"attention_mask": mask, "past_key_values": past}
            logits.append(model(ids[:, start:end], **part).logits)
        return torch.cat(logits, 1)

    compare(model, run)


@pytest.mark.parametrize("kind", ["none", "left", "middle"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_decoder_that_is_not_causal(family, kind):
    """Keys in a cache, too; a window then reaches as far to the left as to the right."""
    model, ids = build(family, sliding_window=5), tokens(LENGTH)
    mask = padding(kind, LENGTH)
    real = None if mask is None else mask.bool()
    for options in ({"is_causal": False}, {"is_causal": False, "use_cache": False}):
        part = options | given(attention_mask=mask)
        whole = compare(model, lambda part=part: model(ids, **part).logits, real)
    with torch.no_grad():
        causal = model(ids, **given(attention_mask=mask)).logits
    assert (whole - causal).abs().max() > FELT

    def run():
        past, logits = transformers.DynamicCache(config=model.config), []
        for start, end in ((0, 6), (6, 7), (7, 14)):
            part = given(attention_mask=None if mask is None else mask[:, :end])
            part |= {"past_key_values": past, "is_causal": False}
            logits.append(model(ids[:, start:end], **part).logits)
        return torch.cat(logits, 1)

    compare(model, run, real)


@pytest.mark.parametrize("kind", MASKS)
def test_an_encoder_with_windows(kind):
    model, mask = windowed("modernbert"), padding(kind, LENGTH)
    real = None if mask is None else mask.bool()
    options = given(attention_mask=mask)
    compare(model, lambda: model(tokens(LENGTH), **options).logits, real)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_assisted_generation(family, how):
    """Guesses are checked by several queries at once."""
    if how == "assistant" and family == "mistral" and not PAGES:
        pytest.skip("eager attention fails here before 5.23")
    model, ids = build(family, max_position_embeddings=256), tokens(LENGTH, 1)
    helper = build(family, max_position_embeddings=256)
    for parameter in helper.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    mask = torch.tensor([[1] * 5 + [0] * 2 + [1] * 7])
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": helper}

    def run():
        helper.set_attn_implementation(model.config._attn_implementation)
        return model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=0, **options
        )

    compare(model, run)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_mask_made_ahead_goes_into_a_graph(family):
    """generate() makes it outside of the compiled step."""
    model, ids = build(family), tokens(LENGTH)
    compiled = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True

    def run():
        options = {"cache_implementation": "static", "max_new_tokens": 8, "pad_token_id": 0}
        if model.config._attn_implementation == "mini":
            options["compile_config"] = compiled
        return model.generate(ids, do_sample=False, **options)

    compare(model, run)


# -- refusals -------------------------------------------------------------------------------------


def refused(config, run, error=NotImplementedError, match="attention: mask: expected .*eager"):
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="mini")
    with pytest.raises(error, match=match), torch.no_grad():
        run(model.eval())


@pytest.mark.parametrize("kind", ["none", "left"])
def test_models_that_compute_attention_themselves(kind):
    """transformers loads them with any name, and gives them our masks."""
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)
    options = given(attention_mask=padding(kind, LENGTH))
    refused(config, lambda model: model(tokens(LENGTH), **options))
    config = transformers.TrOCRConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=4
    )
    refused(config, lambda model: model(tokens(LENGTH), **options), AttributeError)


def test_relative_positions():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="mini")
    with pytest.raises(NotImplementedError, match="attention: position_bias"), torch.no_grad():
        model(tokens(LENGTH), decoder_input_ids=tokens(3))


def test_images_that_see_themselves():
    sizes = SIZES | {"num_hidden_layers": 2}
    config = transformers.Gemma3TextConfig(
        **sizes, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    )
    config.use_bidirectional_attention = True
    model = transformers.Gemma3TextModel._from_config(config, attn_implementation="mini")
    with pytest.raises(NotImplementedError, match="attention: mask: expected"), torch.no_grad():
        model(tokens(LENGTH))


def test_masks_of_the_wrong_length():
    model, ids = build("llama", "mini"), tokens(LENGTH)
    for length in (LENGTH - 1, LENGTH + 1):
        with (
            pytest.raises(ValueError, match="attention: attention_mask: expected shape"),
            torch.no_grad(),
        ):
            model(ids, attention_mask=padding("left", length), use_cache=False)


def test_windows_over_keys_of_another_length():
    from transformers.masking_utils import sliding_window_bidirectional_mask_function as window

    options = {"allow_is_bidirectional_skip": True, "mask_function": window(4), "local_size": 4}
    assert integration.attention_mask_of(1, 9, 9, **options).window == 4
    for queries, keys, offset in ((9, 12, 0), (9, 7, 0), (2, 3, 6), (1, 9, torch.tensor(8))):
        with pytest.raises(NotImplementedError, match="attention: mask: expected"):
            integration.attention_mask_of(1, queries, keys, offset, **options)


def test_keys_that_the_mask_does_not_know():
    x, more = torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 6, 16)
    layer = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"expected shape \(1, 6\), got 4 keys"):
        integration.attention(layer, x, more, more, Mask(True, keys=4))


def test_without_a_mask_a_window_goes_with_causality():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 16, generator=generator) for _ in range(3))
    layer = torch.nn.Identity()
    near, _ = integration.attention(layer, q, k, v, None, sliding_window=3)
    whole, _ = integration.attention(layer, q, k, v, None, is_causal=False, sliding_window=3)
    of = torch.nn.functional.scaled_dot_product_attention
    place = torch.arange(9)
    behind = place[:, None] - place
    assert_close(near.transpose(1, 2), of(q, k, v, attn_mask=(behind >= 0) & (behind < 3)))
    assert_close(whole.transpose(1, 2), of(q, k, v))


def test_a_mask_moves_and_is_no_tensor():
    mask = Mask(True, 3, 8, real=torch.ones(2, 8, dtype=torch.bool))
    moved = mask.to("meta", non_blocking=True)
    assert (moved.real.device.type, moved.window, moved.lengths) == ("meta", 3, None)
    assert mask.real.device.type == "cpu" and mask.contiguous() is mask
    x = torch.zeros(2, 1, 8, 8)
    for use in (
        lambda: x + mask,
        lambda: torch.cat([mask, x]),
        lambda: x.masked_fill(mask, 0.0),
        lambda: torch.nn.functional.pad(mask, (0, 1)),
        lambda: mask[:, :, -1:],
    ):
        with pytest.raises(NotImplementedError, match=r"attention: mask: expected .*eager"):
            use()
    assert not hasattr(mask, "dtype")
    with pytest.raises(AttributeError, match=r"attention: mask: .*got mask.dtype .*eager"):
        mask.dtype  # noqa: B018
