"""Laws of FeatureTap: which layer it taps, when it holds features and how it leaves a model."""

import copy
import io
import pickle
import weakref

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from contrastive_exudate_loss import CombinedExudateLoss, FeatureTap, Pull, probe


class Net(nn.Module):
    """A body, a head and whatever the test does with them."""

    def __init__(self, outcome=lambda net, x: net.head(net.body(x)), **layers):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(6, 1, 1)
        self.outcome = outcome
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.outcome(self, x)


class Output:
    """A stand-in for the outputs of transformers."""

    def __init__(self, logits):
        self.logits = logits


IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGET = (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.7).float()


def body(net, images=IMAGES):
    return net.body(images)


OUTCOMES = {
    "tensor": lambda net, x: net.head(net.body(x)),
    "upsampled": lambda net, x: nn.functional.interpolate(net.head(net.body(x)), scale_factor=2),
    "out": lambda net, x: {"aux": net.extra(net.body(x)), "out": net.head(net.body(x))},
    "mapped logits": lambda net, x: {"logits": net.head(net.body(x))},
    "logits": lambda net, x: Output(net.head(net.body(x))),
    "tuple": lambda net, x: (net.head(net.body(x)), net.extra(net.body(x)).mean((2, 3))),
    "list": lambda net, x: [net.head(net.body(x)), net.extra(net.body(x))],
    "in place": lambda net, x: net.head(net.body(x)).sigmoid_(),
    "keyword": lambda net, x: net.head(input=net.body(x)),
    "last to run is another": lambda net, x: (net.head(net.body(x)), net.extra(net.body(x)))[0],
    "tokens in between": lambda net, x: net.head(net.body(x)) * net.gate(x.mean((2, 3)))[:, :, None, None],
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_tap_keeps_the_input_of_the_layer_that_makes_the_logits(outcome):
    net = Net(OUTCOMES[outcome], extra=nn.Conv2d(6, 4, 1), gate=nn.Linear(3, 1))
    tap = FeatureTap(net)
    for _ in range(2):  # the first pass chooses, the next ones know
        net(IMAGES)
        torch.testing.assert_close(tap.features, body(net))
        assert tap.features.requires_grad
    assert repr(tap) == "FeatureTap(layer: 'head')"


def test_a_linear_head_gives_channels_second():
    net = Net(lambda net, x: net.linear(net.body(x).movedim(1, -1)).movedim(-1, 1), linear=nn.Linear(6, 1))
    tap = FeatureTap(net)
    for _ in range(2):
        net(IMAGES)
        torch.testing.assert_close(tap.features, body(net))


def test_a_layer_of_one_input_channel_is_passed():
    net = Net(lambda net, x: net.last(net.head(net.body(x))), last=nn.Conv2d(1, 1, 1))
    with FeatureTap(net) as tap:
        net(IMAGES)
        assert tap.features.shape == (2, 6, 16, 16)


def test_a_layer_of_two_input_channels_is_tapped():
    net = Net(lambda net, x: net.last(net.two(net.body(x))), two=nn.Conv2d(6, 2, 1), last=nn.Conv2d(2, 1, 1))
    with FeatureTap(net) as tap:
        net(IMAGES)
        torch.testing.assert_close(tap.features, net.two(body(net)))


def test_several_layers_are_named():
    net = Net(lambda net, x: net.head(net.body(x)) + net.side(x), side=nn.Conv2d(3, 1, 1))
    with FeatureTap(net), pytest.raises(ValueError, match=r"layers 'head', 'side' all make the logits; .*layer=NAME"):
        net(IMAGES)
    tap = FeatureTap(net, layer="head")
    net(IMAGES)
    torch.testing.assert_close(tap.features, body(net))


def test_parts_called_by_hand_leave_nothing_in_the_tap():
    net = Net()
    tap = FeatureTap(net)
    features = weakref.ref(net.body(IMAGES))
    net.head(net.body(IMAGES))
    assert features() is None
    assert not tap._seen


def test_no_layer_is_said_with_those_that_ran():
    net = Net(lambda net, x: net.gate(x.mean((2, 3)))[:, :, None, None], gate=nn.Linear(3, 1))
    with (
        FeatureTap(net),
        pytest.raises(
            ValueError, match=r"no convolution or linear layer .* makes the logits; .*layers that ran: 'gate'"
        ),
    ):
        net(IMAGES)


def test_a_model_without_convolution_or_linear_layer_is_said():
    net = Net(lambda net, x: x * net.scale, scale=nn.Parameter(torch.ones(1)))
    with (
        FeatureTap(net),
        pytest.raises(ValueError, match=r"no convolution or linear layer .* give the features .* yourself$"),
    ):
        net(IMAGES)


@pytest.mark.parametrize(("layer", "said"), [(None, "no convolution or linear layer"), ("volume", "a 4-D input")])
def test_a_layer_of_volumes_is_no_layer_of_images(layer, said):
    def outcome(net, x):
        return net.volume(x.movedim(1, -1)[:, None]).movedim(-1, 1)[:, :, 0]  # of an input (B, 1, h, w, C)

    net = Net(outcome, volume=nn.Linear(3, 1))
    with FeatureTap(net, layer), pytest.raises(ValueError, match=said):
        net(IMAGES)


@pytest.mark.parametrize("tapped", [FeatureTap, lambda net: net])
def test_a_copy_of_a_criterion_can_be_tapped_anew(tapped):
    net = Net()
    criterion = copy.deepcopy(CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net)))
    criterion.tap = tapped(net)
    assert criterion(net(IMAGES), TARGET).isfinite()


