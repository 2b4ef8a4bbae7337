"""The building blocks of supernets and networks: convolution with BatchNorm, inverted bottleneck, identity.

Activations work in place where their input is the output of a BatchNorm, which nobody else reads; nothing writes
into a block's own input, which sibling operations of a supernet share.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from greedynas.layers import Layer, Operation
from greedynas.spaces import Space

_ACTIVATIONS: dict[str, type[nn.ReLU] | type[nn.ReLU6] | type[nn.Hardswish] | type[nn.SiLU]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
    "silu": nn.SiLU,
}


def conv_bn_parts(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    *,
    space: Space,
    activation: str | None = None,
    groups: int = 1,
) -> OrderedDict[str, nn.Module]:
    """Convolution without bias, BatchNorm and, where one is named, activation: ``conv``, ``bn``, ``act``."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv"] = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts["bn"] = nn.BatchNorm2d(out_channels, eps=space.bn_eps, momentum=space.bn_momentum)
    if activation is not None:
        parts["act"] = _ACTIVATIONS[activation](inplace=True)
    return parts


class ConvBN(nn.Sequential):
    """Convolution padded by kernel // 2, BatchNorm and, where one is named, activation.

    ``[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]``

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: odd kernel size.
        stride: stride in both directions.
        space: where BatchNorm's epsilon and momentum come from.
        activation: ``relu``, ``relu6``, ``hswish``, ``silu``, or None for a linear output.
        groups: groups of the convolution; ``in_channels`` for a depthwise one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        space: Space,
        activation: str | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__(
            conv_bn_parts(in_channels, out_channels, kernel, stride, space=space, activation=activation, groups=groups)
        )


class SqueezeExcitation(nn.Module):
    """Scale channels by a gate computed from their means ("Squeeze-and-Excitation Networks", CVPR 2018).

    Mean over the image, 1x1 convolution to ``squeezed`` channels, ReLU, 1x1 convolution back, H-sigmoid; both
    convolutions have biases. ``[N, channels, H, W]`` in and out.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, features: Tensor) -> Tensor:
        """Scale ``features`` [N, channels, H, W] by their gate."""
        gate: Tensor = self.gate(self.expand(self.act(self.reduce(self.pool(features)))))
        return features * gate


class InvertedBottleneck(nn.Module):
    """MobileNetV2's block: expand (1x1), depthwise, squeeze-excitation where asked for, project (1x1, linear).

    Every convolution is followed by BatchNorm, the first two by an activation. There is no expand convolution
    at expansion 1, and the input is added to the output where the layer keeps its shape.
    ``[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]``

    Args:
        layer: channels and stride.
        op: expansion, kernel and squeeze-excitation.
        space: activation, squeeze-excitation ratio, BatchNorm's epsilon and momentum.
    """

    def __init__(self, layer: Layer, op: Operation, space: Space) -> None:
        super().__init__()
        hidden = layer.in_channels * op.expansion
        act = space.activation
        self.residual = layer.keeps_shape
        self.expand = ConvBN(layer.in_channels, hidden, 1, space=space, activation=act) if op.expansion != 1 else None
        self.depthwise = ConvBN(hidden, hidden, op.kernel, layer.stride, space=space, activation=act, groups=hidden)
        self.se = SqueezeExcitation(hidden, space.squeeze_channels(hidden)) if op.se else None
        self.project = ConvBN(hidden, layer.out_channels, 1, space=space)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the block to ``features`` [N, in_channels, H, W], which it leaves as they are."""
        hidden = features if self.expand is None else self.expand(features)
        hidden = self.depthwise(hidden)
        if self.se is not None:
            hidden = self.se(hidden)
        output: Tensor = self.project(hidden)
        return features + output if self.residual else output


class IdentityBlock(ConvBN):
    """Identity where shape changes: a 1x1 convolution with the layer's stride and BatchNorm, no activation."""

    def __init__(self, layer: Layer, space: Space) -> None:
        super().__init__(layer.in_channels, layer.out_channels, 1, layer.stride, space=space)


def make_operation(layer: Layer, op: Operation, space: Space) -> nn.Module:
    """Build one operation of one layer."""
    if not op.identity:
        return InvertedBottleneck(layer, op, space)
    return nn.Identity() if layer.keeps_shape else IdentityBlock(layer, space)


def make_stem(space: Space) -> nn.Sequential:
    """Build the stem: ``conv``, ``bn``, ``act`` and the fixed blocks ``fixed_0``, ``fixed_1``, ..."""
    parts = conv_bn_parts(
        space.in_channels, space.stem_channels, 3, space.stem_stride, space=space, activation=space.activation
    )
    for index, layer in enumerate(space.fixed):
        parts[f"fixed_{index}"] = InvertedBottleneck(layer, space.fixed_operation, space)
    return nn.Sequential(parts)


def make_head(space: Space) -> nn.Sequential:
    """Build the head: ``conv`` (1x1), ``bn``, ``act``, ``pool`` (mean over the image), ``flatten``, ``linear``."""
    parts = conv_bn_parts(
        space.layers[-1].out_channels, space.head_channels, 1, 1, space=space, activation=space.activation
    )
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["linear"] = nn.Linear(space.head_channels, space.num_classes)
    return nn.Sequential(parts)


def materialise(module: nn.Module, seed: int | None) -> None:
    """Give a module built on the meta device CPU memory and initial values, drawn in the order of its modules.

    Convolutions: normal with variance 2 / fan-out ("Delving Deep into Rectifiers", ICCV 2015), fan-out being
    kernel area times output channels *per group*. Linear maps: normal with standard deviation 0.01. Biases are 0.
    BatchNorm: weight 1, bias 0, running mean 0 and variance 1. The global random state stays as it is.

    Args:
        module: the module, changed in place.
        seed: seed of the draw; None takes one from the operating system.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                fan_out = part.out_channels // part.groups * math.prod(part.kernel_size)
                part.weight.normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator)
            elif isinstance(part, nn.Linear):
                part.weight.normal_(0.0, 0.01, generator=generator)
            elif isinstance(part, nn.BatchNorm2d):
                part.reset_parameters()
            if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
                part.bias.zero_()
