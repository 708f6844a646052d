"""The Triton kernels of the terms give what the plain way gives; Triton's interpreter runs them on the CPU."""

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
from batches import batch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import kernels_on, kernels_or_none
from monai.losses import DiceLoss
from strategies import CONTRASTS, density_options, edge_options, features_for, masks
from torch.nn import functional as F

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    Pull,
    _terms,
    fused,
    pull,
)

pytest.importorskip("contrastive_exudate_loss.pull_triton")
# 0 / 0 and overflow, which the kernel means and of which the interpreter's NumPy warns.
not_finite = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
# Of values, and of gradients beside their largest element.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def results(criterion, *inputs):
    """All terms, and the gradients of a sum in which each has a weight of its own."""
    terms = criterion.terms(*inputs)
    weighted = terms.total + 0.5 * terms.supervised + 0.3 * terms.density + 0.2 * terms.edge
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [term.detach() for term in terms], torch.autograd.grad(weighted, wanted)


def assert_the_same(device, criterion, *inputs, calls=1, inside=True):
    """The plain way on the CPU and the kernels give the same, in so many calls, with cross-entropy inside or not."""
    wanted, wanted_gradients = results(criterion, *inputs)
    moved = [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in inputs]
    with kernels_on(device) as works:
        got, gradients = results(criterion, *moved)
    assert [has_logits for _, has_logits in works] == [inside] * calls
    tolerance = max(TOLERANCES[tensor.dtype] for tensor in inputs if tensor.requires_grad)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)
    for a, b, tensor in zip(gradients, wanted_gradients, moved[:1] + moved[2:], strict=True):
        assert (a.dtype, a.device) == (b.dtype, tensor.device)
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=tolerance * max(1e-6, float(b.abs().max())))


@st.composite
def calls(draw):
    """A criterion, and what it is called with."""
    ignore_index = draw(st.sampled_from([None, 255]))
    small = {"batch": (1, 2), "side": (1, 8), "ignored": ignore_index is not None}
    target = draw(masks(**small)).to(draw(st.sampled_from([torch.int64, torch.float32, torch.uint8])))
    features = draw(features_for(len(target), channels=(2, 3), side=(1, 10)))
    sides = draw(st.sampled_from([{"patch_size": 4}, {"patch_size": 30}, {"num_patches": 2}]))
    contrast = {"contrast": draw(st.sampled_from(CONTRASTS)), "ignore_index": ignore_index}
    keep = ("threshold", "temperature", "select")
    density = {name: value for name, value in draw(density_options()).items() if name in keep} | sides | contrast
    keep = ("footprint", "isolate_patches", "scope", "density_threshold", "temperature")
    edge = {name: value for name, value in draw(edge_options()).items() if name in keep} | sides | contrast
    radii = st.sampled_from([1, 2] if edge["density_threshold"] is None else [1, (1, 2), (2, 1), (1, 3)])
    edge |= {"inner_radius": draw(radii), "outer_radius": draw(radii)}
    weights = draw(st.sampled_from([(0.7, 1.3), (0.0, 0.1), (0.1, 0.0)]))
    logits = torch.randn(target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(target.numel()))
    criterion = CombinedExudateLoss(
        *weights,
        density=PatchDensityContrastLoss(**density),
        edge=PatchEdgeContrastLoss(**edge),
        ignore_index=ignore_index,
    )
    return criterion, logits.requires_grad_(), target, features.requires_grad_()


@devices
@pytest.mark.filterwarnings("ignore:edge has scope='image'")
@settings(max_examples=40)
@given(call=calls())
def test_kernels_equal_the_plain_way(device, call):
    assert_the_same(device, *call)


def criteria(*weights, density=None, edge=None, ignore_index=None, **options):
    """Both terms on patches of 4 x 4 pixels."""
    common = {"patch_size": 4, "ignore_index": ignore_index}
    return CombinedExudateLoss(
        *(weights or (0.7, 1.3)),
        density=PatchDensityContrastLoss(**common | (density or {})),
        edge=PatchEdgeContrastLoss(**common | {"inner_radius": 1, "outer_radius": 1} | (edge or {})),
        ignore_index=ignore_index,
        **options,
    )


