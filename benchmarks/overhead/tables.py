"""The rows that run.py measured, as Markdown tables to print and to keep."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from measure.markdown import aligned

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def markdown(figures: Mapping[str, Any]) -> str:
    """All tables, each under its heading, after a line on the machine."""
    environment = figures["environment"]
    machine = (
        f"{environment['device']}, threads: {environment['threads']}, torch {environment['torch']}, "
        f"Python {environment['python']}, seed {figures['configuration']['seed']}."
    )
    parts = [machine]
    for name, rows in figures["sections"].items():
        title, columns = TABLES[name]
        parts += [f"## {title}", _table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    return aligned([[name for name, _ in columns], *[[shown(row) for _, shown in columns] for row in rows]])


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: "x".join(map(str, row[key])) if isinstance(row[key], list) else str(row[key])


def _milliseconds(key: str) -> Callable[[Row], str]:
    return _spread(key, lambda seconds: f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}")


def _times(key: str) -> Callable[[Row], str]:
    return _spread(key, lambda ratio: f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}")


def _percent(key: str) -> Callable[[Row], str]:
    return _spread(key, lambda share: f"{100 * share:.1f}")


def _spread(key: str, number: Callable[[float], str]) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        if key not in row:
            return row.get("failure", "") if key == "seconds" else ""
        spread = row[key]
        return f"{number(spread['median'])} ({number(spread['lower'])} to {number(spread['upper'])})"

    return shown


def _megabytes(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / 1e6:.1f}" if key in row else ""


def _share(row: Row) -> str:
    return f"{100 * row['extra_memory_to_features']:.1f}" if "extra_memory_to_features" in row else ""


def _contrast_seconds(row: Row) -> str:
    if "needed_bytes" in row:
        return f"stops: would need {row['needed_bytes'] / 1e9:.1f} GB"
    return _milliseconds("seconds")(row)


TABLES: dict[str, tuple[str, list[Column]]] = {
    "overhead": (
        "Cost beside plain BCE, forward and backward",
        [
            ("loss", _text("work")),
            ("mode", _text("mode")),
            ("precision", _text("precision")),
            ("ms", _milliseconds("seconds")),
            ("times BCE", _times("to_bce")),
            ("times the floor", _times("to_floor")),
            ("extra memory, MB", _megabytes("extra_memory_bytes")),
            ("% of the features", _share),
        ],
    ),
    "otherwise": (
        "What one would otherwise run, forward and backward",
        [
            ("loss", _text("work")),
            ("features", _text("shape")),
            ("ms", _milliseconds("seconds")),
            ("times ours", _times("to_ours")),
            ("extra memory, MB", _megabytes("extra_memory_bytes")),
            ("% of the features", _share),
        ],
    ),
    "training_step": (
        "Share of a whole training step",
        [
            ("model", _text("model")),
            ("work", _text("work")),
            ("ms", _milliseconds("seconds")),
            ("% of the step with the combined loss", _percent("share_of_step")),
        ],
    ),
    "inference": (
        "Inference: a forward pass in eval mode without gradients",
        [
            ("model", _text("work")),
            ("ms", _milliseconds("seconds")),
            ("times untapped", _times("to_untapped")),
            ("peak memory, MB", _megabytes("extra_memory_bytes")),
            ("kept afterwards, MB", _megabytes("kept_bytes")),
        ],
    ),
    "pull": (
        "What a weight that sets itself adds to a training step",
        [
            ("work", _text("work")),
            ("ms", _milliseconds("seconds")),
            ("added, % of the step", _percent("added_to_step")),
        ],
    ),
    "contrast": (
        "The contrast alone, 16 channels, forward and backward",
        [
            ("embeddings", _text("embeddings")),
            ("way", _text("work")),
            ("ms", _contrast_seconds),
            ("times ours", _times("to_ours")),
            ("extra memory, MB", _megabytes("extra_memory_bytes")),
        ],
    ),
    "growth": (
        "Growth of the combined loss, one size at a time",
        [
            ("varied", _text("axis")),
            ("value", _text("value")),
            ("patches", _text("patches")),
            ("ms", _milliseconds("seconds")),
            ("BCE, ms", _milliseconds("bce_seconds")),
            ("times BCE", _times("to_bce")),
            ("extra memory, MB", _megabytes("extra_memory_bytes")),
            ("% of the features", _share),
        ],
    ),
}
