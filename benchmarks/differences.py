"""Differences between two arms of the study, and how sure they are."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lesion_scores import metrics
from scipy import stats

CONFIDENCE = 0.95
RESAMPLED = 1000  # times that the photographs are drawn anew
Run = Mapping[str, Any]


class Difference(NamedTuple):
    """A mean difference with its interval; the interval is None where one seed says nothing about others."""

    mean: float
    interval: tuple[float, float] | None


def over_seeds(runs: Sequence[Run], others: Sequence[Run], metric: str) -> Difference:
    """Of runs and others of the same seeds: the mean difference in a test metric, with a paired t interval."""
    by_seed = {run["seed"]: run["test"][metric] for run in others}
    paired = [run["test"][metric] - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]
    mean = float(np.mean(paired))
    if len(paired) < 2:
        return Difference(mean, None)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(paired) - 1) * np.std(paired, ddof=1) / len(paired) ** 0.5)
    return Difference(mean, (mean - half, mean + half))


def over_photographs(runs: Sequence[Run], others: Sequence[Run], metric: str) -> Difference:
    """As over_seeds, with a bootstrap interval: the test photographs drawn with replacement, the same for all runs."""
    by_seed = {run["seed"]: _counts(run) for run in others}
    pairs = [(_counts(run), by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]

    def difference(drawn: Sequence[int]) -> float:
        both = [[metrics([counts[i] for i in drawn])[metric] for counts in pair] for pair in pairs]
        return float(np.mean([one - other for one, other in both]))

    number = len(pairs[0][0])
    generator = np.random.default_rng(0)
    draws = [difference(generator.integers(number, size=number).tolist()) for _ in range(RESAMPLED)]
    lower, upper = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(difference(range(number)), (float(lower), float(upper)))


def _counts(run: Run) -> list[Mapping[str, int]]:
    """Of each photograph, by its place in the list, the same in every run."""
    return [{name: value for name, value in p.items() if isinstance(value, int)} for p in run["test"]["photographs"]]
