"""A supernet whose edges have the candidates of DARTS."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def separable(channels: int, normalised: bool, dilation: int = 1) -> list[nn.Module]:
    """A depthwise convolution and one of 1x1; batch normalisation after each, or once, and the activation before."""
    depthwise = nn.Conv2d(channels, channels, 3, 1, dilation, dilation, channels, bias=False)
    pointwise = [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)]
    if normalised:
        return [depthwise, nn.BatchNorm2d(channels), nn.ReLU(), *pointwise, nn.ReLU()]
    return [nn.ReLU(), depthwise, *pointwise]


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.edges = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(*separable(8, True), *separable(8, True)),
                    nn.Sequential(*separable(8, False), *separable(8, False)),
                    nn.Sequential(*separable(8, False, 2)),
                    nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(8, affine=False)),
                    nn.AvgPool2d(3, 1, 1, count_include_pad=False),
                    nn.Identity(),
                ]
            )
            for _ in range(2)
        )
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor, genotype: Any) -> Tensor:
        x = self.stem(x)
        for edge, op in zip(self.edges, genotype, strict=True):
            x = edge[op](x)
        return self.classifier(x.mean((2, 3)))
