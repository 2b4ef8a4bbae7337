"""Traces of forwards that need to know sizes: numbers of channels decide which slices of a weight are used.

Every value of the trace is also computed in two worlds: on tensors without data, of images that differ in number,
height and width. A size that is the same in both is a number to the forward. One that differs is a symbol to it, and so
is whatever is computed of symbols: it depends on the images. Parameters are known, so that functions of them alone are
written down too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import is_tensor_method_or_property

from greedynas_ext.adapt_trace import SupernetTracer
from greedynas_ext.fx_trace import Recorder, _Value

Worlds: TypeAlias = tuple[Any, Any]

_IMAGES = ((2, 224, 224), (3, 288, 256))  # number, height and width in each world
_ACTIVATIONS = ("relu", "relu6", "hardtanh", "hardswish", "silu", "hardsigmoid", "sigmoid", "clamp", "tanh", "gelu")
_KEEP_SHAPE = frozenset((*_ACTIVATIONS, *(f"{name}_" for name in _ACTIVATIONS), "batch_norm", "dropout"))
_KEEP_SHAPE_WITH = frozenset(("add", "add_", "mul", "mul_", "sub", "sub_", "truediv", "div", "div_", "iadd", "imul"))
_KEEPING = (
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Hardswish,
    nn.SiLU,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Dropout,
)
_SIZES = ("size", "dim", "ndimension", "numel", "shape", "ndim", "__len__")


def images_of(channels: int, dtype: torch.dtype) -> Worlds:
    """Images of so many channels."""
    first, second = (torch.empty(n, channels, *sides, dtype=dtype, device="meta") for n, *sides in _IMAGES)
    return first, second


def worlds_of(value: Any) -> Worlds | None:
    """What a symbol is in the two worlds, where that is known."""
    return value.node.meta.get("worlds") if issubclass(type(value), fx.Proxy) else None


class _Unknown(Exception):
    """A value that is not known in the worlds."""


class _Known(_Value):
    """A symbol of a tensor that can tell its shape."""

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim"):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)


class WorldsTracer(SupernetTracer):
    """Gives numbers for the sizes that are known.

    Attributes:
        forwards: of modules that are called as a whole, how to compute their output; by name.
    """

    def __init__(self) -> None:
        super().__init__(fx.Graph())
        self.forwards: dict[str, Callable[..., Any]] = {}

    def input(self, worlds: Worlds) -> fx.Proxy:
        """What the graph reads."""
        return self.symbol("placeholder", "input", (), {}, worlds)

    def symbol(self, kind: str, target: Any, args: Any, kwargs: Any, worlds: Worlds | None) -> fx.Proxy:
        """Writes a call down."""
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), None, None)
        if worlds is not None:
            node.meta["worlds"] = worlds
        return self.proxy(node)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A symbol that passes for a tensor, if it is one."""
        worlds = node.meta.get("worlds")
        if worlds is None:
            return super().proxy(node)
        return _Known(node, self) if isinstance(worlds[0], Tensor) else fx.Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        """A symbol for what a call gives; a number, or a tuple, where it gives what is known."""
        worlds = self._computed(kind, target, args, kwargs)
        if worlds is None or any(isinstance(each, Tensor) or each is None for each in worlds):
            return self.symbol(kind, target, args, kwargs, worlds)
        several = type(worlds[0]) in (tuple, list, torch.Size) and len(worlds[0]) == len(worlds[1])
        sizes = _name(target, args) in _SIZES and not any(map(_is_symbolic, args))
        if sizes and worlds[0] == worlds[1]:
            return worlds[0]
        if not several or not (sizes or any(isinstance(each, Tensor) for each in worlds[0])):
            return self.symbol(kind, target, args, kwargs, worlds)
        whole = self.symbol(kind, target, args, kwargs, worlds)
        return tuple(
            one
            if sizes and one == other
            else self.symbol("call_function", operator.getitem, (whole, number), {}, (one, other))
            for number, (one, other) in enumerate(zip(*worlds, strict=True))
        )

    def of_weights(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a function of parameters and buffers alone."""
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return self.create_proxy("call_function", getattr, (args[0], function.__self__.__name__), {})  # type: ignore[attr-defined]
        if is_tensor_method_or_property(function):
            return self.create_proxy("call_method", name, args, kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def _computed(self, kind: str, target: Any, args: Any, kwargs: Any) -> Worlds | None:
        try:
            with torch._C.DisableTorchFunction():
                first, second = (self._in_one(kind, target, _in_world(args, n), _in_world(kwargs, n)) for n in (0, 1))
        except Exception:  # what it is stays unknown; whether it can be computed, an evaluation shows
            return None
        return first, second

    def _in_one(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_module":
            target = self.forwards[target]
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        # Much is known without torch, which takes milliseconds for some of these on tensors without data.
        if name in _KEEP_SHAPE or (name in _KEEP_SHAPE_WITH and _is_as_small(args)):
            return args[0]
        rule = _RULES.get(name)
        if rule is not None:
            return rule(*args, **kwargs)
        return getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)


def _is_as_small(args: Sequence[Any]) -> bool:
    """Whether the second of two arguments has no dimension that the first, a tensor, lacks."""
    one, other = args[0], args[1] if len(args) > 1 else 0
    if not isinstance(one, Tensor) or not one.is_floating_point():
        return False
    if not isinstance(other, Tensor):
        return isinstance(other, int | float)
    return other.dtype == one.dtype and torch.broadcast_shapes(one.shape, other.shape) == one.shape  # type: ignore[no-untyped-call]


def _convolution(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> Tensor:
    """F.conv2d of tensors without data."""
    if isinstance(padding, str) or x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    sides = []
    for dim, of_pair in ((2, 0), (3, -1)):
        step, pad, far = (v[of_pair] if isinstance(v, tuple | list) else v for v in (stride, padding, dilation))
        sides.append((x.shape[dim] + 2 * pad - far * (weight.shape[dim] - 1) - 1) // step + 1)
    return x.new_empty((x.shape[0], weight.shape[0], *sides))  # type: ignore[no-any-return]


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """torch.mean of a tensor without data."""
    if dim is None or kwargs:
        return torch.mean(x, dim, keepdim, **kwargs)
    gone = {each % x.dim() for each in (dim if isinstance(dim, tuple | list) else (dim,))}
    sides = [1 if number in gone else side for number, side in enumerate(x.shape) if keepdim or number not in gone]
    return x.new_empty(sides)


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """F.linear of tensors without data."""
    if x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _matmul(one: Tensor, other: Tensor) -> Tensor:
    """torch.matmul of tensors without data."""
    if one.dim() != 2 or other.dim() != 2 or one.shape[1] != other.shape[0]:
        return torch.matmul(one, other)
    return one.new_empty((one.shape[0], other.shape[1]))


def _pooled(x: Tensor, size: Any) -> Tensor:
    """F.adaptive_avg_pool2d of a tensor without data."""
    sides = size if isinstance(size, tuple | list) else (size, size)
    return x.new_empty((*x.shape[:2], *sides)) if x.dim() == 4 and None not in sides else F.adaptive_avg_pool2d(x, size)


_RULES: dict[str, Callable[..., Tensor]] = {
    "conv2d": _convolution,
    "mean": _mean,
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm"), _matmul),
    "adaptive_avg_pool2d": _pooled,
}


def _name(target: Any, args: Sequence[Any]) -> str:
    if target is getattr:
        return str(args[1])
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_symbolic(argument: Any) -> bool:
    """Whether it is a symbol, but not that of a tensor."""
    worlds = worlds_of(argument)
    return issubclass(type(argument), fx.Proxy) and not (worlds is not None and isinstance(worlds[0], Tensor))


def _in_world(value: Any, number: int) -> Any:
    if issubclass(type(value), fx.Proxy):
        worlds = worlds_of(value)
        if worlds is None:
            raise _Unknown
        return worlds[number]
    if isinstance(value, tuple | list) and type(value) in (tuple, list, torch.Size):
        parts = [_in_world(each, number) for each in value]
        return parts if type(value) is list else tuple(parts)
    if isinstance(value, dict):
        return {key: _in_world(each, number) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(*(_in_world(each, number) for each in (value.start, value.stop, value.step)))
    return value


class WorldsRecorder(Recorder):
    """Also records functions of parameters and buffers alone."""

    def __init__(self, tracer: WorldsTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        symbols = any(issubclass(cls, fx.Proxy) for cls in types)
        if not symbols and self._of_weights((*args, *kwargs.values())):
            return self._tracer.of_weights(func, tuple(args), kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def _of_weights(self, values: Sequence[Any]) -> bool:
        pending, found = list(values), False
        while pending:
            value = pending.pop()
            if isinstance(value, Tensor):
                if id(value) not in self._tracer.tensors:
                    return False
                found = True
            elif isinstance(value, tuple | list):
                pending.extend(value)
            elif isinstance(value, Mapping):
                pending.extend(value.values())
        return found


def _same(x: Tensor) -> Tensor:
    return x


def leaf_forward(module: nn.Module, shadow: nn.Module) -> Callable[..., Any] | None:
    """How to compute the output of one of torch's own modules without data, given its shadow.

    Hooks are taken to keep the shape: they look, or change values.
    """
    if "forward" in vars(module):
        return None
    if type(module) in _KEEPING:
        return _same
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        how = (module.stride, module.padding, module.dilation, module.groups)
        return lambda x: _convolution(x, shadow._parameters["weight"], None, *how)
    return lambda *args, **kwargs: type(module).forward(shadow, *args, **kwargs)
