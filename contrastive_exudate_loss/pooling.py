"""Masked average pooling: the mean feature vector of many masks in every patch, in one operation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A mask of fewer pixels than this share is summed pixel by pixel where that is possible.
SPARSE = 1 / 16


def masked_sums(features: Tensor, masks: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sum of the feature vectors under each mask in each patch, and the number of pixels summed.

    Pixel (i, j) of the (H, W) masks has the feature vector at (floor(i h / H), floor(j w / W)).
    The upsampled features are never formed: the masks are pooled down to counts per feature cell instead, and the
    cells are summed, weighted by their counts.
    It is linear in the features, so its backward needs only the counts.

    Args:
        features: (B, C, h, w), floating.
        masks: (B, T, H, W), bool.
        sides: patch height and width, in target pixels.

    Returns:
        sums: (B, T, gh, gw, C), float64 for float64 features, else float32.
        counts: (B, T, gh, gw), of the same dtype.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    features, weights = features.to(dtype), masks.to(dtype)
    grid = -(-masks.shape[2] // sides[0]), -(-masks.shape[3] // sides[1])
    for axis, side, patches in zip((2, 3), sides, grid, strict=True):
        features, weights = _aligned(features, weights, axis, side, patches)
    slots = weights.shape[2] // grid[0], weights.shape[3] // grid[1]
    # Choosing by the number of pixels means looking at them: only on the CPU does that wait for nothing.
    look = features.device.type == "cpu" and not torch.compiler.is_compiling()
    sums = (_sums_by_density if look else _sums_by_product)(features, weights, slots)
    return sums, _blocks(weights, slots).sum((3, 5))


def embeddings(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean feature vector of each mask; an empty mask gives the zero vector, to be left out by its count.

    Args:
        sums: (..., C), floating.
        counts: (...), floating.

    Returns:
        (..., C), floating.
    """
    return sums / counts.clamp(min=1).unsqueeze(-1)


def _sums_by_product(features: Tensor, weights: Tensor, slots: tuple[int, int]) -> Tensor:
    """One matrix product per patch: shapes depend on shapes alone."""
    features = _padded(_padded(features, 2, weights.shape[2]), 3, weights.shape[3])
    sums: Tensor = torch.einsum("bcyixj,btyixj->btyxc", _blocks(features, slots), _blocks(weights, slots))
    return sums


def _sums_by_density(features: Tensor, weights: Tensor, slots: tuple[int, int]) -> Tensor:
    """Each mask in the cheapest way: a constant one by adding up, a sparse one pixel by pixel, others by product."""
    few: list[int] = []
    level: list[int] = []
    rest: list[int] = []
    for t, weight in enumerate(weights[..., : features.shape[2], : features.shape[3]].unbind(1)):
        if int(weight.count_nonzero()) <= SPARSE * weight.numel():
            few.append(t)
        else:
            (level if bool((weight == weight[0, 0, 0]).all()) else rest).append(t)
    sums: Tensor = _SumsByDensity.apply(features, weights, slots, few, level, rest)
    return sums