def small(ignored=None, **options):
    """A batch whose classes differ, the last without a lesion; with some pixels ignored."""
    logits, target, features = batch(**{"size": 8, "dtype": torch.float64} | options)
    if target.shape[1] > 1:
        target[:, -1] = 0
        target[1, 0, 4:, 3:] = 1
    if ignored is not None:
        target[:, :, ::5, ::3] = ignored
    return logits, target, features


NOTHING, EVERYTHING = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)


@devices
@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize(
    ("target", "ignored"),
    [(NOTHING, None), (EVERYTHING, None), (NOTHING, 0), (EVERYTHING[:1, :, :4, :4], None)],
    ids=["no lesion", "all lesion", "all ignored", "one patch"],
)
def test_a_degenerate_batch(device, contrast, target, ignored):
    target = target - 1 if ignored is not None else target
    ignored = None if ignored is None else -1
    chosen = {"contrast": contrast}
    logits, features = (torch.randn(len(target), c, *target.shape[2:], dtype=torch.float64) for c in (1, 3))
    criterion = criteria(density=chosen, edge=chosen, ignore_index=ignored)
    assert_the_same(device, criterion, logits.requires_grad_(), target, features.requires_grad_())


@devices
@pytest.mark.parametrize(
    ("dtype", "memory_format"), [*zip(TOLERANCES, [torch.channels_last, torch.contiguous_format] * 2, strict=True)]
)
def test_any_dtype_and_memory_format(device, dtype, memory_format):
    logits, target, features = small(dtype=dtype, classes=2, ignored=255)
    features = features.detach().contiguous(memory_format=memory_format).requires_grad_()
    assert_the_same(device, criteria(ignore_index=255), logits, target, features)


@devices
def test_autocast_changes_nothing(device):
    inputs = [tensor.to(device) for tensor in small(dtype=torch.float32)]
    with kernels_on(device):
        wanted = results(criteria(), *inputs)
        with torch.autocast(device, torch.bfloat16):
            got = results(criteria(), *inputs)
    torch.testing.assert_close(got, wanted)


@devices
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float16])
def test_any_dtype_of_the_target(device, dtype):
    logits, target, features = small(classes=3)
    assert_the_same(device, criteria(), logits, target.to(dtype).transpose(2, 3), features)


@devices
def test_a_value_that_the_target_cannot_hold_is_ignored_nowhere(device):
    logits, target, features = small()
    assert_the_same(device, criteria(ignore_index=-100), logits, target.to(torch.uint8), features)


@devices
def test_the_mean_is_over_the_classes_that_have_a_contrast(device):
    logits, target, features = small(classes=3)  # of which the last has no lesion
    target[:, 1] = 0
    target[0, 1, 1, 1] = 1  # one inner and one outer embedding, but no pair
    assert_the_same(device, criteria(), logits, target, features)
    alone = criteria().edge(features, target[:, :1])
    with kernels_on(device):
        torch.testing.assert_close(criteria().edge(features.to(device), target.to(device)).cpu(), alone)


@devices
def test_an_isolated_patch_of_lesion_alone_has_no_contour(device):
    logits, target, features = small(ignored=-1)
    target[:, :, :4, :4] = 1
    assert_the_same(
        device, criteria(0.0, 1.0, edge={"isolate_patches": True}, ignore_index=-1), logits, target, features
    )


@devices
@pytest.mark.parametrize("cells", [(2, 8), (5, 3), (10, 11)])
def test_strides_that_divide_nothing(device, cells):
    logits, target, _ = small(ignored=-1)
    features = torch.randn(2, 3, *cells, dtype=torch.float64, requires_grad=True)
    assert_the_same(device, criteria(ignore_index=-1), logits, target, features)


