"""An evaluation leaves no trace in the supernet, the random generators and the caller's tensors, however it ends."""

from __future__ import annotations

import copy
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heartbeat import assert_python_goes_on
from supernets import Chain, Function, build, draw_images, draw_paths, odd_supernet, plain_image_losses, relative_error
from torch import Tensor, nn

from greedynas_ext import evaluate_paths, isolation

POLICIES = ("batch", "running", "recalibrated")
PATHS = torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0]])


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background and the shell had it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


class Writes(nn.Module):
    """Writes to its buffers in every way that a forward can."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("added", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("resized", torch.zeros(2))
        self.register_buffer("data", torch.zeros(2))
        self.register_buffer("empty", None)
        self.register_buffer("nan", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("last", torch.zeros(2), persistent=False)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.added += 1
        self.replaced = self.replaced + 1
        self.resized.resize_(5).fill_(3)
        self.data.data = torch.ones(3)
        self.empty = x.mean()
        self.nan[1] = 5
        self.last = self.last * 2 + 1
        if "fresh" not in self._buffers:
            self.register_buffer("fresh", torch.ones(1))
        self.train(not self.training)
        return x * self.weight


class KeepsItsMode(nn.BatchNorm2d):
    """`train` does not do what it says, and the flag is not the parent's."""

    def train(self, mode: bool = True) -> KeepsItsMode:
        self.asked = mode
        return self


class UpdatesByHand(nn.BatchNorm2d):
    """Averages statistics itself, in any mode."""

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean.mul_(0.5).add_(x.mean((0, 2, 3)), alpha=0.5)
        self.num_batches_tracked.add_(1)
        return super().forward(x)


