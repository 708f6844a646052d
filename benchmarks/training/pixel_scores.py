"""How well predicted probabilities meet the lesion masks of held-out photographs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data.samples import Sample, network_input
from measure import lesion_scores
from torch import Tensor, nn
from torchmetrics.classification import BinaryAveragePrecision, BinaryF1Score, BinaryJaccardIndex

# Sorting this many pixels for the exact average precision takes about 2 GB.
EXACT_PIXELS = 2**25
BINS = 1001


class Scores(NamedTuple):
    """Of all held-out photographs together, 0 to 1; all but average_precision at probability 0.5.

    f1, iou, average_precision: over the pixels.
    small_recall: share of the lesions under 25 pixels that the prediction touches, 0 where there is none.
    """

    f1: float
    iou: float
    average_precision: float
    small_recall: float


def predictions(model: nn.Module, samples: Sequence[Sample], stride: int, device: torch.device) -> list[Tensor]:
    """The model's lesion probability at each pixel of each whole photograph.

    Args:
        model: gives (B, 1, H, W) logits; left in evaluation mode.
        samples: the photographs, each as large as it is.
        stride: H and W are filled up with black to multiples of it, and the prediction is cut back.
        device: the model's.

    Returns:
        a (H, W) float32 tensor on the CPU for each sample.
    """
    model.eval()
    with torch.inference_mode():
        return [_prediction(model, sample.image, stride, device) for sample in samples]


def scores(probabilities: Sequence[Tensor], samples: Sequence[Sample], thresholds: int | None = None) -> Scores:
    """The scores of all samples together; without any lesion pixel all are 0.

    Args:
        probabilities: (H, W) of each sample, 0 to 1.
        samples: the photographs' masks.
        thresholds: None gives the exact average precision, a number that of as many equal bins.
    """
    if not any(sample.lesion.any() for sample in samples):
        return Scores(0, 0, 0, 0)
    metrics = (
        BinaryF1Score(sync_on_compute=False),  # other processes, if there are any, have nothing to add
        BinaryJaccardIndex(sync_on_compute=False),
        BinaryAveragePrecision(thresholds, sync_on_compute=False),
    )
    for probability, sample in zip(probabilities, samples, strict=True):
        for metric in metrics:
            metric.update(probability, sample.lesion.int())
    found = [
        lesion_scores.counts(
            np.asarray(probability > 0.5), np.asarray(sample.lesion), np.zeros(sample.lesion.shape, bool)
        )
        for probability, sample in zip(probabilities, samples, strict=True)
    ]
    small_recall = float(lesion_scores.metrics(found)["small_recall"])
    f1, iou, average_precision = (float(metric.compute()) for metric in metrics)
    return Scores(f1, iou, average_precision, small_recall)


def average_precision_thresholds(samples: Sequence[Sample]) -> int | None:
    """None, for the exact average precision, unless the samples' pixels are too many to sort."""
    return None if sum(sample.lesion.numel() for sample in samples) <= EXACT_PIXELS else BINS


def _prediction(model: nn.Module, image: Tensor, stride: int, device: torch.device) -> Tensor:
    height, width = image.shape[1:]
    filled = F.pad(image, (0, -width % stride, 0, -height % stride))
    logits: Tensor = model(network_input(filled.unsqueeze(0).to(device)))
    return logits[0, 0, :height, :width].sigmoid().cpu()
