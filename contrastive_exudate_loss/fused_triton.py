"""The terms, and binary cross-entropy with them, in six Triton kernels forward and one or two backward.

Between pooling and contrast come a sum and a maximum over each image, where a band has one embedding an image, one or
two more kernels, where only some embeddings are taken, and the collectives of gather_distributed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_exudate_loss.distributed import rank_and_count, rows_of_all_ranks, sum_of_ranks
from contrastive_exudate_loss.fused import Density, Edge, Work, patch_count
from contrastive_exudate_loss.pairs_triton import add_up, compact, logsumexp, negatives, positives, take
from contrastive_exudate_loss.pooling_triton import pool, spread
from contrastive_exudate_loss.supervised_triton import spread_over_logits

# Sizes of tiles and numbers of warps that spill no registers on an H100 up to 256 channels, as
# `benchmarks/kernels.py` reads.
PIXEL_BLOCK, CHANNEL_BLOCK, CELL_BLOCK = 128, 32, 64  # of a patch, of features, of features to write at a time
ROWS, COMPACTED, SCANNED = 32, 64, 1024  # embeddings in a tile, to compact, labels to count at a time
COMPARED = 32  # keys to compare with at a time
LOGITS = 1024


class Fused(torch.autograd.Function):
    """Losses of the terms in one work, density first; with logits the total and the cross-entropy before them.

    Fused.apply(features, logits, target, work, alpha, beta), with

        features: (B, C, h, w), floating.
        logits: (B, K, H, W), floating, of the features' dtype or one that is promoted like it to float32; or None.
        target: (B, K, H, W) of 0, 1 and work.ignore_index.
        alpha, beta: weights of the terms in the total.

    It has no second derivative.
    """

    @staticmethod
    def forward(  # noqa: D102 - the class says it
        ctx: Any, features: Tensor, logits: Tensor | None, target: Tensor, work: Work, alpha: float, beta: float
    ) -> tuple[Tensor, ...]:
        batch, classes, height, width = target.shape
        channels, rows, columns = features.shape[1:]
        patches = patch_count(target, work.sides)
        density = work.density or Density(1.0, 1.0)
        edge = work.edge or Edge((0, 0), (0, 0), False, False, 1.0, 1.0)
        # Rows of a class: those of the density term, then those of the edge term.
        first, band_rows = work.lengths(target)
        places = first + band_rows
        target = target.contiguous()
        target = target.view(torch.uint8) if target.dtype == torch.bool else target
        logits = None if logits is None else logits.contiguous()
        ignores, ignored = work.ignore_index is not None, work.ignore_index or 0

        options: Any = {"device": features.device, "dtype": torch.promote_types(features.dtype, torch.float32)}
        codes = torch.empty(target.shape, device=features.device, dtype=torch.uint8)
        sums = torch.empty(classes, places, channels, **options)
        labels = torch.empty(classes, places, device=features.device, dtype=torch.int8)
        keys = _keys(density, edge, labels, first)
        bands, band_labels, band_first, band_places = sums, labels, first, places
        if edge.per_image:
            band_first, band_places = 0, 2 * patches
            bands, band_labels = sums.new_empty(classes, band_places, channels), labels.new_empty(classes, band_places)
        supervised = None if logits is None else torch.empty(classes * patches, **options)
        numbers = torch.empty_like(supervised, dtype=torch.int32) if supervised is not None and ignores else None

        shape = batch, classes, channels, height, width, rows, columns, *work.sides, places
        has = work.density is not None, work.edge is not None
        # A longer radius reaches no more pixels.
        radii = [min(radius, height + width) for radius in (edge.inner[0], edge.outer[0], edge.inner[1], edge.outer[1])]
        block = min(_tile(channels)[0], CHANNEL_BLOCK)
        with torch.cuda.device_of(features):  # Triton launches on the current device
            pool[classes * patches, -(-channels // CHANNEL_BLOCK)](
                features, target, logits, codes, sums, labels, None if density.at_random else keys,
                bands, band_labels, band_first, band_places, supervised, numbers, *features.stride(), *shape,
                *radii, density.threshold, edge.threshold, ignored,
                *has, edge.cross, edge.isolate, ignores, PIXEL_BLOCK, block, num_warps=8,
            )  # fmt: skip
            if edge.per_image:
                torch.sum(bands.view(classes, band_rows, -1, channels), 2, out=sums[:, first:])
                torch.amax(band_labels.view(classes, band_rows, -1), 2, out=labels[:, first:])
            if density.at_random or edge.most:
                most = density.most if density.at_random else 0, edge.most
                labels = _taken(work, most, sums, labels, keys, first)
            selects = density.most > 0 and not density.at_random
            if work.ranks is not None:
                sums, labels = _joined(sums, work.ranks), _joined(labels, work.ranks)
                keys = _joined(keys, work.ranks) if selects and keys is not None else None
                first = sum(length for length, _ in work.ranks)
            if selects:
                labels = _taken(work, (density.most, 0), sums, labels, keys, first)
            outputs, number = _contrasts(work, sums, labels, first, supervised, numbers, target.numel(), alpha, beta)
        # The sums have made room for their gradient.
        by_sums = sums if work.ranks is None else _own(sums, work.ranks)
        ctx.save_for_backward(features, logits, None if logits is None else target, codes, by_sums, number)
        ctx.options = work, shape, alpha, beta
        ctx.set_materialize_grads(False)
        return tuple(output for output in outputs if output is not None)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102 - likewise
        return *_Gradients.apply(ctx.needs_input_grad, ctx.options, *ctx.saved_tensors, *by_outputs), *[None] * 4


class _Gradients(torch.autograd.Function):
    """The gradients with respect to features and logits; they refuse a derivative of their own, which nobody needs."""

    @staticmethod
    def forward(
        ctx: Any,
        wanted: tuple[bool, ...],
        options: Any,
        features: Tensor,
        logits: Tensor | None,
        target: Tensor | None,
        codes: Tensor,
        by_sums: Tensor,
        number: Tensor | None,
        *by_outputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        work, shape, alpha, beta = options
        batch, _, channels, height, width, rows, columns, *_ = shape
        has = work.density is not None, work.edge is not None
        per_image = work.edge is not None and work.edge.per_image
        block = min(_tile(channels)[0], CHANNEL_BLOCK)
        left = list(by_outputs)
        by_total, by_supervised = (left.pop(0), left.pop(0)) if logits is not None else (None, None)
        by_density, by_edge = (left.pop(0) if there else None for there in has)
        of_total = by_total
        if work.ranks is not None:  # each process differentiates its own loss, which for the terms is that of all
            weighted = (alpha, by_density), (beta, by_edge)
            by_terms = torch.stack([_by_term(by_sums, by_total, *of_term) for of_term in weighted])
            of_total, (by_density, by_edge) = None, sum_of_ranks(by_terms)
        by_features = by_logits = None
        with torch.cuda.device_of(features):
            if wanted[0]:
                by_features = torch.empty_like(features)
                spread[-(-rows * columns // CELL_BLOCK), batch, -(-channels // block)](
                    by_features, codes, by_sums, of_total, by_density, by_edge, alpha, beta, *by_features.stride(),
                    *shape, -(-height // rows), -(-width // columns), *has, per_image, CELL_BLOCK, block,
                )  # fmt: skip
            if logits is not None and wanted[1]:
                by_logits = torch.empty_like(logits)
                spread_over_logits[-(-logits.numel() // LOGITS),](
                    by_logits, logits, target, number, by_total, by_supervised,
                    logits.numel(), work.ignore_index or 0, work.ignore_index is not None, LOGITS,
                )  # fmt: skip
        return by_features, by_logits

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("the kernels have no second derivative; differentiate them once")


def _by_term(like: Tensor, by_total: Tensor | None, weight: float, by_part: Tensor | None) -> Tensor:
    """Gradient with respect to a term: its own, plus its weight times that with respect to the total."""
    if by_total is None:
        return like.new_zeros(()) if by_part is None else by_part
    return by_total * weight if by_part is None else torch.add(by_part, by_total, alpha=weight)


def shared_memory(channels: int, itemsize: int) -> int:
    """Upper bound on the shared memory of a program that contrasts sums of so many channels, in bytes."""
    block, tile = _tile(channels)
    # Anchors, embeddings beside them and the gradient; similarities and their weights.
    return itemsize * tile * (3 * block + 2 * tile)


def _tile(channels: int) -> tuple[int, int]:
    """Channels and embeddings in a tile of all channels."""
    block = max(16, 1 << (channels - 1).bit_length())
    return block, ROWS if block <= 64 else 16


def _keys(density: Density, edge: Edge, labels: Tensor, first: int) -> Tensor | None:
    """Room for the keys by which embeddings are taken, the random ones filled in; None where all are taken."""
    if not (density.most or edge.most):
        return None
    keys = torch.empty_like(labels, dtype=torch.float64)
    drawn = [*keys[:, :first]] if density.at_random else []
    drawn += [*keys[:, first:]] if edge.most else []
    for of_class in drawn:
        torch.randperm(len(of_class), out=of_class)
    return keys


def _taken(work: Work, most: tuple[int, int], sums: Tensor, labels: Tensor, keys: Tensor | None, first: int) -> Tensor:
    """Labels, at most `most` of each in the density and the edge term; others become 0, as do their sums."""
    classes, places, channels = sums.shape
    sizes, longest, terms = _rows(work, first, places)
    block, taken = _tile(channels)[0], torch.empty_like(labels)
    take[-(-longest // COMPACTED), terms * classes](
        sums, labels, keys, taken, *sizes, channels, *most,
        work.edge is not None, terms, COMPACTED, block, COMPARED,
    )  # fmt: skip
    return taken


def _rows(work: Work, first: int, places: int) -> tuple[tuple[int, int], int, int]:
    """The rows of a class's first contrast and of all of them, the rows of its longest contrast, and their number."""
    if work.density is None or work.edge is None:
        return (places, places), places, 1
    return (first, places), max(first, places - first), 2


