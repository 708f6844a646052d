"""Laws of Pull; the oracle differentiates each part by itself and keeps its means in Python floats."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.checkpoint import checkpoint

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    FeatureTap,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    Pull,
)
from contrastive_exudate_loss import _weights as module_of_weights
from contrastive_exudate_loss import pull as module

MEMORY = 0.99


class Net(nn.Module):
    """A body and a head of one layer."""

    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 1, 1) if head is None else head

    def forward(self, images):
        return self.head(self.body(images))


def batch(step):
    """Images of a blot each, and its mask; every fourth batch, from the third on, shows none."""
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(step))
    target = torch.zeros(2, 1, 48, 48)
    if step % 4 != 2:
        target[:, :, 12:22, 14 + step % 5 : 30] = 1
        images += 0.3 * target
    return images, target


def mean(values):
    """The bias-corrected exponential mean."""
    weights = [MEMORY ** (len(values) - 1 - n) for n in range(len(values))]
    return math.fsum(w * value for w, value in zip(weights, values, strict=True)) / math.fsum(weights)


class Oracle:
    """The weights of density and edge from the norms of earlier steps."""

    def __init__(self, alpha, beta):
        self.weights = (alpha, beta)
        self.supervised, self.terms, self.step = [], ([], []), 0

    def used(self):
        self.step += 1
        found = []
        for weight, norms in zip(self.weights, self.terms, strict=True):
            if not isinstance(weight, Pull):
                found.append(weight)
            elif norms and self.supervised:
                rise = min(1, self.step / weight.warm_up) if weight.warm_up else 1
                found.append(weight.times * rise * mean(self.supervised) / mean(norms))
            else:
                found.append(0.0)
        return found

    def see(self, supervised, terms, features):
        norms = [
            float(torch.autograd.grad(loss, features, retain_graph=True)[0].norm()) for loss in (supervised, *terms)
        ]
        for known, norm in zip((self.supervised, *self.terms), norms, strict=True):
            if known is self.supervised or norm > 0:
                known.append(min(norm, 10 * mean(known)) if known else norm)


def wanted_weights(steps, alpha, beta, supervised=binary_cross_entropy_with_logits, net=None):
    net = Net() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    oracle, found = Oracle(alpha, beta), []
    for step in range(steps):
        images, target = batch(step)
        features = net.body(images)
        loss = supervised(net.head(features), target)
        terms = PatchDensityContrastLoss(4)(features, target), PatchEdgeContrastLoss()(features, target)
        weights = oracle.used()
        oracle.see(loss, terms, features)
        optimizer.zero_grad()
        (loss + sum(w * term for w, term in zip(weights, terms, strict=True))).backward()
        optimizer.step()
        found.append(weights)
    return torch.tensor(found), net


def criterion_of(alpha, beta, **options):
    return CombinedExudateLoss(alpha, beta, density=PatchDensityContrastLoss(4), **options)


def trained_weights(criterion, net, steps, call=None, first=0, backward=lambda loss: loss.backward()):
    """The weights of each step, and the network as it is trained by them."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    found = []
    for step in range(first, steps):
        images, target = batch(step)
        terms = criterion.terms(net(images), target) if call is None else call(images, target)
        optimizer.zero_grad()
        backward(terms.total)
        optimizer.step()
        weighted = terms.alpha * terms.density + terms.beta * terms.edge
        torch.testing.assert_close(terms.total, terms.supervised + weighted)
        found.append(torch.stack([terms.alpha, terms.beta]).double())
        assert not terms.alpha.requires_grad
        assert not terms.beta.requires_grad
    return torch.stack(found)


