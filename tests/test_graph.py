"""Laws of the walks through the autograd graph."""

import types

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from contrastive_exudate_loss import graph


def test_the_nodes_since_the_main_logits_leave_out_the_model():
    model = nn.Sequential(*[nn.Conv2d(2, 2, 1) for _ in range(20)])
    main = model(torch.rand(1, 2, 4, 4))
    scale = torch.ones((), requires_grad=True)
    logits = (main * scale).sigmoid() + main
    nodes = graph.nodes_since(main.grad_fn, logits.grad_fn)
    names = ["AddBackward0", "SigmoidBackward0", "ConvolutionBackward0", "MulBackward0", "AccumulateGrad"]
    assert [node.name().rpartition(":")[-1] for node in nodes] == names
    steps = graph.steps_between(main.grad_fn, nodes)
    assert [step.name() for step in steps] == ["AddBackward0", "SigmoidBackward0", "MulBackward0"]


def test_nodes_older_than_the_main_logits_are_left_out():
    before = torch.rand(2, requires_grad=True).exp().sin()
    main = torch.rand(2, requires_grad=True).cos()
    nodes = graph.nodes_since(main.grad_fn, (main * before).grad_fn)
    assert {node.name() for node in nodes} >= {"MulBackward0", "CosBackward0"}
    assert "ExpBackward0" not in {node.name() for node in nodes}


def test_the_nodes_since_others_hold_no_main_logits():
    features = torch.rand(1, 2, 4, 4, requires_grad=True) * 2
    logits, main = nn.Conv2d(2, 1, 1)(features), nn.Conv2d(2, 1, 1)(features)
    assert main.grad_fn not in graph.nodes_since(main.grad_fn, logits.grad_fn)


def test_signatures_tell_names_and_structure_apart():
    main = torch.rand(1, 2, 4, 4, requires_grad=True) * 2
    ways = [
        lambda: main.sigmoid(),
        lambda: main.exp(),
        lambda: main.exp().sigmoid(),
        lambda: main.exp() + main.sigmoid(),
        lambda: main.sigmoid() + main.exp(),
        lambda: main.exp().sigmoid() + main,
    ]

    def signature(way):
        return graph.signature(graph.nodes_since(main.grad_fn, way().grad_fn))

    assert len({signature(way) for way in ways}) == len(ways)
    assert all(signature(way) == signature(way) for way in ways)


class _DDPSink(torch.autograd.Function):
    """Stands in for what DistributedDataParallel puts behind its model's outputs, whose name its node has."""

    @staticmethod
    def forward(ctx, wrapper, *outputs):
        ctx.ddp_weakref = wrapper
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *gradients


class _Own(torch.autograd.Function):
    """A user's own function."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def wrapped(model=None):
    """Two outputs of a model, and what the wrapper makes of them."""
    inner = [torch.rand(2, requires_grad=True) * n for n in (2, 3)]
    return inner, _DDPSink.apply(lambda: model, *inner)


@pytest.mark.parametrize("n", [0, 1])
def test_a_wrapper_is_looked_through(n):
    inner, outer = wrapped()
    assert graph.within_wrapper(outer[n]) == GradientEdge(inner[n].grad_fn, inner[n].output_nr)
    assert graph.within_wrapper(inner[n]) is inner[n]
    leaf = torch.rand(2, requires_grad=True)
    assert graph.within_wrapper(leaf) is leaf
    other = _Own.apply(inner[n])
    assert graph.within_wrapper(other) is other


@pytest.mark.parametrize("n", [0, 1])
def test_what_a_model_made_is_found_behind_its_wrapper(n):
    inner, outer = wrapped()
    main = GradientEdge(inner[n].grad_fn, inner[n].output_nr)
    logits = outer[n].sigmoid()
    found = graph.out_of_wrapper(main, graph.nodes_since(main.node, logits.grad_fn))
    assert found == GradientEdge(outer[n].grad_fn, outer[n].output_nr)
    unwrapped = inner[n].sigmoid()
    assert graph.out_of_wrapper(main, graph.nodes_since(main.node, unwrapped.grad_fn)) == main


def test_a_static_graph_is_known_by_its_wrapper():
    for static in (True, False):
        _, outer = wrapped(types.SimpleNamespace(static_graph=static))
        assert graph.begins_a_static_graph(outer[0].sum().grad_fn) is static
    inner, outer = wrapped(None)  # whose wrapper is gone
    assert not graph.begins_a_static_graph(outer[0].sum().grad_fn)
    assert not graph.begins_a_static_graph(inner[0].sum().grad_fn)


@pytest.mark.parametrize(
    ("uses", "names"),
    [
        (lambda x: x.sigmoid(), ["SigmoidBackward0"]),
        (lambda x: x.exp().sigmoid(), ["ExpBackward0"]),
        (lambda x: torch.rand(2, requires_grad=True) * x, ["MulBackward0"]),
        (lambda x: x.exp() + x.sigmoid(), ["ExpBackward0", "SigmoidBackward0"]),
    ],
)
def test_edges_to_a_tensor_carry_its_gradient(uses, names):
    given = torch.rand(2, requires_grad=True) * 2
    made = uses(given)
    edges = graph.edges_to(given, made.grad_fn)
    assert [node.name() for node, _ in edges] == names
    found = []
    for node, place in edges:
        node.register_hook(lambda gradients, _, place=place: found.append(gradients[place]))
    (wanted,) = torch.autograd.grad(made.sum(), given)
    torch.testing.assert_close(sum(found), wanted)
