"""Modules are described by what they compute, refused with a reason where they are not understood, and never stale.

The oracle of the numbers is the module itself in training mode; the descriptions are computed with plain functions.
"""

from __future__ import annotations

import copy
import gc
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

from greedynas import Supernet, get_space
from greedynas_ext import recognise
from greedynas_ext.packing import BatchNormWeights, ConvBNWeights, IdentityWeights, InvertedBottleneckWeights
from greedynas_ext.recognise import (
    HeadWeights,
    StemWeights,
    Unrecognised,
    recognise_head,
    recognise_operation,
    recognise_stem,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "hswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "silu": lambda x: x / (1 + (-x).exp()),
    "hsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


def normalised(x: Tensor, bn: BatchNormWeights) -> Tensor:
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + bn.eps).sqrt()
    weight = torch.ones(x.shape[1], dtype=x.dtype) if bn.weight is None else bn.weight
    bias = torch.zeros(x.shape[1], dtype=x.dtype) if bn.bias is None else bn.bias
    return x * weight[:, None, None] + bias[:, None, None]


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.reshape(weight.shape[0], -1).T
    return y if bias is None else y + bias


def computed(weights: Any, x: Tensor) -> Tensor:
    """What a description says about the output, with batch statistics."""
    if isinstance(weights, IdentityWeights):
        assert x.shape[1] == weights.channels
        return x
    if isinstance(weights, ConvBNWeights):
        y = F.conv2d(x, weights.weight, stride=weights.stride)
        return ACTIVATIONS[weights.activation](normalised(y, weights.bn))
    if isinstance(weights, StemWeights):
        y = F.conv2d(x, weights.conv, stride=weights.stride, padding=weights.conv.shape[2] // 2)
        y = ACTIVATIONS[weights.activation](normalised(y, weights.bn))
        for block in weights.blocks:
            y = computed(block, y)
        return y
    if isinstance(weights, HeadWeights):
        y = ACTIVATIONS[weights.activation](normalised(F.conv2d(x, weights.conv), weights.bn))
        return dense(y.mean((2, 3)), weights.weight, weights.bias)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    act, y = ACTIVATIONS[weights.activation], x
    if weights.expand is not None:
        assert weights.expand_bn is not None
        y = act(normalised(F.conv2d(y, weights.expand), weights.expand_bn))
    hidden, kernel = weights.depthwise.shape[0], weights.depthwise.shape[2]
    y = F.conv2d(y, weights.depthwise, stride=weights.stride, padding=kernel // 2, groups=hidden)
    y = act(normalised(y, weights.depthwise_bn))
    se = weights.squeeze_excitation
    if se is not None:
        gate = dense(y.mean((2, 3)), se.reduce_weight, se.reduce_bias).clamp(min=0)
        gate = ACTIVATIONS[se.gate](dense(gate, se.expand_weight, se.expand_bias))
        y = y * gate[:, :, None, None]
    y = normalised(F.conv2d(y, weights.project), weights.project_bn)
    return x + y if weights.residual else y


def check(module: nn.Module, weights: Any, channels: int) -> None:
    """The description of a float64 module computes what the module does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, 9, 8, generator=generator, dtype=torch.float64)
    expected = copy.deepcopy(module).train()(x.clone())
    torch.testing.assert_close(computed(weights, x), expected, rtol=1e-12, atol=1e-12)


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


# ---------------------------------------------------------------- the supernets of greedynas


@pytest.mark.parametrize("name", ["mbv2-7", "mbv2-se-13", "macro"])
def test_greedynas_operations(name: str) -> None:
    space = get_space(name)
    net = Supernet(space)
    for layer, ops in zip(space.layers, net.choices, strict=True):
        for op, module in zip(space.operations, ops, strict=True):
            weights = recognise_operation(module, layer.in_channels)
            if op.identity:
                assert isinstance(weights, IdentityWeights if layer.keeps_shape else ConvBNWeights)
                continue
            assert isinstance(weights, InvertedBottleneckWeights), weights
            assert weights.depthwise is module.depthwise.conv.weight
            assert weights.project_bn.running_var is module.project.bn.running_var
            assert weights.project_bn.eps == space.bn_eps
            assert (weights.expand is None) == (op.expansion == 1)
            assert (weights.squeeze_excitation is not None) == op.se
            assert (weights.stride, weights.activation) == (layer.stride, space.activation)
            assert (weights.residual, weights.depthwise.shape[2]) == (layer.keeps_shape, op.kernel)


@pytest.mark.parametrize("name", ["mbv2-7", "mbv2-se-13", "macro"])
def test_greedynas_numbers(name: str) -> None:
    space = get_space(name)
    net = filled(Supernet(space))
    first = next(index for index, layer in enumerate(space.layers) if layer.keeps_shape)
    for index in (0, first):
        channels = space.layers[index].in_channels
        for module in net.choices[index]:
            check(module, recognise_operation(module, channels), channels)
    stem, head = recognise_stem(net.stem), recognise_head(net.head)
    assert isinstance(stem, StemWeights)
    assert len(stem.blocks) == len(space.fixed)
    assert isinstance(head, HeadWeights)
    assert head.weight is net.head.linear.weight
    check(net.stem, stem, space.in_channels)
    check(net.head, head, space.layers[-1].out_channels)


# ---------------------------------------------------------------- blocks of other making


def conv(cin: int, cout: int, k: int = 1, stride: int = 1, groups: int = 1, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, **{"stride": stride, "padding": k // 2, "groups": groups, "bias": False, **kwargs})


def plain(cin: int = 4, hidden: int = 12, cout: int = 4, k: int = 3, stride: int = 1, se: Any = None) -> nn.Sequential:
    """An inverted bottleneck without a residual, in one flat nn.Sequential."""
    parts = [conv(cin, hidden), nn.BatchNorm2d(hidden), nn.ReLU6()]
    parts += [conv(hidden, hidden, k, stride, hidden), nn.BatchNorm2d(hidden), nn.ReLU6()]
    parts += [] if se is None else [se]
    return nn.Sequential(*parts, conv(hidden, cout), nn.BatchNorm2d(cout))


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


class Functional(nn.Module):
    """Functional activations, one shared dropout, drop-path under `if self.training`, a list of modules."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(4, 8), conv(8, 8, 5, groups=8), conv(8, 4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(4)])
        self.activation = activation
        self.dropout = nn.Dropout2d(0.0)

    def drop_path(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            y = norm(layer(y))
            if index < 2:
                y = self.dropout(self.activation(y))
        return self.drop_path(y) + F.dropout(x, 0.0, self.training)


FUNCTIONS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("relu", F.relu),
    ("relu", torch.relu),
    ("relu", lambda x: x.relu_()),
    ("relu", lambda x: F.relu(x, inplace=True)),
    ("relu6", F.relu6),
    ("relu6", lambda x: F.hardtanh(x, 0, 6)),
    ("relu6", lambda x: F.hardtanh(x, 0.0, 6.0, inplace=True)),
    ("relu6", lambda x: torch.clamp(x, 0, 6)),
    ("relu6", lambda x: x.clamp(min=0.0, max=6.0)),
    ("relu6", lambda x: x.clamp_(0, 6)),
    ("relu6", nn.Hardtanh(0, 6)),
    ("hswish", F.hardswish),
    ("silu", lambda x: F.silu(x, inplace=True)),
]


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_functional_activations(number: int) -> None:
    name, function = FUNCTIONS[number]
    module = filled(Functional(function))
    weights = recognise_operation(module, 4)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    assert (weights.activation, weights.residual, weights.depthwise.shape[2]) == (name, True, 5)
    check(module, weights, 4)


@pytest.mark.parametrize("how", ["left", "right", "torch", "writes", "method"])
def test_residuals(how: str) -> None:
    module = filled(Residual(how))
    weights = recognise_operation(module, 4)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    assert weights.residual
    check(module, weights, 4)
    module.use_residual = False
    weights = recognise_operation(module, 4)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    assert not weights.residual
    check(module, weights, 4)


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
        if self.how == "silu":
            return x * F.hardsigmoid(self.up(F.silu(self.down(self.pool(x)))))
        if self.how == "tanh":
            return x * torch.tanh(self.up(F.relu(self.down(self.pool(x)))))
        if self.how == "maximum":
            return x * F.hardsigmoid(self.up(F.relu(self.down(x.amax((2, 3), keepdim=True)))))
        if self.how == "not broadcast":
            return x + F.hardsigmoid(self.up(F.relu(self.down(self.pool(x)))))
        return torch.mul(F.hardsigmoid(self.up(F.relu(self.down(torch.mean(x, (2, 3), keepdim=True))))), x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["linear", "linear, indexed", "linear, squeezed", "writes", "conv"])
def test_squeeze_excitations(how: str, bias: bool) -> None:
    module = filled(plain(se=Squeeze(how, bias)))
    weights = recognise_operation(module, 4)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    assert weights.squeeze_excitation is not None
    assert weights.squeeze_excitation.reduce_weight is module[6].down.weight
    check(module, weights, 4)


@pytest.mark.parametrize(
    ("how", "text"), [("silu", "expected relu"), ("tanh", "tanh"), ("maximum", "amax"), ("not broadcast", "one shape")]
)
def test_other_squeeze_excitations_are_refused(how: str, text: str) -> None:
    assert text in reason(recognise_operation(plain(se=Squeeze(how)), 4))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", [None, nn.SiLU(), nn.ReLU(inplace=True)])
def test_conv_bn(stride: int, activation: nn.Module | None) -> None:
    parts = [conv(4, 6, stride=stride), nn.BatchNorm2d(6)] + ([] if activation is None else [activation])
    module = filled(nn.Sequential(*parts))
    weights = recognise_operation(module, 4)
    assert isinstance(weights, ConvBNWeights), weights
    assert weights.stride == stride
    check(module, weights, 4)


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Sequential(), nn.Sequential(nn.Dropout(0.5), nn.Identity()), nn.Dropout2d(0.9)]
)
def test_identities(module: nn.Module) -> None:
    assert recognise_operation(module, 7) == IdentityWeights(7)
    assert recognise_operation(module, 8) == IdentityWeights(8)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(12, affine=False),
        nn.BatchNorm2d(12, momentum=None, eps=0.1),
        nn.BatchNorm2d(12, track_running_stats=False),
    ],
)
def test_kinds_of_batch_norm(norm: nn.BatchNorm2d) -> None:
    module = plain()
    module[4] = norm
    weights = recognise_operation(filled(module), 4)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    found = weights.depthwise_bn
    assert found == BatchNormWeights(norm.weight, norm.bias, norm.eps, norm.running_mean, norm.running_var)
    check(module, weights, 4)


