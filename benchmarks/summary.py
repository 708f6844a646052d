"""Tables and plots of the study, from the file of its runs alone.

    python benchmarks/summary.py                       # prints the tables
    python benchmarks/summary.py --document docs/results-tables.md --plots docs

The second puts the tables between two marks in the document, and writes four plots, study-*.png.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure.lesion_scores import FIRST_THRESHOLDS, THRESHOLDS
from measure.markdown import aligned
from trials.differences import Difference, holm, measured, of_each_seed, over_both, over_photographs, over_seeds, paired
from trials.objective import Settings, rise
from trials.plots import write_curves, write_differences, write_doses
from trials.questions import QUESTIONS, Question
from trials.record import RESULTS, read_lines, runs_of

BEGIN, END = "<!-- written by benchmarks/summary.py: begin -->", "<!-- end -->"
SHOWN = {
    "f1": "F1",
    "iou": "IoU",
    "f1_pixels": "F1, all pixels",
    "iou_pixels": "IoU, all pixels",
    "average_precision": "average precision",
    "small_recall": "small-lesion recall",
    "boundary_f1": "boundary F1",
    "disc_fp": "false positives in the disc",
    "small_recall_tuned": "small-lesion recall, best threshold",
    "boundary_f1_tuned": "boundary F1, best threshold",
    "f1_tuned": "F1, best threshold of the fold",
    "threshold": "that threshold",
}
COMPARED = (
    "f1",
    "f1_tuned",
    "average_precision",
    "iou",
    "small_recall",
    "small_recall_tuned",
    "boundary_f1",
    "boundary_f1_tuned",
    "disc_fp",
)
PARTS = {"density": "alpha", "edge": "beta"}
DOSES = "d", "p", "q"  # questions whose short runs show how much the weight of the edge term matters
COURSES = "t", "u"  # questions that show how its effect changes during training
# Of lesions as such, which runs count from u on.
LESIONS = tuple(f"{small}lesion_{metric}" for small in ("", "small_") for metric in ("recall", "precision", "f1"))
Run = Mapping[str, Any]
Arms = Mapping[str, Sequence[Run]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write what the command line asks for."""
    options = _parsed(arguments)
    lines = read_lines(options.results)
    found = {letter: _arms(question, lines) for letter, question in QUESTIONS.items()}
    text = summary(found)
    if options.document is None:
        print(text)
    else:
        options.document.write_text(replaced(options.document.read_text(), text))
    if options.plots is not None:
        write_curves(options.plots / "study-curves.png", found["a"])
        tested = [letter for letter, question in QUESTIONS.items() if question.tested]
        for name, letters, metric, label in (
            ("study-differences.png", ["a"], "f1", "F1 on the test photographs at probability 0.5"),
            ("study-tuned.png", tested, "f1_tuned", "F1 on the test photographs at the best threshold of the fold"),
            ("study-settings.png", ["d", "m"], "f1_tuned", "F1 on the validation fold at its best threshold"),
        ):
            rows = {
                f"{letter}: {_compared(QUESTIONS[letter], arm)}": differences
                for letter in letters
                for arm, pairs in _pairs(QUESTIONS[letter], found[letter]).items()
                if (differences := of_each_seed(pairs, metric, tested=QUESTIONS[letter].tested))
            }
            label += ",\nminus BCE, or what the row names, of the same seed"
            write_differences(options.plots / name, rows, label)
        write_doses(options.plots / "study-doses.png", _doses(found), _courses(found))
    return 0


def _doses(found: Mapping[str, Arms]) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """For each supervised loss and arm how hard the edge term alone pulls in short runs, and its differences in F1.

    The pull is a Pull's times or, of a weight set by hand, what was measured: the ratio of mean gradient norms at the
    features. F1 is that of the validation folds at the best threshold.
    """
    doses: dict[str, dict[str, tuple[float, list[float]]]] = {}
    for letter in DOSES:
        for arm, pairs in _pairs(QUESTIONS[letter], found[letter]).items():
            settings = QUESTIONS[letter].arms[arm]
            supervised, beta, weights = settings.supervised, settings.beta, settings.weights
            edge_alone = Settings(steps=450, supervised=supervised, beta=beta, weights=weights)
            if settings == edge_alone and beta and weights != "share":
                measured_pulls = _pulls(found[letter][arm], "features", "edge")
                pull = measured_pulls[1] if measured_pulls else beta
                differences = of_each_seed(pairs, "f1_tuned", tested=False)
                doses.setdefault(supervised, {})[arm] = pull, differences
    return doses


