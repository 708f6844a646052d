"""The figures of the trainings, as a table to print and as a dictionary to write as JSON."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from data.samples import Sample
from measure.cost import Quartiles
from measure.machine import environment

from training.pixel_scores import Scores, average_precision_thresholds

CURVE_EVERY = 10


class Arm(NamedTuple):
    """What one of the trainings gave; memory in bytes, None where it is not measured."""

    scores: Scores
    step_seconds: Quartiles
    loss_share: float
    peak_memory: int | None
    memory_meaning: str
    losses: list[float]


class Data(NamedTuple):
    """The photographs to train on, and those to judge by."""

    train: list[Sample]
    held_out: list[Sample]


def table(arms: Mapping[str, Arm], data: Data) -> str:
    """The figures, a column for each arm, with a line on how each was come by where that varies."""
    rows: list[tuple[str, Callable[[Arm], str]]] = [
        ("F1", lambda arm: f"{arm.scores.f1:.3f}"),
        ("IoU", lambda arm: f"{arm.scores.iou:.3f}"),
        ("average precision", lambda arm: f"{arm.scores.average_precision:.3f}"),
        ("small-lesion recall", lambda arm: f"{arm.scores.small_recall:.3f}"),
        ("seconds per step", lambda arm: "{:.4f} ({:.4f} to {:.4f})".format(*arm.step_seconds)),
        ("loss's share of a step", lambda arm: f"{arm.loss_share:.2%}"),
        ("peak memory, MB", lambda arm: "not measured" if arm.peak_memory is None else f"{arm.peak_memory / 1e6:.0f}"),
    ]
    lines = [f"{'':24}" + "".join(f"{name:28}" for name in arms)]
    lines += [f"{label:24}" + "".join(f"{shown(arm):28}" for arm in arms.values()) for label, shown in rows]
    meaning = next(iter(arms.values())).memory_meaning
    lines.append(f"average precision: {_average_precision(data)}; seconds: median (quartiles); memory: {meaning}")
    if not any(sample.lesion.any() for sample in data.held_out):
        lines.append("no held-out image shows a lesion, so F1, IoU, average precision and recall stand as 0")
    return "\n".join(line.rstrip() for line in lines)


def figures(options: argparse.Namespace, data: Data, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """All that was measured, and what it was measured with, ready for JSON."""
    return {
        "configuration": {name: _plain(value) for name, value in vars(options).items()},
        "environment": environment(options.device),
        "training": _described(data.train),
        "held_out": _described(data.held_out),
        "average_precision": _average_precision(data),
        "arms": {name: _arm_figures(arm) for name, arm in arms.items()},
    }


def _arm_figures(arm: Arm) -> dict[str, Any]:
    return {
        **arm.scores._asdict(),
        "step_seconds": arm.step_seconds._asdict(),
        "loss_share": arm.loss_share,
        "peak_memory_bytes": arm.peak_memory,
        "peak_memory_meaning": arm.memory_meaning,
        "loss_curve": [{"step": i, "loss": loss} for i, loss in enumerate(arm.losses) if i % CURVE_EVERY == 0],
    }


def _average_precision(data: Data) -> str:
    thresholds = average_precision_thresholds(data.held_out)
    return "exact" if thresholds is None else f"at {thresholds} thresholds"


def _described(samples: Sequence[Sample]) -> dict[str, Any]:
    lesion, pixels = (sum(int(count(sample.lesion)) for sample in samples) for count in (torch.sum, torch.numel))
    return {
        "images": len(samples),
        "images_with_lesion": sum(bool(sample.lesion.any()) for sample in samples),
        "lesion_share": lesion / pixels,
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, (Path, torch.device)) else value
