"""Laws of the probe: what leaves pixels and images in their places passes, what moves them does not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import checkpoint

from contrastive_exudate_loss import graph, probe


def kept(change, shape=(3, 2, 12, 17), dtype=torch.float32):
    """Whether the probe lets logits pass that are a change of main ones."""
    generator = torch.Generator().manual_seed(0)
    main = torch.randn(shape, generator=generator).to(dtype).requires_grad_() * 1
    logits = change(main)
    edge = GradientEdge(main.grad_fn, main.output_nr)
    if logits.grad_fn is edge.node:
        return True
    steps = graph.steps_between(edge.node, graph.nodes_since(edge.node, logits.grad_fn))
    return probe.keeps_places(logits, edge, steps)


class Doubled(torch.autograd.Function):
    """A function of a user's own, whose backward pass must not run."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


class Widened(Doubled):
    """One that gives another size."""

    @staticmethod
    def forward(ctx, x):
        return x.repeat_interleave(2, -1)


def written(logits):
    copied = logits.clone()
    copied[:, 0] = logits[:, 0].exp()
    return copied


def compiled(logits):
    torch.compiler.reset()
    return torch.compile(lambda x: F.interpolate(x, scale_factor=2), backend="aot_eager")(logits)


IN_PLACE = {
    "nothing": lambda m: m,
    "sigmoid": lambda m: m.sigmoid(),
    "one channel": lambda m: m[:, 1:],
    "channels by an index": lambda m: m[:, [1, 0]],
    "softmax": lambda m: m.softmax(1),
    "largest channel": lambda m: m.amax(1, keepdim=True),
    "channels made one": lambda m: m.logsumexp(1, keepdim=True),
    "a channel repeated": lambda m: m[:, :1].expand(-1, 4, -1, -1),
    "float16": lambda m: m.half(),
    "dropout": lambda m: F.dropout(m),
    "a mask": lambda m: m.masked_fill(m > 0, 0),
    "by a random tensor": lambda m: m * torch.rand(m.shape[2:]),
    "without its mean": lambda m: m - m.mean((2, 3), keepdim=True),
    "batch norm": lambda m: F.batch_norm(m, None, None, training=True),
    "smoothed": lambda m: F.avg_pool2d(m, 9, 1, 4),
    "smoothed over half of the image": lambda m: F.avg_pool2d(m, (11, 17), 1, (5, 8)),
    "max-pooled": lambda m: F.max_pool2d(m, 2),
    "each second pixel": lambda m: m[..., ::2, 1::2],
    "pixel shuffle": lambda m: F.pixel_shuffle(m.repeat(1, 4, 1, 1), 2),
    "channels last and back": lambda m: m.permute(0, 2, 3, 1)[..., 1:].permute(0, 3, 1, 2),
    "flipped and back": lambda m: m.flip(-1).exp().flip(-1),
    "taken apart and put together": lambda m: torch.stack([image * 2 for image in m.unbind()]),
    "permuted and back": lambda m: m[[2, 0, 1]][[1, 2, 0]],
    "in place": lambda m: m.mul_(2),
    "written into": written,
    "a user's function": lambda m: Doubled.apply(m),
    "a user's function to another size": lambda m: Widened.apply(m),
    "compiled": compiled,
    "checkpointed": lambda m: checkpoint(torch.sigmoid, m, use_reentrant=False),
    "nothing learned": lambda m: m * 0,
}
MOVED = {
    "first column cut": lambda m: m[..., 1:],
    "last row cut": lambda m: m[:, :, :-1],
    "border cut": lambda m: m[..., 1:-1, 1:-1],
    "cut and enlarged": lambda m: F.interpolate(m[..., 1:], scale_factor=2),
    "cut and resized back": lambda m: F.interpolate(m[..., 1:], m.shape[2:], mode="bilinear"),
    "padded left": lambda m: F.pad(m, (1, 0)),
    "padded below": lambda m: F.pad(m, (0, 0, 0, 1)),
    "reflected": lambda m: F.pad(m, (1, 1, 1, 1), mode="reflect"),
    "columns flipped": lambda m: m.flip(-1),
    "flipped columns added to themselves": lambda m: m.flip(-1) + m.flip(-1),
    "rows flipped": lambda m: m.flip(2),
    "turned by 180 degrees": lambda m: m.flip(2, 3),
    "turned by 90 degrees": lambda m: m.rot90(1, (2, 3)),
    "transposed": lambda m: m.transpose(2, 3),
    "rolled": lambda m: m.roll(1, -1),
    "halves changed": lambda m: torch.cat([m[..., 8:], m[..., :8]], -1),
    "images by an index": lambda m: m[[1, 0, 2]],
    "images selected": lambda m: m.index_select(0, torch.tensor([0, 2, 1])),
    "images gathered": lambda m: m.gather(0, torch.tensor([2, 0, 1])[:, None, None, None].expand_as(m)),
    "images rolled": lambda m: m.roll(1, 0),
    "one image for all": lambda m: m[:1].expand_as(m),
    "mean image": lambda m: m.mean(0, keepdim=True).expand_as(m),
    "mean pixel": lambda m: m.mean((2, 3), keepdim=True).expand_as(m),
    "mixed with another": lambda m: (m + m[[1, 2, 0]]) / 2,
    "mean of itself and its mirror image": lambda m: (m + m.flip(-1)) / 2,
    "a user's function, then flipped": lambda m: Doubled.apply(m).flip(-1),
    "flipped and added to more channels": lambda m: (
        F.interpolate(m[:, :1].flip(-1), scale_factor=2) + torch.zeros(5, 1, 1)
    ),
    "cut and made small": lambda m: m[..., 1:] * 5e-6,
    "one channel of one image flipped": lambda m: torch.stack([m[0], torch.stack([m[1, 0].flip(-1), m[1, 1]]), m[2]]),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", IN_PLACE)
def test_what_leaves_pixels_in_place_passes(way, dtype):
    assert kept(IN_PLACE[way], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", MOVED)
def test_what_moves_pixels_or_images_does_not_pass(way, dtype):
    assert not kept(MOVED[way], dtype=dtype)
    assert not kept(lambda m: MOVED[way](m.sigmoid())[:, :1].float(), dtype=dtype)


MODES = {
    "nearest": {},
    "nearest-exact": {},
    "bilinear": {},
    "bicubic": {},
    "area": {},
    "bilinear, corners aligned": {"align_corners": True},
    "bilinear, antialiased": {"antialias": True},
}


@given(size=st.tuples(*[st.integers(4, 70)] * 4), mode=st.sampled_from(list(MODES)))
@example(size=(108, 26, 45, 78), mode="nearest")
@example(size=(4, 36, 73, 88), mode="bilinear")
def test_resizing_passes(size, mode):
    h, w, *wanted = size
    assert kept(lambda m: F.interpolate(m, wanted, mode=mode.split(",")[0], **MODES[mode]), (2, 1, h, w))


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.77, 1.3, 1.7, 3])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
def test_resizing_by_a_factor_passes(mode, scale):
    for size in (37, 100):
        assert kept(lambda m: F.interpolate(m, scale_factor=scale, mode=mode), (2, 1, size, size + 3))