def test_an_activation_module_may_be_shared() -> None:
    module = plain()
    module[5] = module[2]
    check(filled(module), recognise_operation(module, 4), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    weights = recognise_operation(plain().to(dtype), 4)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    assert weights.project.dtype == dtype


def test_without_expansion_and_with_same_padding() -> None:
    module = nn.Sequential(
        conv(6, 6, 7, groups=6, padding="same"), nn.BatchNorm2d(6), nn.Hardswish(), conv(6, 3), nn.BatchNorm2d(3)
    )
    weights = recognise_operation(filled(module), 6)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    assert weights.expand is None
    assert weights.expand_bn is None
    check(module, weights, 6)


class Head(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.features = nn.Sequential(conv(4, 9), nn.BatchNorm2d(9), nn.Hardswish())
        self.fc = nn.Linear(9, 5, bias=how != "view")

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if self.how == "view":
            return self.fc(F.adaptive_avg_pool2d(y, (1, 1)).view(x.shape[0], -1))
        if self.how == "reshape":
            return self.fc(y.mean((2, 3), keepdim=True).reshape((-1, 9)))
        if self.how == "squeeze":
            return self.fc(torch.squeeze(y.mean((2, 3), True), (2, 3)))
        if self.how == "flatten":
            return self.fc(F.dropout(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1), 0.0, self.training))
        if self.how == "whole squeeze":
            return self.fc(y.mean((2, 3), True).squeeze())
        if self.how == "other view":
            return self.fc(y.mean((2, 3), True).view(x.shape[2], -1))
        if self.how == "other dimensions":
            return self.fc(y.mean((1, 2)))
        if self.how == "doubled":
            return self.fc(y.mean((2, 3), dtype=torch.float64))
        return self.fc(y.mean((3, 2)))


@pytest.mark.parametrize("how", ["view", "reshape", "squeeze", "flatten", "mean"])
def test_heads(how: str) -> None:
    module = filled(Head(how))
    weights = recognise_head(module)
    assert isinstance(weights, HeadWeights), weights
    assert weights.weight is module.fc.weight
    assert weights.bias is module.fc.bias
    check(module, weights, 4)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("whole squeeze", "squeeze: expected dimensions of the image"),
        ("other view", "view: expected one value for each image and channel"),
        ("other dimensions", "mean: expected a mean over dimensions 2 and 3"),
        ("doubled", "mean: "),
    ],
)
def test_other_heads_are_refused(how: str, text: str) -> None:
    assert text in reason(recognise_head(Head(how)))


