"""Writes down what a supernet's forward does for one path: which modules it calls, in which order, on which values.

The supernet does not run. As in `fx_trace`, a shadow of it is called on a symbol: objects of the same classes with the
same attributes, made when they are first reached. Modules named in `opened` run their own forward, any other module
writes down that it was called. So candidates need not be understood, only found.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules import module as torch_module

from greedynas_ext import isolation
from greedynas_ext.adapt_parts import Part, parts_of
from greedynas_ext.fx_trace import (
    Recorder,
    Untraceable,
    ValueTracer,
    first_line,
    named_modules,
    put_back,
    stand_in,
)

Run: TypeAlias = Callable[[nn.Module, Any], Any]

_CPU = torch.device("cpu")
_ATTEMPTS = 3


class NeedsOpening(Untraceable):
    """A module is told what to choose, so its own forward has to run."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: chooses by an argument")
        self.name = name


class Chosen(int):
    """An option of a layer, as a forward is told; also answers as the element of a tensor does."""

    def item(self) -> int:
        """Itself."""
        return int(self)


class ChosenPath(list[Any]):
    """A path, as a forward is told."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return ChosenPath(found) if isinstance(index, slice) else found

    def tolist(self) -> list[Any]:
        """Itself."""
        return self


class Supernet:
    """A module to be traced, and the names of the modules in it.

    Attributes:
        pick: the logits among what forward returns.
    """

    def __init__(self, module: nn.Module, pick: Callable[[Any], Any] = lambda returned: returned) -> None:
        self.module, self.pick = module, pick
        self.names = {id(each): name for name, each in named_modules(module)}
        self.modules = dict(named_modules(module))
        self.by_position: set[str] = set()  # dictionaries of modules that were indexed by a number in a trace

    def name_of(self, module: nn.Module, reached_as: str) -> str:
        """The name of a module; of one that was not registered at first, how it was reached."""
        name = self.names.get(id(module))
        if name is None:
            name = reached_as
            while name in self.modules:  # in the place of another
                name += "'"
            self.names[id(module)], self.modules[name] = name, module
        return name

    def trace(self, run: Run, opened: frozenset[str], start: nn.Module | None = None) -> tuple[Part, ...]:
        """What `run(shadow, input)` does, cut wherever a single value is all that what follows needs.

        The shadow is that of `start`, a module of the supernet; None: of the supernet.

        Raises:
            NeedsOpening: where a module that is not opened is told what to choose.
            Untraceable: saying why, from the exception that stopped it.
        """
        return without_chance(lambda: self._trace(run, opened, self.module if start is None else start))

    def inside(self, name: str) -> tuple[Part, ...]:
        """What the forward of the module `name` does. Raises Untraceable."""
        return self.trace(lambda shadow, images: shadow(images), frozenset([name]), self.modules[name])

    def _trace(self, run: Run, opened: frozenset[str], start: nn.Module) -> tuple[Part, ...]:
        tracer = SupernetTracer(fx.Graph())
        shadows = Shadows(self, tracer, opened)
        with reasons(), Recorder():
            output = run(shadows.of(start, ""), tracer.create_proxy("placeholder", "input", (), {}))
            if start is self.module:
                output = self.pick(output)
        parts = finished(tracer, output)
        meddled = sorted(shadows.switched() - opened)
        if meddled:
            raise Untraceable(f"forward sets what {meddled[0]} does")
        return parts

    def switched(self, actions: Sequence[Callable[[nn.Module], Any]]) -> set[str]:
        """Names of the modules whose attributes any of `actions`, called on a shadow, sets to something else.

        Raises:
            Untraceable: where an action fails on a shadow.
        """
        shadows = Shadows(self, SupernetTracer(fx.Graph()), frozenset())
        root = shadows.of(self.module, "")
        names: set[str] = set()
        for action in actions:
            try:
                with Recorder():
                    action(root)
            except Untraceable:
                raise
            except Exception as error:
                raise Untraceable(first_line(error)) from error
            names |= shadows.switched()
        return names


_Found = TypeVar("_Found")


def without_chance(trace: Callable[[], _Found]) -> _Found:
    """What `trace` gives. Raises Untraceable where it draws random numbers; generators are put back."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise Untraceable("global forward hooks are registered")
    for _ in range(_ATTEMPTS):
        generators = isolation._generator_states(_CPU)
        try:
            found = trace()
        finally:
            drawn = put_back(generators)
        if not drawn:
            return found
    raise Untraceable("forward draws random numbers")


@contextlib.contextmanager
def reasons() -> Iterator[None]:
    """Raises Untraceable for anything that stops a forward on symbols."""
    try:
        yield
    except Untraceable:
        raise
    except TraceError as error:
        raise Untraceable("forward depends on data") from error
    except Exception as error:
        raise Untraceable(f"forward: {first_line(error)}") from error


def finished(tracer: SupernetTracer, output: Any) -> tuple[Part, ...]:
    """The parts that lead to `output`. Raises Untraceable where that is no symbol."""
    if not isinstance(output, fx.Proxy):
        raise Untraceable(f"forward: expected one tensor computed from the images, got {type(output).__name__}")
    tracer.create_node("output", "output", (output.node,), {})
    return parts_of(tracer.graph)


_PLAIN = (type(None), bool, int, float, str)


def is_plain(value: Any) -> bool:
    """Whether it is a number, a text or None, or a container of such."""
    if type(value) in (list, tuple, set):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return isinstance(value, _PLAIN)


