"""How many kernels the losses launch on CUDA, and what the host does for it; needs no GPU.

Prints tables: of eager code the launches by part (overhead/eager.py) and the host's time (overhead/host.py), both also
with the package's own kernels, which are off, and what these take of an H100 (overhead/registers.py); of compiled code
what torch.compile would launch and how much it would allocate (overhead/launches.py).

    python benchmarks/kernels.py --json kernels.json
"""

import argparse
import contextlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from measure.arguments import writable_file
from measure.machine import environment
from measure.markdown import aligned
from overhead.configurations import configurations, inputs_of
from overhead.eager import PARTS, WEIGHTS, eager_launches
from overhead.host import host_microseconds
from overhead.launches import launches, meta_batch
from overhead.registers import registers

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss, fused

CHANNELS, DTYPES = (16, 32, 64, 256, 1024), ("float32", "bfloat16")
Uses = dict[str, dict[str, list[int]]]


def main() -> None:
    """Print the tables; write the figures of eager code as JSON, if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=writable_file, metavar="FILE", help="file for the figures of eager code (default: none)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "eager": eager_counts(),
        "host": _host_times(),
    }
    with package_kernels():
        figures |= {"fused": {"eager": eager_counts(), "host": _host_times(), "registers": register_uses()}}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    for found in (figures, figures["fused"]):
        print(eager_table(found["eager"]), host_table(found["host"]), sep="\n\n", end="\n\n")
    print(register_table(figures["fused"]["registers"]), _compiled_table(), sep="\n\n")


def package_kernels() -> contextlib.AbstractContextManager[bool]:
    """Inside, the package's own kernels are switched on."""
    return mock.patch.object(fused, "KERNELS", True)


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
    seen = {part for found in counts.values() for parts in found.values() for part in parts}
    parts = [part for part in dict.fromkeys(["supervised", *PARTS.values(), WEIGHTS]) if part in seen]
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


def register_uses(channels: Sequence[int] = CHANNELS, dtypes: Sequence[str] = DTYPES) -> Uses:
    """By channels and dtype, and by kernel: registers, bytes spilled, bytes of shared memory."""
    both, found = configurations()["both, max_patches"], {}  # in which all kernels but that of Pull take part
    for number, dtype in itertools.product(channels, dtypes):
        logits, target, features = inputs_of(both, "cpu", images=1, channels=number)
        half = [tensor.detach().to(getattr(torch, dtype)).requires_grad_() for tensor in (logits, features)]
        uses = registers(both.criterion, half[0], target, half[1])
        found[f"{number}, {dtype}"] = {kernel: list(use) for kernel, use in uses.items()}
    return found


def register_table(uses: Uses) -> str:
    """A row for each kernel; a cell holds a thread's registers, and the bytes that it spills, if any."""
    rows = [["kernel", *uses]]
    for kernel in next(iter(uses.values())):
        cells = [use[kernel] for use in uses.values()]
        rows.append(
            [
                kernel,
                *(f"{number}, {spilled} bytes spilled" if spilled else str(number) for number, spilled, _ in cells),
            ]
        )
    return aligned(rows)


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