def test_a_criterions_features_cannot_be_set():
    criterion = CombinedExudateLoss()
    with pytest.raises(AttributeError, match=r"features cannot be set; set criterion\.tap = model"):
        criterion.features = Net()


@pytest.mark.parametrize("make", [CombinedExudateLoss, CombinedExudateLoss.hecl, CombinedExudateLoss.paper])
def test_a_criterion_taps_the_model_that_it_is_given(make):
    net = Net()
    criterion = make(features=net)
    assert torch.equal(criterion(net(IMAGES), TARGET), make(features=FeatureTap(net))(net(IMAGES), TARGET))
    assert not list(criterion.parameters())
    assert "features=FeatureTap(layer: 'head')" in repr(criterion)


def hooks(net):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        FeatureTap,
        lambda net: FeatureTap(net, "head"),
        lambda net: CombinedExudateLoss(0.02, 0.1, features=net),
        lambda net: CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net)),
    ],
)
def test_a_tap_that_nobody_holds_removes_its_hooks(make, ran):
    net = Net()
    before = hooks(net)
    for _ in range(2):  # as when a cell of a notebook runs again
        holder = make(net)
        assert hooks(net) != before
        if ran:
            net(IMAGES)
    copied = copy.copy(holder), copy.deepcopy(holder)
    once = hooks(net)
    holder = make(net)
    if ran:
        net(IMAGES)
    assert hooks(net) == once
    del holder
    assert hooks(net) == before
    del copied


def test_a_tap_of_an_unknown_layer_leaves_no_hooks():
    net = Net()
    with pytest.raises(ValueError, match=r"did you mean 'head'\?") as kept:
        FeatureTap(net, "heat")
    assert not any(hooks(net))
    del kept


def test_a_tap_keeps_no_model_alive():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=net)
    criterion(net(IMAGES), TARGET)
    gone = weakref.ref(net)
    del net
    assert gone() is None


def test_a_compiled_model_outlives_its_tap():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1))
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, "2"))
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    criterion(compiled(IMAGES), TARGET)
    del criterion
    torch.testing.assert_close(compiled(IMAGES), net(IMAGES))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("copied", [False, True])
def test_scripting_a_tapped_model_says_to_close_the_tap(copied):
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1))
    tap = FeatureTap(net)
    net(IMAGES)
    with pytest.raises(AttributeError, match=r"call tap.close\(\), then copy, then torch.jit.script"):
        torch.jit.script(copy.deepcopy(net) if copied else net)
    tap.close()
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(net) if copied else net)(IMAGES), net(IMAGES))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_tapped_model_can_be_traced():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1))
    tap = FeatureTap(net)
    net(IMAGES)
    torch.testing.assert_close(torch.jit.trace(net, IMAGES)(IMAGES), net(IMAGES))
    assert tap.features.shape == (2, 6, 16, 16)


class Saved(nn.Module):
    """What PEFT's modules_to_save puts in a layer's place."""

    def __init__(self, layer):
        super().__init__()
        self.original_module = layer
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(layer)})

    def forward(self, x):
        return self.modules_to_save["default"](x)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("layer", [None, "head"])
