"""Supernets that are given a path, written from scratch, each in the style of its origin: see foreign_supernets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        if self.stride == 1:
            x_proj, x = self.channel_shuffle(old_x)
            return torch.cat((x_proj, self.branch_main(x)), 1)
        x_proj = x = old_x
        return torch.cat((self.branch_proj(x_proj), self.branch_main(x)), 1)

    def channel_shuffle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batchsize, channels, height, width = x.data.size()
        assert channels % 4 == 0
        x = x.reshape(batchsize * channels // 2, 2, height * width)
        x = x.permute(1, 0, 2)
        x = x.reshape(2, -1, channels // 2, height, width)
        return x[0], x[1]


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


# Units that split first and shuffle last, behind a pooling; a candidate of other making among them ------------------


def shuffled(x: Tensor, groups: int) -> Tensor:
    batchsize, channels, height, width = x.size()
    x = x.view(batchsize, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, channels, height, width)


class SplitUnit(nn.Module):
    def __init__(self, inp: int, oup: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        features = oup // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inp, inp, kernel, stride, kernel // 2, groups=inp, bias=False),
                nn.BatchNorm2d(inp),
                nn.Conv2d(inp, features, 1, bias=False),
                nn.BatchNorm2d(features),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inp if stride > 1 else features, features, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, features, kernel, stride, kernel // 2, groups=features, bias=False),
            nn.BatchNorm2d(features),
            nn.Conv2d(features, features, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return shuffled(out, 2)


class SplitNet(nn.Module):
    """Features of 3x3 (of images of 20x20) are flattened by view; a layer may pool or convolve instead."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stages = nn.ModuleDict()
        inp = 8
        for number, (oup, stride) in enumerate(((20, 2), (20, 1), (20, 1))):
            units: dict[str, nn.Module] = {f"unit{k}": SplitUnit(inp, oup, k, stride) for k in (3, 5)}
            if number == 1:
                units["conv"] = nn.Sequential(nn.Conv2d(20, 20, 3, 1, 1), nn.BatchNorm2d(20), nn.SiLU())
                units["pool"] = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
            self.stages[f"stage{number}"] = nn.ModuleDict(units)
            inp = oup
        self.fixed = SplitUnit(20, 20, 3, 1)
        self.fc = nn.Linear(180, classes)

    def forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        x = self.maxpool(self.conv1(x))
        for number, name in enumerate(names):
            x = self.stages[f"stage{number}"][name](x)
        x = self.fixed(x)
        return self.fc(x.view(x.size(0), -1))


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
