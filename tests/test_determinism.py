"""The same call gives the same bits, and draws random numbers only where it says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import TERMS, term

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss

OPTIONS = {
    "defaults": {},
    "sup_con": {"contrast": "sup_con"},
    "drawn": {"max_patches": 16},
    "ignored": {"ignore_index": -1},
    "small patches": {"patch_size": 4},
}


def large_batch(cells=128):
    """Large enough that torch shares the work out among threads."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 1, 132, 132, generator=generator)
    target = (torch.nn.functional.avg_pool2d(noise, 5, 1) > 0.6).float()
    target[:, :, :40, :40], target[1, :, 100:] = 1, 0
    features = torch.randn(2, 64, cells, cells, generator=generator)
    return torch.randn(2, 1, 128, 128, generator=generator).requires_grad_(), target, features.requires_grad_()


def criterion(**options):
    return CombinedExudateLoss(
        0.02, 0.1, density=PatchDensityContrastLoss(**options), edge=PatchEdgeContrastLoss(**options)
    )


def step(loss, device="cpu"):
    torch.manual_seed(0)
    logits, target, features = (tensor.detach().to(device) for tensor in large_batch())
    inputs = logits.requires_grad_(), features.requires_grad_()
    value = loss(logits, target, features)
    return value, *torch.autograd.grad(value, inputs)


@pytest.fixture
def _deterministic():
    """Torch refuses operators that are not, and fills memory with NaN that nothing has written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2])
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_seed_and_threads_give_the_same_bits(name):
    first = step(criterion(**OPTIONS[name]))
    assert first[1].any()
    assert first[2].any()
    for _ in range(3):
        for a, b in zip(step(criterion(**OPTIONS[name])), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cells", [128, 32, 50])
def test_deterministic_algorithms_are_all_that_is_used(name, cells):
    for loss in (criterion(**OPTIONS[name]), CombinedExudateLoss.hecl()):
        logits, target, features = large_batch(cells)
        loss(logits, target, features).backward()
        assert features.grad.isfinite().all()


@term
def test_only_max_patches_draws_and_from_the_default_generator(term):
    _, target, features = large_batch()
    for options, draws in (({}, False), ({"max_patches": 8}, True)):
        loss = TERMS[term](8, **options)
        values = []
        for seed in (1, 1, 2):
            before = torch.manual_seed(seed).get_state()
            values.append(loss(features, target).detach())
            assert torch.equal(before, torch.get_rng_state()) != draws
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2]) != draws


@pytest.mark.cuda
def test_deterministic_algorithms_are_respected_on_cuda():
    """In a process of its own: cuBLAS reads its workspace's size when it starts."""
    code = """
import torch
from test_determinism import OPTIONS, criterion, step
torch.use_deterministic_algorithms(True)
for options in OPTIONS.values():
    first, second = (step(criterion(**options), "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), options
print("equal")
"""
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr
