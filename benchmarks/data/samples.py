"""Photographs with their lesion masks, and the random crops that a network is trained on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sample(NamedTuple):
    """A photograph and its lesions.

    name: what to call it in messages and pictures.
    image: (3, H, W), uint8.
    lesion: (H, W), bool; in the study (K, H, W), of several masks.
    """

    name: str
    image: Tensor
    lesion: Tensor


def network_input(image: Tensor) -> Tensor:
    """The photograph's 0 to 255 brought to -2 to 2, as float32 of the same shape."""
    return image.float() / 63.75 - 2


def random_batch(samples: Sequence[Sample], count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random square crops, each flipped at random in both directions.

    Every second crop lies over some lesion pixel of its image, if there is one: lesions cover about 1 % of an image,
    and most crops drawn anywhere show none.

    Args:
        samples: to draw from, with replacement; one smaller than the crop is filled up with black.
        count: crops in the batch.
        side: of a crop, in pixels.
        generator: the same state gives the same batch.

    Returns:
        images: (count, 3, side, side), float32.
        target: (count, 1, side, side), float32 of 0 and 1.
    """
    crops = [random_crop(samples, side, generator, over_lesion=i % 2 == 1) for i in range(count)]
    images = torch.stack([image for image, _ in crops])
    target = torch.stack([lesion for _, lesion in crops]).unsqueeze(1)
    return network_input(images), target.float()


def random_crop(
    samples: Sequence[Sample], side: int, generator: torch.Generator, *, over_lesion: bool
) -> tuple[Tensor, Tensor]:
    """A square crop of a random photograph, (3, side, side) uint8, and of its lesions, flipped at random.

    Args: as random_batch; over_lesion: it lies over some lesion pixel, if there is one.
    """
    sample = samples[_below(len(samples), generator)]
    height, width = sample.lesion.shape[-2:]
    fill = (0, max(0, side - width), 0, max(0, side - height))
    image, lesion = F.pad(sample.image, fill), F.pad(sample.lesion, fill)
    top, left = _below(max(1, height - side + 1), generator), _below(max(1, width - side + 1), generator)
    places = sample.lesion.nonzero() if over_lesion else sample.lesion.new_empty((0, 2))
    if len(places):
        row, column = places[_below(len(places), generator)].tolist()
        top, left = _start_over(row, height, side, generator), _start_over(column, width, side, generator)
    window = (..., slice(top, top + side), slice(left, left + side))
    image, lesion = image[window], lesion[window]
    flips = [axis for axis in (-2, -1) if _below(2, generator)]
    return image.flip(flips), lesion.flip(flips)


def _start_over(place: int, size: int, side: int, generator: torch.Generator) -> int:
    """Random start of a window of the side that lies inside the size and over the place."""
    return min(max(place - _below(side, generator), 0), max(0, size - side))


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
