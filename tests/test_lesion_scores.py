"""The study's counts are those of loops over pixels; its metrics those of torchmetrics where that has them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lesion_scores import NEAR, SMALL, THRESHOLDS, counts, f1_by_threshold, metrics
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index


@st.composite
def cases(draw):
    """A prediction, lesions and a disc, (H, W) bool each, any of them empty now and then."""
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    return [generator.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])) for _ in range(3)]


def neighbours(pixel, pixels):
    return [q for q in pixels if max(abs(pixel[0] - q[0]), abs(pixel[1] - q[1])) == 1]


def components(pixels):
    """Sets of pixels that hang together by sides and corners."""
    left, found = set(pixels), []
    while left:
        part, waiting = set(), [left.pop()]
        while waiting:
            pixel = waiting.pop()
            part.add(pixel)
            near = neighbours(pixel, left)
            left -= set(near)
            waiting += near
        found.append(part)
    return found


def boundary(mask):
    """Pixels of the mask with one outside it beside them, the image's border not counted."""
    pixels = set(zip(*mask.nonzero(), strict=True))
    others = set(zip(*(~mask).nonzero(), strict=True))
    return [pixel for pixel in pixels if neighbours(pixel, others)]


def close(pixels, others):
    return sum(any((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= NEAR**2 for q in others) for p in pixels)


@given(cases())
def test_counts_equal_loops_over_pixels(case):
    predicted, lesion, disc = case
    got = counts(predicted, lesion, disc)
    pixels, found = (set(zip(*mask.nonzero(), strict=True)) for mask in (lesion, predicted))
    small = [part for part in components(pixels) if len(part) < SMALL]
    edge, predicted_edge = boundary(lesion), boundary(predicted)
    assert got == {
        "tp": len(pixels & found),
        "fp": len(found - pixels),
        "fn": len(pixels - found),
        "small": len(small),
        "small_found": sum(bool(part & found) for part in small),
        "edge": len(edge),
        "edge_near": close(edge, predicted_edge),
        "predicted_edge": len(predicted_edge),
        "predicted_edge_near": close(predicted_edge, edge),
        "disc_fp": len((found - pixels) & set(zip(*disc.nonzero(), strict=True))),
    }


@given(st.lists(cases(), min_size=1, max_size=3))
def test_f1_and_iou_are_those_of_torchmetrics(images):
    got = metrics([counts(*image) for image in images])
    shown = [image for image in images if image[1].any()]
    pairs = [[torch.from_numpy(mask).int() for mask in image[:2]] for image in shown]
    everything = [torch.cat([torch.from_numpy(image[i]).flatten().int() for image in images]) for i in (0, 1)]
    for name, metric in (("f1", binary_f1_score), ("iou", binary_jaccard_index)):
        each = [float(metric(*pair)) for pair in pairs]
        assert got[name] == pytest.approx(np.mean(each) if each else 0)
        assert got[f"{name}_pixels"] == pytest.approx(float(metric(*everything)))


def test_a_perfect_prediction_scores_1_and_none_at_all_0():
    lesion = np.zeros((20, 20), bool)
    lesion[2:5, 2:5] = lesion[10:18, 10:18] = True
    nothing = np.zeros_like(lesion)
    for predicted, score in ((lesion, 1), (nothing, 0)):
        got = metrics([counts(predicted, lesion, nothing)])
        assert got == {**dict.fromkeys(got, score), "disc_fp": 0}


def test_a_boundary_may_lie_two_pixels_off():
    lesion = np.zeros((20, 20), bool)
    lesion[6:12, 6:12] = True
    scores = [metrics([counts(np.roll(lesion, shift, 0), lesion, lesion)])["boundary_f1"] for shift in (0, 2, 4)]
    assert scores[0] == scores[1] == 1
    assert scores[2] < 1


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 1.0]))
def test_f1_by_threshold_equals_torchmetrics(seed, share):
    generator = np.random.default_rng(seed)
    probability, lesion = generator.random((9, 7), np.float32), generator.random((9, 7)) < share
    wanted = [
        binary_f1_score(torch.from_numpy(probability), torch.from_numpy(lesion).int(), threshold).item()
        for threshold in THRESHOLDS
    ]
    assert f1_by_threshold(probability, lesion) == pytest.approx(wanted)


@given(st.lists(cases(), min_size=1, max_size=4), st.data())
def test_a_photograph_can_count_several_times(images, data):
    found = [counts(*image) for image in images]
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(found), max_size=len(found)).filter(any))
    wanted = metrics([photograph for photograph, n in zip(found, times, strict=True) for _ in range(n)])
    for name, got in metrics(found, [times, [1] * len(found)]).items():
        np.testing.assert_allclose(got, [wanted[name], metrics(found)[name]])
