"""The code that torch.compile generates for CUDA stores nothing of the features' size but their gradient."""

import copy
import functools
import math
import re
from pathlib import Path

import pytest
import torch
from batches import MODULES
from overhead.launches import launches, meta_batch

from contrastive_exudate_loss import CombinedExudateLoss

pytestmark = pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")

CONTRAST = "torch.ops.contrastive_exudate_loss.contrast.default"
CRITERIA = {
    "density": MODULES["density"],
    "edge": MODULES["edge"],
    "combined": CombinedExudateLoss.paper(),
    "ignoring": CombinedExudateLoss(0.02, 0.1, ignore_index=-1),
}
CASES = [
    ("density", 1, torch.float32),
    ("edge", 1, torch.float32),
    ("combined", 1, torch.float32),
    ("ignoring", 1, torch.float16),
    ("combined", 4, torch.float32),
]
case = pytest.mark.parametrize(("name", "stride", "dtype"), CASES)


@functools.cache
def generated(name, stride, dtype):
    logits, target, features = meta_batch(512, 32, stride, dtype)
    inputs = (features, target) if name in ("density", "edge") else (logits, target, features)
    return launches(copy.deepcopy(CRITERIA[name]), *inputs), features


def sizes(found):
    return [math.prod(shape) * dtype.itemsize for shape, dtype in found.buffers]


@case
def test_only_their_gradient_is_of_the_size_of_the_features(name, stride, dtype):
    found, features = generated(name, stride, dtype)
    # Masks are of the target's size, to which features at a stride of 4 are not so large.
    limit = features.nbytes / (8 if stride == 1 else 2)
    assert max(sizes(found["forward"])) <= limit
    assert [size for size in sizes(found["backward"]) if size > limit] == [features.nbytes]


@case
def test_all_but_the_contrast_is_made_into_kernels(name, stride, dtype):
    found, _ = generated(name, stride, dtype)
    others = [operator for operator in found["forward"].others if operator != CONTRAST]
    assert all("sort" in operator for operator in others), others
    assert found["backward"].others == []
    if name == "combined":
        page = (Path(__file__).parents[2] / "docs/performance.md").read_text()
        for direction in ("forward", "backward"):
            counts = len(found[direction].kernels), len(found[direction].others)
            assert re.search(rf"\| combined +\| {stride} +\| {direction} +\| {counts[0]} +\| {counts[1]} ", page)
