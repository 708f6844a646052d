"""What the losses are timed on: drawn masks, and normal logits and features."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from data.synthetic import fundus_samples
from torch import Tensor

# Side in pixels of the grid from which lesions of a given area are grown: a lesion is about as wide.
GRAIN = 12


class Batch(NamedTuple):
    """What a criterion is called with.

    logits: (B, 1, H, W), requiring a gradient.
    target: (B, 1, H, W), float32, of 0 and 1.
    features: (B, C, H / stride, W / stride), requiring a gradient.
    """

    logits: Tensor
    target: Tensor
    features: Tensor


def drawn_batch(
    size: tuple[int, int],
    device: torch.device,
    *,
    images: int = 4,
    channels: int = 16,
    stride: int = 1,
    area: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """A batch from the seed.

    Args:
        size: (H, W) of the target, in pixels.
        device: where to put it.
        images: B.
        channels: C.
        stride: pixels of the target to a feature, along each axis.
        area: share of the pixels that is lesion; None draws the exudates of synthetic photographs.
        dtype: of logits and features.
        seed: of all three.
    """
    generator = torch.Generator().manual_seed(seed)
    target = _exudates(size, images, seed) if area is None else _blots(size, images, area, generator)
    logits = torch.randn(target.shape, generator=generator).to(device, dtype)
    cells = size[0] // stride, size[1] // stride
    features = torch.randn((images, channels, *cells), generator=generator).to(device, dtype)
    return Batch(logits.requires_grad_(), target.to(device), features.requires_grad_())


def pixels_as_patches(count: int, channels: int, area: float, device: torch.device, seed: int = 0) -> Batch:
    """One image of count pixels: with patches of one pixel, each gives one embedding to the density term."""
    rows = max(n for n in itertools.takewhile(lambda n: n * n <= count, itertools.count(1)) if count % n == 0)
    return drawn_batch((rows, count // rows), device, images=1, channels=channels, area=area, seed=seed)


def _exudates(size: tuple[int, int], images: int, seed: int) -> Tensor:
    masks = [sample.lesion for sample in fundus_samples(images, seed, stream=0)]
    return F.interpolate(torch.stack(masks)[:, None].float(), size=size, mode="nearest")


def _blots(size: tuple[int, int], images: int, area: float, generator: torch.Generator) -> Tensor:
    """Masks whose lesions together cover exactly that share of the batch."""
    grid = [-(-side // GRAIN) + 1 for side in size]
    noise = torch.rand(images, 1, *grid, generator=generator)
    height = F.interpolate(noise, size=size, mode="bilinear", align_corners=True)
    count = round(area * height.numel())
    target = torch.zeros_like(height)
    target.view(-1)[height.flatten().argsort(descending=True)[:count]] = 1
    return target
