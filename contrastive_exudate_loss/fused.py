"""Whether the terms are computed by Triton kernels of their own, and what those have to know of the options."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_exudate_loss.contrast import has_triton

KERNELS = False  # on CUDA; off, since no GPU has run them yet
CHANNELS = 512  # at most, or a tile would not fit
OFFSETS = 2**31  # all below it, in an image and in the sums


class Density(NamedTuple):
    """What the kernels have to know of a density term."""

    threshold: float
    temperature: float


class Edge(NamedTuple):
    """What the kernels have to know of an edge term.

    inner, outer: radii in sparse and in dense patches.
    threshold: lesion fraction above which a patch is dense.
    """

    inner: tuple[int, int]
    outer: tuple[int, int]
    cross: bool
    isolate: bool
    threshold: float
    temperature: float


class Work(NamedTuple):
    """What the kernels do at once.

    sides: patch height and width, in pixels.
    ignore_index: value of ignored pixels, which the target's dtype can hold; None where none is ignored.
    sup_con: whether the contrast is sup_con.
    """

    sides: tuple[int, int]
    ignore_index: int | None
    sup_con: bool
    density: Density | None
    edge: Edge | None


def switched_on(features: Tensor) -> bool:
    """Whether kernels are to be used where they can: on CUDA with Triton, in eager code, not for fake tensors."""
    if not (KERNELS and features.is_cuda and type(features) is Tensor) or torch.compiler.is_compiling():
        return False
    return has_triton(features.device)


def kernels(features: Tensor, target: Tensor, sides: tuple[int, int]) -> Any:
    """Their torch.autograd.Function (fused_triton.Fused) where they can do these sizes; else None."""
    batch, classes, height, width = target.shape
    channels, rows, columns = features.shape[1:]
    sums = 3 * batch * classes * -(-height // sides[0]) * -(-width // sides[1]) * channels
    reach = sum((n - 1) * stride for n, stride in zip(features.shape[1:], features.stride()[1:], strict=True))
    largest = max(sums, reach, height * width, height * rows, width * columns)
    if channels > CHANNELS or largest >= OFFSETS:
        return None
    from contrastive_exudate_loss.fused_triton import Fused

    return Fused
