"""An evaluation leaves no trace: training flags, buffers, random generators and Ctrl-C while modules run.

Nothing here copies a supernet. Flags are switched for the time of the run and put back; several threads may evaluate
one supernet at once, so the flags are counted; and since an interrupt must not fall between the switching and the
putting back, it is held and delivered at the next safe point.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

_lock = threading.Lock()
# module -> [evaluations that hold it in evaluation mode, its own flag]
_held: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


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

    Put back are training flags, buffers that a forward writes to, and the states of the random generators of torch
    (CPU and `device`), numpy and Python. A parameter that was written to is reported with RuntimeError, since it
    cannot be restored without copying all of them.
    """
    every = _all_modules(modules)
    parameters = [(name, p, p._version) for m in every for name, p in m._parameters.items() if p is not None]
    buffers = _copy_buffers(every)
    generators = _generator_states(device)
    _enter_evaluation(every)
    try:
        yield
    finally:
        _leave_evaluation(every)
        _restore_buffers(buffers)
        _restore_generators(generators, device)
    for name, parameter, version in parameters:
        if parameter._version != version:
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


def _enter_evaluation(modules: Sequence[nn.Module]) -> None:
    with _lock:
        for module in modules:
            entry = _held.setdefault(module, [0, module.training])
            entry[0] += 1
            if module.training:
                module.training = False


def _leave_evaluation(modules: Sequence[nn.Module]) -> None:
    with _lock:
        for module in modules:
            entry = _held[module]
            entry[0] -= 1
            if entry[0] == 0:
                if module.training != entry[1]:
                    module.training = entry[1]
                del _held[module]


# the dictionary that holds a buffer, its name, the tensor, a copy
_Buffer = tuple[dict[str, Tensor | None], str, Tensor, Tensor]


def _copy_buffers(modules: Sequence[nn.Module]) -> list[_Buffer]:
    # The running statistics of a batch normalisation are safe: see intercept.py.
    return [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in modules
        if not isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _restore_buffers(buffers: Sequence[_Buffer]) -> None:
    for owner, name, tensor, copy in buffers:
        if owner.get(name) is not tensor:
            owner[name] = tensor
        if not torch.equal(tensor, copy):
            with torch.no_grad():
                tensor.copy_(copy)


def _generator_states(device: torch.device) -> tuple[Any, ...]:
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), accelerator, random.getstate(), np.random.get_state(legacy=False)


def _restore_generators(states: tuple[Any, ...], device: torch.device) -> None:
    torch_state, accelerator, python_state, numpy_state = states
    drawn = not torch.equal(torch.get_rng_state(), torch_state)
    if drawn:
        torch.set_rng_state(torch_state)
    if accelerator is not None and not torch.equal(torch.cuda.get_rng_state(device), accelerator):
        drawn = True
        torch.cuda.set_rng_state(accelerator, device)
    if random.getstate() != python_state:
        drawn = True
        random.setstate(python_state)
    now: Any = np.random.get_state(legacy=False)
    if now["state"]["pos"] != numpy_state["state"]["pos"] or not np.array_equal(
        now["state"]["key"], numpy_state["state"]["key"]
    ):
        drawn = True
        np.random.set_state(numpy_state)
    if drawn:
        warnings.warn(
            "supernet: random numbers were drawn while paths were evaluated (in this thread or another), so an "
            "operation's output may depend on chance; the generators were put back",
            RuntimeWarning,
            stacklevel=4,
        )