@pytest.mark.parametrize("put", [Saved, copy.deepcopy, lambda head: nn.Conv2d(6, 1, 3, padding=1)])
def test_a_head_that_was_replaced_is_said_with_its_name(put, layer, ran):
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, layer))
    if ran:
        criterion(net(IMAGES), TARGET)
    net.head = put(net.head)
    if layer is None and not ran:
        with pytest.raises(ValueError, match=r"but 'head.*' came later, .* make a new FeatureTap\(model\)"):
            net(IMAGES)
    else:
        with pytest.raises(
            RuntimeError, match=r"model has run, but layer 'head', .* has not; .* make a new FeatureTap\(model\)"
        ):
            criterion(net(IMAGES), TARGET)
    criterion.tap = FeatureTap(net)
    assert criterion(net(IMAGES), TARGET).isfinite()


@pytest.mark.parametrize("layer", [None, "last"])
@pytest.mark.parametrize("last", [nn.Conv3d(4, 1, 1), nn.ConvTranspose3d(4, 1, 2, 2)], ids=lambda m: type(m).__name__)
def test_a_network_for_volumes_is_told_that_images_have_two_axes(last, layer):
    net = Net(lambda net, x: net.last(net.first(x)), first=nn.Conv3d(1, 4, 3, padding=1), last=last)
    for _ in range(2):
        with FeatureTap(net, layer), pytest.raises(ValueError, match="the terms are for 2-D images"):
            net(torch.rand(1, 1, 6, 8, 8))
    del net.body, net.head  # nothing that could be tapped
    with FeatureTap(net, layer), pytest.raises(ValueError, match="the terms are for 2-D images"):
        net(torch.rand(1, 1, 6, 8, 8))


@pytest.mark.parametrize("way", ["detached", "frozen", "no_grad"])
def test_features_given_without_a_gradient_are_refused(way):
    net = Net()
    net.body.requires_grad_(way != "frozen")
    with torch.set_grad_enabled(way != "no_grad"):
        features = body(net)
    features = features.detach() if way == "detached" else features
    logits = net.head(features)
    with pytest.raises(ValueError, match=r"features must require a gradient, as logits do, .* neither detached nor"):
        CombinedExudateLoss.paper()(logits, TARGET, features)
    assert CombinedExudateLoss(0, 0)(logits, TARGET, features).requires_grad
    assert CombinedExudateLoss.paper()(logits.detach(), TARGET, features).isfinite()
    with torch.no_grad():
        assert CombinedExudateLoss.paper()(logits, TARGET, features).isfinite()


def test_an_unknown_output_is_said():
    net = Net(lambda net, x: {"masks": net.head(net.body(x))})
    with FeatureTap(net), pytest.raises(ValueError, match=r"model must return its logits as a tensor, .* got dict"):
        net(IMAGES)


@pytest.mark.parametrize("layer", ["head", "body.0", "last"])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_given_layer_is_tapped(layer, by_name):
    net = Net(last=nn.Identity(), outcome=lambda net, x: net.last(net.head(net.body(x))))
    tap = FeatureTap(net, layer if by_name else net.get_submodule(layer))
    logits = net(IMAGES)
    wanted = {"head": body(net), "body.0": IMAGES, "last": logits}[layer]
    torch.testing.assert_close(tap.features, wanted)


@pytest.mark.parametrize("beta", [0.02, Pull(1.0)])
def test_a_given_layer_that_makes_other_logits_is_refused(beta):
    net = Net(lambda net, x: {"out": net.head(net.body(x)), "aux": net.extra(net.body(x))}, extra=nn.Conv2d(6, 1, 1))
    criterion = CombinedExudateLoss(beta=beta, features=FeatureTap(net, "extra"))
    with pytest.raises(ValueError, match="logits must be made from the input of the tapped layer, got others"):
        criterion(net(IMAGES)["out"], TARGET)
    criterion(net(IMAGES)["aux"], TARGET).backward()


def test_a_given_layer_without_a_feature_map_is_said():
    net = Net(lambda net, x: net.head(net.body(x)) * net.gate(x.mean((2, 3)))[:, :, None, None], gate=nn.Linear(3, 1))
    with (
        FeatureTap(net, "gate"),
        pytest.raises(
            ValueError,
            match=r"layer 'gate' must have a 4-D input \(B, C, h, w\) to be tapped, got \(2, 3\); choose another",
        ),
    ):
        net(IMAGES)