class Snapshot:
    """What must be the same afterwards."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        modules = list(net.modules())
        self.flags = [(module, module.training) for module in modules]
        self.tensors = [
            (store, name, tensor, None if tensor is None else tensor.detach().clone())
            for module in modules
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
        ]
        self.names = [(store, list(store)) for module in modules for store in (module._parameters, module._buffers)]
        self.gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]
        self.wanted = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
        self.versions = [(parameter, parameter._version) for parameter in net.parameters()]
        self.hooks = [
            (hooks, list(hooks.items()))
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ]
        self.attributes = [(module, set(module.__dict__)) for module in modules]
        self.torch, self.numpy, self.python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self.modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        self.handler = signal.getsignal(signal.SIGINT)

    def check(self) -> None:
        for module, training in self.flags:
            assert module.training == training, type(module)
        for store, names in self.names:
            assert list(store) == names
        for store, name, tensor, values in self.tensors:
            assert store[name] is tensor, name
            if tensor is not None:
                torch.testing.assert_close(tensor, values, rtol=0, atol=0, equal_nan=True, msg=name)
        for parameter, gradient, values in self.gradients:
            assert parameter.grad is gradient
            assert gradient is None or torch.equal(gradient, values)
        assert all(parameter.requires_grad == wanted for parameter, wanted in self.wanted)
        assert all(parameter._version == version for parameter, version in self.versions)
        assert all(list(hooks.items()) == items for hooks, items in self.hooks)
        assert all(set(module.__dict__) == names for module, names in self.attributes)
        assert torch.equal(torch.get_rng_state(), self.torch)
        now = np.random.get_state()
        assert all(np.array_equal(one, two) for one, two in zip(now, self.numpy, strict=True))
        assert random.getstate() == self.python
        assert (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        ) == self.modes
        assert signal.getsignal(signal.SIGINT) is self.handler
        assert not isolation._holds


def mixed_flags(net: nn.Module) -> None:
    for number, module in enumerate(net.modules()):
        module.training = number % 3 != 0


def eventful() -> Chain:
    """Mixed flags, gradients, frozen parameters, hooks, buffers that are written to."""
    net = odd_supernet()
    net.choices[0][0] = Writes().double()
    net.choices[1][0] = nn.Sequential(KeepsItsMode(4), UpdatesByHand(4)).double()
    net.register_module(
        "registered", nn.ModuleList(op for layer in net.choices for op in layer if isinstance(op, nn.Module))
    )
    net.stem[0].register_forward_hook(lambda module, args, output: None)
    net.stem[0].register_forward_pre_hook(lambda module, args: None)
    net.stem[1].register_forward_hook(lambda module, args, output: output)
    parameters = list(net.parameters())
    for parameter in parameters[::2]:
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype)
    parameters[3].requires_grad_(False)
    mixed_flags(net)
    return net


@pytest.fixture
def gaussians() -> None:
    """Both generators hold half of a pair of normal numbers."""
    random.seed(1)
    np.random.seed(1)
    random.gauss(0, 1)
    np.random.randn()


@pytest.mark.usefixtures("gaussians")
@pytest.mark.parametrize("max_memory", [None, 1 << 40])
@pytest.mark.parametrize("bn", POLICIES)
def test_nothing_changes(bn: str, max_memory: int | None) -> None:
    net = eventful()
    paths = torch.cat([torch.zeros(1, 4, dtype=torch.int64), draw_paths(net, 20)])
    images, targets = draw_images(4)
    calibration = draw_images(3, seed=5)[0] if bn == "recalibrated" else None
    given = [images, targets, paths, *([] if calibration is None else [calibration])]
    copies = [tensor.clone() for tensor in given]
    versions = [tensor._version for tensor in given]
    before = Snapshot(net)
    evaluate_paths(
        net, paths, images, targets, bn=bn, calibration=calibration, max_memory=max_memory, k=3, profile=True
    )
    before.check()
    assert all(torch.equal(tensor, other) for tensor, other in zip(given, copies, strict=True))
    assert [tensor._version for tensor in given] == versions


class Trouble(Exception):
    pass


def fail(x: Tensor) -> Tensor:
    raise Trouble


@pytest.mark.usefixtures("gaussians")
@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["stem", "layer", "head"])
@pytest.mark.parametrize("max_memory", [None, 1 << 40])
def test_nothing_changes_when_an_operation_fails(
    error: type[BaseException], where: str, max_memory: int | None
) -> None:
    def fail(x: Tensor) -> Tensor:
        torch.rand(1)
        random.random()
        raise error

    net = eventful()
    if where == "layer":
        net.choices[3][1] = Function(fail)
    else:
        setattr(net, where, nn.Sequential(getattr(net, where), Function(fail)))
    before = Snapshot(net)
    with pytest.warns(RuntimeWarning, match="random numbers"), pytest.raises(error):
        evaluate_paths(net, [[0, 0, 0, 0], [0, 1, 1, 1]], *draw_images(4), max_memory=max_memory)
    before.check()


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
def test_nothing_changes_when_the_loader_fails(error: type[BaseException]) -> None:
    net = eventful()
    before = Snapshot(net)

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        yield draw_images(4)
        before.check()
        raise error

    with pytest.raises(error):
        evaluate_paths(net, [[0, 0, 0, 0]], loader())
    before.check()


@pytest.mark.parametrize("kwargs", [{"max_memory": 1}, {"targets": torch.tensor([0, 1, 2, 9])}])
def test_nothing_changes_when_an_argument_turns_out_bad(kwargs: dict[str, Any]) -> None:
    net = eventful()
    images, targets = draw_images(4)
    before = Snapshot(net)
    with pytest.raises(ValueError, match=r"^(max_memory|targets): "):
        evaluate_paths(net, [[0, 0, 0, 0]], images, kwargs.pop("targets", targets), **kwargs)
    before.check()


def test_training_goes_on_as_if_nothing_had_been_evaluated() -> None:
    """The same steps with and without evaluations between them end at the same bits."""

    def train(evaluated: bool) -> dict[str, Tensor]:
        net = build([["conv bn", "dropout"], ["residual", "bn with momentum none"]])
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        torch.manual_seed(0)
        images, targets = draw_images(6)
        for step in range(3):
            if evaluated:
                for bn in ("batch", "running"):
                    evaluate_paths(net, PATHS, images, targets, bn=bn)
            optimizer.zero_grad()
            x = net.stem(images)
            for layer in net.choices:
                x = layer[step % 2](x)
            nn.functional.cross_entropy(net.head(x), targets).backward()
            if evaluated:
                evaluate_paths(net, PATHS, images, targets, bn="recalibrated", calibration=images)
            optimizer.step()
        return net.state_dict()

    plain, evaluated = train(False), train(True)
    assert all(torch.equal(value, evaluated[name]) for name, value in plain.items())


# Random numbers -----------------------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(1),
    "numpy": lambda: np.random.rand(),
    "the other of numpy's pair": lambda: np.random.randn(),
    "python": lambda: random.random(),
    "the other of python's pair": lambda: random.gauss(0, 1),
}


@pytest.mark.usefixtures("gaussians")
@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_put_back_and_reported_to_the_caller(name: str) -> None:
    net = build([["conv bn"]])
    net.choices[0][0] = Function(lambda x: (DRAWS[name](), x)[1])
    before = Snapshot(net)
    with pytest.warns(RuntimeWarning, match="^supernet: random numbers were drawn while paths") as caught:
        evaluate_paths(net, [[0]], *draw_images(2))
    assert [warning.filename for warning in caught] == [__file__]
    before.check()


def test_another_numpy_generator() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = np.random.get_state(legacy=False)
        net = build([["conv bn"]])
        evaluate_paths(net, [[0]], *draw_images(2))
        net.choices[0][0] = Function(lambda x: (np.random.rand(), x)[1])
        with pytest.warns(RuntimeWarning, match="random numbers"):
            evaluate_paths(net, [[0]], *draw_images(2))
        assert np.random.get_state(legacy=False) == state
    finally:
        np.random.set_bit_generator(before)


def test_no_warning_without_random_numbers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_paths(build([["dropout", "attention"]]), [[0], [1]], *draw_images(2))


# Parameters ---------------------------------------------------------------------------------------------------------


class WritesItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clipped = nn.Parameter(torch.full((4,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.clipped.clamp_(-1, 1)
        return x * self.clipped[:, None, None]


def test_an_operation_that_writes_to_a_parameter_is_reported() -> None:
    net = build([["conv bn", "identity"]])
    net.choices[0][1] = WritesItsWeight().double()
    with pytest.raises(
        RuntimeError, match=r"^supernet: .* leaves its parameters alone, but 'clipped' \[4\] was written"
    ):
        evaluate_paths(net, [[0], [1]], *draw_images(2))
    evaluate_paths(net, [[0]], *draw_images(2))  # others do not run it


def test_a_parameter_that_is_replaced_is_put_back() -> None:
    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            self.weight = nn.Parameter(self.weight * 2)
            return x * self.weight

    net = build([["conv bn"]])
    net.choices[0][0] = Replaces().double()
    before = Snapshot(net)
    evaluate_paths(net, [[0]], *draw_images(2))
    before.check()


# Ctrl-C -------------------------------------------------------------------------------------------------------------


def slow_net() -> Chain:
    net = build([["conv bn", "residual"], ["residual", "bn first"], ["conv bn", "attention"]])
    net.choices[0][1] = nn.Sequential(Writes().double(), net.choices[0][1])
    mixed_flags(net)
    return net


def all_paths(net: Chain) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(len(layer)) for layer in net.choices])


@pytest.mark.alone
@pytest.mark.no_cover  # its tracer takes a lock in Python, and an interrupt that lands there leaves it locked
@pytest.mark.parametrize("bn", ["batch", "recalibrated"])
def test_real_interrupts_at_many_moments(bn: str) -> None:
    """SIGINT from a timer, later and later: it arrives as KeyboardInterrupt, or the call had ended before."""
    net = slow_net()
    images, targets = draw_images(6)
    kwargs: Any = {"bn": bn, "calibration": images if bn == "recalibrated" else None, "max_memory": 1 << 40}
    paths = all_paths(net)
    evaluate_paths(net, paths, images, targets, **kwargs)
    started = time.perf_counter()
    evaluate_paths(net, paths, images, targets, **kwargs)
    whole = time.perf_counter() - started
    before = Snapshot(net)
    previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted = 0
    try:
        for number in range(60):
            arrived = False
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + whole * number / 50)
                evaluate_paths(net, paths, images, targets, **kwargs)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                arrived = True
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            interrupted += arrived
            before.check()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interrupted >= 20
    fresh = evaluate_paths(net, paths, images, targets, **kwargs)
    assert torch.isfinite(fresh.losses).all()


def test_an_interrupt_during_an_operation_waits_for_its_end() -> None:
    net = build([["conv bn"], ["identity"], ["identity"]])
    ran: list[str] = []

    def interrupted(x: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        ran.append("interrupted")
        return x

    net.choices[1][0] = Function(interrupted)
    net.choices[2][0] = Function(lambda x: (ran.append("next"), x)[1])
    before = Snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        evaluate_paths(net, [[0, 0, 0]], *draw_images(2))
    assert ran == ["interrupted"]
    before.check()


def test_an_interrupt_in_the_last_operation_is_delivered_after_all() -> None:
    net = build([["conv bn"]])
    net.head = nn.Sequential(net.head, Function(lambda x: (signal.raise_signal(signal.SIGINT), x)[1]))
    before = Snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        evaluate_paths(net, [[0]], *draw_images(2))
    before.check()


def test_an_interrupt_is_delivered_to_the_users_own_handler() -> None:
    came: list[int] = []
    net = build([["conv bn"]])
    net.stem = nn.Sequential(net.stem, Function(lambda x: (signal.raise_signal(signal.SIGINT), x)[1]))
    previous = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        # A description would cost one more call, which would raise the signal again.
        result = evaluate_paths(net, [[0]], *draw_images(2), fused=False)
        handler = signal.getsignal(signal.SIGINT)
        assert came == [signal.SIGINT]
        assert torch.isfinite(result.losses).all()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        evaluate_paths(net, [[0]], *draw_images(2))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, previous)
    assert callable(handler)


@pytest.mark.slow
def test_a_signal_from_outside_ends_a_long_call(tmp_path: Path) -> None:
    """A real process, a real SIGINT, a call that would take minutes."""
    script = tmp_path / "long.py"
    script.write_text(
        textwrap.dedent(
            """
            import signal, sys
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.path.insert(0, sys.argv[1])
            import torch
            from supernets import build, draw_images
            from greedynas_ext import evaluate_paths

            net = build([["conv bn", "residual"]] * 14)
            state = {name: value.clone() for name, value in net.state_dict().items()}
            paths = torch.cartesian_prod(*[torch.arange(2)] * 14)
            images, targets = draw_images(8)
            print("ready", flush=True)
            try:
                evaluate_paths(net, paths, images, targets)
            except KeyboardInterrupt:
                same = all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
                print("interrupted", same, all(module.training for module in net.modules()), flush=True)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    sent = time.perf_counter()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out == "interrupted True True\n"
    assert time.perf_counter() - sent < 20
    assert process.returncode == 0


