"""The supervised loss: cross-entropies over valid pixels, and whether a given loss learns from ignored ones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_exudate_loss import _checks
from contrastive_exudate_loss.masks import lesion_and_valid


def binary_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int | None, *, known: bool) -> Tensor:
    """Mean over the valid pixels of the binary cross-entropy with logits, 0 if there are none.

    Args:
        logits: (B, K, H, W), floating.
        target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating.
        ignore_index: value of pixels that count for nothing.
        known: whether the target's values have been checked; if not, every value but 0 is lesion.

    Returns:
        (), float32 or float64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not _ignores(target, ignore_index):
        lesion = target.to(logits.dtype)
        # Made without a bool, which compiled code on the CPU would keep for the backward pass, slowly.
        return F.binary_cross_entropy_with_logits(logits, lesion if known else lesion.sign().abs())
    lesion, valid = lesion_and_valid(target, ignore_index)
    # An ignored logit may be infinite: filled before it enters the formula, it cannot make the gradient NaN.
    logits = logits.masked_fill(~valid, 0)
    total = F.binary_cross_entropy_with_logits(logits, lesion.to(logits.dtype), valid, reduction="sum")
    return total / valid.sum().clamp(min=1)


def cross_entropy(logits: Tensor, index: Tensor, ignore_index: int | None) -> Tensor:
    """Mean over the valid pixels of the cross-entropy over classes, 0 if there are none.

    Args:
        logits: (B, C, H, W), floating.
        index: (B, H, W), int64: the class of each pixel, or ignore_index.
        ignore_index: value of pixels that count for nothing; None for none.

    Returns:
        (), float32 or float64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if ignore_index is None:
        return -logits.log_softmax(1).gather(1, index.unsqueeze(1)).mean()
    valid = index != ignore_index
    # An ignored logit may be infinite: filled before it enters the formula, it cannot make the gradient NaN.
    logits = logits.masked_fill(~valid.unsqueeze(1), 0)
    total = F.cross_entropy(logits, index, ignore_index=ignore_index, reduction="sum")
    return total / valid.sum().clamp(min=1)


def watched(logits: Tensor, target: Tensor, ignore_index: int | None, report: Callable[[bool], None]) -> Tensor:
    """The logits; their backward pass reports whether a loss on them has a gradient at ignored pixels.

    Args:
        logits: (B, K, H, W), floating.
        target: (B, K, H, W); its values are read in the backward pass.
        ignore_index: value of the pixels to watch.
        report: called with the answer; on the CPU only if there are ignored pixels.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad and _ignores(target, ignore_index)):
        return logits
    view = logits.view_as(logits)

    def look(gradient: Tensor) -> None:
        ignored = ~lesion_and_valid(target, ignore_index)[1]
        if not target.is_cpu or bool(ignored.any()):
            report(bool(gradient.as_subclass(Tensor)[ignored].any()))

    view.register_hook(look)
    return view


def _ignores(target: Tensor, ignore_index: int | None) -> bool:
    return ignore_index is not None and _checks.holds(target.dtype, ignore_index)
