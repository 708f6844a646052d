"""Supervised contrast of labelled embeddings, in memory that grows with M, not with M x M.

The gradient of the M x M similarities is formed tile by tile beside the loss: a loss is one number, so the backward
has only to scale it. Reference: Khosla et al. 2020 (arXiv 2004.11362); Tang et al. 2023 (arXiv 2302.11517).
"""

import math
from typing import Any

import torch
from torch import Tensor

CONTRASTS = ("nt_xent", "sup_con")
# Similarities in a tile: few enough for a CPU's cache, enough for its threads to be worth waking.
TILE = 2**19


def contrast_loss(
    embeddings: Tensor, labels: Tensor, present: Tensor, *, temperature: float, contrast: str = "nt_xent"
) -> Tensor:
    """Contrast of the present embeddings: equal labels pull together, different labels push apart.

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

    Returns:
        (), of the embeddings' dtype; 0 with zero gradients where there is no positive pair or no negative.
    """
    loss: Tensor = _Contrast.apply(directions(embeddings), labels, present, temperature, contrast)
    return loss


def directions(embeddings: Tensor) -> Tensor:
    """Each embedding divided by its Euclidean norm; a zero vector stays zero, with a zero gradient.

    Divided by the largest magnitude first, so that no square over- or underflows.

    Args:
        embeddings: (M, C), floating.

    Returns:
        (M, C), floating.
    """
    scale = embeddings.detach().abs().amax(1, keepdim=True)
    nonzero = scale != 0  # true of NaN, which must not vanish: GradScaler looks for it
    scaled = embeddings / torch.where(nonzero, scale, 1)
    norm = torch.linalg.vector_norm(torch.where(nonzero, scaled, 1), dim=1, keepdim=True)
    return torch.where(nonzero, scaled / norm, 0)


