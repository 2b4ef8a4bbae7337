"""What is not understood is refused with a reason, and looking at a module disturbs nothing."""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recognised import Calls, Residual, assert_generators, conv, filled, generator_states, plain, reason
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

from greedynas_ext import recognise
from greedynas_ext.packing import InvertedBottleneckWeights
from greedynas_ext.recognise import (
    recognise_operation,
)


def changed(index: int, part: nn.Module) -> nn.Module:
    module = plain()
    module[index] = part
    return module


def setting(module: nn.Module, name: str, value: object) -> nn.Module:
    setattr(module, name, value)
    return module


class Conv(nn.Conv2d):
    pass


class Act(nn.ReLU6):
    pass


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class TensorOfAKind(Tensor):
    pass


def used_twice() -> nn.Module:
    module = plain(cin=4, hidden=4)
    module[6] = module[0]
    return module


def hooked(index: int, before: bool) -> nn.Module:
    module = plain()
    if before:
        module[index].register_forward_pre_hook(lambda module, args: None)
    else:
        module[index].register_forward_hook(lambda module, args, output: None)
    return module


def of_a_kind() -> nn.Module:
    module = plain()
    module[0].weight = nn.Parameter(module[0].weight.detach().as_subclass(TensorOfAKind))
    return module


def scripted() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(nn.Sequential(nn.ReLU()))


class Hostile(nn.Module):
    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError("no\nattributes")