WEIGHTS = {
    "edge": (0.0, Pull(1.0)),
    "density": (Pull(0.5), 0.0),
    "both": (Pull(0.5), Pull(2.0, warm_up=6)),
    "a number beside it": (0.02, Pull(1.0)),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("features", ["tapped", "tapped from the first step", "by hand"])
def test_weights_are_those_of_the_oracle(weights, features):
    net = Net()
    criterion = criterion_of(*weights)
    if features != "by hand":
        criterion.tap = FeatureTap(net, "head" if "first" in features else None)

    def by_hand(images, target):
        given = net.body(images)
        return criterion.terms(net.head(given), target, given)

    got = trained_weights(criterion, net, 11, by_hand if features == "by hand" else None)
    wanted, other = wanted_weights(11, *weights)
    torch.testing.assert_close(got, wanted.double(), rtol=1e-5, atol=0)
    assert not got[0, [isinstance(weight, Pull) for weight in weights]].any()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("part", ["model", "criterion", "both"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_the_weights_are_the_same(part, backend):
    net = Net()
    criterion = criterion_of(0.0, Pull(1.0, warm_up=4), features=FeatureTap(net, "head"))
    torch.compiler.reset()
    calls = {
        "model": (torch.compile(net, backend=backend, fullgraph=True), criterion.terms),
        "criterion": (net, torch.compile(criterion.terms, backend=backend, fullgraph=True)),
    }
    if part == "both":

        def whole(images, target):
            return criterion.terms(net(images), target)

        call = torch.compile(whole, backend=backend, fullgraph=True)
    else:
        model, terms = calls[part]

        def call(images, target):
            return terms(model(images), target)

    first = trained_weights(criterion, net, 1, call)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = torch.cat([first, trained_weights(criterion, net, 9, call, first=1)])
    wanted, _ = wanted_weights(9, 0.0, Pull(1.0, warm_up=4))
    torch.testing.assert_close(got, wanted.double(), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_number_beside_a_pull_may_change_without_compiling_again():
    net = Net()
    criterion = CombinedExudateLoss(0.02, Pull(1.0), features=FeatureTap(net, "head"))
    torch.compiler.reset()
    terms = torch.compile(criterion.terms, backend="aot_eager", fullgraph=True)
    trained_weights(criterion, net, 2, lambda images, target: terms(net(images), target))
    images, target = batch(2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for alpha in (0.03, 5.0):
            criterion.alpha = alpha
            assert terms(net(images), target).alpha == pytest.approx(alpha)
    with torch.no_grad():
        criterion.alpha = 0.7  # since the last training call
        assert criterion.terms(net(images), target).alpha == pytest.approx(0.7)
        criterion.alpha, criterion.beta = Pull(1.0), 0.02
        assert criterion.terms(net(images), target).beta == pytest.approx(0.02)
        criterion.beta = 0.0
        assert criterion.terms(net(images), target).beta == 0


@pytest.mark.parametrize("scale", [0.25, 1000.0])
def test_the_weight_grows_with_the_supervised_loss(scale):
    def scaled(logits, target):
        return scale * binary_cross_entropy_with_logits(logits, target)

    first = [
        trained_weights(CombinedExudateLoss(supervised=loss, features=FeatureTap(net, "head")), net, 2)[1, 1]
        for loss, net in ((scaled, Net()), (None, Net()))
    ]
    # The first step differs by the scale too, so the two are compared before it is taken into account.
    nets = Net(), Net()
    criteria = [
        CombinedExudateLoss(supervised=loss, features=FeatureTap(net, "head"))
        for loss, net in zip((scaled, None), nets, strict=True)
    ]
    images, target = batch(0)
    for criterion, net in zip(criteria, nets, strict=True):
        criterion(net(images), target).backward()
    weights = [criterion.terms(net(images), target).beta for criterion, net in zip(criteria, nets, strict=True)]
    torch.testing.assert_close(weights[0], scale * weights[1])
    assert first[0] > 0


def test_the_state_follows_the_features_where_the_tap_cannot_move_its_record(monkeypatch):
    criterion, net = CombinedExudateLoss(features=FeatureTap(first := Net(), "head")), Net().to("meta")
    trained_weights(criterion, first, 3)
    other = CombinedExudateLoss(features=FeatureTap(net, "head"))
    other.load_state_dict(criterion.state_dict())
    monkeypatch.setattr(FeatureTap, "_can_record", lambda *_: False)  # as in a model compiled from the start
    for step in range(3):
        images, target = (tensor.to("meta") for tensor in batch(step))
        assert other(net(images), target).is_meta


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("change", ["tap", "record"])
def test_a_new_tap_or_record_goes_on_with_the_weights(change, every):
    weights = []
    for replaced in (False, True):
        net = Net()
        criterion = criterion_of(Pull(0.5), Pull(1.0), features=FeatureTap(net, "head"))
        found = []
        for step in range(8):
            if replaced and step % every == 0:
                if change == "tap":
                    criterion.tap = FeatureTap(net, "head")
                else:
                    criterion.tap.norm = criterion.tap.norm.clone()  # as the tap moves its record
            found.append(trained_weights(criterion, net, step + 1, first=step))
        weights.append(torch.cat(found))
    assert weights[0][1:].all()
    assert torch.equal(*weights)


def test_a_tap_of_another_criterion_measures_from_then_on():
    net = Net()
    tap = FeatureTap(net, "head")
    trained_weights(criterion_of(0.0, Pull(1.0), features=tap), net, 3)
    criterion = criterion_of(0.0, Pull(1.0), features=tap)
    got = trained_weights(criterion, net, 6, first=3)
    assert got[0, 1] == 0
    assert (got[1:, 1] > 0).all()


def test_what_a_tap_has_measured_for_another_criterion_does_not_count():
    net = Net()
    taps = [FeatureTap(net, "head") for _ in range(2)]
    criterion = CombinedExudateLoss(features=taps[0])
    images, target = batch(0)

    def step(criterion):
        terms = criterion.terms(net(images), target)
        terms.total.backward()
        return terms.beta

    _, wanted = step(criterion), step(criterion)
    other = CombinedExudateLoss(supervised=lambda logits, _: 1000 * logits.mean(), features=taps[1])
    for _ in range(3):
        step(other)
    criterion.tap = taps[1]
    torch.testing.assert_close(step(criterion), wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_pull_in_place_of_a_number_is_measured_by_the_tap_at_once():
    net = Net()
    criterion = CombinedExudateLoss(0.0, 0.1, features=FeatureTap(net, "head"))
    torch.compiler.reset()
    terms = torch.compile(criterion.terms, backend="aot_eager", fullgraph=True)
    images, target = batch(0)
    terms(net(images), target).total.backward()
    criterion.beta = Pull(1.0)
    weights = []
    for _ in range(2):
        found = terms(net(images), target)
        found.total.backward()
        weights.append(float(found.beta))
    assert weights[0] == 0
    assert weights[1] > 0


def test_a_total_of_ones_own_is_warned_of_once():
    net = Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))
    images, target = batch(0)

    def step():
        terms = criterion.terms(net(images), target)
        (terms.supervised + terms.beta * terms.edge).backward()

    for _ in range(module_of_weights.CALLS_WITHOUT_BACKWARD - 1):
        step()
    text = r"no backward pass came through the criterion's total in 20 training calls"
    with pytest.warns(UserWarning, match=text):
        step()
    criterion(net(images), target)  # or a warning would be an error


@pytest.mark.parametrize("term", [0, 1])
def test_detached_features_get_the_weight_that_the_tap_has_measured(term):
    net = Net()
    weights = [Pull(1.0) if term == n else 0.0 for n in (0, 1)]
    criterion = criterion_of(*weights, features=FeatureTap(net))
    before = trained_weights(criterion, net, 3)[-1, term]
    images, target = batch(3)
    logits, features = net(images), criterion.tap.take()
    alone = criterion.terms(logits.detach().requires_grad_(), target, features.detach().requires_grad_())
    assert alone[4 + term] > 0.5 * before > 0


def record(state, step, density, edge, supervised=3.0, scale=1.0):
    """Write the norms of a step's backward pass, through a total that was scaled, as the criterion does."""
    state["terms"][:] = torch.tensor([step, scale, scale * density, scale * edge])
    state["hand"][:] = torch.tensor([step, supervised])


def advanced(state, pulls, summed=None, features=1.0):
    """The next weights, before features of one value."""
    return module.advanced_weights(state, pulls, torch.full((1, 2, 1, 1), features), (0.05, 0.05), summed, False)


def test_norms_are_averaged_over_the_processes_that_have_them():
    state = module.new_state()
    density, edge, supervised = 3.0, 2.0, 3.0
    record(state, 1, density, edge, supervised, scale=2.0)
    other = torch.tensor([[5.0, 0.0, 6.0], [1.0, 0.0, 1.0]])  # norms of a process whose density has no contrast
    got = advanced(state, (Pull(1.0), Pull(0.5)), lambda own: own + other)
    mean = (supervised + 5) / 2
    torch.testing.assert_close(got, torch.tensor([mean / density, 0.5 * mean / ((edge + 6) / 2)]))


def test_a_step_in_which_no_process_has_a_contrast_leaves_the_mean():
    state, pulls = module.new_state(), (Pull(1.0), Pull(1.0))
    record(state, 1, 3.0, 2.0)
    first = advanced(state, pulls, lambda own: own)
    record(state, 2, 0.0, 2.0)
    assert torch.equal(advanced(state, pulls, lambda own: own), first)
    assert first.all()


def test_a_term_whose_norm_underflows_in_the_mean_weighs_nothing():
    state = module.new_state()
    record(state, 1, 1e-40, 2.0)
    got = advanced(state, (Pull(1.0), Pull(1.0)), features=1e38)
    torch.testing.assert_close(got, torch.tensor([0.0, 1.5]))


def test_a_fixed_weight_is_0_among_those_that_set_themselves():
    state = module.new_state()
    record(state, 1, 3.0, 2.0)
    got = advanced(state, (None, Pull(1.0)))
    torch.testing.assert_close(got, torch.tensor([0.0, 1.5]))


def test_the_means_are_known_once_there_is_one_of_the_supervised_loss_and_one_of_a_term():
    state = module.new_state()
    for step, edge in ((1, 0.0), (2, 2.0)):
        assert not module.known(state)
        record(state, step, 0.0, edge)
        advanced(state, (Pull(1.0), Pull(1.0)))
    assert module.known(state)


def test_the_weight_falls_as_the_term_grows():
    class Twice(PatchEdgeContrastLoss):
        def forward(self, features, target):
            return 4 * super().forward(features, target)

    nets = Net(), Net()
    criteria = [
        CombinedExudateLoss(edge=edge, features=FeatureTap(net, "head"))
        for edge, net in zip((Twice(), PatchEdgeContrastLoss()), nets, strict=True)
    ]
    images, target = batch(0)
    for criterion, net in zip(criteria, nets, strict=True):
        criterion(net(images), target).backward()
    weights = [criterion.terms(net(images), target).beta for criterion, net in zip(criteria, nets, strict=True)]
    torch.testing.assert_close(4 * weights[0], weights[1])


def test_the_weight_does_not_depend_on_the_order_of_the_batch():
    weights = []
    for order in ([0, 1], [1, 0]):
        net = Net()
        criterion = CombinedExudateLoss(features=FeatureTap(net))
        images, target = batch(1)
        target[1, :, 20:24, 5:9] = 1
        for _ in range(2):
            terms = criterion.terms(net(images[order]), target[order])
            terms.total.backward()
        weights.append(terms.beta)
    torch.testing.assert_close(*weights)


def test_scaled_features_before_a_head_scaled_back_leave_the_training_as_it_is():
    class Scaled(Net):
        def forward(self, images):
            return self.head(8 * self.body(images))

    plain, scaled = Net(), Scaled()
    scaled.head.weight.data /= 8
    outputs = []
    for net in (plain, scaled):
        optimizer = torch.optim.SGD(net.body.parameters(), 0.1)
        criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))
        for step in range(4):
            images, target = batch(step)
            optimizer.zero_grad()
            criterion(net(images), target).backward()
            optimizer.step()
        outputs.append(net(batch(9)[0]))
    torch.testing.assert_close(*outputs)


def test_steps_without_a_contrast_leave_the_mean_of_the_term():
    net = Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))
    images, target = batch(0)
    criterion(net(images), target).backward()
    weights = []
    for _ in range(3):
        terms = criterion.terms(net(images), torch.zeros_like(target))
        terms.total.backward()
        weights.append(terms.beta * module.MEMORY**0)
    means = criterion._pull_state["means"]
    assert means[module.SHARES][2] == pytest.approx(1 - MEMORY)
    assert means[module.SHARES][0] == pytest.approx(1 - MEMORY**3)
    assert weights[0] > 0


