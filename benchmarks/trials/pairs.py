"""Other pairs of patches for the density term to contrast, which the study tries; none is in the package.

nt_xent with weights, for anchor i, positive j and negatives k of cosine similarities s, divided by the temperature:

    loss = sum_ij p_ij softplus(logsumexp_k(s_ik + log q_ik) - s_ij) / sum_ij p_ij
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_exudate_loss import PatchDensityContrastLoss
from contrastive_exudate_loss.patches import patch_sides

PAIRS = "balanced", "own image", "affinity"


class OtherPairsLoss(PatchDensityContrastLoss):
    """Contrast of the mean features of patches, with other weights of pairs than PatchDensityContrastLoss's.

    Args:
        pairs: "balanced": pairs of dense patches weigh together as much as pairs of sparse ones. "own image": an
            anchor's negatives are of its own image, and one without any is none. "affinity": of patches with lesion
            fractions d and e, 1 - |d - e| is the weight as positives, |d - e| that as negatives.
        patch_size: side of a patch in target pixels.
        temperature: as in PatchDensityContrastLoss, whose default threshold tells dense from sparse.

    Shape:
        - features: (B, C, H, W), floating; patch_size divides H and W.
        - target: (B, 1, H, W) of 0 and 1.
    """

    def __init__(self, pairs: str, patch_size: int = 16, temperature: float = 0.05) -> None:
        super().__init__(patch_size, temperature=temperature)
        if pairs not in PAIRS:
            raise ValueError(f"pairs must be one of {PAIRS}, got {pairs!r}")
        self.pairs = pairs

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss, 0 where there is nothing to contrast; arguments as under Shape."""
        sides = patch_sides(target.shape[2], target.shape[3], self.patch_size, self.num_patches)
        vectors = F.avg_pool2d(features, sides).movedim(1, -1)
        similarities = F.normalize(vectors.flatten(0, 2), dim=1) / self.temperature**0.5
        similarities = similarities @ similarities.T
        fraction = F.avg_pool2d(target, sides)
        image = torch.arange(len(target)).view(-1, 1, 1, 1).expand_as(fraction).flatten()
        positives, negatives = self._weights(fraction.flatten(), image)
        anchors = (negatives.any(1) & positives.any(1)).nonzero()[:, 0]
        if not len(anchors):
            return features.sum() * 0
        similarities, positives, negatives = (t[anchors] for t in (similarities, positives, negatives))
        against = torch.logsumexp(similarities + negatives.log(), 1, keepdim=True)
        return (positives * F.softplus(against - similarities)).sum() / positives.sum()

    def _weights(self, fraction: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """(patches, patches) of positives and negatives."""
        others = 1 - torch.eye(len(fraction))
        if self.pairs == "affinity":
            distance = (fraction[:, None] - fraction).abs()
            return (1 - distance) * others, distance
        dense = fraction > self.threshold
        same = (dense[:, None] == dense).float()
        positives, negatives = same * others, 1 - same
        if self.pairs == "balanced":
            sizes = torch.stack([(~dense).sum(), dense.sum()])
            positives = positives / (sizes * (sizes - 1)).clamp(min=1)[dense.long()][:, None]
        else:
            negatives = negatives * (image[:, None] == image)
        return positives, negatives
