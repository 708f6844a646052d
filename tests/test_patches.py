"""Laws of the patch grid, the lesion fractions and the cutting of patches."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks

from contrastive_exudate_loss.patches import (
    at_pixels,
    cut_patches,
    lesion_fraction,
    paste_patches,
    patch_counts,
    patch_sides,
)

lengths = st.integers(1, 40)


@given(lengths, lengths, st.integers(1, 50), st.booleans())
def test_patch_sides_cut_the_axes_as_the_reference_does(height, width, number, is_size):
    patch_size, num_patches = (number, None) if is_size else (None, number)
    sides = patch_sides(height, width, patch_size, num_patches)
    for size, side in zip((height, width), sides, strict=True):
        assert side == len(reference.ranges(size, patch_size, num_patches)[0])


def test_paper_readings_of_16_x_16_coincide():
    assert patch_sides(256, 256, 16, None) == patch_sides(256, 256, None, 16) == patch_sides(256, 256, None, None)


@given(masks(), st.integers(1, 9), st.integers(1, 9))
def test_patch_counts_equal_loops(mask, height, width):
    sides = min(height, mask.shape[2]), min(width, mask.shape[3])
    counts = patch_counts(mask.bool(), sides)
    for b, k, y, x in torch.cartesian_prod(*map(torch.arange, counts.shape)).reshape(-1, 4).tolist():
        rows = range(y * sides[0], min((y + 1) * sides[0], mask.shape[2]))
        columns = range(x * sides[1], min((x + 1) * sides[1], mask.shape[3]))
        assert counts[b, k, y, x] == sum(int(mask[b, k, i, j]) for i in rows for j in columns)
    assert counts.sum() == mask.sum()


@given(st.integers(1, 2**24), st.integers(0, 2**24), st.floats(0, 1, exclude_max=True))
def test_lesion_fraction_compares_like_python(valid, lesion, threshold):
    lesion = min(lesion, valid)
    fraction = lesion_fraction(torch.tensor(lesion), torch.tensor(valid))
    assert (fraction > threshold).item() == (lesion / valid > threshold)


def test_an_exact_fraction_is_not_above_its_threshold():
    assert any(n > n / 100 * 100 for n in range(100))  # as 29 > 0.29 * 100 is
    for n in range(1, 100):
        fraction = lesion_fraction(torch.tensor(n), torch.tensor(100))
        assert not fraction > n / 100
        assert fraction > math.nextafter(n / 100, 0)


def test_a_patch_without_valid_pixels_has_fraction_0():
    assert lesion_fraction(torch.tensor(0), torch.tensor(0)) == 0


@given(masks(), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2), st.booleans())
def test_paste_undoes_cut(mask, height, width, margin, fill):
    options = {"margin": margin} if margin else {}
    cut = cut_patches(mask.bool(), (height, width), fill=fill, **options)
    assert cut.shape[-2:] == (height + 2 * margin, width + 2 * margin)
    assert torch.equal(paste_patches(cut, mask.shape[-2:], **options), mask.bool())


@given(masks(), st.integers(1, 9), st.integers(0, 2))
def test_cut_fills_all_that_is_not_image(mask, side, margin):
    fulls = [cut_patches(mask.bool(), (side, side), fill=fill, margin=margin) for fill in (False, True)]
    filled = (fulls[0] != fulls[1]).sum()
    assert filled == fulls[0].numel() - mask.numel()


@given(masks(), st.integers(1, 9), st.integers(1, 9))
def test_at_pixels_gives_each_pixel_its_patch(mask, height, width):
    size = mask.shape[-2:]
    grid = -(-size[0] // height), -(-size[1] // width)
    values = torch.arange(grid[0] * grid[1]).reshape(1, 1, *grid)
    spread = at_pixels(values, (height, width), size)
    for i, j in [(0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 2)]:
        assert spread[0, 0, i, j] == (i // height) * grid[1] + j // width
    assert spread.shape[-2:] == size


def test_a_device_without_float64_divides_on_the_cpu():
    class Counts:
        """Stands for counts on a device that nothing here has; remembers where it was told to divide."""

        def __init__(self):
            self.device = torch.device("mps")

        def to(self, device, dtype=torch.int64):
            return torch.tensor(3, device=device, dtype=dtype)

    assert lesion_fraction(Counts(), Counts()).device.type == "cpu"


@pytest.mark.parametrize(("lesion", "valid", "wanted"), [(1, 1, 1.0), (0, 1, 0.0), (1, 2, 0.5), (0, 0, 0.0)])
def test_a_patch_of_one_valid_pixel_is_all_lesion_or_none(lesion, valid, wanted):
    assert lesion_fraction(torch.tensor([lesion]), torch.tensor([valid])).tolist() == [wanted]
