"""A fused evaluation changes nothing, may be interrupted, and may run in any thread and with any number of them."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from heartbeat import assert_python_goes_on
from supernets import draw_images, relative_error
from test_fused_spaces import (
    FP64,
    POLICIES,
    calibration_for,
    covering_paths,
    make_supernet,
    small_space,
    small_supernet,
)
from torch import Tensor, nn

from greedynas import Supernet
from greedynas_ext import evaluate_paths


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the shell had it ignored; threads are as many as before."""
    previous, threads = signal.signal(signal.SIGINT, signal.default_int_handler), torch.get_num_threads()
    yield
    signal.signal(signal.SIGINT, previous)
    torch.set_num_threads(threads)


class Snapshot:
    """All that an evaluation must leave as it is."""

    def __init__(self, net: nn.Module, *tensors: Tensor) -> None:
        self.net, self.given = net, [(tensor, tensor.clone(), tensor._version) for tensor in tensors]
        state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        self.state = {name: (tensor, tensor.detach().clone(), tensor._version) for name, tensor in state.items()}
        self.gradients = {
            name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()
        }
        self.flags = {name: module.training for name, module in net.named_modules()}
        self.attributes = {name: set(vars(module)) for name, module in net.named_modules()}
        self.torch, self.numpy, self.python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self.modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()
        self.handler = signal.getsignal(signal.SIGINT)

    def check(self) -> None:
        for tensor, copy, version in self.given:
            assert torch.equal(tensor, copy)
            assert tensor._version == version
        state = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        assert state.keys() == self.state.keys()
        for name, (tensor, copy, version) in self.state.items():
            assert state[name] is tensor, name
            assert torch.equal(tensor, copy), name
            assert tensor._version == version, name
        for name, parameter in self.net.named_parameters():
            gradient, copy = self.gradients[name]
            assert parameter.grad is gradient, name
            assert gradient is None or torch.equal(gradient, copy), name
        assert {name: module.training for name, module in self.net.named_modules()} == self.flags
        assert {name: set(vars(module)) for name, module in self.net.named_modules()} == self.attributes
        assert torch.equal(torch.get_rng_state(), self.torch)
        assert all(np.array_equal(one, two) for one, two in zip(np.random.get_state(), self.numpy, strict=True))
        assert random.getstate() == self.python
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()) == self.modes
        assert signal.getsignal(signal.SIGINT) is self.handler


def trained(dtype: torch.dtype = torch.float64) -> Supernet:
    """With gradients, and flags that are not all the same."""
    net = small_supernet(dtype)
    images, targets = draw_images(3, 17, dtype=dtype)
    F.cross_entropy(net(images, [0, 1, 2]), targets).backward()
    net.choices[0].eval()
    return net


def losses_of(net: Any, images: Tensor, targets: Tensor, bn: str = "batch", **kwargs: Any) -> Tensor:
    calibration = calibration_for(bn, images)
    paths = covering_paths(net)
    return evaluate_paths(net, paths, images, targets, bn=bn, calibration=calibration, fused=True, **kwargs).losses


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_changes(bn: str, dtype: torch.dtype) -> None:
    net = trained(dtype)
    images, targets = draw_images(4, 17, dtype=dtype)
    before = Snapshot(net, images, targets)
    losses_of(net, images, targets, bn, per_image=True, profile=True, k=2)
    before.check()


@pytest.mark.parametrize("bn", POLICIES)
def test_nothing_changes_after_an_error(bn: str) -> None:
    net = trained()
    images, targets = draw_images(4, 17)
    before = Snapshot(net, images, targets)
    with pytest.raises(ValueError, match="targets"):
        losses_of(net, images, targets + 5, bn)
    with pytest.raises(ValueError, match="max_memory"):
        losses_of(net, images, targets, bn, max_memory=1)
    before.check()


# Threads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(bn: str, dtype: torch.dtype) -> None:
    """Images large enough that each loop of the kernels is cut between the threads."""
    net = small_supernet(dtype)
    images, targets = draw_images(16, 64, dtype=dtype)
    losses = []
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        losses.append(losses_of(net, images, targets, bn, per_image=True))
    assert all(torch.equal(other, losses[0]) for other in losses[1:])


def test_threads_evaluate_one_supernet_at_once() -> None:
    """Each with a policy and images of its own, again and again."""
    net = trained()
    work = [(bn, *draw_images(count, 17, seed=count)) for count, bn in enumerate(POLICIES, start=3)]
    expected = [losses_of(net, images, targets, bn) for bn, images, targets in work]
    before = Snapshot(net, *(tensor for _, *tensors in work for tensor in tensors))
    with ThreadPoolExecutor(len(work)) as pool:
        for _ in range(6):
            found = [pool.submit(losses_of, net, images, targets, bn) for bn, images, targets in work]
            for future, losses in zip(found, expected, strict=True):
                assert torch.equal(future.result(timeout=60), losses)
    before.check()