@pytest.mark.parametrize(("kernel", "blocks"), [(1, 0), (3, 1), (5, 2), (7, 0)])
def test_stems(kernel: int, blocks: int) -> None:
    parts = [
        conv(3, 4, kernel, stride=2),
        nn.BatchNorm2d(4),
        nn.SiLU(inplace=True),
        *(Residual() for _ in range(blocks)),
    ]
    module = filled(nn.Sequential(*parts))
    weights = recognise_stem(module)
    assert isinstance(weights, StemWeights), weights
    assert len(weights.blocks) == blocks
    assert all(block.residual for block in weights.blocks)
    check(module, weights, 3)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([conv(3, 4, 9), nn.BatchNorm2d(4), nn.ReLU()], "up to 7x7"),
        ([conv(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU()], "expected groups 1"),
        ([conv(3, 4, 3), nn.BatchNorm2d(4)], "expected an activation, got the end"),
        ([conv(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)], "expected batch normalisation, got act"),
        ([conv(3, 4, 3, bias=True), nn.BatchNorm2d(4), nn.ReLU()], "expected no bias, got one"),
        ([conv(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid()], "expected one of linear, relu"),
        ([conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)], "max_pool2d"),
        ([], "got the end"),
    ],
)
def test_other_stems_are_refused(parts: list[nn.Module], text: str) -> None:
    assert text in reason(recognise_stem(nn.Sequential(*parts)))


