"""CombinedExudateLoss.hecl(): equal to a loop in the published manner, and finite where that has no answer."""

import pytest
import reference
import torch
from batches import batch, gradients
from hypothesis import example, given
from hypothesis import strategies as st
from overhead.published_loop import published_loop
from strategies import masks

from contrastive_exudate_loss import CombinedExudateLoss, FeatureTap

pytestmark = pytest.mark.filterwarnings("ignore:edge has scope='image'")  # of one image


@st.composite
def cases(draw):
    """Logits, features and a target of one class whose sides 5 divides, float64."""
    target = draw(masks(batch=(1, 3), classes=(1, 1), side=(1, 6)))
    target = target.repeat_interleave(draw(st.sampled_from([1, 2, 3])), 2)
    rows, columns = (5 * draw(st.integers(1, 5)) for _ in range(2))
    target = target.repeat(1, 1, rows, columns)[:, :, :rows, :columns]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Whole patches of lesion or of background among those of the drawn mask.
    fill = torch.rand(len(target), 1, 5, 5, generator=generator)
    fill = fill.repeat_interleave(rows // 5, 2).repeat_interleave(columns // 5, 3)
    share = draw(st.sampled_from([0.0, 0.3, 0.6]))
    target = torch.where(fill < share / 2, 1, torch.where(fill < share, 0, target))
    logits = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    features = torch.randn(len(target), 3, rows, columns, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), target, features.requires_grad_()


def half_lesion(side):
    """A patch of half lesion, as thick as five radii, in the corner of two otherwise empty images."""
    logits, target, features = batch(size=side, images=2, dtype=torch.float64)
    target = torch.zeros_like(target)
    target[..., : side // 5, : side // 10] = 1
    return logits, target, features


@given(cases())
@example(half_lesion(50))
def test_hecl_equals_the_published_loop(case):
    logits, target, features = case
    got = CombinedExudateLoss.hecl().terms(logits, target, features)
    edge, density = published_loop(features, target)
    supervised = reference.cross_entropy(logits, target)
    wanted = (supervised + 0.01 * (edge + density), supervised, density, edge)
    for a, b in zip(got[:4], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    total = wanted[0] + 0 * features.sum()
    for a, b in zip(gradients(got.total, logits, features), gradients(total, logits, features), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(target=masks(side=(1, 23), ignored=True), stride=st.sampled_from([1, 2, 4]))
def test_hecl_is_finite_at_any_size_and_stride(target, stride):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(target.shape, generator=generator, requires_grad=True)
    size = [-(-side // stride) for side in target.shape[2:]]
    features = torch.randn(len(target), 3, *size, generator=generator, requires_grad=True)
    total = CombinedExudateLoss.hecl(ignore_index=255)(logits, target, features)
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(total, logits, features))


def test_a_patch_of_three_tenths_lesion_is_dense():
    _, target, features = batch(size=50, images=1, dtype=torch.float64)
    three_tenths = (torch.arange(100).reshape(10, 10) < 30).double()
    target = torch.zeros_like(target)
    target[..., :10, :10] = target[..., -10:, -10:] = three_tenths
    density = CombinedExudateLoss.hecl().density
    assert density(features, target) > 0
    target[..., 2, 9] = target[..., -8, -1] = 0
    assert density(features, target) == 0


def test_hecl_takes_what_the_criterion_takes():
    logits, target, features = batch()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 1, 1))
    target[:, :, :, -4:] = -1

    def squares(logits, target):
        return logits[target != -1].square().mean()

    tap = FeatureTap(model)
    criterion = CombinedExudateLoss.hecl(supervised=squares, ignore_index=-1, features=tap)
    assert criterion.tap is tap
    assert [part.ignore_index for part in (criterion, criterion.density, criterion.edge)] == [-1, -1, -1]
    terms = criterion.terms(logits, target, features)
    assert terms.supervised == squares(logits, target)
    torch.testing.assert_close(terms.total, terms.supervised + 0.01 * (terms.density + terms.edge))


def test_hecl_of_a_subclass_is_of_the_subclass():
    class Mine(CombinedExudateLoss):
        pass

    assert type(Mine.hecl()) is Mine


def test_its_options_are_those_of_the_published_code():
    criterion = CombinedExudateLoss.hecl()
    density, edge = criterion.density, criterion.edge
    assert (criterion.alpha, criterion.beta) == (0.01, 0.01)
    assert (density.num_patches, density.select, density.temperature, density.contrast) == (5, 3, 0.05, "nt_xent")
    assert (edge.num_patches, edge.scope, edge.temperature, edge.contrast) == (5, "image", 0.05, "nt_xent")
    assert (edge.footprint, edge.isolate_patches) == ("cross", True)
    assert (edge.inner_radius, edge.outer_radius) == ((1, 2), (5, 2))  # in sparse patches, in dense ones
    assert density.threshold < 0.3 <= density.threshold + 1e-15
    assert edge.density_threshold == density.threshold
