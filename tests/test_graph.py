"""Laws of the walks through the autograd graph."""

import torch
from torch import nn

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
