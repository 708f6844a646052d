"""Sums of the feature vectors under many masks, in every patch and in one operation, and the pixels summed."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_exudate_loss.slots import blocks_of, filled_up, layout_of, resampled, slot_weights

# A mask that covers at most this fraction of the features' cells is summed pixel by pixel on the CPU.
SCATTERED = 0.125
# Features to sum at a time if they are copied on the way, and if they are not: little memory, but enough work for a
# CPU's threads.
COPIED, READ = 1_048_576, 8_388_608


def masked_sums(features: Tensor, masks: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sum of the feature vectors under each mask in each patch, and the number of pixels summed.

    Pixel (i, j) of the (H, W) masks has the feature vector at (floor(i h / H), floor(j w / W)).
    The upsampled features are never formed: the masks are pooled down to counts per feature cell instead, and the
    cells are summed, weighted by their counts.
    The sums are linear in the features, so the backward pass needs only the counts.

    Args:
        features: (B, C, h, w), floating.
        masks: (B, T, H, W), bool.
        sides: patch height and width, in target pixels, at most those of the masks.

    Returns:
        sums: (B, T, gh, gw, C), float64 for float64 features, else float32.
        counts: (B, T, gh, gw), of the same dtype, without a gradient.
    """
    # Choosing by the number of pixels means looking at them, which only on the CPU waits for nothing.
    if features.is_cpu:
        sums, counts = _SumsByContent.apply(features, masks, sides)
    elif torch.compiler.is_compiling():
        sums, counts = _sums_by_shape(features, masks, sides, _fused)
    else:
        sums, counts = _sums_by_shape(features, masks, sides, _product)
    return sums, counts.detach()


def _sums_by_shape(
    features: Tensor, masks: Tensor, sides: Sequence[int], pool: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
) -> tuple[Tensor, Tensor]:
    """All masks in the same way, so that no shape depends on data."""
    features = features.to(_dtype(features))
    layout = layout_of(masks.shape[2:], features.shape[2:], sides, features.device)
    weights = slot_weights(masks, layout, features.dtype)
    slots = [axis.slots for axis in layout]
    return pool(filled_up(resampled(features, layout), weights), weights, slots), _counts(
        weights, slots, features.dtype
    )


def _product(features: Tensor, weights: Tensor, slots: Sequence[int]) -> Tensor:
    """One matrix product per patch; the features are copied on the way."""
    blocks = blocks_of(weights, slots).to(features.dtype)
    sums: Tensor = torch.einsum("bcyixj,btyixj->btyxc", blocks_of(features, slots), blocks)
    return sums


def _fused(features: Tensor, weights: Tensor, slots: Sequence[int]) -> Tensor:
    """Products that a compiler fuses with their sums: features are read once, and nothing of their size is stored."""
    blocks = blocks_of(features, slots)
    sums = [(blocks * blocks_of(weight, slots)).sum((3, 5)) for weight in weights.split(1, 1)]
    return torch.stack(sums, 1).movedim(2, -1)


class _SumsByContent(torch.autograd.Function):
    """Sums and counts, each mask in the cheapest way."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, masks: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
        sums, counts, weights = _chosen(_sums_by_content, features)(features, masks, sides)
        ctx.sizes = masks.shape[2:], features.shape[2:], sides, features.dtype
        ctx.save_for_backward(weights)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(gradient, *ctx.saved_tensors, *ctx.sizes), None, None


class _Spread(torch.autograd.Function):
    """Gradient of the features, from that of the sums; has no derivative itself, which nobody needs."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Any) -> Tensor:
        spread: Tensor = _chosen(_features_gradient, gradient)(gradient, *inputs)
        return spread

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("the contrastive terms have no second derivative; differentiate them once")


