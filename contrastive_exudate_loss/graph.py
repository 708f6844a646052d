"""Walks back through the autograd graph: which layers made the logits, and what was done to them since."""

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node


class Run(NamedTuple):
    """A layer that has run.

    name: in the model.
    layer: itself.
    given: its input.
    features: the input with the channels second, (B, C, h, w), or tokens (B, N, C) of a linear layer.
    """

    name: str
    layer: nn.Module
    given: Tensor
    features: Tensor


def nodes_behind(start: Node, ends: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """The nodes from which a node is computed, nearest first, itself included; no leaves, which all passes share.

    Args:
        start: where to begin.
        ends: the walk does not go on behind a node of which this is true.
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


def nearest_layers(logits: Node, runs: Mapping[Node, Run]) -> list[Run]:
    """The layers met first on each way back from the logits, passing those whose input is no feature map.

    Args:
        logits: the node that made them.
        runs: layers by the node that made their output.

    Raises:
        ValueError: before them comes a convolution that is none of the layers, a checkpoint that hides layers, or a
            linear layer on tokens.
    """

    def has_features(node: Node) -> bool:
        return node in runs and runs[node].features.dim() == 4 and runs[node].features.shape[1] >= 2

    found = []
    for node in nodes_behind(logits, has_features):
        if has_features(node):
            found.append(runs[node])
        elif node in runs:
            name, layer, _, features = runs[node]
            if features.dim() == 3 and isinstance(layer, nn.Linear):
                raise ValueError(
                    f"layer {name!r} makes the logits from tokens (B, N, C), which are no feature map; give the "
                    "features to the criterion yourself, as (B, C, h, w)"
                )
        elif node.name() == "ConvolutionBackward0":
            raise ValueError(
                "model must make its logits with a layer that can be tapped (torch.nn.Conv2d, ConvTranspose2d or "
                "Linear), but a convolution that is none of these makes them; give FeatureTap(model, layer=NAME) the "
                "module whose input is the features, or give the features to the criterion yourself"
            )
        elif node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "model must not hide the layer that makes its logits in a reentrant checkpoint; give "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
    return found


def of_one_pass(logits: Node, features: Node) -> bool:
    """Whether the logits and the features can come from one forward pass."""
    if features in nodes_behind(logits):
        return True
    # The last node of a compiled model's features may be a view that the logits do not depend on.
    return not set(nodes_behind(features)).isdisjoint(nodes_behind(logits))


def is_cut(logits: Node, made: Node) -> bool:
    """Whether rows or columns were cut off between the model's output, made by a node, and the logits."""
    since = list(itertools.takewhile(lambda node: node is not made, nodes_behind(logits)))
    turned = any(node.name().startswith(("Permute", "Transpose")) for node in since)
    return not turned and any(_cuts(node) for node in since)


def _cuts(node: Any) -> bool:
    """Whether a node gives some of the rows or columns, next to one another; Node's type lacks what it has saved."""
    if node.name() != "SliceBackward0" or node._saved_step != 1:
        return False
    axes = len(node._saved_self_sym_sizes)
    # Counted from the end they are unsigned here.
    return node._saved_dim in (axes - 2, axes - 1, 2**64 - 2, 2**64 - 1)