@pytest.mark.parametrize("layer", [None, "head"])
def test_without_a_pull_the_layer_gets_its_input_itself_and_nothing_is_recorded(layer):
    net = Net()
    tap, given = FeatureTap(net, layer), []
    net.head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    net(IMAGES).sum().backward()
    assert given[0] is tap.features
    assert not tap.norm.any()


@pytest.mark.parametrize("layer", [None, "head"])
def test_a_layer_that_runs_twice_is_said(layer):
    net = Net(lambda net, x: net.head(net.body(net.head(net.body(x)).expand(-1, 3, -1, -1))))
    tap = FeatureTap(net, layer)
    net(IMAGES)
    with pytest.raises(RuntimeError, match="layer 'head' ran 2 times in one forward pass"):
        _ = tap.features


def test_a_tap_that_never_fired_says_so():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    with pytest.raises(
        RuntimeError, match=r"has not run as model\(images\) since it was tapped, or only without gradients, compiled"
    ):
        criterion(torch.zeros_like(TARGET), TARGET)
    with torch.no_grad():
        net(IMAGES)
    with pytest.raises(RuntimeError, match="run one eager forward pass with gradients first"):
        criterion(torch.zeros_like(TARGET), TARGET)


def test_criterion_with_a_tap_equals_features_given():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    got = criterion(net(IMAGES), TARGET)
    features = body(net)
    wanted = CombinedExudateLoss.paper()(net.head(features), TARGET, features)
    assert torch.equal(got, wanted)
    for a, b in zip(*(torch.autograd.grad(loss, net.parameters()) for loss in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_given_features_win_over_the_tap():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    logits, other = net(IMAGES), torch.rand(2, 5, 16, 16, requires_grad=True)
    assert torch.equal(criterion(logits, TARGET, other), CombinedExudateLoss.paper()(logits, TARGET, other))


def test_a_second_take_is_refused_until_the_next_forward():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    logits = net(IMAGES)
    criterion(logits, TARGET)
    with pytest.raises(RuntimeError, match=r"taken by a criterion already; run the tapped model .* again"):
        criterion(logits, TARGET)
    criterion(net(IMAGES), TARGET)


@pytest.mark.parametrize("way", ["take", "drop"])
def test_features_that_a_criterion_let_go_are_gone_until_the_next_pass(way):
    net = Net()
    tap = FeatureTap(net, "head")
    tap.drop()
    with pytest.raises(RuntimeError, match="reentrant checkpoint; if the model was compiled before it was tapped"):
        _ = tap.features  # whose layer is known: no eager pass has to find it
    for _ in range(2):
        net(IMAGES)
        getattr(tap, way)()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="taken by a criterion already"):
                _ = tap.features
            tap.drop()
    net.head(body(net))
    torch.testing.assert_close(tap.features, body(net))


@pytest.mark.filterwarnings("ignore:the supervised loss has no gradient")
def test_detached_logits_are_taken():
    net = Net()
    tap = FeatureTap(net, "head")
    criterion = CombinedExudateLoss(0.02, 0.1, features=tap)
    logits = net(IMAGES).detach()
    torch.testing.assert_close(criterion(logits, TARGET), CombinedExudateLoss.paper()(logits, TARGET, body(net)))


def test_a_leaf_may_be_the_features():
    net = Net()
    images = IMAGES.clone().requires_grad_()
    loss = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, "body.0"))(net(images), TARGET)
    torch.testing.assert_close(loss, CombinedExudateLoss.paper()(net(images), TARGET, images))


def test_three_near_names_are_given():
    net = Net(**{f"side{n}": nn.Conv2d(6, 1, 1) for n in range(5)})
    with pytest.raises(ValueError, match=r"got 'side'; did you mean 'side\d' or 'side\d' or 'side\d'\?$"):
        FeatureTap(net, "side")


def test_validation_without_gradients_works_once_the_layer_is_known():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    wanted = criterion(net(IMAGES), TARGET)
    with torch.no_grad():
        assert torch.equal(criterion(net.eval()(IMAGES), TARGET), wanted)


def parallel(net, x):
    features = net.body(x)
    return net.head(features) + 0 * net.side(net.between(features)).mean()