@pytest.mark.parametrize("images", [[0, 1], [0, 1, 2, 0]])
def test_another_number_of_images_is_not_probed(images):
    assert kept(lambda m: m[images])


@given(permutation=st.integers(2, 9).flatmap(lambda count: st.permutations(range(count))), side=st.integers(8, 40))
def test_a_permutation_of_images_passes_only_if_it_is_none(permutation, side):
    assert kept(lambda m: m[permutation], (len(permutation), 1, side, side)) == (permutation == sorted(permutation))


@pytest.mark.parametrize("shape", [(2, 16, 20, 3), (2, 16, 20), (2, 3, 2, 16, 20)], ids=str)
def test_the_axes_of_other_main_logits_are_found(shape):
    into = {
        4: lambda m: m.movedim(-1, 1),
        3: lambda m: m[:, None],
        5: lambda m: m[:, 1],
    }[len(shape)]
    assert kept(into, shape)
    assert not kept(lambda m: into(m).flip(-1), shape)


@pytest.mark.parametrize("size", [(16, 78), (62, 20)], ids=str)
def test_main_logits_with_channels_last_may_be_stretched(size):
    assert kept(lambda m: F.interpolate(m.movedim(-1, 1), size), (2, 16, 20, 3))
    assert not kept(lambda m: F.interpolate(m.movedim(-1, 1), size).flip(-1), (2, 16, 20, 3))


def test_a_single_channel_is_not_taken_for_rows():
    assert not kept(lambda m: m.transpose(2, 3), (2, 1, 16, 16))


@pytest.mark.parametrize("n", range(5))
def test_each_of_five_channels_is_probed(n):
    def change(main):
        channels = list(main.split(1, 1))
        channels[n] = channels[n].flip(-1)
        return torch.cat(channels, 1)

    assert not kept(change, (1, 5, 12, 17))


def test_a_graph_that_is_gone_tells_nothing():
    def change(main):
        logits = main.sigmoid().flip(-1)
        logits.sum().backward()
        return logits

    assert kept(change)


@pytest.mark.parametrize("shape", [(2, 320, 3), (8, 2, 5, 16)], ids=str)
def test_main_logits_of_unknown_axes_tell_nothing(shape):
    assert kept(lambda m: m.reshape(2, -1, 16, 20).flip(-1), shape)


def test_a_probe_runs_no_hooks_and_leaves_no_gradient():
    fired = []
    scale = torch.ones((), requires_grad=True)
    scale.register_hook(fired.append)

    def change(main):
        main.register_hook(fired.append)
        scaled = main * scale
        scaled.register_hook(fired.append)
        scaled.grad_fn.register_hook(lambda *gradients: fired.append(gradients))
        return scaled.flip(-1)

    assert not kept(change)
    assert not fired
    assert scale.grad is None
