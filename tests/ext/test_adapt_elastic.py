"""Elastic networks: what a path runs is found as it is planned, and weights are those of the moment."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_elastic import DEPTHS, KERNELS, ONCE, RATIOS, AnyKernelConv, ElasticBlock, OnceNet, make_once, set_once
from foreign_supernets import covering, make, once, own_losses
from supernets import draw_images, randomise, relative_error
from test_adapt import FP64
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from greedynas_ext import (
    AdaptedSupernet,
    ExploitSchedule,
    PathFilter,
    adapt,
    adapt_verify,
    evaluate_paths,
    prepare_paths,
)
from greedynas_ext.packing import InvertedBottleneckWeights

SIZES = tuple(map(len, ONCE))
BATCH = draw_images(3, 20)


def adapted(net: nn.Module) -> AdaptedSupernet:
    view = adapt(net, choices=ONCE, select=set_once)
    assert view.reason is None, view.reason
    return view


def net_and_view(name: str = "once for all") -> tuple[Any, AdaptedSupernet]:
    net = make(name)
    return net, adapted(net)


def path_of(kernels: Sequence[int], ratios: Sequence[int], depths: Sequence[int]) -> list[int]:
    values = [*kernels, *ratios, *depths]
    return [options.index(value) for options, value in zip(ONCE, values, strict=True)]


def check(net: nn.Module, view: AdaptedSupernet, paths: Tensor, bn: str = "batch", run: Any = once) -> Any:
    result = evaluate_paths(view, paths, *BATCH, bn=bn, per_image=True)  # type: ignore[arg-type]
    assert relative_error(result.image_losses, own_losses(net, run, paths, *BATCH, bn)) < FP64
    return result


# Weights and modules that change ------------------------------------------------------------------------------------

Change = Callable[[Any], object]
CHANGES: dict[str, Change] = {}
ONLY_RUNNING: set[str] = set()  # what statistics of the batch do not depend on


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


def only_running(function: Change) -> Change:
    ONLY_RUNNING.add(function.__name__)
    return change(function)


def step(net: Any, optimizer: torch.optim.Optimizer) -> None:
    images, targets = draw_images(4, 20, seed=8)
    for path in covering(SIZES).tolist():
        F.cross_entropy(once(net, images, path), targets).backward()
    optimizer.step()


@change
def sgd(net: Any) -> None:
    step(net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9))


@change
def adamw_foreach(net: Any) -> None:
    step(net, torch.optim.AdamW(net.parameters(), 0.01, foreach=True))


@change
def adamw_fused(net: Any) -> None:
    step(net, torch.optim.AdamW(net.parameters(), 0.01, fused=True))


@change
def sliced_weight_in_place(net: Any) -> None:
    net.body[0].widen[0].layer.weight.data.mul_(0.5).add_(0.1)


@change
def kernel_through_numpy(net: Any) -> None:
    net.body[0].spread[0].layer.weight.detach().numpy()[:, :, 3] *= 3.0


@change
def matrix_through_numpy(net: Any) -> None:
    net.body[0].spread[0].to_3.detach().numpy()[:, 2] -= 1.0


@change
def matrix_replaced(net: Any) -> None:
    conv = net.body[0].spread[0]
    conv.to_5 = nn.Parameter(conv.to_5.detach().roll(1, 0))


@change
def data_replaced(net: Any) -> None:
    weight = net.body[0].spread[0].layer.weight
    weight.data = weight.data.flip(0)


@change
def data_replaced_by_strided(net: Any) -> None:
    weight = net.body[0].spread[0].layer.weight
    weight.data = weight.data.flip(3).transpose(2, 3).contiguous().transpose(2, 3)


@change
def another_parameter(net: Any) -> None:
    conv = net.body[0].widen[0].layer
    conv.weight = nn.Parameter(conv.weight.detach().roll(1, 0))


@change
def excitation_in_inference_mode(net: Any) -> None:
    with torch.inference_mode():
        net.body[3].spread[3].excite.bias.add_(torch.arange(32.0) / 8)


@change
def load_state_dict(net: Any) -> None:
    net.load_state_dict(make("once for all", seed=5).state_dict())


@change
def load_state_dict_assign(net: Any) -> None:
    net.load_state_dict(make("once for all", seed=5).state_dict(), assign=True)


@change
def ema_swapped_storages(net: Any) -> None:
    average = AveragedModel(net)
    with torch.no_grad():
        for averaged in average.module.parameters():
            averaged.add_(0.01 * torch.randn_like(averaged))
    for parameter, averaged in zip(net.parameters(), average.module.parameters(), strict=True):
        parameter.data, averaged.data = averaged.data, parameter.data


@change
def eps_attribute(net: Any) -> None:
    net.body[0].widen[1].layer.eps = 0.5


@change
def attribute_that_cuts(net: Any) -> None:
    net.body[3].spread[3].share = 8


@change
def attribute_of_a_block(net: Any) -> None:
    assert net.body[4].adds
    net.body[4].adds = False


@change
def another_stride(net: Any) -> None:
    net.body[0].spread[0].stride = 1


@change
def a_hook_inside(net: Any) -> None:
    net.body[0].widen[2].register_forward_hook(lambda module, args, output: output + 1)


@change
def another_class(net: Any) -> None:
    class Absolute(ElasticBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    net.body[0].__class__ = Absolute


@only_running
def a_training_forward(net: Any) -> None:
    with torch.no_grad():
        for path in covering(SIZES).tolist():
            once(net.train(), draw_images(6, 20, seed=3)[0], path)


@only_running
def running_mean_in_place(net: Any) -> None:
    net.body[0].widen[1].layer.running_mean += 0.5


@only_running
def running_variance_replaced(net: Any) -> None:
    norm = net.body[0].spread[1].layer
    norm.running_var = norm.running_var * 3


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    net, view = net_and_view()
    paths = covering(SIZES)
    before = {bn: check(net, view, paths, bn).losses for bn in ("batch", "running")}
    CHANGES[name](net)
    for bn, earlier in before.items():
        after = check(net, view, paths, bn).losses
        seen = relative_error(after, earlier) > 1e-6
        assert seen == (bn == "running" or name not in ONLY_RUNNING)


def test_many_changes_one_after_the_other() -> None:
    net, view = net_and_view()
    paths = covering(SIZES)
    losses = [check(net, view, paths).losses]
    for name in ("sgd", "data_replaced", "eps_attribute", "attribute_that_cuts", "matrix_replaced", "another_stride"):
        CHANGES[name](net)
        losses.append(check(net, view, paths).losses)
        assert relative_error(losses[-1], losses[-2]) > 1e-6


def test_a_class_attribute_that_changes_how_weights_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    net, view = net_and_view()
    paths = covering(SIZES)
    before = check(net, view, paths).losses
    monkeypatch.setattr(AnyKernelConv, "MATRICES", False)
    assert relative_error(check(net, view, paths).losses, before) > 1e-6


def test_another_dtype() -> None:
    net, view = net_and_view()
    paths = covering(SIZES)
    check(net, view, paths[:2])
    net.float()
    images, targets = BATCH
    result = evaluate_paths(view, paths, images.float(), targets)
    expected = own_losses(copy.deepcopy(net).double(), once, paths, images, targets).mean(1)
    assert relative_error(result.losses, expected) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.body[2], "spread", copy.deepcopy(net.body[2].spread)),
        lambda net: net.body.append(copy.deepcopy(net.body[5])),
        lambda net: net.body[1].register_forward_hook(lambda module, args, output: output.abs()),
    ],
)
def test_other_modules_and_hooks_of_blocks_are_refused(change: Change) -> None:
    net, view = net_and_view()
    check(net, view, covering(SIZES))
    change(net)
    with pytest.raises(RuntimeError, match=r"^supernet: "):
        evaluate_paths(view, covering(SIZES), *BATCH)


# What is active while nothing is evaluated --------------------------------------------------------------------------


def test_the_active_subnet_is_left_alone_and_does_not_matter() -> None:
    net, view = net_and_view()
    paths = covering(SIZES)
    expected = check(net, view, paths).losses
    known = len(view._elastic._units.known)  # type: ignore[union-attr]
    for option in range(3):
        once(net, BATCH[0], [option] * len(ONCE))  # its forward sets what is inside blocks
        state = [dict(vars(module)) for module in net.modules()]
        assert torch.equal(evaluate_paths(view, paths, *BATCH).losses, expected)
        assert [dict(vars(module)) for module in net.modules()] == state
        assert net.depths == [DEPTHS[option]] * 2
    assert len(view._elastic._units.known) == known  # type: ignore[union-attr]  # nothing was traced again


def set_ratios(net: Any, values: Sequence[int]) -> None:
    for block, ratio in zip(net.body, values, strict=True):
        block.ratio = float(ratio)


def test_what_a_path_does_not_set_is_as_it_is() -> None:
    net = make("once for all")
    view = adapt(net, choices=[RATIOS] * 6, select=set_ratios)
    assert view.reason is None

    def run(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
        set_ratios(net, [RATIOS[op] for op in path])
        return net(images)

    paths = covering((3,) * 6)
    losses = [check(net, view, paths, run=run).losses]
    for kernel in KERNELS[:2]:
        net.body[1].kernel_size = kernel
        losses.append(check(net, view, paths, run=run).losses)
        assert relative_error(losses[-1], losses[-2]) > 1e-6
    net.depths[1] = 1
    assert check(net, view, paths, run=run).plan.num_layers == 4


class Relative(OnceNet):
    """What a path sets depends on what was set before: depths are counted from the present ones."""

    def be(self, kernels: Sequence[int], ratios: Sequence[int], depths: Sequence[int]) -> None:
        super().be(kernels, ratios, [min(now, wanted) for now, wanted in zip(self.depths, depths, strict=True)])


def test_what_was_set_before_counts() -> None:
    net = Relative().double()
    randomise(net)
    paths = covering(SIZES)
    with pytest.raises(ValueError, match="logits differ from forward's"):  # that of the path before has set depths
        evaluate_paths(adapted(net), paths, *BATCH)
    view = adapt(net, choices=ONCE, select=set_once, verify=False)
    first = check(net, view, paths)
    net.depths[:] = [2, 2]
    assert relative_error(first.losses, check(net, view, paths).losses) > 1e-6
    assert not view._elastic._units.unset  # type: ignore[union-attr]


class ThroughAnObject(OnceNet):
    """All blocks read one object, which no trace can see changing."""

    def __init__(self) -> None:
        super().__init__()
        self.common = SimpleNamespace(kernel=7)
        for block in self.body:
            block.common = self.common  # type: ignore[assignment]
            block.__class__ = CommonBlock

    def be(self, kernels: Sequence[int], ratios: Sequence[int], depths: Sequence[int]) -> None:
        super().be(kernels, ratios, depths)
        self.common.kernel = kernels[0]


class CommonBlock(ElasticBlock):
    def forward(self, x: Tensor) -> Tensor:
        self.kernel_size = self.common.kernel  # type: ignore[union-attr, assignment]
        return super().forward(x)


def test_what_cannot_be_seen_is_called_path_by_path() -> None:
    net = ThroughAnObject().double()
    randomise(net)
    view = adapt(net, choices=ONCE, select=set_once)
    assert view.reason is not None
    assert "does something else after other paths" in view.reason
    check(net, view, covering(SIZES))


# Layers and nodes ---------------------------------------------------------------------------------------------------


def test_blocks_that_do_not_run_make_no_difference() -> None:
    net, view = net_and_view()
    base = path_of([5] * 6, [3] * 6, [2, 1])
    others = []
    for number in (2, 4, 5):  # beyond the depth of their stages
        for column in (number, 6 + number):
            others.append([*base[:column], (base[column] + 1) % 3, *base[column + 1 :]])
    last = path_of([5, 5, 5, 7, 5, 5], [3] * 6, [2, 1])
    plan = check(net, view, torch.tensor([base, *others, last])).plan
    assert plan.nodes_per_layer == (1, 1, 1, 2, 2, 2)
    assert plan.num_layers == 6
    assert plan.macs_saved > 0
    # Alone, a path has nothing in common with others.
    alone = evaluate_paths(view, torch.tensor([base]), *BATCH).plan
    assert (alone.nodes_per_layer, alone.macs_saved) == ((1,) * 6, 0)


@pytest.mark.parametrize("size", [17, 33])
def test_resolutions(size: int) -> None:
    net, view = net_and_view("once for all, mobile")
    paths, (images, targets) = covering(SIZES), draw_images(5, size)
    for micro_batch in (None, 2):
        how: dict[str, Any] = {"bn": "running", "micro_batch": micro_batch, "per_image": True}
        result = evaluate_paths(view, paths, images, targets, **how)
        expected = own_losses(net, once, paths, images, targets, "running")
        assert relative_error(result.image_losses, expected) < FP64
    few = evaluate_paths(view, paths, images, targets, bn="running", max_memory=1_000_000)
    assert relative_error(few.losses, result.losses) < FP64


def test_what_is_not_fused_is_named() -> None:
    net = make("once for all")
    net.body[1].spread[2] = nn.GELU()
    view = adapt(net, choices=ONCE, select=set_once)
    result = check(net, view, torch.tensor([path_of([5] * 6, [3] * 6, [3, 3])]))
    assert "body.1.spread.2" in result.plan.kernels or "gelu" in result.plan.kernels
    assert 0 < result.plan.macs_fused < result.plan.macs_computed
    with pytest.raises(ValueError, match="fused: expected a supernet that the fused kernels can evaluate"):
        evaluate_paths(view, covering(SIZES), *BATCH, fused=True)


def test_stages_are_named_after_the_blocks() -> None:
    _, view = net_and_view("once for all, mobile")
    result = evaluate_paths(view, covering(SIZES), *BATCH, profile=True)
    assert result.profile is not None
    names = ["stem", *(f"body.{number}" for number in range(6)), "fixed 0", "head", "loss"]
    assert sorted(stage.stage for stage in result.profile) == sorted(names)


def test_a_path_filter_draws_sub_networks() -> None:
    _, view = net_and_view()
    schedule, generator = ExploitSchedule(warmup_steps=0, total_steps=4), torch.Generator().manual_seed(0)
    path_filter = PathFilter(view, m=4, k=2, pool_size=8, schedule=schedule, generator=generator)
    kept = path_filter.draw(*BATCH)
    assert kept.shape == (2, len(ONCE))
    assert path_filter.last is not None
    losses = evaluate_paths(view, kept, *BATCH).losses
    assert relative_error(losses, path_filter.last.evaluation.losses.sort().values[:2]) < FP64


def test_no_columns() -> None:
    _, view = net_and_view()
    assert repr(view) == "AdaptedSupernet(OnceNet, 14 choices, a chain)"
    assert view.options == tuple(map(tuple, ONCE))
    with pytest.raises(AttributeError, match="OnceNet is elastic: its layers are no columns of a path"):
        view.choices  # noqa: B018


# Checks -------------------------------------------------------------------------------------------------------------


def test_operations_are_verified_when_they_are_first_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    net, view = net_and_view()
    first, second = torch.tensor([path_of([3] * 6, [2] * 6, [3, 3])]), torch.tensor([path_of([3] * 6, [4] * 6, [3, 3])])
    check(net, view, first)
    original = adapt_verify.recognise_operation

    def wrong(module: nn.Module, channels: int) -> Any:
        weights = original(module, channels)
        assert isinstance(weights, InvertedBottleneckWeights)
        return replace(weights, activation="silu")

    monkeypatch.setattr(adapt_verify, "recognise_operation", wrong)
    check(net, view, first)
    for _ in range(2):  # a refusal is no pass
        with pytest.raises(ValueError, match=r"body\.\d with kernel_size 3, ratio 4\.0 is recognised as .* differs by"):
            evaluate_paths(view, second, *BATCH)
    monkeypatch.undo()
    check(net, view, second)


def test_the_example_is_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make("once for all")
    view = adapt(net, choices=ONCE, select=set_once, example=BATCH[0])
    assert view._elastic.unverified() == []  # type: ignore[union-attr]
    monkeypatch.setattr(adapt_verify, "described", lambda weights, x: x)
    with pytest.raises(ValueError, match="is recognised as StemWeights, which differs in shape"):
        adapt(net, choices=ONCE, select=set_once, example=BATCH[0])


def test_prepared_evaluations_read_the_weights_anew() -> None:
    net, view = net_and_view()
    images, targets = BATCH
    paths = covering(SIZES)
    prepared = prepare_paths(view, paths, images, targets, per_image=True)
    expected = own_losses(net, once, paths, images, targets)
    assert relative_error(prepared.result().image_losses, expected) < FP64
    net.body[0].spread[0].layer.weight.data.mul_(-0.5)
    net.body[1].spread[0].to_3.data.add_(0.3)
    net.body[3].widen[0].layer.weight.data.add_(0.1)
    prepared.launch()
    after = own_losses(net, once, paths, images, targets)
    assert relative_error(after, expected) > 1e-6
    assert relative_error(prepared.result().image_losses, after) < FP64
    conv = net.body[1].spread[0]
    conv.to_5 = nn.Parameter(conv.to_5.detach().clone())
    with pytest.raises(RuntimeError, match="in the same memory"):
        prepared.result()


def test_two_threads_evaluate_a_view() -> None:
    net, view = net_and_view()
    sets = [covering(SIZES, 4), covering(SIZES, 1).flip(0)]
    expected = [evaluate_paths(adapted(net), paths, *BATCH).losses for paths in sets]
    found: list[Any] = [None, None]

    def run(number: int) -> None:
        found[number] = evaluate_paths(view, sets[number], *BATCH).losses

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for losses, want in zip(found, expected, strict=True):
        assert relative_error(losses, want) < FP64


def test_a_fresh_network_has_weights_that_matrices_leave_alone() -> None:
    """Unlike those of the tests, which would not see a matrix that is left out."""
    fresh, other = OnceNet().body[0].spread[0], make_once().body[0].spread[0]
    for conv, same in ((fresh, True), (other, False)):
        conv.kernel = 3
        assert torch.equal(conv.weight(16), conv.layer.weight[:16, :, 2:5, 2:5]) == same