REFUSALS: list[tuple[str, Callable[[], Any]]] = [
    ("not a module", lambda: F.relu),
    ("not a module", lambda: None),
    (
        "3: expected padding_mode zeros, got reflect",
        lambda: changed(3, conv(12, 12, 3, groups=12, padding_mode="reflect")),
    ),
    ("3: expected dilation 1", lambda: changed(3, conv(12, 12, 3, groups=12, dilation=2, padding=1))),
    ("3: expected padding 1", lambda: changed(3, conv(12, 12, 3, groups=12, padding=0))),
    ("3: expected padding 1", lambda: changed(3, conv(12, 12, 3, groups=12, padding=(1, 0)))),
    ("3: expected one stride", lambda: changed(3, conv(12, 12, 3, stride=(1, 2), groups=12))),
    ("3: expected groups 1 or as many", lambda: changed(3, conv(12, 12, 3, groups=4))),
    ("3: expected groups 1 or as many", lambda: changed(3, conv(12, 24, 3, groups=12))),
    ("3: expected a depthwise convolution", lambda: changed(3, conv(12, 12, 3))),
    ("3: expected a depthwise convolution of 3x3", lambda: changed(3, conv(12, 12, 9, groups=12))),
    ("3: expected a square kernel of odd size, got 2x2", lambda: changed(3, conv(12, 12, 2, groups=12))),
    (
        "3: expected a square kernel of odd size, got 3x5",
        lambda: changed(3, nn.Conv2d(12, 12, (3, 5), padding=(1, 2), groups=12)),
    ),
    ("0: expected stride 1, got 2", lambda: changed(0, conv(4, 12, stride=2))),
    ("0: expected a 1x1 convolution", lambda: changed(0, conv(4, 12, 3))),
    ("4.weight: expected [12], got [10]", lambda: changed(4, nn.BatchNorm2d(10))),
    ("5: expected the 1x1 convolution that projects, got bn", lambda: changed(5, nn.BatchNorm2d(12))),
    ("hardtanh: expected bounds 0 and 6", lambda: changed(5, nn.Hardtanh(-1, 6))),
    ("gelu", lambda: changed(5, nn.GELU())),
    ("is used twice", used_twice),
    ("writes to the module's input", lambda: nn.Sequential(nn.ReLU6(inplace=True), plain())),
    ("writes to the module's input", lambda: Residual("writes to input")),
    ("writes to the module's input", lambda: Residual("method on input")),
    ("alpha 1", lambda: Residual("scaled")),
    ("of another value", lambda: Residual("of itself")),
    ("two tensors of one shape", lambda: Residual(branch=plain(stride=2))),
    ("two tensors of one shape", lambda: Residual(branch=plain(cout=5))),
    ("1: forward hooks are registered", lambda: hooked(1, before=False)),
    ("2: forward hooks are registered", lambda: hooked(2, before=True)),
    ("0: expected Conv2d itself, got its subclass Conv", lambda: changed(0, Conv(4, 12, 1, bias=False))),
    ("2: expected ReLU6 itself, got its subclass Act", lambda: changed(2, Act())),
    ("forward is replaced on the instance", lambda: setting(plain(), "forward", lambda x: x)),
    ("_conv_forward is replaced", lambda: changed(0, setting(conv(4, 12), "_conv_forward", lambda *args: None))),
    ("is parametrized", lambda: changed(0, parametrizations.weight_norm(conv(4, 12)))),
    ("expected a tensor on the CPU or a GPU, got one on meta", lambda: changed(0, conv(4, 12, device="meta"))),
    ("expected float32, bfloat16 or float64, got float16", lambda: plain().half()),
    ("expected tensors of one dtype, got float64 (0.weight), float32", lambda: changed(0, conv(4, 12).double())),
    ("expected a plain tensor, got TensorOfAKind", of_a_kind),
    ("is a scripted module", scripted),
    ("missing 1 required positional argument", TwoInputs),
    ("is compiled", lambda: setting(plain(), "_compiled_call_impl", lambda x: x)),
    ("forward depends on data", lambda: Calls(lambda m, x: m.block(x) if x.sum() > 0 else x)),
    ("forward depends on data", lambda: Calls(lambda m, x: next(m.block(each) for each in x))),
    ("outside Conv2d, BatchNorm2d and Linear", lambda: Calls(lambda m, x: m.block(x) * m.weight)),
    ("outside Conv2d, BatchNorm2d and Linear", lambda: Calls(lambda m, x: F.conv2d(x, m.block[0].weight))),
    ("outside Conv2d, BatchNorm2d and Linear", lambda: Calls(lambda m, x: m.block(x) + CONSTANT)),
    ("calls add_ on something else", lambda: Calls(lambda m, x: (m.count.add_(1), m.block(x))[1])),
    ("calls mul_ on something else", lambda: Calls(lambda m, x: (CONSTANT.mul_(2), m.block(x))[1])),
    ("calls rand on something else", lambda: Calls(lambda m, x: (torch.rand(1), m.block(x))[1])),
    ("draws random numbers", lambda: Calls(lambda m, x: m.block(x) if random.random() < 2 else x)),
    ("draws random numbers", lambda: Calls(lambda m, x: m.block(x) if np.random.rand() < 2 else x)),
    ("draws random numbers", lambda: Calls(lambda m, x: (torch.manual_seed(3), m.block(x))[1])),
    ("forward: KeyError", lambda: Calls(lambda m, x: {}["nothing"])),
    ("expected a tensor computed from the input, got tuple", lambda: Calls(lambda m, x: (m.block(x), x))),
    ("expected a tensor computed from the input, got NoneType", lambda: Calls(lambda m, x: None)),
    ("sets the attribute data", lambda: Calls(lambda m, x: setattr(x, "data", x * 2) or m.block(x))),
    ("relu: its result is not used", lambda: Calls(lambda m, x: (F.relu(x), m.block(x))[1])),
    ("is used twice", lambda: Calls(lambda m, x: m.block(x) + m.block(x))),
    ("calls shape on something else", lambda: Calls(lambda m, x: m.block(x) if m.weight.shape[0] else x)),
    ("0: forward hooks are registered", lambda: changed(0, nn.LazyConv2d(12, 1, bias=False))),
    ("overwritten", lambda: Calls(lambda m, x: (lambda y: (y.relu_(), y)[1])(m.block(x)))),
    ("expected a tensor, got", lambda: Calls(lambda m, x: x.shape)),
    ("expected a tensor that is not reshaped", lambda: Calls(lambda m, x: m.block(x).mean((2, 3)).unsqueeze(2))),
    ("add: ", lambda: Calls(lambda m, x: m.block(x) + 1)),
    ("sub", lambda: Calls(lambda m, x: x - m.block(x))),
    ("permute", lambda: Calls(lambda m, x: m.block(x.permute(0, 1, 3, 2)))),
    ("training=True", lambda: Calls(lambda m, x: F.dropout(m.block(x)))),
    ("expected the end, got act", lambda: nn.Sequential(plain(), nn.ReLU(), nn.ReLU())),
    ("got the end", lambda: plain()[:7]),
    ("switches autocast", lambda: Calls(torch.autocast("cpu", torch.bfloat16)(lambda m, x: m.block(x)))),
    ("ZeroDivisionError: no", lambda: Hostile.__new__(Hostile)),
]
CONSTANT = torch.ones(1)


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_refusals(number: int) -> None:
    text, make = REFUSALS[number]
    module = make()
    before, states = CONSTANT.clone(), generator_states()
    for _ in range(2):
        assert text in reason(recognise_operation(module, 4))
    assert torch.equal(CONSTANT, before)
    assert_generators(states)


