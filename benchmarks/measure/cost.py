"""What work costs: its seconds, alone and beside other work, the loss's share of a training step, and memory."""

import functools
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from contrastive_exudate_loss import FeatureTap

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]  # None stands for a module there

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
    return spread(seconds[min(WARM_UP, len(seconds) - 1) :])


def spread(values: Sequence[float]) -> Quartiles:
    """Median and quartiles of some values; a single value is all three."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, method="inclusive")
    return Quartiles(median, lower, upper)


def timed(device: torch.device, work: Callable[..., Result], *arguments: Tensor) -> tuple[Result, float]:
    """What work(*arguments) returns, and its seconds from an idle device to an idle device.

    By the wall clock, or on CUDA by the device's own events.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        return work(*arguments), time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)
    start.record(stream)
    result = work(*arguments)
    stop.record(stream)
    torch.cuda.synchronize(device)
    return result, start.elapsed_time(stop) / 1000


def side_by_side(
    device: torch.device, works: Mapping[str, Callable[[], object]], budget: float, least: int = 3, most: int = 15
) -> dict[str, list[float]]:
    """Seconds of each of some works, done in turn, round after round.

    What slows the machine for a while slows all works of a round, so ratios within rounds are steadier than ratios of
    medians.

    Args:
        device: on which they run.
        works: by name; each is done once to warm up, or twice if there is time.
        budget: seconds after which no further round begins.
        least: rounds that are done whatever they take.
        most: rounds at most.

    Returns:
        The seconds of each work, in the order of the rounds, the warm-up left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    begin = time.perf_counter()
    for _ in range(2):
        for work in works.values():
            timed(device, work)
        if time.perf_counter() - begin > budget / 4:
            break
    for count in range(most):
        if count >= least and time.perf_counter() - begin > budget:
            break
        for name, work in works.items():
            seconds[name].append(timed(device, work)[1])
    return seconds


def ratio(seconds: Sequence[float], others: Sequence[float]) -> Quartiles:
    """Median and quartiles of the ratios of two works' seconds, round by round."""
    return spread([one / other for one, other in zip(seconds, others, strict=True)])


def extra_memory(
    device: torch.device, work: Callable[[], object], release: Callable[[], object] | None = None
) -> tuple[int, int]:
    """Bytes that PyTorch allocated during the work beyond what was there before: the peak, and what its result keeps.

    The work is done once before, since a first time allocates what stays; then tensors that earlier code left in
    reference cycles are freed, which Python might otherwise do during the work. Release, called in between, frees what
    the first time has left elsewhere, as in a tap: freed during the work, it would make what is kept seem less, on a
    CPU only if an earlier profile had seen it allocated.
    """
    work()
    if release is not None:
        release()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        kept = torch.cuda.memory_allocated(device) - before
        del result
        return torch.cuda.max_memory_allocated(device) - before, kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    del result
    # The profiler's own list of events sums memory up by operator; the order of what was allocated and freed is here.
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    levels = list(itertools.accumulate((size for _, size in changes), initial=0))
    return max(levels), levels[-1]


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
