"""Stands in for `flash_attn.losses.cross_entropy` and `flash_attn.ops.triton.cross_entropy`.

The loss is PyTorch's `cross_entropy`, in fp32 or wider, on any device. It keeps the logits in that
precision for the backward pass, where flash-attn's kernel keeps them as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ...validate import not_implemented, wrong_value


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    precomputed_lse: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of each row.

    Args:
        logits: (batch, vocab_size).
        labels: (batch,), int64 or int32, from 0 to vocab_size - 1, or ignore_index.
        precomputed_lse: accepted; the log-sum-exp is computed again.
        label_smoothing: how much of the target goes to all classes alike.
        logit_scale: factor on the logits.
        lse_square_scale: adds `lse_square_scale * lse ** 2` to the loss (z-loss), lse the
            log-sum-exp of the scaled logits.
        ignore_index: rows with this label have loss 0 and no gradient.
        inplace_backward: accepted; logits are never overwritten.
        process_group: None; a vocabulary that is spread over processes is not implemented.

    Returns:
        losses (batch,), z-loss included, and z_losses (batch,), without a gradient. Both in fp32,
        in fp64 for such logits.

    Raises:
        ValueError: shapes don't fit.
        NotImplementedError: a process_group.
    """
    function = "cross_entropy_loss"
    if process_group is not None:
        raise not_implemented(function, "process_group", "None")
    if logits.dim() != 2:
        raise wrong_value(function, "logits", "shape (batch, vocab_size)", tuple(logits.shape))
    if labels.shape != logits.shape[:1]:
        wanted = f"shape {tuple(logits.shape[:1])}"
        raise wrong_value(function, "labels", wanted, tuple(labels.shape))
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    losses = F.cross_entropy(
        scaled, labels.long(), ignore_index=ignore_index, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    if not lse_square_scale:
        return losses, torch.zeros_like(losses)
    ignored = labels == ignore_index
    z_losses = (lse_square_scale * scaled.logsumexp(1).square()).masked_fill(ignored, 0.0)
    return losses + z_losses, z_losses.detach()


class CrossEntropyLoss(torch.nn.Module):
    """`cross_entropy_loss` as a module.

    Args:
        reduction: "mean" over the rows that are not ignored, "sum" or "none".
        return_z_loss: return (loss, z_loss), z_loss reduced alike and without a gradient.
        ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward,
            process_group: as for `cross_entropy_loss`.

    Raises:
        ValueError: another reduction.
        NotImplementedError: a process_group.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            wanted = "'mean', 'sum' or 'none'"
            raise wrong_value("CrossEntropyLoss", "reduction", wanted, repr(reduction))
        if process_group is not None:
            raise not_implemented("CrossEntropyLoss", "process_group", "None")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        precomputed_lse: torch.Tensor | None = None,
    ) -> Any:
        """The loss of input (batch, vocab_size) and target (batch,): a scalar, or (batch,)."""
        losses = cross_entropy_loss(
            input, target, precomputed_lse, self.label_smoothing, self.logit_scale,
            self.lse_square_scale, self.ignore_index, self.inplace_backward, self.process_group,
        )  # fmt: skip
        if self.reduction != "none":
            losses = losses[0].sum(), losses[1].sum()
        if self.reduction == "mean":
            rows = (target != self.ignore_index).sum()
            losses = losses[0] / rows, losses[1] / rows
        return losses if self.return_z_loss else losses[0]
