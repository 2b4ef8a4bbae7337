"""`max_memory`: the estimate is an upper bound of what is alive, and it chooses the traversal and the split."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from supernets import OPERATIONS, Function, build, draw_images, draw_paths, odd_supernet, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import greedynas_ext.module_engine
from greedynas_ext import PathEvaluation, evaluate_paths

POLICIES = ("batch", "running", "recalibrated")


class LiveTensors(TorchDispatchMode):
    """Adds up the storages that come out of operations while they live; those of `known` tensors do not count."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


def known_tensors(net: Any, *others: Tensor) -> list[Tensor]:
    tensors = list(others)
    parts = [net.stem, net.head, *(op for layer in net.choices for op in layer)]
    for part in parts:
        if isinstance(part, nn.Module):
            tensors += [*part.parameters(), *part.buffers()]
    return tensors


@contextlib.contextmanager
def estimates() -> Iterator[list[Any]]:
    """The estimates made, without a change to them."""
    made: list[Any] = []
    original = greedynas_ext.module_engine.estimate_memory
    with pytest.MonkeyPatch.context() as patch:

        def spy(*args: Any, **kwargs: Any) -> Any:
            made.append(original(*args, **kwargs))
            return made[-1]

        patch.setattr(greedynas_ext.module_engine, "estimate_memory", spy)
        yield made


def measured(net: Any, paths: Any, images: Tensor, targets: Tensor, **kwargs: Any) -> tuple[PathEvaluation, int]:
    """(result, most bytes alive at once)."""
    others = [kwargs["calibration"]] if kwargs.get("calibration") is not None else []
    gc.collect()
    with LiveTensors(*known_tensors(net, images, targets, *others)) as live:
        result = evaluate_paths(net, paths, images, targets, **kwargs)
    return result, live.peak


def estimate_of(net: Any, paths: Any, images: Tensor, targets: Tensor, **kwargs: Any) -> Any:
    with estimates() as made:
        evaluate_paths(net, paths, images, targets, max_memory=1 << 50, **kwargs)
    return made[-1]


# Buffers and losses that are kept on the way, which are no activations
SLACK = 16_000


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("traversal", ["layer-by-layer", "depth-first"])
def test_the_estimate_bounds_what_is_alive(bn: str, traversal: str) -> None:
    net = odd_supernet(channels=8)
    paths = torch.cat(
        [draw_paths(net, 30), torch.tensor([[i % len(layer) for layer in net.choices] for i in range(10)])]
    )
    images, targets = draw_images(8, 16)
    kwargs: Any = {"bn": bn, "calibration": images[:4].clone() if bn == "recalibrated" else None}
    estimate = estimate_of(net, paths, images, targets, **kwargs)
    needed = estimate.needed(traversal, len(images))
    result, peak = measured(net, paths, images, targets, max_memory=needed, **kwargs)
    assert result.plan.traversal == traversal
    assert peak <= needed + SLACK
    assert peak > needed / 4, "a bound that is far too high splits batches that would fit"


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, "fp32"),
        (torch.float32, "bf16"),
        (torch.float64, None),
        (torch.float64, "fp32"),
        (torch.float64, "bf16"),
    ],
)
def test_the_estimate_holds_in_every_precision(dtype: torch.dtype, precision: str | None) -> None:
    """Casts of images, weights and activations are temporaries too."""
    net = build([["conv bn", "residual in place"], ["bn first", "attention"], ["elastic bn", "conv bn"]], channels=16)
    net.to(dtype)
    paths = draw_paths(net, 6)
    images, targets = draw_images(7, 12, dtype=torch.float32)
    estimate = estimate_of(net, paths, images, targets, precision=precision)
    for traversal in ("layer-by-layer", "depth-first"):
        needed = estimate.needed(traversal, len(images))
        _, peak = measured(net, paths, images, targets, max_memory=needed, precision=precision)
        assert peak <= needed + SLACK