def _sums_by_content(features: Tensor, masks: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Each mask in the cheapest way, which depends on the data.

    Returns sums, counts and the weights, for the backward pass.
    """
    dtype = _dtype(features)
    layout = layout_of(masks.shape[2:], features.shape[2:], sides, features.device)
    weights, slots = slot_weights(masks, layout, dtype), [axis.slots for axis in layout]
    features, channels = resampled(features, layout), features.shape[1]
    grid = weights.shape[2] // slots[0], weights.shape[3] // slots[1]
    sums = features.new_zeros((*weights.shape[:2], *grid, channels), dtype=dtype)
    scattered, constant, other = _by_content(weights, features.shape[2:])
    read = READ if features.dtype == dtype else COPIED
    for rows, y in _row_chunks(features, slots, grid[0], read) if constant else ():
        part = filled_up(features[:, :, rows].to(dtype), weights[:, :, rows])
        totals = part.unflatten(2, (-1, slots[0])).sum(3).unflatten(3, (-1, slots[1])).sum(4)
        sums[:, constant, y] = _heights(weights, constant) * totals.movedim(1, -1).unsqueeze(1)
    for rows, y in _row_chunks(features, slots, grid[0], COPIED) if other else ():
        part = filled_up(features[:, :, rows].to(dtype), weights[:, :, rows])
        sums[:, other, y] = _product(part, weights[:, other, rows], slots)
    for t in scattered:
        # In float64 torch adds in order; in float32 its threads race, and the last bits vary from run to run.
        total = torch.zeros_like(sums[:, t], dtype=torch.float64)
        for b, i, j in _pixels(weights[:, t], channels):
            vectors = (features[b, :, i, j] * weights[b, t, i, j].unsqueeze(1)).double()
            total.index_put_((b, i // slots[0], j // slots[1]), vectors, accumulate=True)
        sums[:, t] = total
    return sums, _counts(weights, slots, dtype), weights.clone() if weights is masks else weights


def _sums_sizes(features: Tensor, masks: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The sizes of what _sums_by_content returns, for the compiler."""
    layout = layout_of(masks.shape[2:], features.shape[2:], sides, features.device)
    weights = slot_weights(masks, layout, _dtype(features))
    counts = _counts(weights, [axis.slots for axis in layout], _dtype(features))
    return counts.new_empty((*counts.shape, features.shape[1])), counts, torch.empty_like(weights)


def _features_gradient(
    gradient: Tensor,
    weights: Tensor,
    pixels: Sequence[int],
    size: Sequence[int],
    sides: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the features (B, C, *size) from that of the sums, written once."""
    layout = layout_of(pixels, size, sides, gradient.device)
    slots = [axis.slots for axis in layout]
    rows, columns = (length if axis.cell is None else len(axis.cell) for axis, length in zip(layout, size, strict=True))
    # Cells in several patches are added up in float32 before they are rounded.
    exact = all(axis.cell is None for axis in layout)
    batch, *_, channels = gradient.shape
    spread = gradient.new_empty((batch, channels, rows, columns), dtype=dtype if exact else gradient.dtype)
    scattered, constant, other = _by_content(weights, (rows, columns))
    if constant:
        _write(spread, (_heights(weights, constant) * gradient[:, constant]).sum(1).movedim(-1, 1), slots)
    else:
        spread.zero_()
    for part, y in _row_chunks(spread, slots, weights.shape[2] // slots[0], COPIED) if other else ():
        blocks = blocks_of(weights[:, other, part], slots).to(gradient.dtype)
        block = torch.einsum("btyxc,btyixj->bcyixj", gradient[:, other, y], blocks).flatten(4, 5).flatten(2, 3)
        spread[:, :, part] += block[:, :, : spread[:, :, part].shape[2], :columns]
    anywhere = functools.reduce(torch.logical_or, [weights[:, t] for t in scattered]) if scattered else None
    for b, i, j in () if anywhere is None else _pixels(anywhere, channels):
        vectors = gradient.new_zeros(len(b), channels)
        for t in range(weights.shape[1]):
            vectors.addcmul_(gradient[b, t, i // slots[0], j // slots[1]], weights[b, t, i, j, None].to(vectors.dtype))
        spread.movedim(1, -1)[b, i, j] = vectors.to(spread.dtype)
    for n, axis in enumerate(layout, 2):
        if axis.cell is not None:
            shape = [*spread.shape[:n], size[n - 2], *spread.shape[n + 1 :]]
            spread = spread.new_zeros(shape).index_add_(n, axis.cell, spread)
    return spread.to(dtype)


def _gradient_sizes(
    gradient: Tensor,
    weights: Tensor,
    pixels: Sequence[int],
    size: Sequence[int],
    sides: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return gradient.new_empty((len(gradient), gradient.shape[-1], *size), dtype=dtype)


# Operators for compiled code, which is slow at masks; calling one costs eager code some 60 microseconds.
_OPERATORS = {
    _sums_by_content: torch.library.custom_op(
        "contrastive_exudate_loss::masked_sums",
        _sums_by_content,
        mutates_args=(),
        schema="(Tensor features, Tensor masks, int[] sides) -> (Tensor, Tensor, Tensor)",
    ),
    _features_gradient: torch.library.custom_op(
        "contrastive_exudate_loss::masked_sums_backward",
        _features_gradient,
        mutates_args=(),
        schema="(Tensor gradient, Tensor weights, int[] pixels, int[] size, int[] sides, ScalarType dtype) -> Tensor",
    ),
}
_OPERATORS[_sums_by_content].register_fake(_sums_sizes)
_OPERATORS[_features_gradient].register_fake(_gradient_sizes)


def _chosen(function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """The function itself; in compiled code and for fake tensors, its operator."""
    traced = torch.compiler.is_compiling() or type(tensor) is not Tensor
    return _OPERATORS[function] if traced else function


class _Content(NamedTuple):
    """Masks by what they hold.

    scattered: masks of few pixels, to be summed pixel by pixel.
    constant: masks with one weight everywhere, whose patches are summed whole.
    other: masks to multiply with the features.
    """

    scattered: list[int]
    constant: list[int]
    other: list[int]


def _by_content(weights: Tensor, size: Sequence[int]) -> _Content:
    content = _Content([], [], [])
    for t, weight in enumerate(weights[..., : size[0], : size[1]].unbind(1)):
        count = int(weight.count_nonzero())
        if count <= SCATTERED * weight.numel():
            content.scattered.append(t)
        elif count == weight.numel() and (weight.dtype == torch.bool or bool(weight.min() == weight.max())):
            content.constant.append(t)
        else:
            content.other.append(t)
    return content


def _pixels(weights: Tensor, channels: int) -> Iterator[tuple[Tensor, ...]]:
    """Indices of the non-zero elements of (B, rows, columns) weights, some at a time."""
    if weights.dtype != torch.bool or weights.shape[2] % 8 or weights.stride(2) != 1:
        indices = weights.nonzero(as_tuple=True)
    else:
        # Eight neighbours are looked at in one go.
        b, i, eight = weights.view(torch.int64).nonzero(as_tuple=True)
        found, n = weights.unflatten(2, (-1, 8))[b, i, eight].nonzero(as_tuple=True)
        indices = b[found], i[found], 8 * eight[found] + n
    return zip(*(index.split(max(1, COPIED // (4 * channels))) for index in indices), strict=True)


def _write(image: Tensor, patches: Tensor, slots: Sequence[int]) -> None:
    """Fill the (B, C, rows, columns) image with the value of each patch, (B, C, gh, gw); the last may be partial."""
    axes = []
    for length, slot in zip(image.shape[2:], slots, strict=True):
        whole, left = divmod(length, slot)
        parts = [(slice(0, whole * slot), slice(0, whole), slot), (slice(whole * slot, None), slice(whole, None), left)]
        axes.append(parts[: 2 if left else 1])
    for (rows, y, height), (columns, x, width) in itertools.product(*axes):
        part = image[:, :, rows, columns].unflatten(3, (-1, width)).unflatten(2, (-1, height))
        part.copy_(patches[:, :, y, None, x, None])


def _heights(weights: Tensor, constant: list[int]) -> Tensor:
    return weights[0, constant, 0, 0, None, None, None]


def _row_chunks(features: Tensor, slots: Sequence[int], grid_rows: int, limit: int) -> list[tuple[slice, slice]]:
    """Rows of the features and of the patches, some patch rows at a time."""
    step = max(1, limit // features[:, :, : slots[0]].numel())
    starts = range(0, grid_rows, step)
    patch_rows = [slice(start, min(start + step, grid_rows)) for start in starts]
    return [(slice(y.start * slots[0], y.stop * slots[0]), y) for y in patch_rows]


def _counts(weights: Tensor, slots: Sequence[int], dtype: torch.dtype) -> Tensor:
    return blocks_of(weights, slots).sum((3, 5), dtype=dtype)


def _dtype(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)