def _courses(found: Mapping[str, Arms]) -> dict[str, dict[int, list[float]]]:
    """For each supervised loss, after how many steps, differences in F1 on the folds, of beta 0.02 that rises (t, u).

    Each is of the best among the first thresholds in both runs at that step.
    """
    courses: dict[str, dict[int, list[float]]] = {}
    for letter in COURSES:
        for arm, pairs in _pairs(QUESTIONS[letter], found[letter]).items():
            steps = courses.setdefault(QUESTIONS[letter].arms[arm].supervised, {})
            for own, other in pairs:
                for point, of_other in zip(own["curve"], other["curve"], strict=True):
                    f1, f1_of_other = (_f1_table(one, "f1_by_first_threshold").max() for one in (point, of_other))
                    steps.setdefault(point["step"], []).append(float(f1 - f1_of_other))
    return courses


def summary(found: Mapping[str, Arms]) -> str:
    """The answers to the questions that have runs beside those of questions before them, and what the others miss."""
    parts, waiting = [], {}
    known: set[str] = set()
    for letter, arms in found.items():
        own = {
            json.dumps([run["settings"], run["seed"], QUESTIONS[letter].device])
            for runs in arms.values()
            for run in runs
        }
        if own <= known:
            waiting[letter] = len(QUESTIONS[letter].seeds) * len(QUESTIONS[letter].arms) - len(own)
        else:
            parts.append(answer(letter, QUESTIONS[letter], arms))
        known |= own
    if waiting:
        parts.append(f"Not begun: {', '.join(f'question {letter} ({runs} runs)' for letter, runs in waiting.items())}.")
    return "\n\n".join(parts)


def answer(letter: str, question: Question, arms: Arms) -> str:
    """Metrics, differences to BCE, what the terms did, and which runs of the question are missing."""
    done, asked = sum(map(len, arms.values())), len(question.seeds) * len(question.arms)
    parts = [f"### Question {letter}: {done} of {asked} runs"]
    # Choices are made by differences, so there the baselines alone are shown as they are.
    shown = {name: runs for name, runs in arms.items() if question.tested or question.baseline(name) is None}
    if shown:
        parts.append(_metrics(question, shown))
    pairs = _pairs(question, arms)
    if pairs:
        parts.append(_differences(question, pairs))
    if any(run["gradient_norms"] for runs in arms.values() for run in runs):
        parts.append(_mechanism(arms))
    if done < asked:
        parts.append(_not_run(question, arms))
    return "\n\n".join(parts)


def _not_run(question: Question, arms: Arms) -> str:
    """The runs that are missing, arms with the same seeds in one line."""
    missing: dict[str, list[str]] = {}
    for name in question.arms:
        done = {run["seed"] for run in arms.get(name, ())}
        seeds = ", ".join(str(seed) for seed in question.seeds if seed not in done)
        if seeds:
            missing.setdefault(seeds, []).append(name)
    return "Not run:\n\n" + "\n".join(f"- seeds {seeds}: {'; '.join(names)}" for seeds, names in missing.items())


def replaced(document: str, text: str) -> str:
    """The document with the text between its two marks."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def _arms(question: Question, lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm that has one."""
    found = {name: [_tuned(run) for run in runs_of(name, question, lines)] for name in question.arms}
    return {name: runs for name, runs in found.items() if runs}


def _tuned(run: dict[str, Any]) -> dict[str, Any]:
    """With metrics at the threshold that is best on the fold, as far as the run recorded them at other thresholds.

    Of several lesions it is the mean, each at its own threshold; the threshold shown is the mean of theirs.
    """
    *earlier, last = run["curve"]
    if "f1_by_threshold" not in last:
        return run
    # On the folds, where the largest of more is larger, all runs are compared by the thresholds of the first.
    name = "f1_by_threshold" if run["tested"] else "f1_by_first_threshold"
    best = np.argmax(_f1_table(last, name), 1, keepdims=True)

    def tuned(metrics: dict[str, Any]) -> dict[str, Any]:
        table = _f1_table(metrics, name)
        f1 = np.take_along_axis(table, best, 1)
        thresholds = THRESHOLDS if table.shape[1] == len(THRESHOLDS) else FIRST_THRESHOLDS
        return metrics | {"f1_tuned": float(f1.mean()), "threshold": float(np.take(thresholds, best).mean())}

    if not run["tested"]:
        return run | {"curve": [*earlier, tuned(last)]}
    others = run["test"].get("tuned", {})
    known = {f"{name}_tuned": others[name] for name in ("small_recall", "boundary_f1", *LESIONS) if name in others}
    return run | {"curve": [*earlier, tuned(last)], "test": tuned(run["test"]) | known}


