"""Modules are described by what they compute.

The oracle of the numbers is the module itself in training mode; the descriptions are computed with plain functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recognised import Residual, Squeeze, conv, filled, plain, reason
from torch import Tensor, nn

from greedynas import Supernet, get_space
from greedynas_ext.operations import PoolWeights, SeparableWeights
from greedynas_ext.packing import BatchNormWeights, ConvBNWeights, IdentityWeights, InvertedBottleneckWeights
from greedynas_ext.recognise import (
    HeadWeights,
    StemWeights,
    recognise_head,
    recognise_operation,
    recognise_stem,
)
from greedynas_ext.unit import UnitWeights

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


def pooled(x: Tensor, pooling: str, kernel: int, stride: int) -> Tensor:
    """By windows that are laid out, the padding with them."""

    def windows(y: Tensor, padding: float) -> Tensor:
        y = F.pad(y, [kernel // 2] * 4, value=padding)
        return y.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)

    if pooling == "maximum":
        return windows(x, -float("inf")).amax(4)
    counts = kernel**2 if pooling == "mean with padding" else windows(torch.ones_like(x), 0).sum(4)
    return windows(x, 0).sum(4) / counts


def computed(weights: Any, x: Tensor) -> Tensor:
    """What a description says about the output, with batch statistics."""
    if isinstance(weights, IdentityWeights):
        assert x.shape[1] == weights.channels
        return x
    if isinstance(weights, ConvBNWeights):
        y = F.conv2d(x, weights.weight, stride=weights.stride, padding=weights.weight.shape[2] // 2)
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
    if isinstance(weights, UnitWeights):
        parts = {}
        for branch in weights.branches:
            y = ACTIVATIONS[branch.activation](x[:, list(branch.reads)])
            for operation in branch.operations:
                y = computed(operation, y)
            parts.update(zip(branch.writes, y.unbind(1), strict=True))
        return torch.stack([parts[channel] for channel in range(weights.out_channels)], 1)
    if isinstance(weights, PoolWeights):
        y = pooled(x, weights.pooling, weights.kernel, weights.stride)
        return ACTIVATIONS[weights.activation](y if weights.bn is None else normalised(y, weights.bn))
    if isinstance(weights, SeparableWeights):
        channels, _, kernel, _ = weights.depthwise.shape
        y = F.conv2d(x, weights.depthwise, stride=weights.stride, padding=kernel // 2, groups=channels)
        return ACTIVATIONS[weights.activation](normalised(F.conv2d(y, weights.project), weights.bn))
    assert isinstance(weights, InvertedBottleneckWeights), weights
    (act, middle, last), y = (ACTIVATIONS[name] for name in weights.activations), x
    if weights.expand is not None:
        assert weights.expand_bn is not None
        y = act(normalised(F.conv2d(y, weights.expand), weights.expand_bn))
    hidden, kernel = weights.depthwise.shape[0], weights.depthwise.shape[2]
    y = F.conv2d(y, weights.depthwise, stride=weights.stride, padding=kernel // 2, groups=hidden)
    y = middle(normalised(y, weights.depthwise_bn))
    se = weights.squeeze_excitation
    if se is not None:
        gate = dense(y.mean((2, 3)), se.reduce_weight, se.reduce_bias).clamp(min=0)
        gate = ACTIVATIONS[se.gate](dense(gate, se.expand_weight, se.expand_bias))
        y = y * gate[:, :, None, None]
    y = last(normalised(F.conv2d(y, weights.project), weights.project_bn))
    return x + y if weights.residual else y


def check(module: nn.Module, weights: Any, channels: int) -> None:
    """The description of a float64 module computes what the module does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, 9, 8, generator=generator, dtype=torch.float64)
    expected = copy.deepcopy(module).train()(x.clone())
    torch.testing.assert_close(computed(weights, x), expected, rtol=1e-12, atol=1e-12)


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
    ("relu6", lambda x: torch.clip(x, 0, 6)),
    ("relu", lambda x: x.clamp(min=0)),
    ("relu", lambda x: torch.clamp_(x, 0)),
    ("hswish", F.hardswish),
    ("hswish", lambda x: x * F.hardsigmoid(x)),
    ("hswish", lambda x: nn.Hardsigmoid()(x) * x),
    ("hswish", lambda x: x * F.relu6(x + 3.0, inplace=True) / 6.0),
    ("hswish", lambda x: x * (F.relu6(3 + x) / 6)),
    ("hswish", lambda x: x.mul(torch.clamp(x.add(3), 0, 6)).div(6)),
    ("hswish", lambda x: F.hardtanh(x + 3, 0, 6).mul_(1 / 6) * x),
    ("hswish", lambda x: x.mul_(F.relu6(x + 3).div_(6))),
    ("silu", lambda x: F.silu(x, inplace=True)),
    ("silu", lambda x: x * torch.sigmoid(x)),
    ("silu", lambda x: x.mul_(x.sigmoid())),
]


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_functional_activations(number: int) -> None:
    name, function = FUNCTIONS[number]
    module = filled(Functional(function))
    weights = recognise_operation(module, 4)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    assert (weights.activation, weights.residual, weights.depthwise.shape[2]) == (name, True, 5)
    check(module, weights, 4)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: x * F.relu6(x + 3) / 5, "div: expected a factor of 1/6"),
        (lambda x: x * F.relu6(x + 2) / 6, "add: expected two tensors of one shape"),
        (lambda x: x * F.relu(x + 3) / 6, "relu: expected an activation or a mean, got x + 3"),
        (lambda x: x * F.relu6(x + 3), "expected an activation or a mean, got x * relu6(x + 3)"),
        (lambda x: F.relu6(x + 3), "expected an activation or a mean, got relu6(x + 3)"),
        (lambda x: x / 6, "div: expected a division by 6"),
        (lambda x: F.relu6(x + 3) / 6, "expected one of linear, relu, relu6, hswish, silu, got hsigmoid"),
        (lambda x: x.relu() * torch.sigmoid(x), "mul: expected [N, C, H, W] times [N, C, 1, 1]"),
        (lambda x: (lambda gate: x.relu_() * gate)(torch.sigmoid(x)), "overwritten in place"),
        (lambda x: torch.clamp(x, max=0), "expected bounds 0 and 6"),
    ],
)
def test_what_is_nearly_an_activation_is_refused(function: Callable[[Tensor], Tensor], text: str) -> None:
    assert text in reason(recognise_operation(Functional(function), 4))


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
    ("how", "text"),
    [
        ("silu", "expected relu"),
        ("tanh", "tanh"),
        ("maximum", "amax"),
        ("sized", "expected a mean over the image, got one of 9x9"),
        ("not broadcast", "one shape"),
    ],
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