class _SumsByDensity(torch.autograd.Function):
    """Reads the features once for each kind of mask, and writes their gradient once."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weights: Tensor,
        slots: tuple[int, int],
        few: list[int],
        level: list[int],
        rest: list[int],
    ) -> Tensor:
        ctx.slots, ctx.few, ctx.level, ctx.rest = slots, few, level, rest
        ctx.size = features.shape
        grid = weights.shape[2] // slots[0], weights.shape[3] // slots[1]
        sums = features.new_zeros(weights.shape[0], weights.shape[1], *grid, features.shape[1])
        height = weights[0, level, 0, 0, None, None, None]
        if level:
            inner = _padded(features, 3, weights.shape[3]).unflatten(3, (grid[1], slots[1])).sum(4)
            total = _padded(inner, 2, weights.shape[2]).unflatten(2, (grid[0], slots[0])).sum(3)
            sums[:, level] = height * total.movedim(1, -1).unsqueeze(1)
        # A patch row at a time: the product copies what it sums, and all the features would be too much.
        for y, rows in enumerate(_patch_rows(weights, slots) if rest else ()):
            sums[:, rest, y] = _sums_by_product(features[:, :, rows], weights[:, rest, rows], slots)[:, :, 0]
        pixels = []
        for t in few:
            b, i, j = weights[:, t].nonzero(as_tuple=True)
            weight = weights[b, t, i, j].unsqueeze(1)
            # In float64 torch adds in order; in float32 its threads race, and the last bits vary from run to run.
            total = torch.zeros_like(sums[:, t], dtype=torch.float64)
            vectors = (features[b, :, i, j] * weight).double()
            sums[:, t] = total.index_put_((b, i // slots[0], j // slots[1]), vectors, accumulate=True)
            pixels += [b, i, j, weight]
        ctx.save_for_backward(weights[:, rest], height, *pixels)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        spread: Tensor
        weights, height, *pixels = ctx.saved_tensors
        slots = ctx.slots
        rows, columns = ctx.size[2:]
        if ctx.level:
            patches = (height * gradient[:, ctx.level]).sum(1).movedim(-1, 1).contiguous()
            # Torch's "nearest" divides by the factor in floating point and errs at 41, 47, 55 and more.
            spread = F.interpolate(patches, scale_factor=slots, mode="nearest-exact")[..., :rows, :columns].contiguous()
        else:
            spread = gradient.new_zeros(ctx.size)
        for y, row in enumerate(_patch_rows(weights, slots) if ctx.rest else ()):
            block = torch.einsum(
                "btxc,btixj->bcixj", gradient[:, ctx.rest, y], _blocks(weights[:, :, row], slots)[:, :, 0]
            )
            part = spread[:, :, row]
            part += block.flatten(3, 4)[:, :, : part.shape[2], :columns]
        for n, t in enumerate(ctx.few):
            b, i, j, weight = pixels[4 * n : 4 * n + 4]
            spread.movedim(1, -1)[b, i, j] += gradient[b, t, i // slots[0], j // slots[1]] * weight
        return spread, None, None, None, None, None


def _patch_rows(weights: Tensor, slots: tuple[int, int]) -> list[slice]:
    return [slice(start, start + slots[0]) for start in range(0, weights.shape[2], slots[0])]


def _blocks(tensor: Tensor, slots: tuple[int, int]) -> Tensor:
    """(B, N, rows, columns) as (B, N, gh, rows per patch, gw, columns per patch)."""
    blocks: Tensor = tensor.unflatten(3, (-1, slots[1])).unflatten(2, (-1, slots[0]))
    return blocks


def _aligned(features: Tensor, weights: Tensor, axis: int, side: int, patches: int) -> tuple[Tensor, Tensor]:
    """Features and weights resampled along an axis to the same number of slots per patch, each slot in one cell."""
    pixels, cells = weights.shape[axis], features.shape[axis]
    stride = pixels // cells
    if pixels % cells == 0 and side % stride == 0:
        slots = patches * (side // stride)
        weights = _padded(weights, axis, slots * stride)
        if stride > 1:
            weights = weights.unflatten(axis, (slots, stride)).sum(axis + 1)
        return features, weights
    # A cell may straddle patches: give each patch a slot for every cell it touches, the first at the same place.
    slots = 1 + max(
        (min(start + side, pixels) - 1) * cells // pixels - start * cells // pixels for start in range(0, pixels, side)
    )
    starts = torch.arange(0, pixels, side, device=features.device) * cells // pixels
    pixel = torch.arange(pixels, device=features.device)
    patch = pixel // side
    slot = patch * slots + pixel * cells // pixels - starts[patch]
    shape = list(weights.shape)
    shape[axis] = patches * slots
    weights = weights.new_zeros(shape).index_add_(axis, slot, weights)
    cell = (starts[:, None] + torch.arange(slots, device=features.device)).clamp(max=cells - 1).flatten()
    return features.index_select(axis, cell), weights


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    missing = size - tensor.shape[axis]
    return F.pad(tensor, (0, 0) * (3 - axis) + (0, missing)) if missing else tensor
