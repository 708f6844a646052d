"""How many kernels torch.compile would launch on CUDA, and how much it would allocate; needs no GPU.

Prints a table for each loss, read off the generated code (overhead/launches.py).

    python benchmarks/kernels.py
"""

import argparse
import math

from measure.markdown import aligned
from overhead.launches import launches, meta_batch

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss


def main() -> None:
    """Print a table for each loss at strides 1 and 4, 4 x 32 channels x 512 x 512 pixels."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [["loss", "stride", "direction", "Triton kernels", "other operators", "largest buffer / features"]]
    for name, criterion, first in (
        ("density", PatchDensityContrastLoss(), 2),
        ("edge", PatchEdgeContrastLoss(), 2),
        ("combined", CombinedExudateLoss.paper(), 0),
    ):
        for stride in (1, 4):
            logits, target, features = meta_batch(512, 32, stride)
            inputs = (features, target) if first else (logits, target, features)
            for direction, found in launches(criterion, *inputs).items():
                largest = max(math.prod(shape) * dtype.itemsize for shape, dtype in found.buffers) / features.nbytes
                counts = str(len(found.kernels)), str(len(found.others)), f"{largest:.2f}"
                rows.append([name, str(stride), direction, *counts])
    print(aligned(rows))


if __name__ == "__main__":
    main()
