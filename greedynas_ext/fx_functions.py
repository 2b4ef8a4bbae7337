"""Functions and methods of torch that are read as steps, or as another shape of a value."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from greedynas_ext.fx_steps import Mismatch, Pending, StepList, Value, is_int, is_number, pair, strided

_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu), "relu"),
    **dict.fromkeys((F.relu_, torch.relu_), "relu_"),
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
    F.hardsigmoid: "hardsigmoid",
    **dict.fromkeys((F.sigmoid, torch.sigmoid), "sigmoid"),
    torch.sigmoid_: "sigmoid_",
    F.hardtanh: "hardtanh",
    F.hardtanh_: "hardtanh_",
    **dict.fromkeys((torch.clamp, torch.clip), "clamp"),
    **dict.fromkeys((torch.clamp_, torch.clip_), "clamp_"),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), "dropout"),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), "dropout"),
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d",
    F.avg_pool2d: "avg_pool2d",
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), "max_pool2d"),
    torch.mean: "mean",
    torch.flatten: "flatten",
    torch.reshape: "reshape",
    torch.squeeze: "squeeze",
    torch.unsqueeze: "unsqueeze",
    **dict.fromkeys((operator.add, torch.add), "add"),
    **dict.fromkeys((operator.mul, torch.mul, torch.multiply), "mul"),
    **dict.fromkeys((operator.truediv, torch.div, torch.divide, torch.true_divide), "div"),
    operator.getitem: "getitem",
    getattr: "getattr",
}
_METHODS = frozenset(
    [
        "relu",
        "relu_",
        "sigmoid",
        "sigmoid_",
        "clamp",
        "clamp_",
        "mean",
        "flatten",
        "view",
        "reshape",
        "squeeze",
        "unsqueeze",
        "expand_as",
        "contiguous",
        "add",
        "add_",
        "mul",
        "mul_",
        "div",
        "div_",
        "size",
    ]
)
_WRITING = frozenset(("relu_", "sigmoid_", "hardtanh_", "clamp_", "add_", "mul_", "div_"))
# What may complete an activation written by hand, or a mean in two steps.
_COMPLETING = frozenset(("relu6", "hardtanh", "clamp", "mean", "add", "mul", "div"))


class Functions(StepList):
    """The methods that are called by the names in `_FUNCTIONS` and `_METHODS` have the parameters of torch's."""

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A call of a function, or of the tensor method of that name: a Value, a shape or an entry of a shape."""
        if isinstance(target, str):
            self.name = target
            name = target if target in _METHODS else None
        else:
            self.name = getattr(target, "__name__", str(target))
            name = _FUNCTIONS.get(target)
        if name is None:
            raise Mismatch(f"{self.name}: expected no such function")
        if name in _WRITING:
            name, kwargs = name.removesuffix("_"), {**kwargs, "inplace": True}
        if name not in _COMPLETING:
            args, kwargs = self.settled(tuple(args)), {key: self.settled(value) for key, value in kwargs.items()}
        try:
            return getattr(self, f"_{name}")(*args, **kwargs)
        except TypeError as error:
            raise Mismatch(f"{self.name}: {str(error).removeprefix('Functions._')}") from None

    # Activations.

    def _act(self, activation: str, value: Any, inplace: bool) -> Value:
        return self.step("act", getattr(value, "shape", ()), value, writes=inplace, activation=activation)

    def _relu(self, input: Any, inplace: bool = False) -> Value:
        return self._act("relu", input, inplace)

    def _relu6(self, input: Any, inplace: bool = False) -> Any:
        if isinstance(input, Pending) and input.what == "x + 3":
            return self._pending("relu6(x + 3)", input.of)
        return self._act("relu6", self.settled(input), inplace)

    def _pending(self, what: str, of: Any) -> Pending:
        self.check("a tensor computed from the input", isinstance(of, Value), of)
        return Pending(what, of, of.shape)

    def _hardswish(self, input: Any, inplace: bool = False) -> Value:
        return self._act("hswish", input, inplace)

    def _silu(self, input: Any, inplace: bool = False) -> Value:
        return self._act("silu", input, inplace)

    def _hardsigmoid(self, input: Any, inplace: bool = False) -> Any:
        return self._act("hsigmoid", input, inplace) if inplace else self._pending("hsigmoid", input)

    def _sigmoid(self, input: Any, inplace: bool = False) -> Any:
        return self._act("sigmoid", input, inplace) if inplace else self._pending("sigmoid", input)

    def _hardtanh(self, input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Any:
        return self._clamp(input, min_val, max_val, inplace)

    def _clamp(self, input: Any, min: Any = None, max: Any = None, inplace: bool = False) -> Any:
        if is_number(min) and min == 0 and max is None:
            return self._act("relu", self.settled(input), inplace)
        bounds = (min, max)
        self.check("bounds 0 and 6", all(map(is_number, bounds)) and bounds == (0, 6), bounds)
        return self._relu6(input, inplace)

    def _dropout(self, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        self.check("no dropout in evaluation mode", training is False or p == 0, f"training={training}")
        return input

    # Means over the image and their shapes.

    def _adaptive_avg_pool2d(self, input: Any, output_size: Any) -> Any:
        size = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
        self.check("output size 1", size == (1, 1), output_size)
        return self._mean(input, (2, 3), True)

    def _avg_pool2d(
        self,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        self.check("no divisor_override", divisor_override is None, divisor_override)
        if padding not in (0, (0, 0)):
            pooling = "mean with padding" if count_include_pad else "mean"
            return self._window(pooling, input, kernel_size, stride, padding, ceil_mode)
        sides = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        if len(sides) == 2 and is_int(sides[0]) and sides[0] == sides[1]:
            # The stride does not matter to an image of this size.
            shape = getattr(input, "shape", ())
            self.check("4 dimensions", len(shape) == 4, len(shape))
            return self.step("pool", (*shape[:2], 1, 1), input, side=sides[0])
        # Both sides: a pooling by one of them is a mean over the image only where that is square.
        self.check("the size of the image", sides == getattr(input, "shape", ())[2:] and sides == kernel_size, sides)
        return self._mean(input, (2, 3), True)

    def _max_pool2d(
        self,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        self.check("dilation 1", pair(dilation) == (1, 1), dilation)
        self.check("no indices", not return_indices, return_indices)
        return self._window("maximum", input, kernel_size, stride, padding, ceil_mode)

    def _window(self, pooling: str, input: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> Value:
        """Pooling over windows; without a stride it is the kernel size."""
        shape = getattr(input, "shape", ())
        self.check("4 dimensions", len(shape) == 4, len(shape))
        kernel, width = pair(kernel_size)
        step, other = pair(kernel_size if stride is None or stride == () else stride)
        self.check("a square window of odd size", kernel == width and kernel % 2 == 1, f"{kernel}x{width}")
        self.check("one stride", step == other and step >= 1, f"{step}x{other}")
        self.check(f"padding {kernel // 2}", pair(padding) == (kernel // 2, kernel // 2), padding)
        self.check("ceil_mode False", not ceil_mode, ceil_mode)
        return self.step("window", strided(shape, step), input, pooling=pooling, kernel=kernel, stride=step)

    def _mean(self, input: Any, dim: Any = None, keepdim: bool = False) -> Any:
        shape = getattr(input, "shape", ())
        dims = [dim] if is_int(dim) else dim
        if isinstance(dims, Sequence) and all(map(is_int, dims)) and shape:
            dims = sorted(d % len(shape) for d in dims)
        if isinstance(input, Pending) and input.what == "mean":
            self.check("a mean over the other side of the image", dims == [shape.index("side")], dim)
            kept = [1 if side == "side" else side for side in shape if keepdim or side != "side"]
            return self.step("pool", tuple(kept), input.of)
        input = self.settled(input)
        if len(shape) == 4 and dims in ([2], [3]):
            # One side of the image is left, the other is gone or 1.
            left = [*shape[:2], "side", "side"]
            left[dims[0]] = 1
            return Pending("mean", input, tuple(left if keepdim else left[: dims[0]] + left[dims[0] + 1 :]))
        self.check("a mean over dimensions 2 and 3", len(shape) == 4 and dims == [2, 3], dim)
        return self.step("pool", (*shape[:2], 1, 1) if keepdim else shape[:2], input)

    def _reshaped(self, value: Any, shape: Sequence[Any]) -> Value:
        if not isinstance(value, Value):
            raise Mismatch(f"{self.name}: expected a tensor, got {value!r}")
        vector = value.shape[:2]
        wanted = [*shape]
        self.check("a mean over the image", all(side == 1 for side in value.shape[2:]), list(value.shape))
        if -1 in wanted:
            position = wanted.index(-1)
            wanted[position] = vector[position] if position < 2 else 1
        fits = tuple(wanted[:2]) == vector and all(side == 1 for side in wanted[2:])
        self.check("one value for each image and channel", fits, list(shape))
        return Value(value.index, tuple(wanted))

    def _flatten(self, input: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
        dims = len(getattr(input, "shape", ()))
        whole = start_dim in (1, 1 - dims) and end_dim in (-1, dims - 1)
        self.check("all dimensions but the first", whole, f"{start_dim} to {end_dim}")
        return self._reshaped(input, getattr(input, "shape", ())[:2])

    def _view(self, input: Any, *shape: Any) -> Value:
        return self._reshaped(input, shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)

    def _reshape(self, input: Any, *sizes: Any, shape: Any = None) -> Value:
        return self._view(input, *(sizes if shape is None else (shape,)))

    def _squeeze(self, input: Any, dim: Any = None) -> Value:
        shape = getattr(input, "shape", ())
        dims = {d % max(len(shape), 1) for d in (dim if isinstance(dim, Sequence) else (dim,)) if is_int(d)}
        removed = bool(dims) and min(dims) >= 2 and max(dims) < len(shape)
        self.check("dimensions of the image", removed, dim)
        return self._reshaped(input, [side for d, side in enumerate(shape) if d not in dims])

    def _unsqueeze(self, input: Any, dim: Any) -> Value:
        shape = getattr(input, "shape", ())
        position = dim % (len(shape) + 1) if is_int(dim) else 0
        self.check("a dimension after the channels", 2 <= position <= len(shape), dim)
        return self._reshaped(input, (*shape[:position], 1, *shape[position:]))

    def _expand_as(self, input: Any, other: Any) -> Any:
        # A product broadcasts by itself, and nothing else is read with the shape of a mean over the image.
        shapes = getattr(input, "shape", ()), getattr(other, "shape", ())
        means = len(shapes[0]) == len(shapes[1]) == 4 and shapes[0][:2] == shapes[1][:2] and shapes[0][2:] == (1, 1)
        self.check("[N, C, 1, 1] as [N, C, H, W]", means, shapes)
        return input

    def _contiguous(self, input: Any, memory_format: Any = None) -> Any:
        return input

    def _size(self, input: Any, dim: int | None = None) -> Any:
        shape = self._getattr(input, "shape")
        return shape if dim is None else shape[dim]

    def _getattr(self, input: Any, name: str) -> Any:
        self.check("shape", name == "shape" and isinstance(input, Value), name)
        return input.shape

    def _getitem(self, input: Any, index: Any) -> Any:
        if isinstance(input, tuple):
            self.check("an index of a shape", isinstance(index, int | slice), index)
            return input[index]
        everything = slice(None)
        added = isinstance(index, tuple) and index[:2] == (everything, everything) and set(index[2:]) == {None}
        self.check("[:, :, None, None]", added and len(getattr(input, "shape", ())) == 2, index)
        return self._reshaped(input, (*input.shape, *(1 for _ in index[2:])))

    # Of two values.

    def _add(self, input: Any, other: Any, *, alpha: Any = 1, inplace: bool = False) -> Any:
        if is_number(input) and not inplace:
            input, other = other, input
        if is_number(other) and other == 3 and alpha == 1 and not inplace:
            return self._pending("x + 3", self.settled(input))
        input, other = self.settled(input), self.settled(other)
        shapes = getattr(input, "shape", ()), getattr(other, "shape", None)
        self.check("two tensors of one shape", shapes[0] == shapes[1], [*map(_plain, shapes)])
        self.check("alpha 1", is_number(alpha) and alpha == 1, alpha)
        return self.step("add", shapes[0], input, other, writes=inplace)

    def _mul(self, input: Any, other: Any, *, inplace: bool = False) -> Any:
        for one, two in ((input, other), (other, input)):
            if isinstance(one, Pending) and is_number(two):
                return self._sixth(one, two)
            if (
                isinstance(one, Pending)
                and isinstance(two, Value)
                and (two.index, two.shape) == (one.of.index, one.shape)
            ):
                if one.what in ("sigmoid", "hsigmoid"):
                    by_hand = {"sigmoid": "silu", "hsigmoid": "hswish"}[one.what]
                    return self.step("act", two.shape, two, writes=inplace and two is input, activation=by_hand)
                if one.what == "relu6(x + 3)" and not inplace:
                    return self._pending("x * relu6(x + 3)", two)
        input, other = self.settled(input), self.settled(other)
        shapes = getattr(input, "shape", ()), getattr(other, "shape", ())
        if not inplace and shapes[0][2:] == (1, 1):
            input, other, shapes = other, input, shapes[::-1]
        gated = len(shapes[0]) == 4 and shapes[1] == (*shapes[0][:2], 1, 1)
        self.check("[N, C, H, W] times [N, C, 1, 1]", gated, [*map(_plain, shapes)])
        return self.step("mul", shapes[0], input, other, writes=inplace)

    def _div(self, input: Any, other: Any, *, inplace: bool = False) -> Any:
        self.check("a division by 6", isinstance(input, Pending) and is_number(other) and other != 0, other)
        return self._sixth(input, 1 / other)

    def _sixth(self, value: Pending, factor: float) -> Any:
        """The end of an activation by hand. It may write in place: what it writes to is nobody else's."""
        self.check("a factor of 1/6", math.isclose(factor, 1 / 6, rel_tol=1e-7), factor)
        if value.what == "x * relu6(x + 3)":
            return self.step("act", value.shape, value.of, activation="hswish")
        self.check("relu6(x + 3)", value.what == "relu6(x + 3)", value.what)
        return self._pending("hsigmoid", value.of)


def _plain(shape: Any) -> Any:
    return list(shape) if isinstance(shape, tuple) else shape
