"""Weights that a criterion sets itself, from how hard a term pulls at the features compared with the supervised loss.

    weight = times min(1, step / warm_up) mean ||d supervised / d features|| / mean ||d term / d features||

The backward pass records the norms, and the next training call takes them into the means. So a weight depends only on
earlier steps. With a tap nothing is differentiated twice; for features given to the call, the supervised loss is
differentiated by itself now and then.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_exudate_loss import _checks, graph
from contrastive_exudate_loss.norms import COUNT, NORM, Recorded, write_norm

MEMORY = 0.99  # of the means, for a measurement
OUTLIER = 10.0  # times the mean: what a larger norm counts as, or one step could switch a term off for hundreds
PROBE = 2.0**-10  # what a term's gradient is carried with while its weight is 0: measured, but not passed on
HALF_SCALE = 2.0**13  # of gradients in float16
# If all embeddings are the same vector, for instance because one cell of the features holds a whole lesion, the exact
# gradient of a cosine is 0 and what is measured is rounding error. The norm of the gradient times that of the features
# times the temperature is then about 1e-6; before training it is about 0.03.
NOISE = 5e-5
SAMPLED = 8  # every eighth row is enough to estimate the norm of the features

# Places in the means, (12,): training calls; backward passes seen of the terms, of the layer and by hand; for the
# supervised loss, density and edge, the sums of discounted norms and of the discounts; the weights of density and edge
# last used, 0 for a number.
STEP, SEEN, SUMS, SHARES, USED = 0, slice(1, 4), slice(4, 7), slice(7, 10), slice(10, 12)
# In the norms of the terms, (4,): COUNT, the gradient of the total, the norms of density and edge.
SCALE, TERMS = 1, slice(2, 4)
# Of the norms of the supervised loss, (2,) each, the one at the layer is scaled like the total's gradient.


@dataclasses.dataclass(frozen=True)
class Pull:
    """A weight that CombinedExudateLoss sets itself: the term pulls `times` times as hard as the supervised loss.

        weight = times min(1, step / warm_up) mean ||d supervised / d features|| / mean ||d term / d features||

    The means are exponential over the training steps before, with memory 0.99, and bias-corrected; a step
    without a contrast leaves the term's mean as it is, and a norm above ten times its mean counts as ten times the
    mean. In the first step the weight is 0. With a tap other losses on the same logits count as supervised.

    Args:
        times: how hard the term pulls, in multiples of the supervised loss's gradient norm at the features; finite,
            >= 0.
        warm_up: training calls over which the weight rises, >= 0.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> Pull(0.5, warm_up=300)
        Pull(times=0.5, warm_up=300)
    """

    times: float = 2.0
    warm_up: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        _checks.check_number("times", self.times, 0)
        _checks.check_integer("warm_up", self.warm_up, 0)
        object.__setattr__(self, "times", _checks.plain_option(self.times))
        object.__setattr__(self, "warm_up", _checks.plain_option(self.warm_up))


_NOTHING = Pull(0.0)


def new_state() -> dict[str, Tensor]:
    """The state of a criterion that has measured nothing: means, and the norms of the last backward pass."""
    return {
        "means": torch.zeros(USED.stop),
        "terms": torch.zeros(TERMS.stop),
        "layer": torch.zeros(2),
        "hand": torch.zeros(2),
    }


def known(state: dict[str, Tensor]) -> bool:
    """Whether there is a mean of the supervised loss and of a term; waits for the device."""
    shares = state["means"][SHARES]
    return bool(shares[0]) and bool(shares[1:].any())


def advanced_weights(
    state: dict[str, Tensor],
    pulls: Sequence[Pull | None],
    features: Tensor,
    temperatures: Sequence[float],
    summed: Callable[[Tensor], Tensor] | None,
    by_kernel: bool,
) -> Tensor:
    """The weights of density and edge in this training call, after taking the last backward pass into the means.

    A weight that is no Pull is 0 here: the compiler would compile again for each number.

    Args:
        state: is changed in place.
        pulls: of density and edge; None for a number.
        features: of this call; the norm of the last call's is taken to be theirs.
        temperatures: of density and edge.
        summed: gives the sum over all processes of a tensor; None for one process.
        by_kernel: whether a Triton kernel may do it.

    Returns:
        (2,), float32.
    """
    given = [_NOTHING if pull is None else pull for pull in pulls]
    times, warm_up = [pull.times for pull in given], [pull.warm_up for pull in given]
    rows = features.detach()[:, :, ::SAMPLED]
    features_norm = torch.linalg.vector_norm(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    least = [NOISE / temperature / SAMPLED**0.5 for temperature in temperatures]
    records = state["means"], state["terms"], state["layer"], state["hand"], features_norm
    if torch.compiler.is_compiling():
        advanced: Tensor = _advance(*records, least, times, warm_up)
        return advanced
    if by_kernel and summed is None:
        from contrastive_exudate_loss.pull_triton import advanced_by_triton

        return advanced_by_triton(*records, least, times, warm_up, MEMORY, OUTLIER)
    return _advanced(*records, least, times, warm_up, summed)


def differentiated(supervised: Tensor, features: Tensor, state: dict[str, Tensor]) -> bool:
    """Record the norm of the supervised loss's gradient at the features, by differentiating.

    For features that do not come from a tap. Returns whether the supervised loss depends on them.
    """
    # Scaled, since the gradients of a mean over pixels would vanish in half precision.
    scale = HALF_SCALE if features.dtype == torch.float16 else 1.0
    made = graph.within_wrapper(features)
    (gradient,) = torch.autograd.grad(
        supervised, made, torch.full_like(supervised, scale), retain_graph=True, allow_unused=True
    )
    if gradient is None:
        return False
    write_norm(state["hand"], gradient, gradient.new_tensor(scale, dtype=torch.float32), NORM, True)
    return True


def last_weights(state: dict[str, Tensor], pulls: Sequence[Pull | None]) -> Tensor:
    """The weights of density and edge that advanced_weights gave last, 0 for what is no Pull now, (2,), float32."""
    weights = state["means"][USED].clone()
    for weight, pull in zip(weights, pulls, strict=True):
        if pull is None:
            weight.zero_()
    return weights


def measured_features(features: Tensor, state: dict[str, Tensor], term: int, weights: Tensor) -> Tensor:
    """The features for a term (0: density, 1: edge), whose gradient is measured, and weighted on its way to them."""
    weight = weights[term]
    # The CPU may look at the weight, which saves the backward pass a copy; other devices would have to wait.
    looks = features.is_cpu and not torch.compiler.is_compiling()
    passes = None if looks and bool(weight > 0) else weight > 0
    measured: Tensor = Recorded.apply(features, state["terms"], TERMS.start + term, False, _carried(weight), passes)
    return measured


def total(supervised: Tensor, density: Tensor, edge: Tensor, weights: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Supervised + weights[0] density + weights[1] edge; the backward pass records the gradient of this total."""
    weighted: Tensor = _Total.apply(supervised, density, edge, weights, state["terms"])
    return weighted


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, supervised: Tensor, density: Tensor, edge: Tensor, weights: Tensor, record: Tensor) -> Tensor:
        ctx.record = record
        ctx.dtypes = supervised.dtype, density.dtype, edge.dtype
        ctx.save_for_backward(_carried(weights))
        alpha, beta = weights.unbind()
        return supervised + alpha.to(density.dtype) * density + beta.to(edge.dtype) * edge

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (carried,) = ctx.saved_tensors
        (_write_scale if torch.compiler.is_compiling() else _scale_written)(ctx.record, gradient)
        factors = gradient, gradient * carried[0], gradient * carried[1]
        return *(factor.to(dtype) for factor, dtype in zip(factors, ctx.dtypes, strict=True)), None, None


