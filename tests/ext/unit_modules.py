"""Modules that are units, by name: with the channels of their input, which pooling alone does not say."""

from __future__ import annotations

from collections.abc import Callable

import torch
from foreign_by_path import ShuffleUnit, SplitUnit, mb
from recognised import Parts, conv, separable
from supernets import randomise
from torch import nn

UNITS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "shuffle first": (36, lambda: ShuffleUnit(36, 36, 17, 5, 1)),
    "shuffle first, strided": (9, lambda: ShuffleUnit(9, 26, 13, 3, 2)),
    "xception": (20, lambda: ShuffleUnit(20, 20, 33, 3, 1, True)),
    "xception, strided": (16, lambda: ShuffleUnit(16, 48, 16, 3, 2, True)),
    "shuffle last": (32, lambda: SplitUnit(32, 32, 7, 1)),
    "shuffle last, strided": (12, lambda: SplitUnit(12, 34, 3, 2)),
    "dense": (5, lambda: nn.Sequential(conv(5, 16, 3), nn.BatchNorm2d(16), nn.SiLU())),
    "dense, strided": (3, lambda: nn.Sequential(conv(3, 17, 5, 2, bias=True), nn.BatchNorm2d(17))),
    "in a row": (
        7,
        lambda: nn.Sequential(
            *(conv(7, 12, 3), nn.BatchNorm2d(12), nn.Hardswish(), conv(12, 20, 7, 2), nn.BatchNorm2d(20), nn.ReLU6()),
            *(mb(20, 32, 5, 1, 2), conv(32, 16), nn.BatchNorm2d(16)),
        ),
    ),
    "separable": (9, lambda: nn.Sequential(*separable(9, 3, 2), *separable(9, 3, out=20))),
    "separable, 7x7": (34, lambda: nn.Sequential(*separable(34, 7, out=32)[1:], nn.Hardswish())),
    "activated": (6, lambda: nn.Sequential(nn.SiLU(), mb(6, 32, 5, 1, 3))),
    "activated, dense": (20, lambda: nn.Sequential(nn.ReLU(), conv(20, 17, 3, 2), nn.BatchNorm2d(17))),
    "maximum": (12, lambda: nn.MaxPool2d(3, 1, 1)),
    "maximum of 32": (12, lambda: nn.Sequential(conv(12, 32), nn.BatchNorm2d(32), nn.MaxPool2d(5, 2, 2))),
    "maximum, normalised": (12, lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(12, affine=False))),
    "mean": (12, lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.BatchNorm2d(12))),
    "mean with padding": (12, lambda: nn.Sequential(nn.ReLU(), nn.AvgPool2d(7, 3, 3), nn.BatchNorm2d(12), nn.SiLU())),
    "mean, projected": (
        5,
        lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.ReLU6(), conv(5, 16), nn.BatchNorm2d(16), nn.ReLU()),
    ),
    "mean, expanded": (7, lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), mb(7, 16, 3, 1, 2))),
    "branches": (40, lambda: Parts(nn.Sequential(*separable(20, 5, out=24), nn.MaxPool2d(3, 1, 1)))),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = UNITS[name][1]()
    randomise(module, 2)
    return module.to(dtype).eval()
