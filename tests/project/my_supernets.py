"""Supernets that cases of the benchmarks name in tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import greedynas_ext


def block(channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(channels, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
        *(nn.Conv2d(12, 12, kernel, padding=kernel // 2, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
        *(nn.Conv2d(12, channels, 1, bias=False), nn.BatchNorm2d(channels)),
    )


class Odd(nn.Module):
    """Is not recognised."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x.flip(-1))


class Foreign(nn.Module):
    """A path is an argument of its forward; the last candidate of each layer runs as the module that it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.ModuleList(
            nn.ModuleList([block(8, 3), block(8, 5), *([Odd()] if layer else [])]) for layer in range(3)
        )
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor, path: Any) -> torch.Tensor:
        x = self.first(x)
        for layer, op in zip(self.layers, path, strict=True):
            x = layer[op](x)
        return self.classifier(x.mean((2, 3)))


def adapted() -> greedynas_ext.AdaptedSupernet:
    torch.manual_seed(0)
    return greedynas_ext.adapt(Foreign())


def called_whole() -> greedynas_ext.AdaptedSupernet:
    """No chain: what a layer gives goes into the next but one too."""

    class Skipping(Foreign):
        def forward(self, x: torch.Tensor, path: Any) -> torch.Tensor:
            x = self.first(x)
            for layer, op in zip(self.layers, path, strict=True):
                if x.sum() > float("inf"):  # decided while it runs
                    return x
                x = layer[op](x)
            return self.classifier(x.mean((2, 3)))

    torch.manual_seed(0)
    return greedynas_ext.adapt(Skipping(), choices=[2, 3, 3])


class Chain(nn.Module):
    """The contract, of modules that are recognised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.choices = nn.ModuleList(nn.ModuleList([block(8, 3), nn.Identity()]) for _ in range(2))
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), pool, nn.Linear(16, 4)
        )


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain()


nothing = 3
