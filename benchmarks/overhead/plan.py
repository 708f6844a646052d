"""How much run.py measures: everything, or small sizes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Plan(NamedTuple):
    """How much to measure.

    device: on which.
    seed: of data and weights.
    budget: seconds after which no further round of a group begins.
    image: height and width in pixels, for overhead and otherwise.
    channels: of the features, likewise.
    loop_side: side of the images for the published code's manner, a multiple of 5.
    encoders: of the networks for training_step.
    training: images in a batch and their side, for training_step, inference and pull.
    settled: steps before pull is timed.
    growth: the sizes to vary, and their values.
    growth_side: side of the images while another size grows.
    embeddings: M of the contrast alone.
    compiled: the losses to compile.
    """

    device: torch.device
    seed: int
    budget: float
    image: tuple[int, int]
    channels: int
    loop_side: int
    encoders: tuple[str, ...]
    training: tuple[int, int]
    settled: int
    growth: Mapping[str, tuple[Any, ...]]
    growth_side: int
    embeddings: tuple[int, ...]
    compiled: tuple[str, ...]


def full(device: torch.device, seed: int) -> Plan:
    """The sizes of a paper's experiment, up to a native photograph."""
    return Plan(
        device,
        seed,
        budget=20.0,
        image=(512, 512),
        channels=32,
        loop_side=510,
        encoders=("resnet18", "resnet50"),
        training=(6, 256),
        settled=100,
        growth={
            "side": ((256, 256), (512, 512), (1024, 1024), (2048, 2048), (2848, 4288)),
            "channels": (8, 16, 32, 64, 128),
            "batch": (1, 2, 4, 8, 16),
            "patch_size": (64, 32, 16, 8),
            "area": (0.0, 0.01, 0.1, 1.0),
            "stride": (1, 4, 8),
        },
        growth_side=512,
        embeddings=(16, 32, 64, 128, 256, 1024, 4096, 8192, 16384, 47704),
        compiled=("BCE", "density", "edge", "combined"),
    )


def quick(device: torch.device, seed: int) -> Plan:
    """Small sizes, to see in a minute that all of it works."""
    return full(device, seed)._replace(
        budget=0.3,
        image=(128, 128),
        channels=8,
        loop_side=60,
        encoders=("resnet18",),
        training=(2, 64),
        settled=2,
        growth={
            "side": ((64, 64), (128, 128), (178, 268)),
            "channels": (4, 8),
            "batch": (1, 2),
            "patch_size": (32, 16),
            "area": (0.0, 0.01, 0.1, 1.0),
            "stride": (1, 4),
        },
        growth_side=128,
        embeddings=(16, 32, 64, 1024),
        compiled=("combined",),
    )