@pytest.mark.parametrize("temperature", [0.05, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_leaves_of_a_gradient_is_not_measured(temperature, dtype):
    alone = torch.zeros(2, 1, 48, 48)
    alone[0, :, 21:26, 19:24] = 1  # both bands lie in one cell of the features, so all embeddings are one vector

    def betas(*first):
        net = Net()
        net.body = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.ReLU())
        edge = PatchEdgeContrastLoss(patch_size=8, temperature=temperature)
        criterion = CombinedExudateLoss(edge=edge, features=net)
        targets = (*first, *(batch(step)[1] for step in (0, 1)))
        found = []
        for step, target in enumerate(targets):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = net(batch(step)[0])
            terms = criterion.terms(nn.functional.interpolate(logits, size=(48, 48)), target)
            assert terms.edge > 0
            terms.total.backward()
            found.append(terms.beta.item())
        return found

    wanted, got = betas(), betas(alone)
    assert got[:2] == [0, 0]
    assert 0.3 * wanted[1] < got[2] < 3 * wanted[1]


def test_nothing_is_differentiated_where_the_tap_records_even_in_its_first_pass(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "differentiated", lambda *_: calls.append(0) or True)
    net = Net()
    weights = trained_weights(CombinedExudateLoss(features=net), net, 3)
    assert (weights[1:, 1] > 0).all()
    assert not calls


def test_a_supervised_loss_that_begins_without_a_gradient_counts_later():
    net, factors = Net(), iter([0.0, 1.0, 1.0])

    def supervised(logits, target):
        return next(factors) * binary_cross_entropy_with_logits(logits, target)

    weights = trained_weights(CombinedExudateLoss(supervised=supervised, features=net), net, 3)
    assert not weights[:2, 1].any()
    assert weights[2, 1] > 0


class Scaled(PatchEdgeContrastLoss):
    """The edge term times a factor."""

    factor = 1.0

    def forward(self, features, target):
        return self.factor * super().forward(features, target)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("factor", [5.0, 1e6])
def test_a_norm_counts_as_ten_times_the_mean_at_most(factor, scale):
    net, edge = Net(), Scaled()
    edge.factor = scale
    criterion = CombinedExudateLoss(edge=edge, features=FeatureTap(net, "head"))
    images, target = batch(0)
    for _ in range(20):
        terms = criterion.terms(net(images), target)
        terms.total.backward()
    edge.factor = scale * factor
    criterion(net(images), target).backward()
    got = criterion.terms(net(images), target).beta
    before = math.fsum(MEMORY**n for n in range(1, 21))  # of the twenty others in the mean, the last has weight 1
    torch.testing.assert_close(got, terms.beta * (before + 1) / (before + min(factor, 10)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_both_means(value):
    net = Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))
    images, target = batch(0)
    criterion(net(images), target).backward()
    wanted = criterion.terms(net(images), target).beta
    before = criterion._pull_state["means"][module.SUMS].clone()
    (criterion(net(images), target) * value).backward()
    got = criterion.terms(net(images), target).beta
    assert torch.equal(got, wanted)
    assert torch.equal(criterion._pull_state["means"][module.SUMS], before)


def test_an_infinite_norm_of_a_term_leaves_the_means():
    state, pulls = module.new_state(), (Pull(1.0), Pull(1.0))
    record(state, 1, 3.0, 2.0)
    first = advanced(state, pulls)
    record(state, 2, math.inf, 1.0)
    assert torch.equal(advanced(state, pulls), first)
    assert first.all()


def test_a_loss_scaler_and_accumulation_drop_out():
    weights = []
    for factors in ([1.0] * 6, [0.25, 0.25, 65536.0, 65536.0, 1024.0, 1.0]):
        net, factor = Net(), iter(factors)
        criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))
        found = []
        for step in range(6):
            images, target = batch(step)
            terms = criterion.terms(net(images), target)
            (next(factor) * terms.total).backward()
            found.append(terms.beta)
        weights.append(torch.stack(found))
    torch.testing.assert_close(*weights)


