"""Losses in which each lesion counts as much as any other: what one would install for small lesions instead.

Written from the papers, with facts from their published code; no maintained package has them. A lesion is an
8-connected component of the target, Dice one of its own: 1 - 2 sum p y / (sum p + sum y).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

EIGHT = np.ones((3, 3), bool)  # neighbours that are connected


def cell_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + BCE in the Voronoi cell of each lesion, their mean: over lesions, then over images.

    An image without lesions has its BCE plus 1, the Dice loss of nothing found.
    The instance part of CC-DiceCE (Bouteille et al. 2025, arXiv 2511.17146).

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W) of 0 and 1.
    """

    def of_image(logits: Tensor, target: Tensor, lesion: Tensor, nearest: Tensor, count: int) -> Tensor:
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if count == 0:
            return bce.mean() + 1
        probability = logits.sigmoid()
        found, marked, true, entropy, pixels = (
            _sums(values, nearest, count)
            for values in (probability * target, probability, target, bce, torch.ones_like(bce))
        )
        return (1 - 2 * found / (marked + true) + entropy / pixels).mean()

    return torch.stack(_by_image(of_image, logits, target)).mean()


def blob_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + BCE of each lesion with all other lesions left out, their mean: over lesions, then over images with any.

    The instance part of blob loss (Kofler et al. 2022, arXiv 2205.08209).

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W) of 0 and 1.
    """

    def of_image(logits: Tensor, target: Tensor, lesion: Tensor, nearest: Tensor, count: int) -> Tensor | None:
        if count == 0:
            return None
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        # Of the background, (1,), and of each lesion.
        marked, entropy, pixels = (
            _sums(values, lesion + 1, count + 1).split([1, count])
            for values in (logits.sigmoid(), bce, torch.ones_like(bce))
        )
        dice = 1 - 2 * marked[1] / (marked[0] + marked[1] + pixels[1])
        each: Tensor = dice + (entropy[0] + entropy[1]) / (pixels[0] + pixels[1])
        return each.mean()

    found = _by_image(of_image, logits, target)
    return torch.stack(found).mean() if found else logits.sum() * 0


def _by_image(function: Callable[..., Tensor | None], logits: Tensor, target: Tensor) -> list[Tensor]:
    """What the function gives of each image, None excepted.

    It gets, flat, the logits, the target, the number of each pixel's lesion (-1 for none) and of the nearest lesion,
    both counted from 0; and how many lesions there are.
    """
    found: list[Tensor] = []
    for own, mask in zip(logits[:, 0], target[:, 0], strict=True):
        labels, count = ndimage.label(mask.cpu().numpy(), EIGHT)
        nearest = labels
        if count:
            rows, columns = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
            nearest = labels[rows, columns]
        places = (torch.from_numpy(numbers.ravel() - 1).long().to(mask.device) for numbers in (labels, nearest))
        loss = function(own.flatten(), mask.flatten(), *places, count)
        found += [] if loss is None else [loss]
    return found


def _sums(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Of the values with each label, (count,)."""
    return values.new_zeros(count).index_add(0, labels, values)
