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
    """A mean difference, its interval and the p-value of no difference, each None where it cannot be had."""

    mean: float
    interval: tuple[float, float] | None
    p: float | None = None


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
    return _student(mean, error, len(differences) - 1)


def over_photographs(pairs: Sequence[tuple[Run, Run]], metric: str, *, tuned: bool = False) -> Difference:
    """The mean difference in a metric of counts, with a bootstrap interval.

    Photographs are drawn with replacement, the same for all runs.

    Args:
        pairs: at least one, of runs with a look at the test photographs.
        metric: of lesion_scores.metrics.
        tuned: at the best threshold of the fold instead of 0.5.
    """
    number = _number(pairs, tuned=tuned)
    drawn = np.random.default_rng(0).integers(number, size=(RESAMPLED, number))
    # Once each, then as drawn.
    times = np.stack([np.bincount(row, minlength=number) for row in (np.arange(number), *drawn)])
    mean, *draws = np.mean(_weighted(pairs, metric, times, tuned=tuned), 0)
    lower, upper = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(mean), (float(lower), float(upper)))


def over_both(pairs: Sequence[tuple[Run, Run]], metric: str, *, tuned: bool = False) -> Difference:
    """The mean difference in a metric of counts, with a t interval for other seeds and other photographs at once.

    What a photograph adds to a seed's difference is its jackknife pseudo-value: in a mean over photographs its own
    difference. Seeds by photographs, these are a table of two random effects. Their variances, 0 where the estimate is
    negative, give the standard error, Satterthwaite's formula its degrees of freedom.

    Args:
        pairs: as in over_photographs; without an interval where there are fewer than three, or one photograph alone.
        metric: as in over_photographs.
        tuned: as in over_photographs.
    """
    number = _number(pairs, tuned=tuned)
    whole = _weighted(pairs, metric, np.ones((1, number)), tuned=tuned)  # (pairs, 1)
    mean = float(np.mean(whole))
    if len(pairs) < 3 or number < 2:
        return Difference(mean, None)
    without = _weighted(pairs, metric, 1 - np.eye(number), tuned=tuned)
    return _student(mean, *_two_way(number * whole - (number - 1) * without))


def holm(values: Sequence[float]) -> list[float]:
    """The p-values of a family of comparisons, adjusted for their number after Holm (1979)."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def pooled(comparisons: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation over seeds that comparisons have in common, and its degrees of freedom."""
    freedom = sum(len(differences) - 1 for differences in comparisons)
    squares = sum(float(np.var(differences)) * len(differences) for differences in comparisons)
    return (squares / freedom) ** 0.5, freedom


def _student(mean: float, error: float, freedom: float) -> Difference:
    """A mean with its standard error, which t of so many degrees of freedom describes."""
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Difference(mean, (mean - half, mean + half), p)


def _two_way(table: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Standard error of the mean of a table whose rows and columns are both random, and its degrees of freedom."""
    rows, columns = table.shape
    of_rows, of_columns = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    left = table - of_rows - of_columns + table.mean()
    freedoms = np.array([rows - 1, columns - 1, (rows - 1) * (columns - 1)])
    squares = table.size * np.var(of_rows), table.size * np.var(of_columns), np.sum(left**2)
    by_row, by_column, rest = np.array(squares) / freedoms
    # The variance of the mean, times the table's size, is by_row + by_column - rest; effects below 0 are 0.
    kept = by_row > rest, by_column > rest
    terms = np.array([by_row * kept[0], by_column * kept[1], rest * (1 - sum(kept))])
    total = float(np.sum(terms))
    if not total:
        return 0.0, float(rows - 1)
    return (total / table.size) ** 0.5, float(total**2 / np.sum(terms**2 / freedoms))


def _number(pairs: Sequence[tuple[Run, Run]], *, tuned: bool) -> int:
    """Of photographs."""
    return len(by_lesion(_counted(pairs[0][0], tuned=tuned))[0])


def _weighted(
    pairs: Sequence[tuple[Run, Run]], metric: str, times: npt.NDArray[Any], *, tuned: bool
) -> npt.NDArray[np.float64]:
    """(pairs, T): each pair's difference when the photographs count as often as each row of times, (T, N), says."""

    def mean_metric(run: Run) -> npt.NDArray[np.float64]:
        lesions = by_lesion(_counted(run, tuned=tuned))
        return np.asarray(np.mean([metrics(photographs, times)[metric] for photographs in lesions], 0))

    return np.stack([mean_metric(one) - mean_metric(other) for one, other in pairs])


def _counted(run: Run, *, tuned: bool) -> Sequence[Mapping[str, Any]]:
    """The counts of its test photographs."""
    test = run["test"]["tuned"] if tuned else run["test"]
    found: Sequence[Mapping[str, Any]] = test["photographs"]
    return found
