"""Laws of the contrast; pytorch-metric-learning and float64 loops are the oracles."""

import math
from unittest import mock

import pytest
import reference
import torch
from calls import Calls
from hypothesis import example, given
from hypothesis import strategies as st
from interpreted import interpreted
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from strategies import CONTRASTS

from contrastive_exudate_loss import contrast as module
from contrastive_exudate_loss import contrast_pairs, contrast_rows
from contrastive_exudate_loss.contrast import contrast_loss, directions, first_of_each_label

CHOOSING = module._loss_and_gradient  # before any test puts another in its place


def by_rows(z, *arguments, fill=contrast_rows.filled_by_mask):
    return contrast_rows.loss_by_rows(z, *arguments, range(len(z)), fill)


def in_parts(z, label_1, label_0, *arguments):
    """As processes contrast that share out the anchors."""
    results = [CHOOSING(z, label_1, label_1 | label_0, *arguments, part, 3) for part in range(3)]
    return tuple(sum(tensors) for tensors in zip(*results, strict=True))


def by_kernel(*arguments):
    kernel = interpreted("contrast_triton")
    with mock.patch.object(kernel, "BLOCK", 8):  # so that a row of a small batch is several blocks
        return by_rows(*arguments, fill=kernel.filled_by_triton)


WAYS = {
    "of few": contrast_rows.loss_of_few,
    "by pairs": contrast_pairs.loss_by_pairs,
    "by rows": by_rows,
    "in parts": in_parts,
    "by kernel": by_kernel,
}
LIBRARY = {"nt_xent": NTXentLoss, "sup_con": SupConLoss}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Contrast by each of its ways, in tiles of a few rows; the loss is compared through its public door."""
    chosen = WAYS[request.param]

    def forced(z, labels, present, temperature, contrast, with_gradient, part, parts):
        assert (part, parts) == (0, 1)
        return chosen(z, labels & present, ~labels & present, temperature, contrast, with_gradient)

    monkeypatch.setattr(module, "_loss_and_gradient", forced)
    monkeypatch.setattr(contrast_pairs, "TILE", 20)
    monkeypatch.setattr(contrast_rows, "TILE", 160)


@st.composite
def batches(draw, size=(1, 14), scale=(1e-3, 1.0, 1e3)):
    """Embeddings (M, C), labels and presence, whole labels missing now and then."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    m, c = draw(st.integers(*size)), draw(st.integers(2, 5))
    e = torch.randn(m, c, generator=generator, dtype=torch.float64) * draw(st.sampled_from(scale))
    labels = torch.rand(m, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    present = torch.rand(m, generator=generator) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    return e, labels, present


def value_and_gradient(loss, e):
    e = e.detach().clone().requires_grad_()
    value = loss(e)
    return value.detach(), torch.autograd.grad(value, e)[0]


def loops(e, labels, present, temperature, contrast):
    vectors = [vector for vector, here in zip(e, present, strict=True) if here]
    return reference.contrast(vectors, labels[present].tolist(), temperature, contrast) + 0 * e.sum()


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.usefixtures("way")
@given(batch=batches(), temperature=st.sampled_from([0.001, 0.01, 0.05, 1.0, 10.0]))
@example((torch.eye(3, dtype=torch.float64), torch.tensor([True, False, False]), torch.ones(3) > 0), 0.05)
@example((torch.ones(6, 2, dtype=torch.float64), torch.arange(6) < 3, torch.ones(6) > 0), 0.001)
@example((torch.eye(14, dtype=torch.float64) + 0.1, torch.arange(14) < 12, torch.ones(14) > 0), 1.0)  # several tiles
@example((torch.eye(14, dtype=torch.float64) + 0.1, torch.arange(14) < 2, torch.ones(14) > 0), 1.0)
@example((torch.eye(27, dtype=torch.float64) + 0.1, torch.arange(27) < 15, torch.ones(27) > 0), 1.0)  # in parts too
def test_contrast_equals_float64_loops(contrast, batch, temperature):
    e, labels, present = batch
    got = value_and_gradient(lambda e: contrast_loss(e, labels, present, temperature=temperature, contrast=contrast), e)
    wanted = value_and_gradient(lambda e: loops(e, labels, present, temperature, contrast), e)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, float(b.abs().max())))


