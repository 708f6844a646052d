"""Laws of CombinedExudateLoss: its weights and its parts."""

import pytest
import reference
import segmentation_models_pytorch as smp
import torch
from batches import assert_equal_values_and_gradients, batch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.losses import DiceLoss
from strategies import features_for, masks
from torch.nn.functional import binary_cross_entropy_with_logits

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    FeatureTap,
    LossTerms,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    _checks,
    _terms,
)
from contrastive_exudate_loss.pooling import masked_sums

WEIGHT = torch.nn.Parameter(torch.ones(3))


def squares_of_valid(logits, target):
    return logits[target != -1].square().mean()


@given(data=st.data())
def test_combined_weighs_its_parts(data):
    ignored = data.draw(st.booleans())
    target = data.draw(masks(batch=(1, 2), side=(1, 10), ignored=ignored))
    ignore_index = 255 if ignored else None
    features = data.draw(features_for(len(target), side=(1, 12))).requires_grad_()
    logits = torch.randn(target.shape, dtype=torch.float64, requires_grad=True)
    alpha, beta = data.draw(st.sampled_from([(0.02, 0.1), (1.0, 0.0), (0.0, 2.0), (0.5, 0.5)]))
    sides = data.draw(st.sampled_from([(4, 4), (4, 5), (5, 4)]))  # one pooling for both terms, or two
    criterion = CombinedExudateLoss(
        alpha,
        beta,
        density=PatchDensityContrastLoss(sides[0], ignore_index=ignore_index),
        edge=PatchEdgeContrastLoss(sides[1], ignore_index=ignore_index),
        ignore_index=ignore_index,
    )
    terms = criterion.terms(logits, target, features)
    supervised = reference.cross_entropy(logits, target, ignore_index)
    density = reference.density_loss(features, target, patch_size=sides[0], ignore_index=ignore_index)
    edge = reference.edge_loss(features, target, patch_size=sides[1], ignore_index=ignore_index)
    wanted = supervised + alpha * density + beta * edge
    assert_equal_values_and_gradients(terms.total, wanted + 0 * features.sum(), logits, features)
    for got, value, weight in zip(terms[1:4], (supervised, density, edge), (1, alpha, beta), strict=True):
        torch.testing.assert_close(got, value.double() * (weight > 0))
    assert (terms.alpha, terms.beta) == (alpha, beta)
    assert torch.equal(criterion(logits, target, features), terms.total)


def test_gradcheck_of_the_combination():
    logits, target, features = batch(size=12, channels=2, dtype=torch.float64)
    target[1, :, :6] = 255
    criterion = CombinedExudateLoss(0.5, 2.0, ignore_index=255)
    assert torch.autograd.gradcheck(lambda *tensors: criterion(tensors[0], target, tensors[1]), (logits, features))


def test_the_weights_are_the_papers_unless_given():
    criterion = CombinedExudateLoss.paper()
    assert (criterion.alpha, criterion.beta) == (0.02, 0.1)


def test_weak_edge_is_the_edge_term_at_a_small_weight_and_takes_what_the_criterion_takes():
    class Mine(CombinedExudateLoss):
        pass

    logits, target, features = batch()
    target[:, :, :, -4:] = -1
    tap = FeatureTap(torch.nn.Conv2d(4, 1, 1))
    with pytest.warns(
        FutureWarning, match=r"use CombinedExudateLoss\(...\), which sets the edge term's weight itself"
    ) as caught:
        criterion = Mine.weak_edge(supervised=squares_of_valid, ignore_index=-1, features=tap)
    assert caught[0].filename == __file__
    assert type(criterion) is Mine
    assert criterion.tap is tap
    terms = criterion.terms(logits, target, features)
    assert terms.density == 0
    assert torch.equal(terms.edge, PatchEdgeContrastLoss(ignore_index=-1)(features, target))
    torch.testing.assert_close(terms.total, squares_of_valid(logits, target) + 0.002 * terms.edge)


