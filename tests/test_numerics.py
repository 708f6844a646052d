"""How far rounding takes the losses from float64, over temperatures, scales and sizes, and what stays finite."""

import pytest
import torch
from batches import TERMS, term
from strategies import CONTRASTS
from torch.nn.functional import avg_pool2d

TEMPERATURES = [0.01, 0.05, 0.5, 10.0]
SCALES = [1e-4, 1.0, 1e4]
contrasts = pytest.mark.parametrize("contrast", CONTRASTS)


def blurred(side, noise, dtype):
    """Features that lean to one side in lesions and are exact in the dtype, as float64; and their target."""
    generator = torch.Generator().manual_seed(side)
    target = (avg_pool2d(torch.rand(1, 1, side + 4, side + 4, generator=generator), 5, 1) > 0.5).float()
    mean, lesion, random = (torch.randn(1, 16, *size, generator=generator) for size in ((1, 1), (1, 1), (side, side)))
    return (mean + lesion * target + noise * random).to(dtype).double(), target


def value_and_gradient(loss, features, target, largest=None):
    """With the loss scaled so that the largest gradient is the one given, as a GradScaler would in float16."""
    features = features.detach().requires_grad_()
    value = loss(features, target)
    (gradient,) = torch.autograd.grad(value, features, retain_graph=True)
    if largest is not None:
        (gradient,) = torch.autograd.grad(value * largest, features)
    return value.detach().double(), gradient.double()


def assert_near(got, wanted, relative, floors):
    for a, b, floor in zip(got, wanted, floors, strict=True):
        assert (a - b).norm() <= relative * b.norm() + floor


@term
@contrasts
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("side", "noise"), [(8, 1.0), (40, 0.1), (40, 1.0)])
def test_float32_is_within_1e_5_of_float64(term, contrast, temperature, scale, side, noise):
    features, target = blurred(side, noise, torch.float32)
    features = (features * scale).float()
    loss = TERMS[term](1 if term == "density" else 2, contrast=contrast, temperature=temperature)
    wanted = value_and_gradient(loss, features.double(), target)
    # The gradient of a direction goes with 1 / scale, and so does what rounding leaves of a gradient of nearly 0.
    assert_near(value_and_gradient(loss, features, target), wanted, 1e-5, (1e-6, 1e-6 / scale))


@contrasts
def test_so_it_is_with_16_000_embeddings(contrast):
    features, target = blurred(127, 1.0, torch.float32)
    loss = TERMS["density"](1, contrast=contrast, temperature=0.01)
    wanted = value_and_gradient(loss, features, target)
    assert_near(value_and_gradient(loss, features.float(), target), wanted, 1e-5, (1e-6, 1e-6))


@term
@contrasts
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", SCALES)
def test_half_precision_features_are_within_2e_2_of_float64(term, contrast, half, temperature, scale):
    features, target = blurred(40, 0.5, half)
    features = (features * scale).clamp(-60_000, 60_000).to(half)
    loss = TERMS[term](4, contrast=contrast, temperature=temperature)
    wide = value_and_gradient(loss, features.double(), target)
    largest = 1 / float(wide[1].abs().max())
    wanted = wide[0], wide[1] * largest
    assert_near(value_and_gradient(loss, features, target, largest), wanted, 2e-2, (1e-6, 0))


def identical(e):
    return torch.ones_like(e)


def opposite(e):
    return torch.where(torch.arange(len(e))[:, None] % 2 == 0, 1.0, -1.0).to(e) * torch.ones_like(e)


def one_of_norm(norm):
    def changed(e):
        e = e.clone()
        e[3] *= norm / e[3].norm()
        return e

    return changed


ADVERSARIAL = {
    "identical": identical,
    "opposite": opposite,
    "labels at right angles": lambda e: torch.eye(2)[(torch.arange(len(e)) < 8).long()].to(e),
    "one of norm 0": one_of_norm(0.0),
    "one of norm 1e30": one_of_norm(1e30),
    "one of norm 1e-30": one_of_norm(1e-30),
}


@contrasts
@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("temperature", [0.001, 0.01, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adversarial_embeddings_stay_finite(contrast, case, temperature, dtype):
    vectors = ADVERSARIAL[case](torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    features = vectors.T.reshape(1, 2, 4, 4).to(dtype).requires_grad_()
    target = (torch.arange(16) < 8).reshape(1, 1, 4, 4)
    loss = TERMS["density"](1, contrast=contrast, temperature=temperature)(features, target)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite()
    assert gradient.isfinite().all()
