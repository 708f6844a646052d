"""The gradient of binary cross-entropy, in one Triton kernel; its value comes with the pooling."""

import triton
import triton.language as tl

from contrastive_exudate_loss.pooling_triton import factor, lesion_and_valid
from contrastive_exudate_loss.softplus_triton import softplus


@triton.jit(do_not_specialize=["size", "ignored"])
def spread_over_logits(
    by_logits, logits, target, number, by_total, by_supervised, size, ignored,
    ignores: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program a block of pixels.

    Args:
        by_logits: (size,), floating, to be written.
        logits: (size,), floating.
        target: (size,).
        number: (), floating: of the valid pixels, at least 1.
        by_total, by_supervised: as of factor.
    """
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    lesion, valid = lesion_and_valid(target, at, at < size, ignored, ignores)
    dtype: tl.constexpr = number.dtype.element_ty
    by_loss = factor(by_total, 1.0, by_supervised, dtype) / tl.load(number)
    _, share = softplus(tl.load(logits + at, valid, 0).to(dtype))
    gradient = tl.where(valid, (share - lesion.to(dtype)) * by_loss, 0)
    tl.store(by_logits + at, gradient.to(by_logits.dtype.element_ty), at < size)
