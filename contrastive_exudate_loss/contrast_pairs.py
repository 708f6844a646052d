"""Contrast on the CPU: every pair once, pairs of equal and of different labels in separate tiles."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Similarities in a tile: few enough for a CPU's cache, enough to be worth waking its threads.
TILE = 524_288


def loss_by_pairs(
    z: Tensor, label_1: Tensor, label_0: Tensor, temperature: float, contrast: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to z; the sizes of the tiles depend on the data.

    Args:
        z: (M, C), unit or zero vectors.
        label_1: (M,), bool: the present embeddings of label 1.
        label_0: (M,), bool: those of label 0.
        temperature: > 0.
        contrast: "nt_xent" or "sup_con".
        with_gradient: whether to form the gradient; else it is (0,).
    """
    sup_con = contrast == "sup_con"
    groups = [label.nonzero().squeeze(1) for label in (label_1, label_0)]
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
    """Rows, columns and similarities of tiles that hold each pair of different vectors once; other places hold fill."""
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
    """For each vector, over its similarities with those of the other label and, if asked, of its own."""
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