def best_of_each_label(priority: Tensor, labels: Tensor, present: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Indices of the present embeddings of lowest priority, at most limit for each label.

    Args:
        priority: (M,), real and finite; ties go to the earlier index.
        labels: (M,), bool.
        present: (M,), bool.
        limit: > 0.

    Returns:
        index: (N,), int64, with N = 2 min(M, limit) whatever the labels.
        present: (N,), bool; False fills up the places of a label with fewer embeddings.
    """
    # A device without float64 has its fractions, and so its priorities, on the CPU.
    order = priority.argsort(stable=True).to(labels.device)
    indices, flags = [], []
    for label in (labels, ~labels):
        member = (present & label)[order]
        first = (~member).byte().argsort(stable=True)[:limit]
        indices.append(order[first])
        flags.append(member[first])
    return torch.cat(indices), torch.cat(flags)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor, present: Tensor, temperature: float, contrast: str) -> Tensor:
        loss: Tensor
        loss, gradient = _loss_and_gradient(z, labels, present, temperature, contrast, ctx.needs_input_grad[0])
        ctx.save_for_backward(z, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return _Gradient.apply(scale, *ctx.saved_tensors), None, None, None, None


class _Gradient(torch.autograd.Function):
    """The contrast's gradient, which depends on z but knows no derivative: it refuses one rather than give 0."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        return scale * gradient

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("the contrastive terms have no second derivative; differentiate them once")


@torch.library.custom_op("contrastive_exudate_loss::contrast", mutates_args=())
def _loss_and_gradient(
    z: Tensor, labels: Tensor, present: Tensor, temperature: float, contrast: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient with respect to z (empty unless with_gradient), for unit or zero vectors z."""
    if z.device.type == "cpu":
        return _by_label(z, labels & present, ~labels & present, temperature, contrast, with_gradient)
    return _by_mask(z, labels & present, ~labels & present, temperature, contrast, with_gradient)


@_loss_and_gradient.register_fake
def _(
    z: Tensor, labels: Tensor, present: Tensor, temperature: float, contrast: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), z.new_empty(z.shape if with_gradient else (0,))


def _by_label(
    z: Tensor, ones: Tensor, zeros: Tensor, temperature: float, contrast: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Positives and negatives of each label apart, as contiguous tiles; sizes depend on the data."""
    groups = [label.nonzero().squeeze(1) for label in (ones, zeros)]
    terms = sum(len(n) * (len(n) - 1) if contrast == "nt_xent" else len(n) * (len(n) > 1) for n in groups)
    loss = z.new_zeros(())
    gradient = torch.zeros_like(z) if with_gradient else z.new_empty(0)
    if terms == 0 or min(map(len, groups)) == 0:
        return loss, gradient
    rows = max(1, TILE // sum(map(len, groups)))
    for same, other in (groups, groups[::-1]):
        anchors, negatives = z[same], z[other]
        # Dividing the vectors, not their products, saves a pass over every tile.
        columns, other_columns = (anchors / temperature).T, (negatives / temperature).T
        d_anchors, d_negatives = torch.zeros_like(anchors), torch.zeros_like(negatives)
        for start in range(0, len(same), rows):
            row = slice(start, start + rows)
            pos, neg = anchors[row] @ columns, anchors[row] @ other_columns
            pos.diagonal(start).fill_(math.inf)
            loss += _ROWS[contrast](pos, neg).sum()
            if with_gradient:
                d_anchors[row].addmm_(pos, anchors).addmm_(neg, negatives)
                d_anchors.addmm_(pos.T, anchors[row])
                d_negatives.addmm_(neg.T, anchors[row])
        if with_gradient:
            gradient[same] += d_anchors
            gradient[other] += d_negatives
    return loss / terms, gradient.div_(temperature * terms)


def _by_mask(
    z: Tensor, ones: Tensor, zeros: Tensor, temperature: float, contrast: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Every tile over all embeddings, positives and negatives as masks: shapes depend on shapes alone."""
    total = len(z)
    n = torch.stack([ones.sum(), zeros.sum()]).to(z.dtype)
    terms = (n * (n - 1)).sum() if contrast == "nt_xent" else (n * (n > 1)).sum()
    loss = z.new_zeros(())
    d_z = torch.zeros_like(z)
    index = torch.arange(total, device=z.device)
    rows = max(1, 8 * TILE // total)  # each tile costs its launches, and no cache has to hold it
    for start in range(0, total, rows):
        row = slice(start, start + rows)
        positive = (ones[row, None] & ones) | (zeros[row, None] & zeros)
        positive &= index[row, None] != index
        negative = (ones[row, None] & zeros) | (zeros[row, None] & ones)
        tile = z[row] @ z.T / temperature
        pos, neg = tile.masked_fill(~positive, math.inf), tile.masked_fill(~negative, -math.inf)
        loss += _ROWS[contrast](pos, neg).sum()
        if with_gradient:
            pos += neg
            d_z[row].addmm_(pos, z)
            d_z.addmm_(pos.T, z[row])
    active = (n.min() > 0) & (terms > 0)
    terms = terms.clamp(min=1)
    gradient = torch.where(active, d_z / (temperature * terms), 0) if with_gradient else z.new_empty(0)
    return torch.where(active, loss / terms, 0), gradient


def _nt_xent_rows(pos: Tensor, neg: Tensor) -> Tensor:
    """Each anchor's sum over its pairs; pos (inf: no pair) and neg (-inf: no negative) become its gradients."""
    lse = _finite(neg.logsumexp(1, keepdim=True))
    # With x = lse - s, -log(exp(s) / (exp(s) + exp(lse))) = log(1 + exp(x)) = max(x, 0) - log(max(q, 1 - q)) with
    # q = sigmoid(x), and its derivative by s is -q.
    torch.sub(lse, pos, out=pos)
    scratch = pos.clamp(min=0)
    loss = scratch.sum(1)
    pos.sigmoid_()
    torch.maximum(pos, torch.sub(1, pos, out=scratch), out=scratch)
    loss -= _sum_of_logs_(scratch)
    neg.sub_(lse).exp_().mul_(pos.sum(1, keepdim=True))
    pos.neg_()
    return loss


def _sum_of_logs_(values: Tensor) -> Tensor:
    """Sum over each row of the logarithms of values in [0.5, 1], which are overwritten.

    A logarithm costs a CPU as much as dozens of products, so up to 63 values are multiplied first: 2^-63 is far from
    underflow, and the product is as exact as its factors.
    """
    for _ in range(5):
        half = values.shape[1] // 2
        if half:
            last, odd = values[:, half : 2 * half], values[:, 2 * half :]
            values = values[:, :half].mul_(last)
            values[:, : odd.shape[1]].mul_(odd)
    return values.log().sum(1)


def _sup_con_rows(pos: Tensor, neg: Tensor) -> Tensor:
    """Each anchor's mean over its positives; pos (inf: no pair) and neg (-inf: no negative) become its gradients."""
    paired = pos != math.inf
    n = paired.sum(1, keepdim=True).to(pos.dtype)
    anchor, share = n > 0, 1 / n.clamp(min=1)
    lse = _finite(torch.logaddexp(pos.masked_fill(~paired, -math.inf).logsumexp(1), neg.logsumexp(1)).unsqueeze(1))
    log_share = (pos - lse).masked_fill_(~paired, 0)
    loss = -(log_share.sum(1, keepdim=True) * share).squeeze(1)
    pos.copy_(log_share.exp_().sub_(share).mul_(paired))
    neg.sub_(lse).exp_().mul_(anchor)
    return loss


def _finite(lse: Tensor) -> Tensor:
    """An anchor without others has lse = -inf; any finite value keeps -inf - lse from being NaN."""
    return lse.masked_fill(lse == -math.inf, 0)


_ROWS = {"nt_xent": _nt_xent_rows, "sup_con": _sup_con_rows}
