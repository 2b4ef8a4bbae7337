"""Records what a module computes as a torch.fx graph, without data and without touching the module.

`torch.fx.Tracer` patches `nn.Module` for the whole process while it traces, which would hand proxies to a thread that
evaluates. Here a shadow of the module is called instead: an object of the same class with the same attributes, in
evaluation mode, whose convolutions, batch normalisations and linear layers only write themselves down.
"""

from __future__ import annotations

import dis
import inspect
import random
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from greedynas_ext import isolation

WEIGHTED = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
"""They stand in the graph as calls of a module; anything else is seen through."""

_SEEN_THROUGH = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.Hardsigmoid, nn.Sigmoid),
    *(nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Flatten, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_CPU = torch.device("cpu")
_ATTEMPTS = 3
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# What is relied on without being traced.
_UNPATCHED = [
    (cls, name, getattr(cls, name))
    for cls, names in {
        nn.Module: ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__"),
        nn.Conv2d: ("forward", "_conv_forward"),
        nn.BatchNorm2d: ("forward", "_check_input_dim"),
        nn.Linear: ("forward",),
    }.items()
    for name in names
]


class Untraceable(Exception):
    """A module that cannot be written down; the message is the reason."""


class RandomNumbersDrawn(Exception):
    """Random generators moved while a module was traced."""


@dataclass(frozen=True)
class Trace:
    """A graph with one placeholder and one output; `leaves` are the modules that its call_module nodes name."""

    graph: fx.Graph
    leaves: dict[str, nn.Module]


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, with the first of its names; the root's is empty. No method of the modules is called."""
    seen: set[int] = set()
    pending = [("", module)]
    while pending:
        name, each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield name, each
        children = [(f"{name}.{k}" if name else k, child) for k, child in each._modules.items() if child is not None]
        pending.extend(reversed(children))


def refusal(module: nn.Module) -> str | None:
    """The reason why what `module` computes cannot be told from its graph, or None."""
    for cls, name, original in _UNPATCHED:
        if getattr(cls, name) is not original:
            return f"{cls.__name__}.{name} is patched"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "global forward hooks are registered"
    dtypes: dict[torch.dtype, str] = {}
    for name, each in named_modules(module):
        reason = _module_refusal(each)
        if reason is not None:
            return f"{name}: {reason}" if name else reason
        reason = _tensor_refusal(each, f"{name}." if name else "", dtypes)
        if reason is not None:
            return reason
    if len(dtypes) > 1:
        return f"expected tensors of one dtype, got {', '.join(dtypes.values())}"
    devices = {
        str(tensor.device)
        for _, each in named_modules(module)
        for tensor in (*each._parameters.values(), *each._buffers.values())
        if tensor is not None
    }
    if len(devices) > 1:
        return f"expected tensors on one device, got {', '.join(sorted(devices))}"
    return None


def _module_refusal(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "is a scripted module"
    attributes = vars(module)
    if "forward" in attributes:
        return "forward is replaced on the instance"
    if attributes.get("_compiled_call_impl") is not None:
        return "is compiled"
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks are registered"
    if "parametrizations" in module._modules:
        return "is parametrized"
    cls = type(module)
    if cls in WEIGHTED:
        replaced = [name for name in attributes if callable(getattr(cls, name, None))]
        if replaced:
            return f"{replaced[0]} is replaced on the instance"
    elif cls not in _SEEN_THROUGH and isinstance(module, (*WEIGHTED, *_SEEN_THROUGH)):
        base = next(base for base in cls.__mro__ if base in WEIGHTED or base in _SEEN_THROUGH)
        return f"expected {base.__name__} itself, got its subclass {cls.__name__}"
    return None


def _tensor_refusal(module: nn.Module, prefix: str, dtypes: dict[torch.dtype, str]) -> str | None:
    """Adds the floating dtypes of the module's tensors to `dtypes`, each with a tensor that has it."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if type(tensor) not in (nn.Parameter, Tensor):
            return f"{prefix}{name}: expected a plain tensor, got {type(tensor).__name__}"
        if tensor.device.type not in ("cpu", "cuda"):
            return f"{prefix}{name}: expected a tensor on the CPU or a GPU, got one on {tensor.device}"
        if tensor.layout is not torch.strided:
            return f"{prefix}{name}: expected a strided tensor, got {tensor.layout}"
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype in _DTYPES:
            dtypes.setdefault(tensor.dtype, f"{dtype} ({prefix}{name})")
        elif tensor.dtype.is_floating_point or name in module._parameters:
            return f"{prefix}{name}: expected float32, bfloat16 or float64, got {dtype}"
    return None


def trace(module: nn.Module) -> Trace:
    """The graph of `module(input)` in evaluation mode, for a module without a `refusal`.

    Its forward runs, on a proxy; torch functions on anything else are refused before they run.

    Raises:
        Untraceable: where forward depends on data, or uses tensors other than its input outside `WEIGHTED` modules.
        RandomNumbersDrawn: where forward, or another thread at each of several attempts, drew random numbers.
    """
    for _ in range(_ATTEMPTS):
        generators = isolation._generator_states(_CPU)
        try:
            traced = _trace(module)
        finally:
            drawn = put_back(generators)
        if not drawn:
            return traced
    raise RandomNumbersDrawn("forward draws random numbers")


def _trace(module: nn.Module) -> Trace:
    tracer = _AssertingTracer(fx.Graph())
    try:
        shadow, leaves = _shadow(module, tracer)
        with Recorder():
            output = shadow(tracer.create_proxy("placeholder", "input", (), {}))
    except Untraceable:
        raise
    except TraceError:
        raise Untraceable("forward depends on data") from None
    except Exception as error:
        raise Untraceable(f"forward: {first_line(error)}") from error
    if not isinstance(output, fx.Proxy):
        raise Untraceable(f"forward: expected a tensor computed from the input, got {type(output).__name__}")
    tracer.create_node("output", "output", (output.node,), {})
    return Trace(tracer.graph, leaves)


def first_line(error: Exception) -> str:
    """The type and the first line of the message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def put_back(generators: tuple[Any, ...]) -> bool:
    """Whether random generators had to be put back."""
    now = isolation._generator_states(_CPU)
    drawn = False
    if not torch.equal(now[0], generators[0]):
        drawn = True
        torch.set_rng_state(generators[0])
    if now[2] != generators[2]:
        drawn = True
        random.setstate(generators[2])
    if not isolation._equal(now[3], generators[3]):
        drawn = True
        np.random.set_state(generators[3])
    return drawn


class _Value(fx.Proxy):
    """Passes for a tensor where a forward asks, and tells an operator that writes from one that does not."""

    __class__ = property(lambda self: Tensor)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise Untraceable(f"forward sets the attribute {name} of a tensor")
        super().__setattr__(name, value)

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_method", "add_", (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_method", "mul_", (self, other), {})


def _autocast() -> list[tuple[bool, torch.dtype]]:
    return [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]


class ValueTracer(GraphAppendingTracer):
    """Writes down what is done to symbols; refuses any other tensor."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self._autocast = _autocast()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Raises Untraceable where autocast was switched."""
        if _autocast() != self._autocast:
            raise Untraceable("forward switches autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A symbol that passes for a tensor, or one that stands for a size and does not.

        Where torch reads a size, what passes for a tensor would be taken for one and crash the process.
        """
        return fx.Proxy(node, self) if _is_size(node) else _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        """Raises Untraceable for a tensor."""
        if not issubclass(type(a), fx.Proxy) and isinstance(a, Tensor):
            raise Untraceable("forward uses a tensor other than its input outside Conv2d, BatchNorm2d and Linear")
        return super().create_arg(a)


class _AssertingTracer(ValueTracer):
    """Also writes down what a forward asserts of sizes: a reader that knows them sees to it."""

    def to_bool(self, obj: fx.Proxy) -> bool:
        """True where a size is asserted; raises TraceError anywhere else."""
        frame = inspect.currentframe()
        asked = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
        if asked is None or not _is_size(obj.node) or not _asserts(asked):
            return super().to_bool(obj)
        self.create_node("call_function", asserted, (obj.node,), {})
        return True


def asserted(holds: bool) -> None:
    """Stands in a graph where a forward asserted something of sizes."""
    assert holds


def _asserts(frame: types.FrameType) -> bool:
    """Whether what a frame asks for decides about an AssertionError."""
    instructions = list(dis.get_instructions(frame.f_code))
    asks = next((n for n, each in enumerate(instructions) if each.offset == frame.f_lasti), len(instructions))
    after = [each for each in instructions[asks : asks + 3] if each.opname != "TO_BOOL"]
    if len(after) < 2 or not after[0].opname.startswith("POP_JUMP") or not after[0].opname.endswith("IF_TRUE"):
        return False
    return after[1].opname == "LOAD_ASSERTION_ERROR" or after[1].argval is AssertionError


def _is_size(node: fx.Node) -> bool:
    """Whether a node gives a tensor's shape, or what is computed of it alone."""
    if "is_size" not in node.meta:
        node.meta["is_size"] = _gives_size(node)
    return bool(node.meta["is_size"])


def _gives_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel", "stride", "element_size", "__len__")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1:] in (("shape",), ("ndim",), ("dtype",), ("device",))
    return bool(node.all_input_nodes) and all(map(_is_size, node.all_input_nodes))


class Recorder(TorchFunctionMode):
    """Records torch functions of proxies, past any other mode, and lets no other torch function run."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not any(issubclass(cls, fx.Proxy) for cls in types):
            named = func.__self__ if getattr(func, "__name__", "") == "__get__" else func
            name = getattr(named, "__name__", named)
            raise Untraceable(f"forward calls {name} on something else than its input")
        return fx.Proxy.__torch_function__(func, tuple(types), tuple(args), kwargs)


def _shadow(module: nn.Module, tracer: ValueTracer) -> tuple[nn.Module, dict[str, nn.Module]]:
    named = list(named_modules(module))
    shadows: dict[int, nn.Module] = {id(each): object.__new__(type(each)) for _, each in named}
    leaves: dict[str, nn.Module] = {}
    for name, each in named:
        attributes = {key: _separate(value) for key, value in vars(each).items()}
        for store in ("_parameters", "_buffers"):
            attributes[store] = {key: stand_in(tensor) for key, tensor in getattr(each, store).items()}
        children = each._modules.items()
        attributes["_modules"] = {key: None if child is None else shadows[id(child)] for key, child in children}
        attributes["_backward_hooks"], attributes["_backward_pre_hooks"] = OrderedDict(), OrderedDict()
        attributes["training"] = False
        if type(each) in WEIGHTED:
            leaves[name or "module"] = each
            attributes["forward"] = _recorded(tracer, name or "module")
        shadows[id(each)].__dict__.update(attributes)
    return shadows[id(module)], leaves


def _recorded(tracer: ValueTracer, name: str) -> Callable[[Any], fx.Proxy]:
    def forward(input: Any) -> fx.Proxy:
        return tracer.create_proxy("call_module", name, (input,), {})

    return forward


def _separate(value: Any) -> Any:
    """A forward that writes to a container or a tensor must not reach the module's own."""
    if isinstance(value, Tensor):
        return stand_in(value)
    if type(value) in (list, tuple, set):
        return type(value)(map(_separate, value))
    if type(value) is dict:
        return {key: _separate(each) for key, each in value.items()}
    return value


def stand_in(tensor: Tensor | None) -> Tensor | None:
    """A tensor of the same shape and dtype without values."""
    return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
