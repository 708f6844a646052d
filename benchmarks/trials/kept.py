"""The networks that runs of the study have left, each with its arm, its line and the threshold of its fold."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from trials.evaluation import best_thresholds
from trials.networks import network
from trials.objective import Settings
from trials.questions import Question
from trials.record import file_name, read_lines, runs_of


class Kept(NamedTuple):
    """A trained network, in evaluation mode.

    arm, settings, seed: of its run.
    thresholds: for each lesion of the settings the best on the validation fold.
    """

    arm: str
    settings: Settings
    seed: int
    thresholds: list[float]
    model: nn.Module


def kept_networks(question: Question, results: Path, cache: Path) -> Iterator[Kept]:
    """Those of the question's arms and seeds that the cache has, and a line of the results tells of.

    Raises:
        FileNotFoundError: there is none.
    """
    lines = read_lines(results)
    runs: list[tuple[str, dict[str, Any], Path]] = [
        (arm, run, cache / "networks" / f"{file_name(arm, question, run['seed'])}.pt")
        for arm in question.arms
        for run in runs_of(arm, question, lines)
    ]
    runs = [one for one in runs if one[2].exists()]
    if not runs:
        raise FileNotFoundError(f"'{cache / 'networks'}' has no network of this question; train them with study.py")
    for arm, run, path in tqdm(runs, desc="networks"):
        settings = question.arms[arm]
        model = network(settings.network, len(settings.lesions), run["seed"])
        model.load_state_dict(torch.load(path, weights_only=True))
        yield Kept(arm, settings, run["seed"], best_thresholds(run["curve"][-1]["f1_by_threshold"]), model.eval())
