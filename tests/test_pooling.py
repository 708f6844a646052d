"""Laws of masked average pooling at any feature resolution."""

from types import SimpleNamespace

import pytest
import reference
import torch
from calls import Calls
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import features_for, masks

from contrastive_exudate_loss import pooling
from contrastive_exudate_loss.pooling import masked_sums

# Not the rule on dynamic shapes: sizes of masks are fixed while a model trains.
RULES = ("test_schema", "test_faketensor")
OTHER_DEVICES = {"by product": pooling._product, "by fusion": pooling._fused}


@pytest.fixture(params=["as chosen", "pixel by pixel", "never pixel by pixel", *OTHER_DEVICES])
def way(request, monkeypatch):
    """Every way of summing that the masks may choose on the CPU, and those of other devices, eager and compiled."""
    if request.param in OTHER_DEVICES:
        pool = OTHER_DEVICES[request.param]
        other = SimpleNamespace(apply=lambda *inputs: pooling._sums_by_shape(*inputs, pool))
        monkeypatch.setattr(pooling, "_SumsByContent", other)
    elif request.param != "as chosen":
        monkeypatch.setattr(pooling, "SCATTERED", 1 if request.param == "pixel by pixel" else -1)
        monkeypatch.setattr(pooling, "COPIED", 100)
        monkeypatch.setattr(pooling, "READ", 100)


@st.composite
def cases(draw, side=(1, 20)):
    mask = draw(masks(side=side))
    if draw(st.booleans()):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    sides = tuple(min(draw(st.integers(1, 9)), size) for size in mask.shape[-2:])
    return draw(features_for(len(mask))), mask.bool(), sides


def upsampled(features, size):
    """The definition, materialised: each pixel's own feature vector."""
    rows, columns = (torch.tensor(reference.cells(n, c)) for n, c in zip(size, features.shape[-2:], strict=True))
    return features[:, :, rows[:, None], columns]


