"""The documentation's figures show what the package computes."""

import importlib
from pathlib import Path

import pytest
import torch

from contrastive_exudate_loss.morphology import inner_contour


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "docs"))
    module = importlib.import_module("figures")
    monkeypatch.setattr(module, "PHOTOGRAPHS", 3)
    drawn = module._photographs
    drawn.cache_clear()
    yield module
    drawn.cache_clear()


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


def test_shares_are_of_the_lesions_and_of_their_pixels(figures, monkeypatch):
    lesion = torch.zeros(40, 60, dtype=torch.bool)
    lesion[0, 0] = lesion[2, :9] = lesion[4, :10] = lesion[6, :29] = lesion[8, :30] = True
    lesion[10:20, 0:30] = True  # 300 pixels
    sample = figures.Sample("", torch.zeros(3, 40, 60), lesion)
    monkeypatch.setattr(figures, "_photographs", lambda: [sample])
    lesions, pixels = figures.shares_by_size()
    assert (6 * lesions).tolist() == pytest.approx([2, 2, 1, 0, 1])
    assert (379 * pixels).tolist() == pytest.approx([10, 39, 30, 0, 300])


def test_most_drawn_lesions_are_small_and_hold_few_of_the_pixels(figures, monkeypatch):
    monkeypatch.undo()  # all the photographs of the figure, as its caption says
    lesions, pixels = figures.shares_by_size()
    assert lesions[0] > 0.5
    assert pixels[0] < 0.1


def test_a_cell_weighs_as_much_as_it_has_pixels_of_the_band(figures):
    mask = inner_contour(figures.lesion(), ~figures.lesion(), 2, "square")
    weights = figures.cell_weights(mask, 4)
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
