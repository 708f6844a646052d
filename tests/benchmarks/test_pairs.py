"""The study's other pairs for the density term contrast what they say."""

import itertools

import pytest
import torch
from test_objective import Network, batch
from torch.nn.functional import interpolate
from trials.objective import Objective, Settings
from trials.pairs import PAIRS, OtherPairsLoss

from contrastive_exudate_loss import PatchDensityContrastLoss

OPTIONS = {"patch_size": 4, "temperature": 0.5}
THRESHOLD = 0.5


def patches(images=2):
    """Features and a target of 3 x 2 patches an image, each all lesion or all background."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(images, 5, 12, 8, generator=generator, dtype=torch.float64) - 0.3
    lesion = torch.rand(images, 1, 3, 2, generator=generator) > 0.6
    return features.requires_grad_(), interpolate(lesion.double(), scale_factor=4)


def loops(features, target, positive, negative):
    """The formula, pair by pair; positive and negative give the weight of a pair of (lesion fraction, image)."""
    where = [(b, slice(y, y + 4), slice(x, x + 4)) for b in range(len(target)) for y in (0, 4, 8) for x in (0, 4)]
    vectors = [features[b, :, y, x].mean((1, 2)) for b, y, x in where]
    facts = [(target[b, 0, y, x].mean().item(), b) for b, y, x in where]
    total = weights = 0
    for i, j in itertools.permutations(range(len(where)), 2):
        cosine = [torch.cosine_similarity(vectors[i], v, 0) / OPTIONS["temperature"] for v in vectors]
        against = sum(negative(facts[i], facts[k]) * cosine[k].exp() for k in range(len(where)))
        if not isinstance(against, int) and against > 0:
            weight = positive(facts, i, j)
            total = total - weight * (cosine[j] - (cosine[j].exp() + against).log())
            weights += weight
    return total / weights


def dense(fact):
    return fact[0] > THRESHOLD


def alike(facts, i, j):
    return float(dense(facts[i]) == dense(facts[j]))


def balanced(facts, i, j):
    count = sum(dense(fact) == dense(facts[i]) for fact in facts)
    return alike(facts, i, j) / (count * (count - 1)) if count > 1 else 0.0


WANTED = {
    "balanced": (balanced, lambda a, b: float(dense(a) != dense(b))),
    "own image": (alike, lambda a, b: float(dense(a) != dense(b) and a[1] == b[1])),
    "affinity": (lambda facts, i, j: 1 - abs(facts[i][0] - facts[j][0]), lambda a, b: abs(a[0] - b[0])),
}


@pytest.mark.parametrize("pairs", PAIRS)
def test_each_gives_its_formula(pairs):
    features, target = patches()
    target[0, :, :2, :] = 1  # fractions between 0 and 1
    target[1, :, 5, :3] = 1
    found, wanted = OtherPairsLoss(pairs, **OPTIONS)(features, target), loops(features, target, *WANTED[pairs])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, features)[0] for value in (found, wanted)))


@pytest.mark.parametrize(("pairs", "images"), [("own image", 1), ("affinity", 2)])
def test_they_are_the_density_term_where_nothing_tells_them_apart(pairs, images):
    features, target = patches(images)
    assert 0 < target.mean() < 1
    wanted = PatchDensityContrastLoss(**OPTIONS)(features, target)
    torch.testing.assert_close(OtherPairsLoss(pairs, **OPTIONS)(features, target), wanted)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_to_contrast_is_0(pairs, value):
    features, target = patches()
    loss = OtherPairsLoss(pairs, **OPTIONS)(features, torch.full_like(target, value))
    loss.backward()
    assert loss == 0
    assert not features.grad.any()


def test_the_study_takes_them_as_an_option_of_the_density_term():
    model = Network()
    objective = Objective(Settings(alpha=0.02, density={"pairs": "affinity", "patch_size": 8}), model)
    images, masks = batch()
    terms = objective.terms(model(images), masks, 1.0)
    assert terms.density > 0
    with pytest.raises(ValueError, match="pairs must be one of"):
        Objective(Settings(alpha=0.02, density={"pairs": "all"}), model)
