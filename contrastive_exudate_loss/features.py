"""FeatureTap: the features that a segmentation model turns into logits, kept for the criterion."""

import contextlib
import difflib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from contrastive_exudate_loss import graph
from contrastive_exudate_loss.norms import Recorded

_TAPPABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_DATA_PARALLEL = (
    "model must not be nn.DataParallel, whose replicas leave no features behind; use DistributedDataParallel, and tap "
    "the model inside"
)


class FeatureTap:
    """Keeps the input of the layer that makes a model's logits, so that a criterion finds it there.

    Without layer, the first eager forward pass with gradients chooses: the autograd graph is followed back from the
    main logits (the output itself, its "out" or "logits", or the first of a tuple) to the nearest convolution or
    linear layer that has a 4-D input of at least two channels.
    The features are those of the model's last forward pass: call the criterion before the next one.
    Tap before torch.compile; then give layer, or run one eager training step first.
    Copies and pickles of a tapped model are untapped.

    Args:
        model: the network, called as model(images); not wrapped in nn.DataParallel.
        layer: the layer whose input to keep, a module of the model or its dotted name; None chooses as above.
            A linear layer's input is (B, h, w, C) and is kept as (B, C, h, w).

    Raises:
        TypeError: model is no module, or layer neither module nor name.
        ValueError: layer is not in model, model is an nn.DataParallel, or no single layer makes the logits.
        RuntimeError: the features are asked for before they are there, or a second time by a criterion.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
        >>> with FeatureTap(model) as tap:
        ...     logits = model(torch.rand(2, 3, 64, 64))
        ...     tap.features.shape
        torch.Size([2, 8, 64, 64])
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise ValueError(_DATA_PARALLEL)
        self._features: Tensor | None = None
        self._layer_name: str | None = None
        self._closed = False
        self._taken = False
        self._running = False
        self._runs = 0
        self._made: Node | None = None  # what made the model's main logits
        self.measures = False  # whether to write down the norm of the gradient at the layer's input, for a Pull
        self.norm = torch.zeros(2)  # number of backward passes, and the norm in the last
        self._given: Tensor | None = None  # the layer's input in the last forward pass
        self._records = False  # whether the layer got a recorded copy of it
        self._chooses = layer is None
        self._seen: dict[Node, graph.Run] = {}
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._begin)),
            model.register_forward_hook(_Hook(self._end)),
        ]
        if layer is None:
            self._watchers = {
                name: module.register_forward_hook(_Hook(self._watching(name)), with_kwargs=True)
                for name, module in _tappable(model)
            }
        else:
            self._watchers = {}
            self._keep_input_of(*_found(model, layer))

    @property
    def features(self) -> Tensor:
        """The layer's input in the model's last forward pass, (B, C, h, w), floating."""
        if self._closed:
            raise RuntimeError("this FeatureTap is closed, or a copy, and a copy is untapped; make one for this model")
        if self._features is None and self._taken:
            raise RuntimeError(
                "the tapped features have been taken by a criterion already; run the tapped model (its copies are "
                "untapped) again before the next loss, or call criterion.terms(), which gives every term at once; for "
                "deep supervision give the criterion the list of logits, and the wrapper that weighs them as "
                "supervised="
            )
        if self._features is None:
            raise RuntimeError(
                "the tap has no features: its model has not run as model(images) since it was tapped, or not with "
                "gradients, or only compiled, or in a reentrant checkpoint; run one eager forward pass with gradients "
                "first, or give FeatureTap(model, layer=...), and to a checkpoint use_reentrant=False"
            )
        if self._runs > 1:
            raise RuntimeError(
                f"layer {self._layer_name!r} ran {self._runs} times in one forward pass, so its input is no single "
                "tensor; give features to the criterion yourself"
            )
        return self._features

    @property
    def knows_its_layer(self) -> bool:
        """Whether the layer was given or has been chosen."""
        return self._layer_name is not None

    def take(self) -> Tensor:
        """The features, which the tap no longer keeps afterwards."""
        features = self.features
        self.drop()
        return features

    def drop(self) -> None:
        """Let the features go, if there are any: a criterion had no use for them."""
        self._taken = self._taken or self._features is not None
        self._features = self._made = None
        if not self.measures:  # or a criterion is going to ask for it
            self._given = None

    def close(self) -> None:
        """Remove the hooks and drop the features: the model is as it was."""
        for handle in (*self._handles, *self._watchers.values()):
            handle.remove()
        self._handles, self._watchers = [], {}
        self._features = self._made = self._given = None
        self._closed = True
        self._seen.clear()

    def __enter__(self) -> "FeatureTap":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        layer = "not chosen yet" if self._layer_name is None else repr(self._layer_name)
        return f"FeatureTap(closed, layer: {layer})" if self._closed else f"FeatureTap(layer: {layer})"

    def __getstate__(self) -> dict[str, Any]:
        untapped = dict.fromkeys(("_features", "_made", "_given")) | {"_handles": [], "_watchers": {}, "_seen": {}}
        return self.__dict__ | untapped | {"_closed": True}

    def _begin(self, model: nn.Module, args: Any) -> None:
        if _recomputing():
            return
        if getattr(model, "_is_replica", False):
            raise ValueError(_DATA_PARALLEL)
        self._features = self._made = self._given = None
        self._taken, self._running, self._runs, self._records = False, True, 0, False
        self._seen.clear()

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if _recomputing():
            return
        self._running = False
        if torch.compiler.is_compiling():
            return
        with contextlib.suppress(ValueError):  # the output of a model whose layer was given may be anything
            self._made = _main_logits(output).grad_fn
        if self._watchers and torch.is_grad_enabled():
            try:
                self._choose(model, output)
            except ValueError:
                self.close()  # or the next tap, with a layer given, would run into this one's error
                raise
            self._seen.clear()

    def _watching(self, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._running or torch.compiler.is_compiling():
                return
            given = _first_tensor(args, kwargs)
            if isinstance(output, Tensor) and output.grad_fn is not None and given is not None:
                self._seen[output.grad_fn] = graph.Run(name, module, given, _channels_second(module, given))

        return watch

    def _choose(self, model: nn.Module, output: Any) -> None:
        logits = _main_logits(output)
        if logits.grad_fn is None:
            return
        built = [name for name, _ in _tappable(model) if name not in self._watchers]
        if built:
            raise ValueError(
                f"model must have all its layers before it is tapped, but built {', '.join(map(repr, built))} while it "
                "ran; run it once, then make the FeatureTap"
            )
        found = graph.nearest_layers(logits.grad_fn, self._seen)
        names = sorted({run.name for run in found})
        if len(names) != 1:
            which = "no convolution or linear layer with a 4-D input of at least 2 channels makes"
            if names:
                which = f"the layers {', '.join(map(repr, names))} all make"
            ran = ", ".join(repr(run.name) for run in self._seen.values())
            raise ValueError(
                f"{which} the logits; give FeatureTap(model, layer=NAME) the layer whose input is the features, or "
                f"give the features to the criterion yourself"
                + ("" if names or not ran else f"; the layers that ran: {ran}")
            )
        name, module, given, features = found[0]
        for handle in self._watchers.values():
            handle.remove()
        self._watchers = {}
        self._keep_input_of(name, module)
        self._features, self._given = features, given
        self._runs = sum(module is run.layer for run in self._seen.values())

    def _keep_input_of(self, name: str, layer: nn.Module) -> None:
        self._layer_name = name
        self._handles.append(layer.register_forward_pre_hook(_Hook(self._keep), with_kwargs=True))

    def _keep(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _recomputing():
            return None
        given = _first_tensor(args, kwargs)
        if given is None or given.dim() != 4:
            got = "no tensor" if given is None else str(tuple(given.shape))
            raise ValueError(
                f"layer {self._layer_name!r} must have a 4-D input (B, C, h, w) to be tapped, got {got}; choose another"
            )
        self._features, self._given = _channels_second(layer, given), given
        self._runs = self._runs + 1 if self._running else 1
        if not (self.measures and torch.is_grad_enabled() and given.requires_grad and self._can_record(given)):
            return None
        # The layer gets a copy whose gradient is that of the logits alone, the terms the input itself.
        recorded = Recorded.apply(given, self.norm, 1, True, None, None)
        self._records = True
        swapped = {id(given): recorded}
        return (
            tuple(swapped.get(id(value), value) for value in args),
            {name: swapped.get(id(value), value) for name, value in kwargs.items()},
        )

    def _can_record(self, given: Tensor) -> bool:
        """Whether there is a record on the device; compiled code cannot make one."""
        if self.norm.device != given.device and not torch.compiler.is_compiling():
            self.norm = self.norm.to(given.device)
        return self.norm.device == given.device


def layer_input(tap: FeatureTap, features: Tensor | None) -> tuple[Tensor | None, bool]:
    """The layer's input in the last forward pass, and whether the backward pass will write down its gradient's norm.

    Args:
        tap: is asked once a forward pass.
        features: what was made of the tapped ones; None where they are used as they are.

    Returns:
        (None, False) where the features are made of something else.
    """
    given, tap._given = tap._given, None
    if given is None or features is None or torch.compiler.is_compiling():
        return given, tap._records
    if given.grad_fn is None or features.grad_fn is None:
        return None, False
    if given.grad_fn not in graph.nodes_behind(features.grad_fn, lambda node: node is given.grad_fn):
        return None, False
    return given, tap._records


def taken_features(tap: FeatureTap, logits: Tensor) -> Tensor:
    """What tap.take() gives, for a criterion on these logits.

    Raises:
        ValueError: the features require no gradient while the logits do, or the logits do not belong to them as far as
            the autograd graph tells.
        RuntimeError: the tap has nothing to give.
    """
    features = tap.features
    if torch.is_grad_enabled() and logits.requires_grad and not features.requires_grad:
        raise ValueError(
            f"features from the tap must require a gradient like logits, got features without one from {tap}; where "
            "the model has run again without gradients, call the criterion before that; a checkpointed layer needs "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False); where everything before the last layer is "
            "frozen the terms can train nothing: set alpha = beta = 0; where this is not the layer that makes the "
            "logits, give FeatureTap(model, layer=NAME)"
        )
    if not torch.compiler.is_compiling():
        _check_origin(tap, logits.grad_fn, features.grad_fn)
    return tap.take()


def _check_origin(tap: FeatureTap, logits: Node | None, features: Node | None) -> None:
    """Raise unless the features are those behind the logits, as far as the autograd graph tells."""
    if logits is None or features is None:
        return
    if not graph.of_one_pass(logits, features):
        raise ValueError(
            f"logits must come from the model's last forward pass, like the features of {tap}, got those of another; "
            "call the criterion before the next pass, or give it features yourself"
        )
    if tap._made is None:
        return
    if tap._made not in graph.nodes_behind(logits):
        if tap._chooses:
            raise ValueError(
                f"logits must be made from the model's main ones, for which the tap chose its layer, got others; give "
                f"FeatureTap(model, layer=NAME) the layer that makes these, in place of {tap}"
            )
    elif graph.is_cut(logits, tap._made):
        raise ValueError(
            "logits must not be cut out of what the tapped model gave, since its features are not; where images are "
            "padded, pad the target too, with ignore_index, or give the criterion features that are cut alike"
        )


class _Hook:
    """A hook that stays behind when its model is copied or pickled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # What takes any arguments, returns None and unpickles where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _tappable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _TAPPABLE)]


