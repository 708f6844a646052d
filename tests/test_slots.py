"""Laws of how patches lie over feature cells; what is pooled by them is in test_pooling."""

import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from contrastive_exudate_loss import slots


@pytest.mark.parametrize(
    ("pixels", "cells", "side", "as_they_are"),
    [
        (16, 16, 5, True),
        (16, 4, 8, True),
        (12, 4, 3, True),
        (18, 6, 12, True),
        (16, 4, 6, False),  # a cell in two patches
        (16, 2, 4, False),
        (20, 7, 20, False),  # no stride
        (20, 40, 4, False),
    ],
)
def test_features_are_read_as_they_are_where_each_cell_is_whole_and_in_one_patch(pixels, cells, side, as_they_are):
    assert (slots._axis(pixels, cells, side, torch.device("cpu")).cell is None) == as_they_are


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
@example(20, 7, 5)
@example(16, 4, 6)
def test_a_patch_has_as_many_slots_as_the_most_cells_that_one_touches(pixels, cells, side):
    side = min(side, pixels)
    axis = slots._axis(pixels, cells, side, torch.device("cpu"))
    cell = reference.cells(pixels, cells)
    most = max(len(set(cell[start : start + side])) for start in range(0, pixels, side))
    if cells <= pixels:  # or there are cells between, which no pixel touches
        assert axis.slots == most
    assert axis.slots >= most
