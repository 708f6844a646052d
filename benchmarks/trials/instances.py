"""Losses in which every lesion counts equally, whatever its size: alternatives to the edge term.

Written from the papers; details that these leave open follow their published code. A lesion is an 8-connected component
of the target; a Dice loss is 1 - 2 sum p y / (sum p + sum y).
"""

import torch
import torch.nn.functional as F
from measure.lesion_scores import EIGHT
from scipy import ndimage
from torch import Tensor


def cell_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + BCE in the Voronoi cell of each lesion, averaged over lesions, then over images.

    An image without lesions has its BCE plus 1, the Dice loss of nothing found.
    The part of CC-DiceCE by lesion (Bouteille et al. 2025, arXiv 2511.17146).

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W) of 0 and 1.
    """
    images = zip(logits.squeeze(1), target.squeeze(1), strict=True)
    return torch.stack([_loss_of_cells(*image) for image in images]).mean()


def blob_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + BCE of each lesion with all others left out, averaged over lesions, then over images that have any.

    The part of blob loss by lesion (Kofler et al. 2022, arXiv 2205.08209).

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W) of 0 and 1.
    """
    images = zip(logits.squeeze(1), target.squeeze(1), strict=True)
    found = [_loss_of_blobs(*image) for image in images if image[1].any()]
    return torch.stack(found).mean() if found else logits.sum() * 0


def nearest_lesion(mask: Tensor) -> tuple[Tensor, int]:
    """The number of each pixel's nearest lesion, (H, W), counted from 0, and how many there are, one at least."""
    labels, count = ndimage.label(mask.cpu().numpy(), EIGHT)
    rows, columns = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    return torch.from_numpy(labels[rows, columns] - 1), count


def _loss_of_cells(logits: Tensor, target: Tensor) -> Tensor:
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if not target.any():
        return bce.mean() + 1
    nearest, count = nearest_lesion(target)
    cell = nearest.to(logits.device)
    probability = logits.sigmoid()
    found, marked, true, entropy, pixels = (
        _sums(values, cell, count) for values in (probability * target, probability, target, bce, torch.ones_like(bce))
    )
    each: Tensor = 1 - 2 * found / (marked + true) + entropy / pixels
    return each.mean()


def _loss_of_blobs(logits: Tensor, target: Tensor) -> Tensor:
    numbers, count = ndimage.label(target.cpu().numpy(), EIGHT)
    lesion = torch.from_numpy(numbers).to(logits.device)  # 0 is the background
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    marked, entropy, pixels = (
        _sums(values, lesion, count + 1) for values in (logits.sigmoid(), bce, torch.ones_like(bce))
    )
    dice = 1 - 2 * marked[1:] / (marked[0] + marked[1:] + pixels[1:])
    each: Tensor = dice + (entropy[0] + entropy[1:]) / (pixels[0] + pixels[1:])
    return each.mean()


def _sums(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sum of the values with each label, (count,)."""
    return values.new_zeros(count).index_add(0, labels.flatten(), values.flatten())
