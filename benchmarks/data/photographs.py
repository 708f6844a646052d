"""What the study trains and judges on: IDRiD cropped to the eye, with all its masks, and random crops of it."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.idrid import MASKED, Array, DataError, Files, read_image, read_lesion, reduced_mask, reduced_size, split_files
from data.samples import Sample, random_crop

CHANNELS = tuple(MASKED)  # of a photograph's masks: four lesions, then the optic disc
EYE = 200, 3800  # columns that hold it, nearly: see docs/protocol.md
FOLDS = 5
DARK = 25  # of 255: pixels that are brighter in no colour are the ground around the eye
SEEN = 0.02  # share of a row's or column's pixels, from which on it belongs to the eye
BRIGHTNESS, CONTRAST = 0.1, 0.2  # largest change: of the range, and of the factor


def photographs(root: Path, split: str, size: int, cache: Path) -> list[Sample]:
    """The photographs of a split, cropped to the eye and reduced, with a mask for each of CHANNELS.

    Args:
        root: IDRiD's folder.
        split: "train" or "test".
        size: short side to reach, in pixels.
        cache: folder that keeps them, since reading takes a minute.

    Raises:
        DataError: as idrid.split_files and idrid.read_mask.
    """
    place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
    kept = cache / f"{split}-{size}-{place}.pt"
    if not kept.exists():
        files = zip(*(split_files(root, split, name) for name in CHANNELS), strict=True)
        with ThreadPoolExecutor() as pool:
            samples = list(pool.map(lambda masks: tuple(_read(masks, size)), files))
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        torch.save(samples, unfinished)
        unfinished.replace(kept)
    return [Sample(*fields) for fields in torch.load(kept)]


def other_photographs(files: Sequence[Files], across: int) -> list[Sample]:
    """Photographs of another data set with masks of exudates, as photographs gives those of IDRiD.

    Each is cropped to the eye and reduced.

    Args:
        files: photographs and their masks.
        across: width of the eye to reach, in pixels.

    Returns:
        Samples in the files' order; of a mask for each of CHANNELS all but that of exudates are empty.

    Raises:
        DataError: as idrid.read_image and idrid.read_lesion; or a photograph is dark everywhere.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda own: _read_other(own, across), files))


def with_one_mask(name: str, picture: Image.Image, lesion: Array) -> Sample:
    """A sample whose (H, W) mask takes the place of exudates; the other masks of CHANNELS are empty."""
    masks = np.zeros((len(CHANNELS), *lesion.shape), bool)
    masks[CHANNELS.index("EX")] = lesion
    return Sample(name, _pixels(picture), torch.from_numpy(masks))


def train_validation_split(samples: Sequence[Sample], fold: int) -> tuple[list[Sample], list[Sample]]:
    """The photographs to train on, and the validation fold: every fifth, from the fold's number on."""
    first = fold % FOLDS
    return [sample for i, sample in enumerate(samples) if i % FOLDS != first], list(samples[first::FOLDS])


def augmented_crops(
    samples: Sequence[Sample], count: int, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random square crops, flipped, turned by quarters, and of varied brightness and contrast.

    Returns:
        images: (count, 3, side, side), float32, -1 to 1 before they are varied.
        masks: (count, K, side, side), bool.
    """
    images, masks = [], []
    for _ in range(count):
        image, mask = random_crop(samples, side, generator, over_lesion=False)
        turns = int(torch.randint(4, (), generator=generator))
        brightness, contrast = (2 * torch.rand(2, generator=generator) - 1).tolist()
        varied = encoder_input(image) * (1 + CONTRAST * contrast) + 2 * BRIGHTNESS * brightness
        images.append(varied.rot90(turns, (1, 2)))
        masks.append(mask.rot90(turns, (1, 2)))
    return torch.stack(images), torch.stack(masks)


def encoder_input(image: Tensor) -> Tensor:
    """0 to 255 brought to -1 to 1, as the pretrained encoder has it."""
    return image.float() / 127.5 - 1


def _read_other(files: Files, across: int) -> Sample:
    whole = read_image(files.image)
    pixels = np.array(whole)
    seen = pixels.max(2) > DARK
    rows, columns = (np.flatnonzero(seen.mean(axis) > SEEN) for axis in (1, 0))
    if not len(rows) or not len(columns):
        raise DataError(f"'{files.image}' must show an eye before a dark ground, but it is dark everywhere")
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    scale = min(1, across / (right - left))
    reduced = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    eye = whole.crop((int(left), int(top), int(right), int(bottom))).resize(reduced, Image.Resampling.BOX)
    lesion = reduced_mask(read_lesion(files, whole.size)[top:bottom, left:right], reduced)
    return with_one_mask(files.image.stem, eye, lesion)


def _read(masks: Sequence[Files], size: int) -> Sample:
    whole = read_image(masks[0].image)
    eye = whole.crop((EYE[0], 0, min(EYE[1], whole.width), whole.height))
    reduced = reduced_size(eye.size, size)
    lesions = [reduced_mask(read_lesion(files, whole.size)[:, slice(*EYE)], reduced) for files in masks]
    pixels = _pixels(eye.resize(reduced, Image.Resampling.BOX))
    return Sample(masks[0].image.stem, pixels, torch.from_numpy(np.stack(lesions)))


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
