"""IDRiD is read rightly, or refused in a sentence."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from data import folders, idrid
from data.photographs import EYE
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

SQUARE = np.zeros((40, 60), bool)
SQUARE[10:20, 30:45] = True


def photograph(height=40, width=60):
    return Image.fromarray(np.full((height, width, 3), 90, np.uint8))


def mask_image(mode, lesion=SQUARE):
    """The lesion as a picture of the mode; alpha, where there is one, is 255 everywhere."""
    if mode == "P":
        image = Image.fromarray(lesion.astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 255, 0, 0])
        return image
    if mode == "RGBA":
        pixels = np.zeros((*lesion.shape, 4), np.uint8)
        pixels[..., 0], pixels[..., 3] = 255 * lesion, 255
        return Image.fromarray(pixels)
    return Image.fromarray((255 * lesion).astype(np.uint8)).convert(mode)


def write_split(root, split, masks, lesion="EX"):
    """Photographs IDRiD_01.jpg, ... with the masks given, None where one has none."""
    images = root / "1. Original Images" / idrid.SPLITS[split]
    folder = root / "2. All Segmentation Groundtruths" / idrid.SPLITS[split] / idrid.MASKED[lesion]
    images.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    for number, mask in enumerate(masks, 1):
        size = (60, 40) if mask is None else mask.size
        photograph(*reversed(size)).save(images / f"IDRiD_{number:02}.jpg")
        if mask is not None:
            mask.save(folder / f"IDRiD_{number:02}_{lesion}.tif")
    return images, folder


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_a_mask_of_any_mode_reads_by_its_colour_never_by_its_alpha(tmp_path, mode):
    mask_image(mode).save(tmp_path / "mask.tif")
    with Image.open(tmp_path / "mask.tif") as written:
        assert written.mode == mode
    np.testing.assert_array_equal(idrid.read_mask(tmp_path / "mask.tif"), SQUARE)


def test_a_palette_mask_reads_by_its_index_whatever_the_palette(tmp_path):
    image = mask_image("P")
    image.putpalette([200, 200, 200, 0, 0, 0])
    image.save(tmp_path / "mask.tif")
    np.testing.assert_array_equal(idrid.read_mask(tmp_path / "mask.tif"), SQUARE)


def test_an_absent_mask_reads_as_no_lesion(tmp_path):
    write_split(tmp_path, "train", [mask_image("P"), None])
    with_mask, without = idrid.split_files(tmp_path, "train", "EX")
    assert without.mask is None
    assert idrid.read_sample(with_mask, 40).lesion.sum() == SQUARE.sum()
    assert not idrid.read_sample(without, 40).lesion.any()


def test_the_lesion_chooses_the_mask(tmp_path):
    write_split(tmp_path, "test", [mask_image("P")], lesion="MA")
    assert idrid.split_files(tmp_path, "test", "MA")[0].mask.name == "IDRiD_01_MA.tif"
    with pytest.raises(idrid.DataError, match=r"4\. Soft Exudates"):
        idrid.split_files(tmp_path, "test", "SE")


def test_photographs_are_read_in_the_order_of_their_names(tmp_path):
    write_split(tmp_path, "train", [mask_image("P")] * 12)
    names = [sample.name for sample in idrid.read_samples(idrid.split_files(tmp_path, "train", "EX"), 40)]
    assert names == [f"IDRiD_{number:02}" for number in range(1, 13)]


def test_files_that_are_no_photograph_are_passed_over(tmp_path):
    images, _ = write_split(tmp_path, "train", [mask_image("P")])
    (images / "._IDRiD_01.jpg").write_bytes(b"resource fork")
    (images / "Thumbs.db").write_bytes(b"")
    assert [files.image.name for files in idrid.split_files(tmp_path, "train", "EX")] == ["IDRiD_01.jpg"]


def test_a_mask_of_another_size_is_refused_by_name_and_sizes(tmp_path):
    images, _ = write_split(tmp_path, "train", [mask_image("P")])
    photograph(41, 61).save(images / "IDRiD_01.jpg")
    (files,) = idrid.split_files(tmp_path, "train", "EX")
    with pytest.raises(idrid.DataError, match=r"IDRiD_01_EX\.tif' .* 61 x 41 pixels, but it is 60 x 40"):
        idrid.read_sample(files, 40)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(idrid.DataError, match="nowhere' is not a folder"):
        idrid.split_files(tmp_path / "nowhere", "train", "EX")


@pytest.mark.parametrize("absent", ["1. Original Images", "2. All Segmentation Groundtruths"])
def test_an_absent_folder_is_named(tmp_path, absent):
    write_split(tmp_path, "train", [mask_image("P")])
    (tmp_path / absent).rename(tmp_path / "elsewhere")
    with pytest.raises(idrid.DataError, match=absent):
        idrid.split_files(tmp_path, "train", "EX")


def test_a_folder_without_photographs_is_refused(tmp_path):
    write_split(tmp_path, "train", [])
    with pytest.raises(idrid.DataError, match=r"1\. Original Images.*has no \.jpg"):
        idrid.split_files(tmp_path, "train", "EX")


def test_a_folder_without_any_mask_is_refused(tmp_path):
    write_split(tmp_path, "train", [None, None])
    with pytest.raises(idrid.DataError, match=r"3\. Hard Exudates.*such as IDRiD_01_EX\.tif, but it has none"):
        idrid.split_files(tmp_path, "train", "EX")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("which", ["image", "mask"])
@pytest.mark.parametrize("keep", [0, 12, 150])
def test_a_file_that_cannot_be_read_is_named(tmp_path, which, keep):
    write_split(tmp_path, "train", [mask_image("P")])
    (files,) = idrid.split_files(tmp_path, "train", "EX")
    path: Path = getattr(files, which)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(idrid.DataError, match=f"{path.name}' must be a picture file"):
        idrid.read_sample(files, 40)


@pytest.mark.parametrize(
    ("height", "width", "size", "reduced"),
    [
        (40, 60, 20, (20, 30)),
        (61, 40, 20, (30, 20)),
        (33, 301, 32, (32, 292)),
        (30, 50, 40, (30, 50)),
        (1, 9, 1, (1, 9)),
    ],
)
def test_the_short_side_is_reduced_and_never_enlarged(tmp_path, height, width, size, reduced):
    mask = np.zeros((height, width), bool)
    mask[: height // 2 + 1] = True
    write_split(tmp_path, "train", [mask_image("L", mask)])
    sample = idrid.read_sample(*idrid.split_files(tmp_path, "train", "EX"), size)
    assert sample.image.shape == (3, *reduced)
    assert sample.lesion.shape == reduced


def test_reduction_by_an_integer_is_the_majority_of_each_block():
    lesion = np.random.default_rng(0).random((24, 40)) < 0.6
    share = lesion.reshape(6, 4, 10, 4).mean((1, 3))
    assert share.max() > 0.5
    crowded = np.pad(share, 1)
    most = np.max([crowded[i : i + 6, j : j + 10] for i in range(3) for j in range(3)], 0)
    reduced = idrid.reduced_mask(lesion, (10, 6))
    np.testing.assert_array_equal(reduced[most > 0.5], (share > 0.5)[most > 0.5])


@given(arrays.arrays(bool, (23, 31)), st.integers(1, 31), st.integers(1, 23))
@example(np.eye(23, 31, dtype=bool), 2, 2)
def test_reduction_leaves_no_mask_empty_and_makes_none_of_nothing(lesion, width, height):
    assert idrid.reduced_mask(lesion, (width, height)).any() == lesion.any()


def test_each_of_two_separate_microaneurysms_stays():
    lesion = np.zeros((50, 50), bool)
    lesion[3, 4] = lesion[42, 31] = True
    reduced = idrid.reduced_mask(lesion, (10, 10))
    assert np.argwhere(reduced).tolist() == [[0, 0], [8, 6]]


def test_the_rim_of_a_large_lesion_is_not_widened():
    lesion = np.zeros((50, 50), bool)
    lesion[10:32, 10:32] = True  # fills two fifths of the last row and column of blocks
    expected = np.zeros((10, 10), bool)
    expected[2:6, 2:6] = True
    np.testing.assert_array_equal(idrid.reduced_mask(lesion, (10, 10)), expected)


@pytest.mark.skipif("IDRID" not in os.environ, reason="set IDRID to the folder of the data set")
def test_the_real_mask_with_alpha_reads_as_1_to_10_percent_lesion():
    files = idrid.split_files(Path(os.environ["IDRID"]), "test", "EX")
    assert len(files) == 27
    (last,) = (files for files in files if files.image.stem == "IDRiD_81")
    sample = idrid.read_sample(last, 512)
    assert sample.image.shape == (3, 512, 771)
    assert 0.01 < sample.lesion.float().mean() < 0.1


@pytest.mark.skipif("IDRID" not in os.environ, reason="set IDRID to the folder of the data set")
def test_a_slice_of_it_reads_the_same_in_folders_of_another_data_set(tmp_path):
    files = idrid.split_files(Path(os.environ["IDRID"]), "test", "EX")[:2]
    samples = list(idrid.read_samples(files, 256))
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for n, sample in enumerate(samples):
        Image.fromarray(sample.image.movedim(0, 2).numpy()).save(tmp_path / "images" / f"C{n:04}.png")
        Image.fromarray(255 * sample.lesion.byte().numpy()).save(tmp_path / "masks" / f"C{n:04}_EX.png")
    converted = folders.paired_files(tmp_path / "images", tmp_path / "masks")
    for sample, again in zip(samples, idrid.read_samples(converted, 256), strict=True):
        assert torch.equal(sample.image, again.image)
        assert torch.equal(sample.lesion, again.lesion)
        assert sample.lesion.any()


@pytest.mark.skipif("IDRID" not in os.environ, reason="set IDRID to the folder of the data set")
def test_the_page_counts_its_dense_patches_rightly():
    page = (Path(__file__).parents[2] / "docs/options.md").read_text()
    (code,) = re.findall(r"```python\n(import torch\n\n\ndef dense_patches.*?)\n\n\n", page, re.DOTALL)
    names = {}
    exec(code, names)
    masks = []
    for files in idrid.split_files(Path(os.environ["IDRID"]), "train", "EX"):
        with Image.open(files.image) as image:
            lesion = idrid.read_lesion(files, image.size)[:, slice(*EYE)]
        masks.append(torch.from_numpy(idrid.reduced_mask(lesion, idrid.reduced_size(lesion.shape[::-1], 712))))
    (_, sides), *rows = re.findall(r"^\| (threshold|0\.\d+) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for threshold, cells in rows:
        for side, cell in zip(map(int, re.findall(r"\d+", sides)), cells.split(" | "), strict=True):
            counts = [names["dense_patches"](mask, side, float(threshold)) for mask in masks]
            having, mean = cell.split("; ")
            assert sum(count > 0 for count in counts) == int(having)
            digits = len(mean.partition(".")[2])
            assert round(sum(counts) / len(masks), digits) == float(mean)
