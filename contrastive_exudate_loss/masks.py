"""Target to masks: which pixels are lesion and which are valid, and what each term pools."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_exudate_loss import _checks
from contrastive_exudate_loss.morphology import inner_contour, outer_contour
from contrastive_exudate_loss.patches import at_pixels, cut_patches, lesion_fraction, paste_patches, patch_counts


class Regions(NamedTuple):
    """What a term pools.

    masks: one or several (B, K, H, W), bool.
    fraction: the lesion fraction of each patch, (B, K, gh, gw) float64; None for a term that does not use it.
    """

    masks: tuple[Tensor, ...]
    fraction: Tensor | None = None


def density_regions(target: Tensor, sides: tuple[int, int], ignore_index: int | None) -> Regions:
    """The valid pixels of the K classes, and the patches' lesion fractions.

    Args:
        target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating.
        sides: patch height and width, in pixels.
        ignore_index: value of pixels that count for nothing.
    """
    valid, fraction = _chosen(_density_masks, target)(target, sides, ignore_index)
    return Regions((valid,), fraction)


def edge_regions(
    target: Tensor,
    sides: tuple[int, int],
    inner_radius: Sequence[int],
    outer_radius: Sequence[int],
    footprint: str,
    isolate_patches: bool,
    density_threshold: float | None,
    ignore_index: int | None,
) -> Regions:
    """The inner bands of the K classes, then the outer ones.

    Args:
        target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating.
        sides: patch height and width, in pixels.
        inner_radius: in sparse and in dense patches, in pixels.
        outer_radius: likewise.
        footprint: "square" or "cross".
        isolate_patches: whether a patch sees nothing beyond its border.
        density_threshold: lesion fraction above which a patch is dense; with None all are sparse.
        ignore_index: value of pixels that count for nothing.
    """
    options = list(inner_radius), list(outer_radius), footprint, isolate_patches, density_threshold, ignore_index
    return Regions(_chosen(_edge_masks, target)(target, sides, *options))


def side_by_side(masks: Sequence[Tensor]) -> Tensor:
    """Masks (B, K, H, W) joined along K."""
    joined: Tensor = _chosen(_joined, masks[0])(masks)
    return joined


def lesion_and_valid(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """The lesion and the valid pixels, (B, K, H, W), bool.

    In an unchecked target, any value but 0 and ignore_index is lesion.
    """
    lesion = target.bool()
    ignored = _checks.held(target, ignore_index)
    if ignored is None:
        return lesion, torch.ones_like(lesion)
    valid = target != ignored
    return lesion & valid, valid


def _density_masks(target: Tensor, sides: Sequence[int], ignore_index: int | None) -> tuple[Tensor, Tensor]:
    lesion, valid = lesion_and_valid(target, ignore_index)
    return valid, _fraction(lesion, valid, sides)


def _edge_masks(
    target: Tensor,
    sides: Sequence[int],
    inner_radius: Sequence[int],
    outer_radius: Sequence[int],
    footprint: str,
    isolate_patches: bool,
    density_threshold: float | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    lesion, valid = lesion_and_valid(target, ignore_index)
    background = outside = valid & ~lesion
    size, patch = (target.shape[2], target.shape[3]), (sides[0], sides[1])
    dense = None
    if density_threshold is not None:
        dense = (_fraction(lesion, valid, sides) > density_threshold).to(target.device)
        dense = dense[..., None, None] if isolate_patches else at_pixels(dense, patch, size)
    if isolate_patches:
        lesion = cut_patches(lesion, patch, fill=False, margin=1)
        outside = cut_patches(background, patch, fill=True, margin=1)
        background = cut_patches(background, patch, fill=False, margin=1)
        outside = outside & background.any(-1, keepdim=True).any(-2, keepdim=True)
    bands = []
    for contour, other, radii in ((inner_contour, outside, inner_radius), (outer_contour, background, outer_radius)):
        band = contour(lesion, other, radii[0], footprint)
        if dense is not None:
            band = torch.where(dense, contour(lesion, other, radii[1], footprint), band)
        bands.append(paste_patches(band, size, margin=1) if isolate_patches else band)
    return bands[0], bands[1]


def _fraction(lesion: Tensor, valid: Tensor, sides: Sequence[int]) -> Tensor:
    height, width = sides
    return lesion_fraction(patch_counts(lesion, (height, width)), patch_counts(valid, (height, width)))


def _joined(masks: Sequence[Tensor]) -> Tensor:
    # Flattened, the masks have only one possible memory format, so the compiler cannot guess another.
    joined: Tensor = torch.cat([mask.flatten(2) for mask in masks], 1).unflatten(2, masks[0].shape[2:])
    return joined


# Compiled code on the CPU calls these as operators: compiled to C++, masks take a hundred times as long to store.
_SCHEMAS: dict[Callable[..., Any], str] = {
    _density_masks: "(Tensor target, int[] sides, int? ignore_index) -> (Tensor, Tensor)",
    _edge_masks: "(Tensor target, int[] sides, int[] inner_radius, int[] outer_radius, str footprint, "
    "bool isolate_patches, float? density_threshold, int? ignore_index) -> (Tensor, Tensor)",
    _joined: "(Tensor[] masks) -> Tensor",
}


def _operator(masks: Callable[..., Any], schema: str) -> Callable[..., Any]:
    operator = torch.library.custom_op(
        f"contrastive_exudate_loss::{masks.__name__.removeprefix('_')}", mutates_args=(), schema=schema
    )(masks)
    operator.register_fake(masks)
    return operator


_OPERATORS = {masks: _operator(masks, schema) for masks, schema in _SCHEMAS.items()}


def _chosen(masks: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """The function itself; in compiled code on the CPU, its operator."""
    return _OPERATORS[masks] if tensor.is_cpu and torch.compiler.is_compiling() else masks
