"""The values of command lines, read for argparse: whole numbers, devices, files to write."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch


def whole_number(minimum: int, multiple_of: int = 1) -> Callable[[str], int]:
    """Reads an integer >= minimum for argparse."""
    expected = f"an integer >= {minimum}" + (f" and a multiple of {multiple_of}" if multiple_of > 1 else "")

    def integer(text: str) -> int:
        # Eighteen digits are more than any option can use, and torch's seeds end soon after.
        if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < minimum or int(text) % multiple_of:
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return int(text)

    return integer


def device(text: str) -> torch.device:
    """Reads a device for argparse; auto is CUDA where there is one."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    if text.startswith("cuda") and count == 0:
        raise argparse.ArgumentTypeError(f"must be auto or cpu where PyTorch finds no CUDA device, got {text!r}")
    if text not in ("cpu", "cuda", *(f"cuda:{i}" for i in range(count))):
        raise argparse.ArgumentTypeError(f"must be auto, cpu or one of {count} CUDA devices, got {text!r}")
    # Each process that torchrun starts has a device of its own.
    own = os.environ.get("LOCAL_RANK")
    return torch.device(text if own is None or text != "cuda" else f"cuda:{own}")


def writable_file(text: str) -> Path:
    """Reads the path of a file to write for argparse."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that can be written to, got {text!r}")
    return path


def picture_file(text: str) -> Path:
    """Reads the path of a PNG to write for argparse."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return writable_file(text)
