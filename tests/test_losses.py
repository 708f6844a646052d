"""Laws of the two terms, and their slow definitions as oracle."""

import math

import pytest
import reference
import torch
from batches import TERMS, assert_equal_values_and_gradients, batch, gradients, term
from hypothesis import given
from hypothesis import strategies as st
from strategies import density_options, edge_options, features_for, masks

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
)

OPTIONS = {"density": density_options(), "edge": edge_options()}


REFERENCE = {"density": reference.density_loss, "edge": reference.edge_loss}


@term
@given(data=st.data())
def test_terms_equal_the_reference(term, data):
    ignored = data.draw(st.booleans())
    target = data.draw(masks(batch=(1, 2), side=(1, 12), ignored=ignored))
    features = data.draw(features_for(len(target), side=(1, 14))).requires_grad_()
    options = data.draw(OPTIONS[term])
    ignore_index = 255 if ignored else None
    loss = TERMS[term](**options, ignore_index=ignore_index)(features, target)
    options["contrast_kind"] = options.pop("contrast")
    wanted = REFERENCE[term](features, target, **options, ignore_index=ignore_index)
    assert_equal_values_and_gradients(loss, wanted + 0 * features.sum(), features)


@pytest.mark.parametrize("contrast", ["nt_xent", "sup_con"])
@pytest.mark.parametrize("stride", [1, 4, 3])
@term
def test_gradcheck(term, stride, contrast):
    _, target, features = batch(size=12, channels=2, stride=stride, dtype=torch.float64)
    loss = TERMS[term](patch_size=3, contrast=contrast, temperature=0.5)
    assert loss(features, target) > 0
    assert torch.autograd.gradcheck(lambda features: loss(features, target), features)


@term
@given(data=st.data())
def test_permuting_the_batch_changes_nothing(term, data):
    target = data.draw(masks(batch=(2, 3), side=(2, 16)))
    features = data.draw(features_for(len(target)))
    options = data.draw(OPTIONS[term]) | ({"select": "all"} if term == "density" else {})
    order = data.draw(st.permutations(range(len(target))))
    loss = TERMS[term](**options)
    torch.testing.assert_close(loss(features[order], target[order]), loss(features, target))


@term
@given(data=st.data())
def test_flipping_image_and_target_together_changes_nothing(term, data):
    side, stride = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (2, 4)]))
    target = data.draw(masks(side=(16, 16)))
    features = data.draw(features_for(len(target), side=(16 // stride, 16 // stride)))
    options = data.draw(OPTIONS[term]) | ({"select": "all"} if term == "density" else {})
    options = options | {"patch_size": side, "num_patches": None}
    axes = data.draw(st.sampled_from([(2,), (3,), (2, 3)]))
    loss = TERMS[term](**options)
    torch.testing.assert_close(loss(features.flip(axes), target.flip(axes)), loss(features, target))


@term
@pytest.mark.parametrize("contrast", ["nt_xent", "sup_con"])
def test_features_that_separate_have_the_smaller_loss(term, contrast):
    _, target, features = batch()
    separating = torch.cat([target, 1 - target], 1)
    loss = TERMS[term](patch_size=8, contrast=contrast)
    assert loss(separating, target) < loss(features, target)


@term
def test_classes_are_averaged_and_an_empty_class_does_not_count(term):
    _, target, features = batch()
    three = torch.cat([target, torch.zeros_like(target), target.transpose(2, 3)], 1)
    loss = TERMS[term](patch_size=8)
    wanted = sum(loss(features, three[:, k : k + 1]) for k in range(3)) / 2
    torch.testing.assert_close(loss(features, three), wanted)
    assert wanted > 0


@term
def test_ignored_pixels_count_for_nothing(term):
    _, target, features = batch()
    target[:, :, 10:14] = -1
    target[:, :, :, -7:] = -1
    ignored = (target == -1).expand_as(features)
    loss = TERMS[term](patch_size=8, ignore_index=-1)
    for other in (-50.0, 50.0):
        torch.testing.assert_close(loss(torch.where(ignored, other, features), target), loss(features, target))
    (gradient,) = gradients(loss(features, target), features)
    assert (gradient[ignored] == 0).all()
    assert gradient.any()


@term
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.float64])
def test_the_dtype_of_the_target_changes_nothing(term, dtype):
    logits, target, features = batch()
    for criterion, arguments in (
        (TERMS[term](8), lambda target: (features, target)),
        (CombinedExudateLoss.paper(), lambda target: (logits, target, features)),
    ):
        assert torch.equal(criterion(*arguments(target.to(dtype))), criterion(*arguments(target)))


@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [(torch.uint8, -100), (torch.uint8, 257), (torch.float16, 2049), (torch.float16, 10**6), (torch.bool, -1)],
)
def test_a_value_that_the_dtype_cannot_hold_is_ignored_nowhere(dtype, ignore_index):
    # Torch itself compares after rounding: 156 == -100 and 1 == 257 in uint8, 2048 == 2049 in float16.
    logits, target, features = batch()
    with_it = CombinedExudateLoss(0.02, 0.1, ignore_index=ignore_index)(logits, target.to(dtype), features)
    assert torch.equal(with_it, CombinedExudateLoss.paper()(logits, target.to(dtype), features))
    if dtype != torch.bool:
        target[0, 0, 0, 0] = 156 if dtype == torch.uint8 else 2048
        with pytest.raises(ValueError, match="target must hold only"):
            CombinedExudateLoss(0.02, 0.1, ignore_index=ignore_index)(logits, target.to(dtype), features)


