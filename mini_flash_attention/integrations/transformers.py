"""Hugging Face transformers on this package's attention, by a name like those of its own.

    from mini_flash_attention.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="mini")

`from_config` and `model.set_attn_implementation("mini")` take the name too. Logits of real tokens
are those of eager attention, with padding, windows, soft-capped scores, sinks, cross attention and
dynamic and static caches. Models whose masks are made of anything else, that add a bias to their
scores or compute attention themselves are refused. Attention weights are not returned. On a GPU the
model must be in fp16 or bf16, or run under torch.autocast.

Models train, with gradient checkpointing too; a static cache alone has no gradients. Dropout draws
from PyTorch's generator. After `torch.use_deterministic_algorithms(True)` gradients are the same
bits in every run.

A batch is packed if `cu_seq_lens_q` and `cu_seq_lens_k` say so, or, as transformers has it, if
positions do not grow by one in a call without a mask and without a cache. Beside a mask or a cache
positions may jump and repeat: a row remains one sequence.

A padded batch costs a copy of its real keys and values in every layer, and waits for the GPU there.
Padding between real tokens is slow beside a window: each query becomes a sequence, and in training
gets a copy of the keys it sees. A compiled model is one graph where it decodes with a static cache;
in prefill and in training it breaks where it looks for padding and packed sequences.

Continuous batching (`model.generate_batch`, transformers 5.23) takes names with "flash" in them, as
`set_attn_implementation` does for packages to load. So `register()` adds a second name,
`name + "_flash"`, which goes into the configuration past that look-up:

    model.config._attn_implementation = "mini_flash"
    answers = model.generate_batch(prompts)

With CUDA graphs, pass `use_async_batching=False` in its configuration: steps that overlap, the
default there, now and then give wrong tokens, with "paged|eager" as well (bench/NOTES.md 99).
transformers gathers keys and values from the pages; it gives pages to flash-attn 2 and 3 alone.
"""

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch.nn.functional import pad

from ..api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from ..validate import invalid, kind_of, wrong_type, wrong_value

# What some models pass beside the usual arguments and we would have to ignore.
FOREIGN = ("position_bias", "sinks", "block_indices")
# transformers' mask functions without a window.
UNWINDOWED = ("causal_mask_function", "bidirectional_mask_function")
ALONE = "a model that leaves masks to AttentionInterface"
INSTEAD = 'load the model with attn_implementation="eager" or "sdpa"'