@pytest.mark.parametrize("which", range(8))
def test_biases_before_batch_norm(which: int) -> None:
    """Statistics of the batch take a bias away; from stored ones it is taken off."""
    parts = [conv(4, 12, bias=bool(which & 1)), nn.BatchNorm2d(12), nn.ReLU6()]
    parts += [conv(12, 12, 3, groups=12, bias=bool(which & 2)), nn.BatchNorm2d(12), nn.ReLU6()]
    module = filled(nn.Sequential(*parts, conv(12, 4, bias=bool(which & 4)), nn.BatchNorm2d(4)))
    for norm in (module[1], module[4], module[7]):
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(2))
    weights = recognise_operation(module, 4)
    assert isinstance(weights, InvertedBottleneckWeights), weights
    check(module, weights, 4)
    for bn, index in ((weights.expand_bn, 0), (weights.depthwise_bn, 3), (weights.project_bn, 6)):
        assert bn is not None
        assert bn.conv_bias is module[index].bias
        stored = module[index + 1].running_mean
        expected = stored if module[index].bias is None else stored - module[index].bias
        assert torch.equal(bn.mean_without_bias, expected)


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
        if self.how == "average":
            return self.fc(F.avg_pool2d(y, kernel_size=y.shape[2:]).view(-1, 9))
        if self.how == "average of a size":
            return self.fc(F.avg_pool2d(y, y.size()[2:], stride=1).flatten(1))
        if self.how == "average of another size":
            return self.fc(F.avg_pool2d(y, y.shape[3]).flatten(1))
        if self.how == "average of 7":
            return self.fc(nn.AvgPool2d(7)(y).flatten(1))
        if self.how == "two means":
            return self.fc(y.mean(3).mean(2))
        if self.how == "two other means":
            return self.fc(y.mean(2, keepdim=True).mean(-1, True).flatten(1))
        if self.how == "one mean":
            return self.fc(y.mean(3))
        if self.how == "the same mean twice":
            return self.fc(y.mean(3, True).mean(3).flatten(1))
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


@pytest.mark.parametrize(
    "how",
    ["view", "reshape", "squeeze", "flatten", "mean", "two means", "two other means", "average", "average of a size"],
)
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
        ("average of another size", "avg_pool2d: expected the size of the image"),
        ("one mean", "fc: expected an activation or a mean, got mean"),
        ("the same mean twice", "mean: expected a mean over the other side"),
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
