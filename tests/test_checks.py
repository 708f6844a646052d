"""What bad input says: the argument, what was expected, what came, and the remedy where there is one."""

import math
import re

import pytest
import torch

from contrastive_exudate_loss import CombinedExudateLoss, FeatureTap, PatchDensityContrastLoss, PatchEdgeContrastLoss
from contrastive_exudate_loss._checks import holds

Density, Edge, Combined = PatchDensityContrastLoss, PatchEdgeContrastLoss, CombinedExudateLoss

BOTH = (Density, Edge)
# (modules, options, error, what its text holds)
OPTIONS = [
    (BOTH, {"patch_size": 0}, ValueError, "patch_size must be an int >= 1, got 0"),
    (BOTH, {"patch_size": 16.0}, TypeError, "patch_size must be an int >= 1, got 16.0 of type float"),
    (BOTH, {"patch_size": True}, TypeError, "patch_size must be an int >= 1, got True of type bool"),
    (BOTH, {"patch_size": (16, 16)}, TypeError, "patch_size must be an int"),
    (BOTH, {"num_patches": 0}, ValueError, "num_patches must be an int >= 1, got 0"),
    (BOTH, {"num_patches": "8"}, TypeError, "num_patches must be an int >= 1, got '8' of type str"),
    (BOTH, {"patch_size": 16, "num_patches": 16}, ValueError, "give one of patch_size and num_patches and leave the other None, got patch_size=16 and num_patches=16"),
    (BOTH, {"temperature": 0}, ValueError, "temperature must be a number >= 0.001 and finite in float32, got 0"),
    (BOTH, {"temperature": -1.0}, ValueError, "temperature must be"),
    (BOTH, {"temperature": math.inf}, ValueError, "temperature must be a number >= 0.001 and finite in float32, got inf"),
    (BOTH, {"temperature": math.nan}, ValueError, "temperature must be a number >= 0.001 and finite in float32, got nan"),
    (BOTH, {"temperature": "0.1"}, TypeError, "temperature must be a number >= 0.001 and finite in float32, got '0.1' of type str"),
    (BOTH, {"contrast": "ntxent"}, ValueError, "contrast must be 'nt_xent' or 'sup_con', got 'ntxent'"),
    (BOTH, {"contrast": None}, TypeError, "contrast must be 'nt_xent' or 'sup_con', got None of type NoneType"),
    (BOTH, {"max_patches": 1}, ValueError, "max_patches must be an int >= 2, got 1"),
    (BOTH, {"max_patches": 2.5}, TypeError, "max_patches must be an int >= 2, got 2.5 of type float"),
    ((*BOTH, Combined), {"ignore_index": 0}, ValueError, "ignore_index must be neither 0 (background) nor 1 (lesion)"),
    ((*BOTH, Combined), {"ignore_index": 1}, ValueError, "ignore_index must be neither 0 (background) nor 1 (lesion)"),
    ((*BOTH, Combined), {"ignore_index": -1.0}, TypeError, "ignore_index must be None or an int, got -1.0 of type float"),
    ((*BOTH, Combined), {"ignore_index": True}, TypeError, "ignore_index must be None or an int, got True of type bool"),
    ((Density,), {"threshold": 1}, ValueError, "threshold must be a number >= 0 and < 1, got 1"),
    ((Density,), {"threshold": -0.1}, ValueError, "threshold must be a number >= 0 and < 1, got -0.1"),
    ((Density,), {"threshold": None}, TypeError, "threshold must be a number >= 0 and < 1, got None of type NoneType"),
    ((Density,), {"select": 1}, ValueError, "select must be an int >= 2, got 1"),
    ((Density,), {"select": "some"}, ValueError, "select must be 'all', got 'some'"),
    ((Density,), {"select": None}, TypeError, "select must be an int >= 2, got None"),
    ((Density,), {"select": 3, "max_patches": 3}, ValueError, "give select or max_patches, not both, got 3 and 3"),
    ((Edge,), {"inner_radius": 0}, ValueError, "inner_radius must be an int >= 1, got 0"),
    ((Edge,), {"outer_radius": -2}, ValueError, "outer_radius must be an int >= 1, got -2"),
    ((Edge,), {"outer_radius": 1.5}, TypeError, "outer_radius must be an int >= 1 or a pair of ints, got 1.5"),
    ((Edge,), {"inner_radius": (1, 2)}, ValueError, "inner_radius must be an int >= 1 unless density_threshold is given"),
    ((Edge,), {"inner_radius": (1, 2, 3), "density_threshold": 0.5}, ValueError, "inner_radius must be an int >= 1 or a pair"),
    ((Edge,), {"inner_radius": (1,), "density_threshold": 0.5}, ValueError, "inner_radius must be an int >= 1 or a pair"),
    ((Edge,), {"inner_radius": (1, 0), "density_threshold": 0.5}, ValueError, "inner_radius must be an int >= 1, got 0"),
    ((Edge,), {"inner_radius": (1, "2"), "density_threshold": 0.5}, TypeError, "inner_radius must be an int >= 1, got '2'"),
    ((Edge,), {"density_threshold": 1.0}, ValueError, "density_threshold must be a number >= 0 and < 1, got 1.0"),
    ((Edge,), {"footprint": "disk"}, ValueError, "footprint must be 'square' or 'cross', got 'disk'"),
    ((Edge,), {"footprint": 3}, TypeError, "footprint must be 'square' or 'cross', got 3 of type int"),
    ((Edge,), {"scope": "batch"}, ValueError, "scope must be 'patch' or 'image', got 'batch'"),
    ((Density, Edge), {"gather_distributed": 1}, TypeError, "gather_distributed must be True or False, got 1 of type int"),
    ((Edge,), {"isolate_patches": 1}, TypeError, "isolate_patches must be True or False, got 1 of type int"),
    ((Combined,), {"alpha": -0.1}, ValueError, "alpha must be a number >= 0 and finite in float32, got -0.1"),
    ((Combined,), {"alpha": 1e39}, ValueError, "alpha must be a number >= 0 and finite in float32, got 1e+39"),
    (BOTH, {"temperature": 10**400}, ValueError, "temperature must be a number >= 0.001 and finite in float32"),
    ((*BOTH, Combined), {"ignore_index": 2**70}, ValueError, "ignore_index must fit int64"),
    ((Combined,), {"alpha": math.nan}, ValueError, "alpha must be a number >= 0 and finite in float32, got nan"),
    ((Combined,), {"alpha": torch.tensor(0.1)}, TypeError, "float32, got tensor(0.1000) of type Tensor; give alpha.item()"),
    ((Combined,), {"beta": math.inf}, ValueError, "beta must be a number >= 0 and finite in float32, got inf"),
    ((Combined,), {"beta": "0.1"}, TypeError, "beta must be a number >= 0 and finite in float32, got '0.1' of type str; for a weight that sets itself give Pull(2.0)"),
    ((Combined,), {"supervised": "bce"}, TypeError, "supervised must be None or callable as (logits, target), got 'bce'"),
    ((Combined,), {"supervised": torch.nn.BCELoss}, TypeError, "got the class BCELoss; give BCELoss()"),
    ((Combined,), {"alpha": torch.nn.BCEWithLogitsLoss()}, TypeError, "alpha must be a number or a Pull, got a BCEWithLogitsLoss; give a model as features= and a loss as supervised="),
    ((Combined,), {"density": Edge()}, TypeError, "density must be None or a PatchDensityContrastLoss, got PatchEdge"),
    ((Combined,), {"edge": 0.1}, TypeError, "edge must be None or a PatchEdgeContrastLoss, got float"),
    ((Combined,), {"edge": Edge(), "ignore_index": -1}, ValueError, "edge must have ignore_index=-1 like the criterion"),
    ((Combined,), {"density": Density(ignore_index=2), "ignore_index": -1}, ValueError, "density must have ignore_index=-1"),
    ((Combined,), {"features": torch.ones(1, 2, 4, 4)}, TypeError, "features must be None, a model or a FeatureTap, got Tensor"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "options", "error", "text"),
    [(module, *rest) for modules, *rest in OPTIONS for module in modules],
    ids=lambda value: value.__name__ if isinstance(value, type) else re.sub(r"\W+", "-", str(value))[:60],
)
def test_bad_options_are_refused(module, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        module(**options)


FEATURES, MASK = torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 16, 16)
LOGITS = torch.zeros(2, 1, 16, 16)


