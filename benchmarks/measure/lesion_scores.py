"""How well a prediction finds the lesions of a photograph: counts per photograph, and metrics of any set of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
SMALL = 25  # pixels; a component with fewer is a small lesion
NEAR = 2  # pixels, Euclidean: how far a predicted boundary may lie from the true one
FAR = 8  # pixels, Euclidean: from which distance to all lesions an error is no matter of their outline
# Pixels of a lesion, from which on it belongs to the next size.
SIZES = (1, 10, 25, 100)
OVERLAP = 0.1  # of the union of two components, from which one finds the other
# Of the probability, for f1_by_threshold: logits from -8 to 8 in quarters, so that none of interest lies at an end.
THRESHOLDS = tuple(1 / (1 + math.exp(-n / 4)) for n in range(-32, 33))
FIRST_THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 20))  # those of the first runs
EIGHT = np.ones((3, 3), bool)  # neighbours that are connected


def counts(predicted: Array, lesion: Array, disc: Array) -> dict[str, int]:
    """What metrics are made of, for one photograph and lesion.

    Args:
        predicted: (H, W), bool.
        lesion: (H, W), bool.
        disc: (H, W), bool: the optic disc.

    Returns:
        tp, fp, fn: pixels.
        lesions: components of the lesion mask, 8-connected.
        lesions_touched, lesions_overlapped: those that a predicted pixel touches, and those that share OVERLAP of their
            union with a predicted component.
        small, small_found, small_overlapped: likewise of lesions under SMALL pixels.
        predicted_lesions, predicted_touched, predicted_overlapped: likewise of the prediction's components.
        predicted_small, predicted_small_touched, predicted_small_overlapped: likewise of those under SMALL pixels.
        edge, edge_near: boundary pixels of the lesions, and those within NEAR of a predicted boundary pixel.
        predicted_edge, predicted_edge_near: likewise of the prediction.
        disc_fp: false positives inside the optic disc.
    """
    true, found = _components(lesion, predicted)
    edge, predicted_edge = _boundary(lesion), _boundary(predicted)
    wrong = predicted & ~lesion
    return {
        "tp": int((predicted & lesion).sum()),
        "fp": int(wrong.sum()),
        "fn": int((lesion & ~predicted).sum()),
        "lesions": len(true.small),
        "lesions_touched": int(true.touched.sum()),
        "lesions_overlapped": int(true.overlapped.sum()),
        "small": int(true.small.sum()),
        "small_found": int((true.touched & true.small).sum()),
        "small_overlapped": int((true.overlapped & true.small).sum()),
        "predicted_lesions": len(found.small),
        "predicted_touched": int(found.touched.sum()),
        "predicted_overlapped": int(found.overlapped.sum()),
        "predicted_small": int(found.small.sum()),
        "predicted_small_touched": int((found.touched & found.small).sum()),
        "predicted_small_overlapped": int((found.overlapped & found.small).sum()),
        "edge": int(edge.sum()),
        "edge_near": int((edge & _near(predicted_edge)).sum()),
        "predicted_edge": int(predicted_edge.sum()),
        "predicted_edge_near": int((predicted_edge & _near(edge)).sum()),
        "disc_fp": int((wrong & disc).sum()),
    }


def error_counts(predicted: Array, lesion: Array) -> dict[str, int]:
    """Where the wrong pixels of one photograph lie, and which lesions are found.

    Args:
        predicted: (H, W), bool.
        lesion: (H, W), bool.

    Returns:
        lesion: pixels.
        fp_near, fp_between, fp_far: false positives within NEAR of a lesion, up to FAR, and beyond.
        fn_near, fn_inside: false negatives within NEAR of the background, and deeper, in lesions that are touched.
        fn_missed: pixels of lesions that no predicted pixel touches.
        lesions_N, touched_N: lesions of N pixels and more, N of SIZES, below the next; and those touched.
    """
    wrong, missing = predicted & ~lesion, lesion & ~predicted
    # From each pixel to the nearest lesion, and from each pixel of a lesion to the background.
    outside, depth = (
        np.full(lesion.shape, np.inf) if mask.all() else ndimage.distance_transform_edt(mask)
        for mask in (~lesion, lesion)
    )
    labels, number = ndimage.label(lesion, EIGHT)
    touched = np.isin(np.arange(number + 1), labels[predicted & lesion])
    missed = lesion & ~touched[labels]
    sizes = np.digitize(np.bincount(labels.ravel(), minlength=number + 1)[1:], SIZES)
    return {
        "lesion": int(lesion.sum()),
        "fp_near": int((wrong & (outside <= NEAR)).sum()),
        "fp_between": int((wrong & (outside > NEAR) & (outside <= FAR)).sum()),
        "fp_far": int((wrong & (outside > FAR)).sum()),
        "fn_near": int((missing & ~missed & (depth <= NEAR)).sum()),
        "fn_inside": int((missing & ~missed & (depth > NEAR)).sum()),
        "fn_missed": int(missed.sum()),
        **{f"lesions_{size}": int((sizes == n + 1).sum()) for n, size in enumerate(SIZES)},
        **{f"touched_{size}": int((touched[1:] & (sizes == n + 1)).sum()) for n, size in enumerate(SIZES)},
    }


def f1_by_threshold(
    probability: npt.NDArray[np.float32], lesion: Array, thresholds: Sequence[float] = THRESHOLDS
) -> list[float]:
    """F1 of one photograph's pixels with a probability above each of rising thresholds; both (H, W)."""
    passed = np.searchsorted(np.asarray(thresholds, np.float32), probability.ravel())  # so many of them lie below it
    above = [
        np.cumsum(np.bincount(pixels, minlength=len(thresholds) + 1)[::-1])[-2::-1]
        for pixels in (passed, passed[lesion.ravel()])
    ]
    found: list[float] = _ratio(2 * above[1], above[0] + lesion.sum()).tolist()
    return found


