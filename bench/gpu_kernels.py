"""How long the CUDA kernels take, each by itself, for the layers of `mbv2-7`, and how far from their floor that is.

Run: python bench/gpu_kernels.py [--images 1000] [--kernels expand_depthwise project ...] [--output FILE.json]
     python bench/gpu_kernels.py --once [--kernels ...] [--layers 56x32s1 ...]     one launch each, to profile

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
from measure import machine
from torch import Tensor

from greedynas_ext import _library
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
_RELU6 = 2
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


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


class Cases:
    """Every kernel of a choice block for every layer."""

    def __init__(self, images: int) -> None:
        self._k: Any = _library.require_cuda().kernels.bf16
        self._images = images

    def __iter__(self) -> Iterator[Case]:
        for height, into, out, stride in LAYERS:
            layer = f"{height}x{into}s{stride}"
            small = -(-height // stride)
            for expansion in (3, 6):
                hidden = expansion * into
                for kernel in (3, 5, 7):
                    moved = 2 * self._images * (height**2 * into + small**2 * hidden)
                    yield Case(
                        "expand_depthwise",
                        layer,
                        f"t{expansion} k{kernel}",
                        moved,
                        lambda h=height, c=into, t=hidden, k=kernel, s=stride: self._expand_depthwise(h, c, t, k, s),
                    )
                moved = 2 * self._images * small**2 * (hidden + out)
                yield Case(
                    "project",
                    f"{small}x{out}",
                    f"t{expansion}",
                    moved,
                    lambda s=small, t=hidden, o=out: self._project(s, t, o),
                )
            for residual in (False, True) if stride == 1 and into == out else (False,):
                moved = 2 * self._images * small**2 * out * (3 if residual else 2)
                yield Case(
                    "finish_map",
                    f"{small}x{out}",
                    "residual" if residual else "",
                    moved,
                    lambda s=small, o=out, r=residual: self._finish(s, o, r),
                )

    def _affine(self, channels: int) -> Tensor:
        return torch.stack([_random(channels) * 0.1 + 1, _random(channels), torch.full((channels,), 6.0).cuda()])

    def _launch(self, name: str, node: Any, *kept: Tensor) -> Callable[[], None]:
        function, stream = getattr(self._k, name), torch.cuda.current_stream().cuda_stream

        def launch(kept: tuple[Tensor, ...] = kept) -> None:
            function([node], stream)

        return launch

    def _expand_depthwise(self, height: int, into: int, hidden: int, kernel: int, stride: int) -> Callable[[], None]:
        small = -(-height // stride)
        x = _random(self._images, height, height, into, dtype=torch.bfloat16)
        expand = _random(hidden, into, dtype=torch.bfloat16)
        depthwise = (_random(kernel**2, hidden) / kernel).half()
        d = torch.empty(self._images, small, small, hidden, dtype=torch.half, device="cuda")
        affine = self._affine(hidden)
        affine[0] /= into**0.5
        node = self._k.ExpandDepthwise(
            x=x.data_ptr(),
            expand=expand.data_ptr(),
            affine=affine.data_ptr(),
            depthwise=depthwise.data_ptr(),
            d=d.data_ptr(),
            images=self._images,
            height=height,
            width=height,
            in_channels=into,
            hidden_channels=hidden,
            kernel=kernel,
            stride=stride,
            activation=_RELU6,
        )
        partials = torch.empty(self._k.expand_depthwise_units(node), 4, hidden, device="cuda")
        node.partials = partials.data_ptr()
        return self._launch("expand_depthwise", node, x, expand, affine, depthwise, d, partials)

    def _project(self, size: int, hidden: int, out: int) -> Callable[[], None]:
        pixels = self._images * size**2
        d = _random(pixels, hidden, dtype=torch.half)
        affine, weight = self._affine(hidden), (_random(out, hidden) / hidden**0.5).half()
        y, factor = torch.empty(pixels, out, dtype=torch.bfloat16, device="cuda"), torch.ones(out, device="cuda")
        partials = torch.empty(self._k.pointwise_units(pixels), 4, out, device="cuda")
        output = self._k.PointwiseOutput(
            y=y.data_ptr(), partials=partials.data_ptr(), factor=factor.data_ptr(), channels=out
        )
        node = self._k.Project(
            d=d.data_ptr(),
            affine=affine.data_ptr(),
            weight=weight.data_ptr(),
            out=output,
            pixels=pixels,
            image_pixels=size**2,
            hidden_channels=hidden,
            activation=_RELU6,
        )
        return self._launch("project", node, d, affine, weight, y, factor, partials)

    def _finish(self, size: int, channels: int, residual: bool) -> Callable[[], None]:
        pixels = self._images * size**2
        values, other = (_random(pixels, channels, dtype=torch.bfloat16) for _ in range(2))
        affine = self._affine(channels)
        moments = torch.empty(channels + 1, channels, device="cuda")
        partials = torch.empty(max(1, self._k.finish_map_floats(pixels, channels)), device="cuda")
        node = self._k.FinishMap(
            map=values.data_ptr(),
            affine=affine.data_ptr(),
            residual=other.data_ptr() if residual else 0,
            mean=moments[0].data_ptr(),
            covariance=moments[1].data_ptr(),
            partials=partials.data_ptr(),
            pixels=pixels,
            channels=channels,
        )
        return self._launch("finish_map", node, values, other, affine, moments, partials)


def bandwidth() -> float:
    """Bytes a second of a copy, read and written ones counted."""
    source = _random(1 << 29)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds([lambda: target.copy_(source)])


def _seconds(launches: list[Callable[[], Any]]) -> float:
    for launch in launches:
        launch()
    times = []
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
    for case in Cases(options.images):
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