def test_roles_are_not_mixed_up() -> None:
    module = plain()
    assert reason(recognise_head(module)) == "3: expected a mean over the image, got conv"
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)
    assert "conv" in reason(recognise_stem(nn.Sequential(nn.BatchNorm2d(4))))
    assert "0: expected 4 channels, got 5" in reason(recognise_operation(module, 5))


# ---------------------------------------------------------------- refusals


def changed(index: int, part: nn.Module) -> nn.Module:
    module = plain()
    module[index] = part
    return module


class Calls(nn.Module):
    """`function(self, x)` around a plain block."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function, self.block = function, plain()
        self.register_buffer("count", torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def setting(module: nn.Module, name: str, value: object) -> nn.Module:
    setattr(module, name, value)
    return module


class Conv(nn.Conv2d):
    pass


class Act(nn.ReLU6):
    pass


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class TensorOfAKind(Tensor):
    pass


def used_twice() -> nn.Module:
    module = plain(cin=4, hidden=4)
    module[6] = module[0]
    return module


def hooked(index: int, before: bool) -> nn.Module:
    module = plain()
    if before:
        module[index].register_forward_pre_hook(lambda module, args: None)
    else:
        module[index].register_forward_hook(lambda module, args, output: None)
    return module


def of_a_kind() -> nn.Module:
    module = plain()
    module[0].weight = nn.Parameter(module[0].weight.detach().as_subclass(TensorOfAKind))
    return module


def scripted() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(nn.Sequential(nn.ReLU()))


class Hostile(nn.Module):
    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError("no\nattributes")


REFUSALS: list[tuple[str, Callable[[], Any]]] = [
    ("not a module", lambda: F.relu),
    ("not a module", lambda: None),
    ("0: expected no bias, got one", lambda: changed(0, conv(4, 12, bias=True))),
    (
        "3: expected padding_mode zeros, got reflect",
        lambda: changed(3, conv(12, 12, 3, groups=12, padding_mode="reflect")),
    ),
    ("3: expected dilation 1", lambda: changed(3, conv(12, 12, 3, groups=12, dilation=2, padding=1))),
    ("3: expected padding 1", lambda: changed(3, conv(12, 12, 3, groups=12, padding=0))),
    ("3: expected padding 1", lambda: changed(3, conv(12, 12, 3, groups=12, padding=(1, 0)))),
    ("3: expected one stride", lambda: changed(3, conv(12, 12, 3, stride=(1, 2), groups=12))),
    ("3: expected groups 1 or as many", lambda: changed(3, conv(12, 12, 3, groups=4))),
    ("3: expected groups 1 or as many", lambda: changed(3, conv(12, 24, 3, groups=12))),
    ("3: expected a depthwise convolution", lambda: changed(3, conv(12, 12, 3))),
    ("3: expected a depthwise convolution of 3x3", lambda: changed(3, conv(12, 12, 9, groups=12))),
    ("3: expected a square kernel of odd size, got 2x2", lambda: changed(3, conv(12, 12, 2, groups=12))),
    (
        "3: expected a square kernel of odd size, got 3x5",
        lambda: changed(3, nn.Conv2d(12, 12, (3, 5), padding=(1, 2), groups=12)),
    ),
    ("0: expected stride 1, got 2", lambda: changed(0, conv(4, 12, stride=2))),
    ("0: expected a 1x1 convolution", lambda: changed(0, conv(4, 12, 3))),
    ("4.weight: expected [12], got [10]", lambda: changed(4, nn.BatchNorm2d(10))),
    ("5: expected an activation", lambda: changed(5, nn.BatchNorm2d(12))),
    ("expected relu6 as after the expansion, got hswish", lambda: changed(5, nn.Hardswish())),
    ("hardtanh: expected bounds 0 and 6", lambda: changed(5, nn.Hardtanh(-1, 6))),
    ("gelu", lambda: changed(5, nn.GELU())),
    ("is used twice", used_twice),
    ("writes to the module's input", lambda: nn.Sequential(nn.ReLU6(inplace=True), plain())),
    ("writes to the module's input", lambda: Residual("writes to input")),
    ("writes to the module's input", lambda: Residual("method on input")),
    ("alpha 1", lambda: Residual("scaled")),
    ("of another value", lambda: Residual("of itself")),
    ("two tensors of one shape", lambda: Residual(branch=plain(stride=2))),
    ("two tensors of one shape", lambda: Residual(branch=plain(cout=5))),
    ("1: forward hooks are registered", lambda: hooked(1, before=False)),
    ("2: forward hooks are registered", lambda: hooked(2, before=True)),
    ("0: expected Conv2d itself, got its subclass Conv", lambda: changed(0, Conv(4, 12, 1, bias=False))),
    ("2: expected ReLU6 itself, got its subclass Act", lambda: changed(2, Act())),
    ("forward is replaced on the instance", lambda: setting(plain(), "forward", lambda x: x)),
    ("_conv_forward is replaced", lambda: changed(0, setting(conv(4, 12), "_conv_forward", lambda *args: None))),
    ("is parametrized", lambda: changed(0, parametrizations.weight_norm(conv(4, 12)))),
    ("0.weight: expected a tensor on the CPU, got one on meta", lambda: changed(0, conv(4, 12, device="meta"))),
    ("expected float32, bfloat16 or float64, got float16", lambda: plain().half()),
    ("expected tensors of one dtype, got float64 (0.weight), float32", lambda: changed(0, conv(4, 12).double())),
    ("expected a plain tensor, got TensorOfAKind", of_a_kind),
    ("is a scripted module", scripted),
    ("missing 1 required positional argument", TwoInputs),
    ("is compiled", lambda: setting(plain(), "_compiled_call_impl", lambda x: x)),
    ("forward depends on data", lambda: Calls(lambda m, x: m.block(x) if x.sum() > 0 else x)),
    ("forward depends on data", lambda: Calls(lambda m, x: next(m.block(each) for each in x))),
    ("outside Conv2d, BatchNorm2d and Linear", lambda: Calls(lambda m, x: m.block(x) * m.weight)),
    ("outside Conv2d, BatchNorm2d and Linear", lambda: Calls(lambda m, x: F.conv2d(x, m.block[0].weight))),
    ("outside Conv2d, BatchNorm2d and Linear", lambda: Calls(lambda m, x: m.block(x) + CONSTANT)),
    ("calls add_ on something else", lambda: Calls(lambda m, x: (m.count.add_(1), m.block(x))[1])),
    ("calls mul_ on something else", lambda: Calls(lambda m, x: (CONSTANT.mul_(2), m.block(x))[1])),
    ("calls rand on something else", lambda: Calls(lambda m, x: (torch.rand(1), m.block(x))[1])),
    ("draws random numbers", lambda: Calls(lambda m, x: m.block(x) if random.random() < 2 else x)),
    ("draws random numbers", lambda: Calls(lambda m, x: m.block(x) if np.random.rand() < 2 else x)),
    ("draws random numbers", lambda: Calls(lambda m, x: (torch.manual_seed(3), m.block(x))[1])),
    ("forward: KeyError", lambda: Calls(lambda m, x: {}["nothing"])),
    ("expected a tensor computed from the input, got tuple", lambda: Calls(lambda m, x: (m.block(x), x))),
    ("expected a tensor computed from the input, got NoneType", lambda: Calls(lambda m, x: None)),
    ("sets the attribute data", lambda: Calls(lambda m, x: setattr(x, "data", x * 2) or m.block(x))),
    ("relu: its result is not used", lambda: Calls(lambda m, x: (F.relu(x), m.block(x))[1])),
    ("is used twice", lambda: Calls(lambda m, x: m.block(x) + m.block(x))),
    ("calls shape on something else", lambda: Calls(lambda m, x: m.block(x) if m.weight.shape[0] else x)),
    ("0: forward hooks are registered", lambda: changed(0, nn.LazyConv2d(12, 1, bias=False))),
    ("overwritten", lambda: Calls(lambda m, x: (lambda y: (y.relu_(), y)[1])(m.block(x)))),
    ("expected a tensor, got", lambda: Calls(lambda m, x: x.shape)),
    ("expected a tensor that is not reshaped", lambda: Calls(lambda m, x: m.block(x).mean((2, 3)).unsqueeze(2))),
    ("add: ", lambda: Calls(lambda m, x: m.block(x) + 1)),
    ("sub", lambda: Calls(lambda m, x: x - m.block(x))),
    ("permute", lambda: Calls(lambda m, x: m.block(x.permute(0, 1, 3, 2)))),
    ("training=True", lambda: Calls(lambda m, x: F.dropout(m.block(x)))),
    ("expected the end, got act", lambda: nn.Sequential(plain(), nn.ReLU())),
    ("got the end", lambda: plain()[:7]),
    ("switches autocast", lambda: Calls(torch.autocast("cpu", torch.bfloat16)(lambda m, x: m.block(x)))),
    ("ZeroDivisionError: no", lambda: Hostile.__new__(Hostile)),
]
CONSTANT = torch.ones(1)


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_refusals(number: int) -> None:
    text, make = REFUSALS[number]
    module = make()
    before, states = CONSTANT.clone(), generator_states()
    for _ in range(2):
        assert text in reason(recognise_operation(module, 4))
    assert torch.equal(CONSTANT, before)
    assert_generators(states)


def generator_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def assert_generators(before: tuple[Any, ...]) -> None:
    now = generator_states()
    assert torch.equal(now[0], before[0])
    assert now[1] == before[1]
    assert all(np.array_equal(one, two) for one, two in zip(now[2], before[2], strict=True))


@pytest.mark.parametrize(
    "register", [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook]
)
def test_global_hooks_are_refused(register: Callable[..., Any]) -> None:
    module = plain()
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)
    handle = register(lambda *args: None)
    try:
        assert reason(recognise_operation(module, 4)) == "global forward hooks are registered"
    finally:
        handle.remove()
    assert not torch_module._global_forward_hooks
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)


@pytest.mark.parametrize(
    ("cls", "name"), [(nn.Conv2d, "_conv_forward"), (nn.BatchNorm2d, "forward"), (nn.Module, "__call__")]
)
def test_patched_classes_of_torch_are_refused(monkeypatch: pytest.MonkeyPatch, cls: type, name: str) -> None:
    module = plain()
    weights = recognise_operation(module, 4)
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, lambda *args: args[1])
        assert reason(recognise_operation(module, 4)) == f"{cls.__name__}.{name} is patched"
    assert recognise_operation(module, 4) == weights


# ---------------------------------------------------------------- nothing is disturbed


class Recorder(nn.Module):
    """Keeps what it is given in a list and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.calls = 0
        self.block = plain()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        self.calls += 1
        return self.block(x)


