"""Choice blocks with random weights, and nodes that run them: arguments of `ops.mixed_op`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from greedynas_ext import reference
from greedynas_ext.block_layout import PackedBlock
from greedynas_ext.packing import (
    BatchNormWeights,
    ConvBNWeights,
    IdentityWeights,
    InvertedBottleneckWeights,
    OperationWeights,
    SqueezeExcitationWeights,
    pack_choice_block,
    running_statistics,
)


@dataclass(frozen=True)
class Spec:
    """An inverted bottleneck; `expansion` None: without an expand stage."""

    expansion: int | None = 3
    kernel: int = 3
    activation: str = "relu6"
    se: int = 0
    gate: str = "hsigmoid"
    depthwise_activation: str | None = None  # as after the expansion
    project_activation: str = "linear"


@dataclass(frozen=True)
class ConvSpec:
    """A strided 1x1 convolution with BatchNorm."""

    activation: str = "linear"


SPECS = (
    Spec(),
    Spec(expansion=5, kernel=5, activation="hswish", se=7),
    Spec(expansion=2, kernel=7, activation="silu", se=1, gate="sigmoid"),
    Spec(expansion=None, activation="relu"),
    Spec(expansion=1, kernel=5, activation="linear"),
    Spec(expansion=2, activation="relu", depthwise_activation="linear", project_activation="relu"),
    Spec(expansion=3, kernel=5, se=5, depthwise_activation="silu", project_activation="hswish"),
    ConvSpec(),
    ConvSpec("relu"),
)


class Draw:
    """Random weights, statistics and inputs."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=self._generator) + mean

    def weight(self, *shape: int) -> Tensor:
        return self.normal(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5

    def norm(self, channels: int, eps: float) -> BatchNormWeights:
        mean, variance = self.normal(channels), self.normal(channels).abs() + 0.2
        return BatchNormWeights(self.normal(channels, mean=1.0), self.normal(channels), eps, mean, variance)

    def operation(self, spec: Spec | ConvSpec | None, into: int, out: int, stride: int) -> OperationWeights:
        if spec is None:
            return IdentityWeights(into)
        if isinstance(spec, ConvSpec):
            return ConvBNWeights(self.weight(out, into, 1, 1), self.norm(out, 1e-5), stride, spec.activation)
        hidden = into * (spec.expansion or 1)
        expands = spec.expansion is not None
        se = None
        if spec.se:
            reduce, excite = self.weight(spec.se, hidden, 1, 1), self.weight(hidden, spec.se, 1, 1)
            se = SqueezeExcitationWeights(reduce, self.normal(spec.se), excite, self.normal(hidden), spec.gate)
        return InvertedBottleneckWeights(
            expand=self.weight(hidden, into, 1, 1) if expands else None,
            expand_bn=self.norm(hidden, 1e-3) if expands else None,
            depthwise=self.weight(hidden, 1, spec.kernel, spec.kernel),
            depthwise_bn=self.norm(hidden, 2e-3),
            project=self.weight(out, hidden, 1, 1),
            project_bn=self.norm(out, 1e-5),
            stride=stride,
            activation=spec.activation,
            residual=stride == 1 and into == out,
            squeeze_excitation=se,
            depthwise_activation=spec.depthwise_activation,
            project_activation=spec.project_activation,
        )


@dataclass(frozen=True)
class Case:
    """Arguments of the operation, on the CPU."""

    inputs: Tensor
    input_index: Tensor
    op_index: Tensor
    block: PackedBlock
    running: Tensor  # [P, S]

    @classmethod
    def of(
        cls,
        specs: Sequence[Spec | ConvSpec | None],
        size: tuple[int, int, int, int],
        out: int,
        stride: int = 1,
        *,
        nodes: Sequence[tuple[int, int]] | None = None,
        inputs: int = 3,
        seed: int = 0,
    ) -> Case:
        """`size`: [N, H, W, C]; `nodes`: (input, operation), or each operation on inputs 0 and 2, and one again."""
        draw = Draw(seed)
        operations = [draw.operation(spec, size[3], out, stride) for spec in specs]
        block = pack_choice_block(operations)
        if nodes is None:
            nodes = [(source, op) for source in (2, 0) for op in range(len(specs))] + [(2, 0)]
        input_index, op_index = torch.tensor(nodes).T
        values = draw.normal(inputs, *size) + draw.normal(inputs, 1, 1, 1, size[3])
        for unused in set(range(inputs)) - set(input_index.tolist()):
            values[unused] = torch.nan
        running = running_statistics(operations, block)[op_index]
        return cls(values, input_index, op_index, block, running)

    def node(self, number: int) -> Case:
        """One of its nodes by itself."""
        index = torch.zeros(1, dtype=torch.int64)
        inputs = self.inputs[self.input_index[number]][None]
        return Case(inputs, index, self.op_index[number : number + 1], self.block, self.running[number : number + 1])

    def expected(self, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
        block = replace(self.block, weights=self.block.weights.double())
        given = None if statistics is None else statistics.double()
        return reference.mixed_op(self.inputs.double(), self.input_index, self.op_index, block, given)