def test_in_float16_the_scaler_keeps_the_gradients_and_so_the_weight():
    def weight(scale, half):
        net = Net()

        def loss(logits, target):
            return 0.01 * binary_cross_entropy_with_logits(logits, target)

        criterion = CombinedExudateLoss(supervised=loss, features=FeatureTap(net, "head"))
        images, target = batch(0)
        images, target = images.repeat(1, 1, 8, 8), target.repeat(1, 1, 8, 8)
        for _ in range(3):
            with torch.autocast("cpu", torch.float16, enabled=half):
                terms = criterion.terms(net(images), target)
            (scale * terms.total).backward()
        return terms.beta

    wanted = weight(1.0, False)
    torch.testing.assert_close(weight(2.0**16, True), wanted, rtol=0.02, atol=0)
    # Unscaled, part of the gradients of a mean over pixels vanishes: the supervised loss seems to pull less.
    assert weight(1.0, True) < 0.98 * wanted


def test_in_float16_the_norm_of_a_strong_term_does_not_overflow_before_it_has_a_weight():
    net, edge = Net(), Scaled()
    criterion = CombinedExudateLoss(edge=edge)
    images, target = batch(0)
    features = net.body(images).detach().half().requires_grad_()
    (gradient,) = torch.autograd.grad(edge(features.float(), target), features)
    edge.factor = 4 / float(gradient.abs().max())
    for _ in range(2):
        terms = criterion.terms(net.head(features.float()), target, features)
        (2.0**16 * terms.total).backward()
    assert terms.beta > 0