def test_the_module_is_left_alone() -> None:
    module = Recorder()
    for number, each in enumerate(module.modules()):
        each.training = number % 2 == 0
    flags = [each.training for each in module.modules()]
    state = copy.deepcopy(module.state_dict())
    versions = [tensor._version for tensor in module.state_dict(keep_vars=True).values()]
    attributes = [(each, dict(vars(each))) for each in module.modules()]
    states = generator_states()
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)
    assert [each.training for each in module.modules()] == flags
    assert all(vars(each) == before for each, before in attributes)
    assert (module.seen, module.calls) == ([], 0)
    assert [tensor._version for tensor in module.state_dict(keep_vars=True).values()] == versions
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert_generators(states)


def test_other_threads_are_left_alone() -> None:
    """One thread trains the module while others describe it."""
    module = filled(Residual())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = module(x)
    stop, wrong = threading.Event(), []

    def evaluate() -> None:
        while not stop.is_set():
            try:
                same = torch.equal(module(x), expected)
                training = all(each.training for each in module.modules())
            except Exception as error:
                wrong.append(error)
                return
            if not same or not training:
                wrong.append((same, training))

    def describe() -> None:
        for _ in range(60):
            recognise._cache._entries.pop(module, None)
            found = recognise_operation(module, 4)
            if not isinstance(found, InvertedBottleneckWeights):
                wrong.append(found)

    evaluating = threading.Thread(target=evaluate)
    describing = [threading.Thread(target=describe) for _ in range(2)]
    for thread in (evaluating, *describing):
        thread.start()
    for thread in describing:
        thread.join()
    stop.set()
    evaluating.join()
    assert not wrong


