"""Configuration files build what Python builds: jsonargparse (Lightning's command line) and hydra.utils.instantiate."""

import pydoc
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf

import contrastive_exudate_loss as package

PAGE = (Path(__file__).parents[1] / "docs/configuration.md").read_text()


class Call(NamedTuple):
    """What to call, by its dotted name, and with which options; these may be calls too."""

    name: str
    options: Any = MappingProxyType({})


def ours(name, **options):
    return Call(f"{package.__name__}.{name}", options)


UNET = Call("segmentation_models_pytorch.Unet", {"encoder_name": "resnet18", "encoder_weights": None})
BCE = Call("torch.nn.BCEWithLogitsLoss", {"reduction": "mean"})
DICE = Call("segmentation_models_pytorch.losses.DiceLoss", {"mode": "binary"})
TAP = ours("FeatureTap", model=UNET, layer="segmentation_head.0")
CALLS = {
    "density": ours("PatchDensityContrastLoss"),
    "density with options": ours("PatchDensityContrastLoss", patch_size=8, threshold=0.3, contrast="sup_con", select=3),
    "density of num_patches": ours("PatchDensityContrastLoss", num_patches=5, select="all", max_patches=64),
    "edge": ours("PatchEdgeContrastLoss"),
    "edge with options": ours("PatchEdgeContrastLoss", inner_radius=1, footprint="cross", scope="image"),
    "edge with pairs": ours("PatchEdgeContrastLoss", inner_radius=[1, 2], outer_radius=[5, 2], density_threshold=0.3),
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
    "combined with classes": ours("CombinedExudateLoss", classes=[1, 2, 3], ignore_index=255),
    "combined with a supervised loss": ours("CombinedExudateLoss", supervised=DICE),
    "paper": ours("CombinedExudateLoss.paper"),
    "paper with options": ours("CombinedExudateLoss.paper", supervised=BCE, ignore_index=-1, features=TAP),
    "hecl": ours("CombinedExudateLoss.hecl"),
    "hecl with options": ours("CombinedExudateLoss.hecl", supervised=DICE, ignore_index=-1, features=TAP),
}


def in_python(value):
    if not isinstance(value, Call):
        return value
    return pydoc.locate(value.name)(**{name: in_python(option) for name, option in value.options.items()})


def by_jsonargparse(call):
    parser = ArgumentParser(exit_on_error=False)
    made = pydoc.locate(call.name)
    parser.add_argument("--made", type=made if isinstance(made, type) else made.__self__)
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


NUMBERS = {
    "Pull": {"times": np.float32(0.5), "warm_up": np.int64(300)},
    "PatchDensityContrastLoss": {
        "patch_size": np.int32(8),
        "threshold": np.float64(0.3),
        "temperature": np.float32(0.5),
        "select": np.int64(3),
        "ignore_index": np.int16(255),
    },
    "PatchEdgeContrastLoss": {
        "num_patches": np.uint8(5),
        "inner_radius": [np.int64(1), np.int64(2)],
        "outer_radius": np.array([5, 2]),
        "density_threshold": np.float32(0.25),
        "max_patches": np.int64(64),
    },
    "CombinedExudateLoss": {
        "alpha": np.float64(0.02),
        "beta": np.float32(0.5),
        "classes": np.arange(1, 3),
        "ignore_index": np.int64(255),
    },
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numpys_numbers_are_kept_as_those_of_python(name):
    options = NUMBERS[name]
    plain = {option: np.array(value).tolist() for option, value in options.items()}
    made = getattr(package, name)(**options)
    assert repr(made) == repr(in_python(ours(name, **plain)))


def test_lesion_masks_take_numpys_classes():
    index = torch.arange(4).reshape(1, 2, 2)
    assert torch.equal(package.lesion_masks(index, np.arange(1, 3)), package.lesion_masks(index, [1, 2]))


@pytest.fixture(params=["Lightning's command line", "Hydra"])
def recipe(request, monkeypatch, tmp_path):
    """The names of a recipe of the page, run beside the files that the page shows."""
    for name, content in re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls there
    monkeypatch.setattr("sys.argv", ["script.py", "fit", "--config", "config.yaml"])
    (code,) = re.findall(rf"^## {request.param}\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(code, request.param, "exec"), names)
    return names


def test_a_recipe_builds_the_criterion_of_its_file(recipe):
    criterion = recipe["criterion"] if "criterion" in recipe else recipe["cli"].model.criterion
    expected = in_python(ours("CombinedExudateLoss", beta=ours("Pull", times=2.0, warm_up=10), supervised=DICE))
    expected.tap = criterion.tap
    assert repr(criterion) == repr(expected)


@pytest.mark.parametrize("name", [name for name in package.__all__ if name[0].isupper() and name != "LossTerms"])
def test_every_class_is_configured(name):
    assert f"{package.__name__}.{name}" in {call.name for call in CALLS.values()}