@pytest.mark.parametrize(
    ("outcome", "layer"), [*((outcome, None) for outcome in OUTCOMES.values()), (parallel, "side")]
)
def test_logits_of_an_older_pass_are_refused(outcome, layer):
    layers = {"extra": nn.Conv2d(6, 4, 1), "between": nn.Conv2d(6, 6, 1), "side": nn.Conv2d(6, 1, 1)}
    net = Net(outcome, gate=nn.Linear(3, 1), **layers)
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, layer))

    def logits():
        output = net(IMAGES)
        output = output.get("out", output.get("logits")) if isinstance(output, dict) else output
        output = output.logits if isinstance(output, Output) else output
        return nn.functional.interpolate(output[0] if isinstance(output, (tuple, list)) else output, (16, 16))

    older = logits()
    logits()
    with pytest.raises(ValueError, match=r"last forward pass, .* got those of another pass, model or output"):
        criterion(older, TARGET)
    criterion(logits(), TARGET).backward()


def test_logits_of_a_pass_before_the_head_ran_by_itself_are_refused():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, "head"))
    older = net(IMAGES)
    logits = net.head(body(net))
    with pytest.raises(ValueError, match="got those of another"):
        criterion(older, TARGET)
    assert criterion(logits, TARGET).isfinite()


def enlarged(logits):
    return nn.functional.interpolate(logits, scale_factor=2)


@pytest.mark.parametrize("layer", [None, "head"])
@pytest.mark.parametrize(
    "cut",
    [
        lambda logits: logits[..., :13, 1:],
        lambda logits: logits.narrow(-1, 2, 5),
        lambda logits: logits.narrow(2, 2, 5),
        lambda logits: enlarged(logits)[..., :-3],
        lambda logits: enlarged(logits[..., 1:]),
        lambda logits: logits[:, 0, 2:][:, None],
    ],
)
def test_logits_that_were_cut_are_refused(layer, cut):
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, layer))
    with pytest.raises(ValueError, match=r"logits must show each image and pixel where .* these were cut, padded"):
        criterion(cut(net(IMAGES)), cut(TARGET))


@pytest.mark.parametrize("layer", [None, "two"])
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:, 1:],
        lambda logits: logits.narrow(1, 0, 1),
        lambda logits: logits.narrow(-3, 0, 1),
        lambda logits: logits[:, :1, ::2, ::2],
        lambda logits: nn.functional.interpolate(logits[:, :1], (13, 40), mode="bilinear"),
        lambda logits: logits.permute(0, 2, 3, 1)[..., 1:].permute(0, 3, 1, 2),
    ],
)
def test_resized_logits_of_some_channels_are_taken(layer, change):
    def outcome(net, x):
        wider = net.two(nn.functional.pad(net.body(x), (0, 3, 0, 3)))
        return wider[..., :16, :16]

    net = Net(outcome, two=nn.Conv2d(6, 2, 1))
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, layer))
    for _ in range(2):  # the tap may choose in the first pass
        logits = change(net(IMAGES))
        assert criterion(logits, torch.zeros_like(logits)).isfinite()


@pytest.mark.parametrize("layer", [None, "two"])
@pytest.mark.parametrize(
    "move",
    [
        lambda logits: logits[[1, 0]],
        lambda logits: logits.flip(-1),
        lambda logits: logits.roll(1, 2),
        lambda logits: logits.transpose(2, 3),
        lambda logits: nn.functional.pad(logits, (2, 2, 2, 2)),
        lambda logits: torch.cat([logits[..., 8:], logits[..., :8]], -1),
    ],
)
def test_logits_whose_pixels_or_images_moved_are_refused_at_each_step(layer, move):
    net = Net(lambda net, x: net.two(net.body(x)), two=nn.Conv2d(6, 2, 1))
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, layer))
    for _ in range(2):
        moved = move(net(IMAGES)[:, 1:])
        with pytest.raises(ValueError, match=r"logits must show each image and pixel .* permuted, reordered or put"):
            criterion(moved, move(TARGET))
        assert criterion(net(IMAGES)[:, 1:], TARGET).isfinite()


def test_tiles_put_together_are_refused():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=net)
    tiles = net(torch.cat([IMAGES[..., :8], IMAGES[..., 8:]]))
    together = torch.cat([tiles[:2], tiles[2:]], -1)
    with pytest.raises(ValueError, match=r"logits must cover all 4 images of the model's last .* got those of 2"):
        criterion(together, TARGET)


