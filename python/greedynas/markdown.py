"""Text for reports: aligned Markdown tables, and numbers with units as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A Markdown table whose source is aligned too.

    Args:
        header: a title for each column.
        rows: a cell for each column; vertical bars and line breaks in them are taken care of.
        right: the columns that are aligned to the right.
    """
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    rule = ["-" * (w - 1) + ":" if c in right else ":" + "-" * (w - 1) for c, w in enumerate(widths)]
    lines = [
        " | ".join(
            cell.rjust(w) if c in right else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {line} |" for line in lines)


def image(title: str, file: str) -> str:
    """A picture beside the report; `file` may hold any characters."""
    return f"![{title}]({quote(file)})"


def count(value: float) -> str:
    """A number of things: 12,345 or, from a million on, 1.23 M."""
    return f"{value:,.0f}" if value < 1e6 else f"{_three_digits(value / 1e6)} M"


def macs(millions: float) -> str:
    """Multiply-accumulates, given in millions."""
    return f"{_three_digits(millions)} M MACs"


def params(value: int) -> str:
    """A number of parameters: 54.1 k or 6.50 M."""
    return f"{value / 1e3:.1f} k" if value < 1e6 else f"{value / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """A time: 4.2 s, 5 min 3 s or 2 h 7 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
