"""Parts of a supernet's forward as modules, which call those of the supernet in the same order on the same values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from greedynas_ext.adapt_parts import Part, executed, of_image
from greedynas_ext.adapt_trace import Supernet
from greedynas_ext.derived import StandIn, WithDerivedWeights, reader, stand_in_of


class Segment(WithDerivedWeights):
    """Runs the calls of a part. Modules and weights are the supernet's own."""

    def __init__(self, part: Part, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        names: dict[str, str] = {}
        calls = []
        self.tensors: list[Any] = []
        for call in part:
            target = call.target
            if call.kind == "module":
                # The name that reasons and errors give.
                target = names.setdefault(call.target, call.target.replace(".", "/") or "supernet")
                self._modules[target] = modules[call.target]
            elif call.kind == "tensor":
                target = len(self.tensors)
                owner, name = call.target
                self.tensors.append(reader(modules[owner], name))
                if not modules[owner]._modules:  # its flags and buffers are looked after with those of the others
                    self._modules[names.setdefault(owner, owner.replace(".", "/"))] = modules[owner]
            # Plain values, whose changes `recognise_cache` can see.
            calls.append((call.kind, target, call.args, call.kwargs))
        self.calls = tuple(calls)
        # Products of weights with each other are no work on images, and normalise nothing.
        self._of_weights = {number for number, depends in enumerate(of_image(part)) if not depends}
        self._stand_in: tuple[Callable[[], StandIn | None], StandIn | None] | None = None
        if self.tensors:
            self._stand_in = (lambda: stand_in_of(part, modules, Segment)), None

    def forward(self, x: Tensor) -> Any:
        """What the part gives for the value that it reads."""
        modules: Any = self._modules
        return executed(self.calls, [x], modules.__getitem__, lambda number: self.tensors[number](), self._of_weights)

    def stand_in(self) -> StandIn | None:
        """What is recognised in its place, where functions in it are given weights."""
        if self._stand_in is None:
            return None
        make, found = self._stand_in
        if found is None or not found.is_current():
            found = make()
            self._stand_in = make, found
        return found


def module_of(part: Part, supernet: Supernet) -> nn.Module:
    """A module that computes `part`; where that is the call of one module on the input, the module itself."""
    if not part:
        return nn.Identity()
    if len(part) == 1 and part[0].kind == "module" and part[0].args == (("value", 0),) and not part[0].kwargs:
        return supernet.modules[part[0].target]
    return Segment(part, supernet.modules)