def spoiled(value):
    mask = MASK.clone()
    mask[0, 0, 3, 3] = value
    return mask


# (what to replace, by what, error, what its text holds)
TENSORS = [
    ("features", torch.zeros(4, 8, 8), ValueError, "features must be (B, C, h, w), got (4, 8, 8)"),
    ("features", torch.zeros(3, 4, 8, 8), ValueError, "features must be (B, C, h, w) with target's B = 2, got (3, 4, 8, 8)"),
    ("features", torch.zeros(1, 4, 8, 8), ValueError, "features must be (B, C, h, w) with target's B = 2, got (1, 4, 8, 8)"),
    ("features", torch.zeros(2, 1, 8, 8), ValueError, "features must have at least 2 channels"),
    ("features", torch.zeros(2, 4, 0, 8), ValueError, "features must be (B, C, h, w) with no axis of length 0"),
    ("features", torch.zeros(2, 4, 8, 8).long(), TypeError, "features must be floating, of at least 16 bits, got torch.int64"),
    ("features", torch.zeros(2, 4, 8, 8, dtype=torch.complex64), TypeError, "features must be floating, of at least 16 bits, got torch.complex64"),
    ("features", FEATURES.to(torch.float8_e5m2), TypeError, "features must be floating, of at least 16 bits, got torch.float8_e5m2"),
    ("features", torch.zeros(2, 4, 8, 8, device="meta"), ValueError, "features must be on target's device cpu, got meta"),
    ("features", FEATURES.numpy(), TypeError, "features must be a (B, C, h, w) torch.Tensor, got ndarray"),
    ("features", FEATURES.to_sparse(), TypeError, "features must be a dense (B, C, h, w) tensor"),
    ("target", torch.zeros(2, 16, 16), ValueError, "target must be (B, K, H, W), got (2, 16, 16); add the class axis"),
    ("target", torch.zeros(2, 16, 16), ValueError, "give the criterion classes=range(1, number of classes)"),
    ("target", torch.zeros(16, 16), ValueError, "got (16, 16); add the batch and the class axis with target[None, None]"),
    ("target", torch.zeros(2, 1, 1, 16, 16), ValueError, "target must be (B, K, H, W), got (2, 1, 1, 16, 16); images are 2-D: give slices of volumes as a batch"),
    ("target", torch.zeros(2, 0, 16, 16), ValueError, "target must be (B, K, H, W) with no axis of length 0"),
    ("target", torch.zeros(2, 1, 16, 16, dtype=torch.complex64), TypeError, "target must be bool, integer or floating"),
    ("target", [[0, 1]], TypeError, "target must be a (B, K, H, W) torch.Tensor, got list"),
    ("target", MASK.to("meta"), ValueError, "must be on target's device meta, got cpu; move target with"),
    ("target", spoiled(255), ValueError, "target must hold only 0 and 1, got 255 (dtype torch.float32); turn a 0/255 mask into target > 127; give ignore_index=255 only if 255 marks pixels to leave out"),
    ("target", spoiled(255).byte(), ValueError, "target must hold only 0 and 1, got 255 (dtype torch.uint8)"),
    ("target", spoiled(0.5).to(torch.float8_e5m2), ValueError, "target must hold only 0 and 1, got 0.5"),
    ("target", spoiled(0.5), ValueError, "target must hold only 0 and 1, got 0.5 (dtype torch.float32); threshold a mask that was resized or smoothed, for example with target > 0.5"),
    ("target", spoiled(1.5), ValueError, "got 1.5 (dtype torch.float32); say which values are lesion, as in target == value"),
    ("target", spoiled(-0.5), ValueError, "got -0.5 (dtype torch.float32); say which values are lesion, as in target == value"),
    ("target", spoiled(2), ValueError, "if 2 marks lesions, give target == 2; if it marks pixels to leave out, ignore_index=2"),
    ("target", torch.linspace(0, 240, 16).round().expand(2, 1, 16, 16), ValueError, "a grey mask, as JPEG compression and resizing produce, binarize it with target > 127"),
    ("target", torch.zeros(16), ValueError, "got (16,); give a batch of 2-D images"),
    ("target", spoiled(2.7), ValueError, "got 2.7 (dtype torch.float32); say which values are lesion"),
    ("target", 4 + spoiled(1), ValueError, "got 4, 5 (dtype torch.float32); if it holds the class of each pixel, give CombinedExudateLoss classes=range(1, 6)"),
    ("target", {"masks": MASK}, TypeError, "got dict; give one of its values: output['masks']"),
    ("target", 3 + spoiled(1), ValueError, "got 3, 4 (dtype torch.float32); if it holds the class of each pixel, give CombinedExudateLoss classes=range(1, 5)"),
    ("target", spoiled(-1).long(), ValueError, "target must hold only 0 and 1, got -1"),
    ("target", spoiled(math.nan), ValueError, "target must hold only 0 and 1, got nan"),
    ("target", spoiled(math.inf), ValueError, "got inf (dtype torch.float32); find the step that makes NaN or infinity"),
    ("logits", torch.zeros(2, 16, 16), ValueError, "logits must be (B, K, H, W), got (2, 16, 16); add the class axis"),
    ("logits", torch.zeros(3, 1, 16, 16), ValueError, "logits must be (B, K, H, W) = (2, 1, 16, 16) like target, got (3, 1, 16, 16); logits and target must come from the same batch"),
    ("logits", torch.zeros(1, 1, 16, 16), ValueError, "got (1, 1, 16, 16); logits and target must come from the same batch"),
    ("logits", torch.zeros(2, 2, 16, 16), ValueError, "got (2, 2, 16, 16); give one target channel of 0 and 1 per lesion class"),
    ("logits", torch.zeros(2, 1, 8, 8), ValueError, "got (2, 1, 8, 8); resize logits with torch.nn.functional.interpolate"),
    ("logits", LOGITS.long(), TypeError, "logits must be floating, of at least 16 bits, got torch.int64"),
    ("logits", LOGITS.to("meta"), ValueError, "logits must be on target's device cpu, got meta"),
    ("logits", None, TypeError, "logits must be a (B, K, H, W) torch.Tensor, got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "value", "error", "text"),
    [
        (module, *case)
        for case in TENSORS
        for module in (Density(), Edge(), Combined.paper())
        if case[0] != "logits" or isinstance(module, Combined)
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else re.sub(r"\W+", "-", str(value))[:60],
)  # fmt: skip
def test_bad_tensors_are_refused(module, name, value, error, text):
    arguments = {"logits": LOGITS, "features": FEATURES, "target": MASK} | {name: value}
    if not isinstance(module, Combined):
        del arguments["logits"]
    with pytest.raises(error, match=re.escape(text)):
        module(**arguments)


def test_too_few_logits_channels_are_told_from_a_wrong_size():
    with pytest.raises(ValueError, match="give one target channel of 0 and 1 per lesion class"):
        Combined.paper()(LOGITS, MASK.repeat(1, 2, 1, 1), FEATURES)


def test_a_class_axis_in_last_place_is_told_from_a_wrong_size():
    with pytest.raises(ValueError, match=r"move target's class axis to second place with target.movedim\(3, 1\)"):
        Combined.paper()(LOGITS, MASK.movedim(1, 3), FEATURES)
    with pytest.raises(ValueError, match="resize logits with"):
        Combined.paper()(LOGITS, MASK[..., :1], FEATURES)


def test_a_value_beside_the_ignored_one_may_be_either():
    with pytest.raises(ValueError, match=r"got 3 .* say which values are lesion, as in target == value"):
        Density(ignore_index=2)(FEATURES, spoiled(3))


def test_one_target_channel_more_than_logits_may_be_the_background():
    mask = MASK.repeat(1, 3, 1, 1)
    with pytest.raises(ValueError, match=r"if the first channel is the background, give target\[:, 1:\]"):
        Combined.paper()(LOGITS.repeat(1, 2, 1, 1), mask, FEATURES)
    with pytest.raises(ValueError, match=r"and as many logit channels$"):
        Combined.paper()(LOGITS, mask, FEATURES)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        *((module, options) for module in BOTH for options in ({"patch_size": 1}, {"num_patches": 1})),
        *((module, {"temperature": 1e-3}) for module in BOTH),
        *((module, {"max_patches": 2}) for module in BOTH),
        (Density, {"threshold": 0}),
        (Density, {"select": 2}),
        (Edge, {"inner_radius": 1, "outer_radius": 1}),
        (Edge, {"density_threshold": 0, "inner_radius": (1, 1), "outer_radius": [1, 1]}),
    ],
    ids=str,
)
def test_the_least_values_and_two_channels_are_taken(module, options):
    mask = MASK.clone()
    mask[0, 0, :8, 4:] = 1
    features = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert module(**options)(features, mask).isfinite()


