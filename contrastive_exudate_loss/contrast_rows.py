"""Contrast row by row: with masks, so that no shape depends on data, and for few embeddings on the CPU at once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Similarities in a tile. On CUDA each tile costs its launches, and no cache has to hold it.
TILE, TILE_ON_CUDA = 4_194_304, 16_777_216


def loss_by_rows(
    z: Tensor,
    label_1: Tensor,
    label_0: Tensor,
    temperature: float,
    contrast: str,
    with_gradient: bool,
    anchors: range,
    fill: Callable[..., None],
) -> tuple[Tensor, Tensor]:
    """The loss of some anchors with all embeddings, and its gradient with respect to z.

    Args:
        z: (M, C), unit or zero vectors.
        label_1: (M,), bool: the present embeddings of label 1.
        label_0: (M,), bool: those of label 0.
        temperature: > 0.
        contrast: "nt_xent" or "sup_con".
        with_gradient: whether to form the gradient; else it is (0,).
        anchors: the rows of z to sum over.
        fill: filled_by_mask, or a function that does the same.
    """
    total = len(z)
    n = torch.stack([label_1, label_0]).sum(1, dtype=z.dtype)
    terms = n.dot(n - 1 if contrast == "nt_xent" else (n > 1).to(n.dtype)).clamp(min=1)
    losses = z.new_empty(len(anchors))
    d_z = z.new_zeros(z.shape if with_gradient else (0,))
    rows = max(1, (TILE_ON_CUDA if z.is_cuda else TILE) // max(1, total))
    buffer = z.new_empty(min(rows, len(anchors)) * total)
    for start in anchors[::rows]:
        row = slice(start, min(start + rows, anchors.stop))
        tile = buffer[: len(z[row]) * total].view(-1, total)
        torch.addmm(tile, z[row], z.T, beta=0, alpha=1 / temperature, out=tile)  # beta = 0: nothing is added
        fill(tile, losses[start - anchors.start :][: len(tile)], label_1, label_0, start, contrast)
        if with_gradient:
            d_z[row].addmm_(tile, z)
            d_z.addmm_(tile.T, z[row])
    return losses.sum() / terms, d_z.div_(temperature * terms)


def loss_of_few(
    z: Tensor, label_1: Tensor, label_0: Tensor, temperature: float, contrast: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to z, from all similarities at once: few calls, M x M memory.

    Args: as loss_by_rows.
    """
    loss, gradient = z.new_zeros(()), z.new_zeros(z.shape if with_gradient else (0,))
    groups = [label.nonzero().squeeze(1) for label in (label_1, label_0)]
    first, second = map(len, groups)
    terms = sum(n * (n - 1 if contrast == "nt_xent" else n > 1) for n in (first, second))
    if terms == 0 or first == 0 or second == 0:
        return loss, gradient
    order = torch.cat(groups)
    vectors = z[order]
    s = torch.mm(vectors / temperature, vectors.T)
    s.fill_diagonal_(math.inf)
    blocks = s.split([first, second])
    for own, block in enumerate(blocks):
        pos, neg = block.split([first, second], 1)[:: 1 if own == 0 else -1]
        loss += _ROWS[contrast](pos, neg).sum()
    if with_gradient:
        gradient[order] = torch.mm(s, vectors).addmm_(s.T, vectors).div_(temperature * terms)
    return loss.div_(terms), gradient


def filled_by_mask(s: Tensor, losses: Tensor, label_1: Tensor, label_0: Tensor, start: int, contrast: str) -> None:
    """Losses of some anchors, whose similarities become the gradient.

    Args:
        s: (rows, M), floating, contiguous: similarities of the anchors from start on with all embeddings, divided by
            the temperature. Becomes the derivative of the losses' sum with respect to the similarities.
        losses: (rows,), of the same dtype, to be written: for nt_xent the sum over an anchor's pairs, for sup_con
            the mean; 0 without a pair or without a negative.
        label_1: (M,), bool: the present embeddings of label 1.
        label_0: (M,), bool: those of label 0.
        start: index of the first anchor.
        contrast: "nt_xent" or "sup_con".
    """
    row = slice(start, start + len(s))
    negative = (label_1[row, None] & label_0) | (label_0[row, None] & label_1)
    positive = (label_1[row, None] & label_1) | (label_0[row, None] & label_0)
    index = torch.arange(s.shape[1], device=s.device)
    positive &= (index[row, None] != index) & negative.any(1, keepdim=True)
    pos, neg = s.masked_fill(~positive, math.inf), s.masked_fill(~negative, -math.inf)
    # A NaN must not reach an anchor that has no pair.
    paired = positive.any(1)
    losses.copy_(torch.where(paired, _ROWS[contrast](pos, neg), 0))
    torch.add(pos, neg, out=s).masked_fill_(~paired[:, None], 0)


def _nt_xent_rows(pos: Tensor, neg: Tensor) -> Tensor:
    """Each anchor's sum over its pairs; pos (inf: no pair) and neg (-inf: no negative) become its gradients."""
    lse = _finite(neg.logsumexp(1, keepdim=True))
    # With x = lse - s, -log(exp(s) / (exp(s) + exp(lse))) = log(1 + exp(x)); its derivative with respect to s is
    # -sigmoid(x).
    torch.sub(lse, pos, out=pos)
    losses = (pos.clamp(min=0) + pos.abs().neg_().exp_().log1p_()).sum(1)
    pos.sigmoid_()
    neg.sub_(lse).exp_().mul_(pos.sum(1, keepdim=True))
    pos.neg_()
    return losses


def _sup_con_rows(pos: Tensor, neg: Tensor) -> Tensor:
    """Each anchor's mean over its pairs; pos (inf: no pair) and neg (-inf: no negative) become its gradients."""
    paired = pos != math.inf
    n = paired.sum(1, keepdim=True).to(pos.dtype)
    anchor, share = n > 0, 1 / n.clamp(min=1)
    lse = _finite(torch.logaddexp(pos.masked_fill(~paired, -math.inf).logsumexp(1), neg.logsumexp(1)).unsqueeze(1))
    log_share = (pos - lse).masked_fill_(~paired, 0)
    losses = -(log_share.sum(1, keepdim=True) * share).squeeze(1)
    pos.copy_(log_share.exp_().sub_(share).mul_(paired))
    neg.sub_(lse).exp_().mul_(anchor)
    return losses


def _finite(lse: Tensor) -> Tensor:
    """An anchor without others has lse = -inf; any finite value keeps -inf - lse from being NaN."""
    return lse.masked_fill(lse == -math.inf, 0)


_ROWS = {"nt_xent": _nt_xent_rows, "sup_con": _sup_con_rows}
