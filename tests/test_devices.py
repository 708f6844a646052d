"""What the losses promise of compiled graphs and of CUDA."""

import copy

import pytest
import torch
from batches import MODULES, assert_equal_values_and_gradients, batch, gradients

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    PatchEdgeContrastLoss,
)


def test_a_compiled_criterion_which_checks_no_value_reads_a_0_255_mask_as_it_looks():
    logits, target, features = batch()
    torch.compiler.reset()
    compiled = torch.compile(CombinedExudateLoss(), backend="eager")
    torch.testing.assert_close(
        compiled(logits, 255 * target, features), CombinedExudateLoss()(logits, target, features)
    )


@pytest.mark.parametrize("name", MODULES)
def test_no_size_depends_on_the_data(name):
    """The meta device has no data to look at."""
    module = copy.deepcopy(MODULES[name])
    logits, target, features = (tensor.detach().to("meta").requires_grad_() for tensor in batch())
    if name == "combined":
        module.supervised = None
        loss = module(logits, target.detach(), features)
    else:
        loss = module(features, target.detach())
    (gradient,) = gradients(loss, features)
    assert gradient.shape == features.shape


@pytest.mark.parametrize("name", [*MODULES, "drawn"])
def test_one_graph_compiles_for_any_number_of_lesions_and_any_weight(name):
    module = copy.deepcopy(MODULES[name]) if name in MODULES else PatchEdgeContrastLoss(8, max_patches=4)
    if name == "combined":
        module.supervised = None  # MONAI's Dice does not compile to one graph
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for step in range(3):
        logits, target, features = batch(seed=step, dtype=torch.float64)
        target[1, :, : 8 * step, 4:12] = 1
        if name == "combined":
            module.alpha = 0.1 + step
        arguments = (logits, target, features) if name == "combined" else (features, target)
        losses = []
        for loss in (compiled, module):
            torch.manual_seed(0)
            losses.append(loss(*arguments))
        assert_equal_values_and_gradients(*losses, features)
    assert len(graphs) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODULES)
def test_cuda_equals_cpu_without_synchronisation(name):
    module = copy.deepcopy(MODULES[name])
    inputs = batch()
    on_cuda = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in inputs]

    def call(logits, target, features):
        loss = module(logits, target, features) if name == "combined" else module(features, target)
        return loss, gradients(loss, features)[0]

    wanted = call(*inputs)
    call(*on_cuda)  # the first call checks the target's values
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call(*on_cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
def test_a_step_is_captured_in_a_cuda_graph():
    criterion = CombinedExudateLoss()
    inputs = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in batch()]
    logits, target, features = inputs

    def call():
        loss = criterion(logits, target, features)
        return loss, *torch.autograd.grad(loss, (logits, features))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    other = batch(seed=1)
    with torch.no_grad():
        for tensor, value in zip(inputs, other, strict=True):
            tensor.copy_(value)
    graph.replay()
    loss = CombinedExudateLoss()(*other)
    wanted = loss, *gradients(loss, other[0], other[2])
    for a, b in zip(captured, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)
