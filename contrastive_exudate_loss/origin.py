"""Whether what a criterion gets belongs to the forward pass that its tap saw."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from contrastive_exudate_loss import _checks, graph, probe
from contrastive_exudate_loss.features import FeatureTap

# A way from the main logits to the criterion's is probed once, or this often if it takes indices: a random permutation
# of two images leaves them in place in every second batch.
LOOKS_AT_AN_INDEX = 8


def layer_input(tap: FeatureTap, features: Tensor | None) -> tuple[Tensor | None, bool]:
    """The layer's input in the last forward pass, and whether the backward pass will record its gradient's norm.

    Args:
        tap: to be asked once in each forward pass.
        features: what was made from the tapped ones; None if they are used as they are.

    Returns:
        (None, False) if the features are made from something else.
    """
    given, tap.last.given = tap.last.given, None
    if given is None or features is None or torch.compiler.is_compiling():
        return given, tap.last.records
    if given.grad_fn is None or features.grad_fn is None:
        return None, False
    if given.grad_fn not in graph.nodes_behind(features.grad_fn, lambda node: node is given.grad_fn):
        return None, False
    return given, tap.last.records


def taken_features(tap: FeatureTap, logits: Tensor) -> Tensor:
    """What tap.take() returns, for a criterion on these logits.

    Raises:
        ValueError: the features require no gradient while the logits do, or the logits do not belong to them, judged
            by the number of images or by the autograd graph.
        RuntimeError: the tap has no features.
    """
    features = tap.features
    if not torch.compiler.is_compiling():
        _check_origin(tap, logits, features)
    check_gradient(features, logits, tap)
    tap.drop()  # and what a checkpoint may have recomputed for the probe
    return features


def check_gradient(features: Tensor, logits: Tensor, tap: FeatureTap | None = None) -> None:
    """Raise unless the features, from a tap or given by hand, require a gradient where the logits do."""
    if not torch.is_grad_enabled() or not logits.requires_grad or features.requires_grad:
        return
    frozen = "if everything before the last layer is frozen, the terms can train nothing: set alpha = beta = 0"
    if tap is None:
        raise ValueError(
            "features must require a gradient, as logits do, or the terms train nothing, got features without one; "
            f"give them as the model made them, neither detached nor under torch.no_grad(); {frozen}"
        )
    raise ValueError(
        f"features from the tap must require a gradient, as logits do, got features without one from {tap}; if the "
        "model has run again without gradients, call the criterion before that; a checkpointed layer needs "
        f"torch.utils.checkpoint.checkpoint(..., use_reentrant=False); {frozen}; if another layer makes the logits, "
        "give FeatureTap(model, layer=NAME)"
    )


def _check_origin(tap: FeatureTap, logits: Tensor, features: Tensor) -> None:
    """Raise unless the features are those behind the logits, judged by batch sizes and the autograd graph."""
    made, main = logits.grad_fn, tap.last.main
    since = [] if made is None or main is None else graph.nodes_since(main.node, made)
    origin = graph.out_of_wrapper(main, since) if main is not None and main.node in since else None
    if made is not None and origin is None:
        if features.grad_fn is not None and not graph.of_one_pass(made, features.grad_fn):
            raise ValueError(
                f"logits must come from the tapped model's last forward pass, like the features of {tap}, got those of "
                "another pass, model or output; if the model has run again since, call the criterion before that; if "
                "it was compiled before it was tapped, call torch.compiler.reset(); if these are logits of a copy, "
                "such as an average of the weights, give the copy a criterion of its own; if they are another output "
                "than the first, give FeatureTap(model, layer=NAME); or give the criterion the features yourself"
            )
        if tap.chooses and main is not None and main.node not in graph.nodes_behind(made):
            raise ValueError(
                f"logits must be made from the model's main ones, for which the tap chose its layer, got others; give "
                f"FeatureTap(model, layer=NAME), with the layer that makes these, in place of {tap}"
            )
    if made is not None and not tap.chooses and not _lies_behind(tap.last.given, made):
        raise ValueError(
            f"logits must be made from the input of the tapped layer, got others, such as those of another head, with "
            f"{tap}; give FeatureTap(model, layer=NAME) the layer that makes these; features of a branch "
            "beside the logits, such as a projection, go to the criterion as its third argument, with a number as the "
            "term's weight"
        )
    if logits.shape[0] != features.shape[0]:
        remedy = "call the criterion after each pass, on the logits of that pass"
        if logits.shape[0] < features.shape[0]:
            remedy = (
                "if only the first n images have a target, give their features: "
                "criterion(logits, target, criterion.tap.take()[:n])"
            )
        raise ValueError(
            f"logits must cover all {features.shape[0]} images of the model's last forward pass, like the features of "
            f"{tap}, got those of {logits.shape[0]}; {remedy}"
        )
    if origin is not None and made is not origin.node and _checks.may_read(logits):
        _check_way(tap, logits, origin, since)


def _lies_behind(given: Tensor | None, made: Node) -> bool:
    """Whether the layer's input is among what the logits are made of, as far as the graph tells."""
    if given is None or given.grad_fn is None:
        return True
    # What a compiled model did inside is one node.
    return any(node is given.grad_fn or node.name().startswith("Compiled") for node in graph.nodes_behind(made))


def _check_way(tap: FeatureTap, logits: Tensor, main: GradientEdge, since: Sequence[Node]) -> None:
    """Raise unless the logits show each image and pixel where the main ones do; probes only ways that are new."""
    way = logits.shape, probe.shape_of(main), graph.signature(since)
    looks = tap.looks.get(way)
    if looks == 0:
        return
    steps = graph.steps_between(main.node, since)
    if tap.chooses:
        _check_layers(tap, steps)
    if not probe.keeps_places(logits, main, steps):
        raise ValueError(
            "logits must show each image and pixel where the tapped model's own logits do, apart from resizing, but "
            "these were cut, padded, flipped, permuted, reordered or put together since, and the tapped features were "
            "not; call the criterion before that, or give it features that were changed in the same way; if images are "
            "padded, pad the target too, with ignore_index"
        )
    tap.looks[way] = (LOOKS_AT_AN_INDEX if graph.has_index(steps) else 1) - 1 if looks is None else looks - 1


def _check_layers(tap: FeatureTap, steps: Iterable[Node]) -> None:
    """Raise if a layer with parameters lies between the main logits and those of the criterion."""
    model = tap.model_reference()
    for step in steps:
        for parameter in graph.parameters_of(step):
            names = () if model is None else model.named_parameters()
            name = next((name.rpartition(".")[0] for name, other in names if other is parameter), None)
            if name is None:
                which, remedy = "a layer outside the tapped model", "tap a model that contains it"
            else:
                which, remedy = f"layer {name!r}", f"make the tap FeatureTap(model, layer={name!r})"
            raise ValueError(
                f"logits must be the model's main ones, its first output, for which the tap chose its layer, but "
                f"{which} makes these from that output, as in a model that returns (features, logits); {remedy}, in "
                f"place of {tap}, or give the criterion the features yourself"
            )
