"""The processes that torchrun has started, each with its share of the work; one where it has not."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from measure.machine import process_count
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """Which of them this one is; 0 is the one that prints and writes."""
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """They can talk to each other inside."""
    if process_count() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()  # none may leave while another still answers
    finally:
        dist.destroy_process_group()


def averaging_gradients(model: nn.Module) -> nn.Module:
    """The model, whose gradients will be the mean over the processes; some of its layers may be idle."""
    return model if process_count() == 1 else DistributedDataParallel(model, find_unused_parameters=True)


def own_share(batch: Tensor) -> Tensor:
    """This process's part of a batch that they share equally."""
    return batch.tensor_split(process_count())[rank()]


def mean_of_processes(value: Tensor) -> float:
    """Mean of a scalar, the same on all; each must call it."""
    if process_count() == 1:
        return float(value)
    total = value.clone()
    dist.all_reduce(total)
    return float(total) / process_count()
