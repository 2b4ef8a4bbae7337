"""Keeps what was found out about a module for as long as the module is what it was.

A fingerprint is compared at every look, so it must be cheap: one pass over the modules, in which each comparison of
many values is a single call. It holds tensors and plain values but no module, so that it keeps no module alive.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Hashable
from operator import itemgetter
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_Value = TypeVar("_Value")

# A larger number of modules, or modules that contain themselves, is not worth looking after.
_MOST_MODULES = 1000
_STRUCTURE = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
# What does not bear on the outputs of a forward.
_IGNORED = frozenset(
    [
        "training",
        "_non_persistent_buffers_set",
        "_backward_pre_hooks",
        "_backward_hooks",
        "_is_full_backward_hook",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    ]
)
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


class _Opaque(Exception):
    """An attribute whose changes cannot be seen."""


class _ClassState:
    """The attributes of a class as they were; shared by the fingerprints of its instances."""

    __slots__ = ("__weakref__", "attributes")

    def __init__(self, cls: type) -> None:
        self.attributes = {name: _unshared(value) for name, value in cls.__dict__.items()}

    def holds(self, cls: type) -> bool:
        return bool(cls.__dict__ == self.attributes)


_class_states: WeakValueDictionary[type, _ClassState] = WeakValueDictionary()


def _class_state(cls: type) -> _ClassState:
    state = _class_states.get(cls)
    with contextlib.suppress(Exception):  # an attribute that cannot be compared has changed
        if state is not None and state.holds(cls):
            return state
    state = _class_states[cls] = _ClassState(cls)
    return state


def _unshared(value: Any) -> Any:
    """A copy of a container of plain values, anything else itself."""
    try:
        return _copied(value)
    except _Opaque:
        return value


class Fingerprint:
    """All that decides what a module computes, except for the values of its tensors.

    That is, for the module and those in it: classes and their attributes, names and identity of parameters and
    buffers, their shapes, dtypes and device, attributes of the instances, and that no forward hook is registered.
    Training flags are left out. What a forward reads from anywhere else, such as global variables, is not seen.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        """Raises _Opaque for an attribute that is no plain value, class, function or container of such."""
        self._parts = [_part(module) for module in modules]
        self._names: list[str] = []
        self._tensors: list[Tensor | None] = []
        classes: dict[type, None] = {}
        for module in modules:
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                self._names.extend(store)
                self._tensors.extend(store.values())
            self._names.extend(name for name, child in module._modules.items() if child is not None)
            classes.update(dict.fromkeys(type(module).__mro__[:-1]))
        self._ids = list(map(id, self._tensors))
        self._present = [tensor for tensor in self._tensors if tensor is not None]
        self._kinds = _kinds(self._present)
        self._classes = [(cls, _class_state(cls)) for cls in classes]

    @classmethod
    def of(cls, module: nn.Module) -> Fingerprint | None:
        """The fingerprint of `module`, or None where changes of it might not be seen."""
        modules = [module]
        for each in modules:
            modules.extend(child for child in each._modules.values() if child is not None)
            if len(modules) > _MOST_MODULES:
                return None
        try:
            return cls(modules)
        except _Opaque:
            return None

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` still has this fingerprint."""
        try:
            return self._matches(module)
        except Exception:  # an attribute that cannot be compared has changed
            return False

    def _matches(self, module: nn.Module) -> bool:
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        modules = [module]
        names: list[str] = []
        tensors: list[Tensor | None] = []
        for each, (cls, sizes, values_of, plain) in zip(modules, self._parts, strict=False):
            attributes = each.__dict__
            parameters, buffers, children, hooks, pre_hooks, *values = values_of(attributes)
            if (len(attributes), len(parameters), len(buffers), len(children)) != sizes or type(each) is not cls:
                return False
            if hooks or pre_hooks or values != plain:
                return False
            if parameters:
                names += parameters
                tensors += parameters.values()
            if buffers:
                names += buffers
                tensors += buffers.values()
            if children:
                for name, child in children.items():
                    if child is not None:
                        names.append(name)
                        modules.append(child)
        if len(modules) != len(self._parts) or names != self._names or list(map(id, tensors)) != self._ids:
            return False
        if _kinds(self._present) != self._kinds:
            return False
        return all(state.holds(cls) for cls, state in self._classes)


def _part(module: nn.Module) -> tuple[type, tuple[int, int, int, int], Callable[[Any], Any], list[Any]]:
    """Class, numbers of attributes, parameters, buffers, children; how to get plain attributes, and what they are."""
    attributes = vars(module)
    names = [name for name in attributes if name not in _IGNORED and name not in _STRUCTURE]
    sizes = (len(attributes), len(module._parameters), len(module._buffers), len(module._modules))
    return type(module), sizes, itemgetter(*_STRUCTURE, *names), [_copied(attributes[name]) for name in names]


def _copied(value: Any) -> Any:
    """A value to compare with later; containers are copied, since they may be written to."""
    if type(value) in _PLAIN or isinstance(value, type):
        return value
    if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, type | types.ModuleType | None):
        return value
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return value
    if type(value) in (tuple, list, set):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {_copied(key): _copied(each) for key, each in value.items()}
    raise _Opaque


def _kinds(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.shape, tensor.dtype, tensor.is_cpu, type(tensor)) for tensor in tensors]


class Cache(Generic[_Value]):
    """Values by module and key, each valid while its fingerprint matches. For any number of threads."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Fingerprint, _Value]]] = WeakKeyDictionary()

    def get(self, module: nn.Module, key: Hashable) -> _Value | None:
        """The value, or None where there is none or the module has changed since."""
        entry = self._entries.get(module, {}).get(key)
        return entry[1] if entry is not None and entry[0].matches(module) else None

    def put(self, module: nn.Module, key: Hashable, fingerprint: Fingerprint, value: _Value) -> None:
        """Replaces the value of `key`."""
        self._entries.setdefault(module, {})[key] = (fingerprint, value)
