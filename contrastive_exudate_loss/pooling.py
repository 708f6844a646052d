"""Masked average pooling: the mean feature vector of many masks in every patch, in one operation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A mask of fewer pixels than this share is summed pixel by pixel where that is possible.
SPARSE = 1 / 16
# Features to sum at a time: little memory, enough for a CPU's threads.
CHUNK = 2**20


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
    weights = masks
    grid = -(-masks.shape[2] // sides[0]), -(-masks.shape[3] // sides[1])
    slots: list[int] = []
    for axis, side, patches in zip((2, 3), sides, grid, strict=True):
        features, weights = _aligned(features, weights, axis, side, patches, dtype)
        slots.append(weights.shape[axis] // patches)
    if features.device.type == "cpu":
        sums: Tensor = _sums_by_density(features, weights, slots)
    elif torch.compiler.is_compiling():
        sums = _sums_by_fusion(features.to(dtype), weights, slots)
    else:
        sums = _sums_by_product(features.to(dtype), weights, slots)
    return sums, _blocks(weights, slots).sum((3, 5), dtype=dtype)


def embeddings(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean feature vector of each mask; an empty mask gives the zero vector, to be left out by its count.

    Args:
        sums: (..., C), floating.
        counts: (...), floating.

    Returns:
        (..., C), floating.
    """
    return sums / counts.clamp(min=1).unsqueeze(-1)


def _sums_by_product(features: Tensor, weights: Tensor, slots: Sequence[int]) -> Tensor:
    """One matrix product per patch: shapes depend on shapes alone, but the features are copied on the way."""
    features = _padded(_padded(features, 2, weights.shape[2]), 3, weights.shape[3])
    blocks = _blocks(weights, slots).to(features.dtype)
    sums: Tensor = torch.einsum("bcyixj,btyixj->btyxc", _blocks(features, slots), blocks)
    return sums


def _sums_by_fusion(features: Tensor, weights: Tensor, slots: Sequence[int]) -> Tensor:
    """Products that a compiler fuses with their sums: one reading of the features, and nothing of their size stored."""
    features = _padded(_padded(features, 2, weights.shape[2]), 3, weights.shape[3])
    blocks = _blocks(features, slots)
    sums = [(blocks * _blocks(weight, slots)).sum((3, 5)) for weight in weights.split(1, 1)]
    return torch.stack(sums, 1).movedim(2, -1)


