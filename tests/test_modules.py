"""The losses as modules: copies, repr, inputs and tensor subclasses."""

import copy
import inspect
import io
import pickle
import re

import numpy as np
import pytest
import torch
from batches import MODULES, batch
from monai.data import MetaTensor
from monai.losses import DiceLoss

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    Pull,
)


def test_meta_tensors_of_monai_give_plain_tensors():
    logits, target, features = batch()
    wanted = CombinedExudateLoss.paper().terms(logits, target, features)
    inputs = MetaTensor(logits), MetaTensor(target), MetaTensor(features)
    for got, value in zip(CombinedExudateLoss.paper().terms(*inputs), wanted, strict=True):
        assert type(got) is torch.Tensor
        assert torch.equal(got, value)
    dice = CombinedExudateLoss(0.02, 0.1, supervised=DiceLoss(sigmoid=True))
    assert type(dice(*inputs)) is torch.Tensor


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save", "state_dict"])
def test_copies_give_the_same_loss(name, way):
    module = MODULES[name]
    logits, target, features = batch()
    arguments = (logits, target, features) if name == "combined" else (features, target)
    wanted = module(*arguments)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif way == "deepcopy":
        other = copy.deepcopy(module)
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(module)
        other.load_state_dict(module.state_dict())
        assert set(other.state_dict()) <= {"alpha", "beta"}
    assert torch.equal(other(*arguments), wanted)
    assert repr(other) == repr(module)


@pytest.mark.parametrize(
    ("term", "own"),
    [
        (PatchDensityContrastLoss, {"threshold": 0.5, "select": "all"}),
        (PatchEdgeContrastLoss, {"inner_radius": 2, "outer_radius": 2, "footprint": "square", "scope": "patch"}),
    ],
)
def test_an_option_that_is_not_given_is_as_the_contract_says(term, own):
    module = term()
    assert module.patch_size == 16
    assert term(num_patches=4).patch_size is None
    assert (module.temperature, module.contrast, module.gather_distributed) == (0.05, "nt_xent", False)
    assert (module.num_patches, module.max_patches, module.ignore_index) == (None, None, None)
    assert {option: getattr(module, option) for option in own} == own


@pytest.mark.parametrize("name", ["density", "edge"])
def test_repr_shows_the_options_that_are_set_and_nothing_else(name):
    module = MODULES[name]
    options = [option for option in inspect.signature(type(module)).parameters if getattr(module, option) is not None]
    assert sorted(re.findall(r"(\w+)=", repr(module))) == sorted(options)


def test_repr_names_options_parts_and_a_supervised_function():
    assert "supervised=<function" in repr(CombinedExudateLoss(0.02, 0.1, supervised=lambda logits, _: logits.mean()))
    assert "supervised" not in repr(CombinedExudateLoss.paper())
    assert "classes=(1, 2)" in repr(CombinedExudateLoss(classes=[1, 2]))
    assert "classes" not in repr(CombinedExudateLoss())
    assert "num_patches=4" in repr(MODULES["density"])
    assert "select=3" in repr(MODULES["density"])
    assert "inner_radius=(1, 2)" in repr(MODULES["edge"])
    text = repr(MODULES["combined"])
    assert "alpha=0.5, beta=0.25" in text
    assert "DiceLoss" in text


def test_modules_keep_no_tensor_of_a_call():
    for name, module in MODULES.items():
        module = copy.deepcopy(module)
        before = set(vars(module))
        logits, target, features = batch()
        module(*((logits, target, features) if name == "combined" else (features, target)))
        assert set(vars(module)) == before
        assert not [value for value in vars(module).values() if isinstance(value, torch.Tensor) and value.dim() > 0]
        assert not list(module.parameters())
        assert not list(module.buffers())


def test_inputs_stay_as_they_are():
    tensors = [tensor.detach() for tensor in batch()]
    before = [tensor.clone() for tensor in tensors]
    CombinedExudateLoss.paper()(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_the_state_holds_weights_that_a_schedule_has_set():
    criterion, other = CombinedExudateLoss.paper(), CombinedExudateLoss.paper()
    criterion.beta = 0.03
    other.load_state_dict(criterion.state_dict())
    assert (other.alpha, other.beta) == (0.02, 0.03)
    CombinedExudateLoss().load_state_dict(criterion.state_dict())  # whose beta stays a Pull
    other.load_state_dict({})


@pytest.mark.parametrize("name", ["density", "edge", "combined", "default"])
def test_a_saved_module_loads_with_weights_only_once_its_classes_are_allowed(name):
    module = CombinedExudateLoss() if name == "default" else copy.deepcopy(MODULES[name])
    if name == "combined":
        module.supervised = None
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    with torch.serialization.safe_globals(
        [CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss, Pull, torch.nn.Module]
    ):
        assert repr(torch.load(file, weights_only=True)) == repr(module)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, int])
def test_options_of_numpy_and_of_lists_become_plain_ones(kind):
    term = PatchEdgeContrastLoss(
        kind(8), inner_radius=[kind(1), kind(2)], density_threshold=np.float32(0.5), temperature=np.float64(0.1)
    )
    assert (type(term.patch_size), term.inner_radius) == (int, (1, 2))
    assert [type(value) for value in (*term.inner_radius, term.density_threshold, term.temperature)] == [
        int,
        int,
        float,
        float,
    ]
    assert CombinedExudateLoss(np.float32(0.5), kind(2)).beta == 2.0
    assert CombinedExudateLoss(classes=[kind(1)]).classes == (1,)
    with pytest.raises(TypeError, match="patch_size must be an int"):
        PatchEdgeContrastLoss(np.bool_(True))


@pytest.mark.parametrize("name", ["model", "teacher"])
def test_a_module_set_under_another_name_than_tap_is_a_part(name):
    criterion, model = CombinedExudateLoss(), torch.nn.Conv2d(1, 1, 1)
    setattr(criterion, name, model)
    assert criterion.get_submodule(name) is model
    assert criterion.tap is None
