"""How many kernels the losses launch on CUDA, and what the host does for it; needs no GPU.

Prints tables: for eager code, the launches by part (overhead/eager.py) and the host's time (overhead/host.py); for
compiled code, what torch.compile would launch and allocate (overhead/launches.py).

    python benchmarks/kernels.py --json kernels.json
"""

import argparse
import json
import math
from collections import Counter

import torch
from measure.arguments import writable_file
from measure.machine import environment
from measure.markdown import aligned
from overhead.configurations import configurations, inputs_of
from overhead.eager import PARTS, WEIGHTS, eager_launches
from overhead.host import host_microseconds
from overhead.launches import launches, meta_batch

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss


def main() -> None:
    """Print the tables; write the figures of eager code as JSON, if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=writable_file, metavar="FILE", help="file for the figures of eager code (default: none)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    eager, host = eager_counts(), _host_times()
    if options.json:
        figures = {"environment": environment(torch.device("cpu")), "eager": eager, "host": host}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(eager_table(eager))
    print()
    print(host_table(host))
    print()
    print(_compiled_table())


def eager_counts() -> dict[str, dict[str, dict[str, int]]]:
    """Launches by configuration, direction and part: 6 x 16 channels x 256 x 256 pixels."""
    found = {}
    for name, configuration in configurations().items():
        counted = eager_launches(configuration.criterion, *inputs_of(configuration, "meta"))
        found[name] = {
            direction: dict(Counter(launch.part for launch in every)) for direction, every in counted.items()
        }
    return found


def eager_table(counts: dict[str, dict[str, dict[str, int]]]) -> str:
    """A row for each configuration; a cell is forward + backward."""
    parts = list(dict.fromkeys(["supervised", *PARTS.values(), WEIGHTS]))
    rows = [["loss", *parts, "all"]]
    for name, found in counts.items():
        cells = [[found[direction].get(part, 0) for direction in ("forward", "backward")] for part in parts]
        every = [sum(column) for column in zip(*cells, strict=True)]
        rows.append([name, *(f"{a} + {b}" for a, b in cells), f"{every[0]} + {every[1]} = {sum(every)}"])
    return aligned(rows)


def host_table(microseconds: dict[str, float]) -> str:
    """A row for each configuration."""
    rows = [["loss", "microseconds", "times BCE"]]
    rows += [[name, f"{time:.0f}", f"{time / microseconds['BCE']:.1f}"] for name, time in microseconds.items()]
    return aligned(rows)


def _host_times() -> dict[str, float]:
    calls = {}
    for name, configuration in configurations().items():
        calls[name] = configuration.criterion, inputs_of(configuration, "cpu", images=1, channels=2)
    return host_microseconds(calls)


def _compiled_table() -> str:
    """Compiled code at strides 1 and 4, 4 x 32 channels x 512 x 512 pixels."""
    rows = [["loss", "stride", "direction", "Triton kernels", "other operators", "largest buffer / features"]]
    for name, criterion, first in (
        ("density", PatchDensityContrastLoss(), 2),
        ("edge", PatchEdgeContrastLoss(), 2),
        ("combined", CombinedExudateLoss(0.02, 0.1), 0),
    ):
        for stride in (1, 4):
            logits, target, features = meta_batch(512, 32, stride)
            inputs = (features, target) if first else (logits, target, features)
            for direction, found in launches(criterion, *inputs).items():
                largest = max(math.prod(shape) * dtype.itemsize for shape, dtype in found.buffers) / features.nbytes
                counts = str(len(found.kernels)), str(len(found.others)), f"{largest:.2f}"
                rows.append([name, str(stride), direction, *counts])
    return aligned(rows)


if __name__ == "__main__":
    main()
