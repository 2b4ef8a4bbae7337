"""How time and memory grow with the number of paths, of images, and with the resolution.

Run: python bench/growth.py [--picture docs/benchmark.png] [--output FILE.json]     (about half an hour)

Each point is a process of its own: the lowest time of three calls, and by how much its memory grew at most.
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from child import Cost, cost_of, in_child
from job import EAGER, evaluation

from greedynas import get_space
from greedynas_ext.bench.cases import Case
from greedynas_ext.bench.inputs import make_images, make_paths, make_targets
from greedynas_ext.bench.measure import machine
from greedynas_ext.bench.subjects import make_supernet
from greedynas_ext.files import write_bytes
from greedynas_ext.strict_json import write_json

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend

BASE = Case("growth", "mbv2-7", paths=10, images=16, resolution=128)
AXES: dict[str, tuple[int, ...]] = {
    "paths": (1, 2, 5, 10, 20, 50, 100, 200),
    "images": (4, 8, 16, 32, 64, 128),
    "resolution": (32, 64, 96, 128, 160, 224),
}
WAYS = {
    "evaluate_paths, fp32": ("ours", "fp32"),
    "evaluate_paths, bf16": ("ours", "bf16"),
    "eager loop, fp32": (EAGER["fp32"], "fp32"),
    "eager loop, bf16": (EAGER["bf16"], "bf16"),
}
_LABELS = {"paths": "paths m", "images": "images N", "resolution": "height and width, pixels"}


def point(case: Case, way: str, calls: int) -> Cost:
    """Cost of one point in this process."""
    name, precision = WAYS[way]
    space = get_space(case.space)
    supernet = make_supernet(space)
    images = make_images(case.images, space.in_channels, case.resolution or space.resolution)
    targets = make_targets(case.images, space.num_classes)
    paths = make_paths(case.source, case.paths, space)
    return cost_of(evaluation(name, precision, supernet, paths, images, targets), calls)


def points(base: Case, axes: dict[str, tuple[int, ...]], calls: int) -> list[dict[str, Any]]:
    """Cost of each way along each axis, all else as in `base`."""
    found = []
    for axis, values in axes.items():
        for value in values:
            for way in WAYS:
                case = replace(base, **{axis: value})  # type: ignore[arg-type]
                cost = in_child(point, case, way, calls)
                found.append({"axis": axis, "value": value, "way": way, **asdict(cost)})
                print(
                    f"{axis}={value:<5}{way:<24}{min(cost.seconds):>8.3f} s{cost.growth_bytes / 1e6:>9.0f} MB",
                    flush=True,
                )
    return found


def draw(found: list[dict[str, Any]], base: Case, picture: Path) -> None:
    """Draws times above memory, a column an axis."""
    axes = list(dict.fromkeys(entry["axis"] for entry in found))
    figure, grid = plt.subplots(2, len(axes), figsize=(4 * len(axes), 6.4), squeeze=False, layout="constrained")
    for column, axis in enumerate(axes):
        for way in WAYS:
            entries = [entry for entry in found if (entry["axis"], entry["way"]) == (axis, way)]
            values = [entry["value"] for entry in entries]
            style: dict[str, Any] = {
                "color": "tab:blue" if way.startswith("evaluate") else "tab:orange",
                "linestyle": "-" if way.endswith("fp32") else "--",
                "marker": "o",
                "markersize": 3,
                "label": way,
            }
            grid[0, column].plot(values, [min(entry["seconds"]) for entry in entries], **style)
            grid[1, column].plot(values, [entry["growth_bytes"] / 1e6 for entry in entries], **style)
        for panel in grid[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(list(dict.fromkeys(entry["value"] for entry in found if entry["axis"] == axis)))
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            panel.grid(alpha=0.3)
            panel.set_xlabel(_LABELS[axis])
    grid[0, 0].set_ylabel("seconds")
    grid[1, 0].set_ylabel("growth of memory at most, MB")
    grid[0, 0].legend(fontsize=8)
    size = f"{base.resolution}x{base.resolution}" if base.resolution else "the space's resolution"
    figure.suptitle(f"{base.space}, {base.paths} uniform paths, {base.images} images of {size} unless varied")
    picture.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format=picture.suffix[1:] or "png")
    plt.close(figure)
    write_bytes(picture, drawn.getbuffer())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    picture = Path(__file__).resolve().parents[1] / "docs" / "benchmark.png"
    parser.add_argument("--picture", type=Path, default=picture)
    parser.add_argument("--output", type=Path, help="JSON file of everything measured")
    parser.add_argument("--calls", type=int, default=3, help="calls of which the lowest time is taken")
    parser.add_argument("--quick", action="store_true", help="two points an axis, in a small space: does it run?")
    options = parser.parse_args()
    base, axes = BASE, AXES
    if options.quick:
        base = Case("growth", "mini-16", paths=3, images=16, resolution=8)
        axes = {"paths": (1, 3), "resolution": (8, 12)}
    found = points(base, axes, options.calls)
    draw(found, base, options.picture)
    if options.output is not None:
        write_json(options.output, {"command": sys.argv, "machine": machine(), "base": asdict(base), "points": found})


if __name__ == "__main__":
    main()