@settings(max_examples=10)
@given(data=st.data())
def test_any_chain_stays_within_max_memory(data: st.DataObject) -> None:
    names = st.sampled_from(sorted(set(OPERATIONS) - {"bn 1d", "bn without running statistics"}))
    layers = data.draw(st.lists(st.lists(names, min_size=1, max_size=3), min_size=1, max_size=5), label="layers")
    net = build(layers, channels=8)
    paths = draw_paths(net, data.draw(st.integers(1, 12), label="paths"))
    images, targets = draw_images(data.draw(st.integers(2, 9), label="images"), 12)
    estimate = estimate_of(net, paths, images, targets, bn="running")
    smallest = estimate.needed("depth-first", 1)
    largest = estimate.needed("layer-by-layer", len(images))
    max_memory = data.draw(st.integers(smallest, 2 * largest), label="max_memory")
    result, peak = measured(net, paths, images, targets, bn="running", max_memory=max_memory)
    assert peak <= max_memory + SLACK
    whole = evaluate_paths(net, paths, images, targets, bn="running")
    torch.testing.assert_close(result.losses, whole.losses, rtol=1e-9, atol=1e-12)


def hungry(x: Tensor) -> Tensor:
    """No convolution, no normalisation: twenty copies of its input at once."""
    return torch.stack([x] * 20).sum(0)


def quadratic(x: Tensor) -> Tensor:
    """Pixels by pixels."""
    tokens = x.flatten(2).mT
    return (tokens @ tokens.mT).softmax(-1).matmul(tokens).mT.reshape(x.shape)


@pytest.mark.parametrize("operation", [hungry, quadratic, lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real])
@pytest.mark.parametrize("where", ["stem", "layer", "head"])
def test_operations_that_no_estimate_by_kind_would_know(operation: Callable[[Tensor], Tensor], where: str) -> None:
    net = build([["conv bn", "residual"], ["residual", "conv bn"]])
    if where == "layer":
        net.choices[1][0] = Function(operation)
    else:
        setattr(net, where, nn.Sequential(Function(operation), getattr(net, where)))
    paths = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    images, targets = draw_images(5, 16)
    estimate = estimate_of(net, paths, images, targets)
    needed = estimate.needed("depth-first", 5)
    _, peak = measured(net, paths, images, targets, max_memory=needed)
    assert peak <= needed + SLACK