class SupernetTracer(ValueTracer):
    """Also takes the tensors of opened modules as arguments, by name."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.tensors: dict[int, tuple[Tensor, tuple[str, str]]] = {}  # stand-ins, kept alive, and what they are

    def create_arg(self, a: Any) -> Any:
        """The name of a tensor that is known; of anything else what the graph keeps."""
        if not issubclass(type(a), fx.Proxy) and isinstance(a, Tensor) and id(a) in self.tensors:
            return self.create_node("get_attr", ":".join(self.tensors[id(a)][1]), (), {})
        return super().create_arg(a)


_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
_SHADOWED = frozenset((*_HOOKS, "training", "_compiled_call_impl", "forward"))


class Shadows:
    """Shadows of a module and of those in it."""

    def __init__(self, supernet: Supernet, tracer: SupernetTracer, opened: frozenset[str]) -> None:
        self.supernet, self._tracer, self._opened = supernet, tracer, opened
        self._made: dict[int, nn.Module] = {}
        self._own: set[int] = set()
        self._pairs: list[tuple[nn.Module, nn.Module]] = []

    def of(self, module: nn.Module, reached_as: str) -> nn.Module:
        """The shadow of `module`; a shadow is its own."""
        if id(module) in self._own:
            return module
        if id(module) in self._made:
            return self._made[id(module)]
        name = self.supernet.name_of(module, reached_as)
        shadow = self._made[id(module)] = object.__new__(type(module))
        self._own.add(id(shadow))
        self._pairs.append((module, shadow))
        with torch._C.DisableTorchFunction():  # past the recorder
            shadow.__dict__.update(self._attributes(module, name))
        return shadow

    def switched(self) -> set[str]:
        """Names of the modules whose shadows have another plain attribute than they have."""
        names = set()
        for module, shadow in self._pairs:
            mine, own = vars(shadow), vars(module)
            ours = [key for key in mine if key not in _SHADOWED and is_plain(mine[key])]
            if any(key not in own or not is_plain(own[key]) or mine[key] != own[key] for key in ours):
                names.add(self.supernet.names[id(module)])
        return names

    def _attributes(self, module: nn.Module, name: str) -> dict[str, Any]:
        prefix = f"{name}." if name else ""
        attributes = {
            key: self._separate(value, prefix + key)
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        for store in ("_parameters", "_buffers"):
            tensors = getattr(module, store).items()
            attributes[store] = {key: self._stand_in(tensor, (name, key)) for key, tensor in tensors}
        attributes["_modules"] = _Children(self, module, prefix)
        for hooks in _HOOKS:
            attributes[hooks] = OrderedDict()  # a call of the module itself runs them
        attributes["training"] = False
        attributes["_compiled_call_impl"] = None
        forward = self._forward(module, name)
        if forward is not None:
            attributes["forward"] = forward
        return attributes

    def _forward(self, module: nn.Module, name: str) -> Callable[..., Any] | None:
        """What a call of the shadow runs; None: the module's own forward."""
        if name in self._opened:
            self._check_open(module, name)
            return None
        return self._recorded(name) if type(module).forward is not nn.Module.forward else None

    def _check_open(self, module: nn.Module, name: str) -> None:
        where = f"{name}: " if name else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise Untraceable(f"{where}is a scripted module")
        if "forward" in vars(module):
            raise Untraceable(f"{where}forward is replaced on the instance")
        if vars(module).get("_compiled_call_impl") is not None:
            raise Untraceable(f"{where}is compiled")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Untraceable(f"{where}forward hooks are registered")

    def _recorded(self, name: str) -> Callable[..., fx.Proxy]:
        def forward(*args: Any, **kwargs: Any) -> fx.Proxy:
            if any(isinstance(value, Chosen | ChosenPath) for value in (*args, *kwargs.values())):
                raise NeedsOpening(name)
            return self._tracer.create_proxy("call_module", name, args, kwargs)

        return forward

    def _stand_in(self, tensor: Tensor | None, place: tuple[str, str]) -> Tensor | None:
        substitute = stand_in(tensor)
        if substitute is not None:
            self._tracer.tensors[id(substitute)] = substitute, place
        return substitute

    def _separate(self, value: Any, place: str) -> Any:
        """A forward that writes to a container must not reach the module's own."""
        if isinstance(value, nn.Module):
            return self.of(value, place)
        if isinstance(value, Tensor):
            return stand_in(value)
        if type(value) in (list, tuple, set):
            return type(value)(self._separate(each, f"{place}[{n}]") for n, each in enumerate(value))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._separate(each, f"{place}[{key!r}]")) for key, each in value.items())
        return value


class _Children(dict[Any, Any]):
    """A module's children, shadowed as they are asked for. An nn.ModuleDict's may be asked for by position."""

    def __init__(self, shadows: Shadows, module: nn.Module, prefix: str) -> None:
        super().__init__(module._modules)
        self._shadows, self._prefix = shadows, prefix
        self._by_position = isinstance(module, nn.ModuleDict)

    def _key(self, key: Any) -> Any:
        if self._by_position and isinstance(key, int):
            self._shadows.supernet.by_position.add(self._prefix.removesuffix("."))
            return list(self)[key]
        return key

    def _shadow(self, key: str, child: nn.Module | None) -> nn.Module | None:
        return None if child is None else self._shadows.of(child, self._prefix + key)

    def __getitem__(self, key: Any) -> Any:
        key = self._key(key)
        return self._shadow(key, super().__getitem__(key))

    def __contains__(self, key: Any) -> bool:
        if self._by_position and isinstance(key, int):
            return 0 <= key < len(self)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]
