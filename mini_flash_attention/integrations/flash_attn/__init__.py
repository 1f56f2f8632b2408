"""Stands in for flash-attn: code that says `import flash_attn` runs on this package, unchanged.

    from mini_flash_attention.integrations.flash_attn import install

    install()  # before anything imports flash_attn

From then on `import flash_attn` gives this package's functions in this process, with the signatures
of flash-attn 2.8.3, and `import flash_attn_interface` those of FlashAttention-3. `CONTENTS` lists
the modules and their names. Nothing is written to disk. A flash-attn that is installed but not
imported stays hidden until `uninstall()`; one that is already imported is left alone, and
`install()` refuses.

Everything else is missing, and code with an optional import falls back as it does without
flash-attn: a missing module raises ModuleNotFoundError, and `importlib.util.find_spec` returns None
for it; a missing name raises ImportError, and `hasattr` is False. The messages say that
mini_flash_attention stands in.

transformers asks which distributions provide `flash_attn` and `flash_attn_interface`, and is told
flash-attn and flash-attn-3. So on a machine with a CUDA device
`attn_implementation="flash_attention_2"` and `"flash_attention_3"` work after `install()`. Without
one transformers refuses them; there use
`from mini_flash_attention.integrations.transformers import register`.

diffusers asks for a version by name: `importlib.metadata.version("flash-attn")` is
"2.8.3+mini". Of flash-attn-3 there is none by name, since who asks imports another module then.
Transformer Engine takes no version above 2.8.3, so it does without flash-attn, whose C++ functions
it would import.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ... import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ...validate import invalid
from . import bert_padding, interface2, interface3, losses, private, rotary, rotary_embedding
from .stand_in import Contents, Finder

# The release whose signatures these are. Programs compare it to learn what arguments there are:
# windows since 2.3, softcap since 2.6, five results of unpad_input since 2.7. Some split it at its
# dots into numbers, so it has no suffix.
VERSION = "2.8.3"
# The distributions that importlib.metadata lists. The version's local part says that they are not
# the original ones.
DISTRIBUTIONS = {
    "flash_attn": ("flash-attn", f"{VERSION}+mini"),
    "flash_attn_interface": ("flash-attn-3", "3.0.0+mini"),
}

FUNCTIONS = (
    flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func,
    interface2.flash_attn_with_kvcache,
)  # fmt: skip
# And these once more, with `_wrapped` before their names: there as operators of torch.library.
PRIVATE = (
    private._flash_attn_forward, private._flash_attn_backward,
    private._flash_attn_varlen_forward, private._flash_attn_varlen_backward,
)  # fmt: skip


def _contents(source: str | None, *functions: Callable[..., Any], **others: Any) -> Contents:
    """Functions and classes by their own names, and others by the names given here."""
    return Contents(source or __file__, {f.__name__: f for f in functions} | others)


CONTENTS = {
    "flash_attn": _contents(None, *FUNCTIONS, __version__=VERSION),
    "flash_attn.bert_padding": _contents(
        bert_padding.__file__, bert_padding.index_first_axis,
        bert_padding.index_first_axis_residual, bert_padding.index_put_first_axis,
        bert_padding.pad_input, bert_padding.unpad_input,
        bert_padding.unpad_input_for_concatenated_sequences,
    )._replace(borrowed={"rearrange": "einops", "repeat": "einops"}),
    "flash_attn.flash_attn_interface": _contents(
        interface2.__file__, *FUNCTIONS, interface2.flash_attn_unpadded_func,
        interface2.flash_attn_unpadded_kvpacked_func,
        interface2.flash_attn_unpadded_qkvpacked_func, interface2.maybe_contiguous,
        interface2.round_multiple, *PRIVATE, **{f"_wrapped{f.__name__}": f for f in PRIVATE},
    ),
    "flash_attn.layers": _contents(None),
    "flash_attn.layers.rotary": _contents(
        rotary.__file__, rotary.apply_rotary, rotary.apply_rotary_emb,
        rotary.apply_rotary_emb_kv_, rotary.apply_rotary_emb_qkv_, rotary.apply_rotary_emb_torch,
        rotary_embedding.RotaryEmbedding, apply_rotary_emb_func=rotary.apply_rotary_emb,
    ),
    "flash_attn.losses": _contents(None),
    "flash_attn.losses.cross_entropy": _contents(
        losses.__file__, losses.CrossEntropyLoss, losses.cross_entropy_loss
    ),
    "flash_attn.ops": _contents(None),
    "flash_attn.ops.triton": _contents(None),
    "flash_attn.ops.triton.cross_entropy": _contents(losses.__file__, losses.cross_entropy_loss),
    "flash_attn.ops.triton.rotary": _contents(rotary.__file__, rotary.apply_rotary),
    "flash_attn_interface": _contents(
        interface3.__file__, interface3.flash_attn_combine, interface3.flash_attn_func,
        interface3.flash_attn_qkvpacked_func, interface3.flash_attn_varlen_func,
        interface3.flash_attn_with_kvcache, interface3.get_scheduler_metadata,
        interface2.maybe_contiguous, interface2.round_multiple,
    ),
}  # fmt: skip

_finder: Finder | None = None


def install() -> ModuleType:
    """Let `import flash_attn` and `import flash_attn_interface` mean this package.

    Call it before anything imports them. If it is installed already, nothing changes.

    Returns:
        The module that `import flash_attn` gives.

    Raises:
        RuntimeError: flash-attn itself is imported, and other code may hold its functions.
    """
    global _finder
    finder = _finder or Finder(CONTENTS, DISTRIBUTIONS)
    for name, module in sys.modules.items():
        if module is not None and finder.owns(name) and finder.modules.get(name) is not module:
            version = getattr(module, "__version__", "unknown")
            got = f"{name}, version {version}, from {getattr(module, '__file__', 'nowhere')}"
            hint = "call install() before anything imports it"
            wanted = "that nothing has imported it yet"
            raise invalid(RuntimeError, "install", name.partition(".")[0], wanted, got, hint)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)
    _finder = finder
    for name in CONTENTS:
        if sys.modules.get(name) is None:  # missing, or blocked by a None
            sys.modules.pop(name, None)
            importlib.import_module(name)
    _ask_again()
    return sys.modules["flash_attn"]


def uninstall() -> None:
    """Undo `install()`. Code that has imported our functions meanwhile keeps them."""
    global _finder
    if _finder is None:
        return
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name, module in _finder.modules.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _finder = None
    _ask_again()


def _ask_again() -> None:
    """Make transformers, where it is imported, look for flash-attn again: it keeps the answers."""
    module = sys.modules.get("transformers.utils.import_utils")
    mapping = getattr(module, "PACKAGE_DISTRIBUTION_MAPPING", None)  # of older releases
    if mapping is not None:  # others have imported it, so it stays the same object
        mapping.clear()
        mapping.update(importlib.metadata.packages_distributions())
    for name in (
        "_package_distribution_mapping",
        "is_flash_attn_2_available",
        "is_flash_attn_3_available",
        "is_flash_attn_greater_or_equal",
    ):
        clear = getattr(getattr(module, name, None), "cache_clear", None)
        if clear is not None:
            clear()
