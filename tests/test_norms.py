"""The identity that records the norm of the gradient which passes through it."""

import math

import pytest
import torch

from contrastive_exudate_loss.norms import COUNT, Recorded


def passed_back(record, gradient, *, counts=True, divisor=None, passes=None):
    """The gradient of a tensor behind the identity, whose norm goes to place 1 of the record."""
    tensor = torch.zeros(gradient.shape, dtype=gradient.dtype, requires_grad=True)
    given = None if passes is None else torch.tensor(passes)
    same = Recorded.apply(tensor, record, 1, counts, divisor, given)
    assert torch.equal(same, tensor)
    same.backward(gradient)
    return tensor.grad


def test_each_backward_pass_writes_its_norm_and_is_counted():
    record = torch.zeros(3)
    for n, gradient in enumerate((torch.tensor([3.0, 4.0]), torch.tensor([5.0, 12.0])), 1):
        assert torch.equal(passed_back(record, gradient), gradient)
        assert record.tolist() == [n, float(gradient.norm()), 0]
        assert record[COUNT] == n


def test_one_that_does_not_count_leaves_the_count():
    record = torch.zeros(3)
    passed_back(record, torch.tensor([3.0, 4.0]), counts=False)
    assert record.tolist() == [0, 5, 0]


def test_the_norm_is_divided_and_the_gradient_is_not():
    record = torch.zeros(2)
    gradient = torch.tensor([3.0, 4.0])
    assert torch.equal(passed_back(record, gradient, divisor=torch.tensor(2.0)), gradient)
    assert record[1] == 2.5


@pytest.mark.parametrize("value", [3.0, math.inf, math.nan])
def test_a_gradient_that_does_not_pass_is_0_even_where_it_overflowed(value):
    record = torch.zeros(2)
    assert torch.equal(passed_back(record, torch.tensor([value, 4.0]), passes=False), torch.zeros(2))
    assert record[1] == (5 if value == 3 else pytest.approx(value, nan_ok=True))


@pytest.mark.parametrize("value", [2.0**-20, 2.0**15])
def test_in_half_precision_the_norm_neither_vanishes_nor_overflows(value):
    record = torch.zeros(2)
    passed_back(record, torch.full((16,), value, dtype=torch.float16))
    assert record[1] == 4 * value