def _carried(weights: Tensor) -> Tensor:
    """What the gradients of the terms are multiplied by on their way to the features."""
    return torch.where(weights > 0, weights, PROBE)


def _scale_written(record: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        record[COUNT].add_(1)
        record[SCALE] = gradient
        record[TERMS].zero_()  # until their gradients come


_write_scale = torch.library.custom_op(
    "contrastive_exudate_loss::write_scale",
    mutates_args=("record",),
    schema="(Tensor(a!) record, Tensor gradient) -> ()",
)(_scale_written)


def _advanced(
    means: Tensor,
    terms: Tensor,
    layer: Tensor,
    hand: Tensor,
    features_norm: Tensor,
    least: Sequence[float],
    times: Sequence[float],
    warm_up: Sequence[int],
    summed: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    with torch.no_grad():
        # Each operator is a launch on CUDA, so the three norms are one tensor.
        zero = terms.new_zeros(())
        seen = torch.stack([terms[COUNT], layer[COUNT], hand[COUNT]])
        is_new, at_layer, by_hand = (seen != means[SEEN]).unbind()
        supervised = torch.where(by_hand, hand[NORM], torch.where(at_layer, layer[NORM] / terms[SCALE], zero))
        norms = torch.stack([supervised, *(terms[TERMS] / terms[SCALE])]).abs()
        told = [norm > noise for norm, noise in zip((norms[1:] * features_norm).unbind(), least, strict=True)]
        counted = torch.stack([at_layer | by_hand, *told])
        counted &= is_new & (norms.sum() < math.inf)
        norms = norms.where(counted, zero)
        if summed is not None:
            norms, number = summed(torch.stack([norms, counted.float()])).unbind()
            norms, counted = norms / number.clamp(min=1), number > 0
        sums, shares = means[SUMS], means[SHARES]
        largest = OUTLIER * sums / shares  # NaN before the first
        norms = torch.fmin(norms, largest / (largest > 0))  # NaN too where it is 0; fmin leaves NaN out
        rate = (1 - MEMORY) * counted
        sums.lerp_(norms, rate)
        shares.addcmul_(rate, 1 - shares)
        means[SEEN] = seen
        means[STEP].add_(1)
        # NaN where a mean is missing, infinite where the term's is 0: both give the weight 0.
        mean, used = sums / shares, means[USED]
        used.copy_((mean[0] / mean[1:]).nan_to_num(0, 0))
        for n in (0, 1):
            used[n].mul_(times[n])
            if warm_up[n]:
                used[n].mul_(torch.clamp(means[STEP] / warm_up[n], max=1))
        return used.clone()


_advance = torch.library.custom_op(
    "contrastive_exudate_loss::advance",
    mutates_args=("means",),
    schema="(Tensor(a!) means, Tensor terms, Tensor layer, Tensor hand, Tensor features_norm, "
    "float[] least, float[] times, int[] warm_up) -> Tensor",
)(_advanced)


@_advance.register_fake
def _(means: Tensor, *_: Any) -> Tensor:
    return means.new_empty(2)
