"""What the study sees of IDRiD: the eye, all masks, folds that share nothing, crops that the seed decides."""

import shutil

import numpy as np
import pytest
import torch
from data import photographs
from data.idrid import DataError, Files
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


def eye_and_mask(folder, eye=(10, 40, 20, 80)):
    """A bright eye, (top, bottom, left, right), with a dark red rim of noise around, and a lesion inside it."""
    top, bottom, left, right = eye
    pixels = np.full((50, 100, 3), (20, 9, 9), np.uint8)
    pixels[top:bottom, left:right] = (90, 50, 20)
    mask = np.zeros((50, 100), bool)
    mask[20:30, 40:60] = True
    Image.fromarray(pixels).save(folder / "eye.png")
    Image.fromarray(mask).save(folder / "eye_EX.png")
    return Files(folder / "eye.png", folder / "eye_EX.png")


def test_photographs_of_other_data_sets_are_cropped_to_their_own_eye_and_reduced(tmp_path):
    files = eye_and_mask(tmp_path)
    (sample,) = photographs.other_photographs([files], 30)
    assert sample.name == "eye"
    assert torch.equal(sample.image, torch.tensor([90, 50, 20], dtype=torch.uint8).view(3, 1, 1).expand(3, 15, 30))
    wanted = torch.zeros(len(CHANNELS), 15, 30, dtype=torch.bool)
    wanted[CHANNELS.index("EX"), 5:10, 10:20] = True
    assert torch.equal(sample.lesion, wanted)


def test_a_smaller_eye_stays_as_it_is_and_some_bright_dust_is_none(tmp_path):
    files = eye_and_mask(tmp_path)
    pixels = np.array(Image.open(files.image))
    pixels[3, 95] = 255  # one of 50 pixels of its column, one of 100 of its row
    Image.fromarray(pixels).save(files.image)
    (sample,) = photographs.other_photographs([files], 850)
    assert sample.image.shape == (3, 30, 60)
    assert sample.lesion.sum() == 200


def test_a_photograph_without_an_eye_is_said(tmp_path):
    files = eye_and_mask(tmp_path, eye=(0, 0, 0, 0))
    with pytest.raises(DataError, match=r"'.*eye.png' must show an eye before a dark ground"):
        photographs.other_photographs([files], 850)
