"""Runs a function in several processes that form a group, as torchrun would, within a time limit."""

import datetime
import multiprocessing
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

# Processes are forked from a server that has imported these once, and nothing else has happened in it.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "contrastive_exudate_loss", "monai.losses"])
LIMIT = 60


def on_ranks(count, folder, function, *arguments, limit=LIMIT):
    """What function(rank, count, *arguments) returns on each rank; the test fails where one fails or hangs."""
    folder = Path(tempfile.mkdtemp(dir=folder))  # a store's file may outlive its group, and would hang the next one
    context = torch.multiprocessing.start_processes(
        _run, (count, folder, function, arguments), count, join=False, start_method="forkserver"
    )
    end = time.monotonic() + limit
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{function.__name__} hung on {count} processes for {limit} s")
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _run(rank, count, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=LIMIT),
    )
    torch.save(function(rank, count, *arguments), folder / f"{rank}.pt")
    dist.barrier()  # none may leave while another still answers
    dist.destroy_process_group()
