"""Index masks to lesion masks: one channel of 0 and 1 for each class that is a lesion."""

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_exudate_loss import _checks


def lesion_masks(index: Tensor, classes: Sequence[int], *, ignore_index: int | None = None) -> Tensor:
    """A mask for each class, as a target of the losses: 1 where the index mask holds the class, 0 elsewhere.

        index        classes=(1, 3)
        0 1 1        0 1 1   0 0 0
        2 3 0   ->   0 0 0   0 1 0

    Args:
        index: (B, H, W) or (B, 1, H, W), integer: the class of each pixel.
        classes: K distinct integers >= 0, the classes that are lesions; all others are background.
        ignore_index: value of pixels to leave out, which keep it in every mask; not 0, not 1, not one of the classes.

    Returns:
        (B, K, H, W), of the smallest integer dtype that holds 0, 1 and ignore_index.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> index = torch.tensor([[[0, 1, 1], [2, 3, 0]]])
        >>> lesion_masks(index, classes=(1, 3))[0, 0]
        tensor([[0, 1, 1],
                [0, 0, 0]], dtype=torch.uint8)
    """
    _checks.check_ignore_index(ignore_index)
    classes = _checks.plain_option(classes)
    _checks.check_classes(classes, ignore_index)
    _checks.check_index(index)
    return masks_of(index, classes, ignore_index)


def masks_of(index: Tensor, classes: Sequence[int], ignore_index: int | None) -> Tensor:
    """What lesion_masks returns, for arguments that have been checked."""
    index = flat_index(index)
    masks = torch.stack([index == number for number in classes], 1).to(_smallest_dtype(ignore_index))
    if ignore_index is None:
        return masks
    return masks.masked_fill_((index == ignore_index).unsqueeze(1), ignore_index)


def flat_index(index: Tensor) -> Tensor:
    """(B, H, W), int64, from (B, H, W) or (B, 1, H, W) of any integer dtype."""
    return (index.squeeze(1) if index.dim() == 4 else index).to(torch.int64)


def _smallest_dtype(ignore_index: int | None) -> torch.dtype:
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        if ignore_index is None or _checks.holds(dtype, ignore_index):
            return dtype
    return torch.int64