def test_in_float16_the_gradient_by_hand_does_not_vanish():
    net = Net()
    images, target = batch(0)
    norms = []
    for dtype in (torch.float32, torch.float16):
        features = net.body(images.repeat(1, 1, 4, 4)).detach().to(dtype).requires_grad_()
        logits = net.head(features.float())
        supervised = 1e-3 * binary_cross_entropy_with_logits(logits, target.repeat(1, 1, 4, 4))
        state = module.new_state()
        assert module.differentiated(supervised, features, state)
        norms.append(state["hand"][1])
    torch.testing.assert_close(norms[1], norms[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_has_bitwise_the_same_weights(way, stop):
    def trained(interrupted):
        net = Net()
        criterion = CombinedExudateLoss(0.0, Pull(1.0, warm_up=7), features=FeatureTap(net, "head"))
        found = trained_weights(criterion, net, stop)
        if interrupted:
            other = Net()
            other.load_state_dict(net.state_dict())
            net = other
            if way == "state_dict":
                saved = io.BytesIO()
                torch.save(criterion.state_dict(), saved)
                saved.seek(0)
                criterion = CombinedExudateLoss(0.0, Pull(1.0, warm_up=7), features=FeatureTap(net, "head"))
                criterion.load_state_dict(torch.load(saved, weights_only=True))
            else:
                criterion = copy.deepcopy(criterion) if way == "deepcopy" else pickle.loads(pickle.dumps(criterion))
                criterion.tap = FeatureTap(net, "head")
        return torch.cat([found, trained_weights(criterion, net, 9, first=stop)])

    assert torch.equal(trained(True), trained(False))


def test_a_state_is_optional_and_fits_any_weights():
    net = Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))
    trained_weights(criterion, net, 3)
    CombinedExudateLoss.paper().load_state_dict(criterion.state_dict())
    CombinedExudateLoss().load_state_dict(CombinedExudateLoss.paper().state_dict())
    nn.ModuleDict({"loss": CombinedExudateLoss()}).load_state_dict({})