def test_logits_are_gathered_within_the_limit() -> None:
    """Many classes: the logits of all paths would be the largest thing by far."""
    net = build([["relu in place", "add_"]] * 5, classes=4000)
    paths = torch.cartesian_prod(*[torch.arange(2)] * 5)
    images, targets = draw_images(6, 4)
    estimate = estimate_of(net, paths, images, targets)
    needed = estimate.needed("depth-first", 6)
    together = len(paths) * 6 * 4000 * 8
    assert needed < together / 4
    for extra in (0, together // 3):
        _, peak = measured(net, paths, images, targets, max_memory=needed + extra)
        assert peak <= needed + extra + SLACK
    limit = estimate.needed("depth-first", 3)
    result, peak = measured(net, paths, images, targets, max_memory=limit, bn="running")
    assert result.plan.batch_split == 2
    assert peak <= limit + SLACK


def test_nothing_is_kept_from_batch_to_batch() -> None:
    """Losses of images are kept on request only; the stem's input is not kept at all."""
    net = build([["conv bn", "residual"]])
    batch = draw_images(64, 24)
    with LiveTensors(*known_tensors(net, *batch)) as live:
        result = evaluate_paths(net, [[0], [1]], [batch] * 2)
        kept = live.bytes
    assert kept < 1000
    assert result.image_losses is None


def test_room_decides_between_the_traversals() -> None:
    net = build([["conv bn", "residual", "bn first"]] * 3)
    paths = torch.cartesian_prod(*[torch.arange(3)] * 3)
    images, targets = draw_images(4)
    estimate = estimate_of(net, paths, images, targets)
    wide, deep = (estimate.needed(traversal, 4) for traversal in ("layer-by-layer", "depth-first"))
    assert deep < wide
    evaluated = {
        max_memory: evaluate_paths(net, paths, images, targets, max_memory=max_memory)
        for max_memory in (None, wide, wide - 1, deep)
    }
    traversals = [result.plan.traversal for result in evaluated.values()]
    assert traversals == ["depth-first", "layer-by-layer", "depth-first", "depth-first"]
    assert all(result.plan.batch_split == 1 for result in evaluated.values())
    for result in evaluated.values():
        assert relative_error(result.losses, evaluated[None].losses) < 1e-12
    message = rf"^max_memory: expected at least {deep} bytes for these paths, got {deep - 1}; fewer images, or .*"
    with pytest.raises(ValueError, match=message + "micro_batch=, which changes the statistics"):
        evaluate_paths(net, paths, images, targets, max_memory=deep - 1)


@pytest.mark.parametrize("bn", ["running", "recalibrated"])
def test_batches_are_split_where_statistics_allow_it(bn: str) -> None:
    net = build([["conv bn", "residual"], ["bn first", "cumsum"]])
    paths = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    images, targets = draw_images(7)
    kwargs: Any = {"bn": bn, "calibration": draw_images(2, seed=5)[0] if bn == "recalibrated" else None}
    whole = evaluate_paths(net, paths, images, targets, per_image=True, **kwargs)
    estimate = estimate_of(net, paths, images, targets, **kwargs)
    one, three = estimate.needed("depth-first", 1), estimate.needed("depth-first", 3)
    if bn == "recalibrated":  # the calibration images are not split
        one = max(one, estimate.needed("depth-first", 2))
    splits = []
    for max_memory in (one, three, three - 1, estimate.needed("depth-first", 7)):
        result = evaluate_paths(net, paths, images, targets, per_image=True, max_memory=max_memory, **kwargs)
        splits.append(result.plan.batch_split)
        assert relative_error(result.losses, whole.losses) < 1e-12
        torch.testing.assert_close(result.image_losses, whole.image_losses, rtol=1e-12, atol=0)
        assert result.statistics == whole.statistics
    assert splits == [7 if bn == "running" else 4, 3, 4, 1]
    argument = "" if bn == "running" else "; fewer calibration images need less"
    with pytest.raises(ValueError, match=rf"^max_memory: expected at least {one} bytes .*, got {one - 1}{argument}$"):
        evaluate_paths(net, paths, images, targets, max_memory=one - 1, **kwargs)


@pytest.mark.parametrize("name", ["bn 1d", "bn without running statistics"])
def test_running_statistics_that_are_not_stored_are_those_of_the_batch_which_is_not_split(name: str) -> None:
    net = build([["conv bn", name]])
    images, targets = draw_images(6)
    whole = evaluate_paths(net, [[0], [1]], images, targets, bn="running")
    assert whole.statistics == "running statistics; where none are stored, batch statistics of 6 images at a time"
    estimate = estimate_of(net, [[0], [1]], images, targets, bn="running")
    needed = estimate.needed("depth-first", 6)
    result = evaluate_paths(net, [[0], [1]], images, targets, bn="running", max_memory=needed)
    assert torch.equal(result.losses, whole.losses)
    with pytest.raises(ValueError, match=rf"^max_memory: expected at least {needed} bytes"):
        evaluate_paths(net, [[0], [1]], images, targets, bn="running", max_memory=needed - 1)
    stored = evaluate_paths(net, [[0]], images, targets, bn="running", max_memory=needed - 1)
    assert stored.statistics == "running statistics"
    split = evaluate_paths(net, [[0], [1]], images, targets, bn="running", micro_batch=2)
    assert split.losses[0] == pytest.approx(float(whole.losses[0]), rel=1e-12)
    assert split.losses[1] != pytest.approx(float(whole.losses[1]), rel=1e-6)
    assert split.statistics.endswith("none are stored, batch statistics of 2 images at a time (micro_batch=2)")


def test_measuring_keeps_to_max_memory_too() -> None:
    """Where there is room for one image, two are not tried."""
    net = build([["conv bn", "residual", "bn first"]] * 3, channels=8)
    images, targets = draw_images(5, 24)
    needed = estimate_of(net, draw_paths(net, 9), images, targets, bn="running").needed("depth-first", 1)
    _, peak = measured(net, draw_paths(net, 9), images, targets, bn="running", max_memory=needed + 200)
    assert peak <= needed + SLACK


def test_micro_batches_are_chosen_for_one_by_one() -> None:
    net = build([["conv bn", "residual"]] * 2)
    paths = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    images, targets = draw_images(6)
    estimate = estimate_of(net, paths, images, targets)
    limit = estimate.needed("depth-first", 2)
    with pytest.raises(ValueError, match=r"^max_memory: .* fewer images"):
        evaluate_paths(net, paths, images, targets, max_memory=limit)
    result = evaluate_paths(net, paths, images, targets, max_memory=limit, micro_batch=2)
    assert torch.equal(result.losses, evaluate_paths(net, paths, images, targets, micro_batch=2).losses)


def test_measuring_happens_once_for_batches_of_a_kind() -> None:
    net = build([["conv bn", "residual"]])
    loader = [draw_images(size, side) for size, side in ((1, 6), (4, 6), (3, 6), (3, 8), (2, 8))]
    with estimates() as made:
        evaluate_paths(net, [[0], [1]], loader, max_memory=1 << 40)
    assert len(made) == 3  # one image; more; more of another size


def test_an_operation_whose_work_depends_on_chance_or_on_the_number_of_images() -> None:
    """Where the two measurements cannot be laid side by side, each image is taken to need as much as the largest."""
    net = SimpleNamespace(
        stem=torch.sin,
        choices=[[lambda x: x * 2 if len(x) == 1 else hungry(x), torch.cos], [torch.tanh]],
        head=lambda x: x.flatten(1),
    )
    images, targets = draw_images(6, 8)
    estimate = estimate_of(net, [[0, 0], [1, 0]], images, targets)
    _, peak = measured(net, [[0, 0], [1, 0]], images, targets, max_memory=estimate.needed("depth-first", 6))
    assert peak <= estimate.needed("depth-first", 6) + SLACK


def test_weights_that_are_cast_count_once_and_not_for_each_image() -> None:
    """Under bfloat16 a large linear layer is cast at each use; that does not grow with the batch."""
    net = SimpleNamespace(
        stem=nn.Flatten(), choices=[[nn.Linear(48, 2000), nn.Linear(48, 2000)]], head=nn.Linear(2000, 5)
    )
    images, targets = draw_images(64, 4, dtype=torch.float32)
    estimate = estimate_of(net, [[0], [1]], images, targets, precision="bf16")
    cast = 48 * 2000 * 2
    assert cast <= estimate.work.fixed <= 1.2 * cast
    assert estimate.needed("depth-first", 64) < 64 * cast / 4
    _, peak = measured(
        net, [[0], [1]], images, targets, precision="bf16", max_memory=estimate.needed("depth-first", 64)
    )
    assert peak <= estimate.needed("depth-first", 64) + SLACK


def test_measuring_leaves_no_trace() -> None:
    net = build([["conv bn", "residual"]])
    net.choices[0][1] = nn.Sequential(Counter(), net.choices[0][1])
    state = {name: value.clone() for name, value in net.state_dict().items()}
    images, targets = draw_images(3)
    with pytest.raises(ValueError, match="max_memory"):
        evaluate_paths(net, [[0], [1]], images, targets, max_memory=1)
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


class Counter(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x
