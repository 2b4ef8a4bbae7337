"""Reads the graph of a traced module as steps."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from greedynas_ext.fx_functions import Functions
from greedynas_ext.fx_steps import Mismatch, Steps, Value, is_number, pair, strided
from greedynas_ext.fx_trace import Trace
from greedynas_ext.packing import BatchNormWeights


def read_steps(trace: Trace, in_channels: int | None) -> Steps:
    """The steps of a module whose input has `in_channels` channels; None: as many as its first convolution reads.

    Raises:
        Mismatch: naming what is no such step, or a result that nobody uses.
    """
    return Reader(trace, _channels_read(trace) if in_channels is None else in_channels).read()


def _channels_read(trace: Trace) -> int | None:
    """How many channels the first convolution of the input reads."""
    for node in trace.graph.nodes:
        module = trace.leaves.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and node.args[0].op == "placeholder":
            weight = module._parameters.get("weight")
            return None if weight is None else int(weight.shape[1] * module.groups)
    return None


class Reader(Functions):
    """Goes along a graph."""

    def __init__(self, trace: Trace, in_channels: int | None) -> None:
        super().__init__(in_channels)
        self._trace = trace
        self._used: set[str] = set()

    def read(self) -> Steps:
        """The steps that lead to the output."""
        known: dict[fx.Node, Any] = {}
        for node in self._trace.graph.nodes:
            args, kwargs = _looked_up(node.args, known), _looked_up(node.kwargs, known)
            if node.op == "placeholder":
                known[node] = self.input()
            elif node.op == "call_module":
                known[node] = self._weighted(node.target, args[0])
            elif node.op == "output":
                return self.finished(args[0])
            else:
                known[node] = self.call(node.target, args, kwargs)
        raise AssertionError("a graph ends in its output")

    def _weighted(self, name: str, value: Any) -> Value:
        self.name = name
        value = self.settled(value)
        if name in self._used:
            raise Mismatch(f"{name}: is used twice")
        self._used.add(name)
        self.check("a tensor computed from the input", isinstance(value, Value), value)
        module = self._trace.leaves[name]
        if isinstance(module, nn.Conv2d):
            return self._conv(module, value)
        if isinstance(module, nn.BatchNorm2d):
            self.check("4 dimensions", len(value.shape) == 4, len(value.shape))
            self.check("a convolution before it", value.shape[1] is not None, "the input")
            return self.step("bn", value.shape, value, norm=_norm_weights(name, module, value.shape[1]))
        weight = module._parameters.get("weight")
        if weight is None:
            raise Mismatch(f"{self.name}.weight: expected a parameter, got None")
        self.check(f"[N, {weight.shape[1]}]", value.shape == ("N", weight.shape[1]), list(value.shape))
        return self.step("linear", ("N", weight.shape[0]), value, module=module)

    def _conv(self, conv: nn.Conv2d, value: Value) -> Value:
        weight = conv._parameters.get("weight")
        if weight is None:
            raise Mismatch(f"{self.name}.weight: expected a parameter, got None")
        out, per_group, kernel, width = weight.shape
        self.check("4 dimensions", len(value.shape) == 4, len(value.shape))
        self.check("a square kernel of odd size", kernel == width and kernel % 2 == 1, f"{kernel}x{width}")
        stride = pair(conv.stride)
        self.check("one stride", stride[0] == stride[1] and stride[0] >= 1, conv.stride)
        self.check("dilation 1", kernel == 1 or pair(conv.dilation) == (1, 1), conv.dilation)
        self.check("padding_mode zeros", conv.padding_mode == "zeros", conv.padding_mode)
        if isinstance(conv.padding, str):
            same = conv.padding == "same" and stride[0] == 1
            padded = same or (conv.padding == "valid" and kernel == 1)
        else:
            padded = pair(conv.padding) == (kernel // 2, kernel // 2)
        self.check(f"padding {kernel // 2}", padded, conv.padding)
        channels, groups = value.shape[1], conv.groups
        self.check(f"{per_group * groups} channels", channels in (None, per_group * groups), channels)
        depthwise = groups == out and per_group == 1
        self.check("groups 1 or as many as channels", groups == 1 or depthwise, groups)
        return self.step("conv", strided(("N", out, *value.shape[2:]), stride[0]), value, module=conv)


def _looked_up(value: Any, known: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, tuple | list):
        return tuple(_looked_up(each, known) for each in value)
    if isinstance(value, dict):
        return {key: _looked_up(each, known) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(*(_looked_up(each, known) for each in (value.start, value.stop, value.step)))
    return value


def _norm_weights(name: str, norm: nn.BatchNorm2d, channels: Any) -> BatchNormWeights:
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    mean, var = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    for part, tensor in {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}.items():
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise Mismatch(f"{name}.{part}: expected [{channels}], got {list(tensor.shape)}")
    if (mean is None) != (var is None):
        raise Mismatch(f"{name}: expected both running_mean and running_var or neither")
    if not is_number(norm.eps):
        raise Mismatch(f"{name}.eps: expected a number, got {norm.eps!r}")
    return BatchNormWeights(weight, bias, float(norm.eps), mean, var)
