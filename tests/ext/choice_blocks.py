"""Choice blocks for tests: modules of torch.nn, which are the oracle, and the descriptions of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from greedynas_ext.packing import (
    BatchNormWeights,
    ConvBNWeights,
    IdentityWeights,
    InvertedBottleneckWeights,
    OperationWeights,
    PackedBlock,
    SqueezeExcitationWeights,
    pack_choice_block,
    running_statistics,
)

MODULES = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
    "silu": nn.SiLU,
    "hsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True)
class Spec:
    """An inverted bottleneck, as the tests write it down."""

    expansion: int | None = 3  # None: no expand stage
    kernel: int = 3
    activation: str = "relu6"
    se: int = 0
    gate: str = "hsigmoid"
    eps: float = 1e-5
    depthwise_activation: str | None = None  # None: the same
    project_activation: str = "linear"


@dataclass(frozen=True)
class ConvSpec:
    activation: str = "linear"


class Bottleneck(nn.Module):
    def __init__(self, into: int, out: int, stride: int, spec: Spec) -> None:
        super().__init__()
        hidden = into if spec.expansion is None else into * spec.expansion
        self.spec, self.stride = spec, stride
        self.expand = None if spec.expansion is None else nn.Conv2d(into, hidden, 1, bias=False)
        self.expand_bn = None if spec.expansion is None else nn.BatchNorm2d(hidden, eps=spec.eps)
        self.depthwise = nn.Conv2d(
            hidden, hidden, spec.kernel, stride, padding=spec.kernel // 2, groups=hidden, bias=False
        )
        self.depthwise_bn = nn.BatchNorm2d(hidden, eps=2 * spec.eps)
        self.squeeze = nn.Conv2d(hidden, spec.se, 1) if spec.se else None
        self.excite = nn.Conv2d(spec.se, hidden, 1) if spec.se else None
        self.project = nn.Conv2d(hidden, out, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(out, eps=3 * spec.eps)
        self.activation, self.gate = MODULES[spec.activation](), MODULES[spec.gate]()
        self.depthwise_activation = MODULES[spec.depthwise_activation or spec.activation]()
        self.project_activation = MODULES[spec.project_activation]()
        self.residual = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None and self.expand_bn is not None:
            y = self.activation(self.expand_bn(self.expand(y)))
        y = self.depthwise_activation(self.depthwise_bn(self.depthwise(y)))
        if self.squeeze is not None and self.excite is not None:
            z = torch.relu(self.squeeze(torch.nn.functional.adaptive_avg_pool2d(y, 1)))
            y = y * self.gate(self.excite(z))
        y = self.project_activation(self.project_bn(self.project(y)))
        return x + y if self.residual else y


@dataclass(frozen=True)
class Block:
    """Operations as modules and as descriptions, and the packed block."""

    modules: tuple[nn.Module, ...]
    operations: tuple[OperationWeights, ...]
    packed: PackedBlock

    def expected(self, inputs: Tensor, input_index: Tensor, op_index: Tensor, training: bool) -> Tensor:
        """[P, N, H', W', C'] by the modules, whose running statistics stay as they are."""
        outputs = []
        for source, op in zip(input_index.tolist(), op_index.tolist(), strict=True):
            module = self.modules[op].train(training)
            buffers = {name: value.clone() for name, value in module.named_buffers()}
            with torch.no_grad():
                outputs.append(torch.func.functional_call(module, buffers, inputs[source].permute(0, 3, 1, 2)))
        return torch.stack(outputs).permute(0, 1, 3, 4, 2)

    def running(self, op_index: Tensor) -> Tensor:
        return running_statistics(self.operations, self.packed)[op_index]


def make_block(
    specs: Sequence[Spec | ConvSpec | None],
    into: int,
    out: int,
    stride: int = 1,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Block:
    """None is the plain identity. All weights, biases and running statistics are random."""
    generator = torch.Generator().manual_seed(seed)
    modules = tuple(_randomise(_module(spec, into, out, stride), generator).to(dtype) for spec in specs)
    operations = tuple(describe(module, into) for module in modules)
    return Block(modules, operations, pack_choice_block(operations, dtype=dtype))


def describe(module: nn.Module, channels: int) -> OperationWeights:
    if isinstance(module, nn.Sequential):
        conv, bn, activation = module
        name = next(name for name, kind in MODULES.items() if type(activation) is kind)
        return ConvBNWeights(conv.weight, describe_bn(bn), conv.stride[0], name)
    if isinstance(module, nn.Identity):
        return IdentityWeights(channels)
    assert isinstance(module, Bottleneck)
    se = None
    if module.squeeze is not None:
        weights = (module.squeeze.weight, module.squeeze.bias, module.excite.weight, module.excite.bias)
        se = SqueezeExcitationWeights(*weights, gate=module.spec.gate)
    return InvertedBottleneckWeights(
        expand=None if module.expand is None else module.expand.weight,
        expand_bn=None if module.expand_bn is None else describe_bn(module.expand_bn),
        depthwise=module.depthwise.weight,
        depthwise_bn=describe_bn(module.depthwise_bn),
        project=module.project.weight,
        project_bn=describe_bn(module.project_bn),
        stride=module.stride,
        activation=module.spec.activation,
        residual=module.residual,
        squeeze_excitation=se,
        depthwise_activation=module.spec.depthwise_activation,
        project_activation=module.spec.project_activation,
    )


def describe_bn(bn: nn.BatchNorm2d) -> BatchNormWeights:
    return BatchNormWeights(bn.weight, bn.bias, bn.eps, bn.running_mean, bn.running_var)


def _module(spec: Spec | ConvSpec | None, into: int, out: int, stride: int) -> nn.Module:
    if spec is None:
        return nn.Identity()
    if isinstance(spec, ConvSpec):
        conv = nn.Conv2d(into, out, 1, stride, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out), MODULES[spec.activation]())
    return Bottleneck(into, out, stride, spec)


@torch.no_grad()
def _randomise(module: nn.Module, generator: torch.Generator) -> nn.Module:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
            continue
        value.copy_(torch.randn(value.shape, generator=generator))
        if name.endswith("running_var"):
            value.abs_().add_(0.2)
        elif value.dim() == 4:
            value.div_(value[0].numel() ** 0.5)
    return module