@pytest.mark.parametrize("size", [5, 21])
def test_a_state_of_another_size_is_refused_by_name(size):
    criterion = CombinedExudateLoss()
    with pytest.raises(RuntimeError, match=rf"\tpull must have 20 numbers, got {size}"):
        criterion.load_state_dict({"pull": torch.ones(size)})
    assert not criterion.state_dict()["pull"].any()


def test_the_means_are_float32_whatever_the_module_is_cast_to():
    criterion = CombinedExudateLoss().half()
    assert criterion.state_dict()["pull"].dtype == torch.float32
    assert not list(criterion.buffers())
    assert not list(criterion.parameters())


def test_without_gradients_nothing_is_measured_and_the_weight_stays():
    net = Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))
    weights = trained_weights(criterion, net, 3)
    before = criterion.state_dict()["pull"]
    with torch.no_grad():
        images, target = batch(0)
        terms = criterion.terms(net(images), target)
    assert terms.beta == weights[-1, 1]
    torch.testing.assert_close(terms.total, terms.supervised + terms.beta * terms.edge)
    assert torch.equal(criterion.state_dict()["pull"], before)


def test_validation_before_the_first_step_gives_the_supervised_loss_with_one_warning():
    net = Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net))
    images, target = batch(0)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="until then the criterion gives the supervised loss alone"):
            terms = criterion.terms(net(images), target)
        criterion(net(images), target)  # a second warning would be an error
    assert terms.edge == 0
    assert torch.equal(terms.total, binary_cross_entropy_with_logits(net(images), target))
    assert trained_weights(criterion, net, 3)[-1, 1] > 0


