"""The picture shows what the losses see."""

import numpy as np
import pytest
import torch
from data.samples import Sample
from PIL import Image
from training import picture

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss


def sample_of(lesion):
    return Sample("made", torch.zeros(3, *lesion.shape, dtype=torch.uint8), lesion)


def empty(height, width):
    return torch.zeros(height, width, dtype=torch.bool)


def rgb(colour):
    return tuple(round(255 * channel) for channel in picture._rgb(colour))


@pytest.mark.parametrize("size", [(64, 64), (50, 41)])
def test_dense_patches_are_those_more_than_half_lesion(size):
    lesion = torch.rand(size, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, size[1])
    criterion = CombinedExudateLoss(0.02, 0.1, density=PatchDensityContrastLoss(8))
    dense, sides = picture.dense_patches(lesion, criterion)
    assert sides == (8, 8)
    for row in range(dense.shape[0]):
        for column in range(dense.shape[1]):
            patch = lesion[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert dense[row, column] == (patch.float().mean() > 0.5)


def test_the_window_shows_the_most_dense_patches():
    lesion = empty(400, 500)
    lesion[320:352, 400:432] = True  # four patches of 16
    scattered = empty(400, 500)
    scattered[::2] = True  # much lesion, but half of each patch: none dense
    window = picture.busiest_window(
        [sample_of(empty(400, 500)), sample_of(scattered), sample_of(lesion)], CombinedExudateLoss.paper()
    )
    assert window.sample == 2
    assert window.cut(lesion).sum() == 32 * 32


def test_the_window_shows_the_most_rim_where_the_edge_is_contrasted():
    large, small = empty(400, 500), empty(400, 500)
    large[100:160, 100:160] = True  # rim: 4 * 59 = 236 pixels
    small[200:300:10, 300:380:10] = small[200:300:10, 301:381:10] = True
    small[201:301:10, 300:380:10] = small[201:301:10, 301:381:10] = True  # rim: 80 lesions of 4 pixels
    samples = [sample_of(empty(400, 500)), sample_of(small), sample_of(large)]
    window = picture.busiest_window(samples, CombinedExudateLoss())
    assert window.sample == 1
    assert window.cut(small).sum() == small.sum()
    assert picture.busiest_window(samples, CombinedExudateLoss.paper()).sample == 2


def test_the_window_is_the_image_where_that_is_small():
    assert picture.busiest_window([sample_of(empty(40, 30))], CombinedExudateLoss.paper()) == (0, 0, 0, 40, 30)


@pytest.mark.parametrize("size", [(200, 180), (21, 300)])
@pytest.mark.parametrize("with_lesion", [True, False])
def test_the_picture_is_a_png_that_shows_bands_and_errors(tmp_path, size, with_lesion):
    lesion = empty(*size)
    lesion[4:20, 16:48] = with_lesion
    missed, wrong = torch.zeros(size), (~lesion).float()
    criterion = CombinedExudateLoss(0.02, 0.1, edge=PatchEdgeContrastLoss(inner_radius=5, outer_radius=4))
    predicted, f1 = {"one": [missed], "other": [wrong], "third": [missed]}, {"one": 0.0, "other": 0.1, "third": 0.2}
    picture.write_picture(tmp_path / "drawn.png", [sample_of(lesion)], predicted, f1, criterion)
    with Image.open(tmp_path / "drawn.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    # A legend's field has fewer pixels.
    many = {tuple(colour) for colour, count in zip(colours.tolist(), counts, strict=True) if count > 1000}
    for colour in (picture.MISSED, picture.INNER, picture.OUTER):
        assert (rgb(colour) in many) == with_lesion
    assert rgb(picture.FALSE) in many


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_only_what_has_a_weight_is_drawn(tmp_path, alpha, beta):
    lesion = empty(64, 64)
    lesion[8:40, 8:40] = True
    predicted = {"one": [lesion.float()], "other": [lesion.float()]}
    picture.write_picture(
        tmp_path / "drawn.png",
        [sample_of(lesion)],
        predicted,
        {"one": 1.0, "other": 1.0},
        CombinedExudateLoss(alpha, beta),
    )
    with Image.open(tmp_path / "drawn.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    for colour, weight in ((picture.DENSE, alpha), (picture.INNER, beta), (picture.OUTER, beta)):
        assert (rgb(colour) in colours) == bool(weight)


def test_a_picture_of_radii_by_density_is_refused(tmp_path):
    edge = PatchEdgeContrastLoss(inner_radius=(1, 2), density_threshold=0.5)
    sample = sample_of(empty(32, 32))
    with pytest.raises(ValueError, match="one radius for all patches"):
        picture.write_picture(
            tmp_path / "drawn.png",
            [sample],
            {"one": [torch.zeros(32, 32)], "other": [torch.zeros(32, 32)]},
            {"one": 0.0, "other": 0.0},
            CombinedExudateLoss(0.02, 0.1, edge=edge),
        )
