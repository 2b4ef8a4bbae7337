"""Nodes of a supernet as launches of the CUDA kernels: shapes, and the bytes and operations that have to be.

A node is the name of a function of csrc/cuda/kernels.h and the numbers that record_launches.cu reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu_kernels import LAYERS
from kernel_work import RELU6, ceil_div

from greedynas import Space
from greedynas.costs import output_size

_LINEAR = 0  # Activation of choice_block.h
_NUMBERS = {
    "expand_depthwise": "images height width in_channels hidden_channels kernel stride activation",
    "project": "pixels image_pixels hidden_channels channels mapped activation",
    "finish_map": "pixels channels residual moments activation",
    "strided_conv": "images height width in_channels channels stride mapped",
    "stem_conv": "images height width in_channels channels kernel stride mapped",
    "head_pool": "images image_pixels in_channels channels activation",
    "linear": "rows depth channels",
    "pointwise_affine": "in_channels channels",
    "norm_affine": "units channels",
}


@dataclass(frozen=True)
class Node:
    """A launch.

    Attributes:
        function: of kernels.h.
        numbers: as record_launches.cu reads them.
    """

    function: str
    numbers: tuple[int, ...]

    @property
    def shape(self) -> dict[str, int]:
        return dict(zip(_NUMBERS[self.function].split(), self.numbers, strict=True))

    @property
    def line(self) -> str:
        return " ".join([self.function, *map(str, self.numbers)])

    @property
    def dram_bytes(self) -> int:
        """Each input read once, each output written once; maps alone, as bench/gpu/gpu_kernels.py counts."""
        s = self.shape
        if self.function == "expand_depthwise":
            small = output_size(s["height"], s["stride"]) * output_size(s["width"], s["stride"])
            pixels = s["height"] * s["width"] * s["in_channels"] + small * s["hidden_channels"]
            return 2 * s["images"] * pixels
        if self.function == "project":
            return 2 * s["pixels"] * (s["hidden_channels"] + s["channels"])
        if self.function == "finish_map":
            return 2 * s["pixels"] * s["channels"] * (3 if s["residual"] else 2)
        if self.function in ("strided_conv", "stem_conv"):
            small = output_size(s["height"], s["stride"]) * output_size(s["width"], s["stride"])
            read = small * 2 if self.function == "strided_conv" else s["height"] * s["width"] * 4
            return s["images"] * (read * s["in_channels"] + 2 * small * s["channels"])
        if self.function == "head_pool":
            return s["images"] * (2 * s["image_pixels"] * s["in_channels"] + 4 * s["channels"])
        if self.function == "linear":
            return 4 * (s["rows"] * (s["depth"] + s["channels"]) + s["depth"] * s["channels"])
        if self.function == "norm_affine":
            return 16 * s["units"] * s["channels"]
        return s["in_channels"] * (4 * s["in_channels"] + 2 * s["channels"])

    @property
    def tensor_flop(self) -> int:
        """Of the matrix products as they are defined, two to a multiply-accumulate."""
        s = self.shape
        if self.function == "expand_depthwise":
            return 2 * s["images"] * s["height"] * s["width"] * s["in_channels"] * s["hidden_channels"]
        if self.function == "project":
            return 2 * s["pixels"] * s["hidden_channels"] * s["channels"]
        if self.function == "finish_map":
            return s["pixels"] * s["channels"] ** 2 if s["moments"] else 0
        if self.function in ("strided_conv", "stem_conv"):
            small = output_size(s["height"], s["stride"]) * output_size(s["width"], s["stride"])
            taps = s.get("kernel", 1) ** 2
            return 2 * s["images"] * small * taps * s["in_channels"] * s["channels"]
        if self.function == "head_pool":
            return 2 * s["images"] * s["image_pixels"] * s["in_channels"] * s["channels"]
        return 0


@dataclass(frozen=True)
class Measurable:
    """A node as bench/gpu/gpu_kernels.py names it."""

    layer: str
    detail: str
    node: Node


def layer_nodes(images: int) -> Iterator[Measurable]:
    """Those of choice blocks that bench/gpu/gpu_kernels.py times, in its order."""
    for height, into, out, stride in LAYERS:
        small = ceil_div(height, stride)
        pixels = images * small**2
        for expansion in (3, 6):
            hidden = expansion * into
            for kernel in (3, 5, 7):
                numbers = (images, height, height, into, hidden, kernel, stride, RELU6)
                yield Measurable(
                    f"{height}x{into}s{stride}", f"t{expansion} k{kernel}", Node("expand_depthwise", numbers)
                )
            project = Node("project", (pixels, small**2, hidden, out, 0, RELU6))
            yield Measurable(f"{small}x{out}", f"t{expansion}", project)
        for residual in (0, 1) if stride == 1 and into == out else (0,):
            node = Node("finish_map", (pixels, out, residual, 1, _LINEAR))
            yield Measurable(f"{small}x{out}", "residual" if residual else "", node)


def evaluation(space: Space, paths: Sequence[Sequence[int]], images: int, resolution: int) -> dict[str, Counter[Node]]:
    """Launches of an evaluation with batch statistics, by stage; nodes that share launches are counted one by one.

    Statistics (norm_affine) are counted with the most units that there can be.
    """
    size = output_size(resolution, space.stem_stride)
    stem_pixels = images * size**2
    stem = (images, resolution, resolution, space.in_channels, space.stem_channels, 3, space.stem_stride, 0)
    stages: dict[str, Counter[Node]] = {
        "stem": Counter([Node("stem_conv", stem), _norm(stem_pixels, space.stem_channels)])
    }
    for layer in space.fixed:
        numbers = (images, size, size, layer.in_channels, layer.in_channels, 3, layer.stride, RELU6)
        stages["stem"].update(_bottleneck(numbers, layer.out_channels, residual=layer.keeps_shape))
        size = output_size(size, layer.stride)
    for at, layer in enumerate(space.layers):
        stage = stages[f"layer {at}"] = Counter()
        small = output_size(size, layer.stride)
        for prefix in {tuple(path[: at + 1]) for path in paths}:
            op = space.operations[prefix[-1]]
            if op.identity and layer.keeps_shape:
                continue
            if op.identity:
                shortcut = (images, size, size, layer.in_channels, layer.out_channels, layer.stride, 0)
                pixels = images * small**2
                finish = Node("finish_map", (pixels, layer.out_channels, 0, 1, _LINEAR))
                stage.update([Node("strided_conv", shortcut), _norm(pixels, layer.out_channels), finish])
                continue
            hidden = op.expansion * layer.in_channels
            stage[Node("pointwise_affine", (layer.in_channels, hidden))] += 1
            numbers = (images, size, size, layer.in_channels, hidden, op.kernel, layer.stride, RELU6)
            stage.update(_bottleneck(numbers, layer.out_channels, residual=layer.keeps_shape))
        size = small
    leaves, channels = len({tuple(path) for path in paths}), space.layers[-1].out_channels
    head = (images, size**2, channels, space.head_channels, RELU6)
    stages["head"] = Counter(
        {
            Node("pointwise_affine", (channels, space.head_channels)): leaves,
            Node("head_pool", head): leaves,
            Node("linear", (images, space.head_channels, space.num_classes)): leaves,
        }
    )
    return stages


def _norm(pixels: int, channels: int) -> Node:
    return Node("norm_affine", (min(2048, ceil_div(pixels, 128)), channels))


def _bottleneck(expand: tuple[int, ...], out: int, *, residual: bool) -> list[Node]:
    images, height, width, _, hidden, _, stride, _ = expand
    image_pixels = output_size(height, stride) * output_size(width, stride)
    pixels = images * image_pixels
    return [
        Node("expand_depthwise", expand),
        _norm(pixels, hidden),
        Node("project", (pixels, image_pixels, hidden, out, 0, RELU6)),
        _norm(pixels, out),
        Node("finish_map", (pixels, out, int(residual), 1, _LINEAR)),
    ]
