"""Triton's kernels in its interpreter, which runs on the CPU: their files, and the losses with them."""

import contextlib
import dataclasses
import functools
import importlib
import os
import sys
from unittest import mock

import pytest
import torch

from contrastive_exudate_loss import fused

kernels_or_none = fused.kernels  # before any test puts another in its place


@functools.cache
def interpreted(name):
    """The module of the package, made for the interpreter; what others import of that name is left alone."""
    pytest.importorskip("triton")
    own = [n for n in sys.modules if n.endswith("_triton") or (n.startswith("triton") and "triton._C" not in n)]
    # Triton's own functions are made for the interpreter or for a GPU when they are imported.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), mock.patch.dict(sys.modules):
        for loaded in own:
            del sys.modules[loaded]
        module = importlib.import_module(f"contrastive_exudate_loss.{name}")
        builder = sys.modules["triton.runtime.interpreter"].interpreter_builder
        # Looking for integers that overflow takes half the time.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
        return module


@contextlib.contextmanager
def new_tensors_hold_nan():
    """Whoever reads what nobody wrote finds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def kernels_on(device):
    """The kernels inside, in the interpreter or on CUDA; gives the work of each call."""
    works = []
    if device == "cuda":
        function, patches = kernels_or_none, [mock.patch.object(fused, "KERNELS", True)]
    else:
        pull_triton = importlib.import_module("contrastive_exudate_loss.pull_triton")
        module = interpreted("fused_triton")
        sizes = {"PIXEL_BLOCK": 16, "CHANNEL_BLOCK": 16, "CELL_BLOCK": 16, "ROWS": 16, "COMPACTED": 8, "SCANNED": 8}
        sizes |= {"COMPARED": 8, "LOGITS": 64}
        patches = [mock.patch.multiple(module, **sizes)]  # so that there are several of each
        patches += [mock.patch.object(fused, name, return_value=True) for name in ("switched_on", "runs")]
        patches += [new_tensors_hold_nan()]
        advanced = interpreted("pull_triton").advanced_by_triton
        patches += [mock.patch.object(pull_triton, "advanced_by_triton", advanced)]

        def function(*_):
            return module.Fused

    class Counted:
        @staticmethod
        def apply(features, logits, target, work, *weights):
            works.append((work, logits is not None))
            return function(features, target, work.sides).apply(features, logits, target, work, *weights)

    with contextlib.ExitStack() as stack:
        for patch in (*patches, mock.patch.object(fused, "kernels", return_value=Counted)):
            stack.enter_context(patch)
        yield works
