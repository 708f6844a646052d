"""log(1 + exp(x)) in Triton, of which both contrasts and cross-entropy are made."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and its derivative; log(1 + t) is written so that a small t keeps its digits."""
    t = tl.exp(-tl.abs(x))
    u = 1 + t
    log_u = tl.where(u == 1, t, tl.log(u) * (t / tl.where(u == 1, 1, u - 1)))
    return tl.maximum(x, 0) + log_u, tl.where(x > 0, 1, t) / u
