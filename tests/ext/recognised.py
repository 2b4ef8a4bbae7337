"""Modules of many makings for the tests of recognition, and what a description says in plain functions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedynas_ext.recognise import (
    Unrecognised,
)


def filled(module: nn.Module) -> nn.Module:
    """In float64, with every parameter drawn, so that no two are alike."""
    generator = torch.Generator().manual_seed(1)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.3, 0.7, generator=generator)
    return module


def reason(weights: object) -> str:
    assert isinstance(weights, Unrecognised), weights
    assert weights.reason
    assert "\n" not in weights.reason
    return weights.reason


# ---------------------------------------------------------------- blocks of other making


def conv(cin: int, cout: int, k: int = 1, stride: int = 1, groups: int = 1, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, **{"stride": stride, "padding": k // 2, "groups": groups, "bias": False, **kwargs})


def plain(cin: int = 4, hidden: int = 12, cout: int = 4, k: int = 3, stride: int = 1, se: Any = None) -> nn.Sequential:
    """An inverted bottleneck without a residual, in one flat nn.Sequential."""
    parts = [conv(cin, hidden), nn.BatchNorm2d(hidden), nn.ReLU6()]
    parts += [conv(hidden, hidden, k, stride, hidden), nn.BatchNorm2d(hidden), nn.ReLU6()]
    parts += [] if se is None else [se]
    return nn.Sequential(*parts, conv(hidden, cout), nn.BatchNorm2d(cout))


def separable(channels: int, kernel: int = 3, stride: int = 1, out: int | None = None) -> list[nn.Module]:
    """Half of a separable convolution of DARTS."""
    out = channels if out is None else out
    depthwise = conv(channels, channels, kernel, stride, channels)
    return [nn.ReLU(), depthwise, conv(channels, out), nn.BatchNorm2d(out, affine=False)]


class Parts(nn.Module):
    """A unit that hands the first half of its channels on, and the second half through `branch`."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        return torch.cat((one, self.branch(two)), 1)


class Residual(nn.Module):
    """A switched sum, nested Sequentials, and `how` the sum is written."""

    def __init__(self, how: str = "right", branch: nn.Module | None = None) -> None:
        super().__init__()
        self.how, self.use_residual = how, True
        parts = list(plain() if branch is None else branch)
        self.branch = nn.Sequential(nn.Sequential(*parts[:3]), nn.Sequential(), nn.Sequential(*parts[3:]))

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if not self.use_residual:
            return out
        if self.how == "left":
            return out + x
        if self.how == "torch":
            return torch.add(x, out, alpha=1)
        if self.how == "writes":
            out += x
            return out
        if self.how == "method":
            return out.add_(x)
        if self.how == "writes to input":
            x += out
            return x
        if self.how == "method on input":
            return x.add_(out)
        if self.how == "scaled":
            return torch.add(x, out, alpha=2)
        if self.how == "of itself":
            return out + out
        return x + out


class Squeeze(nn.Module):
    """Squeeze-excitation on 12 channels in several hands."""

    def __init__(self, how: str = "linear", bias: bool = True) -> None:
        super().__init__()
        self.how = how
        linear = how.startswith("linear")
        self.down = nn.Linear(12, 5, bias=bias) if linear else nn.Conv2d(12, 5, 1, bias=bias)
        self.up = nn.Linear(5, 12, bias=bias) if linear else nn.Conv2d(5, 12, 1, bias=bias)
        self.pool = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        if self.how == "linear":
            gate = torch.sigmoid(self.up(F.relu(self.down(self.pool(x).view(b, c))))).view(b, c, 1, 1)
            return x * gate.expand_as(x)
        if self.how == "linear, indexed":
            return F.hardsigmoid(self.up(F.relu(self.down(x.mean([2, 3])), inplace=True)))[:, :, None, None] * x
        if self.how == "linear, squeezed":
            pooled = F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)
            return self.up(self.down(pooled).relu()).sigmoid().unsqueeze(2).unsqueeze(-1) * x
        if self.how == "writes":
            x *= F.hardsigmoid(self.up(F.relu(self.down(x.mean((-1, -2), keepdim=True)))))
            return x
        if self.how == "sized":
            return x * F.hardsigmoid(self.up(F.relu(self.down(F.avg_pool2d(x, 9)))))
        if self.how == "silu":
            return x * F.hardsigmoid(self.up(F.silu(self.down(self.pool(x)))))
        if self.how == "tanh":
            return x * torch.tanh(self.up(F.relu(self.down(self.pool(x)))))
        if self.how == "maximum":
            return x * F.hardsigmoid(self.up(F.relu(self.down(x.amax((2, 3), keepdim=True)))))
        if self.how == "not broadcast":
            return x + F.hardsigmoid(self.up(F.relu(self.down(self.pool(x)))))
        return torch.mul(F.hardsigmoid(self.up(F.relu(self.down(torch.mean(x, (2, 3), keepdim=True))))), x)


class Calls(nn.Module):
    """`function(self, x)` around a plain block."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function, self.block = function, plain()
        self.register_buffer("count", torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


# Not in a test module, whose assertions pytest rewrites.


def asserting(module: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.data.size()
    assert channels % 2 == 0, "an even number"
    assert x.dim() == 4
    x = x.reshape(batch, channels // 2, 2, height, width)
    return torch.cat((module.branch(x[:, :, 0]), x[:, :, 1]), 1)


def only_even(x: Tensor) -> None:
    assert x.shape[2] % 2 == 0


def only_many(x: Tensor) -> None:
    assert x.shape[1] > 1000


def generator_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def assert_generators(before: tuple[Any, ...]) -> None:
    now = generator_states()
    assert torch.equal(now[0], before[0])
    assert now[1] == before[1]
    assert all(np.array_equal(one, two) for one, two in zip(now[2], before[2], strict=True))


def same(one: Any, other: Any) -> bool:
    """The same values in the same tensors with the same shapes."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one is other
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return bool(one == other)
