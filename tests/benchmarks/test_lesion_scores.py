"""The study's counts are those of loops over pixels; its metrics those of torchmetrics where that has them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measure.lesion_scores import (
    FAR,
    NEAR,
    OVERLAP,
    SIZES,
    SMALL,
    THRESHOLDS,
    counts,
    error_counts,
    f1_by_threshold,
    metrics,
)
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


def overlapping(part, others):
    """Whether one of the others shares a tenth of its union with the part."""
    return any(len(part & other) >= OVERLAP * len(part | other) for other in others)


def close(pixels, others):
    return sum(any((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= NEAR**2 for q in others) for p in pixels)


@given(cases())
def test_counts_equal_loops_over_pixels(case):
    predicted, lesion, disc = case
    got = counts(predicted, lesion, disc)
    pixels, found = (set(zip(*mask.nonzero(), strict=True)) for mask in (lesion, predicted))
    lesions, predictions = components(pixels), components(found)
    small, predicted_small = ([part for part in parts if len(part) < SMALL] for parts in (lesions, predictions))
    edge, predicted_edge = boundary(lesion), boundary(predicted)
    assert got == {
        "tp": len(pixels & found),
        "fp": len(found - pixels),
        "fn": len(pixels - found),
        "lesions": len(lesions),
        "lesions_touched": sum(bool(part & found) for part in lesions),
        "lesions_overlapped": sum(overlapping(part, predictions) for part in lesions),
        "small": len(small),
        "small_found": sum(bool(part & found) for part in small),
        "small_overlapped": sum(overlapping(part, predictions) for part in small),
        "predicted_lesions": len(predictions),
        "predicted_touched": sum(bool(part & pixels) for part in predictions),
        "predicted_overlapped": sum(overlapping(part, lesions) for part in predictions),
        "predicted_small": len(predicted_small),
        "predicted_small_touched": sum(bool(part & pixels) for part in predicted_small),
        "predicted_small_overlapped": sum(overlapping(part, lesions) for part in predicted_small),
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
    lesion[2:5, 2:5] = lesion[10:18, 10:18] = True  # one small, one large
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


def test_a_blot_over_two_lesions_touches_both_and_finds_the_larger():
    lesion, nothing = np.zeros((2, 20, 20), bool)
    lesion[2:4, 2:4] = lesion[10:18, 2:10] = True  # 4 and 64 pixels
    blot = nothing.copy()
    blot[2:18, 2:12] = True  # 160 pixels
    got = metrics([counts(blot, lesion, nothing)])
    assert got["lesion_recall"] == 0.5
    assert got["lesion_recall_touched"] == got["lesion_precision"] == got["lesion_precision_touched"] == 1
    assert got["small_lesion_recall"] == 0
    assert got["small_lesion_recall_touched"] == 1
    assert got["lesion_f1"] == pytest.approx(2 / 3)


FIRST = (
    "tp",
    "fp",
    "fn",
    "small",
    "small_found",
    "edge",
    "edge_near",
    "predicted_edge",
    "predicted_edge_near",
    "disc_fp",
)


def test_counts_of_early_runs_give_the_metrics_that_they_can():
    lesion = np.eye(9, dtype=bool)
    new = counts(lesion, lesion, lesion)
    old = {name: new[name] for name in FIRST}
    assert metrics([old]).items() < metrics([new]).items()


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


@given(cases())
def test_errors_are_counted_where_loops_over_pixels_find_them(case):
    predicted, lesion, _ = case
    true, found, background = (set(zip(*mask.nonzero(), strict=True)) for mask in (lesion, predicted, ~lesion))

    def between(pixels, others, low, high):
        """How many of the pixels have a distance in (low, high] to the nearest of the others."""
        distances = [min((math.dist(p, q) for q in others), default=math.inf) for p in pixels]
        return sum(low < distance <= high for distance in distances)

    lesions = components(true)
    missed = set().union(*(part for part in lesions if not part & found))
    rest = true - found - missed
    wanted = {
        "lesion": len(true),
        "fp_near": between(found - true, true, 0, NEAR),
        "fp_between": between(found - true, true, NEAR, FAR),
        "fp_far": between(found - true, true, FAR, math.inf),
        "fn_near": between(rest, background, 0, NEAR),
        "fn_inside": between(rest, background, NEAR, math.inf),
        "fn_missed": len(missed),
    }
    for size, above in zip(SIZES, (*SIZES[1:], math.inf), strict=True):
        own = [part for part in lesions if size <= len(part) < above]
        wanted |= {f"lesions_{size}": len(own), f"touched_{size}": sum(bool(part & found) for part in own)}
    assert error_counts(predicted, lesion) == wanted
