"""Everyday degenerate batches and half precision: finite losses, finite gradients."""

import math

import pytest
import torch
from batches import batch, gradients

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
)


def degenerate_batches():
    logits, target, features = (tensor.detach() for tensor in batch())
    zero, one = torch.zeros_like(target), torch.ones_like(target)
    pixel = zero.clone()
    pixel[0, 0, 16, 16] = 1
    return {
        "no lesion": (logits, zero, features),
        "all lesion": (logits, one, features),
        "all ignored": (logits, one * 255, features),
        "one lesion pixel": (logits, pixel, features),
        "one image": (logits[:1], target[:1], features[:1]),
        "one patch": (logits[:1, :, :8, :8], target[:1, :, :8, :8], features[:1, :, :8, :8]),
        "one pixel": (logits[:1, :, :1, :1], one[:1, :, :1, :1], features[:1, :, :1, :1]),
        "constant features": (logits, target, torch.ones_like(features)),
        "zero features": (logits, target, torch.zeros_like(features)),
        "features of 1e4": (logits, target, features * 1e4),
        "features of 1e30": (logits, target, features * 1e30),
        "features of 1e-30": (logits, target, features * 1e-30),
        "infinite ignored logits": (
            torch.where(target == 0, -math.inf, logits),
            target + 255 * (target == 0),
            features,
        ),
        "huge logits": (logits * 1e4, target, features),
    }


@pytest.mark.parametrize("contrast", ["nt_xent", "sup_con"])
@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", degenerate_batches())
def test_degenerate_batches_give_finite_float32(name, half, contrast):
    logits, target, features = degenerate_batches()[name]
    if half is not None:
        if name in ("features of 1e30", "features of 1e-30") and half == torch.float16:
            features = features.sign()
        logits, features = logits.to(half), features.to(half)
    inputs = logits.requires_grad_(), features.requires_grad_()
    parts = {"contrast": contrast, "patch_size": 8, "ignore_index": 255}
    criterion = CombinedExudateLoss(
        0.02, 0.1, density=PatchDensityContrastLoss(**parts), edge=PatchEdgeContrastLoss(**parts), ignore_index=255
    )
    terms = criterion.terms(logits, target, features)
    for value in terms[:4]:
        assert value.isfinite()
        assert value.dtype == torch.float32
        assert value.shape == ()
    for value, tensors in zip(terms[:4], (inputs, inputs[:1], inputs[1:], inputs[1:]), strict=True):
        for gradient in gradients(value, *tensors):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_loss_in_float32(dtype):
    logits, target, features = batch()
    criterion = CombinedExudateLoss.paper()
    wanted = criterion.terms(logits, target, features)
    with torch.autocast("cpu", dtype=dtype):
        got = criterion.terms(logits, target, features)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", dtype=dtype):
        layer = torch.nn.Conv2d(4, 1, 1)
        loss = criterion(layer(features), target, features.to(dtype))
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()


def test_gradients_of_half_features_survive_a_grad_scaler():
    logits, target, features = batch()
    half = (features.detach() * 1e4).half().requires_grad_()
    loss = CombinedExudateLoss.paper()(logits, target, half) * 2.0**16
    (gradient,) = gradients(loss, half)
    assert gradient.dtype == torch.float16
    assert gradient.isfinite().all()
    assert gradient.any()


def test_nan_features_make_the_loss_nan():
    logits, target, features = batch()
    features = features.detach().clone()
    features[0, 0, 8, 8] = math.nan
    features.requires_grad_()
    assert CombinedExudateLoss.paper()(logits, target, features).isnan()
