"""What raises no error but looks wrong gives one warning, and what is right gives none."""

import warnings

import pytest
import torch
from torch import nn

from contrastive_exudate_loss import CombinedExudateLoss, PatchEdgeContrastLoss


def batch(classes=1, images=2):
    torch.manual_seed(0)
    features = torch.randn(images, 4, 16, 16, requires_grad=True)
    target = torch.zeros(images, classes, 16, 16)
    target[:, :, 4:9, 4:9] = 1
    return nn.Conv2d(4, classes, 1)(features), target, features


def warned(criterion, *batches):
    """The sentences, after the batches one after the other; each names the line here."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for arguments in batches:
            criterion(*arguments)
    assert {one.filename for one in found} <= {__file__}
    return [str(one.message) for one in found]


def test_a_warning_names_the_line_of_any_call():
    assert len(warned(CombinedExudateLoss.hecl(), batch(images=1))) == 1
    assert len(warned(CombinedExudateLoss.hecl().terms, batch(images=1))) == 1


@pytest.mark.parametrize("made", [torch.sigmoid, lambda logits: logits.softmax(1)])
def test_logits_out_of_a_sigmoid_or_softmax(made):
    logits, target, features = batch(classes=2)
    (text,) = warned(CombinedExudateLoss.paper(), *[(made(logits), target, features)] * 3)
    assert text.startswith("logits come from a s")


def test_probabilities_in_place_of_logits():
    logits, target, features = batch(classes=2)
    probabilities = [(logits.sigmoid() ** 2, target, features)] * 12
    (text,) = warned(CombinedExudateLoss.paper(), *probabilities)
    assert text.startswith("logits were between 0 and 1 in all batches so far")
    assert not warned(CombinedExudateLoss.paper(), *probabilities[:8], *[(logits, target, features)] * 4)
    assert not warned(CombinedExudateLoss.paper(), *[(logits * 0, target, features)] * 12)


@pytest.mark.parametrize(("lowest", "highest"), [(-0.5, 1.0), (0.0, 1.5)])
def test_logits_that_leave_the_range_of_probabilities_are_no_such(lowest, highest):
    logits, target, features = batch()
    in_range = logits.sigmoid()
    in_range = (in_range - in_range.amin()) / (in_range.amax() - in_range.amin())  # from 0 to 1, both included
    assert len(warned(CombinedExudateLoss.paper(), *[(in_range, target, features)] * 12)) == 1
    other = lowest + (highest - lowest) * in_range
    assert not warned(CombinedExudateLoss.paper(), *[(other, target, features)] * 12)


@pytest.mark.parametrize("classes", [1, 2])
def test_lesion_everywhere_is_no_background_channel(classes):
    logits, target, features = batch(classes)
    assert not warned(CombinedExudateLoss.paper(), (logits, torch.ones_like(target), features))


def test_lesions_beside_ignored_pixels_and_nothing_at_all_are_no_ignored_lesions():
    logits, target, features = batch()
    both = target.clone()
    both[:, :, :2] = 255
    for mask in (both, torch.zeros_like(target)):
        assert not warned(CombinedExudateLoss(0.02, 0.1, ignore_index=255), *[(logits, mask, features)] * 12)


def test_a_mask_of_0_and_255_whose_lesions_are_all_ignored():
    logits, target, features = batch()
    marked, nothing = target * 255, torch.where(target == 1, 255.0, 0.0)
    nothing[:, :, :2] = 255
    criterion = CombinedExudateLoss(0.02, 0.1, ignore_index=255)
    (text,) = warned(criterion, *[(logits, marked, features)] * 12)
    assert "held 0 and 255 in all batches so far, but no 1" in text
    mixed = [(logits, nothing, features), (logits, target, features)] * 6
    assert not warned(CombinedExudateLoss(0.02, 0.1, ignore_index=255), *mixed)


def test_one_image_where_images_are_contrasted():
    one, two = batch(images=1), batch()
    for criterion in (
        CombinedExudateLoss.hecl(),
        CombinedExudateLoss(beta=0.1, edge=PatchEdgeContrastLoss(scope="image")),
    ):
        (text,) = warned(criterion, one, one)
        assert "the batch has one, so the term is 0" in text
    assert not warned(CombinedExudateLoss.hecl(), two)
    assert not warned(CombinedExudateLoss.paper(), one)


def test_a_background_channel_among_the_lesions():
    logits, target, features = batch(classes=2)
    target[:, 0] = 1 - target[:, 1]
    (text,) = warned(CombinedExudateLoss.paper(), *[(logits, target, features)] * 2)
    assert "one of its channels seems to be the background" in text
    target[:, 0] = 0
    assert not warned(CombinedExudateLoss.paper(), (logits, target, features))


@pytest.mark.parametrize("value", [3, 255, -1, -100])
def test_a_value_of_an_index_mask_that_only_the_given_loss_ignores(value):
    logits, _, features = batch(classes=3)
    index = torch.zeros(2, 16, 16, dtype=torch.int64)
    index[:, 4:9, 4:9] = 1
    index[:, :2] = value
    supervised = nn.CrossEntropyLoss(ignore_index=value)
    criterion = CombinedExudateLoss(0.02, 0.1, supervised=supervised, classes=[1, 2])
    (text,) = warned(criterion, *[(logits, index, features)] * 3)
    assert text.startswith(f"target holds {value}, which the terms take for background; if supervised ignores")
    told = CombinedExudateLoss(0.02, 0.1, supervised=supervised, classes=[1, 2], ignore_index=value)
    assert not warned(told, *[(logits, index, features)] * 3)
    told.supervised = lambda logits, index: nn.functional.cross_entropy(logits, index.clamp(0, 2))
    index[:, 2:4] = 77
    (text,) = warned(told, (logits, index, features))
    assert text.startswith("target holds 77")
    index[:, :4] = 2
    assert not warned(criterion, (logits, index, features))


def test_two_channels_are_of_two_classes():
    logits, _, features = batch(classes=2)
    index = torch.zeros(2, 16, 16, dtype=torch.int64)
    index[:, 4:9, 4:9] = 1
    index[:, :2] = 2
    criterion = CombinedExudateLoss(0.02, 0.1, supervised=nn.CrossEntropyLoss(ignore_index=2), classes=[1])
    (text,) = warned(criterion, (logits, index, features))
    assert text.startswith("target holds 2,")


def test_a_class_beyond_the_channels_of_a_given_loss_is_no_stray_value():
    logits, _, features = batch(classes=4)
    index = torch.zeros(2, 1, 16, 16, dtype=torch.int64)
    index[:, :, 4:9, 4:9] = 4

    def of_each_lesion(logits, index):
        masks = torch.cat([index == n for n in range(1, 5)], 1).float()
        return nn.functional.binary_cross_entropy_with_logits(logits, masks)

    assert not warned(
        CombinedExudateLoss(0.02, 0.1, supervised=of_each_lesion, classes=range(1, 5)), (logits, index, features)
    )


def test_one_channel_may_stand_for_several_classes():
    logits, target, features = batch()

    def of_any_lesion(logits, index):
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], (index > 0).float())

    criterion = CombinedExudateLoss(0.02, 0.1, supervised=of_any_lesion, classes=[1, 4])
    for value in (2, 4):
        assert not warned(criterion, (logits, (value * target[:, 0]).long(), features))
    of_255 = CombinedExudateLoss(0.02, 0.1, supervised=of_any_lesion, classes=[255])
    assert not warned(of_255, (logits, (255 * target[:, 0]).long(), features))
    assert len(warned(criterion, (logits, (255 * target[:, 0]).long(), features))) == 1


@pytest.mark.parametrize("supervised", [None, lambda logits, target: ((logits > 0).float() - target).abs().mean()])
def test_a_supervised_loss_that_requires_no_gradient(supervised):
    logits, target, features = batch()
    criterion = CombinedExudateLoss(0.02, 0.1, supervised=supervised)
    calls = [(logits if supervised else logits.detach(), target, features)] * 3
    (text,) = warned(criterion, *calls)
    assert text.startswith("the supervised loss has no gradient, so it trains nothing")
    with torch.no_grad():
        assert not warned(CombinedExudateLoss(0.02, 0.1, supervised=supervised), *calls)


def test_only_the_first_batches_are_looked_at(monkeypatch):
    calls = []
    monkeypatch.setattr("contrastive_exudate_loss.losses.suspicions", lambda *_: calls.append(0) or iter(()))
    warned(CombinedExudateLoss.paper(), *[batch()] * 15)
    assert len(calls) == 10
