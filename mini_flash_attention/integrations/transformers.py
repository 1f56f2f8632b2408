"""Hugging Face transformers on this package's attention, by a name like those of its own.

    from mini_flash_attention.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="mini")

`from_config` and `model.set_attn_implementation("mini")` take the name too. Padded and packed
batches, windows, soft-capped scores, sinks, `generate()` with dynamic and static caches and
encoders work; models whose mask is made of anything else, or that add a bias to their scores, are
refused. Attention weights are not returned. On a GPU the model must be in fp16 or bf16. A padded
batch costs a copy of its real keys and values in every layer, and waits for the GPU there.
A compiled model is one graph where it decodes with a static cache; in prefill the graph breaks in
each layer, where padding or positions have to be read.

Continuous batching (`model.generate_batch`, transformers 5.23) accepts "sdpa", "paged|eager" and
names with "flash" in them, and has no other list to be on; `set_attn_implementation` in turn takes
names with "flash" for packages to load. So `register()` adds a second name, `name + "_flash"`,
which goes into the configuration past that look-up:

    model.config._attn_implementation = "mini_flash"
    answers = model.generate_batch(prompts)

With CUDA graphs, pass `use_async_batching=False` in its configuration: steps that overlap, the
default there, now and then give wrong tokens, with "paged|eager" as well (bench/NOTES.md 99).

Keys and values are gathered from the pages by transformers. Its shorter way, pages given to
`flash_attn_with_kvcache`, is open to the packages flash-attn 2 and 3 alone.
"""

from typing import Any

import torch
from torch.nn.functional import pad

from ..api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from ..refusals import kind_of, refuse

# What some models pass beside the usual arguments and we would have to ignore.
FOREIGN = ("position_bias", "sinks", "block_indices")


def register(name: str = "mini") -> None:
    """Make `attn_implementation=name` and, for continuous batching, `name + "_flash"` known.

    Two tables of transformers get an entry each: the function that computes attention, and the
    one that prepares its mask. Without the second, transformers prepares none, and padding is
    attended to. Calling it again changes nothing.

    Args:
        name: any that transformers has no function for yet, without "flash" in it.

    Raises:
        ImportError: transformers is missing or older than version 5.
        TypeError, ValueError: the name is no str, has "flash" in it, or is taken.

    Models then raise ValueError for a mask of four dimensions, and NotImplementedError for masks
    and biases that the package has not, for dropout and where a gradient is needed. The other
    errors are those of `flash_attn_func`, `flash_attn_varlen_func` and `flash_attn_with_kvcache`.
    """
    if not isinstance(name, str):
        refuse(TypeError, "register", "name", "a str", kind_of(name))
    if "flash" in name:
        hint = "transformers looks for a package of such a name"
        refuse(ValueError, "register", "name", "one without 'flash' in it", repr(name), hint)
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        hint = "pip install 'transformers>=5.17,<6'"
        refuse(ImportError, "register", "transformers", "version 5", error, hint)
    if name == "eager" or AttentionInterface().get(name, attention) is not attention:
        refuse(ValueError, "register", "name", "one that is free", repr(name), "as 'mini' is")
    for known in (name, f"{name}_flash"):
        AttentionInterface.register(known, attention)
        AttentionMaskInterface.register(known, attention_mask_of)


