"""Supernets as they are found elsewhere, written from scratch, each in the style of its origin.

Their classes and attributes have names of their own, blocks are built and called in many hands, and each chooses in
another way. `FOREIGN` has them with the way to run one path; `own_losses` is the loop over their own forwards.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from supernets import randomise
from torch import Tensor, nn

# SPOS: lists of ShuffleNetV2 units, zipped with the architecture ----------------------------------------------------


class ShuffleUnit(nn.Module):
    """Half of the channels pass, the other half go through a branch; strided units project both."""

    def __init__(self, inp: int, oup: int, mid: int, ksize: int, stride: int, xception: bool = False) -> None:
        super().__init__()
        self.stride = stride
        half = inp // 2 if stride == 1 else inp
        outputs = oup - half
        pad = ksize // 2

        def depthwise(channels: int, step: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, channels, ksize, step, pad, groups=channels, bias=False)
            return [conv, nn.BatchNorm2d(channels, affine=False)]

        def pointwise(into: int, out: int) -> list[nn.Module]:
            return [nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out, affine=False), nn.ReLU(inplace=True)]

        if xception:
            branch = [*depthwise(half, stride), *pointwise(half, mid), *depthwise(mid, 1), *pointwise(mid, mid)]
            branch += [*depthwise(mid, 1), *pointwise(mid, outputs)]
        else:
            branch = [*pointwise(half, mid), *depthwise(mid, stride), *pointwise(mid, outputs)]
        self.branch_main = nn.Sequential(*branch)
        self.branch_proj = None
        if stride == 2:
            self.branch_proj = nn.Sequential(*depthwise(inp, stride), *pointwise(inp, inp))

    def forward(self, old_x: Tensor) -> Tensor:
        if self.branch_proj is None:
            b, c, h, w = old_x.size()
            x = old_x.reshape(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
            return torch.cat((x[0], self.branch_main(x[1])), 1)
        return torch.cat((self.branch_proj(old_x), self.branch_main(old_x)), 1)


class ShuffleOneShot(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(inplace=True)
        )
        self.features = nn.ModuleList()
        inp = 8
        for oup, stride in ((16, 2), (16, 1), (24, 2), (24, 1)):
            units = [ShuffleUnit(inp, oup, oup // 2, k, stride) for k in (3, 5, 7)]
            self.features.append(nn.ModuleList([*units, ShuffleUnit(inp, oup, oup // 2, 3, stride, True)]))
            inp = oup
        self.conv_last = nn.Sequential(
            nn.Conv2d(inp, 32, 1, bias=False), nn.BatchNorm2d(32, affine=False), nn.ReLU(inplace=True)
        )
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Sequential(nn.Linear(32, classes, bias=False))

    def forward(self, x: Tensor, architecture: Sequence[int]) -> Tensor:
        assert len(self.features) == len(architecture)
        x = self.first_conv(x)
        for archs, arch_id in zip(self.features, architecture, strict=True):
            x = archs[arch_id](x)
        x = self.conv_last(x)
        x = self.globalpool(x)
        x = self.dropout(x)
        x = x.contiguous().view(-1, 32)
        return self.classifier(x)


# FairNAS: inverted residuals by index, a separable convolution before them ------------------------------------------


class InvertedResidual(nn.Module):
    """One attribute a layer; drop-path in training."""

    def __init__(self, inp: int, oup: int, kernel: int, stride: int, expand: int, bias: bool = False) -> None:
        super().__init__()
        hidden = inp * expand
        self.use_res_connect = stride == 1 and inp == oup
        self.conv1 = nn.Conv2d(inp, hidden, 1, 1, 0, bias=bias)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=bias)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, oup, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(oup)
        self.drop_rate = 0.2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.conv1(x)))
        out = F.relu6(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.use_res_connect:
            return x + drop_path(out, self.drop_rate, self.training)
        return out


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    if not training or rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) >= rate
    return x * keep / (1 - rate)


class FairNet(nn.Module):
    """`wide` pools by a mean in two steps; a fixed block stands between the choices."""

    def __init__(self, classes: int = 5, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.separable = nn.Sequential(
            OrderedDict(
                depth=nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
                norm=nn.BatchNorm2d(8),
                act=nn.ReLU6(inplace=True),
                point=nn.Conv2d(8, 6, 1, bias=False),
                norm2=nn.BatchNorm2d(6),
            )
        )
        self.choice_blocks = nn.ModuleList()
        inp = 6
        for oup, stride in ((6, 1), (10, 2), (10, 1)):
            self.choice_blocks.append(
                nn.ModuleList(InvertedResidual(inp, oup, k, stride, e, bias) for e in (3, 6) for k in (3, 5, 7))
            )
            inp = oup
        self.between = InvertedResidual(6, 6, 3, 1, 2, bias)
        self.conv_before_pooling = nn.Sequential(nn.Conv2d(10, 20, 1, bias=bias), nn.BatchNorm2d(20), nn.ReLU6())
        self.classifier = nn.Linear(20, classes)

    def forward(self, x: Tensor, choice: Sequence[int]) -> Tensor:
        x = self.separable(self.stem(x))
        for index, op in enumerate(choice):
            x = self.choice_blocks[index][op](x)
            if index == 0:
                x = self.between(x)
        x = self.conv_before_pooling(x)
        x = x.mean(3).mean(2)
        return self.classifier(F.dropout(x, 0.2, self.training))


# ScarletNAS: activations by hand, squeeze-excitation, identities, layers of different length ------------------------


class HandSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x + 3.0, inplace=True) / 6.0


class HandSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) * (1 / 6)


class Excite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels))
        self.gate = HandSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        return x * self.gate(self.net(F.adaptive_avg_pool2d(x, 1).view(n, c))).view(n, c, 1, 1)


class ScarletBlock(nn.Module):
    def __init__(self, inp: int, oup: int, kernel: int, stride: int, expand: int, se: bool) -> None:
        super().__init__()
        hidden = inp * expand
        self.stages = nn.ModuleDict(
            {
                "grow": nn.Sequential(nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), HandSwish()),
                "mix": nn.Sequential(
                    nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
                    nn.BatchNorm2d(hidden),
                    HandSwish(),
                    Excite(hidden, 4) if se else nn.Identity(),
                ),
                "shrink": nn.Sequential(nn.Conv2d(hidden, oup, 1, bias=False), nn.BatchNorm2d(oup)),
            }
        )
        self.residual = inp == oup and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for stage in self.stages.values():
            y = stage(y)
        if self.residual:
            y += x
        return y


class ScarletNet(nn.Module):
    """Layers are attributes; those that keep the shape may also be skipped."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn_stem = nn.BatchNorm2d(8)
        self.swish = HandSwish()
        self.depth = 4
        for number, (inp, oup, stride) in enumerate(((8, 12, 2), (12, 12, 1), (12, 16, 1), (16, 16, 1))):
            ops: list[nn.Module] = [
                ScarletBlock(inp, oup, k, stride, e, se) for k, e, se in ((3, 3, False), (5, 2, True))
            ]
            if inp == oup and stride == 1:
                ops.append(nn.Identity())
            for position, op in enumerate(ops):
                setattr(self, f"layer{number}_op{position}", op)
        self.conv_head = nn.Conv2d(16, 24, 1, bias=False)
        self.bn_head = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, classes)

    def forward(self, x: Tensor, arch: Sequence[int]) -> Tensor:
        x = self.swish(self.bn_stem(self.conv_stem(x)))
        for number in range(self.depth):
            x = getattr(self, f"layer{number}_op{arch[number]}")(x)
        x = self.swish(self.bn_head(self.conv_head(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


# ProxylessNAS: mixed edges with an active index, shortcuts around them ----------------------------------------------


class MobileInvertedConv(nn.Module):
    def __init__(self, inp: int, oup: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inp * expand
        self.inverted_bottleneck = None
        if expand > 1:
            self.inverted_bottleneck = nn.Sequential(
                OrderedDict(
                    [
                        ("conv", nn.Conv2d(inp, hidden, 1, 1, 0, bias=False)),
                        ("bn", nn.BatchNorm2d(hidden)),
                        ("act", nn.ReLU6(inplace=True)),
                    ]
                )
            )
        self.depth_conv = nn.Sequential(
            OrderedDict(
                [
                    ("conv", nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)),
                    ("bn", nn.BatchNorm2d(hidden)),
                    ("act", nn.ReLU6(inplace=True)),
                ]
            )
        )
        self.point_linear = nn.Sequential(
            OrderedDict([("conv", nn.Conv2d(hidden, oup, 1, 1, 0, bias=False)), ("bn", nn.BatchNorm2d(oup))])
        )

    @staticmethod
    def is_zero_layer() -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        if self.inverted_bottleneck:
            x = self.inverted_bottleneck(x)
        x = self.depth_conv(x)
        return self.point_linear(x)


class ZeroLayer(nn.Module):
    @staticmethod
    def is_zero_layer() -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class MixedEdge(nn.Module):
    def __init__(self, candidate_ops: Sequence[nn.Module]) -> None:
        super().__init__()
        self.candidate_ops = nn.ModuleList(candidate_ops)
        self.AP_path_alpha = nn.Parameter(torch.zeros(len(candidate_ops)))
        self.active_index = [0]
        self.inactive_index = None
        self.log_prob = None

    @property
    def active_op(self) -> nn.Module:
        return self.candidate_ops[self.active_index[0]]

    def is_zero_layer(self) -> bool:
        return self.active_op.is_zero_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.active_op(x)


class ResidualBlock(nn.Module):
    def __init__(self, mobile_inverted_conv: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.mobile_inverted_conv, self.shortcut = mobile_inverted_conv, shortcut

    def forward(self, x: Tensor) -> Tensor:
        if self.mobile_inverted_conv.is_zero_layer():
            return x
        if self.shortcut is None:
            return self.mobile_inverted_conv(x)
        return self.mobile_inverted_conv(x) + self.shortcut(x)


class ProxylessNet(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(3, 8, 3, 2, 1, bias=False), bn=nn.BatchNorm2d(8), act=nn.ReLU6(inplace=True))
        )
        blocks: list[nn.Module] = [ResidualBlock(MobileInvertedConv(8, 6, 3, 1, 1), None)]
        inp = 6
        for oup, stride in ((10, 2), (10, 1), (10, 1), (14, 1)):
            ops: list[nn.Module] = [MobileInvertedConv(inp, oup, k, stride, e) for k in (3, 5, 7) for e in (3, 6)]
            same = stride == 1 and inp == oup
            if same:
                ops.append(ZeroLayer())
            blocks.append(ResidualBlock(MixedEdge(ops), nn.Identity() if same else None))
            inp = oup
        self.blocks = nn.ModuleList(blocks)
        self.feature_mix_layer = nn.Sequential(nn.Conv2d(inp, 20, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU6())
        self.global_avg_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(20, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_conv(x)
        for block in self.blocks:
            x = block(x)
        x = self.feature_mix_layer(x)
        x = self.global_avg_pooling(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


def set_mixed_edges(net: nn.Module, path: Sequence[int]) -> None:
    edges = [module for module in net.modules() if isinstance(module, MixedEdge)]
    for edge, op in zip(edges, path, strict=True):
        edge.active_index = [op]


# LayerChoice: candidates are the module's own children, the sampled one is named ------------------------------------


class LayerChoice(nn.Module):
    def __init__(self, candidates: dict[str, nn.Module], label: str) -> None:
        super().__init__()
        self.names: list[str] = []
        for name, candidate in candidates.items():
            self.add_module(name, candidate)
            self.names.append(name)
        self.label = label
        self._sampled: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._sampled is None:
            raise RuntimeError("sample a path first")
        return getattr(self, str(self._sampled))(*args, **kwargs)


def mb(inp: int, oup: int, kernel: int, stride: int, expand: int, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    hidden = inp * expand
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act(inplace=True)),
        nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            act(inplace=True),
        ),
        nn.Sequential(nn.Conv2d(hidden, oup, 1, bias=False), nn.BatchNorm2d(oup)),
    )


class LayerChoiceNet(nn.Module):
    """One nn.Sequential holds everything, fixed blocks and classifier too."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()

        def choice(inp: int, oup: int, stride: int, number: int) -> LayerChoice:
            ops = {f"k{k}e{e}": mb(inp, oup, k, stride, e) for k in (3, 5) for e in (2, 4)}
            return LayerChoice(ops | ({"skip": nn.Identity()} if inp == oup and stride == 1 else {}), f"layer{number}")

        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
            choice(8, 12, 2, 0),
            nn.Sequential(choice(12, 12, 1, 1), mb(12, 12, 3, 1, 2), choice(12, 12, 1, 2)),
            nn.Sequential(mb(12, 16, 3, 1, 3), nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.SiLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(24, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def set_layer_choices(net: nn.Module, path: Sequence[int]) -> None:
    layers = [module for module in net.modules() if isinstance(module, LayerChoice)]
    for layer, op in zip(layers, path, strict=True):
        layer._sampled = layer.names[op]


# One-shot mutable operations: candidates in a dictionary, the current choice a property -----------------------------


class MutableOp(nn.Module):
    def __init__(self, candidates: dict[str, nn.Module]) -> None:
        super().__init__()
        self._candidates = nn.ModuleDict(candidates)
        self._current_choice: str | None = None
        self._is_fixed = False

    @property
    def choices(self) -> list[str]:
        return list(self._candidates.keys())

    @property
    def current_choice(self) -> str | None:
        return self._current_choice

    @current_choice.setter
    def current_choice(self, choice: str | None) -> None:
        self._current_choice = choice

    def forward_choice(self, x: Any, choice: str) -> Any:
        assert isinstance(choice, str)
        assert choice in self.choices
        return self._candidates[choice](x)

    def forward_all(self, x: Any) -> Any:
        return sum(op(x) for op in self._candidates.values())

    def forward(self, x: Any) -> Any:
        if self.current_choice is None:
            return self.forward_all(x)
        return self.forward_choice(x, choice=self.current_choice)


class ConvModule(nn.Module):
    """Convolution, norm and activation with an order and a switch."""

    def __init__(self, inp: int, oup: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, oup, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.add_module("bn", nn.BatchNorm2d(oup))
        self.with_activation = act
        if act:
            self.activate = nn.ReLU(inplace=True)
        self.order = ("conv", "norm", "act")

    @property
    def norm(self) -> nn.Module:
        return self.bn

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class MBBlock(nn.Module):
    def __init__(self, inp: int, oup: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        self.with_res_shortcut = stride == 1 and inp == oup
        hidden = inp * expand
        self.with_expand_conv = expand != 1
        if self.with_expand_conv:
            self.expand_conv = ConvModule(inp, hidden)
        self.depthwise_conv = ConvModule(hidden, hidden, kernel, stride, hidden)
        self.linear_conv = ConvModule(hidden, oup, act=False)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            out = self.expand_conv(x) if self.with_expand_conv else x
            out = self.linear_conv(self.depthwise_conv(out))
            return x + out if self.with_res_shortcut else out

        return inner(x)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvModule(3, 8, 3, 2)
        self.layers = []
        inp = 8
        for number, (oup, stride, count) in enumerate(((8, 1, 1), (12, 2, 2), (16, 1, 1))):
            layer = nn.Sequential()
            for index in range(count):
                step = stride if index == 0 else 1
                ops = {f"mb_k{k}e{e}": MBBlock(inp, oup, k, step, e) for k in (3, 5, 7) for e in (1, 4)}
                if inp == oup and step == 1:
                    ops["identity"] = nn.Identity()
                layer.append(MutableOp(ops))
                inp = oup
            self.add_module(f"layer{number + 1}", layer)
            self.layers.append(f"layer{number + 1}")
        self.conv2 = ConvModule(16, 24)
        self.out_indices = (3,)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.conv1(x)
        outs = []
        for number, name in enumerate([*self.layers, "conv2"]):
            x = getattr(self, name)(x)
            if number in self.out_indices:
                outs.append(x)
        return tuple(outs)


class GlobalPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gap = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, inputs: Any) -> Any:
        if isinstance(inputs, tuple):
            outs = tuple(self.gap(x) for x in inputs)
            return tuple(out.view(x.size(0), -1) for out, x in zip(outs, inputs, strict=True))
        return self.gap(inputs).view(inputs.size(0), -1)


class LinearHead(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(24, classes)

    def forward(self, feats: Any) -> Any:
        return self.fc(feats[-1] if isinstance(feats, tuple) else feats)


class Classifier(nn.Module):
    """Backbone, neck and head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = Backbone(), GlobalPool(), LinearHead(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(x)))


def set_mutables(net: nn.Module, path: Sequence[int]) -> None:
    mutables = [module for module in net.modules() if isinstance(module, MutableOp)]
    for mutable, op in zip(mutables, path, strict=True):
        mutable.current_choice = mutable.choices[op]


# Blocks that are told their choice by an argument, keys, layers of one candidate ------------------------------------


class KeyedBlock(nn.Module):
    def __init__(self, ops: dict[str, nn.Module]) -> None:
        super().__init__()
        self.ops = nn.ModuleDict(ops)
        self.after = nn.BatchNorm2d(10)

    def forward(self, x: Tensor, which: str) -> Tensor:
        return self.after(self.ops[which](x)).relu()


class KeyedNet(nn.Module):
    """A choice has a norm behind it; the last layer has one candidate; logits come with a second head's."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((10, 1, 1), 0.5))
        self.conv = nn.Conv2d(3, 10, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                KeyedBlock(
                    {"three": nn.Conv2d(10, 10, 3, padding=1), "pool": nn.MaxPool2d(3, 1, 1), "skip": nn.Identity()}
                ),
                KeyedBlock({"avg": nn.AvgPool2d(3, 1, 1), "dilated": nn.Conv2d(10, 10, 3, padding=2, dilation=2)}),
                KeyedBlock({"a": nn.Conv2d(10, 10, 1), "b": mb(10, 10, 3, 1, 2)}),
            ]
        )
        self.auxiliary = nn.Linear(10, 3)
        self.fc = nn.Linear(10, classes)

    def forward(self, x: Tensor, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.conv(x)) * self.scale
        for index in range(len(self.blocks)):
            x = self.blocks[index](x, keys[index])
        x = x.mean((2, 3))
        return self.fc(x), self.auxiliary(x)


# Elastic: kernels are cropped and channels sliced, set by a method --------------------------------------------------


class ElasticConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 5, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.active_kernel = 5

    def forward(self, x: Tensor) -> Tensor:
        cut = (5 - self.active_kernel) // 2
        weight = self.conv.weight[:, :, cut : 5 - cut, cut : 5 - cut]
        return x + F.relu(self.bn(F.conv2d(x, weight, padding=self.active_kernel // 2, groups=x.shape[1])))


class ElasticNet(nn.Module):
    """Kernel sizes of four blocks, and how many of them run."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(ElasticConv(8) for _ in range(4))
        self.runtime_depth = [4]
        self.fc = nn.Linear(8, classes)

    def set_active_subnet(self, kernels: Sequence[int], depth: int) -> None:
        for block, kernel in zip(self.blocks, kernels, strict=True):
            block.active_kernel = kernel
        self.runtime_depth[0] = depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks[: self.runtime_depth[0]]:
            x = block(x)
        return self.fc(x.mean((2, 3)))


ELASTIC = [[3, 5], [3, 5], [1, 3, 5], [3, 5], [2, 3, 4]]


def set_elastic(net: Any, values: Sequence[int]) -> None:
    net.set_active_subnet(values[:4], values[4])


# All of them --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    """A supernet, how many options its layers have, and how its own forward runs one path."""

    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    run: Callable[[Any, Tensor, Sequence[int]], Tensor]
    share: float  # of MACs that has to run fused
    arguments: dict[str, Any] = field(default_factory=dict)


def by_argument(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
    return net(images, path)


def after(switch: Callable[[nn.Module, Sequence[int]], None]) -> Callable[[Any, Tensor, Sequence[int]], Tensor]:
    def run(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
        switch(net, path)
        return net(images)

    return run


def by_keys(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
    return net(images, [list(block.ops)[op] for block, op in zip(net.blocks, path, strict=True)])[0]


def elastic(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
    set_elastic(net, [values[op] for values, op in zip(ELASTIC, path, strict=True)])
    return net(images)


FOREIGN: dict[str, Foreign] = {
    "spos": Foreign(ShuffleOneShot, (4, 4, 4, 4), by_argument, 0.0),
    "fairnas": Foreign(FairNet, (6, 6, 6), by_argument, 0.95),
    "fairnas, biases": Foreign(lambda: FairNet(bias=True), (6, 6, 6), by_argument, 0.95),
    "scarlet": Foreign(ScarletNet, (2, 3, 2, 3), by_argument, 0.95),
    "proxyless": Foreign(ProxylessNet, (6, 7, 7, 6), after(set_mixed_edges), 0.95),
    "layer choice": Foreign(LayerChoiceNet, (4, 5, 5), after(set_layer_choices), 0.95),
    "mutable ops": Foreign(Classifier, (7, 6, 7, 6), after(set_mutables), 0.95),
    "keyed": Foreign(KeyedNet, (3, 2, 2), by_keys, 0.0, {"output": 0}),
    "elastic": Foreign(ElasticNet, (2, 2, 3, 2, 3), elastic, 0.0, {"choices": ELASTIC, "select": set_elastic}),
}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 3) -> nn.Module:
    """The supernet, with weights, biases and statistics that are not those of a fresh module, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FOREIGN[name].make()
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.3)
    randomise(net, seed)
    return net.to(dtype).train()


def covering(sizes: Sequence[int], extra: int = 2) -> Tensor:
    """Paths in which each option of each layer comes, and some random ones."""
    rows = [[(number + layer) % size for layer, size in enumerate(sizes)] for number in range(max(sizes))]
    generator = torch.Generator().manual_seed(0)
    rows += [[int(torch.randint(size, (), generator=generator)) for size in sizes] for _ in range(extra)]
    return torch.tensor(rows)


@torch.no_grad()
def own_losses(
    net: nn.Module,
    run: Callable[[Any, Tensor, Sequence[int]], Tensor],
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    bn: str = "batch",
) -> Tensor:
    """Losses [m, N] by a loop over the forward of a copy; dropout and drop-path off."""
    rows = []
    for path in paths.tolist():
        copied = copy.deepcopy(net).eval()
        for module in copied.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(bn == "batch")
        rows.append(F.cross_entropy(run(copied, images.clone(), path), targets, reduction="none"))
    return torch.stack(rows)
