"""The losses of single lesions equal their definitions, written as loops over lesions and pixels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trials.instances import blob_loss, cell_loss
from trials.objective import SUPERVISED


def components(mask):
    """Sets of (row, column), 8-connected."""
    left, found = {tuple(place) for place in mask.nonzero().tolist()}, []
    while left:
        component, new = set(), {left.pop()}
        while new:
            component |= new
            new = {(r + i, c + j) for r, c in new for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= new
        found.append(component)
    return found


def dice_and_bce(logits, lesion, places):
    """Of the pixels in places, with those in lesion as the truth."""
    found = marked = entropy = 0.0
    for place in places:
        x = logits[place].item()
        p = 1 / (1 + math.exp(-x))
        found += p * (place in lesion)
        marked += p
        entropy -= math.log(p if place in lesion else 1 - p)
    return 1 - 2 * found / (marked + len(lesion)) + entropy / len(places)


def everywhere(mask):
    return [(r, c) for r in range(mask.shape[0]) for c in range(mask.shape[1])]


def distance(place, component):
    return min(math.dist(place, other) for other in component)


def cells(logits, mask):
    """Loss of the Voronoi cell of each lesion; of the whole image without one."""
    lesions = components(mask)
    if not lesions:
        return [dice_and_bce(logits, set(), everywhere(mask))]
    nearest = {place: min(range(len(lesions)), key=lambda n: distance(place, lesions[n])) for place in everywhere(mask)}
    return [
        dice_and_bce(logits, lesion, [place for place, number in nearest.items() if number == n])
        for n, lesion in enumerate(lesions)
    ]


def blobs(logits, mask):
    """Loss of each lesion with the others left out."""
    lesions = components(mask)
    return [
        dice_and_bce(logits, lesion, [place for place in everywhere(mask) if place in lesion or not mask[place]])
        for lesion in lesions
    ]


def mean(values):
    return sum(values) / len(values)


def tied(place, lesions):
    near = sorted(distance(place, lesion) for lesion in lesions)
    return len(near) > 1 and near[0] == near[1]


@st.composite
def images(draw, ties=False):
    """Logits and a target of two images, either of which may be without lesions.

    ties: whether a pixel may be as far from one lesion as from another, so that two cells may have it.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    share = draw(st.sampled_from([0.02, 0.1, 0.4]))
    target = (torch.rand(2, 1, 9, 8, generator=generator) < share).double()
    for mask in target[:, 0]:
        lesions = components(mask)
        while not ties and any(tied(place, lesions) for place in everywhere(mask)):
            for place in lesions.pop():
                mask[place] = 0
    return torch.randn(2, 1, 9, 8, generator=generator, dtype=torch.float64), target


@given(images())
def test_the_loss_of_cells_is_that_of_loops(case):
    logits, target = case
    wanted = mean([mean(cells(*own)) for own in zip(logits[:, 0], target[:, 0], strict=True)])
    assert cell_loss(logits, target).item() == pytest.approx(wanted)


@given(images(ties=True))
def test_the_loss_of_blobs_is_that_of_loops(case):
    logits, target = case
    each = [blobs(*own) for own in zip(logits[:, 0], target[:, 0], strict=True)]
    wanted = [mean(own) for own in each if own]
    assert blob_loss(logits, target).item() == pytest.approx(mean(wanted) if wanted else 0)


@pytest.mark.parametrize("loss", [cell_loss, blob_loss])
@settings(max_examples=10)
@given(case=images())
def test_gradients_are_those_of_finite_differences(loss, case):
    logits, target = case
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


@pytest.mark.parametrize("loss", [cell_loss, blob_loss])
def test_to_miss_a_large_lesion_costs_little_more_than_to_miss_a_small_one(loss):
    target = torch.zeros(1, 1, 16, 32)
    target[0, 0, 2:14, 2:14] = 1
    target[0, 0, 7:9, 23:25] = 1
    without_large, without_small = (torch.where(target == 1, 3.0, -3.0) for _ in range(2))
    without_large[..., :16] = without_small[..., 16:] = -3

    def ratio(loss):
        return loss(without_large, target) / loss(without_small, target)

    assert 1 <= ratio(loss) < ratio(SUPERVISED["dice + bce"]()) / 4


@pytest.mark.parametrize("loss", [cell_loss, blob_loss])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_batch_of_one_kind_has_finite_gradients(loss, value):
    logits = torch.zeros(2, 1, 6, 6, requires_grad=True)
    loss(logits, torch.full_like(logits, value).detach()).backward()
    assert logits.grad.isfinite().all()