def test_gradients_of_an_unweighted_term_are_its_own():
    net = Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))
    trained_weights(criterion, net, 2)
    images, target = batch(0)
    criterion(net(images), target).backward()
    edge = criterion.terms(net(images), target).edge
    got = torch.autograd.grad(edge, net.body[0].weight)
    wanted = torch.autograd.grad(PatchEdgeContrastLoss()(net.body(images), target), net.body[0].weight)
    torch.testing.assert_close(got, wanted)


def test_nothing_is_left_in_any_grad_but_that_of_the_loss():
    net = Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net))
    images, target = batch(0)
    criterion(net(images), target)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_in_checkpoints_the_weights_are_the_same(whole):
    class Checkpointed(Net):
        def forward(self, images):
            return self.head(checkpoint(self.body, images, use_reentrant=False))

    net = Net() if whole else Checkpointed()
    criterion = CombinedExudateLoss(features=FeatureTap(net, "head"))

    def call(images, target):
        logits = checkpoint(net, images, use_reentrant=False) if whole else net(images)
        return criterion.terms(logits, target)

    got = trained_weights(criterion, net, 6, call)
    torch.testing.assert_close(got, wanted_weights(6, 0.0, Pull())[0].double(), rtol=1e-5, atol=0)


def test_a_frozen_body_up_to_the_last_layers_changes_nothing():
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.body[0].requires_grad_(False)
            self.body.append(nn.Conv2d(8, 8, 1))

    net = Deep()
    criterion = CombinedExudateLoss(features=FeatureTap(net))
    got = trained_weights(criterion, net, 6)
    torch.testing.assert_close(got, wanted_weights(6, 0.0, Pull(), net=Deep())[0].double(), rtol=1e-5, atol=0)


def test_features_sliced_out_of_the_tap_are_measured_by_it():
    net, other = Net(), Net()
    criterion = CombinedExudateLoss(features=FeatureTap(net))
    alone = CombinedExudateLoss(features=FeatureTap(other))
    for step in range(5):
        images, target = batch(step)
        unlabelled = torch.rand(3, 3, 48, 48)
        logits = net(torch.cat([images, unlabelled]))
        terms = criterion.terms(logits[:2], target, criterion.tap.take()[:2])
        wanted = alone.terms(other(images), target)
        if step > 1:  # the first pass finds the layer
            torch.testing.assert_close(terms.edge, wanted.edge)
        terms.total.backward()
        wanted.total.backward()
    assert terms.beta > 0
    torch.testing.assert_close(terms.beta, wanted.beta, rtol=0.3, atol=0)


def test_features_from_before_the_tapped_layer_are_measured_by_differentiating():
    weights = []
    for tapped in (True, False):
        net = Net()
        criterion = CombinedExudateLoss(features=net if tapped else None)
        earlier = []
        net.body[0].register_forward_hook(lambda *of_hook, kept=earlier: kept.append(of_hook[2]))

        def call(images, target, net=net, criterion=criterion, kept=earlier):
            return criterion.terms(net(images), target, kept.pop())

        weights.append(trained_weights(criterion, net, 4, call))
    assert torch.equal(*weights)
    assert weights[0][1:, 1].all()


def test_a_linear_head_is_measured_too():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer = nn.Linear(8, 1)

        def forward(self, features):
            return self.layer(features.movedim(1, -1)).movedim(-1, 1)

    net = Net(Head())
    criterion = CombinedExudateLoss(features=FeatureTap(net))
    got = trained_weights(criterion, net, 6)
    torch.testing.assert_close(got, wanted_weights(6, 0.0, Pull(), net=Net(Head()))[0].double(), rtol=1e-5, atol=0)


def test_two_criteria_on_one_tap_measure_both():
    net = Net()
    tap = FeatureTap(net, "head")
    first, second = (CombinedExudateLoss(beta=Pull(times), features=tap) for times in (1.0, 2.0))
    for _ in range(4):
        images, target = batch(0)
        logits = net(images)
        features = tap.features
        a = first.terms(logits, target, features)
        tap.last.given = features  # as if another pass had been made
        b = second.terms(logits, target, features)
        (a.total + b.total).backward()
    assert b.beta > a.beta > 0


