"""What the losses promise of memory: little beyond the gradient, linear in the embeddings, and nothing that stays."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from measure.cost import extra_memory
from overhead.workloads import drawn_batch, pixels_as_patches

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss

CPU = torch.device("cpu")


def step(criterion, *inputs):
    def work():
        return torch.autograd.grad(criterion(*inputs), [tensor for tensor in inputs if tensor.requires_grad])

    return work


def test_extra_memory_is_at_most_a_tenth_of_the_features():
    batch = drawn_batch((512, 512), CPU, channels=32)
    peak, kept = extra_memory(CPU, step(CombinedExudateLoss.paper(), *batch))
    assert kept == batch.features.nbytes + batch.logits.nbytes
    assert peak - batch.features.nbytes <= 0.1 * batch.features.nbytes


@pytest.mark.parametrize("area", [0.1, 0.5])
def test_extra_memory_stays_small_with_half_precision_and_many_lesions(area):
    batch = drawn_batch((512, 512), CPU, channels=32, area=area, dtype=torch.bfloat16)
    peak, _ = extra_memory(CPU, step(PatchDensityContrastLoss(), batch.features, batch.target))
    assert peak - batch.features.nbytes <= 0.25 * batch.features.nbytes


@pytest.mark.parametrize("contrast", ["nt_xent", "sup_con"])
def test_memory_of_the_contrast_grows_with_its_embeddings_not_their_square(contrast):
    peaks = []
    for count in (4096, 16384):
        batch = pixels_as_patches(count, 4, 0.1, CPU)
        criterion = PatchDensityContrastLoss(1, contrast=contrast)
        peaks.append(extra_memory(CPU, step(criterion, batch.features, batch.target))[0])
    assert peaks[1] <= 4 * peaks[0]
    assert peaks[1] < 4 * 16384**2 / 50


def resident():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def living():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from Linux")
def test_a_thousand_steps_of_changing_sizes_leave_memory_where_it_was():
    criterion = CombinedExudateLoss(0.02, 0.1, density=PatchDensityContrastLoss(8))

    def steps(count):
        for n in range(count):
            size = 16 + 4 * (n % 9), 48 - 3 * (n % 7)
            batch = drawn_batch(size, CPU, images=1 + n % 3, channels=4, area=(n % 5) / 4, seed=n)
            step(criterion, *batch)()

    steps(250)
    before = living(), resident()
    steps(1000)
    after = living(), resident()
    assert after[0] <= before[0]  # what earlier tests left may go meanwhile
    assert after[1] - before[1] < 20e6  # a leak of one feature map a step would be 35 MB, of a graph more