def test_logits_of_several_passes_are_refused():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=net)
    logits = torch.cat([net(IMAGES), net(IMAGES)])
    with pytest.raises(ValueError, match=r"images of the model's last .* got those of 4; call .* after each pass"):
        criterion(logits, TARGET.repeat(2, 1, 1, 1))


def test_a_loss_on_the_first_images_takes_their_features():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=net)
    logits = net(IMAGES.repeat(2, 1, 1, 1))[:2]
    with pytest.raises(ValueError, match=r"criterion\(logits, target, criterion.tap.take\(\)\[:n\]\)"):
        criterion(logits, TARGET)
    wanted = CombinedExudateLoss.paper()(logits, TARGET, body(net))
    torch.testing.assert_close(criterion(logits, TARGET, criterion.tap.take()[:2]), wanted)


@pytest.mark.filterwarnings("ignore:logits were between 0 and 1")
def test_a_way_to_the_logits_is_probed_once(monkeypatch):
    probed = []
    monkeypatch.setattr(probe, "keeps_places", lambda *arguments: probed.append(1) or True)
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=net)
    for side in (16, 20, 16, 20):
        for _ in range(3):
            logits = nn.functional.interpolate(net(IMAGES), (side, side))
            criterion(logits, torch.zeros_like(logits))
            criterion(net(IMAGES), TARGET)
    assert len(probed) == 2


def test_a_way_that_takes_indices_is_probed_eight_times(monkeypatch):
    probed = []
    monkeypatch.setattr(probe, "keeps_places", lambda *arguments: probed.append(1) or True)
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=net)
    for _ in range(10):
        criterion(net(IMAGES)[[0, 1]], TARGET)
    assert len(probed) == 8


def test_a_permutation_that_begins_as_none_is_refused():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=net)
    criterion(net(IMAGES)[[0, 1]], TARGET)
    with pytest.raises(ValueError, match="logits must show each image and pixel"):
        criterion(net(IMAGES)[[1, 0]], TARGET)


def test_a_probe_into_a_checkpoint_leaves_nothing_in_the_tap():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, "head"))
    logits = checkpoint(lambda x: net(x).tanh(), IMAGES, use_reentrant=False)
    criterion(logits, TARGET)
    with pytest.raises(RuntimeError, match="taken by a criterion already"):
        criterion(logits, TARGET)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_gives_features_and_logits_needs_its_layer(chosen, frozen):
    def outcome(net, x):
        features = net.body(x)
        return features, net.head(features)

    net = Net(outcome)
    net.body.requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16, enabled=chosen):
        if not frozen:
            criterion = CombinedExudateLoss(0.02, 0.1, features=net)
            for _ in range(2):
                with pytest.raises(
                    ValueError, match=r"but layer 'head' makes these .*FeatureTap\(model, layer='head'\)"
                ):
                    criterion(net(IMAGES)[1], TARGET)
        criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, "head"))
        features, logits = net(IMAGES.clone().requires_grad_())
        torch.testing.assert_close(criterion(logits, TARGET), CombinedExudateLoss.paper()(logits, TARGET, features))


def test_a_head_outside_of_the_tapped_model_is_said():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=net.body)
    with pytest.raises(ValueError, match=r"a layer outside the tapped model makes these .* tap a model that contains"):
        criterion(net(IMAGES), TARGET)


def test_other_logits_than_the_main_ones_need_their_layer():
    def outcome(net, x):
        features = net.body(x)
        return net.head(features), net.extra(features)

    net = Net(outcome, extra=nn.Conv2d(6, 1, 1))
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be made from the model's main ones, .*in place of .*'head'"):
            criterion(net(IMAGES)[1], TARGET)
        assert criterion(net(IMAGES)[0], TARGET).isfinite()
    assert CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, "extra"))(net(IMAGES)[1], TARGET).isfinite()


@pytest.mark.parametrize("taken", [False, True])
def test_a_forward_pass_that_fails_leaves_no_features_of_the_one_before(taken):
    net = Net()
    tap = FeatureTap(net)
    net(IMAGES)
    if taken:
        tap.take()
    with pytest.raises(RuntimeError, match="channels"):
        net(IMAGES[:, :2])
    with pytest.raises(RuntimeError, match="the tap has no features"):
        _ = tap.features


def test_the_tap_lets_the_graph_go():
    net = Net()
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    for alpha in (0.02, 0):
        criterion.alpha = criterion.beta = alpha
        logits = net(IMAGES)
        features = weakref.ref(criterion.tap.features)
        criterion(logits, TARGET).backward()
        del logits
        assert features() is None


