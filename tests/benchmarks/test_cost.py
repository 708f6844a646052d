"""What training costs is measured rightly: times, the loss's share, memory."""

import gc
import sys
import time

import numpy as np
import pytest
import torch
from measure import cost
from torch import nn

from contrastive_exudate_loss import FeatureTap

CPU = torch.device("cpu")


def test_quartiles_leave_the_warm_up_out():
    counted = [5.0, 1.0, 2.0, 9.0, 4.0, 4.5]
    result = cost.quartiles([100.0] * cost.WARM_UP + counted)
    assert result == pytest.approx(np.percentile(counted, [50, 25, 75]))


@pytest.mark.parametrize("seconds", [[3.0], [9.0, 3.0], [9.0, 9.0, 3.0]])
def test_a_single_time_left_is_median_and_quartiles(seconds):
    assert cost.quartiles(seconds) == (3, 3, 3)


def test_timed_gives_the_result_and_the_seconds():
    def slow_sum(one, other):
        time.sleep(0.05)
        return one + other

    result, seconds = cost.timed(CPU, slow_sum, torch.tensor(1), torch.tensor(2))
    assert result == 3
    assert seconds >= 0.05


@pytest.mark.parametrize("tapped", [False, True])
def test_loss_share_is_the_time_of_the_criterion_over_that_of_the_step(tapped):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1))
    seen = []

    def criterion(logits, target, *features):
        seen.append((logits.shape, *(feature.shape for feature in features)))
        assert all(leaf.is_leaf and leaf.requires_grad for leaf in (logits, *features))
        time.sleep(0.02)
        return logits.mean() + sum(feature.mean() for feature in features)

    def step(images, target):
        model(images)
        time.sleep(0.08)
        return target.mean()

    batches = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8))] * (cost.WARM_UP + 3)
    share = cost.loss_share(step, model, criterion, FeatureTap(model) if tapped else None, batches)
    assert 0.1 < share < 0.6  # 0.02 / 0.08, on a machine that may be busy
    assert set(seen) == {((2, 1, 8, 8), (2, 4, 8, 8))[: 1 + tapped]}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak memory")
def test_peak_memory_sees_what_was_freed_and_forgets_what_came_before():
    memory = cost.PeakMemory(CPU)
    before = memory.read()
    torch.ones(2**26)  # 256 MiB
    peak = memory.read()
    assert peak - before > 200e6
    if memory.meaning == "resident, whole process":
        assert cost.PeakMemory(CPU).read() < peak - 100e6


def test_extra_memory_leaves_out_what_earlier_code_left_in_cycles():
    def leave_one():
        cycle = [torch.ones(2**16)]
        cycle.append(cycle)

    cost.extra_memory(CPU, leave_one)  # so that the profiler counts when this memory is freed
    calls = []

    def work():
        if calls:
            gc.collect()  # as Python may do at any time
        calls.append(0)
        return torch.ones(16)

    assert cost.extra_memory(CPU, work) == (64, 64)


def test_peak_memory_that_cannot_be_reset_says_so(monkeypatch):
    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(cost.Path, "write_text", refuse)
    memory = cost.PeakMemory(CPU)
    if cost.resource is not None:
        assert memory.meaning == "resident, since the process began"
        assert memory.read() > 10e6
    monkeypatch.setattr(cost, "resource", None)
    memory = cost.PeakMemory(CPU)
    assert (memory.meaning, memory.read()) == ("not measured", None)