def _recomputing() -> bool:
    """Whether a backward pass is running: what a checkpoint runs again there must not refill the tap."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _found(model: nn.Module, layer: nn.Module | str) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer in modules:
            return layer, modules[layer]
        close = difflib.get_close_matches(layer, modules, n=3) or difflib.get_close_matches(
            f"_orig_mod.{layer}", modules
        )
        raise ValueError(
            f"layer must be the dotted name of a module in model.named_modules(), got {layer!r}"
            + (f"; near to it: {', '.join(map(repr, close))}" if close else "")
            + ("; tap a model before torch.compile" if "_orig_mod" in modules else "")
        )
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a module of the model or its dotted name, got {type(layer).__name__}")
    for name, module in modules.items():
        if module is layer:
            return name, module
    raise ValueError(f"layer must be a module of the model, got another {type(layer).__name__}")


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _channels_second(layer: nn.Module, features: Tensor) -> Tensor:
    return features.movedim(-1, 1) if isinstance(layer, nn.Linear) and features.dim() == 4 else features


def _main_logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("out", "logits"):
            if key in output:
                return _main_logits(output[key])
    if hasattr(output, "logits"):
        return _main_logits(output.logits)
    if isinstance(output, (tuple, list)) and output:
        return _main_logits(output[0])
    raise ValueError(
        f"model must return its logits as a tensor, as 'out' or 'logits', or first in a tuple, got "
        f"{type(output).__name__}; give FeatureTap(model, layer=NAME) the layer whose input are the features"
    )