@dataclass(eq=False)
class Mask:
    """Which keys a query sees: what `attention_mask_of` tells `attention`.

    The last query has the position of the last key in use. Models pass this on as they pass on
    FlexAttention's BlockMask. A model that computes with it, as with a tensor, is refused.

    Attributes:
        causal: a query sees no key of a later position.
        window: positions to the left that a query sees, and to the right if not causal; -1: all.
        keys: how many keys there are.
        real: (batch, keys in use), bool, False for padding; None without padding.
        scattered: there is a window, and padding between real keys.
        lengths: (batch,), int32: keys in use, in a static cache; None if all are.
        starts: (sequences + 1,), int32: cumulative lengths of packed sequences, or None.
    """

    causal: bool
    window: int = -1
    keys: int = 0
    real: torch.Tensor | None = None
    scattered: bool = False
    lengths: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    ndim = 4  # transformers leaves masks of four dimensions as they are

    def to(self, device: Any, **options: Any) -> "Mask":
        """The same on another device, for models with layers on several."""
        held = vars(self).items()
        return Mask(**{n: x.to(device, **options) if hasattr(x, "to") else x for n, x in held})

    def contiguous(self) -> "Mask":  # generate() asks for it
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise invalid(AttributeError, "attention", "mask", ALONE, f"mask.{name}", INSTEAD)

    def __getitem__(self, index: Any) -> NoReturn:
        self.__torch_function__(torch.Tensor.__getitem__)

    @classmethod
    def __torch_function__(cls, function: Any, *unused: Any) -> NoReturn:
        raise invalid(
            NotImplementedError, "attention", "mask", ALONE, f"{function.__name__}(mask)", INSTEAD
        )


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
    and biases that the package has not, and for dropout and gradients beside a static cache. The
    other errors are those of `flash_attn_func`, `flash_attn_varlen_func` and
    `flash_attn_with_kvcache`.
    """
    if not isinstance(name, str):
        raise wrong_type("register", "name", "a str", kind_of(name))
    if "flash" in name:
        hint = "transformers looks for a package of such a name"
        raise wrong_value("register", "name", "one without 'flash' in it", repr(name), hint)
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        hint = "pip install 'transformers>=5.17,<6'"
        raise invalid(ImportError, "register", "transformers", "version 5", error, hint) from error
    if name == "eager" or AttentionInterface().get(name, attention) is not attention:
        raise wrong_value("register", "name", "one that is free", repr(name), "as 'mini' is")
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
    attention_mask: Any = None,
    device: Any = None,
    config: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    **unused: Any,
) -> Mask | None:
    """What `attention` gets as its mask, made once for all layers of a kind; None: all see all.

    Args: those of transformers' own mask functions. Query i has the position q_offset + i and key
        j the position kv_offset + j; q_offset is a tensor where the cache is static.
        attention_mask is (batch, positions), True for real tokens. local_size is that of a window
        or a chunk. allow_is_bidirectional_skip comes with masks that are not causal, and only then.

    Raises:
        ValueError: attention_mask is not (batch, positions).
        NotImplementedError: the mask is more than causality, a window and padding.
    """
    if isinstance(attention_mask, Mask):  # generate() makes masks ahead of the model
        return attention_mask
    causal = allow_is_bidirectional_skip is None
    used: Any = q_offset + q_length - kv_offset  # keys up to the last query's position
    counted = not isinstance(used, torch.Tensor)
    name = getattr(mask_function, "__name__", "")
    local = None if name in UNWINDOWED else local_size
    window = local - causal if local is not None and kv_length > local else -1
    chunk = getattr(config, "attention_chunk_size", None)
    chunked = chunk is not None and chunk == local and kv_length + kv_offset > chunk
    aligned = counted and (used == kv_length or (used < kv_length and window < 0))
    askew = local is not None and not causal and not aligned
    # Only a name tells of blocks, which images make.
    if use_vmap or name == "or_mask" or chunked or askew:
        wanted, got = "causality, a window and padding", "a mask of its own"
        raise invalid(NotImplementedError, "attention", "mask", wanted, got, INSTEAD)
    used = used if causal else kv_length
    mask = Mask(causal, window, kv_length)
    if attention_mask is not None:
        if attention_mask.dim() != 2 or (counted and used > kv_length):
            wanted = f"shape ({batch_size}, {used})"
            raise wrong_value("attention", "attention_mask", wanted, tuple(attention_mask.shape))
        keys = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        mask = _padding(mask, keys, used, q_length)
    elif causal and not allow_is_causal_skip and q_length == kv_length > 1:  # it may be packed
        mask.starts = _starts(mask_function, batch_size, q_length, device)
    elif isinstance(used, torch.Tensor):  # not read: decoding shall not wait for the GPU
        mask.lengths = used.to(torch.int32).repeat(batch_size)
    elif used < kv_length:
        mask.lengths = torch.full((batch_size,), used, dtype=torch.int32, device=device)
    return None if allow_is_bidirectional_skip and mask.real is None and window < 0 else mask


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention, as transformers calls it.

    Args:
        query: (batch, nheads, seqlen_q, head_dim).
        key, value: (batch, nheads_k, seqlen_k, head_dim), with the cache's.
        attention_mask: what `attention_mask_of` returned.
        scaling, softcap, s_aux: `softmax_scale`, `softcap` and `s_aux` of `flash_attn_func`.
        is_causal, sliding_window: count without a mask, the layer's `is_causal` being the first
            one's default. Causal queries then see sliding_window tokens, others see all.
        cache: the pages of continuous batching, which key and value have yet to go to.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, (sequences + 1,), and `max_length_q`,
            `max_length_k` of a packed batch.

    Returns:
        ((batch, seqlen_q, nheads, head_dim), None). The rows of padding mean nothing.
    """
    for name in FOREIGN:
        if kwargs.get(name) is not None:
            raise invalid(
                NotImplementedError, "attention", name, "None", kind_of(kwargs[name]), INSTEAD
            )
    mask = attention_mask
    if cache is not None:  # also turns the lengths in kwargs into those of this layer
        key, value = cache.update(key, value, module.layer_idx, kwargs)
        mask = None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        mask = Mask(causal, sliding_window - 1 if causal and sliding_window is not None else -1)
    elif not isinstance(mask, Mask) or mask.keys != k.shape[1]:
        got = f"{mask.keys} keys" if isinstance(mask, Mask) else tuple(mask.shape)
        hint = "pass the padding, (batch, tokens); a model that makes masks or keys needs eager"
        raise wrong_value("attention", "attention_mask", f"shape {len(q), k.shape[1]}", got, hint)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": mask.causal,
        "window_size": (mask.window, 0 if mask.causal else mask.window),
        "softcap": softcap or 0.0,
        "s_aux": s_aux,
    }
    if mask.lengths is not None:
        if dropout:
            hint = "leave the static cache to generation, or set attention_dropout=0.0"
            raise invalid(NotImplementedError, "attention", "dropout", "0.0", dropout, hint)
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=mask.lengths, **options), None
    options["dropout_p"] = dropout
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if mask.real is not None:
        return _padded(q, k, v, mask, options), None
    starts, starts_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    starts = mask.starts if starts is None else starts
    if starts is None:
        return flash_attn_func(q, k, v, **options), None
    most_q, most_k = kwargs.get("max_length_q"), kwargs.get("max_length_k")
    out = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
        starts.int(), (starts if starts_k is None else starts_k).int(),
        q.shape[1] if most_q is None else most_q, k.shape[1] if most_k is None else most_k,
        **options,
    )  # fmt: skip
    return out.view(*q.shape[:2], *out.shape[1:]), None