# Threads ------------------------------------------------------------------------------------------------------------


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(functions)

    def run(number: int) -> None:
        try:
            results[number] = functions[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_outside_the_main_thread() -> None:
    net = slow_net()
    images, targets = draw_images(3)
    before = Snapshot(net)
    (result,) = in_threads(lambda: evaluate_paths(net, all_paths(net), images, targets))
    before.check()
    assert torch.equal(result.losses, evaluate_paths(net, all_paths(net), images, targets).losses)


@pytest.mark.parametrize("repeat", range(3))
def test_two_threads_evaluate_one_supernet(repeat: int) -> None:
    """With policies of their own, again and again, buffers written to meanwhile."""
    net = slow_net()
    images, targets = draw_images(3, seed=repeat)
    paths = all_paths(net)
    expected = {
        bn: plain_image_losses(_without_writes(net), paths, images, targets, bn)[0].mean(1) for bn in POLICIES[:2]
    }
    before = Snapshot(net)

    def work(bn: str) -> list[Tensor]:
        return [evaluate_paths(net, paths, images, targets, bn=bn).losses for _ in range(6)]

    for bn, results in zip(
        ("batch", "running"), in_threads(lambda: work("batch"), lambda: work("running")), strict=True
    ):
        for losses in results:
            assert relative_error(losses, expected[bn]) < 1e-10
    before.check()


def _without_writes(net: Chain) -> Chain:
    other = copy.deepcopy(net)
    other.choices[0][1] = other.choices[0][1][1]
    return other


def test_the_second_of_two_threads_does_not_take_changed_buffers_for_the_original() -> None:
    net = build([["conv bn"]])
    inside, go_on = threading.Event(), threading.Event()

    class Waits(Writes):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if threading.current_thread().name == "first":
                inside.set()
                assert go_on.wait(30)
            return y

    net.choices[0][0] = Waits().double()
    before = Snapshot(net)
    images, targets = draw_images(2)
    first = threading.Thread(target=lambda: evaluate_paths(net, [[0]], images, targets), name="first")
    first.start()
    assert inside.wait(30)
    second = threading.Thread(target=lambda: evaluate_paths(net, [[0]], images, targets), name="second")
    second.start()
    second.join(30)
    assert isolation._holds, "the first still runs"
    go_on.set()
    first.join(30)
    before.check()


def test_the_interpreter_lock_is_free_during_a_long_call() -> None:
    """A thread of pure Python goes on while operations run."""
    net = build([["conv bn", "residual"]] * 3, channels=48)
    images, targets = draw_images(8, 40)
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    assert_python_goes_on(lambda: evaluate_paths(net, paths, images, targets))


# Calls within calls -------------------------------------------------------------------------------------------------


def test_an_evaluation_inside_an_evaluation() -> None:
    """Policies do not mix, flags and handlers nest."""
    inner = build([["conv bn", "residual"]], seed=3)
    images, targets = draw_images(3)
    expected = evaluate_paths(inner, [[0], [1]], images, targets, bn="running").losses
    found: list[Tensor] = []
    outer = build([["conv bn"]])
    outer.stem = nn.Sequential(
        Function(lambda x: (found.append(evaluate_paths(inner, [[0], [1]], x, targets, bn="running").losses), x)[1]),
        outer.stem,
    )
    before, before_inner = Snapshot(outer), Snapshot(inner)
    plain = evaluate_paths(build([["conv bn"]]), [[0]], images, targets)
    result = evaluate_paths(outer, [[0]], images, targets)
    assert torch.equal(found[0], expected)
    assert torch.equal(result.losses, plain.losses)
    before.check()
    before_inner.check()


def test_a_supernet_of_shared_modules_is_released_once_for_each() -> None:
    net = build([["conv bn", "residual"]])
    net.choices.append(net.choices[0])
    before = Snapshot(net)
    evaluate_paths(net, [[0, 0], [1, 0]], *draw_images(2))
    before.check()