def test_the_five_least_wrong_values_are_shown():
    mask = MASK.clone()
    mask[1, 0, 2, :7] = torch.tensor([9, 3, 8, 2, 3, 5, 7])
    with pytest.raises(ValueError, match=re.escape("got 2, 3, 5, 7, 8 (dtype")):
        Density()(FEATURES, mask)


def test_five_keys_of_a_mapping_are_named_at_most():
    with pytest.raises(TypeError, match=r"give one of its values: .*output\['e'\]$"):
        Density()(FEATURES, dict.fromkeys("abcdef", MASK))


def test_missing_features_are_named():
    with pytest.raises(ValueError, match=r"features must be given, .*features=model.*criterion.tap = model"):
        Combined.paper()(LOGITS, MASK)


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        (torch.zeros(2), ValueError, "supervised must return a scalar, got (2,); give it reduction='mean'"),
        (0.5, TypeError, "supervised must return a scalar tensor, got float"),
    ],
    ids=["vector", "float"],
)
def test_a_supervised_loss_that_is_no_scalar_is_refused(returned, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Combined(0.02, 0.1, supervised=lambda *_: returned)(LOGITS, MASK, FEATURES)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_weights_are_checked_when_set(name):
    criterion = Combined.paper()
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0 and finite in float32, got -1"):
        setattr(criterion, name, -1)


@pytest.mark.parametrize(
    ("part", "name", "value", "text"),
    [
        ("edge", "inner_radius", 0, "inner_radius must be an int >= 1, got 0"),
        ("edge", "outer_radius", (1, 2), "unless density_threshold is given, got the pair (1, 2)"),
        ("edge", "scope", "foo", "scope must be 'patch' or 'image', got 'foo'"),
        ("edge", "temperature", 0, "temperature must be a number >= 0.001"),
        ("edge", "ignore_index", 1, "ignore_index must be neither 0 (background) nor 1 (lesion), got 1"),
        ("density", "patch_size", 0, "patch_size must be an int >= 1, got 0"),
        (
            "density",
            "patch_size",
            None,
            "give one of patch_size and num_patches and leave the other None, got patch_size=None and",
        ),
        ("density", "num_patches", 5, "leave the other None, got patch_size=16 and num_patches=5"),
        ("density", "max_patches", 1, "max_patches must be an int >= 2, got 1"),
        ("density", "select", 1, "select must be an int >= 2, got 1"),
        (None, "edge", None, "edge must be None or a PatchEdgeContrastLoss, got NoneType"),
        (None, "density", Edge(), "density must be None or a PatchDensityContrastLoss, got PatchEdgeContrastLoss"),
        (None, "supervised", 3, "supervised must be None or callable as (logits, target), got 3"),
        (None, "tap", torch.ones(1), "features must be None, a model or a FeatureTap, got Tensor"),
        (None, "ignore_index", 255, "density must have ignore_index=255 like the criterion, got None"),
    ],
)
def test_options_that_are_set_are_checked_by_each_call_until_they_make_sense(part, name, value, text):
    criterion = Combined.paper()
    owner = criterion if part is None else getattr(criterion, part)
    before = getattr(owner, name)
    setattr(owner, name, value)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=re.escape(text)):
            criterion(LOGITS, MASK, FEATURES)
    setattr(owner, name, before)
    assert torch.equal(criterion(LOGITS, MASK, FEATURES), Combined.paper()(LOGITS, MASK, FEATURES))


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_module_in_place_of_a_weight_is_refused_and_changes_nothing(name):
    criterion = Combined.paper()
    with pytest.raises(TypeError, match=f"{name} must be a number or a Pull, got a BCELoss; give a model as features="):
        setattr(criterion, name, torch.nn.BCELoss())
    assert torch.equal(criterion(LOGITS, MASK, FEATURES), Combined.paper()(LOGITS, MASK, FEATURES))


