"""A part of one held-out photograph: truth, predictions, and the patches and contour bands that the loss contrasts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from data.samples import Sample
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from contrastive_exudate_loss import CombinedExudateLoss
from contrastive_exudate_loss.morphology import inner_contour, outer_contour
from contrastive_exudate_loss.patches import at_pixels, lesion_fraction, patch_counts, patch_sides

WINDOW = 160
# Okabe and Ito's colours, which the colour-blind can tell apart.
HIT, FALSE, MISSED = "#f0f0f0", "#e69f00", "#0072b2"
INNER, OUTER, DENSE = "#f0e442", "#cc79a7", "#56b4e9"


class Window(NamedTuple):
    """A part of one sample: its place in the list of samples, its first row and column, its height and width."""

    sample: int
    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Tensor) -> Tensor:
        """This part of the (..., H, W) image."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


def dense_patches(lesion: Tensor, criterion: CombinedExudateLoss) -> tuple[Tensor, tuple[int, int]]:
    """Which patches the density term calls dense, (gh, gw) bool, and a patch's height and width in pixels.

    Args:
        lesion: (H, W), bool, every pixel valid.
        criterion: whose density term to ask.
    """
    density = criterion.density
    sides = patch_sides(lesion.shape[0], lesion.shape[1], density.patch_size, density.num_patches)
    mask = lesion[None, None]
    fraction = lesion_fraction(patch_counts(mask, sides), patch_counts(torch.ones_like(mask), sides))
    return (fraction > density.threshold)[0, 0], sides


def busiest_window(samples: Sequence[Sample], criterion: CombinedExudateLoss) -> Window:
    """The square of WINDOW pixels with the most of what the loss compares; the first without any.

    That is dense patches, then lesion pixels, or, where alpha is 0, pixels at the rim of lesions.
    """
    best, most = Window(0, 0, 0, 1, 1), -1.0
    for index, sample in enumerate(samples):
        height, width = sample.lesion.shape
        window = min(WINDOW, height), min(WINDOW, width)
        sums = F.avg_pool2d(_interest(sample.lesion, criterion), window, stride=8)[0, 0]
        if float(sums.max()) > most:
            most, place = float(sums.max()), int(sums.argmax())
            best = Window(index, 8 * (place // sums.shape[1]), 8 * (place % sums.shape[1]), *window)
    return best


def _interest(lesion: Tensor, criterion: CombinedExudateLoss) -> Tensor:
    """How much each pixel of the (H, W) lesion mask adds to a window's worth, (1, 1, H, W)."""
    if not criterion.alpha:
        return inner_contour(lesion[None, None], ~lesion[None, None], 1, "square").double()
    dense, sides = dense_patches(lesion, criterion)
    # One pixel of a dense patch outweighs all the lesion that a window can hold.
    return at_pixels(dense[None, None], sides, (lesion.shape[0], lesion.shape[1])).double() * WINDOW**2 + lesion


def write_picture(
    path: Path,
    samples: Sequence[Sample],
    predicted: Mapping[str, Sequence[Tensor]],
    f1: Mapping[str, float],
    criterion: CombinedExudateLoss,
) -> None:
    """A PNG of two rows: a part of a photograph, its truth and what the loss contrasts; and the predictions.

    Args:
        path: to write to.
        samples: held-out photographs, of which one is shown.
        predicted: for each of at most three losses, by name, the (H, W) lesion probabilities of each sample.
        f1: of each loss, over all the samples.
        criterion: whose patches and contour bands to draw, as far as alpha and beta are not 0.
    """
    window = busiest_window(samples, criterion)
    sample = samples[window.sample]
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 3)
    _show(above[0], _photograph(window.cut(sample.image)), f"Held-out image (detail): {sample.name}")
    _show(above[1], window.cut(sample.lesion).numpy(), "Truth")
    _show_contrasts(above[2], sample, window, criterion)
    for panel, name in zip(below, predicted, strict=False):  # earlier saved networks are two
        hits = _comparison(window.cut(predicted[name][window.sample]) > 0.5, window.cut(sample.lesion))
        _show(panel, hits, f"{name}: held-out F1 {f1[name]:.3f}")
    for panel in below[len(predicted) :]:
        panel.axis("off")
    figure.legend(handles=_key(criterion), loc="outside lower center", ncols=6, fontsize=12, frameon=False)
    figure.savefig(path)


def _show_contrasts(panel: Axes, sample: Sample, window: Window, criterion: CombinedExudateLoss) -> None:
    edge, lesion = criterion.edge, sample.lesion
    canvas = _photograph(window.cut(sample.image)) * 0.65
    bands = (inner_contour, edge.inner_radius, INNER), (outer_contour, edge.outer_radius, OUTER)
    for contour, radius, colour in bands if criterion.beta else ():
        if not isinstance(radius, int):
            raise ValueError(f"criterion.edge must have one radius for all patches to be drawn, got {radius}")
        band = contour(lesion[None], ~lesion[None], radius, edge.footprint)[0]
        canvas[window.cut(band).numpy()] = _rgb(colour)
    _show(panel, canvas, "What the contrast compares")
    dense, (height, width) = dense_patches(lesion, criterion)
    for row, column in dense.nonzero().tolist() if criterion.alpha else ():
        corner = column * width - window.left - 0.5, row * height - window.top - 0.5
        panel.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=DENSE, linewidth=2))
    panel.set(xlim=(-0.5, window.width - 0.5), ylim=(window.height - 0.5, -0.5))


def _show(panel: Axes, picture: npt.NDArray[np.generic], title: str) -> None:
    panel.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    panel.set_title(title, fontsize=13)
    panel.set(xticks=[], yticks=[])


def _key(criterion: CombinedExudateLoss) -> list[Patch]:
    predictions = {"lesion, found": HIT, "lesion, missed": MISSED, "found, no lesion": FALSE}
    bands = {"inner band": INNER, "outer band": OUTER} if criterion.beta else {}
    filled = [
        Patch(facecolor=colour, edgecolor="black", label=label) for label, colour in (predictions | bands).items()
    ]
    dense = Patch(fill=False, edgecolor=DENSE, linewidth=2, label="dense patch")
    return [*filled, dense] if criterion.alpha else filled


def _comparison(found: Tensor, lesion: Tensor) -> npt.NDArray[np.float32]:
    picture = np.zeros((*lesion.shape, 3), np.float32)
    for mask, colour in ((found & lesion, HIT), (found & ~lesion, FALSE), (lesion & ~found, MISSED)):
        picture[mask.numpy()] = _rgb(colour)
    return picture


def _photograph(image: Tensor) -> npt.NDArray[np.float32]:
    return np.asarray(image.permute(1, 2, 0).numpy() / 255, np.float32)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
