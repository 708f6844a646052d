"""What figures were measured with: versions, processor, threads; and how much memory is left."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "triton",
    "segmentation-models-pytorch",
    "pytorch-metric-learning",
    "torchmetrics",
    "contrastive-exudate-loss",
)


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Versions (None where a package is not installed), platform, device and threads, ready for JSON."""
    return {
        "python": platform.python_version(),
        **{name.replace("-", "_"): _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
    }


def process_count() -> int:
    """Number of processes that torchrun has started; one where it has not."""
    return int(os.environ.get("WORLD_SIZE", 1))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 2**32


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
