"""Identities whose backward pass records the norm of the gradient that passes through."""

from typing import Any

import torch
from torch import Tensor

COUNT = 0  # where every record has the number of backward passes
NORM = 1  # where a record of one norm, (2,), has it


class Recorded(torch.autograd.Function):
    """The tensor itself; the backward pass writes the norm of its gradient into a record.

    Call Recorded.apply(tensor, record, place, counts, divisor, passes), with

        record: (N,), float32, on the tensor's device.
        place: where to write the norm.
        counts: whether to add 1 to record[COUNT].
        divisor: (), float32: the norm is divided by it; None for 1.
        passes: (), bool: if False, the gradient is recorded but goes no further; None for True.
    """

    @staticmethod
    def forward(  # noqa: D102 - the class says it
        ctx: Any,
        tensor: Tensor,
        record: Tensor,
        place: int,
        counts: bool,
        divisor: Tensor | None,
        passes: Tensor | None,
    ) -> Tensor:
        # Not with save_for_backward, which would refuse the record once another backward pass has written into it.
        ctx.record, ctx.options = record, (place, counts)
        ctx.save_for_backward(divisor, passes)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102 - likewise
        divisor, passes = ctx.saved_tensors
        write = _write_norm if torch.compiler.is_compiling() else write_norm
        write(ctx.record, gradient, divisor, *ctx.options)
        if passes is not None:
            gradient = torch.where(passes, gradient, 0)  # not a product: what overflowed must not become NaN
        return gradient, None, None, None, None, None


def write_norm(record: Tensor, gradient: Tensor, divisor: Tensor | None, place: int, counts: bool) -> None:
    """Write a gradient's norm into a record; arguments as for Recorded."""
    with torch.no_grad():
        norm = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        record[place] = norm if divisor is None else norm / divisor
        if counts:
            record[COUNT].add_(1)


# The compiler would drop what a function writes as a side effect, or do it at another time.
_write_norm = torch.library.custom_op(
    "contrastive_exudate_loss::write_norm",
    mutates_args=("record",),
    schema="(Tensor(a!) record, Tensor gradient, Tensor? divisor, int place, bool counts) -> ()",
)(write_norm)