def attention_mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    device: Any = None,
    config: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **unused: Any,
) -> torch.Tensor | None:
    """What `attention` gets as its mask, made once for all layers of a kind.

    Args: those of transformers' own mask functions: lengths and positions of the queries and keys
        in tokens, of which q_offset is a tensor where the cache is static; attention_mask is
        (batch, tokens so far), True where a token is real; mask_function, local_size and use_vmap
        tell what transformers would have made.

    Returns:
        None: all keys are real. (batch, keys), bool: which keys are. (batch,), int32: only so many
        of each row are in use, the rest is room in a static cache.

    Raises:
        NotImplementedError: a mask that is more than causality, a window and padding.
    """
    # Images say so nowhere but in the function that they pass for eager's mask.
    joined = getattr(mask_function, "__name__", "") == "or_mask"
    chunk = getattr(config, "attention_chunk_size", None)
    chunks = chunk is not None and chunk == local_size and kv_length + kv_offset > chunk
    if use_vmap or joined or chunks:
        wanted = "causality, a window and padding"
        hint = 'load the model with attn_implementation="sdpa"'
        refuse(NotImplementedError, "attention", "mask", wanted, "a mask of its own", hint)
    if attention_mask is not None and attention_mask.dim() != 2:
        return attention_mask  # lengths that were made here before, or attention's to refuse
    used: Any = q_offset + q_length - kv_offset
    if attention_mask is not None:
        mask = attention_mask[:, -kv_length:].bool()  # a window's cache has dropped older tokens
        if not mask.all():
            return mask
        used = mask.shape[1]
    if isinstance(used, torch.Tensor):  # not read: decoding shall not wait for the GPU
        return used.to(torch.int32).repeat(batch_size)
    if used < kv_length:
        return torch.full((batch_size,), used, dtype=torch.int32, device=device)
    return None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention, as transformers calls it.

    Args:
        module: the layer; its `is_causal` holds where the argument is None.
        query: (batch, nheads, seqlen_q, head_dim).
        key, value: (batch, nheads_k, seqlen_k, head_dim), with the cache's.
        attention_mask: what `attention_mask_of` returned.
        dropout: 0.0.
        scaling, softcap, s_aux: `softmax_scale`, `softcap` and `s_aux` of `flash_attn_func`.
        sliding_window: tokens in sight, the query's own among them; to either side if not causal.
        position_ids: (batch, seqlen_q); without a mask, a new sequence starts where they don't
            grow by one.
        cache: the pages of continuous batching, which key and value have yet to go to.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, (sequences + 1,), and `max_length_q`,
            `max_length_k` of a packed batch.

    Returns:
        ((batch, seqlen_q, nheads, head_dim), None). The rows of padding mean nothing.
    """
    for name in FOREIGN:
        if kwargs.get(name) is not None:
            hint = 'load the model with attn_implementation="eager"'
            refuse(NotImplementedError, "attention", name, "None", kind_of(kwargs[name]), hint)
    if cache is not None:  # also turns the lengths in kwargs into those of this layer
        key, value = cache.update(key, value, module.layer_idx, kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    left = -1 if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": (left, 0 if causal else left),
        "softcap": softcap or 0.0,
        "s_aux": s_aux,
    }
    if attention_mask is not None and attention_mask.dim() == 1:
        if dropout:
            hint = "set attention_dropout=0.0 in the model's configuration"
            refuse(NotImplementedError, "attention", "dropout", "0.0", dropout, hint)
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=attention_mask, **options), None
    options["dropout_p"] = dropout
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, options), None
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None and position_ids is not None and q.shape[1] == k.shape[1] > 1:
        starts = _restarts(position_ids, *q.shape[:2])
    if starts is None:
        return flash_attn_func(q, k, v, **options), None
    starts_k = kwargs.get("cu_seq_lens_k")
    out = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
        starts.int(), (starts if starts_k is None else starts_k).int(),
        kwargs.get("max_length_q") or q.shape[1], kwargs.get("max_length_k") or k.shape[1],
        **options,
    )  # fmt: skip
    return out.view(*q.shape[:2], *out.shape[1:]), None


# A compiled model breaks its graph around these two: what they return depends on what they read.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _restarts(position_ids: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor | None:
    """(sequences + 1,): where those of a packed batch start in it, None if no row holds two."""
    if position_ids.dim() != 2 or position_ids.shape[1] != seqlen:
        return None
    jumps = position_ids.diff(dim=1) != 1  # [B, S - 1]
    if not jumps.any():
        return None
    first = pad(jumps, (1, 0), value=True).expand(batch, seqlen).flatten()
    return pad(first.nonzero().squeeze(1), (0, 1), value=batch * seqlen)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Attention of the real tokens, packed; mask (batch, keys in use) says which keys are."""
    batch, seqlen_q = q.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] > k.shape[1]:
        refuse(
            ValueError, "attention", "attention_mask", f"shape ({batch}, up to {k.shape[1]})",
            tuple(mask.shape), "pass the padding, (batch, tokens), and leave the rest to the model",
        )  # fmt: skip
    mask = mask.bool()
    rows, columns = keys = mask.nonzero(as_tuple=True)
    ends = pad(mask.sum(1).cumsum(0), (1, 0)).int()
    if seqlen_q == 1 or not (options["causal"] or options["window_size"][0] >= 0):
        # Queries keep their places: a single one stands on the last key, and otherwise all see
        # all keys, which need not be the queries' own tokens.
        starts = torch.arange(0, batch * seqlen_q + 1, seqlen_q, dtype=torch.int32, device=q.device)
        queries = None
        packed = q.flatten(0, 1)
    else:
        real = mask[:, -seqlen_q:]
        queries = keys if seqlen_q == mask.shape[1] else real.nonzero(as_tuple=True)
        starts = pad(real.sum(1).cumsum(0), (1, 0)).int()
        packed = q[queries]
    # Upper bounds of the lengths will do, and need not be read from the GPU.
    out = flash_attn_varlen_func(
        packed, k[rows, columns], v[rows, columns], starts, ends, seqlen_q, mask.shape[1], **options
    )
    if queries is None:
        return out.view(batch, seqlen_q, *out.shape[1:])
    full = out.new_zeros(batch, seqlen_q, *out.shape[1:])
    full[queries] = out
    return full
