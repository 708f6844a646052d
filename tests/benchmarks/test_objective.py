"""What a run of the study minimises is what its settings say."""

import dataclasses

import pytest
import torch
from data.photographs import CHANNELS
from torch import nn
from trials.objective import DISC, IGNORED, SUPERVISED, Objective, Settings, gradient_norms
from trials.questions import QUESTIONS

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss

BOTH = Settings(alpha=0.02, beta=0.1, density={"patch_size": 8}, edge={"patch_size": 8})


class Network(nn.Module):
    """Two layers with the names of segmentation-models-pytorch's."""

    def __init__(self, classes=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.segmentation_head = nn.Sequential(nn.Conv2d(6, classes, 1))

    def forward(self, images):
        return self.segmentation_head(self.body(images))


def batch():
    generator = torch.Generator().manual_seed(0)
    masks = torch.nn.functional.avg_pool2d(torch.rand(2, len(CHANNELS), 36, 36, generator=generator), 5, 1) > 0.5
    return torch.rand(2, 3, 32, 32, generator=generator), masks


def terms_of(settings, progress=1.0):
    """The terms of one batch, and the features behind them."""
    torch.manual_seed(0)
    model = Network(len(settings.lesions))
    objective = Objective(settings, model)
    images, masks = batch()
    logits = model(images)
    features = objective.tap.features if objective.tap else None
    return objective.terms(logits, masks, progress), features, logits, masks


def exudates(masks):
    return masks[:, CHANNELS.index("EX"), None].float()


def test_the_defaults_are_plain_bce():
    terms, _, logits, masks = terms_of(Settings())
    assert terms.total == nn.functional.binary_cross_entropy_with_logits(logits, exudates(masks))


def test_weights_and_options_are_those_of_the_criterion():
    settings = dataclasses.replace(BOTH, density={"patch_size": 4, "threshold": 0.3})
    terms, features, logits, masks = terms_of(settings)
    criterion = CombinedExudateLoss(0.02, 0.1, density=PatchDensityContrastLoss(4, threshold=0.3))
    wanted = criterion.terms(logits, exudates(masks), features)
    assert terms.density == wanted.density > 0
    assert terms.supervised == wanted.supervised
    assert terms.total == terms.supervised + 0.02 * terms.density + 0.1 * terms.edge


def test_several_lesions_are_several_channels():
    settings = dataclasses.replace(BOTH, lesions=("MA", "HE", "EX", "SE"))
    terms, features, logits, masks = terms_of(settings)
    wanted = CombinedExudateLoss.paper().terms(logits, masks[:, :4].float(), features)
    assert terms.supervised == wanted.supervised


@pytest.mark.parametrize("disc", DISC)
def test_the_disc_is_background_or_ignored(disc):
    terms, features, logits, masks = terms_of(dataclasses.replace(BOTH, disc=disc))
    target = exudates(masks)
    ignored = target.masked_fill(masks[:, CHANNELS.index("OD"), None] & (target == 0), IGNORED)
    assert (ignored == IGNORED).any()
    by_bce = ignored if disc == "ignored" else target
    by_terms = target if disc == "background" else ignored
    supervised = CombinedExudateLoss(0, 0, ignore_index=IGNORED)(logits, by_bce)
    torch.testing.assert_close(terms.supervised, supervised)
    part = PatchDensityContrastLoss(8, ignore_index=IGNORED)
    assert terms.density == part(features, by_terms)


@pytest.mark.parametrize("name", SUPERVISED)
def test_each_supervised_loss_falls_on_the_way_to_the_target(name):
    _, masks = batch()
    target = exudates(masks)
    # The hinge of Lovász is 0 from logits of 1 on.
    far, near = (SUPERVISED[name]()(scale * (2 * target - 1), target) for scale in (0.5, 5))
    assert near < far
    assert near.dim() == 0


def test_the_ramp_rises_over_the_first_third():
    settings = dataclasses.replace(BOTH, weights="ramp")
    for progress, share in ((0, 0), (1 / 6, 0.5), (1 / 3, 1), (1, 1)):
        terms, *_ = terms_of(settings, progress)
        wanted = terms.supervised + share * (0.02 * terms.density + 0.1 * terms.edge)
        torch.testing.assert_close(terms.total, wanted)


def test_a_share_scales_the_gradient_of_each_term_to_that_of_the_supervised_loss():
    settings = dataclasses.replace(BOTH, alpha=0.5, beta=0.25, weights="share")
    terms, features, *_ = terms_of(settings)
    norms = gradient_norms(terms, features)
    total, supervised, density, edge = (
        torch.autograd.grad(value, features, retain_graph=True)[0]
        for value in (terms.total, terms.supervised, terms.density, terms.edge)
    )
    shares = ((0.5, density, norms["density"]), (0.25, edge, norms["edge"]))
    wanted = supervised + sum(share * norms["supervised"] * part / norm for share, part, norm in shares)
    torch.testing.assert_close(total, wanted)


def test_a_projection_stands_between_features_and_terms():
    settings = dataclasses.replace(BOTH, projection=True)
    model = Network()
    objective = Objective(settings, model)
    images, masks = batch()
    objective.terms(model(images), masks, 1.0).total.backward()
    assert objective.projection.weight.grad.any()
    objective.tap.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"supervised": "focal", "disc": "ignored"}, "disc must not be 'ignored' where supervised is 'focal'"),
        ({"density": {"pairs": "affinity"}, "disc": "ignored"}, "disc must be 'background' where density has pairs"),
        ({"disc": "ignore"}, "disc must be one of .*, got 'ignore'"),
        ({"weights": "rmap"}, "weights must be one of .*, got 'rmap'"),
        ({"supervised": "BCE"}, "supervised must be one of .*, got 'BCE'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_every_arm_of_every_question_can_be_made_and_a_name_means_one_thing():
    arms = {}
    for question in QUESTIONS.values():
        for name, settings in question.arms.items():
            assert arms.setdefault(name, settings) == settings
    for settings in arms.values():
        model = Network(len(settings.lesions))
        model.decoder = nn.ModuleDict({"blocks": nn.ModuleList(nn.Identity() for _ in range(5))})
        Objective(settings, model)
    assert len(set(map(str, arms.values()))) == len(arms)
