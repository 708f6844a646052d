"""The plots of the study: validation curves, and differences between arms with their intervals."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trials.differences import over_seeds

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#d55e00")
CURVES = {"f1": "F1 of the validation fold", "average_precision": "average precision of the validation fold"}


def write_curves(path: Path, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write one PNG: a panel for each metric, a line for each arm, the mean over its seeds, each seed faint."""
    figure = Figure(figsize=(7, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (metric, label) in zip(figure.subplots(len(CURVES), 1), CURVES.items(), strict=True):
        for (name, runs), colour in zip(arms.items(), itertools.cycle(COLOURS), strict=False):
            curves = [[point[metric] for point in run["curve"]] for run in runs]
            steps = [point["step"] for point in runs[0]["curve"]]
            for curve in curves:
                panel.plot(steps, curve, color=colour, alpha=0.2)
            panel.plot(steps, np.mean(curves, 0), "o-", color=colour, label=f"{name} ({len(curves)})")
        panel.set(xlabel="steps", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(title="arm (seeds)", fontsize="small")
    figure.savefig(path, dpi=100)


def write_differences(path: Path, rows: Mapping[str, Sequence[float]], label: str) -> None:
    """Write one PNG: for each arm its differences, one a seed, faint; their mean, and its interval if it has one."""
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for y, differences in enumerate(rows.values()):
        mean, interval, _ = over_seeds(differences)
        panel.plot(differences, [y] * len(differences), "o", color=COLOURS[0], alpha=0.3)
        panel.plot(mean, y, "D", color=COLOURS[1])
        if interval is not None:
            panel.plot(interval, (y, y), color=COLOURS[1])
    panel.axvline(0, color=COLOURS[0], linewidth=0.8)
    panel.set_yticks(range(len(rows)), [f"{name} ({len(differences)})" for name, differences in rows.items()])
    panel.invert_yaxis()
    panel.set_ylabel("arm (seeds)")
    figure.supxlabel(label, fontsize="medium")
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def write_doses(
    path: Path,
    doses: Mapping[str, Mapping[str, tuple[float, Sequence[float]]]],
    courses: Mapping[str, Mapping[int, Sequence[float]]],
) -> None:
    """Write one PNG: F1's differences against the pull of the edge term, and against the steps trained, for each loss.

    Each seed is faint, the mean is not; means below the panels stand at their lower edge as a number.

    doses: by loss and arm, the pull and the differences, one a seed. courses: by loss and step, the differences.
    """
    lowest, highest = -0.03, 0.06
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for loss, colour in zip(dict.fromkeys([*doses, *courses]), itertools.cycle(COLOURS), strict=False):
        by_step = list(courses.get(loss, {}).items())
        for panel, points, line in ((left, sorted(doses.get(loss, {}).values()), "D"), (right, by_step, "D-")):
            for x, differences in points:
                panel.plot([x] * len(differences), differences, "o", color=colour, alpha=0.3)
                if np.mean(differences) < lowest:
                    where = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
                    panel.annotate(f"{np.mean(differences):+.2f}", (x, lowest), color=colour, **where)
            panel.plot([x for x, _ in points], [np.mean(one) for _, one in points], line, color=colour, label=loss)
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="pull of the edge term beside the supervised loss", ylabel="F1 with it minus F1 without it")
    right.set(xlabel="steps trained", ylim=(lowest, highest))
    for panel in (left, right):
        panel.axhline(0, color=COLOURS[0], linewidth=0.8)
        panel.grid(alpha=0.3)
    left.legend(*left.get_legend_handles_labels(), fontsize="small", loc="lower left")  # which may be empty
    figure.savefig(path, dpi=100)


def write_errors(path: Path, arms: Mapping[str, Mapping[str, float]]) -> None:
    """Write one PNG: a bar for each arm, its parts the errors of each kind per 100 pixels of lesion."""
    figure = Figure(figsize=(8, 2 + 0.5 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    left = np.zeros(len(arms))
    for kind, colour in zip(next(iter(arms.values())), itertools.cycle((*COLOURS, "#56b4e9")), strict=False):
        widths = np.array([errors[kind] for errors in arms.values()])
        panel.barh(range(len(arms)), widths, left=left, color=colour, edgecolor="white", label=kind)
        left += widths
    panel.set_yticks(range(len(arms)), list(arms))
    panel.invert_yaxis()
    panel.set_xlabel("wrong pixels per 100 pixels of lesion")
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    figure.savefig(path, dpi=100)
