"""What a trace depends on beside the path: attributes, shapes, hooks and children of the modules of a supernet."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Any

from torch import nn

from greedynas_ext.adapt_trace import is_plain
from greedynas_ext.fx_trace import Untraceable
from greedynas_ext.recognise_cache import _class_state

OF_ANY_MODULE = frozenset((*vars(nn.Module()), "forward"))


class Unset:
    """Stands for the value of an attribute that has to be set before it is read."""

    def _read(self, *_: Any, **__: Any) -> Any:
        raise ReadUnset("an attribute is read that the path does not set")

    __getattr__ = __bool__ = __int__ = __index__ = __float__ = __iter__ = __len__ = __getitem__ = __contains__ = _read
    __call__ = __str__ = __repr__ = __format__ = __neg__ = __round__ = _read
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = _read
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _read
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _read


class ReadUnset(Untraceable):
    """A forward depends on what was chosen before."""


UNSET = Unset()


def unset_like(value: Any) -> Any:
    """What stands for `value`; a list keeps its length, since its entries may be set one by one."""
    return [UNSET] * len(value) if type(value) is list else UNSET


def frozen(value: Any, names: Mapping[int, str]) -> Hashable:
    """A value to compare with others: plain ones by what they are, modules by their names, all else by identity."""
    if value is UNSET:
        return "unset"
    if type(value) in (list, tuple):
        return type(value), tuple(frozen(each, names) for each in value)
    if isinstance(value, dict):
        return dict, tuple((frozen(key, names), frozen(each, names)) for key, each in value.items())
    if type(value) is set and is_plain(value):
        return set, frozenset(value)
    if id(value) in names:
        return nn.Module, names[id(value)]
    return (type(value), value) if is_plain(value) else (object, id(value))


class ModuleState:
    """The state of modules as it is when this is made, but for the values of tensors and the attributes left out."""

    def __init__(self, modules: Mapping[str, nn.Module], left_out: Mapping[str, Collection[str]]) -> None:
        self._modules, self._left_out = dict(modules), left_out
        self._children = [dict(module._modules) for module in modules.values()]
        self._found = self._attributes()
        classes = {cls for module in modules.values() for cls in type(module).__mro__[:-1]}
        self._classes = [(cls, _class_state(cls)) for cls in classes if not cls.__module__.startswith("torch.")]

    def has_children(self) -> bool:
        """Whether each module still has the children that it had."""
        return all(
            module._modules == children for module, children in zip(self._modules.values(), self._children, strict=True)
        )

    def holds(self) -> bool:
        """Whether the rest is as it was."""
        try:
            return self._attributes() == self._found and all(state.holds(cls) for cls, state in self._classes)
        except Exception:  # what cannot be compared has changed
            return False

    def _attributes(self) -> list[Any]:
        found: list[Any] = []
        for name, module in self._modules.items():
            left_out = self._left_out.get(name, ())
            attributes = vars(module)
            found.append(type(module))
            for key, value in attributes.items():
                if key not in OF_ANY_MODULE and key not in left_out:
                    found.append((key, copied(value) if is_plain(value) else id(value)))
            if module._forward_hooks or module._forward_pre_hooks or "forward" in attributes:
                found.append(
                    (tuple(module._forward_hooks), tuple(module._forward_pre_hooks), attributes.get("forward"))
                )
            for store in (module._parameters, module._buffers):
                found += [(key, None if tensor is None else tensor.shape) for key, tensor in store.items()]
        return found


def copied(value: Any) -> Any:
    """The value, with containers of its own."""
    if type(value) in (list, tuple, set):
        return type(value)(map(copied, value))
    return {key: copied(each) for key, each in value.items()} if type(value) is dict else value
