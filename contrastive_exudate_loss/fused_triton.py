"""The terms, and binary cross-entropy with them, in six Triton kernels forward and one or two backward."""

from typing import Any

import torch
from torch import Tensor

from contrastive_exudate_loss.fused import Density, Edge, Work
from contrastive_exudate_loss.pairs_triton import add_up, gather, logsumexp, negatives, positives
from contrastive_exudate_loss.pooling_triton import pool, spread
from contrastive_exudate_loss.supervised_triton import spread_over_logits

# Sizes of tiles and numbers of warps that spill no registers on an H100, as `benchmarks/kernels.py` reads.
PIXELS, CHANNELS, CELLS = 128, 32, 64  # of a patch, of features, of features to write at a time
ROWS, GATHERED, SCANNED = 32, 64, 1024  # embeddings in a tile, to compact, labels to count at a time
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
        has_density, has_edge = work.density is not None, work.edge is not None
        terms, masks = has_density + has_edge, has_density + 2 * has_edge
        side_y, side_x = work.sides
        patches = batch * -(-height // side_y) * -(-width // side_x)
        total = masks * patches
        first = patches if terms == 2 else total
        target = target.contiguous()
        target = target.view(torch.uint8) if target.dtype == torch.bool else target
        logits = None if logits is None else logits.contiguous()
        ignores, ignored = work.ignore_index is not None, work.ignore_index or 0
        density = work.density or Density(1.0, 1.0)
        edge = work.edge or Edge((0, 0), (0, 0), False, False, 1.0, 1.0)
        radii = edge.inner[0], edge.outer[0], edge.inner[1], edge.outer[1]
        temperatures = density.temperature, edge.temperature

        options: Any = {"device": features.device, "dtype": torch.promote_types(features.dtype, torch.float32)}
        whole: Any = {"device": features.device, "dtype": torch.int32}
        codes = torch.empty(target.shape, device=features.device, dtype=torch.uint8)
        labels = torch.empty(classes * total, device=features.device, dtype=torch.int8)
        sums, z, gradient = torch.empty(3, classes * total, channels, **options).unbind()
        lengths, lse, weights = torch.empty(3, classes * total, **options).unbind()
        index, counts = torch.empty(classes * total, **whole), torch.empty(terms * classes, 2, **whole)
        supervised = None if logits is None else torch.empty(classes * patches, **options)
        numbers = None if logits is None or not ignores else torch.empty(classes * patches, **whole)
        wanted = *[logits is not None] * 3, has_density, has_edge
        number, *outputs = (torch.empty((), **options) if want else None for want in wanted)

        shape = batch, classes, channels, height, width, rows, columns, side_y, side_x
        block = max(16, 1 << (channels - 1).bit_length())
        tile = ROWS if block <= 64 else 16
        gathered = min(GATHERED, max(16, 8192 // block))
        programs = -(-max(first, total - first) // tile) + 1
        losses = torch.empty(terms * classes, programs, **options)
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        with torch.cuda.device_of(features):  # Triton launches on the current device
            pool[classes * patches, -(-channels // CHANNELS)](
                features, target, logits, codes, sums, labels, supervised, numbers, *features.stride(), *shape,
                *radii, density.threshold, edge.threshold, ignored,
                has_density, has_edge, edge.cross, edge.isolate, ignores, PIXELS, min(block, CHANNELS), num_warps=8,
            )  # fmt: skip
            sizes = first, total, channels
            gather[-(-max(first, total - first) // gathered), terms * classes](
                sums, labels, z, lengths, index, counts, *sizes, terms, gathered, block, SCANNED
            )
            grid = programs, terms * classes
            how = has_edge, terms, work.sup_con, tile, block, precision
            logsumexp[grid](z, counts, lse, *sizes, *temperatures, *how)
            positives[grid](z, counts, lse, weights, losses, gradient, *sizes, *temperatures, *how)
            # From here on the sums are no longer read, and their gradient takes their place.
            negatives[grid](
                z, lengths, index, counts, lse, weights, gradient, sums, *sizes, *temperatures, classes, *how
            )
            add_up[1,](
                losses, counts, supervised, numbers, *outputs, number,
                classes, programs, classes * patches, target.numel(), alpha, beta, terms, work.sup_con, SCANNED,
            )  # fmt: skip
        ctx.save_for_backward(features, logits, target, codes, sums, number)
        ctx.options = shape, has_density, has_edge, min(block, CHANNELS), alpha, beta, ignored, ignores
        ctx.set_materialize_grads(False)
        return tuple(output for output in outputs if output is not None)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102 - likewise
        return *_Gradients.apply(ctx.needs_input_grad, ctx.options, *ctx.saved_tensors, *by_outputs), *[None] * 4


class _Gradients(torch.autograd.Function):
    """Those by features and logits; they refuse a derivative of their own, which nobody needs."""

    @staticmethod
    def forward(
        ctx: Any,
        wanted: tuple[bool, ...],
        options: Any,
        features: Tensor,
        logits: Tensor | None,
        target: Tensor,
        codes: Tensor,
        by_sums: Tensor,
        number: Tensor | None,
        *by_outputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        shape, has_density, has_edge, block, alpha, beta, ignored, ignores = options
        batch, _, channels, height, width, rows, columns, *_ = shape
        left = list(by_outputs)
        by_total, by_supervised = (left.pop(0), left.pop(0)) if logits is not None else (None, None)
        by_density, by_edge = left.pop(0) if has_density else None, left.pop(0) if has_edge else None
        by_features = by_logits = None
        with torch.cuda.device_of(features):
            if wanted[0]:
                by_features = torch.empty_like(features)
                spread[-(-rows * columns // CELLS), batch, -(-channels // block)](
                    by_features, codes, by_sums, by_total, by_density, by_edge, alpha, beta, *by_features.stride(),
                    *shape, -(-height // rows), -(-width // columns), has_density, has_edge, CELLS, block,
                )  # fmt: skip
            if logits is not None and wanted[1]:
                by_logits = torch.empty_like(logits)
                spread_over_logits[-(-logits.numel() // LOGITS),](
                    by_logits, logits, target, number, by_total, by_supervised, logits.numel(), ignored, ignores, LOGITS
                )
        return by_features, by_logits

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("the kernels have no second derivative; differentiate them once")
