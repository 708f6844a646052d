"""Supervised contrast of labelled embeddings, in memory that grows with M, not with M x M.

The gradient of the M x M similarities is formed tile by tile along with the loss: a loss is one number, so the backward
pass only has to scale it. Reference: Khosla et al. 2020 (arXiv 2004.11362); Tang et al. 2023 (arXiv 2302.11517).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastive_exudate_loss import _checks
from contrastive_exudate_loss.contrast_pairs import loss_by_pairs
from contrastive_exudate_loss.contrast_rows import filled_by_mask, loss_by_rows, loss_of_few

CONTRASTS = ("nt_xent", "sup_con")
# Up to so many embeddings on a CPU, calls cost more than arithmetic.
FEW = 192


def contrast_loss(
    embeddings: Tensor,
    labels: Tensor,
    present: Tensor,
    *,
    temperature: float,
    contrast: str = "nt_xent",
    part: int = 0,
    parts: int = 1,
) -> Tensor:
    """Contrast of the present embeddings: equal labels attract, different labels repel each other.

    With z = e / ||e|| and s_ij = z_i . z_j / temperature,

        nt_xent: mean over ordered pairs i != p of equal label of
                 -log(exp(s_ip) / (exp(s_ip) + sum over n of the other label of exp(s_in)))
        sup_con: mean over anchors i with a positive of
                 -mean over positives p of log(exp(s_ip) / sum over a != i of exp(s_ia))

    Args:
        embeddings: (M, C), float32 or float64. A zero vector has z = 0 and gets a zero gradient.
        labels: (M,), bool.
        present: (M,), bool; the others count for nothing.
        temperature: > 0.
        contrast: "nt_xent" or "sup_con".
        part: which of the equal parts of the anchors to sum over, 0 <= part < parts.
        parts: how many parts there are; their losses add up to that of the whole.

    Returns:
        (), of the embeddings' dtype; 0 with zero gradients if there is no positive pair or no negative.
    """
    loss: Tensor = _Contrast.apply(embeddings, labels, present, temperature, contrast, part, parts)
    return loss


def directions(embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each embedding divided by its Euclidean norm; a zero vector stays zero.

    Divided by the largest magnitude first, so that no square over- or underflows.

    Args:
        embeddings: (M, C), floating.

    Returns:
        z: (M, C), floating.
        scale, norm: (M, 1), floating; embeddings = z norm scale. The scale of a zero vector is infinite.
    """
    scale = torch.linalg.vector_norm(embeddings, math.inf, 1, keepdim=True)
    scale.masked_fill_(scale == 0, math.inf)
    scaled = embeddings / scale
    norm = torch.linalg.vector_norm(scaled, 2, 1, keepdim=True).clamp(min=1)  # the largest magnitude is 1 now, or all 0
    return scaled / norm, scale, norm


def first_of_each_label(sort_key: Tensor, labels: Tensor, present: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Indices of the present embeddings with the lowest sort_key, at most so many of each label.

    Args:
        sort_key: (M,), real and finite; ties go to the earlier index.
        labels: (M,), bool.
        present: (M,), bool.
        most: of each label, > 0.

    Returns:
        index: (N,), int64, with N = 2 min(M, most) whatever the labels.
        present: (N,), bool; False in the places that a label with fewer embeddings leaves over.
    """
    # Where the labels' device has no float64, sort_key lies on the CPU.
    order = sort_key.argsort(stable=True).to(labels.device)
    indices, flags = [], []
    for label in (labels, ~labels):
        member = (present & label)[order]
        first = (~member).byte().argsort(stable=True)[:most]
        indices.append(order[first])
        flags.append(member[first])
    return torch.cat(indices), torch.cat(flags)


class _Contrast(torch.autograd.Function):
    """The loss, and its gradient with respect to the embeddings, which autograd's own steps would make at more cost."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        labels: Tensor,
        present: Tensor,
        temperature: float,
        contrast: str,
        part: int,
        parts: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        z, scale, norm = directions(embeddings)
        loss: Tensor
        # An operator adds some 60 microseconds to a call on a CPU; only tracing needs it, with fake tensors too.
        traced = torch.compiler.is_compiling() or type(z) is not Tensor
        compute = _operator if traced else _loss_and_gradient
        loss, gradient = compute(z, labels, present, temperature, contrast, wanted, part, parts)
        if wanted:
            # The part of the gradient that is orthogonal to z; that of a zero vector is 0, since its scale is infinite.
            gradient = torch.addcmul(gradient, z, (z * gradient).sum(1, keepdim=True), value=-1) / norm / scale
            ctx.save_for_backward(embeddings, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return _Gradient.apply(scale, *ctx.saved_tensors), None, None, None, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient with respect to the embeddings; it refuses a derivative of its own, which would be 0."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, embeddings: Tensor, gradient: Tensor) -> Tensor:
        return scale * gradient

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("the contrastive terms have no second derivative; differentiate them once")


def _loss_and_gradient(
    z: Tensor,
    labels: Tensor,
    present: Tensor,
    temperature: float,
    contrast: str,
    with_gradient: bool,
    part: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient with respect to z (empty unless with_gradient), for unit or zero vectors z."""
    label_1, label_0 = labels & present, present > labels
    if z.is_cpu and parts == 1:
        whole = loss_of_few if len(z) <= FEW else loss_by_pairs
        return whole(z, label_1, label_0, temperature, contrast, with_gradient)
    anchors = range(len(z) * part // parts, len(z) * (part + 1) // parts)
    fill = _filled_on_cuda(z.device) if z.is_cuda else filled_by_mask
    return loss_by_rows(z, label_1, label_0, temperature, contrast, with_gradient, anchors, fill)


_operator = torch.library.custom_op("contrastive_exudate_loss::contrast", _loss_and_gradient, mutates_args=())


@_operator.register_fake
def _(
    z: Tensor,
    labels: Tensor,
    present: Tensor,
    temperature: float,
    contrast: str,
    with_gradient: bool,
    part: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), z.new_empty(z.shape if with_gradient else (0,))


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a CUDA device; the first call for each tries it."""
    return _filled_on_cuda(device) is not filled_by_mask


@functools.cache
def _filled_on_cuda(device: torch.device) -> Callable[..., None]:
    """One kernel that does all the work on a tile; if Triton does not work, filled_by_mask, with a warning."""
    flags = torch.ones(2, dtype=torch.bool, device=device)
    try:
        from contrastive_exudate_loss.contrast_triton import filled_by_triton

        filled_by_triton(torch.zeros(2, 2, device=device), torch.zeros(2, device=device), flags, ~flags, 0, "nt_xent")
    except torch.OutOfMemoryError:  # says nothing about Triton
        raise
    except Exception as error:  # for many reasons: no Triton, no C compiler, an old GPU, another driver version
        _checks.warn(
            f"Triton does not work on {device}, so the contrastive terms fall back to slower code: "
            f"{type(error).__name__}: {error}",
        )
        return filled_by_mask
    return filled_by_triton
