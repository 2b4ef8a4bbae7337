"""The architecture of a path, layer by layer, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from greedynas.costs import output_size
from greedynas.drawing import GREY, INK, LIGHT, ORANGE, RED, head, new_figure, picture
from greedynas.layers import Operation
from greedynas.spaces import Space

_KERNEL_COLOURS = ("#CFE6F5", "#5FA8D8", "#08518C", "#04284A")  # small to large kernel: light to dark
_DOTTED = (0, (2, 2))
_NEUTRAL = "#E4E4E4"


@dataclass(frozen=True)
class _Column:
    """One layer of the picture."""

    title: str
    operation: Operation | None  # None: stem or head
    fixed: bool
    channels: int
    size: int  # height and width of its output, pixels
    stride: int
    macs: int


@picture
def architecture_picture(space: Space, path: Sequence[int], title: str) -> Figure:
    """A column for each layer: operation, output channels, resolution and cost.

    Args:
        space: the search space, with the resolution of its images.
        path: int [L], one operation index per layer.
        title: what stands above it.

    Raises:
        TypeError, ValueError: as `Space.check_path`.
    """
    columns = _columns(space, path)
    narrow = len(columns) > 14
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set(xlim=(-0.6 - 0.06 * len(columns), len(columns) - 0.5), ylim=(-1.28, 0.56))
    axes.plot([-0.55, len(columns) - 0.45], [0, 0], color=LIGHT, linewidth=1.5, zorder=0)
    kernels = sorted({op.kernel for op in space.operations if not op.identity})
    tallest = max(op.expansion for op in space.operations)
    size = 7.0 if narrow else 8.5
    for x, column in enumerate(columns):
        _draw_block(axes, x, column, kernels, tallest, narrow)
        axes.text(x, -0.66, str(column.channels), ha="center", va="center", size=size)
        axes.text(x, -1.16, _millions(column.macs, narrow), ha="center", va="center", size=size, color=GREY)
        if column.stride > 1:
            axes.plot([x - 0.5] * 2, [-0.55, 0.55], color=RED, linewidth=1.1, linestyle=_DOTTED, zorder=0)
    _draw_sizes(axes, columns)
    for y, text in ((-0.66, "channels"), (-0.92, "pixels"), (-1.16, "M MACs")):
        axes.text(-0.62, y, text, ha="right", va="center", size=7.5, color=GREY)
    handles = _legend(space, columns, kernels)
    head(axes, title)
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.01),
        ncols=len(handles),
        borderpad=0.1,
        handlelength=1.1,
        handleheight=1.1,
    )
    return figure


def _columns(space: Space, path: Sequence[int]) -> list[_Column]:
    indices = space.check_path(path)
    table = space.cost_table()
    size = output_size(space.resolution, space.stem_stride)
    stem = space.in_channels * space.stem_channels * 9 * size**2
    columns = [_Column("stem\n3×3", None, True, space.stem_channels, size, space.stem_stride, stem)]
    rest = table.fixed.macs - stem
    for layer in space.fixed:
        out = output_size(size, layer.stride)
        depthwise, pointwise = layer.in_channels * 9 * out**2, layer.in_channels * layer.out_channels * out**2
        operation = space.fixed_operation
        columns.append(
            _Column(operation.name, operation, True, layer.out_channels, out, layer.stride, depthwise + pointwise)
        )
        rest, size = rest - depthwise - pointwise, out
    for number, (layer, index) in enumerate(zip(space.layers, indices, strict=True)):
        size = output_size(size, layer.stride)
        operation, cost = space.operations[index], table.operations[number][index].macs
        columns.append(_Column(operation.name, operation, False, layer.out_channels, size, layer.stride, cost))
    return [*columns, _Column("head\n1×1", None, True, space.head_channels, size, 1, rest)]


def _draw_block(axes: Axes, x: int, column: _Column, kernels: list[int], tallest: int, narrow: bool) -> None:
    operation = column.operation
    if operation is not None and operation.identity:
        height, face, edge, ink = 0.2, "white", LIGHT, GREY
    elif operation is None or column.fixed:
        height, face, edge, ink = 0.5, _NEUTRAL, _NEUTRAL, INK
    else:
        rank = kernels.index(operation.kernel)
        height = 0.2 + 0.8 * operation.expansion / tallest
        face = edge = _KERNEL_COLOURS[min(rank, len(_KERNEL_COLOURS) - 1)]
        ink = INK if rank == 0 else "white"
    block = axes.add_patch(
        FancyBboxPatch(
            (x - 0.38, -height / 2),
            0.76,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            mutation_aspect=0.6,
            facecolor=face,
            edgecolor=edge,
            linewidth=1.0,
            linestyle="--" if operation is not None and operation.identity else "-",
        )
    )
    if operation is not None and operation.se:
        cap = axes.add_patch(Rectangle((x - 0.39, height / 2 - 0.07), 0.78, 0.08, facecolor=ORANGE, linewidth=0))
        cap.set_clip_path(block)
    title, size = column.title, 8.5
    if narrow:
        title, size = title.replace("k", "\nk"), 7.5 if operation is not None else 6.5
    axes.text(x, 0, title, ha="center", va="center", size=size, color=ink, linespacing=1.25)


def _draw_sizes(axes: Axes, columns: list[_Column]) -> None:
    """Height and width of the layers' outputs, once for each run of layers that share them."""
    start = 0
    for x in range(1, len(columns) + 1):
        if x == len(columns) or columns[x].size != columns[start].size:
            axes.plot([start - 0.36, x - 0.64], [-0.8, -0.8], color=LIGHT, linewidth=1.0)
            size = columns[start].size
            axes.text((start + x - 1) / 2, -0.92, f"{size}×{size}", ha="center", va="center", size=8)
            start = x


def _legend(space: Space, columns: list[_Column], kernels: list[int]) -> list[Artist]:
    handles: list[Artist] = [
        Patch(facecolor=_KERNEL_COLOURS[min(rank, len(_KERNEL_COLOURS) - 1)], label=f"kernel {kernel}×{kernel}")
        for rank, kernel in enumerate(kernels)
    ]
    if any(op.se for op in space.operations):
        handles.append(Patch(facecolor=ORANGE, label="SE"))
    if any(op.identity for op in space.operations):
        handles.append(Patch(facecolor="white", edgecolor=LIGHT, linestyle="--", label="identity"))
    if strides := sorted({column.stride for column in columns} - {1}):
        label = "stride " + ", ".join(map(str, strides))
        handles.append(Line2D([], [], color=RED, linewidth=1.1, linestyle=_DOTTED, label=label))
    expansions = sorted({op.expansion for op in space.operations if not op.identity})
    label = "height: expansion " + ", ".join(map(str, expansions))
    return [
        *handles,
        Line2D([], [], color=LIGHT, marker="|", markersize=10, markeredgewidth=4, linestyle="none", label=label),
    ]


def _millions(macs: int, narrow: bool) -> str:
    millions = macs / 1e6
    if macs == 0:
        return "0"
    if millions >= (10 if narrow else 100):
        return f"{millions:.0f}"
    return f"{millions:.1f}" if millions >= (1 if narrow else 10) else f"{millions:.2f}"
