"""Nodes of the CUDA kernels on random numbers: the structs of csrc/cuda/kernels.h, and the memory that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

RELU6 = 2
MAXIMUM, MEAN = 1, 2  # Pooling (csrc/operation_source.h)
STREAMS = ("x", "d", "y", "map", "residual", "images", "input", "output", "logits")  # the others are parameters


@dataclass(frozen=True)
class Node:
    """A launch's arguments.

    Attributes:
        kernel: the function of `kernels` that takes them.
        arguments: a struct, or a list of one where the kernel takes a group; a tuple where it takes several arguments.
        shape: its members that are numbers.
        images: of the launch; None for kernels that know none.
        buffers: all memory that it accesses, by the names of the members (an output's: y, ...).
        read: bytes of each buffer that have to be read.
        written: bytes that have to be written.
    """

    kernel: str
    arguments: Any
    shape: dict[str, int]
    images: int | None
    buffers: dict[str, Tensor]
    read: dict[str, int]
    written: dict[str, int]

    def launch(self, kernels: Any, stream: int) -> None:
        """On a stream, by a module's kernels."""
        arguments = self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)
        getattr(kernels, self.kernel)(*arguments, stream)

    @property
    def moved(self) -> int:
        """Bytes that maps have to move."""
        return sum(bytes_ for side in (self.read, self.written) for name, bytes_ in side.items() if name in STREAMS)


