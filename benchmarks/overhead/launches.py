"""What torch.compile would launch and allocate on CUDA, read off the code that it generates; needs no GPU.

Nothing is run: the meta device stands for CUDA while the losses are traced, autograd traces forward and backward on
the CPU, and each graph moves to CUDA only for the compiler's back end, whose questions to the driver are answered
with the figures of one GPU. This leans on insides of torch 2.14.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.utils import get_code
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map

META, CPU, CUDA = torch.device("meta"), torch.device("cpu"), torch.device("cuda", 0)
GPU = SimpleNamespace(
    name="GPU",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
)
ANSWERS = [
    (CudaInterface, "get_device_properties", GPU),
    (torch.cuda, "get_device_properties", GPU),
    (scheduler, "has_triton", True),
    (torch.utils._triton, "triton_hash_with_backend", ""),
]


class Launches(NamedTuple):
    """What one direction does.

    kernels: names of the Triton kernels, in order.
    others: names of the operators that the code calls as they are, in order.
    buffers: shape and dtype of each allocation on the GPU.
    """

    kernels: list[str]
    others: list[str]
    buffers: list[tuple[tuple[int, ...], torch.dtype]]


def launches(criterion: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Launches]:
    """Of the "forward" and the "backward" of a criterion that compiles to one graph.

    Args:
        criterion: called with the inputs.
        inputs: on the meta device; the backward is to those that require a gradient.
    """
    return {direction: _read(code) for direction, code in _generated(criterion, inputs).items()}


def meta_batch(side: int, channels: int, stride: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Logits, target and features of 4 square images on the meta device."""
    logits = torch.empty(4, 1, side, side, device=META, dtype=dtype, requires_grad=True)
    features = torch.empty(4, channels, side // stride, side // stride, device=META, dtype=dtype, requires_grad=True)
    return logits, torch.empty(4, 1, side, side, device=META), features


def _generated(criterion: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, str]:
    devices: dict[str, torch.device] = {}  # of the graphs' inputs: alpha and beta stay on the CPU

    def on_cpu(graph: GraphModule, inputs: Sequence[Tensor]) -> Any:
        devices.update({f"primals_{n}": CPU if t.device == CPU else CUDA for n, t in enumerate(inputs, 1)})
        with torch._guards.detect_fake_mode(inputs) or FakeTensorMode():
            return compile_fx(_moved(graph, META, CPU), [_like(t, CPU) for t in inputs], inner_compile=on_cuda)

    def on_cuda(graph: GraphModule, inputs: Sequence[Tensor], **options: Any) -> Any:
        mode = torch._guards.detect_fake_mode(inputs) or FakeTensorMode()
        names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        with mode, torch.no_grad():
            inputs = [_like(t, devices.get(name, CUDA)) for name, t in zip(names, inputs, strict=True)]
        FakeTensorProp(_moved(graph, CPU, CUDA), mode).propagate_dont_convert_inputs(*inputs)
        devices.update({n.name: getattr(n.meta.get("val"), "device", CUDA) for n in graph.graph.nodes})
        with contextlib.ExitStack() as stack:
            for owner, name, value in ANSWERS:
                stack.enter_context(mock.patch.object(owner, name, lambda *_, value=value: value))
            return compile_fx_inner(graph, inputs, **options)

    torch.compiler.reset()
    at_once = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with at_once, torch._inductor.config.patch(force_disable_caches=True):
        codes = get_code(torch.compile(criterion, fullgraph=True, backend=on_cpu), *inputs)
    named = [(re.search(r"AOT ID: \['\d+_(forward|backward)'\]", code), code) for code in codes]
    return {name[1]: code for name, code in named if name}


def _read(code: str) -> Launches:
    called = re.findall(r"^ +(?:\w+ = )?(triton_\w+(?=\.run\()|extern_kernels\.\w+|torch\.ops\.[\w.]+)", code, re.M)
    buffers = re.findall(r" = empty_strided_cuda\(\((.*?)\), \(.*?\), torch\.(\w+)\)", code)
    return Launches(
        [name for name in called if name.startswith("triton_")],
        [name for name in called if not name.startswith("triton_")],
        [(tuple(int(n) for n in shape.split(",") if n.strip()), getattr(torch, dtype)) for shape, dtype in buffers],
    )


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad
    )


def _moved(graph: GraphModule, old: torch.device, new: torch.device) -> GraphModule:
    for module in [module for module in graph.modules() if isinstance(module, GraphModule)]:
        for node in module.graph.nodes:
            arguments = node.args, node.kwargs
            node.args, node.kwargs = tree_map(lambda x: new if type(x) is type(old) and x == old else x, arguments)
        module.recompile()
    return graph
