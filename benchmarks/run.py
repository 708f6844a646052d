"""What the losses cost, forward and backward: beside plain BCE, beside what nothing can avoid, and as sizes grow.

Everything is timed in this one process after a warm-up, the items of a group in turn, with fresh gradients each time.
The tables give medians (and quartiles), and ratios within rounds. Memory is what PyTorch allocates.

    python benchmarks/run.py                  # about 25 minutes on two cores
    python benchmarks/run.py --quick          # under a minute, small sizes: shows that all of it works
    python benchmarks/run.py --device cuda --json run-cuda.json
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

# PyTorch's profiler, which counts the memory, reports each of its starts otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from measure.arguments import device, picture_file, whole_number, writable_file
from measure.machine import environment
from overhead.plan import full, quick
from overhead.plots import write_growth
from overhead.sections import SECTIONS
from overhead.tables import markdown
from tqdm import tqdm


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; the process's exit code."""
    options = _parsed(arguments)
    plan = (quick if options.quick else full)(options.device, options.seed)
    figures: dict[str, Any] = {
        "configuration": plan._asdict() | {"device": str(options.device)},
        "environment": environment(options.device),
        "sections": {},
    }
    with tqdm(SECTIONS.items(), unit="section") as progress:
        for name, section in progress:
            if options.only not in (None, name):
                continue
            progress.set_description(name)
            figures["sections"][name] = section(plan, progress.set_postfix_str)
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(markdown(figures))
    if "growth" in figures["sections"]:
        write_growth(options.output, figures)
        print(f"plots: {options.output}")
    print(f"figures: {options.json}")
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section alone")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        help="auto (the default: cuda where there is one), cpu, cuda, cuda:1, ...",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="seed of data and weights (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=picture_file, default="run.png", metavar="PNG", help="plots (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=writable_file, default="run.json", metavar="FILE", help="figures (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.json == options.output:
        parser.error(f"--json and --output must be two files, got {str(options.json)!r} for both")
    return options


if __name__ == "__main__":
    sys.exit(main())