def test_features_behind_which_no_logits_lie_are_refused_at_the_first_training_call():
    logits = torch.randn(2, 1, 48, 48, requires_grad=True)
    features = torch.randn(2, 8, 48, 48, requires_grad=True)
    target = batch(0)[1]
    text = "beta sets itself .* none could be measured.* the features that the logits are made from.*a number, such as"
    with pytest.raises(ValueError, match=text):
        CombinedExudateLoss()(logits, target, features)
    with pytest.raises(ValueError, match="alpha sets itself"):
        CombinedExudateLoss(Pull(), 0.02)(logits, target, features)
    net = Net()
    with pytest.raises(ValueError, match=text):
        CombinedExudateLoss(features=net)(net(batch(0)[0]), target, features)
    with torch.no_grad():
        assert CombinedExudateLoss()(logits, target, features) == binary_cross_entropy_with_logits(logits, target)
    assert CombinedExudateLoss(beta=0.02)(logits, target, features).isfinite()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_from_the_first_step_with_features_by_hand_it_is_refused():
    net, criterion = Net(), CombinedExudateLoss()
    images, target = batch(0)
    torch.compiler.reset()
    compiled = torch.compile(criterion, backend="eager")
    features = net.body(images)
    with pytest.raises(ValueError, match="run some eager training steps before you compile or capture"):
        compiled(net.head(features), target, features)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_after_some_eager_steps_compiled_code_keeps_the_weight():
    net, criterion = Net(), CombinedExudateLoss()

    def by_hand(call):
        return lambda images, target: call(net.head(given := net.body(images)), target, given)

    eager = trained_weights(criterion, net, 4, by_hand(criterion.terms))
    torch.compiler.reset()
    compiled = torch.compile(criterion.terms, backend="aot_eager", fullgraph=True)
    got = trained_weights(criterion, net, 8, by_hand(compiled), first=4)
    assert (got[:, 1] > 0).all()
    assert eager[-1, 1] > 0


@pytest.mark.filterwarnings("ignore:no backward pass came through")
def test_by_hand_the_supervised_loss_is_differentiated_often_at_first_and_seldom_later(monkeypatch):
    calls, steps = [], []
    differentiated = module.differentiated
    monkeypatch.setattr(module, "differentiated", lambda *inputs: calls.append(0) or differentiated(*inputs))
    features = torch.rand(1, 2, 4, 4, requires_grad=True)
    criterion, target = CombinedExudateLoss(edge=PatchEdgeContrastLoss(4)), torch.zeros(1, 1, 4, 4)
    for step in range(1, 201):
        criterion(features.sum(1, keepdim=True), target, features)
        if calls:
            steps.append(step)
            calls.clear()
    assert steps == [*range(1, 101), 120, 140, 160, 180, 200]


@pytest.mark.parametrize("value", [Pull(0.5), Pull(2, warm_up=3)])
def test_a_pull_is_a_value(value):
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value
    assert hash(value) == hash(copy.copy(value))
    with pytest.raises(AttributeError):
        value.times = 3
    assert repr(value) in repr(CombinedExudateLoss(beta=value))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"times": -1}, ValueError, "times must be a number >= 0 and finite in float32, got -1"),
        ({"times": "1"}, TypeError, "times must be a number >= 0 and finite in float32, got '1' of type str"),
        ({"times": math.inf}, ValueError, "times must be"),
        ({"warm_up": -1}, ValueError, "warm_up must be an int >= 0, got -1"),
        ({"warm_up": 0.5}, TypeError, "warm_up must be an int >= 0, got 0.5 of type float"),
    ],
)
def test_bad_pulls_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        Pull(**options)


def test_times_0_weighs_nothing():
    net = Net()
    weights = trained_weights(criterion_of(0.0, Pull(0.0), features=FeatureTap(net)), net, 4)
    assert not weights.any()


def test_the_default_is_the_edge_term_at_a_pull_of_2():
    criterion = CombinedExudateLoss()
    assert (criterion.alpha, criterion.beta) == (0.0, Pull(2.0))
    paper = CombinedExudateLoss.paper()
    assert (paper.alpha, paper.beta) == (0.02, 0.1)


def test_a_number_and_a_pull_can_take_each_others_place():
    net = Net()
    criterion = CombinedExudateLoss.paper(features=FeatureTap(net, "head"))
    criterion.alpha, criterion.beta = 0.0, Pull(1.0)
    weights = trained_weights(criterion, net, 3)
    assert weights[-1, 1] > 0
    for alpha in (0.0, Pull(1.0)):
        criterion.alpha, criterion.beta = alpha, 0.02
        assert trained_weights(criterion, net, 4, first=3)[0, 1] == pytest.approx(0.02)
