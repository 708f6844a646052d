"""The embeddings of all processes, with gradients, and sums over them.

Each process is assumed to differentiate its own loss, and the gradients to be averaged, as DistributedDataParallel
does: here the losses' gradients are added up, and averaging them then gives that of the one loss.
All of it uses the default process group; the communication is never compiled.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rank_and_count() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) if torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no type
def of_all_ranks(vectors: Tensor, *columns: Tensor, classes: int) -> tuple[Tensor, ...]:
    """The rows of all processes, in the order of their ranks.

    Every process must call it, even one without rows.

    Args:
        vectors: (N, C), floating, with any N; the result's gradient reaches those of every process.
        columns: (N,) each, with values that a float holds exactly; they get no gradient.
        classes: how many times each process calls this for one loss.

    Returns:
        The vectors, (sum of N, C), and each column, (sum of N,), of the dtypes given.

    Raises:
        ValueError: the processes differ in C, in the dtype of vectors or in classes; every process raises it.
    """
    facts = [len(vectors)], vectors.shape[1], vectors.itemsize, classes
    lengths = [length for (length,) in lengths_of_ranks(*facts, device=vectors.device)]
    # cat promotes: one float64 column makes all of them float64.
    rows = torch.cat([vectors, *(column.detach()[:, None].to(vectors.device) for column in columns)], 1)
    rows = F.pad(rows, (0, 0, 0, max(1, *lengths) - len(rows)))
    gathered: Tensor = _Gathered.apply(rows)
    rows = torch.cat([block[:length] for block, length in zip(gathered, lengths, strict=True)])
    found, *others = rows.split([vectors.shape[1], *(1 for _ in columns)], 1)
    flat = (other.detach().squeeze(1).to(column.dtype) for other, column in zip(others, columns, strict=True))
    return found.to(vectors.dtype), *flat


def lengths_of_ranks(
    lengths: Sequence[int], channels: int, itemsize: int, classes: int, *, device: torch.device
) -> list[list[int]]:
    """The lengths of each rank, in the order of their ranks; every process must call it, with as many lengths.

    Raises:
        ValueError: the processes differ in channels, in itemsize or in classes; every process raises it.
    """
    facts = torch.tensor([channels, itemsize, classes, *lengths], device=device)
    by_rank = _gathered(facts).tolist()
    names = "channels of features", "bytes per value of features", "classes of target"
    for n, name in enumerate(names):
        values = [of_rank[n] for of_rank in by_rank]
        if len(set(values)) > 1:
            raise ValueError(
                f"features and target must agree on all processes with gather_distributed=True, got {name} by "
                f"rank: {', '.join(map(str, values))}"
            )
    return [of_rank[len(names) :] for of_rank in by_rank]


def rows_of_all_ranks(own: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The (K, length, ...) of each rank, without gradients; own is that of this rank."""
    missing = max(lengths) - own.shape[1]
    if missing:
        own = torch.cat([own, own.new_zeros((len(own), missing, *own.shape[2:]))], 1)
    return [block[:, :length] for block, length in zip(_gathered(own), lengths, strict=True)]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no type
def sum_of_ranks(own: Tensor) -> Tensor:
    """Sum of a tensor over all processes, with gradients; every process must call it.

    Args:
        own: floating, of the same shape on every process.

    Returns:
        Likewise, the same on every process.
    """
    total: Tensor = _Sum.apply(own)
    return total


def _gathered(own: Tensor) -> Tensor:
    """(processes, *shape) from the same shape of each."""
    everyones = own.new_empty((rank_and_count()[1], *own.shape))
    dist.all_gather(list(everyones), own.contiguous())
    return everyones


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return _gathered(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)  # not every backend has reduce_scatter
        return total[dist.get_rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
