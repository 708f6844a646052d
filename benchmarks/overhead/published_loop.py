"""The losses in the manner of the authors' published code: patch by patch in Python, masks on the CPU."""

import itertools
from typing import Any

import scipy.ndimage
import torch
from torch import Tensor


def published_loop(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The edge and the density term, slowly.

    As section "hecl" of the docs describes it: 5 x 5 patches, dense from a lesion fraction of 0.3, the 3 densest and
    the 3 sparsest of the batch; bands by erosion and dilation with scipy's cross in each patch alone (dense: inner 2,
    outer 2; sparse: inner 1, outer 5), pooled to one inner and one outer vector per image.

    Args:
        features: (B, C, H, W), floating, 5 dividing H and W.
        target: (B, 1, H, W) of 0 and 1.
    """
    rows, columns = target.shape[2] // 5, target.shape[3] // 5
    shares, means, edges, sides = [], [], [], []
    for image in range(len(target)):
        sums: dict[bool, Any] = {True: 0, False: 0}
        counts: dict[bool, Any] = {True: 0, False: 0}
        for i, j in itertools.product(range(5), range(5)):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            patch, mask = features[image, :, part[0], part[1]], target[image, 0, part[0], part[1]]
            lesion = mask.cpu().numpy() == 1
            shares.append(lesion.mean())
            means.append(patch.mean((1, 2)))
            if lesion.all() or not lesion.any():
                continue
            inner, outer = (2, 2) if shares[-1] >= 0.3 else (1, 5)
            bands = {
                True: lesion & ~scipy.ndimage.binary_erosion(lesion, iterations=inner),
                False: scipy.ndimage.binary_dilation(lesion, iterations=outer) & ~lesion,
            }
            for inside, found in bands.items():
                band = torch.from_numpy(found).to(patch)
                sums[inside] = sums[inside] + (patch * band).sum((1, 2))
                counts[inside] += band.sum()
        for inside in (True, False):
            if counts[inside] > 0:
                edges.append(sums[inside] / counts[inside])
                sides.append(inside)
    dense = sorted((n for n, share in enumerate(shares) if share >= 0.3), key=lambda n: -shares[n])[:3]
    sparse = sorted((n for n, share in enumerate(shares) if share < 0.3), key=lambda n: shares[n])[:3]
    labels = [True] * len(dense) + [False] * len(sparse)
    return _contrast(edges, sides), _contrast([means[n] for n in dense + sparse], labels)


def _contrast(vectors: list[Tensor], labels: list[bool]) -> Tensor:
    """NT-Xent at temperature 0.05, anchor by anchor; 0 where there is nothing to contrast."""
    if not vectors:
        return torch.zeros((), dtype=torch.float64)
    z = torch.stack([v / torch.linalg.vector_norm(v) if v.detach().abs().sum() > 0 else v * 0 for v in vectors])
    everyone = range(len(z))
    per_anchor = []
    for i in everyone:
        similarities = z @ z[i] / 0.05
        positives = [p for p in everyone if p != i and labels[p] == labels[i]]
        negatives = [n for n in everyone if labels[n] != labels[i]]
        if positives and negatives:
            against = similarities[negatives].logsumexp(0)
            per_anchor.append(torch.logaddexp(similarities[positives], against) - similarities[positives])
    return torch.cat(per_anchor).mean() if per_anchor else torch.stack(vectors).sum() * 0