@torch.library.custom_op("contrastive_exudate_loss::masked_sums", mutates_args=())
def _sums_by_density(features: Tensor, weights: Tensor, slots: Sequence[int]) -> Tensor:
    """Each mask in the cheapest way, which depends on the data: see _by_density."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    grid = weights.shape[2] // slots[0], weights.shape[3] // slots[1]
    sums = features.new_zeros((*weights.shape[:2], *grid, features.shape[1]), dtype=dtype)
    few, level, rest = _by_density(features, weights)
    # Some patch rows at a time: what is formed on the way, such as a float32 copy, stays small.
    step = max(1, CHUNK // features[:, :, : slots[0]].numel())
    for y in range(0, grid[0], step) if level or rest else ():
        rows = slice(y * slots[0], (y + step) * slots[0])
        part, weight = features[:, :, rows].to(dtype), weights[:, :, rows]
        if level:
            part_sums = _padded(part, 3, weights.shape[3]).unflatten(3, (-1, slots[1])).sum(4)
            total = _padded(part_sums, 2, weight.shape[2]).unflatten(2, (-1, slots[0])).sum(3)
            sums[:, level, y : y + step] = _heights(weights, level) * total.movedim(1, -1).unsqueeze(1)
        if rest:
            sums[:, rest, y : y + step] = _sums_by_product(part, weight[:, rest], slots)
    for t in few:
        b, i, j = weights[:, t].nonzero(as_tuple=True)
        # In float64 torch adds in order; in float32 its threads race, and the last bits vary from run to run.
        total = torch.zeros_like(sums[:, t], dtype=torch.float64)
        vectors = (features[b, :, i, j] * weights[b, t, i, j].unsqueeze(1)).double()
        sums[:, t] = total.index_put_((b, i // slots[0], j // slots[1]), vectors, accumulate=True)
    return sums


@_sums_by_density.register_fake
def _(features: Tensor, weights: Tensor, slots: Sequence[int]) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    grid = weights.shape[2] // slots[0], weights.shape[3] // slots[1]
    return features.new_empty((*weights.shape[:2], *grid, features.shape[1]), dtype=dtype)


@torch.library.custom_op("contrastive_exudate_loss::masked_sums_backward", mutates_args=())
def _spread(
    gradient: Tensor, weights: Tensor, slots: Sequence[int], rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of the features (B, C, rows, columns) from that of the sums, written once."""
    few, level, rest = _by_density(gradient.new_empty(1, 1, rows, columns), weights)
    if level:
        patches = (_heights(weights, level) * gradient[:, level]).sum(1).movedim(-1, 1).to(dtype)
        patch_row, patch_column = (
            torch.arange(n, device=gradient.device) // slot for n, slot in zip((rows, columns), slots, strict=True)
        )
        spread = patches.index_select(3, patch_column).index_select(2, patch_row)
    else:
        spread = gradient.new_zeros((len(gradient), gradient.shape[-1], rows, columns), dtype=dtype)
    for y, row in enumerate(_patch_rows(weights, slots) if rest else ()):
        blocks = _blocks(weights[:, rest, row], slots)[:, :, 0].to(gradient.dtype)
        block = torch.einsum("btxc,btixj->bcixj", gradient[:, rest, y], blocks)
        part = spread[:, :, row]
        part += block.flatten(3, 4)[:, :, : part.shape[2], :columns]
    for t in few:
        b, i, j = weights[:, t].nonzero(as_tuple=True)
        vectors = gradient[b, t, i // slots[0], j // slots[1]] * weights[b, t, i, j].unsqueeze(1)
        spread.movedim(1, -1)[b, i, j] += vectors.to(dtype)
    return spread


@_spread.register_fake
def _(gradient: Tensor, weights: Tensor, slots: Sequence[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty((len(gradient), gradient.shape[-1], rows, columns), dtype=dtype)


def _keep_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weights, ctx.slots = inputs
    ctx.features = *features.shape[2:], features.dtype
    ctx.save_for_backward(weights)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _spread(gradient, *ctx.saved_tensors, ctx.slots, *ctx.features), None, None


_sums_by_density.register_autograd(_backward, setup_context=_keep_weights)


def _by_density(features: Tensor, weights: Tensor) -> tuple[list[int], list[int], list[int]]:
    """The masks to be summed pixel by pixel, those that are constant, to be added up whole, and all others."""
    few: list[int] = []
    level: list[int] = []
    rest: list[int] = []
    for t, weight in enumerate(weights[..., : features.shape[2], : features.shape[3]].unbind(1)):
        if int(weight.count_nonzero()) <= SPARSE * weight.numel():
            few.append(t)
        else:
            (level if bool((weight == weight[0, 0, 0]).all()) else rest).append(t)
    return few, level, rest


def _heights(weights: Tensor, level: list[int]) -> Tensor:
    return weights[0, level, 0, 0, None, None, None]


def _patch_rows(weights: Tensor, slots: Sequence[int]) -> list[slice]:
    return [slice(start, start + slots[0]) for start in range(0, weights.shape[2], slots[0])]


def _blocks(tensor: Tensor, slots: Sequence[int]) -> Tensor:
    """(B, N, rows, columns) as (B, N, gh, rows per patch, gw, columns per patch)."""
    blocks: Tensor = tensor.unflatten(3, (-1, slots[1])).unflatten(2, (-1, slots[0]))
    return blocks


def _aligned(
    features: Tensor, weights: Tensor, axis: int, side: int, patches: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Features and weights resampled along an axis to the same number of slots per patch, each slot in one cell."""
    pixels, cells = weights.shape[axis], features.shape[axis]
    stride = pixels // cells
    if pixels % cells == 0 and side % stride == 0:
        weights = _padded(weights, axis, patches * side)
        if stride > 1:
            weights = weights.unflatten(axis, (-1, stride)).sum(axis + 1, dtype=dtype)
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
    placed = weights.new_zeros(shape, dtype=dtype).index_add_(axis, slot, weights.to(dtype))
    cell = (starts[:, None] + torch.arange(slots, device=features.device)).clamp(max=cells - 1).flatten()
    return features.index_select(axis, cell), placed


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    missing = size - tensor.shape[axis]
    return F.pad(tensor, (0, 0) * (3 - axis) + (0, missing)) if missing else tensor
