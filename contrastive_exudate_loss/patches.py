"""Patches of the target: their sides, pixel counts and lesion fractions, and how to cut them out."""

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_sides(height: int, width: int, patch_size: int | None, num_patches: int | None) -> tuple[int, int]:
    """Height and width of a patch in target pixels.

    Args:
        height: of the target, in pixels.
        width: of the target, in pixels.
        patch_size: side in pixels, used when num_patches is None; None means 16.
        num_patches: at most so many patches per axis: sides ceil(height / num_patches), ceil(width / num_patches).

    Returns:
        (patch height, patch width), at least 1 and at most the target's. Patches tile the target from the top left.
    """
    if num_patches is None:
        side = 16 if patch_size is None else patch_size
        return min(side, height), min(side, width)
    return -(-height // num_patches), -(-width // num_patches)


def patch_counts(mask: Tensor, sides: tuple[int, int]) -> Tensor:
    """Number of the mask's pixels in each patch; partial patches count their real pixels.

    Args:
        mask: (B, K, H, W), bool.
        sides: patch height and width, in pixels.

    Returns:
        (B, K, gh, gw), int64.
    """
    return cut_patches(mask, sides, fill=False).sum((-2, -1))


def lesion_fraction(lesion_counts: Tensor, valid_counts: Tensor) -> Tensor:
    """Share of lesion pixels among a patch's valid pixels; 0 where a patch has no valid pixel.

    Args:
        lesion_counts: (B, K, gh, gw), int64.
        valid_counts: (B, K, gh, gw), int64.

    Returns:
        (B, K, gh, gw), float64: exact counts are divided, never compared with a rounded threshold * count.
        On the CPU where the counts' device has no float64.
    """
    device = torch.device("cpu") if lesion_counts.device.type == "mps" else lesion_counts.device
    return lesion_counts.to(device) / valid_counts.to(device, torch.float64).clamp(min=1)


def at_pixels(values: Tensor, sides: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Each pixel's patch value.

    Args:
        values: (B, K, gh, gw), one value per patch.
        sides: patch height and width, in pixels.
        size: (H, W) of the target, in pixels.

    Returns:
        (B, K, H, W).
    """
    rows, columns = (torch.arange(n, device=values.device) // side for n, side in zip(size, sides, strict=True))
    return values[..., rows[:, None], columns]


def cut_patches(mask: Tensor, sides: tuple[int, int], *, fill: bool, margin: int = 0) -> Tensor:
    """The patches of a mask, each as an image of its own; a partial patch is filled up.

    Args:
        mask: (B, K, H, W), bool.
        sides: patch height and width, in pixels.
        fill: value of the pixels beyond the image, and of the margin.
        margin: pixels to add around each patch.

    Returns:
        (B, K, gh, gw, patch height + 2 margin, patch width + 2 margin), bool.
    """
    batch, classes, height, width = mask.shape
    below, right = -height % sides[0], -width % sides[1]
    if below or right:
        mask = F.pad(mask, (0, right, 0, below), value=fill)
    grid = (height + below) // sides[0], (width + right) // sides[1]
    patches = mask.reshape(batch, classes, grid[0], sides[0], grid[1], sides[1]).transpose(3, 4)
    return F.pad(patches, (margin,) * 4, value=fill) if margin else patches


def paste_patches(patches: Tensor, size: tuple[int, int], *, margin: int = 0) -> Tensor:
    """The mask whose patches these are: the inverse of cut_patches.

    Args:
        patches: (B, K, gh, gw, patch height + 2 margin, patch width + 2 margin).
        size: (H, W) of the target, in pixels.
        margin: as given to cut_patches.

    Returns:
        (B, K, H, W).
    """
    inside = slice(margin, -margin or None)
    mask = patches[..., inside, inside].transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return mask[..., : size[0], : size[1]]
