"""What the host does for one eager call on CUDA, forward and backward, in microseconds; needs no GPU.

Tensors of a few pixels on the CPU say that they are on CUDA, so the losses take the ways of CUDA, and Triton's kernels
are compiled for one GPU and launched by a driver that launches nothing. Kernels of torch run on the CPU in place of
being launched; of so few pixels either takes a few microseconds. This leans on insides of Triton 3.8.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import runtime
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from overhead.eager import as_if_on_cuda

CALLS, WARM_UP = 100, 10


def host_microseconds(calls: Mapping[str, tuple[Callable[..., Tensor], Sequence[Tensor]]]) -> dict[str, float]:
    """The least time of each of some losses with its backward, done in turn.

    Args:
        calls: by name, a criterion and its inputs, on the CPU.
    """
    least = dict.fromkeys(calls, float("inf"))
    with as_if_on_cuda("cpu"), nothing_launched():
        for call in range(WARM_UP + CALLS):
            for name, (criterion, inputs) in calls.items():
                wanted = [tensor for tensor in inputs if tensor.requires_grad]
                begin = time.thread_time_ns()
                torch.autograd.grad(criterion(*inputs), wanted)
                if call >= WARM_UP:
                    least[name] = min(least[name], (time.thread_time_ns() - begin) / 1000)
    return least


@contextlib.contextmanager
def nothing_launched() -> Iterator[None]:
    """Inside, Triton compiles for an H100 and launches nothing."""
    names = ("ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE")  # that a real driver sets
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(nvidia, "PyKernelArg", dict, create=True))
        for name in names:
            stack.enter_context(mock.patch.object(nvidia, name, 0, create=True))
        stack.enter_context(mock.patch.object(runtime.driver, "_active", _Driver()))
        yield


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, *_: Any) -> None:
        pass

    def build_signature_metadata(self, *_: Any) -> bytes:
        return b""

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def launch(self, *_: Any) -> None:
        pass


class _Driver:
    def __init__(self) -> None:
        self.utils, self.launcher_cls = _Utils(), nvidia.CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def allocate_default_profile_scratch(self, *_: Any) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