def test_a_value_passes_for_a_tensor() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = plain()

        def forward(self, x: Any) -> Any:
            if not isinstance(x, Tensor) or hasattr(x, "tensors"):
                return x
            return self.block(x)

    assert isinstance(recognise_operation(Asks(), 4), InvertedBottleneckWeights)


# ---------------------------------------------------------------- the cache


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The modules that were traced."""
    found: list[nn.Module] = []
    original = recognise.trace

    def trace(module: nn.Module) -> Any:
        found.append(module)
        return original(module)

    monkeypatch.setattr(recognise, "trace", trace)
    yield found
    found.clear()


def replace_conv(module: Residual) -> None:
    module.branch[2][0] = conv(12, 12, 5, groups=12)


def replace_parameter(module: Residual) -> None:
    module.branch[0][0].weight = nn.Parameter(torch.zeros(12, 4, 1, 1))


def swap_data(module: Residual) -> None:
    module.branch[0][0].weight.data = torch.zeros(12, 5, 1, 1)


def convert(module: Residual) -> None:
    module.double()


def swap_buffer(module: Residual) -> None:
    module.branch[0][1].running_mean = torch.ones(12)


def swap_none(module: Residual) -> None:
    module.branch[0][1].register_parameter("bias", None)


def swap_equal(module: Residual) -> None:
    """Equal values in another Parameter."""
    module.branch[0][1].bias = nn.Parameter(module.branch[0][1].bias.detach().clone())


CHANGES: list[tuple[str, Callable[[Residual], Any]]] = [
    ("stride", lambda m: setattr(m.branch[2][0], "stride", (2, 2))),
    ("eps", lambda m: setattr(m.branch[0][1], "eps", 0.5)),
    ("conv", replace_conv),
    ("parameter", replace_parameter),
    ("equal parameter", swap_equal),
    ("data of another shape", swap_data),
    ("data of another dtype", convert),
    ("buffer", swap_buffer),
    ("no bias", swap_none),
    ("attribute", lambda m: setattr(m, "use_residual", False)),
    ("order of the sum", lambda m: setattr(m, "how", "scaled")),
    ("hook", lambda m: m.branch[0].register_forward_hook(lambda *args: None)),
    ("pre-hook", lambda m: m.register_forward_pre_hook(lambda *args: None)),
    ("another part", lambda m: m.branch.append(nn.ReLU())),
    ("part left out", lambda m: m.branch[2].__delitem__(2)),
    ("another class", lambda m: setattr(m.branch[0][2], "__class__", nn.Identity)),
    ("forward of the instance", lambda m: setattr(m, "forward", lambda x: x)),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_change_is_seen(number: int) -> None:
    module = Residual()
    before = recognise_operation(module, 4)
    assert isinstance(before, InvertedBottleneckWeights), before
    assert recognise_operation(module, 4) is before
    CHANGES[number][1](module)
    after = recognise_operation(module, 4)
    recognise._cache._entries.pop(module, None)
    fresh = recognise_operation(module, 4)
    assert after is not before
    assert same(after, fresh)
    assert not same(after, before)


def same(one: Any, other: Any) -> bool:
    """The same values in the same tensors with the same shapes."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one is other
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return bool(one == other)