def by_lesion(photographs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, int]]]:
    """The counts of each lesion's photographs, lesions in the order in which they come, from counts with "lesion"."""
    found: dict[str, list[dict[str, int]]] = {}
    for photograph in photographs:
        numbers = {name: value for name, value in photograph.items() if isinstance(value, int)}
        found.setdefault(photograph["lesion"], []).append(numbers)
    return list(found.values())


def metrics(photographs: Sequence[Mapping[str, int]], times: npt.ArrayLike | None = None) -> dict[str, Floats]:
    """Metrics of some photographs' counts, 0 to 1 but for disc_fp; a mean is over photographs with a lesion.

    Args:
        photographs: N of them.
        times: (..., N), how often each counts, one of them at least; None for once.

    Returns:
        Of shape (...) each:
        f1, iou: means of each photograph's.
        f1_pixels, iou_pixels: over all pixels together.
        small_recall: share of all small lesions that are touched.
        lesion_recall, lesion_precision, lesion_f1: of all components, one that is overlapped being found; with
            _touched behind the name by one pixel, with small_ before it those under SMALL pixels alone (where the
            other component may be of any size). Not of counts without them.
        boundary_f1: mean of each photograph's.
        disc_fp: false positive pixels inside the optic disc, per photograph.
    """
    weights = np.ones(len(photographs)) if times is None else np.asarray(times, float)
    each = {name: np.array([p[name] for p in photographs], float) for name in photographs[0]}
    total = {name: weights @ values for name, values in each.items()}
    shown = each["tp"] + each["fn"] > 0

    def mean(values: Floats) -> Floats:
        return _ratio(weights @ (values * shown), weights @ shown)

    return {
        "f1": mean(_f1(each)),
        "iou": mean(_iou(each)),
        "f1_pixels": _f1(total),
        "iou_pixels": _iou(total),
        "small_recall": _ratio(total["small_found"], total["small"]),
        "boundary_f1": mean(_boundary_f1(each)),
        "disc_fp": total["disc_fp"] / weights.sum(-1),
        **(_component_metrics(total) if "lesions" in total else {}),
    }


class _Components(NamedTuple):
    """Of each component of a mask, (N,) bool: under SMALL pixels, touched, and overlapped by one of the other mask."""

    small: Array
    touched: Array
    overlapped: Array


def _components(mask: Array, other: Array) -> tuple[_Components, _Components]:
    """The components of both masks, each beside those of the other."""
    labels, numbers = zip(*(ndimage.label(one, EIGHT) for one in (mask, other)), strict=True)
    sizes = [np.bincount(one.ravel(), minlength=n + 1) for one, n in zip(labels, numbers, strict=True)]
    both = mask & other
    met, shared = np.unique(np.stack([one[both] for one in labels]), axis=1, return_counts=True)
    alike = shared >= OVERLAP * (sizes[0][met[0]] + sizes[1][met[1]] - shared)
    found = []
    for own, number, size in zip(met, numbers, sizes, strict=True):
        flags = np.zeros((2, number + 1), bool)
        flags[0, own] = flags[1, own[alike]] = True
        found.append(_Components(size[1:] < SMALL, *flags[:, 1:]))
    return found[0], found[1]


def _component_metrics(total: Mapping[str, Floats]) -> dict[str, Floats]:
    found = {}
    for small, true in (("", "lesions"), ("small_", "small")):
        predicted = f"predicted_{true}"
        for suffix in ("overlapped", "touched"):
            of_true = "small_found" if (true, suffix) == ("small", "touched") else f"{true}_{suffix}"
            of_predicted = f"predicted_{small}{suffix}"
            recall = _ratio(total[of_true], total[true])
            precision = _ratio(total[of_predicted], total[predicted])
            end = "_touched" if suffix == "touched" else ""
            found[f"{small}lesion_recall{end}"] = recall
            found[f"{small}lesion_precision{end}"] = precision
            found[f"{small}lesion_f1{end}"] = _ratio(2 * precision * recall, precision + recall)
    return found


def _f1(p: Mapping[str, Floats]) -> Floats:
    return _ratio(2 * p["tp"], 2 * p["tp"] + p["fp"] + p["fn"])


def _iou(p: Mapping[str, Floats]) -> Floats:
    return _ratio(p["tp"], p["tp"] + p["fp"] + p["fn"])


def _boundary_f1(p: Mapping[str, Floats]) -> Floats:
    recall, precision = _ratio(p["edge_near"], p["edge"]), _ratio(p["predicted_edge_near"], p["predicted_edge"])
    return _ratio(2 * precision * recall, precision + recall)


def _ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> Floats:
    """Their quotient, 0 where the whole is 0."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.asarray(np.divide(part, whole, out=np.zeros(whole.shape), where=whole != 0))


def _boundary(mask: Array) -> Array:
    return np.asarray(mask & ~ndimage.binary_erosion(mask, EIGHT, border_value=1))


def _near(edge: Array) -> Array:
    if not edge.any():
        return np.zeros_like(edge)
    return np.asarray(ndimage.distance_transform_edt(~edge) <= NEAR)