def test_the_way_from_patch_size_to_num_patches_leads_through_both_or_neither():
    for steps in ({"num_patches": 4, "patch_size": None}, {"patch_size": None, "num_patches": 4}):
        term = Density()
        for name, value in steps.items():
            setattr(term, name, value)
        assert torch.equal(term(FEATURES, MASK), Density(num_patches=4)(FEATURES, MASK))


def test_a_part_that_comes_to_contradict_the_criterion_is_refused():
    criterion = Combined(0.02, 0.1, ignore_index=-1)
    criterion.density.ignore_index = 5
    criterion.density(FEATURES, MASK)  # by itself it makes sense
    with pytest.raises(ValueError, match="density must have ignore_index=-1 like the criterion, got 5"):
        criterion(LOGITS, MASK, FEATURES)


def test_options_are_not_checked_again_while_none_is_set(monkeypatch):
    criterion, calls = Combined.paper(), []
    monkeypatch.setattr(Density, "_check_options", lambda term: calls.append(term))
    criterion(LOGITS, MASK, FEATURES)
    criterion.eval()
    criterion.alpha = 0.5
    criterion(LOGITS, MASK, FEATURES)
    assert not calls
    criterion.density.temperature = 0.1
    criterion(LOGITS, MASK, FEATURES)
    assert calls == [criterion.density]


