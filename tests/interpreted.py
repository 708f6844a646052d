"""Files of kernels once more, for Triton's interpreter, which runs on the CPU."""

import dataclasses
import functools
import importlib
import os
import sys
from unittest import mock

import pytest


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
