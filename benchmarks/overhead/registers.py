"""How many registers Triton's kernels take on an H100, and whether they spill; needs no GPU.

Kernels are compiled as a call of a criterion would compile them, and cuobjdump, which comes with Triton, reads the
binary.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from overhead.eager import as_if_on_cuda
from overhead.host import nothing_launched

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Use(NamedTuple):
    """Of a thread.

    registers: 255 at most.
    spilled: bytes that found no register.
    shared: bytes of shared memory, of all threads of a program.
    """

    registers: int
    spilled: int
    shared: int


def registers(criterion: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Use]:
    """Of each kernel that a criterion launches with its backward, by name.

    Args:
        criterion: called with the inputs.
        inputs: on the CPU.
    """
    found: dict[str, Use] = {}
    run = JITFunction.run

    def read(kernel: Any, *arguments: Any, **options: Any) -> Any:
        compiled = run(kernel, *arguments, **options)
        found[kernel.__name__] = _use(compiled)
        return compiled

    with as_if_on_cuda("cpu"), nothing_launched():
        criterion(*inputs)  # the first call tries Triton
        with mock.patch.object(JITFunction, "run", read):
            torch.autograd.grad(criterion(*inputs), [tensor for tensor in inputs if tensor.requires_grad])
    return found


def _use(kernel: Any) -> Use:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", binary.name]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    number = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return Use(number["REG"], number["STACK"] + number["LOCAL"], kernel.metadata.shared)
