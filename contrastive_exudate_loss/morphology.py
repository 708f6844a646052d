"""Dilation of binary masks and the bands on both sides of a lesion's contour.

Pixels outside the image belong to no mask, so the image border is no contour.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FOOTPRINTS = ("square", "cross")


def dilation(mask: Tensor, radius: int, footprint: str) -> Tensor:
    """Pixels within radius of a pixel of the mask.

    With radius 1, a single pixel becomes, for footprint "square" and "cross":

        . . . . .      . . . . .      . . . . .
        . . . . .      . # # # .      . . # . .
        . . # . .  ->  . # # # .      . # # # .
        . . . . .      . # # # .      . . # . .
        . . . . .      . . . . .      . . . . .

    Args:
        mask: (..., H, W), bool.
        radius: in pixels, >= 0; 0 gives the mask itself.
        footprint: "square" (Chebyshev distance) or "cross" (Manhattan distance).

    Returns:
        (..., H, W), bool.
    """
    radius = min(radius, sum(mask.shape[-2:]))  # farther there is nothing
    # A CPU max-pool over one channel is dozens of times slower than OR-ing shifted copies.
    return (_shifted if mask.is_cpu else _pooled)(mask, radius, footprint)


def inner_contour(lesion: Tensor, background: Tensor, radius: int, footprint: str) -> Tensor:
    """Lesion pixels within radius of a background pixel: lesion AND dilation(background).

    With radius 1 and footprint "cross" (# lesion, . background; right: the band):

        . . . . .      . . . . .
        . # # # .      . # # # .
        . # # # .  ->  . # . # .
        . # # # .      . # # # .
        . . . . .      . . . . .

    Args:
        lesion: (..., H, W), bool.
        background: (..., H, W), bool; an ignored pixel is neither lesion nor background.
        radius: in pixels, >= 0.
        footprint: "square" or "cross".

    Returns:
        (..., H, W), bool; empty without lesion or without background.
    """
    return lesion & dilation(background, radius, footprint)


def outer_contour(lesion: Tensor, background: Tensor, radius: int, footprint: str) -> Tensor:
    """Background pixels within radius of a lesion pixel: background AND dilation(lesion).

    With radius 1 and footprint "cross" (# lesion, . background; right: the band):

        . . . . .      . # # # .
        . # # # .      # . . . #
        . # # # .  ->  # . . . #
        . # # # .      # . . . #
        . . . . .      . # # # .

    Args, Returns: as inner_contour.
    """
    return background & dilation(lesion, radius, footprint)


def _shifted(mask: Tensor, radius: int, footprint: str) -> Tensor:
    if footprint == "square":
        return _spread(_spread(mask, -1, radius), -2, radius)
    for _ in range(radius):
        mask = _spread(mask, -1, 1) | _spread(mask, -2, 1)
    return mask


def _spread(mask: Tensor, axis: int, radius: int) -> Tensor:
    size = mask.shape[axis]
    spread = mask.clone()
    for shift in range(1, min(radius + 1, size)):
        spread.narrow(axis, shift, size - shift).logical_or_(mask.narrow(axis, 0, size - shift))
        spread.narrow(axis, 0, size - shift).logical_or_(mask.narrow(axis, shift, size - shift))
    return spread


def _pooled(mask: Tensor, radius: int, footprint: str) -> Tensor:
    pooled = mask.reshape(-1, 1, *mask.shape[-2:]).to(torch.float16)
    if footprint == "square":
        pooled = F.max_pool2d(pooled, 2 * radius + 1, stride=1, padding=radius)
    else:
        for _ in range(radius):
            pooled = torch.maximum(
                F.max_pool2d(pooled, (1, 3), stride=1, padding=(0, 1)),
                F.max_pool2d(pooled, (3, 1), stride=1, padding=(1, 0)),
            )
    return pooled.reshape(mask.shape).bool()
