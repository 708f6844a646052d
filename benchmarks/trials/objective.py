"""What a run of the study minimises, from its settings: the supervised loss, the terms and their weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from data.photographs import CHANNELS
from monai.losses.hausdorff_loss import HausdorffDTLoss
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss, LovaszLoss, TverskyLoss
from torch import Tensor, nn

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    FeatureTap,
    LossTerms,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    Pull,
)
from trials.instances import blob_loss, cell_loss
from trials.pairs import OtherPairsLoss
from trials.variants import OtherEdgeLoss

IGNORED = -1
SUPERVISED: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "bce": nn.BCEWithLogitsLoss,
    "dice + bce": lambda: _sum(DiceLoss("binary"), nn.BCEWithLogitsLoss()),
    "focal": lambda: FocalLoss("binary"),
    "tversky": lambda: TverskyLoss("binary", alpha=0.3, beta=0.7),
    "hausdorff + bce": lambda: _sum(
        HausdorffDTLoss(include_background=True, sigmoid=True), nn.BCEWithLogitsLoss(), weight=0.01
    ),
    # For small lesions, or for overlap: with the published weight and a smaller one; Lovász without and with BCE.
    "cc-dice": lambda: _mixed(0.5, cell_loss),
    "cc-dice, a fifth": lambda: _mixed(0.2, cell_loss),
    "blob": lambda: _mixed(1 / 3, blob_loss),
    "blob, a tenth": lambda: _mixed(0.1, blob_loss),
    "lovasz": lambda: LovaszLoss("binary"),
    "lovasz + bce": lambda: _sum(LovaszLoss("binary"), nn.BCEWithLogitsLoss()),
}
DISC = ("background", "ignored", "ignored by the terms")
# How alpha and beta are meant: as they are, rising to that over the first third, as the share of the supervised loss's
# gradient at the features that the term's is scaled to in each step, or as the times of a Pull, likewise rising or not.
WEIGHTS = ("fixed", "ramp", "share", "pull", "pull, ramp")
MEMORY = 0.9  # of the running means of gradient norms


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that tells one run from another, the seed excepted; the defaults are plain BCE under the protocol."""

    lesions: tuple[str, ...] = ("EX",)
    network: str = "unet"
    size: int = 712
    crop: int = 256
    batch: int = 4
    steps: int = 900
    supervised: str = "bce"
    disc: str = "background"
    alpha: float = 0.0
    beta: float = 0.0
    weights: str = "fixed"
    hecl: bool = False
    density: dict[str, Any] = dataclasses.field(default_factory=dict)
    edge: dict[str, Any] = dataclasses.field(default_factory=dict)
    layer: str | None = None
    projection: bool = False
    data: str = "idrid"  # or "tiles", whose size is their own

    def __post_init__(self) -> None:
        allowed = {"supervised": tuple(SUPERVISED), "disc": DISC, "weights": WEIGHTS, "data": ("idrid", "tiles")}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.disc == "ignored" and self.supervised != "bce":
            raise ValueError(
                f"disc must not be 'ignored' where supervised is {self.supervised!r}, which ignores nothing"
            )
        for name, option, own in (("density", "pairs", self.density), ("edge", "variant", self.edge)):
            if self.disc != "background" and option in own:
                raise ValueError(f"disc must be 'background' where {name} has {option}, got {self.disc!r}")