def _f1_table(metrics: Run, name: str) -> npt.NDArray[np.float64]:
    """F1 by lesion and threshold; early runs have one set of thresholds, and their only lesion's by threshold alone."""
    return np.atleast_2d(metrics.get(name, metrics["f1_by_threshold"]))


def _pairs(question: Question, arms: Arms) -> dict[str, list[tuple[Run, Run]]]:
    """The runs of each arm with the baseline's of the same seed, where there are any."""
    found = {name: paired(runs, arms.get(question.baseline(name) or "", ())) for name, runs in arms.items()}
    return {name: pairs for name, pairs in found.items() if pairs}


def _metrics(question: Question, arms: Arms) -> str:
    """Mean and standard deviation over seeds."""
    tables = {name: [measured(run, tested=question.tested) for run in runs] for name, runs in arms.items()}
    keys = [key for key in SHOWN if any(key in one for found in tables.values() for one in found)]
    rows = [["test photographs" if question.tested else "validation fold", "seeds", *(SHOWN[key] for key in keys)]]
    for name, found in tables.items():
        columns = [[one[key] for one in found if key in one] for key in keys]
        rows.append([name, str(len(found)), *(_spread(c) + _fewer(len(c), len(found)) for c in columns)])
    return aligned(rows)


def _differences(question: Question, pairs: Mapping[str, Sequence[tuple[Run, Run]]]) -> str:
    title = "minus BCE, or what the row names, of the same seeds: mean (t interval over seeds; two seeds: each one's)"
    if question.tested:
        title += " [over seeds and photographs]; bootstrap over photographs, networks held fixed"
    keys = [key for key in COMPARED if any(of_each_seed(own, key, tested=question.tested) for own in pairs.values())]
    adjusted = {f"{SHOWN[key]}: p, Holm": _holm(question, pairs, key) for key in ("f1", "f1_tuned")}
    adjusted = {title: cells for title, cells in adjusted.items() if cells}
    rows = [[title, "seeds", *(SHOWN[key] for key in keys), *adjusted]]
    for name, own in pairs.items():
        cells = []
        for key in keys:
            known = of_each_seed(own, key, tested=question.tested)
            cell = _interval(known) if known else "-"
            cell += _fewer(len(known), len(own))
            if question.tested:
                cell += _both(own, key) + _bootstrap(own, key)
            cells.append(cell)
        cells += [found.get(name, "-") for found in adjusted.values()]
        rows.append([_compared(question, name), str(len(own)), *cells])
    return aligned(rows)


def _holm(question: Question, pairs: Mapping[str, Sequence[tuple[Run, Run]]], key: str) -> dict[str, str]:
    """p-values over seeds [over seeds and photographs], adjusted in a family: arms with a term, or arms without."""
    shown: dict[str, str] = {}
    for plain in (False, True):
        family = [name for name in pairs if (question.arms[name].alpha == question.arms[name].beta == 0) == plain]
        known = {name: of_each_seed(pairs[name], key, tested=question.tested) for name in family}
        seeds = _adjusted({name: over_seeds(own) for name, own in known.items() if own})
        both = _adjusted({name: _over_both(pairs[name], key) for name in family}) if question.tested else {}
        shown |= {name: f"{p:.3f}" + (f" [{both[name]:.3f}]" if name in both else "") for name, p in seeds.items()}
    return shown


