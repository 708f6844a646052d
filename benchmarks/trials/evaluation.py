"""How well a network of the study finds the lesions of whole photographs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from data.photographs import CHANNELS, encoder_input
from data.samples import Sample
from measure.lesion_scores import FIRST_THRESHOLDS, THRESHOLDS, by_lesion, counts, f1_by_threshold, metrics
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_average_precision

from trials.networks import ENCODER_STRIDE
from trials.objective import Settings


def evaluation(
    model: nn.Module, samples: Sequence[Sample], settings: Settings, tuned: Sequence[float] = ()
) -> dict[str, Any]:
    """Metrics of whole photographs at probability 0.5, and what they are made of.

    Args:
        model: gives logits of the settings' lesions.
        samples: photographs with all masks.
        settings: of the run.
        tuned: for each lesion another threshold.

    Returns:
        lesion_scores.metrics and average_precision: each the mean over the lesions.
        f1_by_threshold: for each lesion a list, each the mean over the photographs with the lesion.
        f1_by_first_threshold: likewise at the thresholds of the first runs, which choices go on to be made by.
        photographs: for each photograph and lesion its name, the lesion, and lesion_scores.counts.
        tuned: the metrics and photographs at those thresholds, if there are any.
    """
    levels = [[0.5] * len(settings.lesions), *([tuned] if tuned else [])]
    found: list[list[dict[str, Any]]] = [[] for _ in levels]
    probabilities: list[list[Tensor]] = [[] for _ in settings.lesions]
    truth: list[list[Tensor]] = [[] for _ in settings.lesions]
    grids = {"f1_by_threshold": THRESHOLDS, "f1_by_first_threshold": FIRST_THRESHOLDS}
    by_threshold: dict[str, list[list[list[float]]]] = {name: [[] for _ in settings.lesions] for name in grids}
    model.eval()
    for sample in samples:
        predicted = probability(model, sample)
        shown = np.asarray(predicted.cpu())
        disc = np.asarray(sample.lesion[CHANNELS.index("OD")])
        for k, lesion in enumerate(settings.lesions):
            mask = sample.lesion[CHANNELS.index(lesion)]
            probabilities[k].append(predicted[k].flatten())
            truth[k].append(mask.flatten().to(predicted.device))
            for name, thresholds in grids.items() if mask.any() else ():
                by_threshold[name][k].append(f1_by_threshold(shown[k], np.asarray(mask), thresholds))
            for level, own in zip(levels, found, strict=True):
                numbers = counts(shown[k] > level[k], np.asarray(mask), disc)
                own.append({"name": sample.name, "lesion": lesion, **numbers})
    precisions = [
        float(binary_average_precision(torch.cat(p), torch.cat(t).int()))
        for p, t in zip(probabilities, truth, strict=True)
    ]
    means = {
        name: [np.mean(f1, 0) if f1 else np.zeros(len(grids[name])) for f1 in found]
        for name, found in by_threshold.items()
    }
    return {
        **_mean_metrics(found[0]),
        "average_precision": sum(precisions) / len(precisions),
        **{name: np.round(f1, 5).tolist() for name, f1 in means.items()},
        "photographs": found[0],
    } | ({"tuned": {**_mean_metrics(found[1]), "photographs": found[1]}} if tuned else {})


def best_thresholds(f1: Sequence[Sequence[float]]) -> list[float]:
    """For each lesion the threshold with the largest F1, from its f1_by_threshold."""
    return [THRESHOLDS[int(np.argmax(of_lesion))] for of_lesion in f1]


def _mean_metrics(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each metric's mean over the lesions."""
    tables = [metrics(photographs) for photographs in by_lesion(found)]
    return {name: float(np.mean([table[name] for table in tables])) for name in tables[0]}


def probability(model: nn.Module, sample: Sample) -> Tensor:
    """Of each lesion at each pixel of a photograph, (K, H, W)."""
    height, width = sample.image.shape[1:]
    image = sample.image.to(next(model.parameters()).device)
    filled = nn.functional.pad(image, (0, -width % ENCODER_STRIDE, 0, -height % ENCODER_STRIDE))
    with torch.inference_mode():
        logits: Tensor = model(encoder_input(filled[None]).contiguous(memory_format=torch.channels_last))
    return logits[0, :, :height, :width].sigmoid()
