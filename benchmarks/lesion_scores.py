"""How well a prediction finds the lesions of a photograph: counts per photograph, and metrics of any set of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
SMALL = 25  # pixels; a component with fewer is a small lesion
NEAR = 2  # pixels, Euclidean: how far a predicted boundary may lie from the true one
THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 20))  # of the probability, for f1_by_threshold
EIGHT = np.ones((3, 3), bool)  # neighbours that are connected


def counts(predicted: Array, lesion: Array, disc: Array) -> dict[str, int]:
    """What metrics are made of, for one photograph and lesion.

    Args:
        predicted: (H, W), bool.
        lesion: (H, W), bool.
        disc: (H, W), bool: the optic disc.

    Returns:
        tp, fp, fn: pixels.
        small, small_found: lesions under SMALL pixels (8-connected), and those that one predicted pixel touches.
        edge, edge_near: boundary pixels of the lesions, and those within NEAR of a predicted boundary pixel.
        predicted_edge, predicted_edge_near: likewise of the prediction.
        disc_fp: false positives inside the optic disc.
    """
    labels, number = ndimage.label(lesion, EIGHT)
    sizes = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    touched = np.bincount(labels[predicted], minlength=number + 1)[1:] > 0
    edge, predicted_edge = _boundary(lesion), _boundary(predicted)
    wrong = predicted & ~lesion
    return {
        "tp": int((predicted & lesion).sum()),
        "fp": int(wrong.sum()),
        "fn": int((lesion & ~predicted).sum()),
        "small": int((sizes < SMALL).sum()),
        "small_found": int((touched & (sizes < SMALL)).sum()),
        "edge": int(edge.sum()),
        "edge_near": int((edge & _near(predicted_edge)).sum()),
        "predicted_edge": int(predicted_edge.sum()),
        "predicted_edge_near": int((predicted_edge & _near(edge)).sum()),
        "disc_fp": int((wrong & disc).sum()),
    }


def f1_by_threshold(probability: npt.NDArray[np.float32], lesion: Array) -> list[float]:
    """F1 of one photograph's pixels with a probability above each of THRESHOLDS; both (H, W)."""
    predictions = [probability > threshold for threshold in THRESHOLDS]
    return [float(_ratio(2 * (p & lesion).sum(), p.sum() + lesion.sum())) for p in predictions]


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
        small_recall: share of all small lesions that are found.
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
    }


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
