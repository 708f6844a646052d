"""A criterion's weights from the norms of its last backward pass, in one kernel instead of about thirty in torch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def advanced_by_triton(
    means: Tensor, terms: Tensor, layer: Tensor, hand: Tensor, features_norm: Tensor, least: Sequence[float],
    times: Sequence[float], warm_up: Sequence[int], memory: float, outlier: float,
) -> Tensor:  # fmt: skip
    """What pull._advanced does in one process; the arguments are the same."""
    weights = means.new_empty(2)
    with torch.cuda.device_of(means):  # Triton launches on the current device
        floats = (float(number) for number in (*least, *times))
        _advance[1,](means, terms, layer, hand, features_norm, weights, *floats, *warm_up, memory, outlier)
    return weights


@triton.jit(do_not_specialize=["warm_up_0", "warm_up_1"])
def _advance(
    means, terms, layer, hand, features_norm, weights, least_0: tl.float64, least_1: tl.float64,
    times_0: tl.float64, times_1: tl.float64, warm_up_0, warm_up_1, memory: tl.float64, outlier: tl.float64,
):  # fmt: skip
    """The places in the records are those of pull.py.

    Args:
        means: (12,), float32, is changed.
        terms: (4,), float32.
        layer: (2,), float32.
        hand: (2,), float32.
        features_norm: (), floating.
        weights: (2,), float32, to be written: of density and edge.
    """
    step = tl.load(means) + 1
    seen_terms, seen_layer, seen_hand = tl.load(terms), tl.load(layer), tl.load(hand)
    at_layer, by_hand = seen_layer != tl.load(means + 2), seen_hand != tl.load(means + 3)
    is_new = seen_terms != tl.load(means + 1)
    scale = tl.load(terms + 1)
    supervised = tl.where(by_hand, tl.load(hand + 1), tl.where(at_layer, tl.load(layer + 1) / scale, 0))
    supervised = tl.abs(supervised)
    density, edge = tl.abs(tl.load(terms + 2) / scale), tl.abs(tl.load(terms + 3) / scale)
    is_new &= _is_finite(supervised) & _is_finite(density) & _is_finite(edge)
    mean = _mean(means, 0, supervised, is_new & (at_layer | by_hand), memory, outlier)
    tells_density = density * tl.load(features_norm) > tl.full([], least_0, tl.float32)
    tells_edge = edge * tl.load(features_norm) > tl.full([], least_1, tl.float32)
    mean_density = _mean(means, 1, density, is_new & tells_density, memory, outlier)
    mean_edge = _mean(means, 2, edge, is_new & tells_edge, memory, outlier)
    tl.store(means, step)
    tl.store(means + 1, seen_terms)
    tl.store(means + 2, seen_layer)
    tl.store(means + 3, seen_hand)
    _write(means, weights, 0, step, mean, mean_density, times_0, warm_up_0)
    _write(means, weights, 1, step, mean, mean_edge, times_1, warm_up_1)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _mean(means, place, norm, counted, memory, outlier):
    """The mean of the norms so far, with this one if it is counted, at most as an outlier; NaN without any."""
    old, new = tl.full([], memory, tl.float32), tl.full([], 1 - memory, tl.float32)
    total, share = tl.load(means + 4 + place), tl.load(means + 7 + place)
    largest = tl.where(share > 0, tl.full([], outlier, tl.float32) * total / tl.where(share > 0, share, 1), 0)
    norm = tl.where((largest > 0) & (norm > largest), largest, norm)
    total = tl.where(counted, old * total + new * norm, total)
    share = tl.where(counted, old * share + new, share)
    tl.store(means + 4 + place, total)
    tl.store(means + 7 + place, share)
    return tl.where(share > 0, total / tl.where(share > 0, share, 1), float("nan"))


@triton.jit
def _write(means, weights, place, step, mean, mean_of_term, times, warm_up):
    known = (mean == mean) & (mean_of_term > 0)
    quotient = tl.where(known, mean / tl.where(known, mean_of_term, 1), 0)
    weight = tl.full([], times, tl.float32) * tl.where(_is_finite(quotient), quotient, 0)
    weight *= tl.minimum(step / tl.maximum(warm_up, 1), 1)
    tl.store(means + 10 + place, weight)
    tl.store(weights + place, weight)
