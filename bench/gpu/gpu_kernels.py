"""How long the CUDA kernels take, each by itself, for the layers of `mbv2-7`, and how far from their floor that is.

Run: python bench/gpu/gpu_kernels.py [--images 1000] [--kernels expand_depthwise project ...] [--output FILE.json]
     python bench/gpu/gpu_kernels.py --once [--kernels ...] [--layers 56x32s1 ...]     one launch each, to profile

The floor is the time in which the bytes that have to move, each input read once and each output written once, move at
the bandwidth of a device-to-device copy measured in the same run. Numbers are random, each launch works on the next of
several sets of buffers that together do not fit into the cache, and a time is the median of 5 runs of 10 launches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_nodes import MAXIMUM, Node, Nodes

from greedynas_ext import _library
from greedynas_ext.bench.measure import machine
from greedynas_ext.strict_json import write_json

# Height and width, channels in and out, stride, of the choice layers of mbv2-7 at 224x224.
LAYERS = [
    (112, 16, 32, 2),
    (56, 32, 32, 1),
    (56, 32, 40, 2),
    (28, 40, 40, 1),
    (28, 40, 80, 2),
    (14, 80, 80, 1),
    (14, 80, 96, 1),
    (14, 96, 96, 1),
    (14, 96, 192, 2),
    (7, 192, 192, 1),
    (7, 192, 320, 1),
]
# Height and width, and channels: of the cells of DARTS on images of 32x32, and of the ends of ShuffleNetV2's units.
UNIT_MAPS = [(32, 36), (16, 72), (8, 144)]
SHUFFLED_MAPS = [(28, 160), (14, 320)]
_SETS_BYTES = 300 << 20  # of buffers that launches rotate through


@dataclass(frozen=True)
class Case:
    """A launch.

    Attributes:
        kernel: its name.
        layer: the layer's shape in words.
        detail: expansion and kernel size.
        moved: bytes that have to move.
        prepare: makes a set of buffers and returns the launch.
    """

    kernel: str
    layer: str
    detail: str
    moved: int
    prepare: Callable[[], Callable[[], None]]


class Cases:
    """Every kernel of a choice block for every layer, and those of units."""

    def __init__(self, images: int, nodes: Nodes) -> None:
        self._images, self._nodes = images, nodes

    def __iter__(self) -> Iterator[Case]:
        images, nodes = self._images, self._nodes
        for height, into, out, stride in LAYERS:
            layer = f"{height}x{into}s{stride}"
            small = -(-height // stride)
            for expansion in (3, 6):
                hidden = expansion * into
                for kernel in (3, 5, 7):
                    moved = 2 * images * (height**2 * into + small**2 * hidden)
                    arguments = images, height, into, hidden, kernel, stride
                    yield self._case(layer, f"t{expansion} k{kernel}", moved, nodes.expand_depthwise, *arguments)
                moved = 2 * images * small**2 * (hidden + out)
                yield self._case(f"{small}x{out}", f"t{expansion}", moved, nodes.project, images, small, hidden, out)
            for residual in (False, True) if stride == 1 and into == out else (False,):
                moved = 2 * images * small**2 * out * (3 if residual else 2)
                detail = "residual" if residual else ""
                yield self._case(f"{small}x{out}", detail, moved, nodes.finish_map, images, small, out, residual)
        for size, channels in UNIT_MAPS:
            moved, layer = 4 * images * size**2 * (-(-channels // 8) * 8), f"{size}x{channels}"
            yield self._case(layer, "maximum 3", moved, nodes.pool, images, size, channels, 3, MAXIMUM)
            for kernel in (3, 5):
                yield self._case(layer, f"k{kernel}", moved, nodes.depthwise_conv, images, size, channels, kernel)
        for size, channels in SHUFFLED_MAPS:
            moved = 4 * images * size**2 * channels
            yield self._case(
                f"{size}x{channels}", "shuffled", moved, nodes.arrange_channels, images, size, channels, True
            )

    def _case(self, layer: str, detail: str, moved: int, make: Callable[..., Node], *arguments: Any) -> Case:
        def prepare() -> Callable[[], None]:
            node, stream = make(*arguments), torch.cuda.current_stream().cuda_stream

            def launch() -> None:
                node.launch(self._nodes.kernels, stream)  # and its buffers are kept

            return launch

        return Case(make.__name__, layer, detail, moved, prepare)


def bandwidth() -> float:
    """Bytes a second of a copy, read and written ones counted."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds([lambda: target.copy_(source)])


def _seconds(launches: list[Callable[[], Any]]) -> float:
    for launch in launches:
        launch()
    times: list[float] = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for number in range(10):
            launches[number % len(launches)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e4)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--kernels", nargs="+", help="those alone")
    parser.add_argument("--layers", nargs="+", help="those alone, as the table calls them")
    parser.add_argument("--details", nargs="+", help="those alone, as the table calls them")
    parser.add_argument("--once", action="store_true", help="one launch each, not timed, for a profiler")
    parser.add_argument("--output", type=Path, help="JSON file of everything measured")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a GPU, found none")
    copied = 0.0 if options.once else bandwidth()
    results = []
    for case in Cases(options.images, Nodes(_library.require_cuda().kernels, "cuda")):
        if (
            (options.kernels and case.kernel not in options.kernels)
            or (options.layers and case.layer not in options.layers)
            or (options.details and case.detail not in options.details)
        ):
            continue
        if options.once:
            case.prepare()()
            torch.cuda.synchronize()
            continue
        launches = [case.prepare() for _ in range(max(1, min(4, _SETS_BYTES // case.moved)))]
        seconds, floor = _seconds(launches), case.moved / copied
        results.append(
            {"kernel": case.kernel, "layer": case.layer, "detail": case.detail, "seconds": seconds, "floor": floor}
        )
        print(
            f"{case.kernel:<18}{case.layer:<10}{case.detail:<10}{seconds / options.images * 1e9:>9.1f} ns an image"
            f"{floor / options.images * 1e9:>9.1f} at least{seconds / floor:>7.2f} times",
            flush=True,
        )
    if options.output is not None:
        write_json(
            options.output,
            {
                "command": sys.argv,
                "machine": {**machine(), "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
                "images": options.images,
                "copied_bytes_per_second": copied,
                "kernels": results,
            },
        )


if __name__ == "__main__":
    main()