def _adjusted(family: Mapping[str, Difference | None]) -> dict[str, float]:
    """The p-values of those that have one, adjusted for their number."""
    known = {name: found.p for name, found in family.items() if found is not None and found.p is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def _over_both(pairs: Sequence[tuple[Run, Run]], key: str) -> Difference | None:
    """None where a run's photographs were not counted so."""
    if not _counted(pairs, key):
        return None
    return over_both(pairs, key.removesuffix("_tuned"), tuned=key.endswith("_tuned"))


def _counted(pairs: Sequence[tuple[Run, Run]], key: str) -> bool:
    """Whether the counts of all photographs are there, from which the metric comes."""
    return key != "average_precision" and (
        not key.endswith("_tuned") or all("tuned" in run["test"] for pair in pairs for run in pair)
    )


def _both(pairs: Sequence[tuple[Run, Run]], key: str) -> str:
    found = _over_both(pairs, key)
    return "" if found is None or found.interval is None else f" [{found.interval[0]:+.3f} to {found.interval[1]:+.3f}]"


def _compared(question: Question, arm: str) -> str:
    """The arm, and what it is compared with where that is not plain BCE."""
    baseline = question.baseline(arm) or arm
    other = question.arms[baseline]
    return arm if (other.supervised, other.disc) == ("bce", "background") else f"{arm}, minus {baseline}"


def _bootstrap(pairs: Sequence[tuple[Run, Run]], key: str) -> str:
    """Nothing where a run's photographs were not counted so."""
    if not _counted(pairs, key):
        return ""
    interval = over_photographs(pairs, key.removesuffix("_tuned"), tuned=key.endswith("_tuned")).interval
    return "" if interval is None else f"; {interval[0]:+.3f} to {interval[1]:+.3f}"


def _mechanism(arms: Arms) -> str:
    """How often the terms are there, how hard they pull, what becomes of the features, and what they cost."""
    columns: dict[str, Callable[[Sequence[Run]], str]] = {
        "density active": lambda runs: _mean([100 * run["active"]["density"] for run in runs], "{:.0f} %"),
        "edge active": lambda runs: _mean([100 * run["active"]["edge"] for run in runs], "{:.0f} %"),
        "density : supervised loss at the features": lambda runs: _pull(runs, "features", "density"),
        "edge : supervised loss at the features": lambda runs: _pull(runs, "features", "edge"),
        "density : supervised loss at the first layer": lambda runs: _pull(runs, "first_layer", "density"),
        "edge : supervised loss at the first layer": lambda runs: _pull(runs, "first_layer", "edge"),
        "cosine across contours, before": lambda runs: _cosine(runs, 0),
        "after": lambda runs: _cosine(runs, 1),
        "norm of the features, after": lambda runs: _mean(
            [run["similarity"][1]["norm"] for run in runs if run["similarity"][1]], "{:.3g}"
        ),
        "loss's forward, share of a step": lambda runs: _mean(
            [100 * run["loss_forward_seconds"]["median"] / run["step_seconds"]["median"] for run in runs], "{:.1f} %"
        ),
        "peak memory, GB": lambda runs: _mean([run["peak_memory_bytes"] / 1e9 for run in runs], "{:.1f}"),
    }
    rows = [["what the terms did (gradient norms: median of ratios; ratio of means)", *columns]]
    return aligned([*rows, *([name, *(shown(runs) for shown in columns.values())] for name, runs in arms.items())])


def _pull(runs: Sequence[Run], where: str, part: str) -> str:
    found = _pulls(runs, where, part)
    return f"{found[0]:.3g}; {found[1]:.3g}" if found else "-"


def _pulls(runs: Sequence[Run], where: str, part: str) -> tuple[float, float] | None:
    """The weighted term's gradient norm beside that of the supervised loss: median of the ratios, ratio of the means.

    The first is of the steps in which the term is not 0, the second of all; they part where a few steps pull hard.
    None for a Pull, whose weight in a step is not recorded, and where the term is always 0.
    """
    norms = [
        (_weight(run["settings"], part, point["step"]) * point[where][part], point[where]["supervised"])
        for run in runs
        if run["settings"]["weights"] in ("fixed", "ramp")
        for point in run["gradient_norms"]
    ]
    ratios = [term / supervised for term, supervised in norms if term > 0 and supervised > 0]
    if not ratios:
        return None
    terms, supervised = (statistics.fmean(column) for column in zip(*norms, strict=True))
    return statistics.median(ratios), terms / supervised


def _weight(settings: Mapping[str, Any], part: str, step: int) -> float:
    """Of a term in a step."""
    weight: float = settings[PARTS[part]]
    return weight * rise(step / settings["steps"]) if settings["weights"] == "ramp" else weight


def _cosine(runs: Sequence[Run], when: int) -> str:
    return _mean([run["similarity"][when]["across"] for run in runs if run["similarity"][when]], "{:.2f}")


def _mean(values: Sequence[float], shown: str) -> str:
    return shown.format(statistics.mean(values)) if values else "-"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _fewer(known: int, seeds: int) -> str:
    """Of how many seeds a cell is, where that is not what the row says."""
    return f" ({known} seed{'s' * (known > 1)})" if 0 < known < seeds else ""


def _interval(differences: Sequence[float]) -> str:
    mean, interval, _ = over_seeds(differences)
    if interval is not None:
        return f"{mean:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"
    return f"{mean:+.3f}" + (f" ({', '.join(f'{one:+.3f}' for one in differences)})" if len(differences) > 1 else "")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="file of the runs (default: %(default)s)"
    )
    parser.add_argument("--document", type=Path, metavar="FILE", help="put the tables there instead of printing them")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where to write the plots (default: nowhere)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
