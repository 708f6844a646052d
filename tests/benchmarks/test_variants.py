"""The study's other embeddings for the edge term are what they say."""

import pytest
import reference
import torch
from test_instances import components, distance, everywhere, tied
from test_objective import Network, batch
from trials import variants
from trials.objective import Objective, Settings
from trials.variants import OtherEdgeLoss

from contrastive_exudate_loss import PatchEdgeContrastLoss


def example(seed, lesions=3):
    """Features, and a target of two images with some square lesions, so that each pixel has one nearest lesion."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 5, 32, 32, generator=generator, dtype=torch.float64)
    target = torch.zeros(2, 1, 32, 32, dtype=torch.float64)
    for image in target[:, 0]:
        for _ in range(lesions):
            row, column = torch.randint(2, 26, (2,), generator=generator).tolist()
            image[row : row + 3, column : column + 4] = 1
        found = components(image)
        while any(tied(place, found) for place in everywhere(image)):
            for place in found.pop():
                image[place] = 0
    return features.requires_grad_(), target


def by_lesions(features, target):
    """The loss by loops over lesions and pixels."""
    vectors, labels = [], []
    for own, mask in zip(features, target[:, 0], strict=True):
        lesions = components(mask)
        pixels = [place for place in everywhere(mask) if lesions]
        background = [place for place in pixels if not mask[place]]
        nearest = {place: min(range(len(lesions)), key=lambda n: distance(place, lesions[n])) for place in pixels}
        for n, lesion in enumerate(lesions):
            inner = [place for place in lesion if reference.near(place, background, 2, "square")]
            outer = [
                place
                for place in background
                if nearest[place] == n and any(reference.near(place, other, 2, "square") for other in lesions)
            ]
            for label, band in ((True, inner), (False, outer)):
                vectors.append(torch.stack([own[:, row, column] for row, column in band]).mean(0))
                labels.append(label)
    return reference.contrast(vectors, labels)


@pytest.mark.parametrize("seed", range(5))
def test_each_lesion_has_one_inner_and_one_outer_embedding(seed):
    features, target = example(seed)
    got, wanted = OtherEdgeLoss("lesions")(features, target), by_lesions(features, target)
    torch.testing.assert_close(got, wanted)
    gradients = (torch.autograd.grad(loss, features)[0] for loss in (got, wanted))
    torch.testing.assert_close(*gradients)
    assert wanted > 0


def test_without_decoys_the_patches_are_those_of_the_package(monkeypatch):
    monkeypatch.setattr(variants, "DECOYS", 0)
    features, target = example(0)
    loss = OtherEdgeLoss("decoys")
    loss.logits = torch.zeros_like(target)
    torch.testing.assert_close(loss(features, target), PatchEdgeContrastLoss()(features, target))


def test_decoys_are_patches_away_from_lesions_that_look_most_like_them(monkeypatch):
    monkeypatch.setattr(variants, "DECOYS", 2)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 5, 64, 64, generator=generator, dtype=torch.float64)
    target, logits = torch.zeros(1, 1, 64, 64, dtype=torch.float64), torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    target[..., 4:8, 4:8] = target[..., 9:11, 44:50] = 1
    decoys = [(slice(16, 32), slice(16, 32)), (slice(48, 64), slice(32, 48))]
    for (rows, columns), height in zip(decoys, (3, 2), strict=True):  # the first lies 9 pixels below a lesion
        logits[..., rows, columns] = height
    logits[..., 32:48, 0:16] = 1  # the third
    logits[..., 16:32, 32:48] = 9  # 6 pixels below a lesion
    loss = OtherEdgeLoss("decoys")
    loss.logits = logits
    bands = [(pixels, n == 0) for pair in reference.bands(target[0, 0]) for n, pixels in enumerate(pair) if pixels]
    vectors = [reference.mean_vector(features[0], pixels, (64, 64)) for pixels, _ in bands]
    vectors += [features[0, :, rows, columns].mean((1, 2)) for rows, columns in decoys]
    labels = [is_inner for _, is_inner in bands] + [False] * len(decoys)
    torch.testing.assert_close(loss(features, target), reference.contrast(vectors, labels))


def test_where_the_network_is_equally_wrong_pixels_count_alike():
    features, target = example(0)
    loss = OtherEdgeLoss("errors")
    loss.logits = torch.zeros_like(target)
    torch.testing.assert_close(loss(features, target), PatchEdgeContrastLoss()(features, target))


def test_the_pixels_of_a_band_count_as_much_as_the_network_is_wrong_there():
    features, target = example(1)
    probability = torch.rand(target.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = OtherEdgeLoss("errors")
    loss.logits = probability.logit()
    vectors, labels = [], []
    for own, mask, chance in zip(features, target[:, 0], probability[:, 0], strict=True):
        for pair in reference.bands(mask):
            for pixels, is_inner in zip(pair, (True, False), strict=True):
                wrong = [1 - chance[place] if is_inner else chance[place] for place in pixels]
                if pixels:
                    rows, columns = zip(*pixels, strict=True)
                    vectors.append(own[:, rows, columns] @ torch.stack(wrong))
                    labels.append(is_inner)
    got, wanted = loss(features, target), reference.contrast(vectors, labels)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, features)[0] for value in (got, wanted)))


def test_where_the_network_makes_no_error_there_is_nothing_to_contrast():
    features, target = example(0)
    loss = OtherEdgeLoss("errors")
    loss.logits = 80 * target - 40
    loss.logits[1] *= 20  # a probability of 0 or 1
    alone = OtherEdgeLoss("errors")
    alone.logits = loss.logits[:1]
    torch.testing.assert_close(loss(features, target), alone(features[:1], target[:1]))
    loss.logits = 800 * target - 400
    assert loss(features, target) == 0


def test_levels_are_the_mean_of_the_loss_on_each():
    features, target = example(0)
    loss, package = OtherEdgeLoss("levels"), PatchEdgeContrastLoss()
    loss.second = torch.randn(2, 7, 16, 16, dtype=torch.float64, requires_grad=True)
    got, wanted = loss(features, target), (package(features, target) + package(loss.second, target)) / 2
    torch.testing.assert_close(got, wanted)
    levels = features, loss.second
    torch.testing.assert_close(*(torch.autograd.grad(value, levels) for value in (got, wanted)))
    loss.second = None
    with pytest.raises(ValueError, match="second must be set"):
        loss(features, target)


def test_the_latest_inner_embeddings_are_remembered_and_get_no_gradient(monkeypatch):
    monkeypatch.setattr(variants, "REMEMBERED", 3)
    loss, remembered = OtherEdgeLoss("memory"), []
    for seed in range(3):
        features, target = example(seed)
        bands = [
            (reference.mean_vector(own, pixels, (32, 32)), n == 0)
            for own, mask in zip(features, target[:, 0], strict=True)
            for pair in reference.bands(mask)
            for n, pixels in enumerate(pair)
            if pixels
        ]
        vectors, labels = [vector for vector, _ in bands], [is_inner for _, is_inner in bands]
        got = loss(features, target)
        wanted = reference.contrast(vectors + remembered, labels + [True] * len(remembered))
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(value, features)[0] for value in (got, wanted)))
        remembered = ([vector.detach() for vector, is_inner in bands if is_inner] + remembered)[:3]
    assert len(remembered) == 3


@pytest.mark.parametrize("variant", variants.VARIANTS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_batch_without_contours_gives_nothing(variant, value):
    features = torch.randn(2, 5, 32, 32, requires_grad=True)
    loss = OtherEdgeLoss(variant)
    loss.logits, loss.second = torch.zeros(2, 1, 32, 32), features * 2
    total = loss(features, torch.full((2, 1, 32, 32), value))
    total.backward()
    assert total == 0
    assert not features.grad.any()


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_run_can_have_it(variant):
    model = Network()
    edge = {"variant": variant} | ({"deeper": "body.1"} if variant == "levels" else {})
    objective = Objective(Settings(beta=1.0, weights="pull", edge=edge), model)
    images, masks = batch()
    for _ in range(2):
        terms = objective.terms(model(images), masks, 1.0)
        terms.total.backward()
    assert terms.beta > 0
    assert terms.edge.isfinite()


def test_a_variant_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="variant must be one of"):
        OtherEdgeLoss("lesion")
