"""Launches of eager code on CUDA are those of the page, which is that of the recorded figures."""

import json
from pathlib import Path

import pytest
import torch
from kernels import eager_counts, eager_table, host_table, package_kernels, register_table, register_uses
from overhead.configurations import Configuration, inputs_of
from overhead.eager import Launch, eager_launches
from overhead.host import host_microseconds
from overhead.registers import registers

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    _terms,
    distributed,
)

fused_triton = pytest.importorskip("contrastive_exudate_loss.fused_triton")
ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "benchmarks/results/kernels.json").read_text())


def launched(counted):
    return sum(number for parts in counted.values() for number in parts.values())


def test_eager_code_launches_as_much_as_is_recorded():
    assert eager_counts() == RECORDED["eager"]


def test_with_kernels_of_its_own_it_launches_as_much_as_is_recorded():
    with package_kernels():
        assert eager_counts() == RECORDED["fused"]["eager"]


def test_these_launch_at_most_ten_with_cross_entropy_inside_and_fifteen_beside_another_supervised_loss():
    counted = RECORDED["fused"]["eager"]
    for name in ("both terms", "both, ignore_index", "both, stride 4", "both, stride 256 / 60"):
        assert launched(counted[name]) <= 10
    given = counted["both, a given supervised loss"]
    assert launched(given) - sum(parts["supervised"] for parts in given.values()) <= 15


@pytest.mark.parametrize("name", ["both, max_patches", "hecl()"])
def test_options_that_come_between_pooling_and_contrast_cost_few_launches(name):
    counted = RECORDED["fused"]["eager"]
    assert launched(counted[name]) <= launched(counted["both terms"]) + 3


def test_gathering_launches_as_much_as_the_page_says(monkeypatch):
    def gathered(own):
        return torch.stack([own, own])  # stands in for a collective

    def lengths_of_ranks(lengths, *_, device):
        gathered(torch.tensor([*lengths], device=device))
        return [[*lengths]] * 2

    for module in (_terms, fused_triton):
        monkeypatch.setattr(module, "rank_and_count", lambda: (0, 2))
    monkeypatch.setattr(distributed, "_gathered", gathered)
    monkeypatch.setattr(torch.distributed, "all_reduce", torch.Tensor.neg_)
    monkeypatch.setattr(_terms, "lengths_of_ranks", lengths_of_ranks)
    options = {"gather_distributed": True}
    parts = {"density": PatchDensityContrastLoss(**options), "edge": PatchEdgeContrastLoss(**options)}
    criterion = CombinedExudateLoss(0.02, 0.1, **parts)
    with package_kernels():
        found = eager_launches(criterion, *inputs_of(Configuration(criterion), "meta"))
    page = (ROOT / "docs/performance-cuda.md").read_text()
    assert f"With `gather_distributed` both terms launch {sum(map(len, found.values()))} " in page


def test_kernels_compile_for_an_h100_and_spill_no_register():
    with package_kernels():
        (used,) = register_uses([32], ["bfloat16"]).values()
    assert set(used) == set(RECORDED["fused"]["registers"]["32, bfloat16"])
    assert {kernel: spilled for kernel, (_, spilled, _) in used.items() if spilled} == {}


@pytest.mark.parametrize("channels", [16, 65, 1024])
@pytest.mark.parametrize("contrast", ["nt_xent", "sup_con"])
def test_the_contrast_needs_no_more_shared_memory_than_is_asked_for(channels, contrast):
    features, target = torch.rand(2, channels, 8, 8, requires_grad=True), torch.eye(32).expand(2, 1, 32, 32)
    with package_kernels():
        used = registers(PatchEdgeContrastLoss(contrast=contrast), features, target)
    needed = fused_triton.shared_memory(channels, 4)
    assert needed / 2 < max(use.shared for use in used.values()) <= needed


@pytest.mark.parametrize(
    "criterion",
    [
        CombinedExudateLoss(),  # whose weight sets itself
        CombinedExudateLoss(
            0.02,
            0.1,
            density=PatchDensityContrastLoss(contrast="sup_con", ignore_index=-1),
            edge=PatchEdgeContrastLoss(contrast="sup_con", ignore_index=-1, footprint="cross", isolate_patches=True),
            ignore_index=-1,
        ),
        CombinedExudateLoss(0.02, 0.0),
        CombinedExudateLoss.hecl(),
    ],
    ids=["edge", "all options", "density", "hecl"],
)
def test_kernels_compile_with_other_options(criterion):
    features, target = torch.rand(2, 7, 10, 11, requires_grad=True), torch.zeros(2, 2, 40, 40, dtype=torch.bool)
    target[:, :, 3:20, 5:19] = True

    def loss(features, target):
        logits = torch.nn.functional.interpolate(features[:, :2], target.shape[2:])
        return criterion(logits, target, features)

    with package_kernels():
        used = registers(loss, features, target)
    assert {"pool", "positives", "negatives", "spread"} <= set(used)
    assert {kernel: use.spilled for kernel, use in used.items() if use.spilled} == {}


def test_the_page_shows_the_recorded_figures():
    page = (ROOT / "docs/performance-cuda.md").read_text()
    for found in (RECORDED, RECORDED["fused"]):
        assert eager_table(found["eager"]) in page
        assert host_table(found["host"]) in page
    assert register_table(RECORDED["fused"]["registers"]) in page


def test_a_launch_is_an_operator_that_writes():
    x = torch.empty(2, 3, device="meta", requires_grad=True)
    found = eager_launches(lambda x: x.T.exp().masked_fill(x.T > 0, 0).sum(), x)
    # Views are none, masked_fill copies first.
    assert [launch.name for launch in found["forward"]] == ["exp", "gt", "masked_fill", "masked_fill", "sum"]
    assert {launch.part for launch in found["forward"]} == {"supervised"}
    assert Launch("supervised", "mul") in found["backward"]


@pytest.mark.parametrize("device", ["is_cuda", "is_cpu"])
def test_tensors_say_again_where_they_are(device):
    assert not torch.empty(1, device="meta").is_cuda
    x = torch.ones(1, requires_grad=True)
    times = host_microseconds({"sum": (torch.sum, [x])})
    assert times["sum"] > 0
    assert getattr(x, device) == (device == "is_cpu")
