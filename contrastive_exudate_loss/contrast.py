"""Supervised contrast of labelled embeddings, in memory that grows with M, not with M x M.

The gradient of the M x M similarities is formed tile by tile beside the loss: a loss is one number, so the backward
has only to scale it. Reference: Khosla et al. 2020 (arXiv 2004.11362); Tang et al. 2023 (arXiv 2302.11517).
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

CONTRASTS = ("nt_xent", "sup_con")
# Similarities in a tile: few enough for a CPU's cache, enough for its threads to be worth waking.
TILE = 524_288


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
        part: which of the equal parts of the anchors to sum over, 0 <= part < parts.
        parts: number of them; the losses of all parts add up to that of the whole.

    Returns:
        (), of the embeddings' dtype; 0 with zero gradients where there is no positive pair or no negative.
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
        scale, norm: (M, 1), floating; embeddings = z norm scale. Of a zero vector the scale is infinite.
    """
    scale = torch.linalg.vector_norm(embeddings, math.inf, 1, keepdim=True)
    scale = scale.masked_fill(scale == 0, math.inf)
    scaled = embeddings / scale
    norm = torch.linalg.vector_norm(scaled, 2, 1, keepdim=True).clamp(min=1)  # the largest magnitude is 1 now, or all 0
    return scaled / norm, scale, norm


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
    """The loss, and its gradient by the embeddings with it: autograd's own steps to them would cost more."""

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
        loss, gradient = _loss_and_gradient(z, labels, present, temperature, contrast, wanted, part, parts)
        if wanted:
            # What is left of the gradient across z; a zero vector's, by its infinite scale, is 0.
            gradient = torch.addcmul(gradient, z, (z * gradient).sum(1, keepdim=True), value=-1) / norm / scale
            ctx.save_for_backward(embeddings, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return _Gradient.apply(scale, *ctx.saved_tensors), None, None, None, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient by the embeddings, which knows no derivative of its own: it refuses one rather than give 0."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, embeddings: Tensor, gradient: Tensor) -> Tensor:
        return scale * gradient

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("the contrastive terms have no second derivative; differentiate them once")


@torch.library.custom_op("contrastive_exudate_loss::contrast", mutates_args=())
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
    ones, zeros = labels & present, ~labels & present
    if z.is_cpu and parts == 1:
        return _by_label(z, ones, zeros, temperature, contrast, with_gradient)
    anchors = range(len(z) * part // parts, len(z) * (part + 1) // parts)
    return _by_mask(z, ones, zeros, temperature, contrast, with_gradient, anchors)


@_loss_and_gradient.register_fake
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


def _by_label(
    z: Tensor, ones: Tensor, zeros: Tensor, temperature: float, contrast: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Every pair once, those of equal and of different labels in tiles apart; sizes depend on the data."""
    sup_con = contrast == "sup_con"
    groups = [label.nonzero().squeeze(1) for label in (ones, zeros)]
    terms = sum(len(n) * (len(n) > 1) if sup_con else len(n) * (len(n) - 1) for n in groups)
    loss = z.new_zeros(())
    gradient = z.new_zeros(z.shape if with_gradient else (0,))  # contiguous, as the compiler has been told
    if terms == 0 or min(map(len, groups)) == 0:
        return loss, gradient
    vectors = [z[group] for group in groups]
    longest = max(map(len, groups))
    # Tiles of fresh memory would cost more page faults than arithmetic.
    workspace = z.new_empty(3, min(max(TILE, longest), longest**2))
    lse = _logsumexps(vectors, temperature, workspace[0], with_positives=sup_con)
    derivatives = [torch.zeros_like(vector) for vector in vectors]
    weights = []
    for vector, own_lse, derivative in zip(vectors, lse, derivatives, strict=True):
        # What an anchor's negatives weigh: their shares of its lse times the sum of -derivatives of its pairs.
        weight = torch.zeros_like(own_lse)
        for row, column, tile in _pairs(vector, temperature, workspace[0], fill=math.inf):
            one, other = (_shaped(buffer, tile.shape) for buffer in workspace[1:])
            if sup_con:
                loss += _sup_con_pairs(tile, own_lse[row], own_lse[column], 1 / (len(vector) - 1), one, other)
            else:
                loss += _nt_xent_pairs(tile, own_lse[row], own_lse[column], weight[row], weight[column], one, other)
            if with_gradient:
                derivative[row].addmm_(tile, vector[column])
                derivative[column].addmm_(tile.T, vector[row])
        weights.append(weight)
    if sup_con:
        weights = [torch.full_like(own, len(own) > 1) for own in lse]
        loss += sum((weight * own_lse).sum() for weight, own_lse in zip(weights, lse, strict=True))
    for row, tile in _negatives(vectors, temperature, workspace[0]) if with_gradient else ():
        one = torch.sub(tile, lse[0][row, None], out=_shaped(workspace[1], tile.shape)).exp_()
        tile.sub_(lse[1]).exp_().mul_(weights[1]).add_(one.mul_(weights[0][row, None]))
        derivatives[0][row].addmm_(tile, vectors[1])
        derivatives[1].addmm_(tile.T, vectors[0][row])
    if with_gradient:
        for group, derivative in zip(groups, derivatives, strict=True):
            gradient[group] = derivative
    return loss / terms, gradient.div_(temperature * terms)


def _pairs(vectors: Tensor, temperature: float, buffer: Tensor, fill: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and similarities of tiles that hold each pair of different vectors once; the rest is filled."""
    start, total = 0, len(vectors)
    columns = vectors / temperature  # dividing the products would be another pass over every tile
    while start < total - 1:
        row, column = slice(start, start + max(1, TILE // (total - start))), slice(start, None)
        shape = len(vectors[row]), total - start
        tile = torch.mm(vectors[row], columns[column].T, out=_shaped(buffer, shape))
        square = tile[:, : len(tile)]
        square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril_(), fill)
        yield row, column, tile
        start = row.stop


def _negatives(vectors: Sequence[Tensor], temperature: float, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the first vectors, and their similarities with all the others."""
    rows = max(1, len(buffer) // len(vectors[1]))
    columns = (vectors[1] / temperature).T
    for start in range(0, len(vectors[0]), rows):
        row = slice(start, start + rows)
        yield row, torch.mm(vectors[0][row], columns, out=_shaped(buffer, (len(vectors[0][row]), columns.shape[1])))


def _logsumexps(vectors: Sequence[Tensor], temperature: float, buffer: Tensor, *, with_positives: bool) -> list[Tensor]:
    """Of each vector, over its similarities with those of the other label and, if asked, of its own."""
    lse = [vector.new_full((len(vector),), -math.inf) for vector in vectors]
    for row, tile in _negatives(vectors, temperature, buffer):
        lse[0][row] = tile.logsumexp(1)
        torch.logaddexp(lse[1], tile.logsumexp(0), out=lse[1])
    for vector, own in zip(vectors, lse, strict=True) if with_positives else ():
        for row, column, tile in _pairs(vector, temperature, buffer, fill=-math.inf):
            torch.logaddexp(own[row], tile.logsumexp(1), out=own[row])
            torch.logaddexp(own[column], tile.logsumexp(0), out=own[column])
    return lse


def _nt_xent_pairs(
    s: Tensor, lse: Tensor, other_lse: Tensor, weight: Tensor, other_weight: Tensor, one: Tensor, scratch: Tensor
) -> Tensor:
    """Loss of both orders of the pairs in a tile (inf: no pair), which becomes its gradient; adds up the weights."""
    torch.sub(lse[:, None], s, out=one)
    torch.sub(other_lse, s, out=s)
    loss = _softplus_to_sigmoid_(one, scratch) + _softplus_to_sigmoid_(s, scratch)
    weight += one.sum(1)
    other_weight += s.sum(0)
    s.add_(one).neg_()
    return loss


def _sup_con_pairs(s: Tensor, lse: Tensor, other_lse: Tensor, share: float, one: Tensor, other: Tensor) -> Tensor:
    """-2 share s of the pairs in a tile (inf: no pair), which becomes the gradient of their anchors' losses."""
    nothing = s == math.inf
    loss = -2 * share * s.masked_fill_(nothing, 0).sum()
    torch.sub(s, lse[:, None], out=one).exp_()
    torch.sub(s, other_lse, out=other).exp_()
    torch.add(one, other, out=s).sub_(2 * share).masked_fill_(nothing, 0)
    return loss


def _shaped(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    return buffer[: math.prod(shape)].view(*shape)


def _softplus_to_sigmoid_(x: Tensor, scratch: Tensor) -> Tensor:
    """Sum of log(1 + exp(x)), where x = lse - s makes it that of nt_xent's pairs; x becomes q = sigmoid(x).

    log(1 + exp(x)) = max(x, 0) - log(max(q, 1 - q)). A logarithm costs a CPU as much as dozens of products, so the
    logarithms of 64 values are taken at once: 2^-64 is far from underflow.
    """
    above = torch.clamp(x, min=0, out=scratch).sum()
    x.sigmoid_()
    torch.maximum(x, torch.sub(1, x, out=scratch), out=scratch)
    whole = x.numel() // 64 * 64
    products, rest = scratch.view(-1)[:whole].view(64, -1).prod(0), scratch.view(-1)[whole:]
    loss = above - products.log().sum() - rest.log().sum()
    if loss > 0.02 * x.numel():
        return loss
    # 1 - q has lost the digits of a small q. Of m = min(q, 1 - q) they are kept: 1 - (1 - m)(1 - n) = m + (1 - m) n.
    smaller = torch.minimum(x, torch.sub(1, x, out=scratch), out=scratch).view(-1)
    groups = smaller[:whole].view(64, -1)
    while len(groups) > 1:
        half = len(groups) // 2
        groups = groups[:half].lerp_(groups.new_ones(()), groups[half:])
    logs = torch.where(groups[0] < 0.5, groups[0].neg().log1p(), products.log())
    return above - logs.sum() - smaller[whole:].neg().log1p().sum()


def _by_mask(
    z: Tensor, ones: Tensor, zeros: Tensor, temperature: float, contrast: str, with_gradient: bool, anchors: range
) -> tuple[Tensor, Tensor]:
    """Some anchors with all embeddings, row by row: shapes depend on shapes alone."""
    total = len(z)
    n = torch.stack([ones, zeros]).sum(1).to(z.dtype)
    terms = (n * (n - 1) if contrast == "nt_xent" else n * (n > 1)).sum().clamp(min=1)
    losses = z.new_zeros(total)
    d_z = z.new_zeros(z.shape if with_gradient else (0,))
    columns = (z / temperature).T
    # Each tile costs its launches, and no cache has to hold it; without Triton it is copied several times.
    fill, tiles = (_fill_on_cuda(z.device), 32) if z.is_cuda else (_filled_by_mask, 8)
    rows = max(1, tiles * TILE // max(1, total))
    buffer = z.new_empty(min(rows, len(anchors)) * total)
    for start in anchors[::rows]:
        row = slice(start, min(start + rows, anchors.stop))
        tile = torch.mm(z[row], columns, out=_shaped(buffer, (row.stop - start, total)))
        fill(tile, losses[row], ones, zeros, start, contrast)
        if with_gradient:
            d_z[row].addmm_(tile, z)
            d_z.addmm_(tile.T, z[row])
    return losses.sum() / terms, d_z.div_(temperature * terms)


@functools.cache
def _fill_on_cuda(device: torch.device) -> Callable[..., None]:
    """One kernel for all that is done to a tile, where Triton compiles and launches; a warning where it does not."""
    flags = torch.ones(2, dtype=torch.bool, device=device)
    try:
        from contrastive_exudate_loss.triton_rows import filled_by_triton

        filled_by_triton(torch.zeros(2, 2, device=device), torch.zeros(2, device=device), flags, ~flags, 0, "nt_xent")
    except torch.OutOfMemoryError:  # says nothing about Triton
        raise
    except Exception as error:  # of many kinds: no Triton, no C compiler, an old GPU, a driver of another version
        warnings.warn(
            f"the contrastive terms do without Triton on {device} and take longer: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return _filled_by_mask
    return filled_by_triton


def _filled_by_mask(s: Tensor, losses: Tensor, ones: Tensor, zeros: Tensor, start: int, contrast: str) -> None:
    """What triton_rows.filled_by_triton does, with operators that every device has."""
    row = slice(start, start + len(s))
    negative = (ones[row, None] & zeros) | (zeros[row, None] & ones)
    positive = (ones[row, None] & ones) | (zeros[row, None] & zeros)
    index = torch.arange(s.shape[1], device=s.device)
    positive &= (index[row, None] != index) & negative.any(1, keepdim=True)
    pos, neg = s.masked_fill(~positive, math.inf), s.masked_fill(~negative, -math.inf)
    # What is NaN touches no anchor that has no pair.
    paired = positive.any(1)
    losses.copy_(torch.where(paired, _ROWS[contrast](pos, neg), 0))
    torch.add(pos, neg, out=s).masked_fill_(~paired[:, None], 0)


def _nt_xent_rows(pos: Tensor, neg: Tensor) -> Tensor:
    """Each anchor's sum over its pairs; pos (inf: no pair) and neg (-inf: no negative) become its gradients."""
    lse = _finite(neg.logsumexp(1, keepdim=True))
    # With x = lse - s, -log(exp(s) / (exp(s) + exp(lse))) = log(1 + exp(x)), whose derivative by s is -sigmoid(x).
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
