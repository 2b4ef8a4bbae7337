"""The look that all pictures share: palette, type, and PNG files that are the same bytes at every run."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")

WIDTH = 8.0  # inches; with DPI, a README's column at one and a third times its resolution
DPI = 150

# Okabe and Ito's palette, which the colour-blind can tell apart; one meaning each in all pictures.
BLUE = "#0072B2"  # what the method keeps: losses trained on, the pool, the search
SKY = "#8CC4E8"
ORANGE = "#E69F00"  # a second quantity beside it
RED = "#D55E00"  # the choice, and where something ends
GREEN = "#009E73"
PURPLE = "#CC79A7"
INK, GREY, LIGHT, FAINT = "#262626", "#7A7A7A", "#C4C4C4", "#F1F1F1"
DASHED = (0, (5, 3))
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)

_STYLE = {
    **{key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith(("backend", "webagg"))},
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": LIGHT,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#ECECEC",
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT,
    "ytick.color": LIGHT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
}


def picture(draw: Callable[Arguments, Figure]) -> Callable[Arguments, bytes]:
    """Makes a function that draws a figure return its PNG, in the style of all, whatever the user's matplotlibrc."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> bytes:
        with matplotlib.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            data = io.BytesIO()
            # Figure.savefig would lay everything out twice.
            FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})  # type: ignore[no-untyped-call]
        return data.getvalue()

    return drawn


def new_figure(height: float) -> Figure:
    """An empty figure, WIDTH x `height` inches, unknown to pyplot and its global state."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")


def thousands(axes: Axes, *, x: bool = True, y: bool = False) -> None:
    """Writes large ticks as 12,000."""
    for axis in ([axes.xaxis] if x else []) + ([axes.yaxis] if y else []):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if float(value).is_integer() else f"{value:g}")


def head(axes: Axes, title: str, *, columns: int = 0) -> None:
    """A title and below it, in one line of `columns` entries, the legend: outside, where it covers nothing.

    Panels side by side have both, or at least the room for both, so that they line up.
    """
    axes.set_title(title, pad=23.0)
    if columns:
        legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderpad=0.1)
        legend.set_in_layout(False)  # the title keeps its room free; its width must not squeeze the panel


def shortened(name: str) -> str:
    """`name`, or its beginning where it is too long for a legend."""
    return name if len(name) <= 18 else name[:17] + "…"
