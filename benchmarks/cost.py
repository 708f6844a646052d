"""What a training step costs: its seconds, the share that the loss takes of it, and its peak memory."""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from contrastive_exudate_loss import FeatureTap

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Result = TypeVar("Result")
# The first steps allocate memory and choose kernels; they are left out while enough others remain.
WARM_UP = 3


class Quartiles(NamedTuple):
    """Median and quartiles of some seconds."""

    median: float
    lower: float
    upper: float


def quartiles(seconds: Sequence[float]) -> Quartiles:
    """Median and quartiles of the times after the warm-up; a single time is all three."""
    counted = seconds[min(WARM_UP, len(seconds) - 1) :]
    if len(counted) == 1:
        return Quartiles(counted[0], counted[0], counted[0])
    lower, median, upper = statistics.quantiles(counted, method="inclusive")
    return Quartiles(median, lower, upper)


def timed(device: torch.device, work: Callable[..., Result], *arguments: Tensor) -> tuple[Result, float]:
    """What work(*arguments) returns, and its wall-clock seconds, waiting for the device before and after."""
    _wait(device)
    start = time.perf_counter()
    result = work(*arguments)
    _wait(device)
    return result, time.perf_counter() - start


def loss_share(
    step: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    criterion: Callable[..., Tensor],
    tap: FeatureTap | None,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> float:
    """Share of a training step that the criterion's forward and backward take.

    On each batch two times are measured one after the other: that of the whole step (forward, loss, backward,
    optimiser), and that of the criterion alone, forward and backward to logits and features that are detached from
    the network. The share is the second's median over the first's.

    Args:
        step: trains on (images, target) once.
        model: gives the logits; its weights change with each step.
        criterion: called as criterion(logits, target), with the features as third if there is a tap.
        tap: on the model, where the criterion takes features.
        batches: images and target, on the model's device; the first WARM_UP are warm-up.
    """
    whole, alone = [], []
    for images, target in batches:
        whole.append(timed(images.device, step, images, target)[1])
        outputs = [model(images)] if tap is None else [model(images), tap.take()]
        logits, *features = [output.detach().requires_grad_() for output in outputs]
        loss = functools.partial(_forward_and_backward, criterion)
        alone.append(timed(images.device, loss, logits, target, *features)[1])
    return quartiles(alone).median / quartiles(whole).median


class PeakMemory:
    """Peak memory since this object was made.

    On CUDA the peak that PyTorch allocated; on Linux's CPU the process's peak resident memory, interpreter, libraries
    and data included; where that cannot be reset, the process's peak so far, and on Windows nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.meaning = self._reset()

    def _reset(self) -> str:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return "allocated on CUDA"
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return "not measured" if resource is None else "resident, since the process began"
        return "resident, whole process"

    def read(self) -> int | None:
        """Bytes, or None where there is no way to tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.meaning == "resident, whole process":
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        if resource is None:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _forward_and_backward(criterion: Callable[..., Tensor], *arguments: Tensor) -> None:
    criterion(*arguments).backward()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
