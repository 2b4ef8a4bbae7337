"""An elastic network in the manner of once-for-all, written from scratch: blocks are slices of the largest there is.

Kernel sizes are chosen by an attribute, smaller kernels being the middle of larger ones times a small matrix; widths by
how many channels come in; depth by how many blocks of a stage run. What a block is to be is set on the outermost
modules, whose forwards hand it on to those inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNELS, RATIOS, DEPTHS = (3, 5, 7), (2, 3, 4), (1, 2, 3)


class WideConv(nn.Module):
    """1x1; `width` output channels of as many input channels as there are."""

    def __init__(self, most_in: int, most_out: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(most_in, most_out, 1, bias=False)
        self.width = most_out

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.layer.weight[: self.width, : x.shape[1]].contiguous())


class AnyKernelConv(nn.Module):
    """Depthwise, of the active kernel size."""

    MATRICES = True

    def __init__(self, most: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(most, most, max(KERNELS), stride, groups=most, bias=False)
        self.stride = stride
        for large, small in zip(KERNELS[:0:-1], KERNELS[-2::-1], strict=True):
            self.register_parameter(f"to_{small}", nn.Parameter(torch.eye(small**2)))
            assert large - small == 2
        self.kernel = max(KERNELS)

    def weight(self, channels: int) -> Tensor:
        found = self.layer.weight[:channels]
        for small in KERNELS[-2::-1]:
            if small < self.kernel:
                break
            middle = found[:, :, 1:-1, 1:-1]
            if self.MATRICES:
                flat = middle.reshape(channels, -1) @ getattr(self, f"to_{small}").t()
                found = flat.view(channels, 1, small, small)
            else:
                found = middle
        return found

    def forward(self, x: Tensor) -> Tensor:
        channels = x.size(1)
        return F.conv2d(x, self.weight(channels), None, self.stride, self.kernel // 2, 1, channels)


class SlicedNorm(nn.Module):
    """The BatchNorm itself for all channels, else the first of each of its tensors."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.layer = nn.BatchNorm2d(most)

    def forward(self, x: Tensor) -> Tensor:
        norm, channels = self.layer, x.size(1)
        if channels == norm.num_features:
            return norm(x)
        if norm.training:
            norm.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            norm.running_mean[:channels],
            norm.running_var[:channels],
            norm.weight[:channels],
            norm.bias[:channels],
            norm.training,
            norm.momentum,
            norm.eps,
        )


class SlicedSE(nn.Module):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(most, most // 4, 1), nn.Linear(most // 4, most)
        self.share = 4

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        inner = channels // self.share
        y = F.adaptive_avg_pool2d(x, 1)
        y = F.relu(F.conv2d(y, self.squeeze.weight[:inner, :channels], self.squeeze.bias[:inner])).flatten(1)
        y = F.linear(y, self.excite.weight[:channels, :inner], self.excite.bias[:channels])
        return x * F.hardsigmoid(y)[:, :, None, None]


class ElasticBlock(nn.Module):
    """An inverted bottleneck; its forward sets the width and the kernel inside."""

    def __init__(self, into: int, out: int, stride: int, se: bool, activation: type[nn.Module]) -> None:
        super().__init__()
        most = into * max(RATIOS)
        self.widen = nn.Sequential(WideConv(into, most), SlicedNorm(most), activation())
        spread: list[nn.Module] = [AnyKernelConv(most, stride), SlicedNorm(most), activation()]
        self.spread = nn.Sequential(*spread, *([SlicedSE(most)] if se else []))
        self.narrow = nn.Sequential(WideConv(most, out), nn.BatchNorm2d(out))
        self.adds = stride == 1 and into == out
        self.kernel_size, self.ratio = max(KERNELS), float(max(RATIOS))

    def forward(self, x: Tensor) -> Tensor:
        self.widen[0].width = round(x.size(1) * self.ratio)
        self.spread[0].kernel = self.kernel_size
        y = self.narrow(self.spread(self.widen(x)))
        return x + y if self.adds else y


class OnceNet(nn.Module):
    """Two stages of up to three blocks. With `mobile` the head is that of MobileNetV3."""

    def __init__(self, classes: int = 5, mobile: bool = False) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        widths = [(8, 2, False, nn.ReLU), (12, 1, True, nn.Hardswish)]
        self.body, into = nn.ModuleList(), 8
        self.stages = []
        for out, stride, se, activation in widths:
            self.stages.append(list(range(len(self.body), len(self.body) + max(DEPTHS))))
            for number in range(max(DEPTHS)):
                self.body.append(ElasticBlock(into, out, stride if number == 0 else 1, se, activation))
                into = out
        self.depths = [max(DEPTHS)] * len(widths)
        self.last = nn.Sequential(nn.Conv2d(into, 24, 1, bias=False), nn.BatchNorm2d(24), nn.Hardswish())
        self.mix = nn.Sequential(nn.Conv2d(24, 10, 1, bias=False), nn.Hardswish()) if mobile else None
        self.classify = nn.Sequential(nn.Dropout(0.2), nn.Linear(10 if mobile else 24, classes))

    def be(self, kernels: Sequence[int], ratios: Sequence[int], depths: Sequence[int]) -> None:
        """Which sub-network runs from now on."""
        for block, kernel, ratio in zip(self.body, kernels, ratios, strict=True):
            block.kernel_size, block.ratio = kernel, float(ratio)
        self.depths[:] = depths

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for numbers, depth in zip(self.stages, self.depths, strict=True):
            for number in numbers[:depth]:
                x = self.body[number](x)
        x = self.last(x).mean((2, 3), keepdim=True)
        if self.mix is not None:
            x = self.mix(x)
        return self.classify(x.flatten(1))


ONCE = [KERNELS] * 6 + [RATIOS] * 6 + [DEPTHS] * 2


def set_once(net: Any, values: Sequence[int]) -> None:
    net.be(values[:6], values[6:12], values[12:])


def make_once(mobile: bool = False) -> nn.Module:
    """With matrices that are not those of a fresh network."""
    net = OnceNet(mobile=mobile)
    for module in net.modules():
        if isinstance(module, AnyKernelConv):
            for name, matrix in module.named_parameters(recurse=False):
                assert name.startswith("to_")
                nn.init.normal_(matrix, 0.0, 0.4)
    return net
