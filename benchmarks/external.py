"""Do the study's networks hold on photographs of another data set? A line for each that study.py has kept.

    python benchmarks/external.py --images DMED --masks DMED --question u --output hei-med.jsonl

The folders are as train.py --eval-only reads them; photographs are brought to the size that the networks were trained
on. Thresholds are those of the validation folds of IDRiD. Networks whose line is there are not judged again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from data.folders import paired_files
from data.idrid import DataError
from data.photographs import other_photographs
from measure.arguments import whole_number, writable_file
from trials.evaluation import evaluation
from trials.kept import kept_networks
from trials.questions import QUESTIONS
from trials.record import RESULTS, read_lines

ACROSS = 850  # pixels: an eye of IDRiD's photographs with a short side of 712


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and judge what is not judged yet; the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="photographs")
    parser.add_argument("--masks", type=Path, required=True, metavar="FOLDER", help="masks of exudates")
    parser.add_argument("--question", choices=QUESTIONS, required=True, help="whose networks: see docs/protocol.md")
    parser.add_argument("--output", type=writable_file, required=True, metavar="FILE", help="file for the lines")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="file of the runs (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=Path(".study"), metavar="FOLDER", help="study.py's")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        samples = other_photographs(paired_files(options.images, options.masks), ACROSS)
        judged = {(line["arm"], line["seed"]) for line in read_lines(options.output)}
        for kept in kept_networks(QUESTIONS[options.question], options.results, options.cache):
            if (kept.arm, kept.seed) in judged:
                continue
            figures = evaluation(kept.model, samples, kept.settings, kept.thresholds)
            line = {"arm": kept.arm, "seed": kept.seed, "thresholds": kept.thresholds, "test": figures}
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
    except (DataError, FileNotFoundError) as error:
        print(f"external.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
