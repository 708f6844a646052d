"""Laws of the three losses as users call them."""

import copy
import io
import math
import pickle

import pytest
import reference
import segmentation_models_pytorch as smp
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.losses import DiceLoss
from strategies import density_options, edge_options, features_for, masks

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    LossTerms,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
)

TERMS = {"density": PatchDensityContrastLoss, "edge": PatchEdgeContrastLoss}
OPTIONS = {"density": density_options(), "edge": edge_options()}
REFERENCE = {"density": reference.density_loss, "edge": reference.edge_loss}
term = pytest.mark.parametrize("term", TERMS)


def batch(size=32, images=2, classes=1, channels=4, stride=1, dtype=torch.float32, seed=0):
    """Logits, target and features of some lesions of many sizes; one image has none where there are several."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(images, classes, size, size)
    target[:1, :, size // 8 : size // 2, size // 8 : size // 2 + 3] = 1
    target[:1, :, -5:-3, 6:9] = 1
    features = torch.randn(images, channels, size // stride, size // stride, generator=generator, dtype=dtype)
    logits = torch.randn(target.shape, generator=generator, dtype=dtype)
    return logits.requires_grad_(), target, features.requires_grad_()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_equal_values_and_gradients(got, wanted, *inputs):
    torch.testing.assert_close(got, wanted, check_dtype=False)
    for a, b in zip(gradients(got, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9 * max(1, float(b.abs().max())))


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


@given(data=st.data())
def test_combined_weighs_its_parts(data):
    ignored = data.draw(st.booleans())
    target = data.draw(masks(batch=(1, 2), side=(1, 10), ignored=ignored))
    ignore_index = 255 if ignored else None
    features = data.draw(features_for(len(target), side=(1, 12))).requires_grad_()
    logits = torch.randn(target.shape, dtype=torch.float64, requires_grad=True)
    alpha, beta = data.draw(st.sampled_from([(0.02, 0.1), (1.0, 0.0), (0.0, 2.0), (0.5, 0.5)]))
    sides = data.draw(st.sampled_from([(4, 4), (4, 5)]))  # one pooling for both terms, or two
    criterion = CombinedExudateLoss(
        alpha,
        beta,
        density=PatchDensityContrastLoss(sides[0], ignore_index=ignore_index),
        edge=PatchEdgeContrastLoss(sides[1], ignore_index=ignore_index),
        ignore_index=ignore_index,
    )
    terms = criterion.terms(logits, target, features)
    supervised = reference.cross_entropy(logits, target, ignore_index)
    density = reference.density_loss(features, target, patch_size=sides[0], ignore_index=ignore_index)
    edge = reference.edge_loss(features, target, patch_size=sides[1], ignore_index=ignore_index)
    wanted = supervised + alpha * density + beta * edge
    assert_equal_values_and_gradients(terms.total, wanted + 0 * features.sum(), logits, features)
    for got, value, weight in zip(terms[1:], (supervised, density, edge), (1, alpha, beta), strict=True):
        torch.testing.assert_close(got, value.double() * (weight > 0))
    assert torch.equal(criterion(logits, target, features), terms.total)


@pytest.mark.parametrize("contrast", ["nt_xent", "sup_con"])
@pytest.mark.parametrize("stride", [1, 4, 3])
@term
def test_gradcheck(term, stride, contrast):
    _, target, features = batch(size=12, channels=2, stride=stride, dtype=torch.float64)
    loss = TERMS[term](patch_size=3, contrast=contrast, temperature=0.5)
    assert loss(features, target) > 0
    assert torch.autograd.gradcheck(lambda features: loss(features, target), features)


def test_gradcheck_of_the_combination():
    logits, target, features = batch(size=12, channels=2, dtype=torch.float64)
    target[1, :, :6] = 255
    criterion = CombinedExudateLoss(0.5, 2.0, ignore_index=255)
    assert torch.autograd.gradcheck(lambda *tensors: criterion(tensors[0], target, tensors[1]), (logits, features))


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
def test_classes_are_averaged_and_an_empty_class_counts(term):
    _, target, features = batch()
    three = torch.cat([target, torch.zeros_like(target), target.transpose(2, 3)], 1)
    loss = TERMS[term](patch_size=8)
    wanted = sum(loss(features, three[:, k : k + 1]) for k in range(3)) / 3
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
        (CombinedExudateLoss(), lambda target: (logits, target, features)),
    ):
        assert torch.equal(criterion(*arguments(target.to(dtype))), criterion(*arguments(target)))


@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [(torch.uint8, -100), (torch.uint8, 257), (torch.float16, 2049), (torch.float16, 10**6), (torch.bool, -1)],
)
def test_a_value_that_the_dtype_cannot_hold_is_ignored_nowhere(dtype, ignore_index):
    # Torch itself compares after rounding: 156 == -100 and 1 == 257 in uint8, 2048 == 2049 in float16.
    logits, target, features = batch()
    with_it = CombinedExudateLoss(ignore_index=ignore_index)(logits, target.to(dtype), features)
    assert torch.equal(with_it, CombinedExudateLoss()(logits, target.to(dtype), features))
    if dtype != torch.bool:
        target[0, 0, 0, 0] = 156 if dtype == torch.uint8 else 2048
        with pytest.raises(ValueError, match="target must hold only"):
            CombinedExudateLoss(ignore_index=ignore_index)(logits, target.to(dtype), features)


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
        for radius, threshold in (((1, 3), 0.5), (1, None), ((1, 3), 0.49), (3, None))
    ]
    assert losses[0] == losses[1] != losses[2] == losses[3]


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


def degenerate_batches():
    logits, target, features = (tensor.detach() for tensor in batch())
    zero, one = torch.zeros_like(target), torch.ones_like(target)
    pixel = zero.clone()
    pixel[0, 0, 16, 16] = 1
    return {
        "no lesion": (logits, zero, features),
        "all lesion": (logits, one, features),
        "all ignored": (logits, one * 255, features),
        "one lesion pixel": (logits, pixel, features),
        "one image": (logits[:1], target[:1], features[:1]),
        "one patch": (logits[:1, :, :8, :8], target[:1, :, :8, :8], features[:1, :, :8, :8]),
        "one pixel": (logits[:1, :, :1, :1], one[:1, :, :1, :1], features[:1, :, :1, :1]),
        "constant features": (logits, target, torch.ones_like(features)),
        "zero features": (logits, target, torch.zeros_like(features)),
        "features of 1e4": (logits, target, features * 1e4),
        "features of 1e30": (logits, target, features * 1e30),
        "features of 1e-30": (logits, target, features * 1e-30),
        "infinite ignored logits": (
            torch.where(target == 0, -math.inf, logits),
            target + 255 * (target == 0),
            features,
        ),
        "huge logits": (logits * 1e4, target, features),
    }


@pytest.mark.parametrize("contrast", ["nt_xent", "sup_con"])
@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", degenerate_batches())
def test_degenerate_batches_give_finite_float32(name, half, contrast):
    logits, target, features = degenerate_batches()[name]
    if half is not None:
        if name in ("features of 1e30", "features of 1e-30") and half == torch.float16:
            features = features.sign()
        logits, features = logits.to(half), features.to(half)
    inputs = logits.requires_grad_(), features.requires_grad_()
    parts = {"contrast": contrast, "patch_size": 8, "ignore_index": 255}
    criterion = CombinedExudateLoss(
        density=PatchDensityContrastLoss(**parts), edge=PatchEdgeContrastLoss(**parts), ignore_index=255
    )
    terms = criterion.terms(logits, target, features)
    for value in terms:
        assert value.isfinite()
        assert value.dtype == torch.float32
        assert value.shape == ()
    for value, tensors in zip(terms, (inputs, inputs[:1], inputs[1:], inputs[1:]), strict=True):
        for gradient in gradients(value, *tensors):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_loss_in_float32(dtype):
    logits, target, features = batch()
    criterion = CombinedExudateLoss()
    wanted = criterion.terms(logits, target, features)
    with torch.autocast("cpu", dtype=dtype):
        got = criterion.terms(logits, target, features)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", dtype=dtype):
        layer = torch.nn.Conv2d(4, 1, 1)
        loss = criterion(layer(features), target, features.to(dtype))
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()


def test_gradients_of_half_features_survive_a_grad_scaler():
    logits, target, features = batch()
    half = (features.detach() * 1e4).half().requires_grad_()
    loss = CombinedExudateLoss()(logits, target, half) * 2.0**16
    (gradient,) = gradients(loss, half)
    assert gradient.dtype == torch.float16
    assert gradient.isfinite().all()
    assert gradient.any()


def test_nan_features_make_the_loss_nan():
    logits, target, features = batch()
    features = features.detach()
    features[0, 0, 8, 8] = math.nan
    assert CombinedExudateLoss()(logits, target, features).isnan()


def test_alpha_and_beta_skip_and_may_change():
    logits, target, features = batch()
    criterion = CombinedExudateLoss(0, 0)
    bce = torch.nn.BCEWithLogitsLoss()(logits, target)
    assert torch.equal(criterion(logits, target), bce)
    criterion.alpha, criterion.beta = 0.3, 2
    terms = criterion.terms(logits, target, features)
    assert isinstance(terms, LossTerms)
    torch.testing.assert_close(terms.total, bce + 0.3 * terms.density + 2 * terms.edge)
    assert (criterion.alpha, criterion.beta) == (0.3, 2)
    criterion.beta = 0
    assert criterion.terms(logits, target, features).edge == 0


@pytest.mark.parametrize(
    "supervised",
    [
        DiceLoss(sigmoid=True),
        smp.losses.DiceLoss("multilabel"),
        smp.losses.TverskyLoss("multilabel"),
        smp.losses.FocalLoss("multilabel"),
    ],
    ids=["MONAI Dice", "smp Dice", "smp Tversky", "smp Focal"],
)
def test_another_supervised_loss(supervised):
    logits, target, features = batch(classes=2)
    terms = CombinedExudateLoss(supervised=supervised).terms(logits, target, features)
    assert torch.equal(terms.supervised, supervised(logits, target))
    assert_equal_values_and_gradients(
        terms.total, terms.supervised + 0.02 * terms.density + 0.1 * terms.edge, logits, features
    )


def test_supervised_gets_the_target_as_it_is():
    logits, target, features = batch()
    target[:, :, :4] = 255
    seen = []

    def supervised(logits, target):
        seen.append(target)
        return logits.mean()

    CombinedExudateLoss(supervised=supervised, ignore_index=255)(logits, target, features)
    assert seen[0] is target


def test_a_compiled_criterion_which_checks_no_value_reads_a_0_255_mask_as_it_looks():
    logits, target, features = batch()
    torch.compiler.reset()
    compiled = torch.compile(CombinedExudateLoss(), backend="eager")
    torch.testing.assert_close(
        compiled(logits, 255 * target, features), CombinedExudateLoss()(logits, target, features)
    )


def test_a_half_precision_supervised_loss_is_made_float32():
    logits, target, features = batch()
    criterion = CombinedExudateLoss(supervised=lambda logits, _: logits.mean().half())
    assert criterion(logits, target, features).dtype == torch.float32
    criterion.alpha = criterion.beta = 0
    assert criterion(logits, target).dtype == torch.float32


def test_a_subclass_of_a_term_is_called_as_it_is():
    class Doubled(PatchDensityContrastLoss):
        def forward(self, features, target):
            return 2 * super().forward(features, target)

    logits, target, features = batch()
    wanted = 2 * CombinedExudateLoss().terms(logits, target, features).density
    torch.testing.assert_close(CombinedExudateLoss(density=Doubled()).terms(logits, target, features).density, wanted)


def test_meta_tensors_of_monai_give_plain_tensors():
    logits, target, features = batch()
    wanted = CombinedExudateLoss().terms(logits, target, features)
    inputs = MetaTensor(logits), MetaTensor(target), MetaTensor(features)
    for got, value in zip(CombinedExudateLoss().terms(*inputs), wanted, strict=True):
        assert type(got) is torch.Tensor
        assert torch.equal(got, value)
    dice = CombinedExudateLoss(supervised=DiceLoss(sigmoid=True))
    assert type(dice(*inputs)) is torch.Tensor


MODULES = {
    "density": PatchDensityContrastLoss(num_patches=4, select=3, threshold=0.2, ignore_index=-1),
    "edge": PatchEdgeContrastLoss(8, inner_radius=(1, 2), density_threshold=0.3, scope="image", isolate_patches=True),
    "combined": CombinedExudateLoss(0.5, 0.25, supervised=DiceLoss(sigmoid=True), density=PatchDensityContrastLoss(4)),
}


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
        assert not other.state_dict()
    assert torch.equal(other(*arguments), wanted)
    assert repr(other) == repr(module)


def test_repr_names_options_parts_and_a_supervised_function():
    assert "supervised=<function" in repr(CombinedExudateLoss(supervised=lambda logits, _: logits.mean()))
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
    CombinedExudateLoss()(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_no_size_depends_on_the_data(name):
    """The meta device has no data to look at."""
    module = copy.deepcopy(MODULES[name])
    logits, target, features = (tensor.detach().to("meta").requires_grad_() for tensor in batch())
    if name == "combined":
        module.supervised = None
        loss = module(logits, target.detach(), features)
    else:
        loss = module(features, target.detach())
    (gradient,) = gradients(loss, features)
    assert gradient.shape == features.shape


@pytest.mark.parametrize("name", [*MODULES, "drawn"])
def test_one_graph_compiles_for_any_number_of_lesions_and_any_weight(name):
    module = copy.deepcopy(MODULES[name]) if name in MODULES else PatchEdgeContrastLoss(8, max_patches=4)
    if name == "combined":
        module.supervised = None  # MONAI's Dice does not compile to one graph
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for step in range(3):
        logits, target, features = batch(seed=step, dtype=torch.float64)
        target[1, :, : 8 * step, 4:12] = 1
        if name == "combined":
            module.alpha = 0.1 + step
        arguments = (logits, target, features) if name == "combined" else (features, target)
        losses = []
        for loss in (compiled, module):
            torch.manual_seed(0)
            losses.append(loss(*arguments))
        assert_equal_values_and_gradients(*losses, features)
    assert len(graphs) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODULES)
def test_cuda_equals_cpu_without_synchronisation(name):
    module = copy.deepcopy(MODULES[name])
    inputs = batch()
    on_cuda = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in inputs]

    def call(logits, target, features):
        loss = module(logits, target, features) if name == "combined" else module(features, target)
        return loss, gradients(loss, features)[0]

    wanted = call(*inputs)
    call(*on_cuda)  # the first call checks the target's values
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call(*on_cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
def test_a_step_is_captured_in_a_cuda_graph():
    criterion = CombinedExudateLoss()
    inputs = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in batch()]
    logits, target, features = inputs

    def call():
        loss = criterion(logits, target, features)
        return loss, *torch.autograd.grad(loss, (logits, features))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    other = batch(seed=1)
    with torch.no_grad():
        for tensor, value in zip(inputs, other, strict=True):
            tensor.copy_(value)
    graph.replay()
    loss = CombinedExudateLoss()(*other)
    wanted = loss, *gradients(loss, other[0], other[2])
    for a, b in zip(captured, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)


def test_weights_stay_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        criterion = CombinedExudateLoss(0.5)
    logits, target, features = batch()
    assert criterion.alpha == 0.5
    assert torch.equal(criterion(logits, target, features), CombinedExudateLoss(0.5)(logits, target, features))