def _joined(own: Tensor, ranks: Sequence[tuple[int, int]]) -> Tensor:
    """(K, places, ...) of all processes, those for the density term first."""
    blocks = rows_of_all_ranks(own, [sum(lengths) for lengths in ranks])
    density = [block[:, :length] for block, (length, _) in zip(blocks, ranks, strict=True)]
    edge = [block[:, length:] for block, (length, _) in zip(blocks, ranks, strict=True)]
    return torch.cat([*density, *edge], 1)


def _own(everyones: Tensor, ranks: Sequence[tuple[int, int]]) -> Tensor:
    """This process's part of what _joined gives."""
    rank = rank_and_count()[0]
    parts = everyones.split([*(length for length, _ in ranks), *(length for _, length in ranks)], 1)
    return torch.cat([parts[rank], parts[len(ranks) + rank]], 1)


def _contrasts(
    work: Work, sums: Tensor, labels: Tensor, first: int,
    supervised: Tensor | None, numbers: Tensor | None, pixels: int, alpha: float, beta: float,
) -> tuple[list[Tensor | None], Tensor | None]:  # fmt: skip
    """Total, cross-entropy and the loss of each term, as far as there are any, and the number of valid pixels.

    Afterwards sums hold their gradient.

    Args:
        sums: (K, places, C), whose rows before first belong to the density term.
        labels: (K, places), int8.
        supervised, numbers: of each patch, as pool writes them.
        pixels: of the target.
    """
    classes, places, channels = sums.shape
    whole: Any = {"device": sums.device, "dtype": torch.int32}
    rows, longest, terms = _rows(work, first, places)
    sizes = *rows, channels
    has_edge = work.edge is not None
    block, tile = _tile(channels)
    warps = 4 if block <= 256 else 8
    compacted = min(COMPACTED, max(16, 8192 // block))
    programs = -(-longest // tile) + 1
    z, gradient = sums.new_empty(2, *sums.shape).unbind()
    norms, lse, weights = sums.new_empty(3, classes, places).unbind()
    losses = sums.new_empty(terms * classes, programs)
    index, counts = torch.empty(classes, places, **whole), torch.empty(terms * classes, 2, **whole)
    wanted = *[supervised is not None] * 3, work.density is not None, has_edge
    number, *outputs = (sums.new_empty(()) if want else None for want in wanted)
    compact[-(-longest // compacted), terms * classes](
        sums, labels, z, norms, index, counts, *sizes, terms, compacted, block, SCANNED
    )
    grid = programs, terms * classes
    temperatures = [part.temperature if part else 1.0 for part in (work.density, work.edge)]
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    how = has_edge, terms, work.sup_con, tile, block, precision
    logsumexp[grid](z, counts, lse, *sizes, *temperatures, *how, num_warps=warps)
    positives[grid](z, counts, lse, weights, losses, gradient, *sizes, *temperatures, *how, num_warps=warps)
    # From here on the sums are no longer read, and their gradient takes their place.
    negatives[grid](
        z, norms, index, counts, lse, weights, gradient, sums, *sizes, *temperatures, classes, *how, num_warps=warps
    )
    patches = 0 if supervised is None else len(supervised)
    add_up[1,](
        losses, counts, supervised, numbers, *outputs, number,
        classes, programs, patches, pixels, alpha, beta, terms, work.sup_con, SCANNED,
    )  # fmt: skip
    return outputs, number