def test_options_that_make_sense_can_be_set():
    criterion = Combined.paper()
    criterion.edge.inner_radius = 4
    criterion.edge = Edge(outer_radius=3)
    criterion.edge.scope = "image"
    criterion.density.ignore_index = criterion.edge.ignore_index = criterion.ignore_index = -1
    wanted = Combined(0.02, 0.1, edge=Edge(outer_radius=3, scope="image", ignore_index=-1), ignore_index=-1)
    assert repr(criterion) == repr(wanted)
    assert torch.equal(criterion(LOGITS, MASK, FEATURES), wanted(LOGITS, MASK, FEATURES))


def test_each_part_checks_by_its_own_ignore_index():
    target = spoiled(255)
    Combined(0.02, 0.1, density=Density(ignore_index=255), edge=Edge(ignore_index=255), ignore_index=255)(
        LOGITS, target, FEATURES
    )
    with pytest.raises(ValueError, match="target must hold only 0 and 1, got 255"):
        Combined(0.02, 0.1, density=Density(ignore_index=255), supervised=torch.nn.MSELoss())(LOGITS, target, FEATURES)
    with pytest.raises(ValueError, match="target must hold only 0 and 1 and ignore_index = 255, got 7"):
        Density(ignore_index=255)(FEATURES, spoiled(7))
    with pytest.raises(ValueError, match="target must hold only 0 and 1 and ignore_index = -1, got 255"):
        Density(ignore_index=-1)(FEATURES, target)


