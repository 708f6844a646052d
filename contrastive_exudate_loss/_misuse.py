"""What raises no error, but looks wrong in the first batches: a sentence for each suspicion."""

from collections.abc import Iterator

import torch
from torch import Tensor

from contrastive_exudate_loss import _checks

LOOKS = 10  # batches to look at on the CPU; on other devices, where looking waits for the device, one
# A single batch may show these by chance: warn only if all batches that are looked at do.
CONFIRMED = ("probabilities", "ignored")


def suspicions(
    logits: Tensor, target: Tensor, ignore_index: int | None, index: Tensor | None = None
) -> Iterator[tuple[str, str]]:
    """A name and a sentence for what may be wrong in a batch; reads the values, so it waits for the device.

    Args:
        logits: (B, C, H, W), floating.
        target: (B, K, H, W) of 0, 1 and ignore_index.
        ignore_index: value of pixels to leave out.
        index: the index mask that target was made from, integer; None if target was given as masks.
    """
    remedy = (
        "give the network's output before its sigmoid or softmax, and tell a loss that expects probabilities that it "
        "gets logits, as with from_logits=True or sigmoid=True"
    )
    made_by = logits.grad_fn.name() if logits.grad_fn is not None else ""
    lowest, highest = logits.detach().aminmax()
    if made_by.startswith(("Sigmoid", "Softmax")):
        yield "sigmoid", f"logits come from a {made_by.removesuffix('Backward0').lower()}; {remedy}"
    elif bool((lowest >= 0) & (highest <= 1) & (lowest < highest)):
        yield "probabilities", f"logits were between 0 and 1 in all batches so far, like probabilities; {remedy}"
    if target.shape[1] > 1 and bool((target.sum(1, dtype=torch.int64) == 1).all()):
        yield (
            "one-hot",
            "target has exactly one class at each pixel, so one of its channels seems to be the background; leave that "
            "channel out of target and logits, or its number out of classes, or give an index mask and "
            "classes=range(1, number of classes)",
        )
    stray = None if index is None else _stray_value(index, target, logits.shape[1])
    if stray is not None:
        yield (
            "stray",
            f"target holds {stray}, which the terms take for background; if supervised ignores such pixels, give the "
            f"criterion ignore_index={stray} too",
        )
    ignored = _checks.held(target, ignore_index)
    if ignored is None:
        return
    if bool(target.eq(ignored).any() & target.ne(1).all()):
        yield (
            "ignored",
            f"target held 0 and {ignore_index} in all batches so far, but no 1, and {ignore_index} is ignored; if it "
            "marks lesions, give (target != 0).to(target.dtype) and leave ignore_index out",
        )


def _stray_value(index: Tensor, masks: Tensor, channels: int) -> int | None:
    """A value of the index mask that seems to be no class, or None.

    With one channel, which may stand for several classes, only 255 and negative values are suspected.
    """
    known = masks.bool().any(1)  # lesion or ignored
    index = index.reshape(known.shape)
    stray = ~known & ((index < 0) | (index >= channels if channels > 1 else index == 255))
    return int(index[stray][0]) if bool(stray.any()) else None
