"""Whether the terms are computed by Triton kernels of their own, and what those have to know of the options."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_exudate_loss.contrast import has_triton

KERNELS = False  # on CUDA; off, since no GPU has run them yet
MOST_CHANNELS = 1024  # or a tile would not fit
OFFSETS = 2**31  # all below it, in an image and in the sums


class Density(NamedTuple):
    """What the kernels have to know of a density term.

    most: how many embeddings of each label are taken; 0 for all.
    at_random: whether these are drawn; else the densest and the sparsest are taken.
    """

    threshold: float
    temperature: float
    most: int = 0
    at_random: bool = False


class Edge(NamedTuple):
    """What the kernels have to know of an edge term.

    inner, outer: radii in sparse and in dense patches.
    threshold: lesion fraction above which a patch is dense.
    per_image: whether a band has one embedding an image, else one a patch.
    most: how many embeddings of each label are drawn; 0 for all.
    """

    inner: tuple[int, int]
    outer: tuple[int, int]
    cross: bool
    isolate: bool
    threshold: float
    temperature: float
    per_image: bool = False
    most: int = 0


class Work(NamedTuple):
    """What the kernels do at once.

    sides: patch height and width, in pixels.
    ignore_index: value of ignored pixels, which the target's dtype can hold; None where none is ignored.
    sup_con: whether the contrast is sup_con.
    ranks: how many embeddings of a class each process has for the density and for the edge term, where all processes
        contrast theirs together; None where each contrasts its own.
    """

    sides: tuple[int, int]
    ignore_index: int | None
    sup_con: bool
    density: Density | None
    edge: Edge | None
    ranks: tuple[tuple[int, int], ...] | None = None

    def lengths(self, target: Tensor) -> tuple[int, int]:
        """How many embeddings a class of the target can have for the density and for the edge term."""
        patches = patch_count(target, self.sides)
        of_edge = 0 if self.edge is None else 2 * (len(target) if self.edge.per_image else patches)
        return 0 if self.density is None else patches, of_edge


def patch_count(target: Tensor, sides: tuple[int, int]) -> int:
    """How many patches the images of a target (B, K, H, W) have."""
    batch, _, height, width = target.shape
    return batch * -(-height // sides[0]) * -(-width // sides[1])


def switched_on(features: Tensor) -> bool:
    """Whether kernels are to be used where they can: on CUDA, in eager code, not for fake tensors."""
    return KERNELS and features.is_cuda and type(features) is Tensor and not torch.compiler.is_compiling()


def runs(features: Tensor) -> bool:
    """Whether kernels are switched on and Triton works."""
    return switched_on(features) and has_triton(features.device)


def kernels(features: Tensor, target: Tensor, sides: tuple[int, int]) -> Any:
    """Their torch.autograd.Function (fused_triton.Fused) where Triton works and they can do these sizes; else None."""
    classes, height, width = target.shape[1:]
    channels, rows, columns = features.shape[1:]
    sums = 3 * classes * patch_count(target, sides) * channels
    reach = sum((n - 1) * stride for n, stride in zip(features.shape[1:], features.stride()[1:], strict=True))
    largest = max(sums, reach, height * width, height * rows, width * columns)
    if channels > MOST_CHANNELS or largest >= OFFSETS or not has_triton(features.device):
        return None
    from contrastive_exudate_loss.fused_triton import Fused, shared_memory

    gpu: Any = torch.cuda.get_device_properties(features.device)
    return Fused if shared_memory(channels, max(features.itemsize, 4)) <= gpu.shared_memory_per_block_optin else None