class Nodes:
    """Makes nodes for a module's kernels, on a device."""

    def __init__(self, kernels: Any, device: str) -> None:
        # Those for bfloat16 maps, and those that know no maps.
        self.kernels, self._device = SimpleNamespace(**{**vars(kernels), **vars(kernels.bf16)}), device

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self._device).to(dtype)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self._device)

    def _affine(self, channels: int, depth: int = 1) -> Tensor:
        """Scale, shift and bound for sums of `depth` products."""
        bound = torch.full((channels,), 6.0, device=self._device)
        return torch.stack([(self._random(channels) * 0.1 + 1) / depth**0.5, self._random(channels), bound])

    def _norm(self, channels: int) -> tuple[Any, dict[str, Tensor]]:
        buffers = {"gamma": self._random(channels), "beta": self._random(channels)}
        buffers["factor"] = torch.ones(channels, device=self._device)
        return self.kernels.BatchNorm(**{name: t.data_ptr() for name, t in buffers.items()}, eps=1e-5), buffers

    def _node(
        self,
        kernel: str,
        struct: str,
        shape: dict[str, int],
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        images: int | None = None,
        scratch: Mapping[str, Tensor] | None = None,
        read: Mapping[str, int] | None = None,
        group: bool = True,
        members: Mapping[str, Any] | None = None,
        inner: Mapping[str, Tensor] | None = None,
    ) -> Node:
        """`read`: where less is needed than an input. `members`: others of the struct; `inner`: what they name."""
        buffers = {**inputs, **outputs, **(scratch or {})}
        pointers = {name: t.data_ptr() for name, t in buffers.items()}
        arguments = getattr(self.kernels, struct)(**pointers, **shape, **(members or {}))
        inputs = {**inputs, **(inner or {})}
        return Node(
            kernel,
            [arguments] if group else arguments,
            shape,
            images,
            {**buffers, **(inner or {})},
            {name: t.nbytes for name, t in inputs.items()} | dict(read or {}),
            {name: t.nbytes for name, t in outputs.items()},
        )

    def expand_depthwise(self, images: int, height: int, into: int, hidden: int, kernel: int, stride: int) -> Node:
        small = -(-height // stride)
        inputs = {
            "x": self._random(images, height, height, into, dtype=torch.bfloat16),
            "expand": self._random(hidden, into, dtype=torch.bfloat16),
            "affine": self._affine(hidden, into),
            "depthwise": (self._random(kernel**2, hidden) / kernel).half(),
        }
        shape = {"images": images, "height": height, "width": height, "in_channels": into, "hidden_channels": hidden}
        shape |= {"kernel": kernel, "stride": stride, "activation": RELU6}
        units = self.kernels.expand_depthwise_units(self.kernels.ExpandDepthwise(**shape))
        outputs = {
            "d": self._empty(images, small, small, hidden, dtype=torch.half),
            "partials": self._empty(units, 4, hidden),
        }
        return self._node("expand_depthwise", "ExpandDepthwise", shape, inputs, outputs, images=images)

    def _output(self, pixels: int, channels: int) -> tuple[Any, dict[str, Tensor]]:
        """PointwiseOutput with sums, and what it writes."""
        units = self.kernels.pointwise_units(pixels)
        outputs = {
            "y": self._empty(pixels, channels, dtype=torch.bfloat16),
            "partials": self._empty(units, 4, channels),
        }
        pointers = {name: t.data_ptr() for name, t in outputs.items()}
        return self.kernels.PointwiseOutput(**pointers, channels=channels), outputs

    def _pointwise(
        self,
        kernel: str,
        struct: str,
        shape: dict[str, Any],
        inputs: dict[str, Tensor],
        pixels: int,
        channels: int,
        *,
        images: int,
        read: Mapping[str, int] | None = None,
        group: bool = True,
    ) -> Node:
        out, outputs = self._output(pixels, channels)
        node = self._node(
            kernel, struct, shape, inputs, {}, images=images, read=read, group=group, members={"out": out}
        )
        node.buffers.update(outputs)
        node.written.update({name: t.nbytes for name, t in outputs.items()})
        node.shape["channels"] = channels
        return node

    def project(self, images: int, size: int, hidden: int, channels: int) -> Node:
        pixels = images * size**2
        inputs = {
            "d": self._random(pixels, hidden, dtype=torch.half),
            "affine": self._affine(hidden),
            "weight": (self._random(channels, hidden) / hidden**0.5).half(),
        }
        shape = {"pixels": pixels, "image_pixels": size**2, "hidden_channels": hidden, "activation": RELU6}
        return self._pointwise("project", "Project", shape, inputs, pixels, channels, images=images)

    def strided_conv(self, images: int, height: int, into: int, channels: int, stride: int) -> Node:
        pixels = images * (-(-height // stride)) ** 2
        inputs = {
            "x": self._random(images, height, height, into, dtype=torch.bfloat16),
            "weight": self._random(channels, into, dtype=torch.bfloat16),
        }
        shape = {"images": images, "height": height, "width": height, "in_channels": into, "stride": stride}
        return self._pointwise(
            "strided_conv", "StridedConv", shape, inputs, pixels, channels, images=images, read={"x": 2 * pixels * into}
        )

    def stem_conv(self, images: int, height: int, channels: int, kernel: int = 3, stride: int = 2) -> Node:
        """Of images of three channels in NCHW."""
        into, depth = 3, -(-(kernel**2) * 3 // 16) * 16
        pixels = images * (-(-height // stride)) ** 2
        inputs = {
            "images": self._random(images, into, height, height),
            "weight": self._random(channels, depth, dtype=torch.bfloat16),
        }
        shape: dict[str, Any] = {"images_count": images, "height": height, "width": height, "in_channels": into}
        shape |= {"kernel": kernel, "stride": stride, "strides": list(inputs["images"].stride())}
        node = self._pointwise("stem_conv", "StemConv", shape, inputs, pixels, channels, images=images, group=False)
        del node.shape["strides"]
        return node

    def finish_map(self, images: int, size: int, channels: int, residual: bool) -> Node:
        pixels = images * size**2
        inputs = {"affine": self._affine(channels)}
        if residual:
            inputs["residual"] = self._random(pixels, channels, dtype=torch.bfloat16)
        outputs = {
            "map": self._random(pixels, channels, dtype=torch.bfloat16),
            "mean": self._empty(channels),
            "covariance": self._empty(channels, channels),
        }
        scratch = {"partials": self._empty(max(1, self.kernels.finish_map_floats(pixels, channels)))}
        shape = {"pixels": pixels, "channels": channels, "activation": 0}
        read = {"map": outputs["map"].nbytes, "affine": 8 * channels}  # no bounds: there is no activation
        return self._node("finish_map", "FinishMap", shape, inputs, outputs, images=images, scratch=scratch, read=read)

    def squeeze(self, images: int, size: int, channels: int) -> Node:
        inputs = {
            "d": self._random(images, size**2, channels, dtype=torch.half),
            "affine": self._affine(channels),
            "factor": torch.ones(channels, device=self._device),
        }
        shape = {"images": images, "image_pixels": size**2, "channels": channels, "activation": RELU6}
        outputs = {"pooled": self._empty(images, channels)}
        return self._node("squeeze", "Squeeze", shape, inputs, outputs, images=images)

    def pool(self, images: int, size: int, channels: int, kernel: int, pooling: int, stride: int = 1) -> Node:
        """With sums, as where BatchNorm follows."""
        row, small = -(-channels // 8) * 8, -(-size // stride)
        pixels = images * small**2
        inputs = {"x": self._random(images, size, size, row, dtype=torch.bfloat16)}
        outputs = {
            "y": self._empty(pixels, row, dtype=torch.bfloat16),
            "partials": self._empty(self.kernels.pointwise_units(pixels), 4, row),
        }
        shape = {"images": images, "height": size, "width": size, "channels": channels, "kernel": kernel}
        shape |= {"stride": stride, "pooling": pooling, "activation": 0}
        return self._node("pool", "Pool", shape, inputs, outputs, images=images, group=False)

    def depthwise_conv(self, images: int, size: int, channels: int, kernel: int, stride: int = 1) -> Node:
        """Of what BatchNorm and ReLU make of its input."""
        row, small = -(-channels // 8) * 8, -(-size // stride)
        inputs = {
            "x": self._random(images, size, size, row, dtype=torch.bfloat16),
            "affine": self._affine(row),
            "weight": self._random(kernel**2, row) / kernel,
            "stored_factor": torch.ones(row, device=self._device),
        }
        outputs = {"y": self._empty(images * small**2, row, dtype=torch.bfloat16)}
        shape = {"images": images, "height": size, "width": size, "channels": channels, "kernel": kernel}
        shape |= {"stride": stride, "activation": 1}
        read = {"affine": 8 * row}  # no bounds: it is ReLU
        return self._node(
            "depthwise_conv", "DepthwiseConv", shape, inputs, outputs, images=images, read=read, group=False
        )

    def arrange_channels(self, images: int, size: int, channels: int, shuffled: bool) -> Node:
        """Half of a map's channels and all of another's, of as many, behind each other or by turns."""
        pixels, half = images * size**2, channels // 2
        buffers = {
            "x": self._random(pixels, channels, dtype=torch.bfloat16),
            "d": self._random(pixels, half, dtype=torch.bfloat16),
        }
        out = self._empty(pixels, channels, dtype=torch.bfloat16)
        first, step = (1, 2) if shuffled else (half, 1)
        sources = [(buffers["x"].data_ptr(), channels, 0, 1, half, 0, step)]
        sources.append((buffers["d"].data_ptr(), half, 0, 1, half, first, step))
        shape = {"pixels": pixels, "channels": channels, "shuffled": int(shuffled)}
        read = {"x": out.nbytes // 2, "d": out.nbytes // 2}
        arguments = (sources, out.data_ptr(), channels, 0, pixels)
        return Node("arrange_channels", arguments, shape, images, {**buffers, "y": out}, read, {"y": out.nbytes})

    def head_pool(self, images: int, size: int, into: int, channels: int) -> Node:
        inputs = {
            "x": self._random(images, size**2, into, dtype=torch.bfloat16),
            "weight": self._random(channels, into, dtype=torch.bfloat16),
            "affine": self._affine(channels, into),
        }
        shape = {"images": images, "image_pixels": size**2, "in_channels": into, "channels": channels}
        outputs = {"pooled": self._empty(images, channels)}
        shape["activation"] = RELU6
        return self._node("head_pool", "HeadPool", shape, inputs, outputs, images=images)

    def linear(self, rows: int, depth: int, channels: int) -> Node:
        inputs = {"input": self._random(rows, depth), "weight": self._random(channels, depth)}
        inputs["bias"] = self._random(channels)
        shape = {"rows": rows, "depth": depth, "in_stride": depth, "channels": channels, "out_stride": channels}
        return self._node("linear", "Linear", shape, inputs, {"output": self._empty(rows, channels)}, images=rows)

    def path_cross_entropy(self, images: int, classes: int) -> Node:
        """Of one path, as chains launch it."""
        inputs = {
            "logits": self._random(images, classes),
            "targets": torch.randint(classes, (images,), device=self._device),
        }
        outputs = {
            "image_losses": self._empty(images),
            "correct": self._empty(1, dtype=torch.int64),
        }
        scratch = {"status": torch.zeros(1, dtype=torch.int32, device=self._device)}  # touched by errors alone
        shape = {"paths": 1, "images": images, "classes": classes}
        return self._node(
            "path_cross_entropy",
            "PathCrossEntropy",
            shape,
            inputs,
            outputs,
            images=images,
            scratch=scratch,
            group=False,
        )

    def norm_affine(self, units: int, channels: int) -> Node:
        norm, inner = self._norm(channels)
        partials = self._random(units, 4, channels)
        partials[:, 2:] = partials[:, 2:].abs() + 1
        outputs = {"affine": self._empty(3, channels)}
        shape = {"units": units, "channels": channels, "activation": RELU6}
        return self._node(
            "norm_affine",
            "NormAffine",
            shape,
            {"partials": partials},
            outputs,
            members={"norm": norm},
            inner=inner,
        )

    def pointwise_affine(self, into: int, channels: int) -> Node:
        norm, inner = self._norm(channels)
        root = self._random(into, into)
        inputs = {
            "mean": self._random(into),
            "covariance": root @ root.T,
            "weight": self._random(channels, into, dtype=torch.bfloat16),
        }
        outputs = {"affine": self._empty(3, channels)}
        shape = {"in_channels": into, "channels": channels, "activation": RELU6}
        # Of the covariance, what lies on and above the diagonal, in tiles of 16.
        tiles = -(-into // 16)
        needed = sum(4 * min(16, into - 16 * tile) * min(into, 16 * (tile + 1)) for tile in range(tiles))
        return self._node(
            "pointwise_affine",
            "PointwiseAffine",
            shape,
            inputs,
            outputs,
            members={"norm": norm},
            inner=inner,
            read={"covariance": needed},
        )
