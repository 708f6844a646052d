"""Contrastive losses that help a segmentation model learn small, blurry lesions (arXiv 2302.11517)."""

from contrastive_exudate_loss.features import FeatureTap
from contrastive_exudate_loss.labels import lesion_masks
from contrastive_exudate_loss.losses import (
    CombinedExudateLoss,
    LossTerms,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
)
from contrastive_exudate_loss.pull import Pull

__version__ = "0.2.0"

__all__ = [
    "CombinedExudateLoss",
    "FeatureTap",
    "LossTerms",
    "PatchDensityContrastLoss",
    "PatchEdgeContrastLoss",
    "Pull",
    "__version__",
    "lesion_masks",
]