def test_values_are_checked_at_every_call_on_the_cpu():
    loss = Density()
    loss(FEATURES, MASK)
    with pytest.raises(ValueError, match="target must hold only"):
        loss(FEATURES, spoiled(2))


@pytest.mark.cuda
def test_values_are_checked_at_the_first_call_on_cuda():
    loss = Density()
    with pytest.raises(ValueError, match="target must hold only"):
        loss(FEATURES.cuda(), spoiled(2).cuda())
    loss(FEATURES.cuda(), MASK.cuda())
    loss(FEATURES.cuda(), spoiled(2).cuda())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int16, torch.bool]
)
def test_holds_what_survives_a_round_trip(dtype):
    for value in (*range(-300, 300), 2047, 2049, 4098, 2**15, 65504, 65505, 2**24, 2**24 + 1, 2**40, 2**53 + 1):
        try:
            survives = int(torch.tensor(value, dtype=dtype)) == value
        except (OverflowError, RuntimeError):
            survives = False
        assert holds(dtype, value) == survives, value


@pytest.mark.parametrize(
    ("model", "layer", "error", "text"),
    [
        ("unet", None, TypeError, "model must be a torch.nn.Module, got str"),
        (torch.nn.DataParallel(torch.nn.Conv2d(2, 1, 1)), None, ValueError, "model must not be nn.DataParallel"),
        (torch.nn.Conv2d(2, 1, 1), "head", ValueError, "layer must be the dotted name of a module"),
        (torch.nn.ModuleDict({"head": torch.nn.ReLU()}), "heads", ValueError, "got 'heads'; did you mean 'head'\\?"),
        (torch.nn.ModuleDict({"_orig_mod": torch.nn.ReLU()}), "head", ValueError, "tap a model before torch.compile"),
        (torch.nn.Conv2d(2, 1, 1), 3, TypeError, "layer must be a module of the model or its dotted name, got int"),
        (
            torch.nn.Conv2d(2, 1, 1),
            torch.nn.ReLU(),
            ValueError,
            "layer must be a module of the model, got another ReLU",
        ),
    ],
    ids=["no module", "DataParallel", "unknown name", "near name", "compiled", "no layer", "stranger"],
)
def test_a_bad_tap_is_refused(model, layer, error, text):
    with pytest.raises(error, match=text):
        FeatureTap(model, layer)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float32])
def test_a_target_of_one_channel_more_says_how_to_take_it_off(dtype):
    lesion, last = spoiled(1), torch.zeros_like(MASK)
    last[:, :, :4] = 1
    with pytest.raises(ValueError, match="if the last marks pixels to ignore") as caught:
        Combined(0, 0)(LOGITS, torch.cat([lesion, last], 1).to(dtype))
    names = {"target": torch.cat([lesion, last], 1).to(dtype)}
    background, ignored = re.findall(r"give (target\[.*?)(?:; | and ignore_index)", str(caught.value))
    wanted = torch.where(last > 0, -1, lesion)
    assert torch.equal(eval(ignored, names), wanted)
    assert Combined(0, 0, ignore_index=-1)(LOGITS, wanted).isfinite()
    assert torch.equal(eval(background, names), last.to(dtype))