def test_closing_leaves_the_model_as_it_was():
    net = Net()
    before = hooks(net)
    for run in (False, True):
        with FeatureTap(net) as tap:
            assert hooks(net) != before
            if run:
                net(IMAGES)
        assert hooks(net) == before
        with pytest.raises(RuntimeError, match="this FeatureTap is closed"):
            _ = tap.features
        assert "closed" in repr(tap)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(use_reentrant):
    net = Net(lambda net, x: net.head(checkpoint(net.body, x, use_reentrant=use_reentrant)))
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    if use_reentrant:
        logits = net(IMAGES)  # no input requires a gradient: the checkpoint cuts the graph
        with pytest.raises(ValueError, match="use_reentrant=False"):
            criterion(logits, TARGET)
        return
    for _ in range(2):
        criterion(net(IMAGES), TARGET).backward()


@pytest.mark.parametrize("whole", [True, False])
def test_recomputation_does_not_refill_the_tap(whole):
    def run(net, x):
        return net.last(net.head(net.body(x)))  # the last layer, lest recomputation stop before the head

    outcome = run if whole else lambda net, x: checkpoint(run, net, x, use_reentrant=False)
    net = Net(outcome, last=nn.Conv2d(1, 1, 1))
    tap = FeatureTap(net, "head")
    criterion = CombinedExudateLoss(0.02, 0.1, features=tap)
    logits = checkpoint(net, IMAGES, use_reentrant=False) if whole else net(IMAGES)
    criterion(logits, TARGET).backward()
    assert net.body[0].weight.grad.any()
    with pytest.raises(RuntimeError, match="taken by a criterion already"):
        _ = tap.features


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_tapped_model_are_untapped(way, chosen):
    # Modules without a local function, so that they can be pickled.
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1))
    tap = FeatureTap(net)
    criterion = CombinedExudateLoss(0.02, 0.1, features=tap)
    if chosen:
        net(IMAGES)
    if way == "deepcopy":
        other, other_criterion, other_tap = copy.deepcopy((net, criterion, tap))
    elif way == "pickle":
        text = pickle.dumps(net)
        assert b"contrastive_exudate_loss" not in text
        other, other_criterion, other_tap = pickle.loads(text), *pickle.loads(pickle.dumps((criterion, tap)))
    else:
        file = io.BytesIO()
        torch.save((net, criterion, tap), file)
        file.seek(0)
        other, other_criterion, other_tap = torch.load(file, weights_only=False)
    logits = net(IMAGES)
    features = tap.features
    torch.testing.assert_close(other(IMAGES), logits)
    assert tap.features is features
    with pytest.raises(RuntimeError, match="closed, or a copy"):
        _ = other_tap.features
    with pytest.raises(ValueError, match="copies of a criterion are untapped"):
        other_criterion(logits, TARGET)
    criterion(logits, TARGET)


def test_a_compiled_model_without_a_layer_is_refused_with_the_order_that_works():
    torch.compiler.reset()
    model = torch.compile(Net(), backend="eager")
    tap = FeatureTap(model)
    with pytest.raises(ValueError, match=r"give FeatureTap\(model, layer=NAME\).*; tap a model before torch.compile"):
        model(IMAGES)
    with pytest.raises(RuntimeError, match="this FeatureTap is closed"):
        _ = tap.features


def test_a_compiled_model_feeds_a_tap_whose_layer_is_given():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1))
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, "2"))
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    for _ in range(2):
        loss = criterion(compiled(IMAGES), TARGET)
        features = net[:2](IMAGES)
        torch.testing.assert_close(loss, CombinedExudateLoss.paper()(net[2](features), TARGET, features))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("tapped", ["model", "model that has run since", "wrapper"])
def test_a_model_compiled_before_it_was_tapped_is_said_with_what_helps(tapped):
    net = Net()
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager")
    compiled(IMAGES)
    tap = FeatureTap(compiled, "_orig_mod.head") if tapped == "wrapper" else FeatureTap(net, "head")
    criterion = CombinedExudateLoss(0.02, 0.1, features=tap)
    if "since" in tapped:
        net(IMAGES)
    with pytest.raises(
        (RuntimeError, ValueError), match=r"compiled before it was tapped, call torch\.compiler\.reset\(\)"
    ):
        criterion(compiled(IMAGES), TARGET)
    torch.compiler.reset()
    torch.testing.assert_close(
        criterion(compiled(IMAGES), TARGET), CombinedExudateLoss.paper()(net(IMAGES), TARGET, body(net))
    )


