"""What the study sees of IDRiD: the eye, all masks, folds that share nothing, crops that the seed decides."""

import shutil

import numpy as np
import pytest
import torch
from data import photographs
from data.idrid import DataError
from data.photographs import CHANNELS, FOLDS, augmented_crops, encoder_input, train_validation_split
from data.samples import Sample
from PIL import Image
from test_idrid import mask_image, write_split


def write_all(folder, split="train", count=3, size=(60, 80)):
    """Photographs with a mask of each kind, a square further right for each; the last photograph has none."""
    for k, name in enumerate(CHANNELS):
        mask = np.zeros(size, bool)
        mask[10:30, 20 + 4 * k : 40 + 4 * k] = True
        write_split(folder, split, [*[mask_image("P", mask)] * (count - 1), None], name)
    for path in sorted(folder.glob("1*/*/*.jpg")):
        Image.new("RGB", size[::-1], (9, 9, 9)).save(path)


def test_photographs_are_cropped_to_the_eye_and_reduced_with_all_masks(tmp_path, monkeypatch):
    write_all(tmp_path / "data")
    monkeypatch.setattr(photographs, "EYE", (20, 60))
    samples = photographs.photographs(tmp_path / "data", "train", 20, tmp_path / "cache")
    assert [sample.name for sample in samples] == ["IDRiD_01", "IDRiD_02", "IDRiD_03"]
    for sample in samples:
        assert sample.image.shape == (3, 30, 20)
        assert sample.lesion.shape == (len(CHANNELS), 30, 20)
    for k in range(len(CHANNELS)):
        wanted = torch.zeros(30, 20, dtype=torch.bool)
        wanted[5:15, 2 * k : 2 * k + 10] = True
        assert torch.equal(samples[0].lesion[k], wanted)
    assert not samples[-1].lesion.any()


def test_what_has_been_read_is_kept(tmp_path, monkeypatch):
    write_all(tmp_path / "data")
    monkeypatch.setattr(photographs, "EYE", (0, 80))
    first = photographs.photographs(tmp_path / "data", "train", 30, tmp_path / "cache")
    shutil.rmtree(tmp_path / "data")
    again = photographs.photographs(tmp_path / "data", "train", 30, tmp_path / "cache")
    for before, after in zip(first, again, strict=True):
        assert before.name == after.name
        assert torch.equal(before.image, after.image)
        assert torch.equal(before.lesion, after.lesion)
    with pytest.raises(DataError):
        photographs.photographs(tmp_path / "elsewhere", "train", 30, tmp_path / "cache")


def test_folds_share_nothing_and_leave_nothing_out():
    names = [f"{n:02}" for n in range(54)]
    samples = [Sample(name, torch.zeros(0), torch.zeros(0)) for name in names]
    held_out = []
    for fold in range(FOLDS):
        train, held = ([sample.name for sample in part] for part in train_validation_split(samples, fold))
        assert sorted(train + held) == names
        assert len(held) in (10, 11)
        held_out += held
    assert sorted(held_out) == names
    assert train_validation_split(samples, FOLDS) == train_validation_split(samples, 0)


def coordinates(size=40):
    """A photograph whose red and green tell the pixel; its masks too."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 7)]).to(torch.uint8)
    return Sample("made", image, torch.stack([rows % 2 == 0, columns % 2 == 0]))


def test_crops_are_the_seeds_and_image_and_masks_turn_together(monkeypatch):
    monkeypatch.setattr(photographs, "BRIGHTNESS", 0)
    monkeypatch.setattr(photographs, "CONTRAST", 0)
    batches = [augmented_crops([coordinates()], 30, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(batches[0][0], batches[1][0])
    assert not torch.equal(batches[0][0], batches[2][0])
    images, masks = batches[0]
    pixels = ((images + 1) * 127.5).round().long()
    assert torch.equal(masks, pixels[:, :2] % 2 == 0)
    # Each of the eight ways to lay a square: how row and column change from corner to corner.
    ways = {
        tuple((p[k, a, b] - p[k, 0, 0]).sign().item() for k in (0, 1) for a, b in ((0, -1), (-1, 0))) for p in pixels
    }
    assert len(ways) == 8


def test_brightness_and_contrast_vary_within_their_bounds():
    sample = Sample("grey", torch.full((3, 20, 20), 255, dtype=torch.uint8), torch.zeros(1, 20, 20, dtype=torch.bool))
    images, _ = augmented_crops([sample], 200, 8, torch.Generator().manual_seed(0))
    levels = images.mean((1, 2, 3))
    bound = photographs.CONTRAST + 2 * photographs.BRIGHTNESS
    assert (levels - 1).abs().max() <= bound + 1e-6
    assert (levels - 1).abs().max() > bound / 2
    assert torch.equal(encoder_input(torch.tensor([0, 255])), torch.tensor([-1.0, 1.0]))
