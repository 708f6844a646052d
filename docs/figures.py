"""The figures of the documentation, drawn from synthetic images by the package's own functions, inner ones too."""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle
from matplotlib.patheffects import withStroke
from scipy import ndimage
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from data.samples import Sample
from data.synthetic import fundus_samples
from measure.lesion_scores import EIGHT
from training.picture import DENSE, FALSE, INNER, OUTER, Window

from contrastive_exudate_loss import CombinedExudateLoss
from contrastive_exudate_loss.contrast import contrast_loss, directions
from contrastive_exudate_loss.morphology import FOOTPRINTS, inner_contour, outer_contour
from contrastive_exudate_loss.patches import lesion_fraction, patch_counts
from contrastive_exudate_loss.pooling import masked_sums

CRITERION = CombinedExudateLoss.paper()
PHOTOGRAPHS = 40
SIZES = (1, 10, 30, 100, 300)
PATCH = 16
RADII = (1, 2, 4)
STRIDE = 4
STEPS, RATE = 100, 0.1
LESION = "#8c8c8c"


class Theme(NamedTuple):
    """The colours of a page: of what is written on it, and its own."""

    name: str
    ink: str
    page: str

    def settings(self) -> dict[Any, Any]:
        """For matplotlib; the text can be read on a phone, and a fixed salt gives the same bytes."""
        inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        clear = ("figure.facecolor", "axes.facecolor")
        ticks = ("xtick.bottom", "xtick.labelbottom", "ytick.left", "ytick.labelleft")
        layout = {"figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.08}
        text = {"font.size": 15, "axes.titlesize": 15, "legend.frameon": False, "legend.fontsize": 14}
        same = {"image.interpolation": "none", "svg.hashsalt": self.name}
        settings = layout | text | same | dict.fromkeys(ticks, False)
        return settings | dict.fromkeys(inked, self.ink) | dict.fromkeys(clear, "none")


THEMES = Theme("light", "#1b1b1b", "#ffffff"), Theme("dark", "#e6e6e6", "#131416")


def write_figures(folder: Path) -> None:
    """Write NAME-light.svg and NAME-dark.svg of each figure into the folder; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        with rc_context(theme.settings()):
            for draw in FIGURES:
                draw(theme).savefig(folder / f"{draw.__name__}-{theme.name}.svg", metadata={"Date": None})


def problem(theme: Theme) -> Figure:
    """A photograph, its lesions from near, and what share of lesions and of lesion pixels each size has."""
    figure = Figure(figsize=(7.5, 7.6))
    panels = figure.subplot_mosaic([["whole", "near"], ["chart", "chart"]], height_ratios=(1.15, 1))
    sample, window = _detail(6, lambda lesion: _fractions(inner_contour(lesion, ~lesion, 1, "square")))
    panels["whole"].imshow(_channels_last(sample.image))
    panels["whole"].add_patch(_frame(window.left, window.top, window.width, "white"))
    panels["whole"].set_title("photograph (synthetic)")
    panels["near"].imshow(_channels_last(window.cut(sample.image)))
    panels["near"].contour(window.cut(sample.lesion).numpy(), levels=[0.5], colors=DENSE, linewidths=1.3)
    panels["near"].set_title("detail, true contours")
    chart, (lesions, pixels) = panels["chart"], shares_by_size()
    for shares, shift, colour, label in ((lesions, -0.2, FALSE, "lesions"), (pixels, 0.2, DENSE, "lesion pixels")):
        at = np.arange(len(SIZES)) + shift
        bars = chart.bar(at, 100 * shares.numpy(), 0.4, color=colour, edgecolor=theme.ink, label=f"share of {label}")
        chart.bar_label(bars, fmt="%.0f %%", fontsize=14, padding=2)
    ends = [*(f"to {size - 1}" for size in SIZES[1:]), "or more"]
    chart.set_xticks(range(len(SIZES)), [f"{size} {end}" for size, end in zip(SIZES, ends, strict=True)])
    chart.tick_params(labelbottom=True)
    chart.set_xlabel("size of a lesion, pixels")
    chart.margins(y=0.15)
    chart.spines[["left", "top", "right"]].set_visible(False)
    chart.legend(loc="upper right")
    return figure


def shares_by_size() -> tuple[Tensor, Tensor]:
    """Shares of the lesions, and of the lesion pixels, that each of the SIZES has in the synthetic photographs."""
    labels = [ndimage.label(sample.lesion.numpy(), EIGHT)[0] for sample in _photographs()]
    areas = torch.cat([torch.from_numpy(np.bincount(label.ravel())[1:]) for label in labels])
    sizes = torch.bucketize(areas, torch.tensor(SIZES), right=True) - 1
    lesions = torch.bincount(sizes, minlength=len(SIZES))
    pixels = torch.bincount(sizes, areas.double(), minlength=len(SIZES))
    return lesions / lesions.sum(), pixels / pixels.sum()


def patches(theme: Theme) -> Figure:
    """A detail cut in patches, with the lesion fraction of those whose fraction does not round to 0."""
    threshold, across = CRITERION.density.threshold, 7
    # One dense patch outweighs all the lesion that a detail can hold.
    sample, window = _detail(across, lambda lesion: (_fractions(lesion) > threshold) + 1e-3 * _fractions(lesion))
    fractions = _fractions(window.cut(sample.lesion))
    figure = Figure(figsize=(7.5, 7.9))
    panel = figure.subplots()
    panel.imshow(_channels_last(window.cut(sample.image)))
    _lines(panel, window.width, PATCH, "white")
    for (row, column), fraction in np.ndenumerate(fractions.numpy()):
        if fraction > threshold:
            panel.add_patch(_frame(column * PATCH, row * PATCH, PATCH, DENSE))
        if fraction >= 0.005:
            x, y = column * PATCH + (PATCH - 1) / 2, row * PATCH + (PATCH - 1) / 2
            outline = [withStroke(linewidth=3, foreground="black")]
            panel.text(x, y, f"{fraction:.2f}", color="white", ha="center", va="center", path_effects=outline)
    dense = int((fractions > threshold).sum())
    names = {f"{dense} dense: fraction > {threshold}": DENSE, f"{fractions.numel() - dense} sparse": theme.ink}
    key = [Patch(fill=False, edgecolor=colour, linewidth=2.5, label=name) for name, colour in names.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=2)
    return figure


def bands(theme: Theme) -> Figure:
    """The inner and the outer band of one lesion for both footprints and several radii."""
    figure = Figure(figsize=(7.5, 5.9))
    for row, footprint in zip(figure.subplots(len(FOOTPRINTS), len(RADII)), FOOTPRINTS, strict=True):
        for panel, radius in zip(row, RADII, strict=True):
            inner, outer = (find(lesion(), ~lesion(), radius, footprint) for find in (inner_contour, outer_contour))
            _pixels(panel, theme, {LESION: lesion(), INNER: inner, OUTER: outer})
            panel.set_title(f"radius {radius}" if footprint == FOOTPRINTS[0] else "")
        row[0].set_ylabel(f'"{footprint}"')
    _key(figure, theme, {"inner band": INNER, "outer band": OUTER, "other lesion pixels": LESION})
    return figure


def lesion() -> Tensor:
    """One lesion of two lobes, (24, 24) bool."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    return ((y - 11) ** 2 + (x - 10) ** 2 <= 46) | ((y - 15) ** 2 + (x - 16) ** 2 <= 10)


def pooling(theme: Theme) -> Figure:
    """The weights of the feature vectors in the mean over an inner band, at stride 1 and at STRIDE."""
    radius = RADII[1]
    band = inner_contour(lesion(), ~lesion(), radius, "square")
    weights = cell_weights(band, STRIDE)
    figure = Figure(figsize=(7.5, 4.5))
    fine, coarse = figure.subplots(1, 2)
    _pixels(fine, theme, {LESION: lesion(), INNER: band})
    _lines(fine, len(band), STRIDE, theme.ink)
    fine.set_title(f"stride 1: {int(band.sum())} vectors,\neach of weight 1")
    shades = LinearSegmentedColormap.from_list("weights", [theme.page, INNER])
    coarse.imshow(weights.numpy(), cmap=shades, vmin=0, vmax=STRIDE**2)
    _lines(coarse, len(weights), 1, theme.ink)
    for (row, column), weight in np.ndenumerate(weights.numpy()):
        colour = "black" if 2 * weight >= STRIDE**2 else theme.ink
        coarse.text(column, row, f"{weight:.0f}", color=colour, ha="center", va="center")
    coarse.set_title(
        f"stride {STRIDE}: {int((weights > 0).sum())} vectors,\nof weights that sum to {weights.sum():.0f}"
    )
    _key(figure, theme, {f"inner band of radius {radius}": INNER, "other lesion pixels": LESION})
    return figure


def cell_weights(band: Tensor, stride: int) -> Tensor:
    """How often each cell's vector is summed: the (h, w) sums over the band of features that tell all cells apart."""
    height, width = (size // stride for size in band.shape)
    cells = torch.eye(height * width).reshape(1, -1, height, width)
    sums, _ = masked_sums(cells, band[None, None], (band.shape[0], band.shape[1]))
    return sums.reshape(height, width)


def contrast(theme: Theme) -> Figure:
    """Random unit vectors of two labels, before and after gradient steps on their contrast."""
    figure = Figure(figsize=(7.5, 4.7))
    styles = ((DENSE, "o", "label 1: dense, or inner"), (FALSE, "s", "label 0: sparse, or outer"))
    look: dict[str, Any] = {"linewidth": 2, "markeredgecolor": theme.ink, "markersize": 11}
    for panel, steps in zip(figure.subplots(1, 2), (0, STEPS), strict=True):
        vectors, labels, loss = contrasted(steps)
        panel.add_patch(Circle((0, 0), 1, fill=False, edgecolor=theme.ink, linewidth=0.8))
        for chosen, (colour, marker, _) in zip((labels, ~labels), styles, strict=True):
            for x, y in vectors[chosen].tolist():
                panel.plot([0, x], [0, y], color=colour, marker=marker, markevery=[1], **look)
        panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        panel.set_axis_off()
        panel.set_title(f"{f'after {steps} steps' if steps else 'random'}: loss {loss:.2g}")
    key = [Line2D([], [], color=colour, marker=marker, label=name, **look) for colour, marker, name in styles]
    figure.legend(handles=key, loc="outside lower center", ncols=2, columnspacing=1)
    return figure


def contrasted(steps: int) -> tuple[Tensor, Tensor, float]:
    """Unit vectors (16, 2) after so many gradient steps on their nt_xent, their labels, and its value then."""
    start = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    embeddings = directions(start)[0].requires_grad_()
    labels = torch.arange(16) % 2 == 0
    descent = torch.optim.SGD([embeddings], RATE)
    for step in range(steps + 1):
        loss = contrast_loss(embeddings, labels, torch.ones_like(labels), temperature=CRITERION.edge.temperature)
        if step < steps:
            descent.zero_grad()
            loss.backward()
            descent.step()
    return directions(embeddings.detach())[0], labels, loss.item()


FIGURES = problem, patches, bands, pooling, contrast


@functools.cache
def _photographs() -> list[Sample]:
    return fundus_samples(PHOTOGRAPHS, 0, stream=0)


def _detail(across: int, score: Callable[[Tensor], Tensor]) -> tuple[Sample, Window]:
    """The photograph, and the part of it so many patches across, whose lesions have the most score per patch."""
    scores = [F.avg_pool2d(score(sample.lesion)[None], across, stride=1)[0] for sample in _photographs()]
    index = max(range(len(scores)), key=lambda i: float(scores[i].max()))
    row, column = divmod(int(scores[index].argmax()), scores[index].shape[1])
    return _photographs()[index], Window(index, row * PATCH, column * PATCH, across * PATCH, across * PATCH)


def _fractions(mask: Tensor) -> Tensor:
    counts = [patch_counts(pixels[None, None], (PATCH, PATCH)) for pixels in (mask, torch.ones_like(mask))]
    return lesion_fraction(counts[0], counts[1])[0, 0]


def _channels_last(image: Tensor) -> np.typing.NDArray[np.uint8]:
    return np.asarray(image.permute(1, 2, 0).numpy())


def _pixels(panel: Axes, theme: Theme, masks: Mapping[str, Tensor]) -> None:
    """Masks by colour, (H, W) each, later ones over earlier ones."""
    canvas = np.zeros((*next(iter(masks.values())).shape, 4))
    for colour, mask in masks.items():
        canvas[mask.numpy()] = to_rgba(colour)
    panel.imshow(canvas)
    _lines(panel, len(canvas), 1, theme.ink, 0.2)


def _lines(panel: Axes, size: int, step: int, colour: str, width: float = 0.8) -> None:
    at = np.arange(0, size + 1, step) - 0.5
    panel.hlines(at, -0.5, size - 0.5, colour, linewidth=width)
    panel.vlines(at, -0.5, size - 0.5, colour, linewidth=width)


def _frame(left: int, top: int, side: int, colour: str) -> Rectangle:
    return Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor=colour, linewidth=4, zorder=3)


def _key(figure: Figure, theme: Theme, names: Mapping[str, str]) -> None:
    key = [Patch(facecolor=colour, edgecolor=theme.ink, label=name) for name, colour in names.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), columnspacing=1)
