"""Where do the study's networks err? Counts on the validation folds, from the networks that study.py has kept.

    python benchmarks/errors.py --data PATH --question u --json benchmarks/results/errors.json --plot docs/errors.png

Each network of a seed that all arms have is judged on its own fold, at the threshold of its line in the results. The
test photographs are not looked at, so that what is tried next does not come from them.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data.idrid import DataError
from data.photographs import CHANNELS, train_validation_split
from measure.arguments import whole_number, writable_file
from measure.lesion_scores import SIZES, error_counts
from measure.markdown import aligned
from trials.evaluation import probability
from trials.kept import kept_networks
from trials.plots import write_errors
from trials.questions import QUESTIONS, Question
from trials.record import RESULTS
from trials.samples import samples_of

KINDS = {
    "fp_near": "false, at most 2 px from a lesion",
    "fp_between": "false, 2 to 8 px",
    "fp_far": "false, farther",
    "fn_near": "missing, at most 2 px from the background",
    "fn_inside": "missing, deeper",
    "fn_missed": "missing, of a lesion not touched",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, count, and write what was found; the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="the data set's folder")
    parser.add_argument("--question", choices=QUESTIONS, required=True, help="whose networks: see docs/protocol.md")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="file of the runs (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=Path(".study"), metavar="FOLDER", help="study.py's")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads (default: %(default)s)")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="file for the counts (default: none)")
    parser.add_argument("--plot", type=writable_file, metavar="FILE", help="PNG of the kinds (default: none)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        found = errors_of(QUESTIONS[options.question], options)
    except (DataError, FileNotFoundError) as error:
        print(f"errors.py: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        write_errors(options.plot, {arm: by_kind(runs) for arm, runs in found.items()})
    print(errors_table(found))
    return 0


def errors_of(question: Question, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """For each arm the counts of each seed of which all arms' networks are kept, summed over the fold."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kept in kept_networks(question, options.results, options.cache):
        _, fold = train_validation_split(samples_of(kept.settings, options.data, "train", options.cache), kept.seed)
        counted = [
            error_counts(np.asarray(own > threshold), np.asarray(sample.lesion[CHANNELS.index(lesion)]))
            for sample in fold
            for own, threshold, lesion in zip(
                probability(kept.model, sample), kept.thresholds, kept.settings.lesions, strict=True
            )
        ]
        sums = {name: sum(one[name] for one in counted) for name in counted[0]}
        found.setdefault(kept.arm, []).append({"seed": kept.seed, **sums})
    shared = set.intersection(*({run["seed"] for run in runs} for runs in found.values()))
    return {arm: [run for run in runs if run["seed"] in shared] for arm, runs in found.items()}


def by_kind(runs: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Wrong pixels per 100 pixels of lesion, by kind, the mean over seeds."""
    return {kind: float(np.mean([100 * run[name] / run["lesion"] for run in runs])) for name, kind in KINDS.items()}


def errors_table(found: Mapping[str, Sequence[Mapping[str, int]]]) -> str:
    """A row for each arm: wrong pixels per 100 of lesion by kind, then the share of lesions touched by size."""
    sizes = [f"{low} to {high - 1} px" for low, high in itertools.pairwise(SIZES)] + [f"{SIZES[-1]} px and more"]
    rows = []
    for arm, runs in found.items():
        touched = [
            f"{np.mean([run[f'touched_{size}'] / max(1, run[f'lesions_{size}']) for run in runs]):.0%}"
            for size in SIZES
        ]
        rows.append([arm, str(len(runs)), *(f"{value:.1f}" for value in by_kind(runs).values()), *touched])
    return aligned([["", "seeds", *KINDS.values(), *(f"touched, {size}" for size in sizes)], *rows])


if __name__ == "__main__":
    sys.exit(main())