@devices
@pytest.mark.parametrize(
    ("density", "edge", "calls"),
    [
        ({"temperature": 0.3}, {"temperature": 0.07}, 1),
        ({"threshold": 0.2}, {"density_threshold": 0.6, "inner_radius": (1, 3)}, 1),
        ({"contrast": "sup_con"}, {"contrast": "nt_xent"}, 2),
        ({"patch_size": 3}, {}, 2),
    ],
)
def test_terms_that_differ(device, density, edge, calls):
    inputs = small()
    assert_the_same(device, criteria(density=density, edge=edge), *inputs, calls=calls, inside=calls == 1)


@devices
@pytest.mark.parametrize(
    ("density", "edge"),
    [
        ({"max_patches": 2}, {}),
        ({"max_patches": 3}, {"max_patches": 2}),
        ({"select": 2}, {"max_patches": 2, "contrast": "nt_xent"}),
        ({"select": 2}, {"max_patches": 2, "contrast": "sup_con"}),
        ({}, {"max_patches": 2, "scope": "image"}),
        ({"max_patches": 1000}, {"scope": "image"}),
    ],
)
def test_the_same_embeddings_are_drawn(device, density, edge):
    target = small(images=3)[1].repeat(1, 2, 1, 1)
    inputs = [tensor.to(device) for tensor in (torch.randn(3, 2, 8, 8), target, torch.randn(3, 3, 8, 8))]
    inputs = [tensor.double().requires_grad_(n != 1) for n, tensor in enumerate(inputs)]
    found = []
    for ways in (contextlib.nullcontext(), kernels_on(device)):
        torch.manual_seed(0)
        with ways as works:
            found.append(results(criteria(density=density, edge=edge), *inputs))
    assert works
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@devices
@pytest.mark.parametrize("options", [{}, {"ignore_index": -1}])
def test_hecl_by_kernels_equals_the_plain_way(device, options):
    logits, target, features = small(ignored=options.get("ignore_index"), size=20, classes=2)
    target[0, 0, :8, :8] = 1
    assert_the_same(device, CombinedExudateLoss.hecl(**options), logits, target, features)


@devices
@pytest.mark.parametrize("loss", [PatchDensityContrastLoss(4, ignore_index=-1), PatchEdgeContrastLoss(4)])
def test_a_term_alone(device, loss):
    _, target, features = small(ignored=loss.ignore_index)
    wanted = loss(features, target)
    moved = features.detach().to(device).requires_grad_()
    with kernels_on(device) as works:
        got = loss(moved, target.to(device))
        (gradient,) = torch.autograd.grad(3 * got, moved)
    assert [has_logits for _, has_logits in works] == [False]
    torch.testing.assert_close(got.cpu(), wanted)
    torch.testing.assert_close(gradient.cpu(), torch.autograd.grad(3 * wanted, features)[0])


@devices
@pytest.mark.parametrize("supervised", [DiceLoss(sigmoid=True), F.binary_cross_entropy_with_logits])
def test_a_supervised_loss_of_the_users(device, supervised):
    assert_the_same(device, criteria(supervised=supervised), *small(classes=2), inside=False)


@devices
def test_index_masks(device):
    logits, mask, features = small(classes=3)
    index = (mask[:, :2] * torch.tensor([1, 2]).view(2, 1, 1)).amax(1).long()
    assert_the_same(device, criteria(classes=[1, 2]), logits, index, features, inside=False)


@devices
def test_logits_of_another_precision_have_a_cross_entropy_of_their_own(device):
    logits, target, features = small()
    inputs = logits.detach().float().requires_grad_(), target, features
    assert_the_same(device, criteria(), *inputs, inside=False)


