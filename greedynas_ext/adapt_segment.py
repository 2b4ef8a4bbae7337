"""Parts of a supernet's forward as modules, which call those of the supernet in the same order on the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from greedynas_ext.adapt_parts import Argument, Part
from greedynas_ext.adapt_trace import Supernet


class Segment(nn.Module):
    """Runs the calls of a part. Modules and weights are the supernet's own."""

    def __init__(self, part: Part, supernet: Supernet) -> None:
        super().__init__()
        names: dict[str, str] = {}
        calls = []
        self.tensors: list[Any] = []
        for call in part:
            target = call.target
            if call.kind == "module":
                # The name that reasons and errors give.
                target = names.setdefault(call.target, call.target.replace(".", "/") or "supernet")
                self._modules[target] = supernet.modules[call.target]
            elif call.kind == "tensor":
                target = len(self.tensors)
                self.tensors.append(_reader(supernet.modules[call.target[0]], call.target[1]))
            # Plain values, whose changes `recognise_cache` can see.
            calls.append((call.kind, target, call.args, call.kwargs))
        self.calls = tuple(calls)

    def forward(self, x: Tensor) -> Any:
        """What the part gives for the value that it reads."""
        values: list[Any] = [x]
        for kind, target, encoded_args, encoded_kwargs in self.calls:
            args = [_decoded(each, values) for each in encoded_args]
            kwargs = {key: _decoded(each, values) for key, each in encoded_kwargs}
            if kind == "module":
                child = self._modules[target]
                assert child is not None
                values.append(child(*args, **kwargs))
            elif kind == "function":
                values.append(target(*args, **kwargs))
            elif kind == "method":
                values.append(getattr(args[0], target)(*args[1:], **kwargs))
            else:
                values.append(self.tensors[target]())
        return values[-1]


def module_of(part: Part, supernet: Supernet) -> nn.Module:
    """A module that computes `part`; where that is the call of one module on the input, the module itself."""
    if not part:
        return nn.Identity()
    if len(part) == 1 and part[0].kind == "module" and part[0].args == (("value", 0),) and not part[0].kwargs:
        return supernet.modules[part[0].target]
    return Segment(part, supernet)


def _reader(module: nn.Module, name: str) -> Callable[[], Any]:
    """Reads a tensor of the supernet's when it is needed: training may have put another in its place."""
    return lambda: getattr(module, name)


def _decoded(argument: Argument, values: list[Any]) -> Any:
    kind, content = argument
    if kind == "value":
        return values[content]
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: _decoded(each, values) for key, each in content}
    parts = [_decoded(each, values) for each in content]
    return slice(*parts) if kind == "slice" else tuple(parts) if kind == "tuple" else parts
