"""Modules saved by earlier versions: tests/pickles has a file of each, made by `python tests/test_pickles.py`."""

import copy
from pathlib import Path

import pytest
import torch
from batches import batch
from torch import nn

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    FeatureTap,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    __version__,
)

FILES = Path(__file__).parent / "pickles"
VERSIONS = sorted(file.stem for file in FILES.glob("*.pkl"))


def modules():
    """What a file holds, by name; between them the losses have every option other than by default."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1))
    common = {"temperature": 0.1, "contrast": "sup_con", "ignore_index": -1, "gather_distributed": True}
    bands = {"inner_radius": (1, 2), "outer_radius": (3, 2), "footprint": "cross"}
    return {
        "density": PatchDensityContrastLoss(),
        "density of selected patches": PatchDensityContrastLoss(num_patches=4, threshold=0.2, select=3, **common),
        "density of drawn patches": PatchDensityContrastLoss(4, max_patches=3),
        "edge": PatchEdgeContrastLoss(),
        "edge of images": PatchEdgeContrastLoss(
            num_patches=4, isolate_patches=True, scope="image", density_threshold=0.3, **bands, **common
        ),
        "edge of drawn patches": PatchEdgeContrastLoss(4, max_patches=3),
        "combined": CombinedExudateLoss.paper(),
        "combined of parts": CombinedExudateLoss(
            0.5,
            0.25,
            supervised=nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
            density=PatchDensityContrastLoss(4, ignore_index=-1),
            edge=PatchEdgeContrastLoss(8, ignore_index=-1),
            ignore_index=-1,
        ),
        "combined with a function": CombinedExudateLoss(0.02, 0.1, supervised=nn.functional.soft_margin_loss),
        "combined with a tap": CombinedExudateLoss(0.02, 0.1, features=FeatureTap(model)),
        "hecl": CombinedExudateLoss.hecl(),
        "tapped model": model,
        "tap of a layer": FeatureTap(model, layer="1"),
    }


NAMES = [name for name, saved in modules().items() if isinstance(saved, nn.Module)]


def saved_by(version):
    return torch.load(FILES / f"{version}.pkl", weights_only=False)


def output(module):
    """What a module gives on the same batch and with the same random numbers each time."""
    logits, target, features = batch(size=64)
    target[1] = target[0].flip(-1)  # or the default terms would have nothing to contrast
    if isinstance(module, nn.Sequential):
        return module(features[:, :3])
    if module.ignore_index is not None:
        target[..., -4:] = module.ignore_index
    torch.manual_seed(0)
    return module(logits, target, features) if isinstance(module, CombinedExudateLoss) else module(features, target)


def test_this_version_has_its_pickles():
    assert __version__ in VERSIONS, f"python tests/test_pickles.py writes tests/pickles/{__version__}.pkl"
    assert saved_by(__version__).keys() == modules().keys()


@pytest.mark.filterwarnings("ignore:supervised has a gradient at ignored pixels")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", VERSIONS)
def test_pickles_of_earlier_versions_load_and_compute_the_same(version, name):
    saved = saved_by(version)
    if name not in saved:
        return
    got, wanted = saved[name], copy.deepcopy(modules()[name])  # untapped, like what was saved
    wanted.load_state_dict(got.state_dict())
    assert repr(got) == repr(wanted)
    assert output(got).abs().sum() > 0
    assert torch.equal(output(got), output(wanted))


def test_options_of_the_first_version_s_pickles_are_checked_at_the_first_call():
    loss = saved_by("0.1.0")["density"]
    loss.__dict__["threshold"] = 2  # which another program may have written
    with pytest.raises(ValueError, match="threshold"):
        output(loss)


@pytest.mark.parametrize("version", VERSIONS)
def test_pickles_of_tapped_models_train_once_tapped_anew(version):
    saved = saved_by(version)
    model, criterion = saved["tapped model"], saved["combined with a tap"]
    assert repr(saved["tap of a layer"]) == "FeatureTap(closed, layer: '1')"
    criterion.tap = FeatureTap(model, layer="1")
    _, target, images = batch(size=64)
    images = images[:, :3]
    got = criterion(model(images), target)
    wanted = modules()["combined with a tap"](model(images), target, model[0](images))
    assert torch.equal(got, wanted)
    got.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


if __name__ == "__main__":
    with (FILES / f"{__version__}.pkl").open("xb") as file:  # a file once published stays as it is
        torch.save(modules(), file)