def blank(batch, channels, cells, masks, pixels):
    """Features and full masks of these shapes, both axes alike."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, channels, cells, cells, generator=generator, dtype=torch.float64)
    return features, torch.ones(batch, masks, pixels, pixels, dtype=torch.bool)


@pytest.mark.usefixtures("way")
@given(cases())
@example((*blank(1, 2, 4, 1, 16), (5, 5)))  # stride 4, cells astride patches
@example((*blank(1, 2, 2, 1, 16), (4, 4)))  # stride 8, several patches in a cell
@example((*blank(1, 2, 7, 1, 20), (5, 5)))  # a stride that divides nothing
@example((*blank(1, 2, 23, 1, 20), (6, 6)))  # features larger than the target
@example((*blank(1, 2, 20, 1, 20), (6, 6)))  # partial patches
@example((*blank(1, 2, 10, 2, 20), (6, 8)))  # partial patches at stride 2
def test_masked_sums_equal_loops(case):
    features, mask, sides = case
    features.requires_grad_()
    sums, counts = masked_sums(features, mask, sides)
    expected = torch.zeros_like(sums)
    full = upsampled(features, mask.shape[-2:])
    for y, rows in enumerate(reference.ranges(mask.shape[2], sides[0], None)):
        for x, columns in enumerate(reference.ranges(mask.shape[3], sides[1], None)):
            at = (..., slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            expected[:, :, y, x] = torch.einsum("bcij,btij->btc", full[at], mask[at].double())
            assert torch.equal(counts[:, :, y, x], mask[at].double().sum((2, 3)))
    torch.testing.assert_close(sums, expected)
    weights = torch.randn(sums.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got, wanted = (torch.autograd.grad((value * weights).sum(), features)[0] for value in (sums, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_integer_strides_equal_torch_nearest_upsampling(stride):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 24 // stride, 32 // stride, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 2, 24, 32, generator=generator) < 0.3
    full = torch.nn.functional.interpolate(features, size=(24, 32), mode="nearest")
    for a, b in zip(masked_sums(features, mask, (8, 8)), masked_sums(full, mask, (8, 8)), strict=True):
        torch.testing.assert_close(a, b)


@given(cases())
def test_pooling_ignores_pixels_outside_the_mask(case):
    features, mask, sides = case
    features = upsampled(features, mask.shape[-2:]).contiguous()
    changed = torch.where(mask.any(1, keepdim=True), features, 1e6)
    torch.testing.assert_close(masked_sums(changed, mask, sides)[0], masked_sums(features, mask, sides)[0])


@given(cases(), st.randoms(use_true_random=False))
def test_pooling_commutes_with_permuting_the_batch(case, random):
    features, mask, sides = case
    order = list(range(len(mask)))
    random.shuffle(order)
    for a, b in zip(masked_sums(features[order], mask[order], sides), masked_sums(features, mask, sides), strict=True):
        torch.testing.assert_close(a, b[order])


@given(cases())
def test_a_full_mask_gives_the_mean_and_an_empty_one_nothing(case):
    features, mask, sides = case
    full = torch.cat([torch.ones_like(mask[:, :1]), torch.zeros_like(mask[:, :1])], 1)
    constant = torch.ones_like(features) * features[:1, :, :1, :1]
    sums, counts = masked_sums(constant, full, sides)
    means = sums / counts.clamp(min=1).unsqueeze(-1)
    torch.testing.assert_close(means[:, 0], constant[:, None, None, :, 0, 0].expand_as(means[:, 0]))
    assert (means[:, 1] == 0).all()
    assert (counts[:, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    # 4,096 ones: beyond 2,048 (float16) or 256 (bfloat16) adding 1 changes nothing.
    features = torch.ones(1, 2, 64, 64, dtype=dtype)
    sums, _ = masked_sums(features, torch.ones(1, 1, 64, 64, dtype=torch.bool), (64, 64))
    assert sums.dtype == torch.float32
    assert (sums == 4096).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cells", [16, 4, 7])  # of those fewer than pixels each gets the gradients of several patches
def test_half_precision_gradients_are_rounded_once(dtype, cells):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 1, 16, 16, generator=generator) < 0.5
    gradients = []
    for precision in (dtype, torch.float32):
        features = torch.zeros(1, 2, cells, cells, dtype=precision, requires_grad=True)
        sums, _ = masked_sums(features, mask, (5, 5))
        weights = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1))
        gradients += torch.autograd.grad((sums * weights).sum(), features)
    assert torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize("cells", [64, 16, 20])
def test_backward_keeps_no_tensor_of_the_features_size(cells):
    kept = []
    features = torch.randn(2, 32, cells, cells, requires_grad=True)
    mask = torch.ones(2, 3, 64, 64, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sums, _ = masked_sums(features, mask, (16, 16))
    assert sums.requires_grad
    assert all(tensor.numel() < features.numel() for tensor in kept)


def test_inputs_stay_as_they_are():
    features, mask = blank(2, 3, 5, 2, 12)
    before = features.clone(), mask.clone()
    masked_sums(features, mask, (4, 4))
    assert torch.equal(features, before[0])
    assert torch.equal(mask, before[1])


@pytest.mark.parametrize("side", [41, 47, 55, 61, 82, 109])
def test_a_full_mask_sends_each_pixel_the_gradient_of_its_own_patch(side):
    # Torch's "nearest" upsampling by these factors errs by a pixel in float32.
    features = torch.zeros(1, 2, 3 * side, 2 * side, requires_grad=True)
    sums, _ = masked_sums(features, torch.ones(1, 1, 3 * side, 2 * side, dtype=torch.bool), (side, side))
    weights = torch.arange(12.0).reshape(sums.shape)
    (gradient,) = torch.autograd.grad((sums * weights).sum(), features)
    wanted = weights[:, 0].movedim(-1, 1).repeat_interleave(side, 2).repeat_interleave(side, 3)
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 24), (1, 7, 12), (3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("layout", ["plain", "turned", "expanded"])
def test_pixels_are_those_that_are_not_0(shape, dtype, share, layout):
    noise = torch.rand(shape[0], 2, *shape[1:], generator=torch.Generator().manual_seed(0)) < share
    weights = noise.to(dtype)[:, 1]
    if layout == "turned":  # neighbours in a row lie apart
        weights = weights.mT.contiguous().mT
    elif layout == "expanded":  # or are one
        weights = weights[..., :1].expand(shape)
    found = [torch.stack(indices, 1) for indices in pooling._pixels(weights, pooling.COPIED // 20)]
    assert sorted(torch.cat(found).tolist()) == weights.nonzero().tolist()
    assert all(len(chunk) == 5 for chunk in found[:-1])
    assert len(found[-1]) <= 5


@pytest.mark.parametrize(
    ("weights", "sizes"),
    [
        (torch.ones(2, 3, 16, dtype=torch.bool), [12, 96]),
        (torch.ones(2, 3, 9, dtype=torch.bool), [54]),
        (torch.ones(2, 16, 3, dtype=torch.bool).mT, [96]),
        (torch.ones(2, 3, 16), [96]),
    ],
)
def test_pixels_of_bool_rows_are_looked_at_eight_at_a_time(weights, sizes):
    with Calls() as calls:
        list(pooling._pixels(weights, 1))
    assert calls.sizes["nonzero"] == sizes


@pytest.mark.parametrize(
    ("values", "way"),
    [
        ([0.0] * 64, "scattered"),
        ([1.0] * 8 + [0.0] * 56, "scattered"),  # an eighth
        ([1.0] * 9 + [0.0] * 55, "other"),
        ([1.0] * 63 + [0.0], "other"),
        ([1.0] * 64, "constant"),
        ([3.0] * 64, "constant"),
        ([3.0] * 63 + [2.0], "other"),
        ([2.0] + [3.0] * 63, "other"),
    ],
)
def test_few_pixels_are_summed_one_by_one_and_constant_weights_all_at_once(values, way):
    weights = torch.tensor(values).reshape(1, 1, 4, 16)
    padded = torch.nn.functional.pad(weights, (0, 3, 0, 2), value=5.0)  # of slots that are no cells
    for dtype in (torch.float32, torch.bool) if max(values) <= 1 else (torch.float32,):
        found = pooling._by_content(padded.to(dtype), (4, 16))._asdict()
        assert found == {"scattered": [], "constant": [], "other": []} | {way: [0]}


@pytest.mark.parametrize("limit", [1, 40, 95, 96, 200, 10**6])
def test_chunks_hold_as_many_rows_of_patches_as_fit_and_one_at_least(limit):
    features, slots, grid_rows = torch.zeros(2, 3, 18, 4), (4, 2), 5
    chunks = pooling._row_chunks(features, slots, grid_rows, limit)
    assert [y for _, patches in chunks for y in range(patches.start, patches.stop)] == list(range(grid_rows))
    fitting = max(1, sum(n * 2 * 3 * 4 * 4 <= limit for n in range(1, grid_rows + 1)))
    assert all(patches.stop - patches.start == fitting for _, patches in chunks[:-1])
    for rows, patches in chunks:
        assert (rows.start, rows.stop) == (4 * patches.start, 4 * patches.stop)
        assert 0 < patches.stop - patches.start <= fitting


@given(cases())
def test_custom_operators_keep_the_rules_of_torch_library(case):
    features, mask, sides = case
    sums_of, gradient_of = pooling._OPERATORS.values()
    torch.library.opcheck(sums_of, case, test_utils=RULES)
    sums, _, weights = sums_of(*case)
    sizes = mask.shape[2:], features.shape[2:], sides, features.dtype
    torch.library.opcheck(gradient_of, (sums, weights, *sizes), test_utils=RULES)


def test_double_backward_is_refused():
    features, mask = blank(1, 2, 4, 1, 8)
    sums, _ = masked_sums(features.requires_grad_(), mask, (4, 4))
    weights = torch.ones_like(sums, requires_grad=True)
    (gradient,) = torch.autograd.grad((sums * weights).sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()
