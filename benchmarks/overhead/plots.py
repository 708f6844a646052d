"""The growth of the losses with each size, drawn from the figures of run.py."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73")
LABELS = {
    "side": "pixels of the image",
    "channels": "channels",
    "batch": "images in the batch",
    "patch_size": "side of a patch, pixels",
    "area": "lesion area, %",
    "stride": "stride of the features, pixels",
}


def write_growth(path: Path, figures: Mapping[str, Any]) -> None:
    """Write one PNG: a panel for each size that grows, and two for the contrast's time and memory."""
    growth, contrast = figures["sections"]["growth"], figures["sections"]["contrast"]
    axes_names = list(dict.fromkeys(row["axis"] for row in growth))
    figure = Figure(figsize=(15, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, math.ceil((len(axes_names) + 2) / 2)).flatten()
    for panel, name in zip(panels, axes_names, strict=False):
        rows = [row for row in growth if row["axis"] == name]
        at = [_position(name, row["value"]) for row in rows]
        _curve(panel, at, [row["seconds"] for row in rows], "combined", COLOURS[0])
        _curve(panel, at, [row["bce_seconds"] for row in rows], "BCE", COLOURS[1])
        panel.set(xlabel=LABELS[name], ylabel="ms")
        _scales(panel, name)
    for panel, key in zip(panels[len(axes_names) :], ("seconds", "extra_memory_bytes"), strict=False):
        for colour, way in zip(COLOURS, dict.fromkeys(row["work"] for row in contrast), strict=True):
            rows = [row for row in contrast if row["work"] == way and "seconds" in row]
            at = [row["embeddings"] for row in rows]
            if key == "seconds":
                _curve(panel, at, [row["seconds"] for row in rows], way, colour)
            else:
                panel.plot(at, [row[key] / 1e6 for row in rows], "o-", color=colour, label=way)
        panel.set(xlabel="embeddings in one contrast", ylabel="ms" if key == "seconds" else "extra memory, MB")
        _scales(panel, "embeddings")
    for panel in panels:
        if panel.has_data():
            below = (
                {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)} if panel in panels[len(axes_names) :] else {}
            )
            panel.legend(fontsize="small", **below)
            panel.grid(alpha=0.3)
        else:
            panel.set_axis_off()
    environment = figures["environment"]
    figure.suptitle(f"Forward and backward on {environment['device']}, threads: {environment['threads']}")
    figure.savefig(path, dpi=100)


def _position(name: str, value: Any) -> float:
    if name == "side":
        return float(value[0] * value[1])
    return 100 * value if name == "area" else float(value)


def _curve(panel: Axes, at: Sequence[float], spreads: Sequence[Mapping[str, float]], label: str, colour: str) -> None:
    """Medians with their quartiles, in milliseconds."""
    median, lower, upper = ([1000 * spread[name] for spread in spreads] for name in ("median", "lower", "upper"))
    panel.plot(at, median, "o-", color=colour, label=label)
    panel.fill_between(at, lower, upper, color=colour, alpha=0.2)


def _scales(panel: Axes, name: str) -> None:
    panel.set_yscale("log")
    if name == "area":
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlim(left=-0.1)
    else:
        panel.set_xscale("log", base=2)
