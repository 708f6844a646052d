"""Tables in Markdown."""

from collections.abc import Sequence


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table of these rows, the first of them its head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
