"""Supernets that `adapt` views, for `python -m greedynas_ext.bench --cases bench/adapted.toml`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from greedynas import Supernet, get_space
from greedynas_ext import AdaptedSupernet, adapt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/ext"))

from foreign_by_path import ShuffleUnit  # noqa: E402


class ShuffleOneShot(nn.Module):
    """The supernet of SPOS: 20 layers of four ShuffleNetV2 units each, at its own widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.features = nn.ModuleList()
        width = 16
        for out, depth in ((64, 4), (160, 4), (320, 8), (640, 4)):
            for number in range(depth):
                stride = 2 if number == 0 else 1
                units = [ShuffleUnit(width, out, out // 2, kernel, stride) for kernel in (3, 5, 7)]
                self.features.append(nn.ModuleList([*units, ShuffleUnit(width, out, out // 2, 3, stride, True)]))
                width = out
        self.conv_last = nn.Sequential(nn.Conv2d(640, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.ReLU())
        self.classifier = nn.Linear(1024, 1000, bias=False)

    def forward(self, x: Tensor, architecture: Sequence[int]) -> Tensor:
        """Logits [N, 1000] of the path `architecture`, 20 positions."""
        x = self.first_conv(x)
        for units, position in zip(self.features, architecture, strict=True):
            x = units[position](x)
        return self.classifier(self.conv_last(x).mean((2, 3)))


class Separable(nn.Sequential):
    """That of DARTS: twice activation, depthwise and 1x1 convolution, BN."""

    def __init__(self, width: int, kernel: int) -> None:
        parts: list[nn.Module] = []
        for _ in range(2):
            depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
            parts += [nn.ReLU(), depthwise, nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width, affine=False)]
        super().__init__(*parts)


class SeparableOneShot(nn.Module):
    """The operations of DARTS but for the dilated ones, as 12 layers in a row at widths for images of 32x32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 36, 3, padding=1, bias=False), nn.BatchNorm2d(36))
        self.layers, self.reductions = nn.ModuleList(), nn.ModuleList()
        for width in (36, 72, 144):
            if width > 36:
                halving = nn.Conv2d(width // 2, width, 3, 2, 1, bias=False)
                self.reductions.append(nn.Sequential(halving, nn.BatchNorm2d(width), nn.ReLU()))
            for _ in range(4):
                mean = nn.Sequential(
                    nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.BatchNorm2d(width, affine=False)
                )
                maximum = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(width, affine=False))
                convolutions = [Separable(width, kernel) for kernel in (3, 5)]
                self.layers.append(nn.ModuleList([maximum, mean, nn.Identity(), *convolutions]))
        self.classifier = nn.Linear(144, 10)

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        """Logits [N, 10] of 12 positions."""
        x = self.stem(x)
        for number, (layer, op) in enumerate(zip(self.layers, path, strict=True)):
            if number in (4, 8):
                x = self.reductions[number // 4 - 1](x)
            x = layer[op](x)
        return self.classifier(x.mean((2, 3)))


class Renamed(nn.Module):
    """A native supernet in a foreign-looking tree."""

    def __init__(self, supernet: Supernet) -> None:
        super().__init__()
        self.first, self.body, self.last = supernet.stem, supernet.choices, supernet.head

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        """Logits [N, classes]."""
        x = self.first(x)
        for layer, op in zip(self.body, path, strict=True):
            x = layer[op](x)
        return self.last(x)


def spos_shufflenet() -> AdaptedSupernet:
    torch.manual_seed(0)
    return adapt(ShuffleOneShot())


def separable() -> AdaptedSupernet:
    torch.manual_seed(0)
    return adapt(SeparableOneShot())


def ofa_mobilenet() -> AdaptedSupernet:
    """That of examples/ofa_subnets.py, without dropout: a loop over its own forward would draw random numbers."""
    example = runpy.run_path(str(ROOT / "examples/ofa_subnets.py"))
    network = example["once_for_all"]()
    network.classifier.dropout.p = 0.0
    blocks, stages = example["BLOCKS"], example["STAGES"]
    choices = [example["KERNELS"]] * blocks + [example["RATIOS"]] * blocks + [example["DEPTHS"]] * stages
    return adapt(network, choices=choices, select=example["set_subnet"])


def mbv2_renamed() -> AdaptedSupernet:
    return adapt(Renamed(Supernet(get_space("mbv2-7"), seed=0)))