@pytest.mark.parametrize("of", [torch.Tensor, MetaTensor])
@pytest.mark.parametrize(("edge_side", "poolings"), [(16, 1), (8, 2)])
def test_terms_of_equal_patches_share_one_pooling(edge_side, poolings, of, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return masked_sums(*arguments)

    monkeypatch.setattr(_terms, "masked_sums", counted)
    CombinedExudateLoss(0.02, 0.1, edge=PatchEdgeContrastLoss(edge_side))(*(t.as_subclass(of) for t in batch()))
    assert len(calls) == poolings


def test_alpha_and_beta_skip_and_may_change():
    logits, target, features = batch()
    criterion = CombinedExudateLoss(0, 0)
    bce = torch.nn.BCEWithLogitsLoss()(logits, target)
    assert torch.equal(criterion(logits, target), bce)
    criterion.alpha, criterion.beta = 0.3, 2
    terms = criterion.terms(logits, target, features)
    assert isinstance(terms, LossTerms)
    torch.testing.assert_close(terms.total, bce + 0.3 * terms.density + 2 * terms.edge)
    assert (criterion.alpha, criterion.beta) == (0.3, 2)
    criterion.beta = 0
    assert criterion.terms(logits, target, features).edge == 0


@pytest.mark.parametrize(
    "supervised",
    [
        DiceLoss(sigmoid=True),
        smp.losses.DiceLoss("multilabel"),
        smp.losses.TverskyLoss("multilabel"),
        smp.losses.FocalLoss("multilabel"),
    ],
    ids=["MONAI Dice", "smp Dice", "smp Tversky", "smp Focal"],
)
def test_another_supervised_loss(supervised):
    logits, target, features = batch(classes=2)
    terms = CombinedExudateLoss(0.02, 0.1, supervised=supervised).terms(logits, target, features)
    assert torch.equal(terms.supervised, supervised(logits, target))
    assert_equal_values_and_gradients(
        terms.total, terms.supervised + 0.02 * terms.density + 0.1 * terms.edge, logits, features
    )


def test_the_supervised_loss_may_be_a_module_and_then_a_function():
    logits, target, _ = batch()
    criterion = CombinedExudateLoss(0, 0, supervised=torch.nn.BCEWithLogitsLoss())
    criterion.supervised = lambda logits, target: logits.sum()
    assert torch.equal(criterion(logits, target), logits.sum())
    criterion.supervised = torch.nn.BCEWithLogitsLoss()
    assert torch.equal(criterion(logits, target), criterion.supervised(logits, target))


def test_supervised_gets_the_target_as_it_is():
    logits, target, features = batch()
    target[:, :, :4] = -1
    seen = []

    def supervised(logits, target):
        seen.append(target)
        return squares_of_valid(logits, target)

    CombinedExudateLoss(0.02, 0.1, supervised=supervised, ignore_index=-1)(logits, target, features)
    assert seen[0] is target


def test_a_supervised_loss_that_learns_from_ignored_pixels_is_warned_of_once():
    logits, target, features = batch()
    criterion = CombinedExudateLoss(0.02, 0.1, supervised=binary_cross_entropy_with_logits, ignore_index=-1)
    criterion(logits, target, features).backward()  # nothing is ignored yet
    target[0, 0, 3, 5] = -1
    loss = criterion(logits, target, features)
    with pytest.warns(UserWarning, match=r"supervised has a gradient at ignored pixels \(target == -1\)"):
        loss.backward(retain_graph=True)
    loss.backward()
    criterion(logits, target, features).backward()


def test_a_supervised_loss_without_any_gradient_is_warned_of_once():
    logits, target, features = batch()
    target[0, 0, :2] = -1
    # Dice of segmentation-models-pytorch counts a class of which the sum over the target is negative as absent.
    target[1] = -1
    target[0, 0, 5:7, 5:7] = 1
    criterion = CombinedExudateLoss(0.02, 0.1, supervised=smp.losses.DiceLoss("binary"), ignore_index=-1)
    with pytest.warns(UserWarning, match=r"supervised has no gradient at any pixel of a batch with lesions"):
        criterion(logits, target, features).backward()
    criterion(logits, target, features).backward()


def test_nothing_is_watched_without_gradients():
    logits, target, features = batch()
    target[0, 0, 3, 5] = -1
    criterion = CombinedExudateLoss(0.02, 0.1, supervised=squares_of_valid, ignore_index=-1)
    wanted = criterion(logits, target, features)
    with torch.no_grad():
        assert torch.equal(criterion(logits.detach(), target, features), wanted)


def masked_in_place(logits, target):
    return binary_cross_entropy_with_logits(logits.masked_fill_(target == -1, 0), target.clamp(min=0))


@pytest.mark.parametrize(
    "supervised", [squares_of_valid, masked_in_place, lambda *_: torch.zeros(()), lambda *_: WEIGHT.sum()]
)
def test_a_supervised_loss_without_a_gradient_at_ignored_pixels_passes_unchanged(supervised):
    logits, target, features = batch()
    target[0, 0, 3, 5] = -1
    wanted = torch.autograd.grad(supervised(2 * logits, target) + 0 * logits.sum(), logits)
    terms = CombinedExudateLoss(0, 0, supervised=supervised, ignore_index=-1).terms(2 * logits, target, features)
    assert torch.equal(terms.total, supervised(2 * logits, target))
    torch.testing.assert_close(torch.autograd.grad(terms.total + 0 * logits.sum(), logits), wanted, rtol=0, atol=0)


def test_pixels_that_the_terms_alone_ignore_may_be_learnt_from():
    logits, target, features = batch()
    target[0, 0, 3, 5] = -1
    parts = {"density": PatchDensityContrastLoss(ignore_index=-1), "edge": PatchEdgeContrastLoss(ignore_index=-1)}

    def as_background(logits, target):
        return binary_cross_entropy_with_logits(logits, target.clamp(min=0))

    CombinedExudateLoss(0.02, 0.1, supervised=as_background, **parts)(logits, target, features).backward()
    assert logits.grad[0, 0, 3, 5] != 0


def test_a_half_precision_supervised_loss_is_made_float32():
    logits, target, features = batch()
    criterion = CombinedExudateLoss(0.02, 0.1, supervised=lambda logits, _: logits.mean().half())
    assert criterion(logits, target, features).dtype == torch.float32
    criterion.alpha = criterion.beta = 0
    assert criterion(logits, target).dtype == torch.float32


def test_a_subclass_of_a_term_is_called_as_it_is():
    class Doubled(PatchDensityContrastLoss):
        def forward(self, features, target):
            return 2 * super().forward(features, target)

    logits, target, features = batch()
    wanted = 2 * CombinedExudateLoss.paper().terms(logits, target, features).density
    torch.testing.assert_close(
        CombinedExudateLoss(0.02, 0.1, density=Doubled()).terms(logits, target, features).density, wanted
    )


def test_where_values_cannot_be_read_all_but_0_are_lesion(monkeypatch):
    logits, target, features = batch()
    wanted = CombinedExudateLoss.paper()(logits, target, features)
    monkeypatch.setattr(_checks, "may_read", lambda _: False)
    torch.testing.assert_close(CombinedExudateLoss.paper()(logits, 255 * target, features), wanted)


def test_weights_stay_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        criterion = CombinedExudateLoss(0.5, 0.25)
    logits, target, features = batch()
    assert criterion.alpha == 0.5
    assert torch.equal(criterion(logits, target, features), CombinedExudateLoss(0.5, 0.25)(logits, target, features))
