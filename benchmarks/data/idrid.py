"""The IDRiD photographs with the masks of one lesion, read from the data set's official folders.

    PATH/1. Original Images/a. Training Set/IDRiD_01.jpg
    PATH/2. All Segmentation Groundtruths/a. Training Set/3. Hard Exudates/IDRiD_01_EX.tif

and "b. Testing Set" likewise. A lesion that a photograph does not show has no file there.

Reference: Porwal et al. 2018, IDRiD, doi 10.21227/H25W98.
"""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from data import hei_med
from data.samples import Sample

IMAGES = "1. Original Images"
MASKS = "2. All Segmentation Groundtruths"
SPLITS = {"train": "a. Training Set", "test": "b. Testing Set"}
LESIONS = {"MA": "1. Microaneurysms", "HE": "2. Haemorrhages", "EX": "3. Hard Exudates", "SE": "4. Soft Exudates"}
MASKED = {**LESIONS, "OD": "5. Optic Disc"}

Array = npt.NDArray[np.bool_]


class DataError(Exception):
    """The data set is not as expected; the message is one sentence for the user."""


class Files(NamedTuple):
    """A photograph's file and its mask's, None where the lesion has none."""

    image: Path
    mask: Path | None


def split_files(root: Path, split: str, lesion: str) -> list[Files]:
    """The photographs of one split, by name, with their masks.

    Args:
        root: the folder that holds the images' and the masks' folders.
        split: "train" or "test".
        lesion: "MA", "HE", "EX", "SE", or "OD", which is none but has masks as well.

    Raises:
        DataError: a folder is absent, holds no photograph, or no photograph has a mask.
    """
    image_folder, mask_folder = Path(IMAGES, SPLITS[split]), Path(MASKS, SPLITS[split], MASKED[lesion])
    if not root.is_dir():
        raise DataError(f"--data must be the folder that holds '{IMAGES}' and '{MASKS}', but '{root}' is not a folder")
    for folder in (image_folder, mask_folder):
        if not (root / folder).is_dir():
            raise DataError(f"--data must be a folder that holds '{folder}', as IDRiD's does, but '{root}' does not")
    images = sorted(path for path in (root / image_folder).iterdir() if _is_photograph(path))
    if not images:
        raise DataError(f"'{root / image_folder}' must hold the photographs, such as IDRiD_01.jpg, but it has no .jpg")
    masks = [root / mask_folder / f"{image.stem}_{lesion}.tif" for image in images]
    files = [Files(image, mask if mask.exists() else None) for image, mask in zip(images, masks, strict=True)]
    if all(mask is None for _, mask in files):
        raise DataError(
            f"'{root / mask_folder}' must hold a mask of some photograph, such as {masks[0].name}, but it has none"
        )
    return files


def read_samples(files: list[Files], size: int) -> Iterator[Sample]:
    """The photographs and masks in the files' order, reduced to the size; files are read in parallel.

    Raises:
        DataError: as read_sample.
    """
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda pair: read_sample(pair, size), files)


def read_sample(files: Files, size: int) -> Sample:
    """A photograph and its mask, with the short side reduced to size pixels; a smaller one stays as it is.

    Args:
        files: the photograph, and its mask or None, which reads as no lesion.
        size: short side to reach, in pixels.

    Raises:
        DataError: a file cannot be read, or the mask is not of the photograph's size.
    """
    image = read_image(files.image)
    lesion = read_lesion(files, image.size)
    reduced = reduced_size(image.size, size)
    if reduced != image.size:
        image, lesion = image.resize(reduced, Image.Resampling.BOX), reduced_mask(lesion, reduced)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return Sample(files.image.stem, pixels, torch.from_numpy(lesion))


def read_lesion(files: Files, size: tuple[int, int]) -> Array:
    """The mask of a photograph of so many pixels (width, height), nothing where it has none; (H, W), bool.

    Raises:
        DataError: the file cannot be read, or the mask is not of the photograph's size.
    """
    width, height = size
    lesion = np.zeros((height, width), bool) if files.mask is None else read_mask(files.mask)
    if lesion.shape != (height, width):
        raise DataError(
            f"'{files.mask}' must have its photograph's size, {width} x {height} pixels, but it is "
            f"{lesion.shape[1]} x {lesion.shape[0]}"
        )
    return lesion


def reduced_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) with the short side reduced to so many pixels; a smaller size stays as it is."""
    scale = min(1, short_side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def read_image(path: Path) -> Image.Image:
    """The file's picture in RGB.

    Raises:
        DataError: the file cannot be read as a picture.
    """
    return _opened(path).convert("RGB")


def read_mask(path: Path) -> Array:
    """Where a mask file has lesion, (H, W): any colour channel (or palette index) above 0, whatever alpha says.

    Raises:
        DataError: the file cannot be read as a picture, or as a map of HEI-MED if it has the name of one.
    """
    if path.name.endswith(hei_med.SUFFIX):
        try:
            return hei_med.read_map(path)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(
                f"'{path}' must be a map of HEI-MED beside its .GND, but cannot be read: {error}"
            ) from error
    mask = _opened(path)
    values = np.asarray(mask).reshape(mask.height, mask.width, -1)
    colours = [channel for channel, band in enumerate(mask.getbands()) if band != "A"]
    return np.asarray((values[..., colours] > 0).any(-1))


def reduced_mask(lesion: Array, size: tuple[int, int]) -> Array:
    """The mask at a smaller size: lesion where it fills more than half of a pixel.

    A lesion too small to fill half of any pixel keeps the pixel that it fills most, so that none vanishes: a pixel
    touched by lesion is lesion too if none of its eight neighbours holds more of it.

    Args:
        lesion: (H, W), bool.
        size: (width, height) to reach, in pixels, as Pillow has it.

    Returns:
        (height, width), bool.
    """
    share = np.asarray(Image.fromarray(lesion.astype(np.float32)).resize(size, Image.Resampling.BOX))
    around = np.pad(share, 1)
    height, width = share.shape
    most = np.max([around[i : i + height, j : j + width] for i in range(3) for j in range(3)], 0)
    return np.asarray((share > 0.5) | ((share > 0) & (share == most)))


def _is_photograph(path: Path) -> bool:
    return path.suffix.lower() == ".jpg" and not path.name.startswith(".")


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # OSError mostly, but what a decoder raises on broken data has no common class
        raise DataError(f"'{path}' must be a picture file, but it cannot be read: {error}") from error
    return image
