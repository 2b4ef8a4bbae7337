"""Supernets that choose by attributes, written from scratch, each in the style of its origin: see foreign_supernets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from foreign_by_path import mb
from torch import Tensor, nn

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
