"""How patches of the target lie over cells of the features, by slots: a slot is the part of a cell in one patch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Axis(NamedTuple):
    """How an axis of the target lies over that of the features; a slot is the part of a cell that lies in one patch.

    slots: number in a patch.
    missing: pixels to add so that all patches are whole.
    stride: pixels in a slot, if each slot is a whole cell.
    cell: (slots of all patches,), the cell of each slot, if a cell may lie in several patches; else None.
    slot: (pixels,), the slot of each pixel, in the same case; else None.
    """

    slots: int
    missing: int
    stride: int
    cell: Tensor | None
    slot: Tensor | None


def layout_of(pixels: Sequence[int], size: Sequence[int], sides: Sequence[int], device: torch.device) -> list[Axis]:
    """Rows and columns of a target of so many pixels, in patches of these sides, over features of this size."""
    return [_axis(*lengths, device) for lengths in zip(pixels, size, sides, strict=True)]


def _axis(pixels: int, cells: int, side: int, device: torch.device) -> Axis:
    stride = pixels // cells
    if not (pixels % cells or side % stride):
        return Axis(side // stride, -pixels % side, stride, None, None)
    # Each patch gets a slot for every cell that it touches, the first at the same place in all.
    starts = range(0, pixels, side)
    slots = 1 + max((min(start + side, pixels) - 1) * cells // pixels - start * cells // pixels for start in starts)
    first = torch.arange(0, pixels, side, device=device) * cells // pixels
    pixel = torch.arange(pixels, device=device)
    patch = pixel // side
    cell = (first[:, None] + torch.arange(slots, device=device)).clamp(max=cells - 1).flatten()
    return Axis(slots, 0, 1, cell, patch * slots + pixel * cells // pixels - first[patch])


def slot_weights(masks: Tensor, layout: Sequence[Axis], dtype: torch.dtype) -> Tensor:
    """The masks pooled down to pixels per slot, (B, T, gh rows, gw columns); at stride 1 the masks, as bool."""
    weights = masks
    for n, axis in enumerate(layout, 2):
        if axis.cell is None or axis.slot is None:
            weights = _padded(weights, n, weights.shape[n] + axis.missing)
            if axis.stride > 1:
                weights = weights.unflatten(n, (-1, axis.stride)).sum(n + 1, dtype=dtype)
        else:
            shape = [*weights.shape[:n], len(axis.cell), *weights.shape[n + 1 :]]
            weights = weights.new_zeros(shape, dtype=dtype).index_add_(n, axis.slot, weights.to(dtype))
    return weights


def resampled(features: Tensor, layout: Sequence[Axis]) -> Tensor:
    """The features with a row and a column for each slot."""
    for n, axis in enumerate(layout, 2):
        if axis.cell is not None:
            features = features.index_select(n, axis.cell)
    return features


def filled_up(features: Tensor, weights: Tensor) -> Tensor:
    """The features with rows and columns of 0 for the slots of partial patches."""
    return _padded(_padded(features, 2, weights.shape[2]), 3, weights.shape[3])


def blocks_of(tensor: Tensor, slots: Sequence[int]) -> Tensor:
    """(B, N, rows, columns) as (B, N, gh, rows per patch, gw, columns per patch)."""
    blocks: Tensor = tensor.unflatten(3, (-1, slots[1])).unflatten(2, (-1, slots[0]))
    return blocks


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    missing = size - tensor.shape[axis]
    return F.pad(tensor, (0, 0) * (3 - axis) + (0, missing)) if missing else tensor