@pytest.mark.parametrize(
    "register", [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook]
)
def test_global_hooks_are_refused(register: Callable[..., Any]) -> None:
    module = plain()
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)
    handle = register(lambda *args: None)
    try:
        assert reason(recognise_operation(module, 4)) == "global forward hooks are registered"
    finally:
        handle.remove()
    assert not torch_module._global_forward_hooks
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)


@pytest.mark.parametrize(
    ("cls", "name"), [(nn.Conv2d, "_conv_forward"), (nn.BatchNorm2d, "forward"), (nn.Module, "__call__")]
)
def test_patched_classes_of_torch_are_refused(monkeypatch: pytest.MonkeyPatch, cls: type, name: str) -> None:
    module = plain()
    weights = recognise_operation(module, 4)
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, lambda *args: args[1])
        assert reason(recognise_operation(module, 4)) == f"{cls.__name__}.{name} is patched"
    assert recognise_operation(module, 4) == weights


# ---------------------------------------------------------------- nothing is disturbed


class Recorder(nn.Module):
    """Keeps what it is given in a list and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.calls = 0
        self.block = plain()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        self.calls += 1
        return self.block(x)


def test_the_module_is_left_alone() -> None:
    module = Recorder()
    for number, each in enumerate(module.modules()):
        each.training = number % 2 == 0
    flags = [each.training for each in module.modules()]
    state = copy.deepcopy(module.state_dict())
    versions = [tensor._version for tensor in module.state_dict(keep_vars=True).values()]
    attributes = [(each, dict(vars(each))) for each in module.modules()]
    states = generator_states()
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)
    assert [each.training for each in module.modules()] == flags
    assert all(vars(each) == before for each, before in attributes)
    assert (module.seen, module.calls) == ([], 0)
    assert [tensor._version for tensor in module.state_dict(keep_vars=True).values()] == versions
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert_generators(states)


def test_other_threads_are_left_alone() -> None:
    """One thread trains the module while others describe it."""
    module = filled(Residual())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = module(x)
    stop, wrong = threading.Event(), []

    def evaluate() -> None:
        while not stop.is_set():
            try:
                same = torch.equal(module(x), expected)
                training = all(each.training for each in module.modules())
            except Exception as error:
                wrong.append(error)
                return
            if not same or not training:
                wrong.append((same, training))

    def describe() -> None:
        for _ in range(60):
            recognise._cache._entries.pop(module, None)
            found = recognise_operation(module, 4)
            if not isinstance(found, InvertedBottleneckWeights):
                wrong.append(found)

    evaluating = threading.Thread(target=evaluate)
    describing = [threading.Thread(target=describe) for _ in range(2)]
    for thread in (evaluating, *describing):
        thread.start()
    for thread in describing:
        thread.join()
    stop.set()
    evaluating.join()
    assert not wrong


def test_a_value_passes_for_a_tensor() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = plain()

        def forward(self, x: Any) -> Any:
            if not isinstance(x, Tensor) or hasattr(x, "tensors"):
                return x
            return self.block(x)

    assert isinstance(recognise_operation(Asks(), 4), InvertedBottleneckWeights)
