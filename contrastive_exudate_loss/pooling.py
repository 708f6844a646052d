"""Masked average pooling: the mean feature vector of many masks in every patch, in one pass over the features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_sums(features: Tensor, masks: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sum of the feature vectors under each mask in each patch, and the number of pixels summed.

    Pixel (i, j) of the (H, W) masks has the feature vector at (floor(i h / H), floor(j w / W)).
    The upsampled features are never formed: the masks are pooled down to counts per feature cell instead, and one
    matrix product per patch sums the cells, weighted by their counts.
    It is linear in the features, so its backward needs only the counts.

    Args:
        features: (B, C, h, w), floating.
        masks: (B, T, H, W), bool.
        sides: patch height and width, in target pixels.

    Returns:
        sums: (B, T, gh, gw, C), float64 for float64 features, else float32.
        counts: (B, T, gh, gw), of the same dtype.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    features, weights = features.to(dtype), masks.to(dtype)
    blocks = []
    for axis, side in zip((2, 3), sides, strict=True):
        patches = -(-masks.shape[axis] // side)
        features, weights = _aligned(features, weights, axis, side, patches)
        blocks += [patches, features.shape[axis] // patches]
    features, weights = features.unflatten(3, blocks[2:]), weights.unflatten(3, blocks[2:])
    features, weights = features.unflatten(2, blocks[:2]), weights.unflatten(2, blocks[:2])
    sums = torch.einsum("bcyixj,btyixj->btyxc", features, weights)
    return sums, weights.sum((3, 5))


def embeddings(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean feature vector of each mask; an empty mask gives the zero vector, to be left out by its count.

    Args:
        sums: (..., C), floating.
        counts: (...), floating.

    Returns:
        (..., C), floating.
    """
    return sums / counts.clamp(min=1).unsqueeze(-1)


def _aligned(features: Tensor, weights: Tensor, axis: int, side: int, patches: int) -> tuple[Tensor, Tensor]:
    """Features and weights resampled along an axis to the same number of slots per patch, each slot in one cell."""
    pixels, cells = weights.shape[axis], features.shape[axis]
    stride = pixels // cells
    if pixels % cells == 0 and side % stride == 0:
        slots = patches * (side // stride)
        weights = _padded(weights, axis, slots * stride)
        if stride > 1:
            weights = weights.unflatten(axis, (slots, stride)).sum(axis + 1)
        return _padded(features, axis, slots), weights
    if cells > pixels:  # only the cells that a pixel reads count: one slot a pixel
        read = torch.arange(pixels, device=features.device) * cells // pixels
        return _padded(features.index_select(axis, read), axis, patches * side), _padded(weights, axis, patches * side)
    # A cell may straddle patches: give each patch a slot for every cell it touches, the first at the same place.
    slots = 1 + max(
        (min(start + side, pixels) - 1) * cells // pixels - start * cells // pixels for start in range(0, pixels, side)
    )
    starts = torch.arange(0, pixels, side, device=features.device) * cells // pixels
    pixel = torch.arange(pixels, device=features.device)
    patch = pixel // side
    slot = patch * slots + pixel * cells // pixels - starts[patch]
    shape = list(weights.shape)
    shape[axis] = patches * slots
    weights = weights.new_zeros(shape).index_add_(axis, slot, weights)
    cell = (starts[:, None] + torch.arange(slots, device=features.device)).clamp(max=cells - 1).flatten()
    return features.index_select(axis, cell), weights


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    missing = size - tensor.shape[axis]
    return F.pad(tensor, (0, 0) * (3 - axis) + (0, missing)) if missing else tensor
