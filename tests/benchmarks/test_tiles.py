"""Magnetic tiles come with their masks, every fourth of each folder for testing."""

import numpy as np
import pytest
import torch
from data.idrid import DataError
from data.photographs import CHANNELS
from data.tiles import FOLDERS, tiles
from PIL import Image


def write_tiles(root, count=8, size=(30, 20)):
    """Grey photographs, all of another brightness, with a defect whose outline is grey."""
    for folder in FOLDERS:
        (root / folder / "Imgs").mkdir(parents=True)
        for n in range(count):
            mask = np.zeros(size[::-1], np.uint8)
            mask[5:9, 5:12], mask[6:8, 6:11] = 100, 200
            path = root / folder / "Imgs" / f"exp1_num_{n}.jpg"
            Image.new("L", size, 10 * n).save(path)
            Image.fromarray(mask).save(path.with_suffix(".png"))
    return root


def test_each_photograph_is_in_one_split_and_every_fourth_of_a_folder_for_testing(tmp_path):
    write_tiles(tmp_path)
    brightness = {
        split: [int(sample.image.median()) for sample in tiles(tmp_path, split)] for split in ("train", "test")
    }
    assert brightness == {"train": 2 * [0, 10, 20, 40, 50, 60], "test": 2 * [30, 70]}


def test_a_defect_is_what_is_brighter_than_half(tmp_path):
    sample = tiles(write_tiles(tmp_path), "test")[0]
    wanted = torch.zeros(len(CHANNELS), 20, 30, dtype=torch.bool)
    wanted[CHANNELS.index("EX"), 6:8, 6:11] = True
    assert torch.equal(sample.lesion, wanted)
    assert sample.image.shape == (3, 20, 30)


def test_what_is_missing_or_does_not_fit_is_said(tmp_path):
    with pytest.raises(DataError, match="--data must be a folder that holds 'MT_Blowhole/Imgs'"):
        tiles(tmp_path, "train")
    write_tiles(tmp_path)
    Image.new("L", (3, 3)).save(tmp_path / "MT_Crack" / "Imgs" / "exp1_num_0.png")
    with pytest.raises(DataError, match=r"exp1_num_0.png' must have its photograph's size, \(30, 20\), got \(3, 3\)"):
        tiles(tmp_path, "train")
