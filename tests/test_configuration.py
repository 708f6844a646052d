"""Configuration files build what Python builds: jsonargparse (Lightning's command line) and hydra.utils.instantiate."""

import pydoc
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from hydra.utils import instantiate
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf

import contrastive_exudate_loss as package


class Call(NamedTuple):
    """What to call, by its dotted name, and with which options; these may be calls too."""

    name: str
    options: Any = MappingProxyType({})


def ours(name, **options):
    return Call(f"{package.__name__}.{name}", options)


UNET = Call("segmentation_models_pytorch.Unet", {"encoder_name": "resnet18", "encoder_weights": None})
TAP = ours("FeatureTap", model=UNET, layer="segmentation_head.0")
CALLS = {
    "density": ours("PatchDensityContrastLoss"),
    "density with options": ours("PatchDensityContrastLoss", patch_size=8, threshold=0.3, contrast="sup_con", select=3),
    "density of num_patches": ours("PatchDensityContrastLoss", num_patches=5, select="all", max_patches=64),
    "edge": ours("PatchEdgeContrastLoss"),
    "edge with options": ours("PatchEdgeContrastLoss", inner_radius=1, footprint="cross", scope="image"),
    "pull": ours("Pull", times=0.5, warm_up=300),
    "tap": TAP,
    "combined": ours("CombinedExudateLoss"),
    "combined with numbers": ours("CombinedExudateLoss", alpha=0.02, beta=1, ignore_index=-1),
    "combined with a pull": ours("CombinedExudateLoss", beta=ours("Pull", times=0.5, warm_up=300)),
    "combined with parts": ours(
        "CombinedExudateLoss",
        density=ours("PatchDensityContrastLoss", patch_size=8),
        edge=ours("PatchEdgeContrastLoss", outer_radius=3),
    ),
    "combined with a tap": ours("CombinedExudateLoss", features=TAP),
}


def in_python(value):
    if not isinstance(value, Call):
        return value
    return pydoc.locate(value.name)(**{name: in_python(option) for name, option in value.options.items()})


def by_jsonargparse(call):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=pydoc.locate(call.name))
    return parser.instantiate(parser.parse_object({"made": _class_path(call)})).made


def _class_path(value):
    if not isinstance(value, Call):
        return value
    return {"class_path": value.name, "init_args": {name: _class_path(of) for name, of in value.options.items()}}


def by_hydra(call):
    return instantiate(OmegaConf.create(_target(call)))


def _target(value):
    if not isinstance(value, Call):
        return value
    return {"_target_": value.name} | {name: _target(option) for name, option in value.options.items()}


@pytest.mark.parametrize("built", [by_jsonargparse, by_hydra])
@pytest.mark.parametrize("name", CALLS)
def test_a_configuration_builds_what_python_builds(name, built):
    assert repr(built(CALLS[name])) == repr(in_python(CALLS[name]))


@pytest.mark.parametrize("name", [name for name in package.__all__ if name[0].isupper() and name != "LossTerms"])
def test_every_class_is_configured(name):
    assert f"{package.__name__}.{name}" in {call.name for call in CALLS.values()}