def pair_losses(e, labels, temperature):
    """The smallest and largest loss of a positive pair (nt_xent) or of a pair in sup_con's mean."""
    z = e / e.norm(dim=1, keepdim=True)
    s = z @ z.T / temperature
    same = labels[:, None] == labels
    off = ~torch.eye(len(e), dtype=torch.bool)
    lse = s.masked_fill(same, -math.inf).logsumexp(1, keepdim=True)
    nt_xent = torch.logaddexp(torch.zeros_like(s), lse - s)[same & off]
    everyone = s.masked_fill(~off, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([nt_xent, (everyone - s)[same & off]])


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.usefixtures("way")
def test_contrast_equals_pytorch_metric_learning(contrast, seed):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    labels = torch.rand(12, generator=generator) < 0.4
    temperature = (0.1, 0.5, 2.0)[seed % 3]
    bounds = pair_losses(e, labels, temperature)
    assert 1e-6 < bounds.min() < bounds.max() < 80  # where the two definitions are the same number
    library = LIBRARY[contrast](temperature=temperature)
    wanted = value_and_gradient(lambda e: library(e, labels.long()), e)
    present = torch.ones_like(labels)
    got = value_and_gradient(lambda e: contrast_loss(e, labels, present, temperature=temperature, contrast=contrast), e)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("contrast", CONTRASTS)
@given(batch=batches(size=(2, 40)))
def test_float32_is_close_to_float64(contrast, batch):
    e, labels, present = batch

    def loss(e):
        return contrast_loss(e, labels, present, temperature=0.05, contrast=contrast)

    wide, narrow = value_and_gradient(loss, e), value_and_gradient(loss, e.float())
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6 * max(1, float(1 / e.norm(dim=1).min()))


@pytest.mark.parametrize("contrast", CONTRASTS)
@given(batches(), st.floats(1e-30, 1e30))
def test_scaling_embeddings_leaves_the_contrast_alone(contrast, batch, scale):
    e, labels, present = batch
    losses = [contrast_loss(e * factor, labels, present, temperature=0.05, contrast=contrast) for factor in (1, scale)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("contrast", CONTRASTS)
@given(batches(), st.randoms(use_true_random=False))
def test_permuting_embeddings_leaves_the_contrast_alone(contrast, batch, random):
    order = list(range(len(batch[0])))
    random.shuffle(order)
    losses = [
        contrast_loss(*(tensor[chosen] for tensor in batch), temperature=0.05, contrast=contrast)
        for chosen in (slice(None), order)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("contrast", CONTRASTS)
@given(batches())
def test_absent_embeddings_count_for_nothing(contrast, batch):
    e, labels, present = batch
    among = contrast_loss(e, labels, present, temperature=0.05, contrast=contrast)
    e, labels = e[present], labels[present]
    alone = contrast_loss(e, labels, torch.ones_like(labels), temperature=0.05, contrast=contrast) if len(e) else 0.0
    torch.testing.assert_close(among, torch.as_tensor(alone, dtype=torch.float64))


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_separated_embeddings_have_the_smaller_loss(contrast):
    labels = torch.arange(8) < 4
    apart = torch.where(labels[:, None], torch.tensor([1.0, 0.1]), torch.tensor([-1.0, 0.1]))
    mixed = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    apart, mixed = (contrast_loss(e, labels, labels | True, temperature=0.5, contrast=contrast) for e in (apart, mixed))
    assert apart < mixed


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize(
    ("dense", "sparse"), [(0, 0), (0, 1), (1, 0), (0, 4), (4, 0), (1, 1)], ids=lambda number: str(number)
)
@pytest.mark.usefixtures("way")
def test_without_positive_pair_or_negative_the_loss_is_0_in_the_graph(contrast, dense, sparse):
    e = torch.randn(dense + sparse + 1, 3, requires_grad=True)
    labels = torch.arange(len(e)) < dense
    present = torch.arange(len(e)) < dense + sparse
    loss = contrast_loss(e, labels, present, temperature=0.05, contrast=contrast)
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, e)
    assert (gradient == 0).all()


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.usefixtures("way")
def test_a_zero_embedding_stays_in_with_zero_gradient(contrast, scale):
    e = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * scale
    e[2] = 0
    labels = torch.arange(6) < 3
    loss, gradient = value_and_gradient(
        lambda e: contrast_loss(e, labels, labels | True, temperature=0.05, contrast=contrast), e
    )
    unit = e.double() / e.double().norm(dim=1, keepdim=True).clamp(min=1e-300)
    wanted = reference.contrast(list(unit), labels.tolist(), 0.05, contrast)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    assert (gradient[2] == 0).all()
    assert gradient.isfinite().all()
    assert (gradient[[0, 1, 3, 4, 5]] != 0).any(1).all()


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.usefixtures("way")
def test_a_nan_or_infinite_embedding_makes_the_loss_nan(bad, contrast):
    e = torch.ones(4, 2)
    e[1, 0] = bad
    labels = torch.arange(4) < 2
    loss, gradient = value_and_gradient(
        lambda e: contrast_loss(e, labels, labels | True, temperature=0.05, contrast=contrast), e
    )
    assert loss.isnan()
    assert gradient.isnan().any()
    one_of_each = torch.tensor([False, True, True, False])
    assert contrast_loss(e, labels, one_of_each, temperature=0.05, contrast=contrast) == 0


def test_double_backward_is_refused():
    e = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    loss = contrast_loss(e, torch.arange(6) < 3, torch.ones(6) > 0, temperature=0.05)
    (gradient,) = torch.autograd.grad(loss, e, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_custom_operator_keeps_the_rules_of_torch_library(contrast):
    z, *_ = directions(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    labels, present = torch.arange(9) < 4, torch.arange(9) < 8
    for with_gradient in (True, False):
        for strided in (z, z.T.contiguous().T):
            torch.library.opcheck(module._operator, (strided, labels, present, 0.05, contrast, with_gradient, 0, 1))


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_all_ways_give_a_contiguous_gradient_of_any_input(contrast):
    z, *_ = directions(torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).T)
    label_1 = torch.arange(9) < 4
    for way in WAYS.values():
        assert way(z, label_1, ~label_1, 0.05, contrast, True)[1].is_contiguous()


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_all_ways_give_an_empty_gradient_where_none_is_asked_for(contrast):
    z, *_ = directions(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    label_1 = torch.arange(9) < 4
    for way in WAYS.values():
        loss, gradient = way(z, label_1, ~label_1, 0.05, contrast, False)
        torch.testing.assert_close(loss, way(z, label_1, ~label_1, 0.05, contrast, True)[0])
        assert gradient.shape == (0,)


@pytest.mark.parametrize(
    ("parts", "total", "taken"),
    [(1, 192, "loss_of_few"), (1, 193, "loss_by_pairs"), (2, 6, "loss_by_rows"), (2, 193, "loss_by_rows")],
)
def test_on_the_cpu_the_whole_is_contrasted_by_labels(parts, total, taken, monkeypatch):
    calls = []
    for name in ("loss_of_few", "loss_by_pairs", "loss_by_rows"):
        way = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *inputs, name=name, way=way: calls.append(name) or way(*inputs))
    labels = torch.arange(total) < 3
    contrast_loss(torch.ones(total, 2), labels, labels | True, temperature=0.05, parts=parts)
    assert calls == [taken]


def test_where_triton_cannot_run_a_warning_says_why_and_other_operators_do_it(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no C compiler")

    rows = pytest.importorskip("contrastive_exudate_loss.contrast_triton")
    monkeypatch.setattr(rows, "filled_by_triton", refuse)
    with pytest.warns(UserWarning, match="on cpu, so .* fall back to slower code: RuntimeError: no C comp"):
        fill = module._filled_on_cuda.__wrapped__(torch.device("cpu"))
    assert fill is contrast_rows.filled_by_mask


def test_an_exhausted_memory_is_no_verdict_on_triton(monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError

    rows = pytest.importorskip("contrastive_exudate_loss.contrast_triton")
    monkeypatch.setattr(rows, "filled_by_triton", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        module._filled_on_cuda.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("total", [1, 2, 7, 50, 200])
def test_a_tile_holds_as_many_whole_rows_as_fit_and_one_at_least(total, monkeypatch):
    monkeypatch.setattr(contrast_rows, "TILE", 104)
    shapes = []
    monkeypatch.setitem(
        contrast_rows._ROWS, "nt_xent", lambda pos, neg: shapes.append(pos.shape) or pos.new_zeros(len(pos))
    )
    labels = torch.arange(total) % 2 > 0
    by_rows(torch.zeros(total, 2), labels, ~labels, 1.0, "nt_xent", False)
    assert sum(rows for rows, _ in shapes) == total
    rows = max(rows for rows, _ in shapes)
    assert rows == max(1, sum(n * total <= 104 for n in range(1, total + 1)))


@pytest.mark.parametrize("total", [2, 3, 6, 30])
def test_tiles_of_pairs_hold_every_pair_once_and_no_more_than_a_tile(total, monkeypatch):
    monkeypatch.setattr(contrast_pairs, "TILE", 13)
    vectors = torch.randn(total, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.full((total, total), math.nan, dtype=torch.float64)
    buffer = vectors.new_empty(max(13, total))
    for row, column, tile in contrast_pairs._pairs(vectors, 0.5, buffer, fill=math.inf):
        left = total - row.start
        assert len(tile) == min(left, max(1, 13 // left))
        filled = tile == math.inf
        seen[row, column][~filled] = seen[row, column][~filled].nan_to_num(0) + tile[~filled]
    upper = torch.ones_like(seen, dtype=torch.bool).triu(1)
    torch.testing.assert_close(seen[upper], (vectors @ vectors.T / 0.5)[upper])
    assert seen[~upper].isnan().all()


@given(batches(), st.integers(1, 5))
def test_first_of_each_label_equals_sorting(batch, limit):
    _, labels, present = batch
    rank = torch.arange(len(labels)) % 3  # many ties
    index, kept = first_of_each_label(rank, labels, present, limit)
    wanted = []
    for label in (True, False):
        members = [i for i in range(len(labels)) if present[i] and labels[i] == label]
        wanted += sorted(members, key=lambda i: int(rank[i]))[:limit]
    assert index[kept].tolist() == wanted
    assert len(index) == 2 * min(len(labels), limit)


@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([-30.0, -12.0, -5.0, 0.0, 5.0]))
@example(41, 0, 0.0)  # 64 values at once and 59 alone
def test_sum_of_softplus_equals_its_terms_to_float32_rounding(width, seed, level):
    x = level + torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = -math.inf  # no pair
    wanted = torch.nn.functional.softplus(x.double(), threshold=1000).sum(), x.double().sigmoid()
    got = contrast_pairs._softplus_to_sigmoid_(x, torch.empty_like(x))
    torch.testing.assert_close(got.double(), wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(x.double(), wanted[1], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("loss", "again"), [(0.05, []), (0.01, [70, 3])])
def test_one_logarithm_is_taken_for_64_values_and_another_where_digits_were_lost(loss, again):
    x = torch.full((1, 70 * 64 + 3), math.log(math.expm1(loss)))
    with Calls() as calls:
        contrast_pairs._softplus_to_sigmoid_(x, torch.empty_like(x))
    assert calls.sizes["log"][:2] == [70, 3]
    assert calls.sizes["log1p"] == again


@pytest.mark.parametrize("angle", [0.3, 0.6, 1.0, 1.5])
@pytest.mark.usefixtures("way")
def test_a_small_loss_is_as_exact_as_a_large_one(angle):
    noise = 0.02 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(20) < 7
    e = noise + torch.where(labels[:, None], 1.0, 0.0) * torch.tensor([math.cos(angle), math.sin(angle), 0, 0, 0, 0])
    e = (e + torch.where(labels[:, None], 0.0, 1.0) * torch.tensor([1.0, 0, 0, 0, 0, 0])).float()
    narrow, wide = (contrast_loss(t, labels, labels | True, temperature=0.05) for t in (e, e.double()))
    assert abs(narrow - wide) <= 2e-5 * wide
