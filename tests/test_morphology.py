"""Laws of dilation and of the contour bands; scipy.ndimage is the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from strategies import FOOTPRINTS, masks

from contrastive_exudate_loss import PatchEdgeContrastLoss, morphology
from contrastive_exudate_loss.morphology import dilation, inner_contour, outer_contour
from contrastive_exudate_loss.patches import patch_sides

radii = st.integers(0, 6)
footprints = st.sampled_from(FOOTPRINTS)
WAYS = {"any": dilation, "shifted": morphology._shifted, "pooled": morphology._pooled}


def scipy_dilation(mask, radius, footprint):
    """Each (H, W) image of a mask, dilated by scipy; iterations=0 would mean until nothing changes."""
    mask = mask.numpy()
    if radius == 0:
        return mask
    structure = ndimage.generate_binary_structure(2, 2 if footprint == "square" else 1)
    images = [ndimage.binary_dilation(image, structure, radius) for image in mask.reshape(-1, *mask.shape[-2:])]
    return np.stack(images).reshape(mask.shape)


@pytest.mark.parametrize("way", WAYS)
@given(masks(), radii, footprints)
def test_dilation_equals_scipy(way, mask, radius, footprint):
    dilated = WAYS[way](mask.bool(), radius, footprint)
    assert dilated.dtype == torch.bool
    np.testing.assert_array_equal(dilated.numpy(), scipy_dilation(mask.bool(), radius, footprint))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("footprint", FOOTPRINTS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3), (2, 1, 2, 3)], ids=str)
def test_masks_may_have_any_leading_axes(way, footprint, leading):
    mask = torch.rand(*leading, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.1
    dilated = WAYS[way](mask, 2, footprint)
    np.testing.assert_array_equal(dilated.numpy(), scipy_dilation(mask, 2, footprint))


@pytest.mark.parametrize(("device", "other_way"), [("cpu", "_pooled"), ("meta", "_shifted")])
def test_the_cpu_shifts_copies_and_other_devices_pool(device, other_way, monkeypatch):
    monkeypatch.setattr(morphology, other_way, None)
    mask = torch.zeros(1, 5, 5, dtype=torch.bool, device=device)
    assert dilation(mask, 1, "square").shape == mask.shape


@given(masks(ignored=True), radii, footprints)
def test_contours_equal_scipy(mask, radius, footprint):
    lesion, background = mask == 1, mask == 0
    inner = inner_contour(lesion, background, radius, footprint)
    outer = outer_contour(lesion, background, radius, footprint)
    np.testing.assert_array_equal(inner, lesion.numpy() & scipy_dilation(background, radius, footprint))
    np.testing.assert_array_equal(outer, background.numpy() & scipy_dilation(lesion, radius, footprint))


@given(masks(), radii, footprints)
def test_inner_contour_is_what_erosion_removes(mask, radius, footprint):
    lesion = mask.bool()
    kept = lesion & ~inner_contour(lesion, ~lesion, radius, footprint)
    np.testing.assert_array_equal(kept, ~scipy_dilation(~lesion, radius, footprint) & lesion.numpy())
    assert (kept <= lesion).all()
    assert (lesion <= dilation(lesion, radius, footprint)).all()


@given(masks(), radii, radii, footprints)
def test_dilations_add_up(mask, first, second, footprint):
    once = dilation(mask.bool(), first + second, footprint)
    twice = dilation(dilation(mask.bool(), first, footprint), second, footprint)
    assert torch.equal(once, twice)


@given(masks(), radii, footprints)
def test_dilation_leaves_its_input_alone(mask, radius, footprint):
    mask = mask.bool()
    before = mask.clone()
    dilation(mask, radius, footprint)
    assert torch.equal(mask, before)


@given(masks(), st.integers(1, 4), st.integers(1, 4), footprints, st.integers(1, 9))
def test_isolated_bands_equal_scipy_patch_by_patch(mask, inner_radius, outer_radius, footprint, side):
    loss = PatchEdgeContrastLoss(
        side, inner_radius=inner_radius, outer_radius=outer_radius, footprint=footprint, isolate_patches=True
    )
    inner, outer = loss._regions(mask, patch_sides(*mask.shape[2:], side, None)).masks
    structure = ndimage.generate_binary_structure(2, 2 if footprint == "square" else 1)
    for index in np.ndindex(*mask.shape[:2]):
        for top in range(0, mask.shape[2], side):
            for left in range(0, mask.shape[3], side):
                at = (*index, slice(top, top + side), slice(left, left + side))
                patch = mask[at].bool().numpy()
                eroded = ndimage.binary_erosion(patch, structure, inner_radius, border_value=0)
                inner_band = patch & ~eroded if not patch.all() else np.zeros_like(patch)
                dilated = ndimage.binary_dilation(patch, structure, outer_radius)
                np.testing.assert_array_equal(inner[at], inner_band)
                np.testing.assert_array_equal(outer[at], dilated & ~patch)


def test_docstring_pictures():
    """The pictures in the docstrings are what the functions draw."""

    def picture(mask):
        return [" ".join(".#"[int(value)] for value in row) for row in mask.tolist()]

    def drawn(function):
        lines = [line.strip() for line in function.__doc__.splitlines() if line.strip()[:1] in (".", "#")]
        return [[part.strip() for part in line.replace("->", "  ").split("   ") if part.strip()] for line in lines]

    dot = torch.zeros(5, 5, dtype=torch.bool)
    dot[2, 2] = True
    square = dilation(dot, 1, "square")
    for function, wanted in {
        dilation: [dot, square, dilation(dot, 1, "cross")],
        inner_contour: [square, inner_contour(square, ~square, 1, "cross")],
        outer_contour: [square, outer_contour(square, ~square, 1, "cross")],
    }.items():
        assert drawn(function) == [list(row) for row in zip(*map(picture, wanted), strict=True)]
