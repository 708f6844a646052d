"""What the losses promise of compiled graphs and of CUDA."""

import contextlib
import copy
import warnings

import pytest
import torch
from batches import MODULES, assert_equal_values_and_gradients, batch, gradients
from strategies import CONTRASTS
from torch import nn
from torch._subclasses import FakeTensorMode

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    FeatureTap,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    contrast_rows,
)
from contrastive_exudate_loss import contrast as contrast_module


def test_a_compiled_criterion_which_checks_no_value_reads_a_0_255_mask_as_it_looks():
    logits, target, features = batch()
    torch.compiler.reset()
    compiled = torch.compile(CombinedExudateLoss.paper(), backend="eager")
    torch.testing.assert_close(
        compiled(logits, 255 * target, features), CombinedExudateLoss.paper()(logits, target, features)
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


OPTIONS = [
    (PatchDensityContrastLoss, {"contrast": "sup_con"}),
    (PatchDensityContrastLoss, {"max_patches": 2, "num_patches": 3}),
    (PatchDensityContrastLoss, {"select": 2, "patch_size": 1, "ignore_index": -1}),
    (PatchEdgeContrastLoss, {"contrast": "sup_con", "footprint": "cross", "inner_radius": 3}),
    (PatchEdgeContrastLoss, {"isolate_patches": True, "num_patches": 5, "ignore_index": -1}),
    (PatchEdgeContrastLoss, {"scope": "image", "density_threshold": 0.3, "inner_radius": (1, 2)}),
    (PatchEdgeContrastLoss, {"max_patches": 3, "patch_size": 7}),
]
options = pytest.mark.parametrize(("loss", "chosen"), OPTIONS)


@options
@pytest.mark.parametrize("cells", [32, 8, 11, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_size_depends_on_the_data_with_any_option_at_any_stride(loss, chosen, cells, dtype):
    features = torch.empty(2, 4, cells, cells, device="meta", dtype=dtype, requires_grad=True)
    (gradient,) = gradients(loss(**chosen)(features, torch.empty(2, 2, 32, 32, device="meta")), features)
    assert (gradient.shape, gradient.dtype) == (features.shape, dtype)


@options
def test_the_forward_runs_on_fake_cuda_tensors(loss, chosen, monkeypatch):
    """Fake tensors know their device, but no value; torch's own autograd would ask the driver."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = torch.empty(2, 4, 16, 16, device="cuda")
        value = loss(**chosen)(features, torch.empty(2, 2, 32, 32, device="cuda"))
    assert (value.shape, value.device.type) == ((), "cuda")


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_the_contrast_of_other_devices_looks_at_no_data(contrast):
    z, labels = torch.empty(50, 3, device="meta"), torch.empty(50, device="meta", dtype=torch.bool)
    loss, gradient = contrast_rows.loss_by_rows(
        z, labels, ~labels, 0.05, contrast, True, range(50), contrast_rows.filled_by_mask
    )
    assert (loss.shape, gradient.shape) == ((), z.shape)


@options
@pytest.mark.parametrize("cells", [32, 8, 11])
def test_compiled_code_equals_eager_code_with_any_option(loss, chosen, cells):
    _, target, features = batch(classes=2)
    features = torch.randn(2, 4, cells, cells, requires_grad=True)
    torch.compiler.reset()
    losses = []
    for module in (loss(**chosen), torch.compile(loss(**chosen), backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        losses.append(module(features, target))
    assert_equal_values_and_gradients(*losses, features)


def test_what_the_compiler_makes_into_code_equals_eager_code():
    logits, target, features = batch()
    torch.compiler.reset()
    losses = [
        module(logits, target, features)
        for module in (CombinedExudateLoss.paper(), torch.compile(CombinedExudateLoss.paper()))
    ]
    assert_equal_values_and_gradients(*losses, logits, features)


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


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@contextlib.contextmanager
def no_synchronisation():
    """Whatever waits for the device is an error inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode of torch is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_cuda_equals_cpu_without_synchronisation(module, on_cuda, *inputs):
    """Value and gradients of the floating inputs that want one, of the module and of what stands for it on CUDA."""

    def call(criterion, *arguments):
        loss = criterion(*arguments)
        return loss, *gradients(loss, *(tensor for tensor in arguments if tensor.requires_grad))

    wanted = call(module, *inputs)
    moved = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in inputs]
    call(on_cuda, *moved)  # the first call checks the target's values, or compiles
    with no_synchronisation():
        got = call(on_cuda, *moved)
    loss, *derivatives = zip(got, wanted, strict=True)
    torch.testing.assert_close(loss[0].cpu(), loss[1], rtol=TOLERANCES[loss[1].dtype], atol=0)
    for a, b in derivatives:
        tolerance = TOLERANCES[b.dtype]
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_cuda_equals_cpu_without_synchronisation(name, compiled):
    module = copy.deepcopy(MODULES[name])
    logits, target, features = batch()
    if name == "combined":
        module.supervised = None if compiled else module.supervised  # MONAI's Dice does not compile to one graph
        inputs = (logits, target, features)
    else:
        inputs = (features, target)
    torch.compiler.reset()
    on_cuda = torch.compile(module, fullgraph=True) if compiled else module
    assert_cuda_equals_cpu_without_synchronisation(module, on_cuda, *inputs)


@pytest.mark.cuda
@options
@pytest.mark.parametrize("cells", [32, 8, 11, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_cuda_equals_cpu_with_any_option_at_any_stride(loss, chosen, cells, dtype):
    _, target, _ = batch(classes=2)
    features = torch.randn(2, 4, cells, cells).to(dtype).requires_grad_()
    # More than there are: CUDA draws others than the CPU.
    drawn = {"max_patches": 10**4} if "max_patches" in chosen else {}
    module = loss(**chosen | drawn)
    assert_cuda_equals_cpu_without_synchronisation(module, module, features, target)


@pytest.mark.cuda
def test_patches_are_drawn_on_cuda_without_synchronisation():
    _, target, features = batch(images=3)
    target, features = target.cuda(), features.detach().cuda()
    term = PatchDensityContrastLoss(4, max_patches=3)
    values = [term(features, target)]
    with no_synchronisation():
        values += [term(features, target) for _ in range(5)]
    assert len({float(value) for value in values}) > 1


@pytest.mark.cuda
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_many_embeddings_on_cuda_equal_those_on_the_cpu(contrast):
    """So many that they take several tiles, in memory that grows with their number."""
    target = (torch.rand(1, 1, 120, 120) < 0.1).float()
    features = torch.randn(1, 8, 120, 120, requires_grad=True)
    module = PatchDensityContrastLoss(1, contrast=contrast)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert_cuda_equals_cpu_without_synchronisation(module, module, features, target)
    # One tile, the embeddings, and what compares; not the 829 MB of all similarities.
    assert torch.cuda.max_memory_allocated() - before < 1.5 * contrast_rows.TILE_ON_CUDA * 4


@pytest.mark.cuda
def test_small_losses_on_cuda_keep_their_digits():
    target = (torch.arange(400) % 7 == 0).float().view(1, 1, 20, 20)
    apart = torch.cat([target, 1 - target], 1)
    features = (apart + 0.02 * torch.rand(1, 2, 20, 20)).requires_grad_()
    module = PatchDensityContrastLoss(1)
    assert module(features, target) < 1e-5
    assert_cuda_equals_cpu_without_synchronisation(module, module, features, target)


@pytest.mark.cuda
def test_mixed_precision_trains_on_cuda():
    torch.manual_seed(0)
    _, target, _ = batch(images=4)
    images = (target + torch.randn(4, 3, 32, 32)).cuda()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)).cuda()
    criterion = CombinedExudateLoss(0.02, 0.1, density=PatchDensityContrastLoss(4), features=FeatureTap(model))
    optimizer, scaler = torch.optim.Adam(model.parameters(), 0.01), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = criterion(model(images), target.cuda())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert loss.dtype == torch.float32
        losses.append(float(loss.detach()))
    assert scaler.get_scale() >= 2**14  # hardly a step was left out for an infinity
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.cuda
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_without_triton_cuda_gives_the_same(contrast, monkeypatch):
    _, target, features = batch(images=3)
    term = PatchDensityContrastLoss(4, contrast=contrast)
    losses = [term(features.cuda(), target.cuda())]
    monkeypatch.setattr(contrast_module, "_filled_on_cuda", lambda device: contrast_rows.filled_by_mask)
    losses.append(term(features.cuda(), target.cuda()))
    torch.testing.assert_close(*losses)
    (a,), (b,) = (gradients(loss, features) for loss in losses)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * float(b.abs().max()))


@pytest.mark.cuda
def test_triton_is_used_on_cuda():
    assert contrast_module._filled_on_cuda(torch.device("cuda", 0)).__name__ == "filled_by_triton"


@pytest.mark.cuda
def test_a_step_is_captured_in_a_cuda_graph():
    criterion = CombinedExudateLoss.paper()
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
    loss = CombinedExudateLoss.paper()(*other)
    wanted = loss, *gradients(loss, other[0], other[2])
    for a, b in zip(captured, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)
