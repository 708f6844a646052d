"""Photographs of magnetic tiles with blowholes or cracks, grey, each with the mask of its defect.

    PATH/MT_Blowhole/Imgs/exp1_num_108719.jpg     115 photographs
    PATH/MT_Blowhole/Imgs/exp1_num_108719.png     the mask, grey along the outline
    PATH/MT_Crack/Imgs/...                        57

Reference: Huang et al. 2020, The Visual Computer 36, doi 10.1007/s00371-018-1588-5.
"""

from pathlib import Path

import numpy as np

from data.idrid import DataError, read_image
from data.photographs import with_one_mask
from data.samples import Sample

FOLDERS = "MT_Blowhole", "MT_Crack"
HALF = 127  # of a mask's 255: what is brighter is defect
EVERY = 4  # which photographs of a folder, by name, are for testing: the fourth, the eighth and so on


def tiles(root: Path, split: str) -> list[Sample]:
    """The photographs of a split, at their own size, their defects in place of hard exudates.

    Args:
        root: the folder that holds FOLDERS.
        split: "train" or "test".

    Raises:
        DataError: a folder has no photograph, a file cannot be read, or a mask is not of its photograph's size.
    """
    found = []
    for folder in FOLDERS:
        images = sorted((root / folder / "Imgs").glob("*.jpg"))
        if not images:
            raise DataError(
                f"--data must be a folder that holds '{folder}/Imgs' with .jpg files, but '{root}' does not"
            )
        for n, path in enumerate(images, 1):
            if (n % EVERY == 0) == (split == "test"):
                found.append(_read(path))
    return found


def _read(path: Path) -> Sample:
    image, mask = read_image(path), read_image(path.with_suffix(".png"))
    if mask.size != image.size:
        raise DataError(f"'{path.with_suffix('.png')}' must have its photograph's size, {image.size}, got {mask.size}")
    return with_one_mask(path.stem, image, np.array(mask).max(2) > HALF)