@term
def test_memory_format_and_strides_change_nothing(term):
    _, target, features = batch(channels=6)
    loss = TERMS[term](patch_size=8)
    wanted = loss(features, target)
    wide = torch.randn(2, 6, 32, 64)
    wide[..., ::2] = features.detach()
    for other in (features.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        torch.testing.assert_close(loss(other, target), wanted)
    strided = target.repeat_interleave(2, 3)[..., ::2]
    assert torch.equal(loss(features, strided), wanted)


@term
def test_max_patches_draws_a_subset_by_the_default_generator(term):
    _, target, features = batch(size=64)
    full, limited = TERMS[term](4), TERMS[term](4, max_patches=3)
    torch.manual_seed(0)
    first = limited(features, target)
    assert first != limited(features, target)
    torch.manual_seed(0)
    assert torch.equal(first, limited(features, target))
    state = torch.get_rng_state()
    torch.testing.assert_close(TERMS[term](4, max_patches=10**6)(features, target), full(features, target))
    torch.set_rng_state(state)
    full(features, target)
    assert torch.equal(state, torch.get_rng_state())


def test_a_patch_at_the_density_threshold_is_sparse():
    target = torch.zeros(2, 1, 8, 8)
    target[..., :4] = 1
    features = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = [
        PatchEdgeContrastLoss(8, inner_radius=radius, outer_radius=1, density_threshold=threshold)(features, target)
        for radius, threshold in (((1, 3), 0.5), ((1, 3), 0.51), (1, None), ((1, 3), 0.49), (3, None))
    ]
    assert losses[0] == losses[1] == losses[2] != losses[3] == losses[4]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_select_takes_the_densest_and_the_sparsest_of_the_batch(k):
    # Lesion pixels per patch of 4 x 4 in two images; of equals the earliest is taken.
    pixels = torch.tensor([[9, 16, 12, 0, 3, 16], [10, 16, 1, 0, 8, 12]])
    target = (torch.arange(16) < pixels[..., None]).reshape(2, 1, 6, 4, 4).transpose(2, 3).reshape(2, 1, 4, 24)
    features = torch.randn(2, 3, 4, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = features.unflatten(3, (6, 4)).mean((2, 4)).movedim(1, 2).flatten(0, 1)
    densest, sparsest = [1, 5, 7, 2, 11, 6][:k], [3, 9, 8, 4, 10][:k]
    wanted = reference.contrast(list(means[densest + sparsest]), [True] * len(densest) + [False] * len(sparsest))
    torch.testing.assert_close(PatchDensityContrastLoss(4, select=k)(features, target), wanted)


def test_max_patches_is_uniform():
    # Two of four dense patches point right; of the six pairs that may be drawn, one in six is (right, right).
    features = torch.zeros(1, 2, 1, 6)
    features[0, 0, 0] = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0, -1.0])
    features[0, 1, 0] = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 0.0])
    target = torch.tensor([1, 1, 1, 1, 0, 0]).reshape(1, 1, 1, 6)
    loss = PatchDensityContrastLoss(1, max_patches=2, temperature=1.0)
    torch.manual_seed(0)
    values = torch.stack([loss(features, target) for _ in range(1200)])
    chosen = values == values.min()
    assert abs(chosen.float().mean() - 1 / 6) < 4 * math.sqrt(1 / 6 * 5 / 6 / 1200)


@term
def test_a_second_derivative_is_refused(term):
    _, target, features = batch()
    (gradient,) = torch.autograd.grad(TERMS[term](4)(features, target), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.square().sum().backward()