@devices
@not_finite
@pytest.mark.parametrize(
    ("alpha", "beta", "calls"), [(0.0, Pull(0.5), 1), (Pull(1.0), 0.3, 2), (Pull(1.0), Pull(1.0), 2)]
)
def test_weights_that_set_themselves(device, alpha, beta, calls):
    layer = torch.nn.Conv2d(4, 1, 1).to(device)

    def trained():
        criterion, weights = criteria(alpha, beta), []
        for step in range(2):
            _, target, features = (tensor.to(device) for tensor in small(seed=step, dtype=torch.float32))
            features = features.detach().requires_grad_()
            terms = criterion.terms(layer(features), target, features)
            terms.total.backward()
            weights += [terms.alpha, terms.beta, features.grad.norm()]
        return torch.stack(weights)

    wanted = trained()
    with kernels_on(device) as works:
        got = trained()
    assert [has_logits for _, has_logits in works] == [False] * 2 * calls
    assert got[-2] > 0 or got[-3] > 0
    torch.testing.assert_close(got, wanted)


NORMS = st.sampled_from([0.0, 1.0, 0.3, 1e-5, 1e-20, 1e30, float("inf"), float("nan")])
WEIGHTS = st.one_of(st.floats(0, 3), st.builds(Pull, st.floats(0, 3), warm_up=st.integers(0, 4)))


@devices
@not_finite
@given(
    st.tuples(WEIGHTS, WEIGHTS),
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.booleans(), NORMS, NORMS, NORMS, NORMS), min_size=1, max_size=5
    ),
)
def test_one_kernel_advances_the_weights(device, weights, steps):
    pulls = [weight if isinstance(weight, Pull) else None for weight in weights]
    plain = pull.new_state()
    other = {name: record.to(device) for name, record in pull.new_state().items()}
    with kernels_on(device):
        for backward, at_layer, by_hand, supervised, density, edge, scale in steps:
            for state in (plain, other):
                state["terms"] += torch.tensor([backward, 0, 0, 0], device=device if state is other else "cpu")
                state["terms"][1:] = torch.tensor([scale, density, edge])
                state["layer"][0] += at_layer
                state["hand"][0] += by_hand
                state["layer"][1] = state["hand"][1] = supervised
            features = torch.ones(1, 2, 8, 8)
            wanted = pull.advanced_weights(plain, pulls, features, (0.05, 10.0), None, False)
            got = pull.advanced_weights(other, pulls, features.to(device), (0.05, 10.0), None, True)
            torch.testing.assert_close(got.cpu(), wanted)
            torch.testing.assert_close(other["means"].cpu(), plain["means"])


@devices
def test_what_wants_no_gradient_gets_none(device):
    logits, target, features = (tensor.detach().to(device) for tensor in small())
    with kernels_on(device):
        assert not criteria()(logits, target, features).requires_grad
        with pytest.warns(UserWarning, match="the supervised loss has no gradient"):
            criteria()(logits, target, features.requires_grad_()).backward()
    assert logits.grad is None
    assert features.grad.any()


@devices
def test_a_part_has_a_gradient_of_its_own(device):
    logits, target, features = (tensor.detach().to(device).requires_grad_(n != 1) for n, tensor in enumerate(small()))
    with kernels_on(device):
        terms = criteria().terms(logits, target, features)
        by_edge = torch.autograd.grad(terms.edge, (logits, features), retain_graph=True)
        by_supervised = torch.autograd.grad(terms.supervised, (logits, features))
    assert [bool(gradient.any()) for gradient in (*by_edge, *by_supervised)] == [False, True, True, False]


@devices
def test_a_radius_may_be_larger_than_the_image(device):
    logits, target, features = small(size=6)
    assert_the_same(device, criteria(edge={"inner_radius": 10**6, "outer_radius": 10**9}), logits, target, features)


@devices
def test_the_target_may_change_before_the_backward_pass(device):
    _, target, features = (tensor.detach().to(device).requires_grad_(n == 2) for n, tensor in enumerate(small()))
    with kernels_on(device):
        loss = criteria().edge(features, target)
        target.zero_()
        loss.backward()
    assert features.grad.any()


