"""Differences between two arms of the study, and how sure they are."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from measure.lesion_scores import by_lesion, metrics
from scipy import stats

CONFIDENCE = 0.95
RESAMPLED = 1000  # times that the photographs are drawn anew
Run = Mapping[str, Any]


class Difference(NamedTuple):
    """A mean difference with its interval; the interval is None where there are too few seeds for one."""

    mean: float
    interval: tuple[float, float] | None


def paired(runs: Sequence[Run], others: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs and others of the same seed."""
    by_seed = {run["seed"]: run for run in others}
    return [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]


def measured(run: Run, *, tested: bool) -> Mapping[str, Any]:
    """A run's metrics on the test photographs, else on the validation fold after the last step."""
    found: Mapping[str, Any] = run["test"] if tested else run["curve"][-1]
    return found


def of_each_seed(pairs: Sequence[tuple[Run, Run]], metric: str, *, tested: bool = True) -> list[float]:
    """The differences in a metric, of the pairs in which both have it; tested: as in measured."""
    found = [[measured(run, tested=tested) for run in pair] for pair in pairs]
    return [one[metric] - other[metric] for one, other in found if metric in one and metric in other]


def over_seeds(differences: Sequence[float]) -> Difference:
    """The mean of at least one, with its t interval from three on.

    That of two would be 12.7 times as wide as they differ, and say less than the two.
    """
    mean = float(np.mean(differences))
    if len(differences) < 3:
        return Difference(mean, None)
    error = float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    return Difference(mean, (mean - half, mean + half))


def over_photographs(pairs: Sequence[tuple[Run, Run]], metric: str, *, tuned: bool = False) -> Difference:
    """The mean difference in a metric of counts, with a bootstrap interval.

    Photographs are drawn with replacement, the same for all runs.

    Args:
        pairs: at least one, of runs with a look at the test photographs.
        metric: of lesion_scores.metrics.
        tuned: at the best threshold of the fold instead of 0.5.
    """
    tests = [[run["test"]["tuned"] if tuned else run["test"] for run in pair] for pair in pairs]
    found = [[by_lesion(test["photographs"]) for test in pair] for pair in tests]
    number = len(found[0][0][0])
    drawn = np.random.default_rng(0).integers(number, size=(RESAMPLED, number))
    # Once each, then as drawn.
    times = np.stack([np.bincount(row, minlength=number) for row in (np.arange(number), *drawn)])

    def mean_metric(lesions: Sequence[Sequence[Mapping[str, int]]]) -> npt.NDArray[np.float64]:
        return np.asarray(np.mean([metrics(photographs, times)[metric] for photographs in lesions], 0))

    mean, *draws = np.mean([mean_metric(one) - mean_metric(other) for one, other in found], 0)
    lower, upper = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(mean), (float(lower), float(upper)))
