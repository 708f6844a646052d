"""Other embeddings for the edge term to contrast, which the study tries; none is in the package."""

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_exudate_loss import PatchEdgeContrastLoss
from contrastive_exudate_loss.contrast import contrast_loss
from contrastive_exudate_loss.morphology import dilation, inner_contour, outer_contour
from trials.instances import nearest_lesion

VARIANTS = "lesions", "decoys", "errors", "levels", "memory"
SIDE, RADIUS = 16, 2  # of patches and bands, in pixels: PatchEdgeContrastLoss's own
DECOYS = 64  # patches of a batch
AWAY = 8  # pixels from any lesion, in rows or columns, that no pixel of a decoy has
REMEMBERED = 64  # inner embeddings of earlier batches


class OtherEdgeLoss(PatchEdgeContrastLoss):
    """Contrast of the bands along contours, with other embeddings than PatchEdgeContrastLoss's.

    Args:
        variant: "lesions": one inner and one outer embedding for each lesion (8-connected) in place of each patch; a
            pixel of a band belongs to the nearest lesion. "decoys": the patches' embeddings, and beside the outer ones
            the means of whole patches that the network takes for lesion: of those away from lesions the 64 with the
            highest mean logit. "errors": the patches' embeddings, in which each pixel is weighted by the network's
            error there, |target - probability|. "levels": the mean of the package's loss of two feature maps.
            "memory": the patches' embeddings, and beside the inner ones the latest 64 of earlier batches.
        deeper: name of the layer whose input is the second of the levels; for the caller, who sets `second`.

    Shape:
        - features: (B, C, H, W), floating; 16 divides H and W, for decoys.
        - target: (B, 1, H, W) of 0 and 1.
    """

    def __init__(self, variant: str, deeper: str | None = None) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
        self.variant = variant
        self.deeper = deeper
        # Set before each call: of decoys and errors (B, 1, H, W), of levels (B, C, h, w).
        self.logits: Tensor | None = None
        self.second: Tensor | None = None
        self.remembered: Tensor | None = None  # (M, C)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss, 0 where there is nothing to contrast; arguments as under Shape."""
        if self.variant == "levels":
            levels = features, _given("second", self.second)
            return torch.stack([super(OtherEdgeLoss, self).forward(level, target) for level in levels]).mean()
        lesion = target[:, 0] == 1
        inner = inner_contour(lesion, ~lesion, RADIUS, self.footprint)
        outer = outer_contour(lesion, ~lesion, RADIUS, self.footprint)
        places = _nearest(lesion) if self.variant == "lesions" else _patches(lesion)
        weighted = features
        if self.variant == "errors":
            error = (target - _given("logits", self.logits).sigmoid()).abs()
            weighted, wrong = features * error, error[:, 0] > 0
            inner, outer = inner & wrong, outer & wrong
        sums, sizes = zip(*(_sums(weighted, band, places) for band in (inner, outer)), strict=True)
        vectors, labels = torch.cat(sums), torch.repeat_interleave(torch.tensor([True, False]), len(sums[0]))
        present = torch.cat(sizes) > 0
        if self.variant == "decoys":
            further = self._decoys(features, lesion)
        elif self.variant == "memory":
            further = features.new_zeros(0, features.shape[1]) if self.remembered is None else self.remembered
            own = vectors[labels & present].detach()
            self.remembered = torch.cat([own, further])[:REMEMBERED]
        else:
            further = vectors[:0]
        vectors = torch.cat([vectors, further])
        labels, present = (
            torch.cat([flags, torch.full((len(further),), value)])
            for flags, value in ((labels, self.variant == "memory"), (present, True))
        )
        return contrast_loss(vectors, labels, present, temperature=self.temperature)

    def _decoys(self, features: Tensor, lesion: Tensor) -> Tensor:
        """(decoys, C): mean features of the patches away from lesions with the highest mean logits."""
        near = F.max_pool2d(dilation(lesion, AWAY, "square")[:, None].float(), SIDE)
        score = F.avg_pool2d(_given("logits", self.logits), SIDE).masked_fill(near > 0, -torch.inf).flatten()
        best = score.topk(min(DECOYS, int(score.isfinite().sum()))).indices
        return F.avg_pool2d(features, SIDE).movedim(1, -1).flatten(0, 2)[best]


def _given(name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} must be set before each call, got None")
    return tensor


def _nearest(lesion: Tensor) -> Tensor:
    """The number of each pixel's nearest lesion, (B, H, W), counted through the batch; 0 in images without lesions."""
    found, before = torch.zeros(lesion.shape, dtype=torch.int64), 0
    for n, mask in enumerate(lesion):
        if mask.any():
            nearest, count = nearest_lesion(mask)
            found[n] = nearest + before
            before += count
    return found


def _patches(lesion: Tensor) -> Tensor:
    """The number of each pixel's patch, (B, H, W), counted through the batch."""
    batch, height, width = lesion.shape
    rows, columns = height // SIDE, width // SIDE
    numbers = torch.arange(batch * rows * columns).view(batch, rows, columns)
    return numbers.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)


def _sums(features: Tensor, band: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of the band's pixels at each place the sum of the features, (places, C), and the number, (places,)."""
    count, own = int(places.max()) + 1, places[band]
    vectors = features.movedim(1, -1)[band]
    return vectors.new_zeros(count, features.shape[1]).index_add(0, own, vectors), torch.bincount(own, minlength=count)