def test_what_is_known_is_not_traced_again(traces: list[nn.Module]) -> None:
    module, odd = Residual(), nn.Sequential(nn.GELU())
    for _ in range(3):
        recognise_operation(module, 4)
        recognise_operation(odd, 4)
        module.train(not module.training)
        with torch.no_grad():
            module.branch[0][0].weight.add_(1)
        module.branch[0][1].weight.data = torch.rand(12)
        module.branch[0][0].weight.grad = torch.ones(12, 4, 1, 1)
    assert traces == [module, odd]
    assert isinstance(recognise_stem(module), Unrecognised)
    assert isinstance(recognise_operation(module, 5), Unrecognised)
    assert len(traces) == 4
    recognise_operation(module, 4)
    assert len(traces) == 4


def test_a_patched_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Residual()
    assert recognise_operation(module, 4).residual
    with monkeypatch.context() as patch:
        patch.setattr(Residual, "forward", lambda self, x: self.branch(x))
        assert not recognise_operation(module, 4).residual
    assert recognise_operation(module, 4).residual


def test_attributes_of_the_class_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Switched(nn.Module):
        options = {"residual": [True]}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.block = plain()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.block(x) if self.options["residual"][0] else self.block(x)

    module = Switched()
    assert recognise_operation(module, 4).residual
    Switched.options["residual"][0] = False
    assert not recognise_operation(module, 4).residual