# A compiled model breaks its graph around these: what they return depends on what they read.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _padding(mask: Mask, keys: torch.Tensor, used: Any, q_length: int) -> Mask:
    """mask with what keys, (batch, up to mask.keys), says: which of those in use are real."""
    in_use = torch.arange(mask.keys, device=keys.device) < used
    real = pad(keys, (0, len(in_use) - keys.shape[1])) & in_use
    facts = [(real == in_use).all(), in_use.sum()]
    if mask.window >= 0 and q_length > 1:
        begins = real & ~pad(real[:, :-1], (1, 0))
        facts.append((begins.sum(1) > 1).any())
    whole, used, *scattered = torch.stack([x.int() for x in facts]).tolist()  # waits for the GPU
    if not whole:
        return replace(mask, real=real[:, :used], scattered=scattered == [1])
    return mask if used == mask.keys else replace(mask, lengths=facts[1].int().repeat(len(keys)))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _starts(mask_function: Any, batch: int, seqlen: int, device: Any) -> torch.Tensor:
    """(sequences + 1,): a sequence starts at each token that does not see the token before it."""
    row = torch.arange(batch, device=device)[:, None]
    token = torch.arange(1, seqlen, device=device)[None]
    first = pad(~mask_function(row, 0, token, token - 1).expand(batch, -1), (1, 0), value=True)
    return pad(first.flatten().nonzero().squeeze(1), (0, 1), value=batch * seqlen).int()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, options: dict[str, Any]
) -> torch.Tensor:
    """Attention to the real keys alone."""
    real: torch.Tensor = mask.real  # type: ignore[assignment]
    batch, seqlen_q = q.shape[:2]
    if seqlen_q == 1 and mask.window >= 0:  # the keys in a window are the last ones
        first = max(real.shape[1] - mask.window - 1, 0)
        real, k, v = real[:, first:], k[:, first:], v[:, first:]
        options["window_size"] = (-1, -1)
    rows, columns = places = real.nonzero(as_tuple=True)
    k, v = k[rows, columns], v[rows, columns]
    if mask.scattered:
        return _scattered(q, k, v, real, options)
    ends = pad(real.sum(1).cumsum(0), (1, 0)).int()
    lengths = seqlen_q, real.shape[1]  # upper bounds will do, and need not be read from the GPU
    if seqlen_q == 1 or not (mask.causal or mask.window >= 0):
        # Queries keep their places: a single one stands on the last key, and otherwise all see
        # all keys, which need not be the queries' own tokens.
        starts = torch.arange(0, batch * seqlen_q + 1, seqlen_q, dtype=torch.int32, device=q.device)
        out = flash_attn_varlen_func(q.flatten(0, 1), k, v, starts, ends, *lengths, **options)
        return out.view(batch, seqlen_q, *out.shape[1:])
    own = real[:, -seqlen_q:]
    queries = places if seqlen_q == real.shape[1] else own.nonzero(as_tuple=True)
    starts = pad(own.sum(1).cumsum(0), (1, 0)).int()
    out = flash_attn_varlen_func(q[queries], k, v, starts, ends, *lengths, **options)
    full = out.new_zeros(batch, seqlen_q, *out.shape[1:])
    full[queries] = out
    return full


def _scattered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Attention with a window that counts positions, those of padding between real keys too.

    The keys that a query sees are neighbours in k and v, (real keys, nheads_k, head_dim). How many
    they are differs from query to query, so each query becomes a sequence, on pages of one key.
    """
    batch, seqlen_q, keys = *q.shape[:2], real.shape[1]
    left, right = options["window_size"]
    ends = real.sum(1, keepdim=True).cumsum(0)
    before = pad(ends[:-1], (0, 0, 1, 0)) + pad(real.cumsum(1), (1, 0))  # [B, keys + 1]
    place = torch.arange(keys - seqlen_q, keys, device=q.device)
    first = before[:, (place - left).clamp(min=0)].flatten()
    seen = before[:, (place + right + 1).clamp(max=keys)].flatten() - first
    most = min(left + 1 + right, keys)
    table = first[:, None] + torch.arange(most, device=q.device)
    starts = torch.arange(batch * seqlen_q + 1, dtype=torch.int32, device=q.device)
    options |= {"causal": False, "window_size": (-1, -1), "seqused_k": seen.int()}
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        # Pages have no gradients: each query gets a copy of its keys instead.
        k, v = (x[table.flatten().clamp(max=len(x) - 1)] for x in (k, v))
        starts_k = starts * most
    else:
        k, v, starts_k, options["block_table"] = k[:, None], v[:, None], None, table.int()
    out = flash_attn_varlen_func(q.flatten(0, 1), k, v, starts, starts_k, 1, most, **options)
    return out.view(batch, seqlen_q, *out.shape[1:])