class Objective:
    """Gives the loss of a batch.

    Args:
        settings: of the run.
        model: whose features are tapped if a term has a weight.
    """

    def __init__(self, settings: Settings, model: nn.Module) -> None:
        self.settings = settings
        self.projection: nn.Module | None = None
        self.tap = FeatureTap(model, settings.layer) if settings.alpha or settings.beta else None
        self.criterion = _criterion(settings)
        deeper = settings.edge.get("deeper")
        self.second_tap = FeatureTap(model, deeper) if deeper else None
        self.pulls = settings.weights.startswith("pull")
        if self.pulls:
            warm_up = settings.steps // 3 if settings.weights.endswith("ramp") else 0
            self.criterion.alpha, self.criterion.beta = (
                Pull(times, warm_up=warm_up) if times else 0.0 for times in (settings.alpha, settings.beta)
            )
            self.criterion.tap = self.tap
        if settings.projection:
            channels = model.get_parameter("segmentation_head.0.weight").shape[1]
            self.projection = nn.Conv2d(channels, channels, 1).to(next(model.parameters()).device)
        self.norms: dict[str, float] = {}

    def terms(self, logits: Tensor, masks: Tensor, progress: float) -> LossTerms:
        """The parts of the loss, whose total is to be minimised.

        Args:
            logits: (B, K, H, W), K the number of lesions in the settings.
            masks: (B, len(CHANNELS), H, W), bool.
            progress: 0 to 1 through the training.
        """
        target = masks[:, [CHANNELS.index(name) for name in self.settings.lesions]].float()
        if self.settings.disc != "background":
            disc = masks[:, CHANNELS.index("OD"), None]
            target = target.masked_fill(disc & (target == 0), IGNORED)
        if isinstance(self.criterion.edge, OtherEdgeLoss):
            self.criterion.edge.logits = logits.detach()
            self.criterion.edge.second = self.second_tap.take() if self.second_tap else None
        if self.tap is None or self.pulls:
            return self.criterion.terms(logits, target)
        features = self.tap.take()
        if self.settings.weights == "ramp":
            self.criterion.alpha = self.settings.alpha * rise(progress)
            self.criterion.beta = self.settings.beta * rise(progress)
        if self.projection is not None:
            features = self.projection(features)
        terms = self.criterion.terms(logits, target, features)
        return self._shared(terms, features) if self.settings.weights == "share" else terms

    def _shared(self, terms: LossTerms, features: Tensor) -> LossTerms:
        """The terms with weights that make each one's gradient at the features a share of the supervised loss's."""
        shares = {"density": self.settings.alpha, "edge": self.settings.beta}
        total = terms.supervised
        norms = gradient_norms(terms, features)
        for name, norm in norms.items():
            if norm > 0:  # a batch without the term says nothing
                self.norms[name] = norm + MEMORY * (self.norms.get(name, norm) - norm)
        for name, share in shares.items():
            if share and norms[name] > 0:
                total = total + share * self.norms["supervised"] / self.norms[name] * getattr(terms, name)
        return terms._replace(total=total)


def rise(progress: float) -> float:
    """Of a weight that rises over the first third of the training; progress is 0 to 1."""
    return min(1, 3 * progress)


def gradient_norms(terms: LossTerms, inputs: Tensor) -> dict[str, float]:
    """Norm of the gradient of each unweighted part, by its name; 0 where it does not depend on the inputs."""
    norms = {}
    for name in ("supervised", "density", "edge"):
        value = getattr(terms, name)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        norms[name] = 0.0 if gradient is None else float(gradient.norm())
    return norms


def _criterion(settings: Settings) -> CombinedExudateLoss:
    supervised: Callable[[Tensor, Tensor], Tensor] | None = SUPERVISED[settings.supervised]()
    if settings.disc == "ignored":
        supervised = None  # the criterion's own, which knows what to ignore
    elif settings.disc == "ignored by the terms":
        supervised = _with_background_for_ignored(SUPERVISED[settings.supervised]())
    ignore_index = None if settings.disc == "background" else IGNORED
    if settings.hecl:
        criterion = CombinedExudateLoss.hecl(supervised=supervised, ignore_index=ignore_index)
        criterion.alpha, criterion.beta = settings.alpha, settings.beta
    else:
        density = (
            OtherPairsLoss(**settings.density)
            if "pairs" in settings.density
            else PatchDensityContrastLoss(ignore_index=ignore_index, **settings.density)
        )
        edge = (
            OtherEdgeLoss(**settings.edge)
            if "variant" in settings.edge
            else PatchEdgeContrastLoss(ignore_index=ignore_index, **settings.edge)
        )
        criterion = CombinedExudateLoss(
            settings.alpha,
            settings.beta,
            supervised=supervised,
            density=density,
            edge=edge,
            ignore_index=ignore_index,
        )
    if settings.disc == "ignored by the terms":
        criterion.ignore_index = None  # or it would say that the supervised loss learns from these pixels
    return criterion


def _with_background_for_ignored(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, target: loss(logits, target.clamp(min=0))


def _mixed(share: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of share * loss and (1 - share) * (Dice + BCE)."""
    dice, bce = DiceLoss("binary"), nn.BCEWithLogitsLoss()
    return lambda logits, target: (
        share * loss(logits, target) + (1 - share) * (dice(logits, target) + bce(logits, target))
    )


def _sum(
    loss: Callable[[Tensor, Tensor], Tensor], other: Callable[[Tensor, Tensor], Tensor], weight: float = 1
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, target: weight * loss(logits, target) + other(logits, target)