def test_threads_evaluate_different_supernets_at_once() -> None:
    nets = [make_supernet(small_space(activation), seed=seed) for seed, activation in enumerate(("relu", "silu"))]
    images, targets = draw_images(4, 17)
    expected = [losses_of(net, images, targets) for net in nets]
    assert not torch.equal(*expected)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(6):
            found = [pool.submit(losses_of, net, images, targets) for net in nets]
            for future, losses in zip(found, expected, strict=True):
                assert torch.equal(future.result(timeout=60), losses)


def test_one_thread_evaluates_modules_and_another_kernels() -> None:
    net = trained()
    images, targets = draw_images(4, 17)
    paths = covering_paths(net)
    expected = losses_of(net, images, targets)
    before = Snapshot(net, images, targets)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            modules = pool.submit(evaluate_paths, net, paths, images, targets, fused=False)
            kernels = pool.submit(losses_of, net, images, targets)
            assert torch.equal(kernels.result(timeout=60), expected)
            assert relative_error(modules.result(timeout=60).losses, expected) <= FP64
    before.check()


def test_while_a_loader_reads_in_a_thread_of_its_own() -> None:
    """The batches come from a generator, which evaluates another supernet before it gives one."""
    net, other = small_supernet(), make_supernet(small_space("relu"), seed=4)
    images, targets = draw_images(4, 17)
    expected = losses_of(other, images, targets)

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(2):
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(losses_of, other, images, targets).result(timeout=60), expected)
            assert torch.equal(losses_of(other, images, targets), expected)
            yield images, targets

    result = evaluate_paths(net, covering_paths(net), loader(), fused=True)
    whole = losses_of(net, images, targets)
    assert relative_error(result.losses, whole) <= FP64


def test_inside_a_backward_pass() -> None:
    """Where torch has locks and guards of its own, and gradients are being computed."""
    net = small_supernet()
    images, targets = draw_images(8, 33)
    expected = losses_of(net, images, targets)
    found: list[Tensor] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: found.append(losses_of(net, images, targets)))
    y.backward()
    assert len(found) == 1
    assert torch.equal(found[0], expected)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_interpreter_lock_is_free_during_a_long_call() -> None:
    net, images, targets, paths = long_call()
    assert_python_goes_on(lambda: evaluate_paths(net, paths[:4], images, targets, fused=True))


# Ctrl-C -------------------------------------------------------------------------------------------------------------
# Not measured by coverage: its tracer takes a lock in Python, and an interrupt that lands there leaves it locked.


def long_call() -> tuple[Supernet, Tensor, Tensor, Tensor]:
    """512 paths of larger images in one batch: many seconds on one core."""
    net = small_supernet(operations="e6k3 e6k5 e6k7 e6k3s e6k5s e6k7s e3k7 id")
    return net, *draw_images(48, 96), torch.cartesian_prod(*[torch.arange(8)] * 3)


@pytest.mark.no_cover
@pytest.mark.parametrize("sender", ["timer", "thread"])
@pytest.mark.parametrize("bn", ["batch", "recalibrated"])
def test_an_interrupt_ends_a_long_call_soon(bn: str, sender: str) -> None:
    net, images, targets, paths = long_call()
    kwargs: dict[str, Any] = {"bn": bn, "calibration": images[:2] if bn == "recalibrated" else None}
    before = Snapshot(net, images, targets)
    sent: list[float] = []

    def interrupt(*_: object) -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGALRM, interrupt)
    if sender == "timer":
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    else:
        threading.Timer(0.3, interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate_paths(net, paths, images, targets, fused=True, **kwargs)
        ended = time.perf_counter()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert ended - sent[0] < 2.0
    before.check()
    after = evaluate_paths(net, paths[:2], images[:3], targets[:3], fused=True)
    modules = evaluate_paths(net, paths[:2], images[:3], targets[:3], fused=False)
    assert relative_error(after.losses, modules.losses) <= FP64


@pytest.mark.no_cover
def test_interrupts_at_many_moments() -> None:
    net = trained()
    images, targets = draw_images(6, 33)
    paths = torch.cartesian_prod(*[torch.arange(4)] * 3)
    expected = evaluate_paths(net, paths, images, targets, fused=True)
    started = time.perf_counter()
    evaluate_paths(net, paths, images, targets, fused=True)
    whole = time.perf_counter() - started
    before = Snapshot(net, images, targets)
    previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted = 0
    try:
        for number in range(30):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + whole * number / 25)
                evaluate_paths(net, paths, images, targets, fused=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            before.check()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interrupted >= 8
    assert torch.equal(evaluate_paths(net, paths, images, targets, fused=True).losses, expected.losses)
