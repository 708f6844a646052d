"""FeatureTap: the features that a segmentation model turns into logits, kept for the criterion."""

import contextlib
import dataclasses
import difflib
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from contrastive_exudate_loss import graph
from contrastive_exudate_loss.norms import NORM, Recorded, write_norm

_TAPPABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_DATA_PARALLEL = (
    "model must not be nn.DataParallel, since the features of its replicas are lost; use DistributedDataParallel, and "
    "tap the model inside it"
)


@dataclasses.dataclass
class Pass:
    """What a tap keeps of its model's last forward pass.

    features: the layer's input with the channels second; None once a criterion has taken it.
    given: the layer's input as the layer got it, at which a Pull measures.
    main: the place in the autograd graph where the model's main logits were made.
    runs: how often the layer ran in this pass.
    is_running: whether the pass is under way.
    ended: whether it has finished.
    taken: whether a criterion has taken the features.
    records: whether the backward pass will record the norm of the gradient at the layer's input.
    """

    features: Tensor | None = None
    given: Tensor | None = None
    main: GradientEdge | None = None
    runs: int = 0
    is_running: bool = False
    ended: bool = False
    taken: bool = False
    records: bool = False


class FeatureTap:
    """Keeps the input of the layer that makes a model's logits, so that a criterion finds it there.

    Without layer, the tap chooses one in the first eager forward pass with gradients: it follows the autograd graph
    back from the main logits (the output itself, its "out" or "logits", or the first of a tuple) to the nearest
    convolution or linear layer that has a 4-D input of at least two channels.
    The features are those of the model's last forward pass: call the criterion before the next one.
    Tap before torch.compile; then give layer, or run one eager training step first.
    Copies and pickles of a tapped model are untapped. The hooks go when the last reference to the tap does.

    Args:
        model: the network, called as model(images); not wrapped in nn.DataParallel.
        layer: the layer whose input to keep, a module of the model or its dotted name; None chooses as above.
            A linear layer's input is (B, h, w, C) and is kept as (B, C, h, w).

    Raises:
        TypeError: model is not a module, or layer is neither a module nor a name.
        ValueError: layer is not in model, model is an nn.DataParallel, or not exactly one layer makes the logits.
        RuntimeError: the features are asked for before they exist, or by a criterion for a second time.

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
        given = None if layer is None else _named_layer(model, layer)
        self.last = Pass()
        self._layer_name: str | None = None
        self._closed = False
        self.measures = False  # whether to record the norm of the gradient at the layer's input, for a Pull
        self.norm = torch.zeros(2)  # number of backward passes, and the norm in the last
        self.looks: dict[Any, int] = {}  # by the way from the main logits to a criterion's: probes still to be made
        self.chooses = layer is None
        self.model_reference = weakref.ref(model)
        self._seen: dict[Node, graph.Run] = {}
        self._handles = {
            "begin": model.register_forward_pre_hook(_Hook(self, FeatureTap._begin)),
            "end": model.register_forward_hook(_Hook(self, FeatureTap._end)),
        }
        self._watchers: dict[str, RemovableHandle] = {}
        weakref.finalize(self, _remove, self._handles, self._watchers).atexit = False
        if given is None:
            for name, module in _tappable(model):
                watch = _Hook(self, FeatureTap._watch, name)
                self._watchers[name] = module.register_forward_hook(watch, with_kwargs=True)
        else:
            self._keep_input_of(*given)

    @property
    def features(self) -> Tensor:
        """The layer's input in the model's last forward pass, (B, C, h, w), floating."""
        if self._closed:
            raise RuntimeError("this FeatureTap is closed, or a copy, which is untapped; make a new one for this model")
        features = self.last.features
        if features is None and self.last.taken:
            raise RuntimeError(
                "the tapped features have been taken by a criterion already; run the tapped model (its copies are "
                "untapped) again before the next loss, or call criterion.terms(), which returns every term at once; "
                "several criteria on one pass need a tap each; for deep supervision give the criterion the list of "
                "logits, and the wrapper that weighs them as supervised="
            )
        if features is None and self._layer_name is not None and self.last.ended:
            raise RuntimeError(
                f"the tap has no features: its model has run, but layer {self._layer_name!r}, as it was when tapped, "
                "has not; if it was replaced since (a new head, PEFT's modules_to_save), make a new FeatureTap(model); "
                "if the model was compiled before it was tapped, call torch.compiler.reset(); if it skips this layer, "
                "name another with FeatureTap(model, layer=NAME)"
            )
        if features is None:
            remedy = ""
            if self._layer_name is None:
                remedy = (
                    "run one eager forward pass with gradients first, which a model that is frozen altogether does not "
                    "have, or give FeatureTap(model, layer=NAME); "
                )
            raise RuntimeError(
                "the tap has no features: its model has not run as model(images) since it was tapped, or only without "
                f"gradients, compiled, or in a reentrant checkpoint; {remedy}if the model was compiled before it was "
                "tapped, call torch.compiler.reset(); give a checkpoint use_reentrant=False"
            )
        if self.last.runs > 1:
            raise RuntimeError(
                f"layer {self._layer_name!r} ran {self.last.runs} times in one forward pass, so its input is not one "
                "tensor; give the features to the criterion yourself"
            )
        return features

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
        """Drop the features, if there are any, when a criterion does not need them."""
        self.last.taken = self.last.taken or self.last.features is not None
        self.last.features = self.last.main = None
        if not self.measures:  # or a criterion is going to ask for it
            self.last.given = None

    def close(self) -> None:
        """Remove the hooks and drop the features, which leaves the model as it was."""
        _remove(self._handles, self._watchers)
        self.last = Pass()
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
        empty: dict[str, Any] = {name: {} for name in ("_handles", "_watchers", "_seen", "looks")}
        return self.__dict__ | empty | {"last": Pass(), "model_reference": None, "_closed": True}

    def _begin(self, model: nn.Module, args: Any) -> None:
        if _recomputing():
            return
        if getattr(model, "_is_replica", False):
            raise ValueError(_DATA_PARALLEL)
        self.last = Pass(is_running=True)
        self._seen.clear()

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if _recomputing():
            return
        self.last.is_running, self.last.ended = False, True
        if torch.compiler.is_compiling():
            return
        with contextlib.suppress(ValueError):  # the output of a model whose layer was given may be anything
            main = _main_logits(output)
            if main.grad_fn is not None:
                self.last.main = GradientEdge(main.grad_fn, main.output_nr)
        if self._layer_name is None and torch.is_grad_enabled():
            try:
                self._choose(model, output)
            except ValueError as error:
                self.close()  # or this tap's error would be raised again under the next tap, with a layer given
                if hasattr(model, "_orig_mod"):
                    raise ValueError(f"{error}; tap a model before torch.compile") from None
                raise
            self._seen.clear()

    def _watch(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self.last.is_running or torch.compiler.is_compiling():
            return
        given = _first_tensor(args, kwargs)
        if isinstance(output, Tensor) and output.grad_fn is not None and given is not None:
            self._seen[output.grad_fn] = graph.Run(name, module, output.grad_fn, given, _channels_second(module, given))

    def _choose(self, model: nn.Module, output: Any) -> None:
        logits = _main_logits(output)
        if logits.grad_fn is None:
            return
        new = [name for name, module in _tappable(model) if not _has(module, self._watchers.get(name))]
        if new:
            raise ValueError(
                f"model must have all its layers before it is tapped, but {', '.join(map(repr, new))} came later, put "
                "in by hand or by PEFT, or built while the model ran; make a new FeatureTap(model) now"
            )
        found = graph.nearest_layers(logits.grad_fn, self._seen)
        names = sorted({run.name for run in found})
        if len(names) != 1:
            which = "no convolution or linear layer with a 4-D input of at least 2 channels makes"
            if names:
                which = f"the layers {', '.join(map(repr, names))} all make"
            ran = ", ".join(repr(run.name) for run in self._seen.values())
            raise ValueError(
                f"{which} the logits; give FeatureTap(model, layer=NAME), with the layer whose input is the features, "
                f"or give the features to the criterion yourself"
                + ("" if names or not ran else f"; the layers that ran: {ran}")
            )
        name, module, made, given, features = found[0]
        _remove(self._watchers)
        self._keep_input_of(name, module)
        self.last.features, self.last.given = features, given
        self.last.runs = sum(module is run.layer for run in self._seen.values())
        if self.measures and given.grad_fn is not None and self._can_record(given):
            self._record_at(graph.edges_to(given, made))

    def _keep_input_of(self, name: str, layer: nn.Module) -> None:
        self._layer_name = name
        self._handles["layer"] = layer.register_forward_pre_hook(_Hook(self, FeatureTap._keep), with_kwargs=True)

    def _keep(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _recomputing():
            return None
        given = _first_tensor(args, kwargs)
        if given is None or given.dim() != 4:
            got = "no tensor" if given is None else str(tuple(given.shape))
            remedy = graph.IMAGES_ALONE if given is not None and given.dim() == 5 else "choose another"
            raise ValueError(
                f"layer {self._layer_name!r} must have a 4-D input (B, C, h, w) to be tapped, got {got}; {remedy}"
            )
        last = self.last
        if not last.is_running:
            last.main = None  # these features are not of the pass that made it
        last.features, last.given = _channels_second(layer, given), given
        last.runs = last.runs + 1 if last.is_running else 1
        if not (self.measures and torch.is_grad_enabled() and given.requires_grad and self._can_record(given)):
            return None
        # The layer gets a copy, whose gradient comes from the logits alone; the terms get the input itself.
        recorded = Recorded.apply(given, self.norm, NORM, True, None, None)
        last.records = True
        swapped = {id(given): recorded}
        return (
            tuple(swapped.get(id(value), value) for value in args),
            {name: swapped.get(id(value), value) for name, value in kwargs.items()},
        )

    def _record_at(self, edges: list[tuple[Node, int]]) -> None:
        """Write down the norm of the gradient on its way from the layer, which had its input itself, to that input."""
        if len(edges) != 1:  # or several norms, which do not tell that of their sum
            return
        ((node, place),), record = edges, self.norm

        def write(gradients: tuple[Tensor | None, ...], _: Any) -> None:
            gradient = gradients[place]
            if gradient is not None:
                write_norm(record, gradient, None, NORM, True)

        node.register_hook(write)
        self.last.records = True

    def _can_record(self, given: Tensor) -> bool:
        """Whether self.norm is on the input's device; compiled code cannot move it there."""
        if self.norm.device != given.device and not torch.compiler.is_compiling():
            self.norm = self.norm.to(given.device)
        return self.norm.device == given.device


