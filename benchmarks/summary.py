"""Tables and plots of the study, from the file of its runs alone.

    python benchmarks/summary.py                       # prints the tables
    python benchmarks/summary.py --document docs/results.md --plots docs

puts the tables between two marks of the document, and writes study-curves.png and study-differences.png.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from differences import Difference, over_photographs, over_seeds
from questions import QUESTIONS
from study import RESULTS
from study_plots import write_curves, write_differences
from tables import aligned

BEGIN, END = "<!-- written by benchmarks/summary.py: begin -->", "<!-- end -->"
SHOWN = {
    "f1": "F1",
    "iou": "IoU",
    "f1_pixels": "F1, all pixels",
    "average_precision": "average precision",
    "small_recall": "small lesions found",
    "boundary_f1": "boundary F1",
}
COMPARED = ("f1", "iou", "small_recall", "boundary_f1")
BASELINE = "bce"
Run = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write what the command line asks for."""
    options = _parsed(arguments)
    arms = by_arm([json.loads(line) for line in options.results.read_text().splitlines()])
    text = tables(arms)
    if options.document is None:
        print(text)
    else:
        options.document.write_text(replaced(options.document.read_text(), text))
    if options.plots is not None:
        write_curves(options.plots / "study-curves.png", arms, _asked(arms))
        rows = {
            name: over_seeds(runs, arms[BASELINE], "f1") for name, runs in _tested(arms).items() if name != BASELINE
        }
        write_differences(options.plots / "study-differences.png", rows)
    return 0


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm by seed; of a seed that ran twice the last, but one that looked at the test photographs."""
    best: dict[tuple[str, int], Run] = {}
    for run in runs:
        key = run["arm"], run["seed"]
        if key not in best or run["tested"] >= best[key]["tested"]:
            best[key] = run
    arms: dict[str, list[Run]] = {}
    for (arm, _), run in sorted(best.items(), key=lambda item: item[0][1]):
        arms.setdefault(arm, []).append(run)
    return arms


def tables(arms: Mapping[str, Sequence[Run]]) -> str:
    """Of each question with a run: metrics, differences to BCE, what the terms did; and what has not been run."""
    parts = []
    for letter, question in QUESTIONS.items():
        ran = {name: arms[name] for name in question.arms if name in arms}
        if not ran:
            parts.append(f"### Question {letter}\n\nNot run.")
            continue
        parts += [f"### Question {letter}", _metrics(ran, tested=question.tested)]
        if question.tested and len(ran) > 1 and BASELINE in ran:
            parts.append(_differences(_tested(ran)))
        parts.append(_mechanism(ran))
        runs = len(question.arms) * question.seeds
        done = sum(run["seed"] < question.seeds for found in ran.values() for run in found)
        parts.append(f"{done} of {runs} runs.")
    return "\n\n".join(parts)


def replaced(document: str, text: str) -> str:
    """The document with the text between its two marks."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def _tested(arms: Mapping[str, Sequence[Run]]) -> dict[str, list[Run]]:
    found = {name: [run for run in runs if run["tested"]] for name, runs in arms.items()}
    return {name: runs for name, runs in found.items() if runs}


def _asked(arms: Mapping[str, Sequence[Run]]) -> list[str]:
    """The arms of the first question that have run."""
    return [name for name in QUESTIONS["a"].arms if name in arms]


def _metrics(arms: Mapping[str, Sequence[Run]], *, tested: bool) -> str:
    """Mean and standard deviation over seeds: of the test photographs, or of those held out."""
    rows = [["on the test photographs" if tested else "on the fold held out", "seeds", *SHOWN.values()]]
    for name, runs in arms.items():
        found = [run["test"] if tested else run["curve"][-1] for run in runs if run["tested"] or not tested]
        if found:
            rows.append([name, str(len(found)), *(_spread([one[key] for one in found]) for key in SHOWN)])
    return aligned(rows)


def _differences(arms: Mapping[str, Sequence[Run]]) -> str:
    rows = [["difference to BCE: t interval over seeds; bootstrap over photographs", *(SHOWN[key] for key in COMPARED)]]
    for name, runs in arms.items():
        if name != BASELINE:
            cells = [
                f"{_interval(over_seeds(runs, arms[BASELINE], key))}; "
                f"{_interval(over_photographs(runs, arms[BASELINE], key), mean=False)}"
                for key in COMPARED
            ]
            rows.append([name, *cells])
    return aligned(rows)


def _mechanism(arms: Mapping[str, Sequence[Run]]) -> str:
    """How often the terms are there, how hard they pull, what becomes of the features, and what a step costs."""
    rows = [
        [
            "what the terms did",
            "density active",
            "edge active",
            "gradient at the features, density : BCE",
            "edge : BCE",
            "at the first layer, density : BCE",
            "edge : BCE",
            "cosine inside : outside a contour, before, after",
            "step, s",
        ]
    ]
    for name, runs in arms.items():
        cosines = [[run["similarity"][when].get("across") for run in runs] for when in (0, 1)]
        rows.append(
            [
                name,
                *(
                    f"{100 * statistics.mean(run['active'][part] for run in runs):.0f} %"
                    for part in ("density", "edge")
                ),
                *(_pull(runs, where, part) for where in ("features", "first_layer") for part in ("density", "edge")),
                ", ".join(f"{statistics.mean(c for c in found if c is not None):.2f}" for found in cosines),
                _spread([run["step_seconds"]["median"] for run in runs]),
            ]
        )
    return aligned(rows)


def _pull(runs: Sequence[Run], where: str, part: str) -> str:
    """Median ratio of the weighted term's gradient norm to that of the supervised loss, where the term is not 0."""
    weight = {"density": "alpha", "edge": "beta"}[part]
    ratios = [
        run["settings"][weight] * point[where][part] / point[where]["supervised"]
        for run in runs
        for point in run["gradient_norms"]
        if run["settings"]["weights"] != "share" and point[where][part] > 0 and point[where]["supervised"] > 0
    ]
    return f"{statistics.median(ratios):.3g}" if ratios else "-"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _interval(difference: Difference, *, mean: bool = True) -> str:
    shown = f"{difference.mean:+.3f} " if mean else ""
    if difference.interval is None:
        return f"{shown}(one seed)"
    return f"{shown}({difference.interval[0]:+.3f} to {difference.interval[1]:+.3f})"


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--document", type=Path, metavar="FILE", help="put the tables there instead of printing them")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where to write the plots (default: nowhere)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
