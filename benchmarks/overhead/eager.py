"""What eager code launches on CUDA in its second call, by the part of the package that asks for it; needs no GPU.

The meta device says that it is CUDA, so the losses take the ways of CUDA with tensors that hold nothing. A launch is
an operator that writes a tensor there, or a Triton kernel, which is noted and not run. What an operator launches
inside is known for those of SEVERAL and one elsewhere, also for a sort and a random permutation, which launch more.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

import contrastive_exudate_loss

PACKAGE = Path(contrastive_exudate_loss.__file__).parent
PARTS = {
    "_supervised": "supervised",
    "masks": "masks",
    "morphology": "masks",
    "patches": "masks",
    "pooling": "pooling",
    "slots": "pooling",
    "contrast": "contrast",
    "contrast_rows": "contrast",
    "contrast_triton": "contrast",
    "fused_triton": "kernels",
}
WEIGHTS = "labels and weights"
# Operators of CUDA that launch more than one kernel, and those that launch none and are no views.
SEVERAL = {
    "binary_cross_entropy_with_logits": 5,
    "constant_pad_nd": 2,
    "masked_fill": 2,
    "select_backward": 2,
    "slice_backward": 2,
}
NONE = ("_reshape_alias", "_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided", "new_empty")


GPU = SimpleNamespace(shared_memory_per_block_optin=232_448)  # of an H100


class Launch(NamedTuple):
    """One launch.

    part: of the package, "supervised" for what it does not do itself.
    name: of the operator or the kernel.
    """

    part: str
    name: str


def eager_launches(criterion: Callable[..., Tensor], *inputs: Tensor) -> dict[str, list[Launch]]:
    """Of the "forward" and the "backward" of a criterion, in order.

    Args:
        criterion: called with the inputs.
        inputs: on the meta device; the backward is to those that require a gradient.
    """
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    with as_if_on_cuda("meta"), _Count() as count:
        criterion(*inputs)  # the first call tries Triton
        count.seen = []
        loss = criterion(*inputs)
        forward, count.seen = count.seen, []
        torch.autograd.grad(loss, wanted)
    return {"forward": forward, "backward": count.seen}


@contextlib.contextmanager
def as_if_on_cuda(device: str) -> Iterator[None]:
    """Inside, tensors of the device type say that they are on CUDA, and no graph is being captured."""
    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == device)),
        mock.patch.object(torch.Tensor, "is_cpu", property(lambda tensor: tensor.device.type == "cpu" != device)),
        # Not as a mock, which would take its time at each call.
        mock.patch.object(torch.cuda, "is_current_stream_capturing", functools.partial(bool)),
        mock.patch.object(torch.cuda, "get_device_properties", _properties),
    ):
        yield


def _properties(_: torch.device) -> SimpleNamespace:
    return GPU


class _Count(TorchDispatchMode):
    """seen: the launches inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no type
        self.seen: list[Launch] = []
        self._parts: dict[int, str] = {}  # of the nodes of the autograd graph

    def __enter__(self) -> "_Count":
        def run(kernel: Any, *_: Any, **__: Any) -> None:
            self.seen.append(Launch(self._part(), kernel.__name__))

        self._stub = mock.patch.object(JITFunction, "run", run)
        self._stub.start()
        super().__enter__()  # type: ignore[no-untyped-call]  # torch gives it no type
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch gives it no type
        self._stub.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        part, name = self._part(), function._schema.name.removeprefix("aten::")
        written = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(result))
        if written and not function.is_view and name not in NONE:
            self.seen += [Launch(part, name)] * SEVERAL.get(name, 1)
        return result

    def _part(self) -> str:
        """By the innermost file of the package; in autograd's own steps by that of the step forward."""
        node = torch._C._current_autograd_node()
        frame: Any = sys._getframe()
        while frame is not None and Path(frame.f_code.co_filename).parent != PACKAGE:
            frame = frame.f_back
        if frame is not None and frame.f_code.co_name == "_given_supervised":
            part = "supervised"
        elif frame is not None:
            part = PARTS.get(Path(frame.f_code.co_filename).stem, WEIGHTS)
        else:
            part = self._parts.get(node._sequence_nr(), "supervised") if node else "supervised"
        if not node:  # the step that is about to be noted in the graph
            self._parts.setdefault(torch._C._autograd._get_sequence_nr() - 1, part)
        return part