@pytest.mark.parametrize("head", [nn.Conv2d(6, 1, 1), nn.Linear(6, 1)], ids=lambda head: type(head).__name__)
def test_the_features_of_a_compiled_pass_may_be_views(head):
    def outcome(net, x):
        flat = net.body(x).flatten(2).unflatten(2, x.shape[2:])
        return net.last(flat) if isinstance(head, nn.Conv2d) else net.last(flat.movedim(1, -1)).movedim(-1, 1)

    net = Net(outcome, last=head)
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net, "last"))
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager")
    criterion(compiled(IMAGES), TARGET).backward()
    older = compiled(IMAGES)
    compiled(IMAGES)
    with pytest.raises(ValueError, match="got those of another"):
        criterion(older, TARGET)


@pytest.mark.parametrize("classes", [1, 4])
def test_training_an_smp_unet_lowers_the_loss(classes):
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, classes=classes)
    images = torch.rand(2, 3, 64, 64)
    target = (images[:, :1] > 0.6).float().repeat(1, classes, 1, 1)
    criterion = CombinedExudateLoss(0.02, 0.1, features=FeatureTap(net))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        loss = criterion(net(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert "segmentation_head.0" in repr(criterion.tap)
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_a_replica_of_data_parallel_is_refused():
    net = Net()
    replica = net._replicate_for_data_parallel()
    with (
        FeatureTap(net),
        pytest.raises(ValueError, match=r"model must not be nn.DataParallel.* use DistributedDataParallel"),
    ):
        replica(IMAGES)


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(1, 1), nn.LazyLinear(1)], ids=lambda lazy: type(lazy).__name__)
def test_a_lazy_head_is_found(lazy):
    turned = isinstance(lazy, nn.LazyLinear)
    net = Net(lambda net, x: net.last(net.body(x).movedim(1, -1)).movedim(-1, 1) if turned else net.last(net.body(x)))
    net.last = lazy
    tap = FeatureTap(net)
    for _ in range(2):
        net(IMAGES)
        torch.testing.assert_close(tap.features, body(net))


@pytest.mark.parametrize("head", [lambda: nn.Conv2d(6, 1, 1), lambda: nn.Linear(6, 1)])
def test_a_head_that_the_first_pass_builds_is_said(head):
    def outcome(net, x):
        if not hasattr(net, "last"):
            net.last = head()
        features = net.body(x)
        return net.last(features) if isinstance(net.last, nn.Conv2d) else net.last(features.movedim(1, -1))

    net = Net(outcome)
    with (
        FeatureTap(net),
        pytest.raises(ValueError, match=r"'last' came later, .* or built while the model ran; make a new FeatureTap"),
    ):
        net(IMAGES)
    tap = FeatureTap(net)
    net(IMAGES)
    torch.testing.assert_close(tap.features, body(net))


def test_a_linear_head_on_tokens_is_said():
    def outcome(net, x):
        tokens = net.body(x).flatten(2).movedim(1, 2)
        return net.tokens(tokens).movedim(2, 1).unflatten(2, x.shape[2:])

    net = Net(outcome, tokens=nn.Linear(6, 1))
    with (
        FeatureTap(net),
        pytest.raises(ValueError, match=r"layer 'tokens' makes the logits from tokens .* give the features"),
    ):
        net(IMAGES)


def test_a_head_hidden_in_a_reentrant_checkpoint_is_said():
    def outcome(net, x):
        return checkpoint(net.head, net.last(net.body(x)), use_reentrant=True)

    net = Net(outcome, last=nn.Conv2d(6, 6, 1))
    with FeatureTap(net), pytest.raises(ValueError, match="use_reentrant=False"):
        net(IMAGES)


def test_a_head_that_is_no_layer_is_said():
    net = Net(lambda net, x: nn.functional.conv2d(net.body(x), net.weight))
    net.weight = nn.Parameter(torch.ones(1, 6, 1, 1))
    with (
        FeatureTap(net),
        pytest.raises(ValueError, match=r"but makes them with another convolution; give FeatureTap\(model"),
    ):
        net(IMAGES)
