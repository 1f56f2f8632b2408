"""Stands in for `flash_attn.bert_padding`: padded sequences packed one after another, and back.

Plain PyTorch, differentiable, on any device. Functions that return indices wait for the GPU.
Programs also import einops' `rearrange` and `repeat` from that module: they are there if einops is.
"""

import torch

from ...validate import wrong_value


def unpad_input(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    unused_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Pack the tokens of padded sequences one after another.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype.
        attention_mask: (batch, seqlen), bool or int, nonzero where there is a token.
        unused_mask: (batch, seqlen), nonzero for places to keep that hold no token.

    Returns:
        The kept rows (total, ...), their indices among all batch * seqlen places (total,) int64,
        cu_seqlens (batch + 1,) int32, the largest number of kept rows of a sequence, and the number
        of tokens of each sequence (batch,) int32.

    Raises:
        ValueError: a mask is not (batch, seqlen).
    """
    tokens = attention_mask.bool()
    kept = tokens if unused_mask is None else tokens | unused_mask.bool()
    for name, mask in (("attention_mask", tokens), ("unused_mask", kept)):
        _fits("unpad_input", name, mask, hidden_states)
    lengths = kept.sum(1, dtype=torch.int32)
    rows, indices = _pack(hidden_states, kept)
    return rows, indices, _offsets(lengths), _longest(lengths), tokens.sum(1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Pack rows that hold several sequences each, and tell those sequences apart.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype.
        attention_mask_in_length: (batch, seqlen), int: the lengths of the sequences of a row in
            order, 0 in all other places. [2, 3, 0, 0, 0, 0] is a row of six places whose first five
            hold a sequence of two tokens and one of three.

    Returns:
        The tokens (total, ...), their indices among all batch * seqlen places (total,) int64,
        cu_seqlens (sequences + 1,) int32 and the length of the longest sequence.

    Raises:
        ValueError: the lengths are not (batch, seqlen).
    """
    name = "attention_mask_in_length"
    lengths = attention_mask_in_length
    _fits("unpad_input_for_concatenated_sequences", name, lengths, hidden_states)
    places = torch.arange(lengths.shape[1], device=lengths.device)
    rows, indices = _pack(hidden_states, places < lengths.sum(1, keepdim=True))
    lengths = lengths[lengths != 0]
    return rows, indices, _offsets(lengths), _longest(lengths)


def pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int
) -> torch.Tensor:
    """What `unpad_input` packed, (total, ...), as (batch, seqlen, ...) with 0 everywhere else."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.unflatten(0, (batch, seqlen))


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices`, (n,), of input, (rows, ...): (n, ...)."""
    return input.index_select(0, indices)


def index_first_axis_residual(
    input: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `indices` of input, and input itself for a residual connection; both with gradients."""
    return index_first_axis(input, indices), input


def index_put_first_axis(
    values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int
) -> torch.Tensor:
    """(first_axis_dim, ...) with `values`, (n, ...), in the rows `indices`, (n,), and 0 elsewhere.

    No index may occur twice.
    """
    rows = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return rows.index_copy(0, indices.long(), values)


def _fits(function: str, name: str, mask: torch.Tensor, hidden_states: torch.Tensor) -> None:
    shape = tuple(hidden_states.shape[:2])
    if mask.shape != shape:
        raise wrong_value(function, name, f"shape {shape}", tuple(mask.shape))


def _pack(hidden_states: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of hidden_states where `kept` is True, and their indices."""
    indices = kept.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: torch.Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0
