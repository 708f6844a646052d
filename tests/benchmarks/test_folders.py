"""Photographs of any folder find their masks in another, or a sentence says why not."""

import re

import pytest
from data.folders import paired_files
from data.idrid import DataError
from PIL import Image


@pytest.fixture
def write(tmp_path):
    """Make empty pictures in the folders images and masks."""

    def written(images, masks):
        for folder, names in (("images", images), ("masks", masks)):
            (tmp_path / folder).mkdir()
            for name in names:
                Image.new("L", (2, 2)).save(tmp_path / folder / name)
        return tmp_path / "images", tmp_path / "masks"

    return written


def test_a_mask_may_bear_more_than_its_photographs_name(write):
    folders = write(
        ["C1.jpg", "C10.jpg", "C1_left.png", "d.tif", "none.JPG"],
        ["C1.png", "C10_EX.tif", "C1_left_EX.png", "d.lesion.gif"],
    )
    found = {files.image.name: files.mask and files.mask.name for files in paired_files(*folders)}
    assert found == {
        "C1.jpg": "C1.png",
        "C10.jpg": "C10_EX.tif",
        "C1_left.png": "C1_left_EX.png",
        "d.tif": "d.lesion.gif",
        "none.JPG": None,
    }


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (["a.jpg"], ["b.png"], "b.png' must begin with the name of a photograph"),
        (["a.jpg"], ["a.png", "a_EX.png"], "must hold one mask for a.jpg, but it holds a.png, a_EX.png"),
        ([], ["a.png"], "--images must be a folder of pictures (.bmp, "),
        (["a.jpg"], [], "--masks must be a folder of pictures (.bmp, "),
    ],
)
def test_what_does_not_fit_is_said(images, masks, message, write):
    with pytest.raises(DataError, match=re.escape(message)):
        paired_files(*write(images, masks))


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match=r"--images must be a folder of pictures, but '.*absent' is not a folder"):
        paired_files(tmp_path / "absent", tmp_path)
