"""The losses whose launches and host time are counted, and what each is called with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_exudate_loss import CombinedExudateLoss, FeatureTap, PatchDensityContrastLoss, PatchEdgeContrastLoss

PAPER = 0.02, 0.1


class Configuration(NamedTuple):
    """One loss.

    criterion: called with logits and target, features and target, or all three.
    inputs: those of "logits", "target" and "features" that it is called with, in order.
    cells: rows and columns of the features of a target of 256 x 256.
    """

    criterion: Callable[..., Tensor]
    inputs: tuple[str, ...] = ("logits", "target", "features")
    cells: int = 256


def configurations() -> dict[str, Configuration]:
    """By what a table calls them; BCE, with which they are compared, is the first."""
    alone = "features", "target"
    return {
        "BCE": Configuration(F.binary_cross_entropy_with_logits, ("logits", "target")),
        "density": Configuration(PatchDensityContrastLoss(), alone),
        "edge": Configuration(PatchEdgeContrastLoss(), alone),
        "BCE and edge": Configuration(CombinedExudateLoss(0, PAPER[1])),
        "both terms": Configuration(CombinedExudateLoss(*PAPER)),
        "both, ignore_index": Configuration(CombinedExudateLoss(*PAPER, ignore_index=-1)),
        "both, stride 4": Configuration(CombinedExudateLoss(*PAPER), cells=64),
        "both, stride 256 / 60": Configuration(CombinedExudateLoss(*PAPER), cells=60),
        "both, a given supervised loss": Configuration(CombinedExudateLoss(*PAPER, supervised=_dice)),
        "both, max_patches": Configuration(_both(max_patches=64)),
        "hecl()": Configuration(CombinedExudateLoss.hecl()),
        "BCE of a feature channel": Configuration(_LossOfAChannel(F.binary_cross_entropy_with_logits), alone),
        "CombinedExudateLoss() of it, tapped": Configuration(_LossOfAChannel(), alone),
    }


def inputs_of(configuration: Configuration, device: str, *, images: int = 6, channels: int = 16) -> tuple[Tensor, ...]:
    """Tensors of a whole batch on the meta device, and elsewhere of a patch or two."""
    side = 256 if device == "meta" else 32
    cells = configuration.cells * side // 256
    learned: dict[str, Any] = {"device": device, "requires_grad": True}
    target = torch.zeros(images, 1, side, side, device=device)
    target[:, :, : side // 2, : side // 2 + 3] = 1
    batch = {
        "logits": torch.zeros(target.shape, **learned),
        "target": target,
        "features": torch.rand(images, channels, cells, cells, **learned),
    }
    return tuple(batch[name] for name in configuration.inputs)


def _both(**options: Any) -> CombinedExudateLoss:
    density, edge = PatchDensityContrastLoss(**options), PatchEdgeContrastLoss(**options)
    return CombinedExudateLoss(*PAPER, density=density, edge=edge)


class _LossOfAChannel:
    """A loss, by default CombinedExudateLoss() with a tap, whose logits are the first channel of the features."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.model = nn.Sequential(_FirstChannel())  # since a tap needs a layer inside its model
        self.loss = CombinedExudateLoss(features=FeatureTap(self.model, "0")) if loss is None else loss

    def __call__(self, features: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.model(features), target)


class _FirstChannel(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features[:, :1]


def _dice(logits: Tensor, target: Tensor) -> Tensor:
    probability = logits.sigmoid()
    return 1 - 2 * (probability * target).sum() / (probability + target).sum().clamp(min=1)
