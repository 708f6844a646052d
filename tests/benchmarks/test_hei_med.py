"""Maps of HEI-MED become masks, or a sentence says what is wrong."""

import gzip

import numpy as np
import pytest
from data.folders import paired_files
from data.idrid import DataError, read_sample
from PIL import Image

LABELS = np.array([[0, 1, 1, 2], [3, 0, 2, 2], [3, 3, 0, 0]], "<i4")
NAMES = "3\nExudate 1\nOther Bright Lesion 1\nExudate 1\n~ImageName:~(00000007).jpg\nExudate 9\n"


def write(folder, labels=LABELS, names=NAMES):
    height, width = labels.shape
    Image.new("RGB", (width, height)).save(folder / "(00000007).jpg")
    Image.new("L", (width, height)).save(folder / "(00000007)_vess.png")
    numbers = np.concatenate([np.array([-43, width, height], "<i4"), labels.reshape(-1)])
    (folder / "(00000007).map.gz").write_bytes(gzip.compress(numbers.tobytes()))
    (folder / "(00000007).GND").write_text(names)


def test_areas_called_exudates_are_lesion(tmp_path):
    write(tmp_path)
    (files,) = paired_files(tmp_path, tmp_path)
    sample = read_sample(files, size=3)
    assert sample.name == "(00000007)"
    assert sample.lesion.tolist() == [[label in (1, 3) for label in row] for row in LABELS.tolist()]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (LABELS, "2\nExudate 1\nExudate 2\n", "its labels are 0 to 3, but its .GND names 2"),
        (LABELS - 1, NAMES, "its labels are -1 to 2"),
        (LABELS, "", "must be a map of HEI-MED beside its .GND, but cannot be read"),
        (LABELS, "many\n", "cannot be read: invalid literal"),
    ],
)
def test_what_does_not_fit_is_said(labels, names, message, tmp_path):
    write(tmp_path, labels, names)
    (files,) = paired_files(tmp_path, tmp_path)
    with pytest.raises(DataError, match=message):
        read_sample(files, size=3)


def test_a_map_without_its_photograph_is_said_and_hidden_files_are_none(tmp_path):
    write(tmp_path)
    (tmp_path / "._(00000007).map.gz").write_bytes(b"")
    assert len(paired_files(tmp_path, tmp_path)) == 1
    with pytest.raises(DataError, match=r"must have its photograph at '.*absent.*jpg', but there is none"):
        paired_files(tmp_path / "absent", tmp_path)


@pytest.mark.parametrize("damaged", [lambda whole: whole[:-12], lambda whole: whole[:10] + b"\xff" + whole[11:]])
def test_a_damaged_map_is_said(damaged, tmp_path):
    write(tmp_path)
    path = tmp_path / "(00000007).map.gz"
    path.write_bytes(damaged(path.read_bytes()))
    (files,) = paired_files(tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"beside its \.GND, but cannot be read"):
        read_sample(files, size=3)
