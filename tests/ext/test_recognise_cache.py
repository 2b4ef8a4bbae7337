"""Descriptions are kept as long as they hold: a stale one is impossible, and no module is kept alive."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recognised import Calls, Residual, Squeeze, assert_generators, conv, generator_states, plain, reason, same
from torch import Tensor, nn

from greedynas_ext import recognise
from greedynas_ext.packing import InvertedBottleneckWeights
from greedynas_ext.recognise import (
    Unrecognised,
    recognise_operation,
    recognise_stem,
)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The modules that were traced."""
    found: list[nn.Module] = []
    original = recognise.trace

    def trace(module: nn.Module) -> Any:
        found.append(module)
        return original(module)

    monkeypatch.setattr(recognise, "trace", trace)
    yield found
    found.clear()


def replace_conv(module: Residual) -> None:
    module.branch[2][0] = conv(12, 12, 5, groups=12)


def replace_parameter(module: Residual) -> None:
    module.branch[0][0].weight = nn.Parameter(torch.zeros(12, 4, 1, 1))


def swap_data(module: Residual) -> None:
    module.branch[0][0].weight.data = torch.zeros(12, 5, 1, 1)


def convert(module: Residual) -> None:
    module.double()


def swap_buffer(module: Residual) -> None:
    module.branch[0][1].running_mean = torch.ones(12)


def swap_none(module: Residual) -> None:
    module.branch[0][1].register_parameter("bias", None)


def swap_equal(module: Residual) -> None:
    """Equal values in another Parameter."""
    module.branch[0][1].bias = nn.Parameter(module.branch[0][1].bias.detach().clone())


CHANGES: list[tuple[str, Callable[[Residual], Any]]] = [
    ("stride", lambda m: setattr(m.branch[2][0], "stride", (2, 2))),
    ("eps", lambda m: setattr(m.branch[0][1], "eps", 0.5)),
    ("conv", replace_conv),
    ("parameter", replace_parameter),
    ("equal parameter", swap_equal),
    ("data of another shape", swap_data),
    ("data of another dtype", convert),
    ("buffer", swap_buffer),
    ("no bias", swap_none),
    ("attribute", lambda m: setattr(m, "use_residual", False)),
    ("order of the sum", lambda m: setattr(m, "how", "scaled")),
    ("hook", lambda m: m.branch[0].register_forward_hook(lambda *args: None)),
    ("pre-hook", lambda m: m.register_forward_pre_hook(lambda *args: None)),
    ("another part", lambda m: m.branch.append(nn.ReLU())),
    ("part left out", lambda m: m.branch[2].__delitem__(2)),
    ("another class", lambda m: setattr(m.branch[0][2], "__class__", nn.Identity)),
    ("forward of the instance", lambda m: setattr(m, "forward", lambda x: x)),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_change_is_seen(number: int) -> None:
    module = Residual()
    before = recognise_operation(module, 4)
    assert isinstance(before, InvertedBottleneckWeights), before
    assert recognise_operation(module, 4) is before
    CHANGES[number][1](module)
    after = recognise_operation(module, 4)
    recognise._cache._entries.pop(module, None)
    fresh = recognise_operation(module, 4)
    assert after is not before
    assert same(after, fresh)
    assert not same(after, before)


def test_what_is_known_is_not_traced_again(traces: list[nn.Module]) -> None:
    module, odd = Residual(), nn.Sequential(nn.GELU())
    for _ in range(3):
        recognise_operation(module, 4)
        recognise_operation(odd, 4)
        module.train(not module.training)
        with torch.no_grad():
            module.branch[0][0].weight.add_(1)
        module.branch[0][1].weight.data = torch.rand(12)
        module.branch[0][0].weight.grad = torch.ones(12, 4, 1, 1)
    assert traces == [module, odd]
    assert isinstance(recognise_stem(module), Unrecognised)
    assert isinstance(recognise_operation(module, 5), Unrecognised)
    assert len(traces) == 4
    recognise_operation(module, 4)
    assert len(traces) == 4


def test_a_patched_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Residual()
    assert recognise_operation(module, 4).residual
    with monkeypatch.context() as patch:
        patch.setattr(Residual, "forward", lambda self, x: self.branch(x))
        assert not recognise_operation(module, 4).residual
    assert recognise_operation(module, 4).residual


def test_attributes_of_the_class_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Switched(nn.Module):
        options = {"residual": [True]}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.block = plain()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.block(x) if self.options["residual"][0] else self.block(x)

    module = Switched()
    assert recognise_operation(module, 4).residual
    Switched.options["residual"][0] = False
    assert not recognise_operation(module, 4).residual


def test_containers_are_looked_into(traces: list[nn.Module]) -> None:
    class Switched(nn.Module):
        def __init__(self, options: Any) -> None:
            super().__init__()
            self.block, self.options = plain(), options

        def forward(self, x: Tensor) -> Tensor:
            options = self.options
            return x + self.block(x) if getattr(options, "residual", None) or options == [1] else self.block(x)

    class Options:
        residual = False

    module = Switched([1])
    assert recognise_operation(module, 4).residual
    assert recognise_operation(module, 4).residual
    assert len(traces) == 1
    module.options[0] = 2
    assert not recognise_operation(module, 4).residual
    assert len(traces) == 2

    # What cannot be looked into is traced again.
    module = Switched(Options())
    assert not recognise_operation(module, 4).residual
    module.options.residual = True
    assert recognise_operation(module, 4).residual


def test_random_numbers_of_another_thread_are_not_held_against_a_module() -> None:
    """They only make it try again."""
    calls: list[int] = []

    def function(module: Any, x: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            random.random()
        return module.block(x)

    module = Calls(function)
    states = generator_states()
    assert isinstance(recognise_operation(module, 4), InvertedBottleneckWeights)
    assert len(calls) == 2
    assert_generators(states)


def test_modules_that_contain_themselves() -> None:
    module = Residual()
    module.branch[1].__dict__["_modules"]["parent"] = module
    gone = weakref.ref(module)
    assert "RecursionError" in reason(recognise_operation(module, 4))
    del module
    gc.collect()
    assert gone() is None


def test_modules_are_not_kept_alive() -> None:
    module = Residual(branch=plain(se=Squeeze()))
    inner = module.branch[0][0]
    weights = recognise_operation(module, 4)
    assert isinstance(weights, InvertedBottleneckWeights)
    refused = nn.Sequential(nn.GELU())
    recognise_operation(refused, 4)
    module.branch[1].owner = [module]
    gone = [weakref.ref(each) for each in (module, inner, refused)]
    del module, inner, refused
    gc.collect()
    assert [each() for each in gone] == [None, None, None]
    assert weights.project.shape == (4, 12, 1, 1)