class _Hook:
    """A hook that does not keep its tap alive, and does nothing in copies and pickles of its model.

    Args:
        tap: the tap whose method the hook calls; with None it calls nothing.
        method: called as method(tap, *first, *what torch passes to a hook).
        first: the method's first arguments.
    """

    def __init__(self, tap: FeatureTap | None, method: Callable[..., Any], *first: Any) -> None:
        self.tap = _nobody if tap is None else weakref.ref(tap)
        self.method = method
        self.first = first

    def __call__(self, *args: Any) -> Any:
        tap = self.tap()
        return None if tap is None else self.method(tap, *self.first, *args)

    def __deepcopy__(self, copied: dict[int, Any]) -> "_Hook":
        return _Hook(None, self.method)

    def __reduce__(self) -> tuple[Any, ...]:
        # A callable that takes any arguments, returns None and unpickles where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # torch.jit.script asks for it, to translate the hook
            raise AttributeError(
                "a tapped model and its copies cannot be scripted: call tap.close(), then copy, then torch.jit.script"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _nobody() -> None:
    """Stands in for a weak reference to a tap that is gone."""


def _remove(*several: dict[str, RemovableHandle]) -> None:
    """Remove the hooks, and their handles from the dictionaries."""
    for handles in several:
        for handle in handles.values():
            handle.remove()
        handles.clear()


def _has(module: nn.Module, handle: RemovableHandle | None) -> bool:
    """Whether this module has the forward hook: it may have replaced the module that was hooked."""
    return handle is not None and handle.hooks_dict_ref() is module._forward_hooks


def _tappable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _TAPPABLE)]


def _recomputing() -> bool:
    """Whether a backward pass is running: what a checkpoint recomputes there must not refill the tap."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _named_layer(model: nn.Module, layer: nn.Module | str) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer in modules:
            return layer, modules[layer]
        close = difflib.get_close_matches(layer, modules, n=3) or difflib.get_close_matches(
            f"_orig_mod.{layer}", modules
        )
        raise ValueError(
            f"layer must be the dotted name of a module in model.named_modules(), got {layer!r}"
            + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
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
        f"{type(output).__name__}; give FeatureTap(model, layer=NAME), with the layer whose input is the features"
    )