def test_containers_are_looked_into(traces: list[nn.Module]) -> None:
    class Switched(nn.Module):
        def __init__(self, options: Any) -> None:
            super().__init__()
            self.block, self.options = plain(), options

        def forward(self, x: Tensor) -> Tensor:
            options = self.options
            return x + self.block(x) if getattr(options, "residual", None) or options == [1] else self.block(x)

    class Options:
        residual = False

    module = Switched([1])
    assert recognise_operation(module, 4).residual
    assert recognise_operation(module, 4).residual
    assert len(traces) == 1
    module.options[0] = 2
    assert not recognise_operation(module, 4).residual
    assert len(traces) == 2

    # What cannot be looked into is traced again.
    module = Switched(Options())
    assert not recognise_operation(module, 4).residual
    module.options.residual = True
    assert recognise_operation(module, 4).residual


def test_random_numbers_of_another_thread_are_not_held_against_a_module() -> None:
    """They only make it try again."""
    calls: list[int] = []

    def function(module: Any, x: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            random.random()
        return module.block(x)

    module = Calls(function)
    states = generator_states()
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)
    assert len(calls) == 2
    assert_generators(states)


def test_modules_that_contain_themselves() -> None:
    module = Residual()
    module.branch[1].__dict__["_modules"]["parent"] = module
    gone = weakref.ref(module)
    assert "RecursionError" in reason(recognise_operation(module, 4))
    del module
    gc.collect()
    assert gone() is None


def test_modules_are_not_kept_alive() -> None:
    module = Residual(branch=plain(se=Squeeze()))
    inner = module.branch[0][0]
    weights = recognise_operation(module, 4)
    assert isinstance(weights, InvertedBottleneckWeights)
    refused = nn.Sequential(nn.GELU())
    recognise_operation(refused, 4)
    module.branch[1].owner = [module]
    gone = [weakref.ref(each) for each in (module, inner, refused)]
    del module, inner, refused
    gc.collect()
    assert [each() for each in gone] == [None, None, None]
    assert weights.project.shape == (4, 12, 1, 1)
