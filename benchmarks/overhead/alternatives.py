"""What the losses are measured against: the work that nothing can avoid, and what one would otherwise write."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, RADIUS, TEMPERATURE = 16, 2, 0.05


def floor(cross_entropy: Callable[[], object], features: Tensor, counts: Sequence[int]) -> Callable[[], object]:
    """Work that no implementation of the combined loss avoids, its large buffers made beforehand.

    Binary cross-entropy forward and backward, one reading of the features, one writing of a fresh gradient of their
    size, and for each contrast of M embeddings the products Z Z^T and S Z and one exp over the M x M matrix S.

    Args:
        cross_entropy: does the first of these.
        features: (B, C, h, w), floating.
        counts: M of each contrast.
    """
    features = features.detach()
    buffers = []
    for count in counts:
        z = F.normalize(torch.randn(count, features.shape[1], device=features.device), dim=1)
        buffers.append((z, z.new_empty(count, count), torch.empty_like(z)))

    def work() -> tuple[object, ...]:
        results = cross_entropy(), features.sum(), torch.ones_like(features)
        for z, similarities, products in buffers:
            torch.mm(z, z.T, out=similarities)
            similarities.exp_()
            torch.mm(similarities, z, out=products)
        return results

    return work


def plain_terms(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The density and the edge term by multiplying the features with each mask and pooling, at stride 1.

    Args:
        features: (B, C, H, W), floating, PATCH dividing H and W.
        target: (B, 1, H, W) of 0 and 1.
    """
    lesion = target.to(features.dtype)
    around, inside = (F.max_pool2d(mask, 2 * RADIUS + 1, 1, RADIUS) for mask in (1 - lesion, lesion))
    bands = [lesion * around, (1 - lesion) * inside]
    dense = F.avg_pool2d(lesion, PATCH).flatten() > 0.5
    density = plain_contrast(_rows(F.avg_pool2d(features, PATCH)), dense)
    vectors, labels = [], []
    for label, band in zip((True, False), bands, strict=True):
        share = F.avg_pool2d(band, PATCH)
        mean = F.avg_pool2d(features * band, PATCH) / share.clamp(min=1 / PATCH**2)
        vectors.append(_rows(mean)[share.flatten() > 0])
        labels.append(torch.full((len(vectors[-1]),), label, device=features.device))
    return density, plain_contrast(torch.cat(vectors), torch.cat(labels))


def plain_contrast(embeddings: Tensor, labels: Tensor) -> Tensor:
    """NT-Xent as one writes it down: the M x M matrix stored, masks over it, the gradient left to autograd.

    Args:
        embeddings: (M, C), floating.
        labels: (M,), bool.
    """
    z = F.normalize(embeddings, dim=1)
    similarities = z @ z.T / TEMPERATURE
    same = labels[:, None] == labels
    pairs = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if same.all() or not pairs.any():
        return embeddings.sum() * 0
    negatives = similarities.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    return torch.logaddexp(torch.zeros_like(similarities), negatives - similarities)[pairs].mean()


def band_count(target: Tensor) -> int:
    """Number of inner and outer bands, one of each for a patch where it is not empty.

    Args:
        target: (B, 1, H, W) of 0 and 1.
    """
    bands = (mask * F.max_pool2d(1 - mask, 2 * RADIUS + 1, 1, RADIUS) for mask in (target, 1 - target))
    return sum(int(F.max_pool2d(band, PATCH, ceil_mode=True).count_nonzero()) for band in bands)


def _rows(pooled: Tensor) -> Tensor:
    return pooled.movedim(1, -1).flatten(0, 2)
