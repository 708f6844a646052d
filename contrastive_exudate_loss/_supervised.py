"""The supervised loss: cross-entropies over valid pixels, a user's own, and whether that learns from ignored pixels."""

from collections.abc import Callable
from typing import Any

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
    if _checks.held(target, ignore_index) is None:
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


def given_loss(
    supervised: Callable[..., Any], logits: Any, target: Any, ignore_index: int | None, *, of_classes: bool
) -> Tensor:
    """What a user's loss gives, (), float32 or float64; to an error of its own a sentence is added.

    Args:
        supervised: called as supervised(logits, target).
        logits: (B, K, H, W), or a list of levels, the finest first.
        target: (B, K, H, W) or an index mask, or a list of them.
        ignore_index: the criterion's, of which the loss may not know.
        of_classes: whether the target is an index mask.

    Raises:
        TypeError, ValueError: what it gives is no scalar tensor.
    """
    try:
        loss = supervised(logits, target)
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            got = f"(supervised was given logits {_shown(logits)} and target {_shown(target)}; "
            hint = _hint(isinstance(logits, (list, tuple)), of_classes, ignore_index)
            error.args = (f"{error.args[0]}\n{got}{hint})", *error.args[1:])
        raise
    if not isinstance(loss, Tensor):
        raise TypeError(f"supervised must return a scalar tensor, got {type(loss).__name__}")
    if loss.dim():
        raise ValueError(f"supervised must return a scalar, got {tuple(loss.shape)}; give it reduction='mean'")
    plain = loss.as_subclass(Tensor)
    return plain.to(torch.promote_types(plain.dtype, torch.float32))


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}, first {_shown(value[0])}"
    return f"{tuple(value.shape)}, {value.dtype}"


def _hint(of_levels: bool, of_classes: bool, ignore_index: int | None) -> str:
    """What a loss that raises an error often wants."""
    if of_levels:
        return (
            "lists suit a loss that weighs levels: nnU-Net's DeepSupervisionWrapper takes a list of targets too, "
            "MONAI's DeepSupervisionLoss one target, which it resizes: floating masks, or an index mask as uint8"
        )
    hint = "losses on logits often want a floating target: give the criterion target.float()"
    if of_classes:
        hint = (
            "torch.nn.CrossEntropyLoss and segmentation-models-pytorch want the index mask as (B, H, W), torch.int64, "
            "MONAI's losses with to_onehot_y as (B, 1, H, W)"
        )
    if ignore_index is not None:
        hint += f"; ignored pixels hold {ignore_index}, which the loss must be told too, often by ignore_index="
    return hint


def watched(logits: Tensor, target: Tensor, ignore_index: int | None, report: Callable[[bool, bool], None]) -> Tensor:
    """The logits, whose backward pass reports whether a loss on them has a gradient at ignored pixels.

    Args:
        logits: (B, K, H, W), floating.
        target: (B, K, H, W); its values are read in the backward pass.
        ignore_index: value of the pixels to watch.
        report: called with the answer, and whether there is a gradient anywhere or no lesion to learn; on the CPU only
            where there are ignored pixels.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad and _checks.held(target, ignore_index) is not None):
        return logits
    view = logits.view_as(logits)

    def look(gradient: Tensor) -> None:
        lesion, valid = lesion_and_valid(target, ignore_index)
        if not target.is_cpu or not bool(valid.all()):
            gradient = gradient.as_subclass(Tensor)
            report(bool(gradient[~valid].any()), bool(gradient.any()) or not bool(lesion.any()))

    view.register_hook(look)
    return view
