"""For code that says `import flash_attn` and shall not be changed.

    from mini_flash_attention.integrations import flash_attn
    flash_attn.install()

From then on `flash_attn`, `flash_attn.flash_attn_interface` and `flash_attn.bert_padding` are this
package's in this process; nothing is written to disk. A flash-attn that is installed but not yet
imported stays hidden until `uninstall()`; one that is imported is left alone, and `install()`
refuses. What is not listed here (layers, losses, FlashAttention-3's and -4's modules) is missing
and raises ModuleNotFoundError.

Libraries that look flash-attn up among the installed distributions, as transformers does, do not
find one: `integrations.transformers` is the way there.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .. import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from ..refusals import refuse

NAME = "flash_attn"
# The release whose signatures are ours. Users compare it to learn what arguments there are: since
# 2.3 windows, since 2.6 softcap, since 2.7 five results of unpad_input. Some split it at its dots
# into numbers, so it has no suffix.
VERSION = "2.8.3"

_installed: dict[str, ModuleType] = {}


def install() -> ModuleType:
    """Let `import flash_attn` mean this package; done before, it changes nothing.

    Returns:
        The module that `import flash_attn` gives.

    Raises:
        RuntimeError: flash-attn itself is imported, and whoever did so holds its functions.
    """
    for name, module in sys.modules.items():
        foreign = name.partition(".")[0] == NAME and _installed.get(name) is not module
        if foreign and module is not None:
            version = getattr(module, "__version__", "unknown")
            got = f"{name}, version {version}, from {getattr(module, '__file__', 'nowhere')}"
            hint = "call install() before anything imports flash_attn"
            refuse(RuntimeError, "install", NAME, "that nothing has imported it yet", got, hint)
    if not _installed:
        _installed.update(_modules())
    sys.modules.update(_installed)
    return _installed[NAME]


def uninstall() -> None:
    """Undo `install()`. Code that has imported our functions meanwhile keeps them."""
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _installed.clear()


def _modules() -> dict[str, ModuleType]:
    """What goes into sys.modules."""
    functions = (
        flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func,
        flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
    )  # fmt: skip
    padding = (index_first_axis, index_put_first_axis, pad_input, unpad_input)
    children = {
        "flash_attn_interface": _module(f"{NAME}.flash_attn_interface", functions),
        "bert_padding": _module(f"{NAME}.bert_padding", padding),
    }
    package = _module(NAME, functions, is_package=True)
    vars(package).update(children, __version__=VERSION, __path__=[])
    return {NAME: package} | {f"{NAME}.{name}": module for name, module in children.items()}


def _module(
    name: str, members: tuple[Callable[..., Any], ...], is_package: bool = False
) -> ModuleType:
    module = ModuleType(name, f"Stands in for flash-attn's {name}; made by {__name__}.")
    module.__spec__ = ModuleSpec(name, None, origin=__name__, is_package=is_package)
    vars(module).update({f.__name__: f for f in members})
    return module


# -- flash_attn.bert_padding ----------------------------------------------------------------------


def unpad_input(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    unused_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Pack the tokens of padded sequences one behind the other. It waits for the GPU.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype.
        attention_mask: (batch, seqlen), bool or int, nonzero where a token is.
        unused_mask: the same for places that are kept without a token in them.

    Returns:
        The kept rows (total, ...), their places among all batch * seqlen (total,) int64,
        cu_seqlens (batch + 1,) int32, the largest number of kept rows of a sequence, and the
        number of tokens of each sequence (batch,) int32.

    Raises:
        ValueError: a mask is not (batch, seqlen).
    """
    tokens = attention_mask.bool()
    kept = tokens if unused_mask is None else tokens | unused_mask.bool()
    for name, mask in (("attention_mask", tokens), ("unused_mask", kept)):
        if mask.shape != hidden_states.shape[:2]:
            shape = tuple(hidden_states.shape[:2])
            refuse(ValueError, "unpad_input", name, f"shape {shape}", tuple(mask.shape))
    lengths = kept.sum(1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, longest, tokens.sum(1, dtype=torch.int32)


def pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int
) -> torch.Tensor:
    """What `unpad_input` packed, (total, ...), as (batch, seqlen, ...) with 0 everywhere else."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.unflatten(0, (batch, seqlen))


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices`, (n,), of input, (rows, ...): (n, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(
    values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int
) -> torch.Tensor:
    """(first_axis_dim, ...) with `values`, (n, ...), in the rows `indices`, (n,), and 0 elsewhere.

    No row may be named twice.
    """
    rows = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return rows.index_copy(0, indices.long(), values)
