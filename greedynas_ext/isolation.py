"""An evaluation leaves no trace: training flags, buffers, random generators and Ctrl-C while modules run.

Nothing here copies a supernet. Flags are switched for the time of the run and put back; several threads may evaluate
one supernet at once, so the flags are counted; and since an interrupt must not fall between the switching and the
putting back, it is held and delivered at the next safe point.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

# Their forward leaves running statistics alone while batch normalisation is intercepted: see intercept.py.
_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class _Hold:
    """What a module is given back when the last evaluation that uses it ends."""

    evaluations: int
    training: bool
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    copies: dict[str, Tensor]  # of the buffers that a forward may write to


_lock = threading.Lock()
_holds: WeakKeyDictionary[nn.Module, _Hold] = WeakKeyDictionary()


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Holds SIGINT back; the yielded function delivers one that came, and is called wherever that is safe.

    Only the main thread receives signals; elsewhere there is nothing to hold.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield lambda: None
        return
    pending: list[FrameType | None] = []

    def deliver() -> None:
        if pending:
            frame = pending[0]
            pending.clear()
            previous(signal.SIGINT, frame)

    signal.signal(signal.SIGINT, lambda _signal, frame: pending.append(frame))
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, previous)
        deliver()


@contextlib.contextmanager
def undisturbed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Runs its body with `modules` in evaluation mode and puts everything back, also after an exception.

    Put back are training flags, buffers that a forward writes to, replaces or registers, and the states of the random
    generators of torch (CPU and `device`), numpy and Python. A parameter that was written to is reported with
    RuntimeError, since it cannot be restored without copying all of them.
    """
    every = _all_modules(modules)
    versions = [(name, p, version_of(p)) for m in every for name, p in m._parameters.items() if p is not None]
    generators = _generator_states(device)
    held: list[nn.Module] = []
    try:
        _hold(every, held)
        yield
    finally:
        _release(held)
        _restore_generators(generators, device)
    for name, parameter, version in versions:
        if version_of(parameter) != version:
            raise RuntimeError(
                f"supernet: expected a forward that leaves its parameters alone, but {name!r} "
                f"{list(parameter.shape)} was written to while its operation ran"
            )


def _all_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    seen: dict[int, nn.Module] = {}
    for module in modules:
        for inner in module.modules():
            seen[id(inner)] = inner
    return list(seen.values())


def version_of(tensor: Tensor) -> int:
    """Grows with each write to the tensor or a view of it; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _hold(modules: Sequence[nn.Module], held: list[nn.Module]) -> None:
    """Switches to evaluation mode; `held` gets each module that has to be released."""
    with _lock:
        for module in modules:
            hold = _holds.get(module)
            if hold is None:
                hold = _holds[module] = _Hold(
                    0, module.training, dict(module._parameters), dict(module._buffers), _copied_buffers(module)
                )
            hold.evaluations += 1
            held.append(module)
            if module.training:
                module.training = False


def _release(held: Sequence[nn.Module]) -> None:
    with _lock:
        for module in held:
            hold = _holds[module]
            hold.evaluations -= 1
            if hold.evaluations > 0:
                continue
            del _holds[module]
            if module.training != hold.training:
                module.training = hold.training
            _put_back(module._parameters, hold.parameters)
            _put_back(module._buffers, hold.buffers)
            for name, copy in hold.copies.items():
                buffer = hold.buffers[name]
                assert buffer is not None
                _restore(buffer, copy)


def _copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    plain = type(module) in _PLAIN_NORMS and "forward" not in module.__dict__
    if plain and not module._forward_hooks and not module._forward_pre_hooks:
        return {}
    return {name: buffer.detach().clone() for name, buffer in module._buffers.items() if buffer is not None}


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """The same names with the same objects, in the same order."""
    if list(now) != list(before) or any(now[name] is not value for name, value in before.items()):
        now.clear()
        now.update(before)


def _restore(tensor: Tensor, copy: Tensor) -> None:
    if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
        tensor.data = copy
        return
    if not bool(((tensor == copy) | ((tensor != tensor) & (copy != copy))).all()):
        with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
            tensor.copy_(copy)


def _generator_states(device: torch.device) -> tuple[Any, ...]:
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), accelerator, random.getstate(), np.random.get_state(legacy=False)


def _restore_generators(states: tuple[Any, ...], device: torch.device) -> None:
    torch_state, accelerator, python_state, numpy_state = states
    drawn = False
    if not torch.equal(torch.get_rng_state(), torch_state):
        drawn = True
        torch.set_rng_state(torch_state)
    if accelerator is not None and not torch.equal(torch.cuda.get_rng_state(device), accelerator):
        drawn = True
        torch.cuda.set_rng_state(accelerator, device)
    if random.getstate() != python_state:
        drawn = True
        random.setstate(python_state)
    if not _equal(np.random.get_state(legacy=False), numpy_state):
        drawn = True
        np.random.set_state(numpy_state)
    if drawn:
        warnings.warn(
            "supernet: random numbers were drawn while paths were evaluated (in this thread or another), so an "
            "operation's output may depend on chance; the generators were put back",
            RuntimeWarning,
            stacklevel=_callers_level(),
        )


def _equal(one: Any, other: Any) -> bool:
    """Of states of numpy generators: nested dictionaries of arrays and numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return bool(np.array_equal(one, other))


def _callers_level() -> int:
    """The stack level, for a warning given by the caller, of the first frame outside this package."""
    inside = (os.path.join(os.path.dirname(__file__), ""), contextlib.__file__)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level
