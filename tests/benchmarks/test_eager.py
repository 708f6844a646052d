"""Launches of eager code on CUDA are those of the page, which is that of the recorded figures."""

import json
from pathlib import Path

import pytest
import torch
from kernels import eager_counts, eager_table, host_table
from overhead.eager import Launch, eager_launches
from overhead.host import host_microseconds

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "benchmarks/results/kernels.json").read_text())


def test_eager_code_launches_as_much_as_is_recorded():
    assert eager_counts() == RECORDED["eager"]


def test_the_page_shows_the_recorded_figures():
    page = (ROOT / "docs/performance-cuda.md").read_text()
    assert eager_table(RECORDED["eager"]) in page
    assert host_table(RECORDED["host"]) in page


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
