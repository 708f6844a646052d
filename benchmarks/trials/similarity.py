"""How alike the features inside and outside lesion contours are: what the edge term changes, seen from outside."""

import torch
from data.photographs import CHANNELS, encoder_input
from data.samples import Sample
from torch import Tensor, nn

from contrastive_exudate_loss import FeatureTap
from contrastive_exudate_loss.morphology import inner_contour, outer_contour
from trials.networks import ENCODER_STRIDE
from trials.objective import Settings

SIDE, PHOTOGRAPHS, RADIUS = 512, 4, 2


def band_similarity(model: nn.Module, samples: list[Sample], settings: Settings) -> dict[str, float]:
    """Mean cosine similarity of the pixels' features in the bands of some photographs' middles, in evaluation mode.

    Args:
        model: is left in training mode.
        samples: the first PHOTOGRAPHS with the first lesion in their middle are taken.
        settings: of the run: lesions and layer.

    Returns:
        inner, outer: of two pixels of one band.
        across: of a pixel inside and one outside.
        norm: mean norm of the features.
    """
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    device = next(model.parameters()).device
    model.eval()
    with FeatureTap(model, settings.layer or "segmentation_head.0") as tap, torch.no_grad():
        for sample in samples:
            lesion = _middle(sample.lesion[CHANNELS.index(settings.lesions[0])]).to(device)
            if not lesion.any() or len(found[0]) == PHOTOGRAPHS:
                continue
            model(encoder_input(_middle(sample.image)[None].to(device)))
            features = nn.functional.interpolate(tap.features, size=lesion.shape, mode="nearest-exact")[0]
            for band, contour in zip(found, (inner_contour, outer_contour), strict=True):
                band.append(features[:, contour(lesion, ~lesion, RADIUS, "square")].T)
    model.train()
    if not found[0]:
        return {}
    inner, outer = (torch.cat(band) for band in found)
    means = [nn.functional.normalize(band, dim=1).mean(0) for band in (inner, outer)]
    return {
        "inner": float(means[0] @ means[0]),
        "outer": float(means[1] @ means[1]),
        "across": float(means[0] @ means[1]),
        "norm": float(torch.cat([inner, outer]).norm(dim=1).mean()),
    }


def _middle(image: Tensor) -> Tensor:
    """The middle of an image, at most SIDE pixels wide and high, of sides that a network's stride divides."""
    top, left = (max(0, (size - SIDE) // 2) for size in image.shape[-2:])
    middle = image[..., top : top + SIDE, left : left + SIDE]
    height, width = (size // ENCODER_STRIDE * ENCODER_STRIDE for size in middle.shape[-2:])
    return middle[..., :height, :width]
