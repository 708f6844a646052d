"""Rows of similarities to their anchors' losses and gradients, in one Triton kernel: a GPU waits for every launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_exudate_loss.softplus_triton import softplus

BLOCK = 1024  # columns at a time


def filled_by_triton(s: Tensor, losses: Tensor, label_1: Tensor, label_0: Tensor, start: int, contrast: str) -> None:
    """What contrast_rows.filled_by_mask does, as one kernel; the arguments are the same."""
    flags = label_1.view(torch.uint8), label_0.view(torch.uint8)
    with torch.cuda.device_of(s):  # Triton launches on the current device
        _fill[(len(s),)](s, losses, *flags, start, s.shape[1], contrast == "sup_con", BLOCK)


@triton.jit(do_not_specialize=["start"])
def _fill(s, losses, label_1, label_0, start, total, sup_con: tl.constexpr, block: tl.constexpr):
    """One program an anchor: its logsumexp, then its loss, then its row of the gradient."""
    row = tl.program_id(0)
    anchor = start + row
    s += row.to(tl.int64) * total
    nothing = tl.full([], float("-inf"), s.dtype.element_ty)
    top, exps, negatives = nothing, tl.full([], 0, nothing.dtype), 0
    for first in range(0, total, block):
        column = first + tl.arange(0, block)
        inside, pair, negative = _partners(label_1, label_0, anchor, column, total)
        value = tl.where(negative | pair if sup_con else negative, tl.load(s + column, inside, 0), nothing)
        higher = tl.maximum(top, tl.max(value, 0))
        shift = tl.where(higher == nothing, 0, higher)
        exps = exps * tl.exp(top - shift) + tl.sum(tl.exp(value - shift), 0)
        top = higher
        negatives += tl.sum(negative.to(tl.int32), 0)
    lse = tl.where(negatives > 0, top + tl.log(tl.where(negatives > 0, exps, 1)), 0)
    loss, weight = tl.full([], 0, nothing.dtype), tl.full([], 0, nothing.dtype)
    for first in range(0, total, block):
        column = first + tl.arange(0, block)
        inside, pair, negative = _partners(label_1, label_0, anchor, column, total)
        x = lse - tl.load(s + column, inside, 0)
        if sup_con:
            part, share = x, tl.full([block], 1, x.dtype)
        else:
            part, share = softplus(x)
        pair = pair & (negatives > 0)
        loss += tl.sum(tl.where(pair, part, 0), 0)
        weight += tl.sum(tl.where(pair, share, 0), 0)
    for first in range(0, total, block):
        column = first + tl.arange(0, block)
        inside, pair, negative = _partners(label_1, label_0, anchor, column, total)
        x = lse - tl.load(s + column, inside, 0)
        t = tl.exp(-tl.abs(x))  # of all that are in the lse x >= 0, so that this is their share of it
        if sup_con:  # whose weight is the number of pairs
            repelled, attracted = t, t - 1 / tl.maximum(weight, 1)
        else:
            repelled, attracted = weight * t, -tl.where(x > 0, 1, t) / (1 + t)
        repelled = tl.where(weight == 0, 0, repelled)  # without a pair, NaN or not; a NaN weight is not 0
        gradient = tl.where(pair & (negatives > 0), attracted, tl.where(negative, repelled, 0))
        tl.store(s + column, gradient, inside)
    tl.store(losses + row, loss / tl.maximum(weight, 1) if sup_con else loss)


@triton.jit
def _partners(label_1, label_0, anchor, column, total):
    """Which columns there are, which of them are the anchor's pairs, and which its negatives."""
    inside = column < total
    is_1, is_0 = tl.load(label_1 + anchor), tl.load(label_0 + anchor)
    other_1, other_0 = tl.load(label_1 + column, inside, 0), tl.load(label_0 + column, inside, 0)
    pair = ((is_1 & other_1) | (is_0 & other_0)) != 0
    negative = ((is_1 & other_0) | (is_0 & other_1)) != 0
    return inside, pair & (column != anchor), negative
