"""Walks back through the autograd graph: which layers made the logits, and what was done to these since."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

IMAGES_ALONE = "the terms are for 2-D images: train a 2-D network on slices of the volumes, or leave the terms out"


# What DistributedDataParallel puts behind a model's outputs, with unused parameters or in a static graph's first step.
_WRAPPER = "_DDPSinkBackward"


class Run(NamedTuple):
    """A layer that has run.

    name: its dotted name in the model.
    layer: the module.
    made: the node that made its output.
    given: its input.
    features: the input with the channels second, (B, C, h, w), or a linear layer's tokens, (B, N, C).
    """

    name: str
    layer: nn.Module
    made: Node
    given: Tensor
    features: Tensor


def nodes_behind(start: Node, ends: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """A node and the nodes from which it is computed, nearest first; without leaves, which all passes share.

    Args:
        start: where to begin.
        ends: the walk stops at a node for which this is true.
    """
    visited, waiting = {start}, collections.deque([start])
    while waiting:
        node = waiting.popleft()
        if not node.name().endswith("AccumulateGrad"):
            yield node
        for following, _ in () if ends(node) else node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                waiting.append(following)


def within_wrapper(tensor: Tensor) -> Tensor | GradientEdge:
    """A tensor, where DistributedDataParallel handed it on as its model made it."""
    node = tensor.grad_fn
    if node is None or node.name() != _WRAPPER:
        return tensor
    made, number = node.next_functions[tensor.output_nr]
    return tensor if made is None else GradientEdge(made, number)


def out_of_wrapper(main: GradientEdge, nodes: Iterable[Node]) -> GradientEdge:
    """What a model made, where DistributedDataParallel handed it on by one of the nodes as that node made it."""
    edges = (
        GradientEdge(node, place)
        for node in nodes
        if node.name() == _WRAPPER
        for place, edge in enumerate(node.next_functions)
        if edge == (main.node, main.output_nr)
    )
    return next(edges, main)


def begins_a_static_graph(loss: Node) -> bool:
    """Whether this is a static graph's first step, in which any differentiation counts as the backward pass."""
    wrapper: Any = next((node for node in nodes_behind(loss) if node.name() == _WRAPPER), None)
    model = None if wrapper is None else wrapper.ddp_weakref()
    return model is not None and bool(model.static_graph)


def edges_to(tensor: Tensor, start: Node) -> list[tuple[Node, int]]:
    """The nodes behind start that hand a gradient to the tensor directly, and its place among those they compute."""
    end = tensor.grad_fn
    return [
        (node, place)
        for node in nodes_behind(start, lambda node: node is end)
        for place, edge in enumerate(node.next_functions if node is not end else ())
        if edge == (end, tensor.output_nr)
    ]


def nearest_layers(logits: Node, runs: Mapping[Node, Run]) -> list[Run]:
    """The first layer met on each way back from the logits, skipping those whose input is not a feature map.

    Args:
        logits: the node that made them.
        runs: layers by the node that made their output.

    Raises:
        ValueError: the walk first meets a convolution that is not among the layers, a checkpoint that hides layers,
            or a linear layer on tokens.
    """

    def has_features(node: Node) -> bool:
        return node in runs and runs[node].features.dim() == 4 and runs[node].features.shape[1] >= 2

    found = []
    for node in nodes_behind(logits, has_features):
        if has_features(node):
            found.append(runs[node])
        elif node in runs:
            name, layer, _, _, features = runs[node]
            if features.dim() == 3 and isinstance(layer, nn.Linear):
                raise ValueError(
                    f"layer {name!r} makes the logits from tokens (B, N, C), which are not a feature map; give the "
                    "features to the criterion yourself, as (B, C, h, w)"
                )
        elif node.name() == "ConvolutionBackward0":
            if _axes(node) == 5:
                raise ValueError(f"model must make its logits from images, but makes them from volumes; {IMAGES_ALONE}")
            raise ValueError(
                "model must make its logits with a layer that can be tapped (torch.nn.Conv2d, ConvTranspose2d or "
                "Linear), but makes them with another convolution; give FeatureTap(model, layer=NAME), with the module "
                "whose input is the features, or give the features to the criterion yourself"
            )
        elif node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "model must not hide the layer that makes its logits in a reentrant checkpoint; use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
    return found


def of_one_pass(logits: Node, features: Node) -> bool:
    """Whether the logits and the features can come from one forward pass."""
    if features in nodes_behind(logits):
        return True
    # The last node of a compiled model's features may be a view that the logits do not depend on.
    return not set(nodes_behind(features)).isdisjoint(nodes_behind(logits))


def nodes_since(main: Node, logits: Node) -> list[Node]:
    """The nodes from which the logits are computed, nearest first, that are no older than main's.

    Main's is among them if the logits are made from it: nodes are numbered in the order in which they are made, those
    of parameters highest, so no older node leads back to it.
    """
    nodes: list[Any] = [logits]
    visited: set[Node | None] = {logits, None}
    oldest = _number(main)
    for node in nodes:  # which grows
        if node._sequence_nr() > oldest:
            for following, _ in node.next_functions:
                if following not in visited:
                    visited.add(following)
                    nodes.append(following)
    return nodes


def signature(nodes: Sequence[Node]) -> tuple[Any, ...]:
    """What distinguishes walks: the nodes' names and how they are connected."""
    place: dict[Node | None, int] = {node: number for number, node in enumerate(nodes)}
    return tuple([(node.name(), *[place.get(following) for following, _ in node.next_functions]) for node in nodes])


def steps_between(main: Node, nodes: Iterable[Node]) -> list[Node]:
    """Those of the nodes since main through which the logits are made from it, each before those it is made from."""
    made_from_main = {main}
    for node in sorted(nodes, key=_number):
        if any(following in made_from_main for following, _ in node.next_functions):
            made_from_main.add(node)
    return sorted(made_from_main - {main}, key=_number, reverse=True)


def has_index(steps: Iterable[Node]) -> bool:
    """Whether a step takes indices, which may differ in the next batch."""
    return any(step.name().startswith(("Index", "Gather", "Take")) for step in steps)


def parameters_of(step: Node) -> list[Tensor]:
    """The parameters that a convolution or a matrix product takes, directly or after a cast or a transposition."""
    if not step.name().startswith(("Convolution", "Addmm", "Mm", "Linear", "Bmm", "Baddbmm")):
        return []
    found = []
    for following, _ in step.next_functions:
        node: Any = following
        while node is not None and node.name().startswith(("ToCopy", "TBackward", "Transpose")):
            node = node.next_functions[0][0]
        if node is not None and node.name().endswith("AccumulateGrad"):
            found.append(node.variable)
    return found


def _axes(node: Any) -> int:
    """How many axes a node's output has, which Node's type does not declare."""
    return len(node._input_metadata[0].shape)


def _number(node: Any) -> int:
    """A node's place in the order in which nodes are made, which Node's type does not declare."""
    number: int = node._sequence_nr()
    return number
