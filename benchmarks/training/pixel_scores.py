"""How well predicted probabilities meet the lesion masks of held-out photographs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from data.samples import Sample, network_input
from torch import Tensor, nn
from torchmetrics.classification import BinaryAveragePrecision, BinaryF1Score, BinaryJaccardIndex

# Sorting this many pixels for the exact average precision takes about 2 GB.
EXACT_PIXELS = 2**25
BINS = 1001


class Scores(NamedTuple):
    """F1 and IoU at probability 0.5, and average precision, each over all held-out pixels together; 0 to 1."""

    f1: float
    iou: float
    average_precision: float


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
    """F1, IoU and average precision over the pixels of all samples; without any lesion pixel all three are 0.

    Args:
        probabilities: (H, W) of each sample, 0 to 1.
        samples: the photographs' masks.
        thresholds: None gives the exact average precision, a number that of as many equal bins.
    """
    if not any(sample.lesion.any() for sample in samples):
        return Scores(0, 0, 0)
    metrics = (
        BinaryF1Score(sync_on_compute=False),  # other processes, if there are any, have nothing to add
        BinaryJaccardIndex(sync_on_compute=False),
        BinaryAveragePrecision(thresholds, sync_on_compute=False),
    )
    for probability, sample in zip(probabilities, samples, strict=True):
        for metric in metrics:
            metric.update(probability, sample.lesion.int())
    return Scores(*(float(metric.compute()) for metric in metrics))


def average_precision_thresholds(samples: Sequence[Sample]) -> int | None:
    """None, for the exact average precision, unless the samples' pixels are too many to sort."""
    return None if sum(sample.lesion.numel() for sample in samples) <= EXACT_PIXELS else BINS


def _prediction(model: nn.Module, image: Tensor, stride: int, device: torch.device) -> Tensor:
    height, width = image.shape[1:]
    filled = F.pad(image, (0, -width % stride, 0, -height % stride))
    logits: Tensor = model(network_input(filled.unsqueeze(0).to(device)))
    return logits[0, 0, :height, :width].sigmoid().cpu()
