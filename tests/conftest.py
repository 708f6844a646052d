"""Profiles of hypothesis and the skipping of tests that need a GPU."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# A program that needs more than the tests are installed with; --doctest-modules would import it.
collect_ignore = ["long/mutants.py"]
# Slow loops are the oracle: no deadline, and the same cases in each run of CI.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")
# The tensors are small: more threads would only wait for one another.
torch.set_num_threads(1)


def pytest_runtest_setup():
    torch.manual_seed(0)  # so that no test depends on which ran before it


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
