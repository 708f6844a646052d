"""The documentation's figures show what the package computes."""

import importlib
from pathlib import Path

import pytest
import torch

from contrastive_exudate_loss.morphology import FOOTPRINTS, inner_contour, outer_contour


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "docs"))
    module = importlib.import_module("figures")
    monkeypatch.setattr(module, "PHOTOGRAPHS", 3)
    module._photographs.cache_clear()
    yield module
    module._photographs.cache_clear()


def test_every_figure_is_written_for_both_pages_with_the_same_bytes_each_time(figures, tmp_path):
    for folder in ("one", "two"):
        figures.write_figures(tmp_path / folder)
        figures._photographs.cache_clear()
    names = ("bands", "contrast", "patches", "pooling", "problem")
    assert sorted(path.stem for path in (tmp_path / "one").iterdir()) == sorted(
        f"{name}-{page}" for name in names for page in ("light", "dark")
    )
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_shares_of_all_sizes_sum_to_one_and_small_lesions_have_less_of_the_pixels(figures):
    lesions, pixels = figures.shares_by_size()
    for shares in (lesions, pixels):
        torch.testing.assert_close(float(shares.sum()), 1.0)
    assert lesions[0] > pixels[0]
    assert lesions[-1] < pixels[-1]


@pytest.mark.parametrize("footprint", FOOTPRINTS)
@pytest.mark.parametrize("band", [inner_contour, outer_contour])
def test_a_cell_weighs_as_much_as_it_has_pixels_of_the_band(figures, band, footprint):
    mask = band(figures.lesion(), ~figures.lesion(), 2, footprint)
    weights = figures.cell_weights(mask, 4)
    assert weights.sum() == mask.sum()
    for row in range(6):
        for column in range(6):
            assert weights[row, column] == mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum()


def test_the_steps_bring_every_vector_closer_to_its_own_label_than_to_the_other(figures):
    vectors, labels, loss = figures.contrasted(figures.STEPS)
    similarity, equal = vectors @ vectors.T, labels[:, None] == labels
    assert similarity[equal].min() > similarity[~equal].max()
    before, _, loss_before = figures.contrasted(0)
    assert (before @ before.T)[equal].min() < (before @ before.T)[~equal].max()
    assert loss < loss_before
