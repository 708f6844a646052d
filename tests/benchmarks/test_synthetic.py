"""The drawn photographs are what their docstring says."""

import numpy as np
import pytest
import torch
from data import synthetic
from PIL import Image, ImageDraw
from scipy import ndimage


@pytest.fixture(scope="module")
def samples():
    return synthetic.fundus_samples(10, seed=3, stream=0)


def test_the_same_seed_draws_the_same_photographs(samples):
    again = synthetic.fundus_samples(2, seed=3, stream=0)
    for sample, other in zip(samples, again, strict=False):
        torch.testing.assert_close(sample.image, other.image, rtol=0, atol=0)
        torch.testing.assert_close(sample.lesion, other.lesion, rtol=0, atol=0)


@pytest.mark.parametrize(("seed", "stream"), [(4, 0), (3, 1)])
def test_another_seed_or_stream_draws_other_photographs(samples, seed, stream):
    (other,) = synthetic.fundus_samples(1, seed=seed, stream=stream)
    assert not torch.equal(samples[0].image, other.image)
    assert not torch.equal(samples[0].lesion, other.lesion)


def test_every_fifth_eye_is_healthy_and_the_others_are_not(samples):
    assert [bool(sample.lesion.any()) for sample in samples] == 2 * [True, True, True, True, False]


def test_lesions_cover_a_few_percent_at_most(samples):
    for sample in samples:
        assert sample.image.shape == (3, synthetic.SIDE, synthetic.SIDE)
        assert sample.lesion.float().mean() < 0.05


def test_the_surround_is_black_and_without_lesion(samples):
    y, x = np.mgrid[: synthetic.SIDE, : synthetic.SIDE] - (synthetic.SIDE - 1) / 2
    outside = torch.from_numpy(np.hypot(y, x) > synthetic.SIDE / 2)
    for sample in samples:
        assert sample.image[:, outside].float().mean() < 10
        assert not sample.lesion[outside].any()


def test_exudates_are_brighter_than_what_is_around_them(samples):
    for sample in samples:
        lesion = sample.lesion.numpy()
        if lesion.any():
            around = ndimage.binary_dilation(lesion, iterations=8) & ~ndimage.binary_dilation(lesion, iterations=4)
            green = sample.image[1].float().numpy()
            assert green[lesion].mean() > green[around].mean() + 10


@pytest.mark.parametrize("across", [1, 2.5, 7, 30])
def test_an_exudate_is_at_most_as_wide_as_asked_and_at_least_a_pixel(across):
    for seed in range(20):
        canvas = Image.new("L", (64, 64))
        synthetic._draw_exudate(ImageDraw.Draw(canvas), (31.7, 30.2), across, np.random.default_rng(seed))
        rows, columns = np.nonzero(np.asarray(canvas))
        assert 1 <= max(np.ptp(rows) + 1, np.ptp(columns) + 1) <= across + 1  # corners are rounded to pixels