@devices
def test_the_total_may_be_changed_in_place(device):
    logits, target, features = (tensor.detach().to(device).requires_grad_(n != 1) for n, tensor in enumerate(small()))
    with kernels_on(device):
        loss = criteria()(logits, target, features)
        loss += 1
        loss.backward()
    assert features.grad.any()


@devices
def test_there_is_no_second_derivative(device):
    logits, target, features = (tensor.detach().to(device).requires_grad_(n != 1) for n, tensor in enumerate(small()))
    with kernels_on(device):
        loss = criteria()(logits, target, features)
        (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.sum().backward()


@devices
def test_the_target_is_checked_in_the_first_call(device):
    logits, target, features = (tensor.detach().to(device) for tensor in small())
    with kernels_on(device), pytest.raises(ValueError, match="target"):
        criteria()(logits, 3 * target, features)


@pytest.fixture
def work_of_two(monkeypatch):
    """The calls of two terms that gather, in a group of two; able: whether the other process has kernels."""

    def calls(*, able=True, offsets=None):
        # Lengths of the density term and of the edge term, of the work with the first, then of that with the second.
        monkeypatch.setattr(_terms, "lengths_of_ranks", lambda own, *_, **__: [own, [able, 12, 0, 0, 6]])
        monkeypatch.setattr(_terms, "rank_and_count", lambda: (0, 2))
        monkeypatch.setattr(fused, "switched_on", lambda _: True)
        monkeypatch.setattr(fused, "kernels", lambda *_: "kernels")
        if offsets is not None:
            monkeypatch.setattr(fused, "OFFSETS", offsets)
        density = PatchDensityContrastLoss(4, gather_distributed=True)
        edge = PatchEdgeContrastLoss(8, gather_distributed=True)
        features, target = torch.empty(1, 5, 8, 8), torch.empty(1, 3, 16, 16)
        return _terms._calls([density, edge], [features] * 2, target, [(4, 4), (8, 8)])

    return calls


def test_each_call_knows_the_lengths_of_all_processes(work_of_two):
    density, edge = work_of_two()
    assert density.work.ranks == ((16, 0), (12, 0))
    assert edge.work.ranks == ((0, 8), (0, 6))


def test_a_process_without_kernels_keeps_all_from_using_them(work_of_two):
    assert work_of_two(able=False) is None


def test_embeddings_of_all_processes_need_offsets_of_32_bits(work_of_two):
    largest = (16 + 8 + 12 + 6) * 3 * 5  # embeddings, classes, channels
    assert work_of_two(offsets=largest) is None
    assert work_of_two(offsets=largest + 1) is not None


@pytest.fixture
def features_on_cuda(monkeypatch):
    """Features that say they are on CUDA."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return torch.empty(1, 4, 8, 8)


@pytest.fixture
def the_switch(monkeypatch):
    """The package's kernels are switched on."""
    monkeypatch.setattr(fused, "KERNELS", True)


def test_kernels_are_off_by_default(features_on_cuda):
    assert not fused.switched_on(features_on_cuda)


def test_a_switch_turns_kernels_on(features_on_cuda, the_switch):
    assert fused.switched_on(features_on_cuda)


def test_kernels_run_on_cuda_alone(the_switch):
    assert not fused.switched_on(torch.empty(1, 4, 8, 8))


def test_kernels_leave_tensor_subclasses_to_the_plain_way(features_on_cuda, the_switch):
    assert not fused.switched_on(torch.nn.Parameter(features_on_cuda))


def test_kernels_leave_compiled_code_to_the_plain_way(features_on_cuda, the_switch, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused.switched_on(features_on_cuda)


@pytest.mark.parametrize("there", [False, True])
def test_kernels_run_where_triton_does(there, features_on_cuda, the_switch, monkeypatch):
    monkeypatch.setattr(fused, "has_triton", lambda _: there)
    assert fused.runs(features_on_cuda) == there


@pytest.fixture
def serves(monkeypatch):
    """Whether there are kernels for features of a shape, with the bytes of memory that a block of threads may share."""

    def served(*shape, target=(1, 1, 8, 8), sides=(4, 4), dtype=torch.float32, shared=2**16, triton=True):
        monkeypatch.setattr(fused, "has_triton", lambda _: triton)
        gpu = SimpleNamespace(shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        features, target = (torch.empty(size, device="meta", dtype=dtype) for size in (shape, target))
        return kernels_or_none(features, target, sides) is not None

    return served


def test_kernels_want_triton(serves):
    assert serves(1, 4, 8, 8)
    assert not serves(1, 4, 8, 8, triton=False)


def test_kernels_want_tiles_that_fit(serves):
    assert not serves(1, 400, 8, 8)
    assert serves(1, 400, 8, 8, shared=2**18)


def test_kernels_want_1024_channels_at_most(serves):
    assert serves(1, 1024, 8, 8, shared=2**30)
    assert not serves(1, 1025, 8, 8, shared=2**30)


# (features, target, sides, largest offset): of sums, features, pixels, rows and columns.
OFFSETS = [
    ((3, 4, 2, 2), (3, 2, 9, 8), (4, 3), 3 * 2 * (3 * 3 * 3) * 4),
    ((1, 4, 32, 32), (1, 1, 8, 8), (8, 8), 4 * 32 * 32 - 1),
    ((1, 2, 1, 1), (1, 1, 64, 63), (64, 63), 64 * 63),
    ((1, 2, 50, 1), (1, 1, 64, 1), (64, 1), 64 * 50),
    ((1, 2, 1, 50), (1, 1, 1, 64), (1, 64), 64 * 50),
]


@pytest.mark.parametrize(("shape", "target", "sides", "largest"), OFFSETS)
def test_kernels_want_offsets_that_fit(shape, target, sides, largest, serves, monkeypatch):
    monkeypatch.setattr(fused, "OFFSETS", largest + 1)
    assert serves(*shape, target=target, sides=sides)
    monkeypatch.setattr(fused, "OFFSETS", largest)
    assert not serves(*shape, target=target, sides=sides)


@pytest.mark.parametrize(
    ("dtype", "fits"), [(torch.bfloat16, True), (torch.float32, True), (torch.float64, False)], ids=str
)
def test_kernels_compute_in_32_bits_at_least(dtype, fits, serves):
    shared = importlib.import_module("contrastive_exudate_loss.fused_triton").shared_memory(400, 4)
    assert serves(1, 400, 8, 8, dtype=dtype, shared=shared) == fits
    assert not serves(1, 400, 8, 8, dtype=dtype, shared=shared - 1)


@pytest.mark.parametrize(
    ("density", "per_image", "wanted"),
    [(True, False, (18, 36)), (False, True, (0, 4)), (True, None, (18, 0))],
    ids=["both", "edge, of images", "density"],
)
def test_a_class_has_an_embedding_of_each_patch_or_image_and_two_of_its_bands(density, per_image, wanted):
    edge = None if per_image is None else fused.Edge((1, 1), (1, 1), False, False, 1.0, 1.0, per_image=per_image)
    work = fused.Work((4, 3), None, False, fused.Density(0.5, 1.0) if density else None, edge)
    assert work.lengths(torch.empty(2, 5, 9, 8)) == wanted  # 3 x 3 patches in each of 2 images


def test_patches_that_fill_the_image_leave_no_rest():
    assert fused.patch_count(torch.empty(2, 5, 8, 9), (4, 3)) == 2 * 2 * 3


def test_kernels_want_offsets_of_32_bits(serves):
    assert serves(1, 4, 2**15, 2**14)
    assert not serves(1, 4, 2**15, 2**14 + 1)
    assert not serves(1, 4, 2**16, 1, target=(1, 1, 2**15, 1))
    assert not serves(1, 4, 8, 8, target=(2**14, 2**14, 4, 8), sides=(2, 4))
