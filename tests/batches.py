"""A batch with lesions, the modules to try on it, and how values and gradients are compared."""

import pytest
import torch
from monai.losses import DiceLoss

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
)

TERMS = {"density": PatchDensityContrastLoss, "edge": PatchEdgeContrastLoss}


term = pytest.mark.parametrize("term", TERMS)


def batch(size=32, images=2, classes=1, channels=4, stride=1, dtype=torch.float32, seed=0):
    """Logits, target and features of some lesions of many sizes; one image has none where there are several."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(images, classes, size, size)
    target[:1, :, size // 8 : size // 2, size // 8 : size // 2 + 3] = 1
    target[:1, :, -5:-3, 6:9] = 1
    features = torch.randn(images, channels, size // stride, size // stride, generator=generator, dtype=dtype)
    logits = torch.randn(target.shape, generator=generator, dtype=dtype)
    return logits.requires_grad_(), target, features.requires_grad_()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_equal_values_and_gradients(got, wanted, *inputs):
    torch.testing.assert_close(got, wanted, check_dtype=False)
    for a, b in zip(gradients(got, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9 * max(1, float(b.abs().max())))


MODULES = {
    "density": PatchDensityContrastLoss(num_patches=4, select=3, threshold=0.2, ignore_index=-1),
    "edge": PatchEdgeContrastLoss(8, inner_radius=(1, 2), density_threshold=0.3, scope="image", isolate_patches=True),
    "combined": CombinedExudateLoss(0.5, 0.25, supervised=DiceLoss(sigmoid=True), density=PatchDensityContrastLoss(4)),
}
