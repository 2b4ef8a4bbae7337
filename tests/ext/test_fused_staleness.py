"""Whatever changed a weight or a module since the last call, and however: the next fused call sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from supernets import draw_images, relative_error
from test_fused_spaces import FP64, covering_paths, make_supernet, small_space, small_supernet
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from greedynas import Supernet
from greedynas_ext import evaluate_paths

Change = Callable[[Supernet], object]
CHANGES: dict[str, Change] = {}


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


def step(net: Supernet, optimizer: torch.optim.Optimizer) -> None:
    images, targets = draw_images(4, 17, seed=8)
    for path in covering_paths(net).tolist():
        F.cross_entropy(net(images, path), targets).backward()
    optimizer.step()


@change
def sgd(net: Supernet) -> None:
    step(net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9))


@change
def adamw_foreach(net: Supernet) -> None:
    step(net, torch.optim.AdamW(net.parameters(), 0.01, foreach=True))


@change
def adamw_fused(net: Supernet) -> None:
    step(net, torch.optim.AdamW(net.parameters(), 0.01, fused=True))


@change
def data_in_place(net: Supernet) -> None:
    net.choices[1][0].project.conv.weight.data.mul_(0.5).add_(0.1)


@change
def data_replaced(net: Supernet) -> None:
    weight = net.choices[1][0].depthwise.conv.weight
    weight.data = weight.data.flip(0)


@change
def data_replaced_by_strided(net: Supernet) -> None:
    weight = net.choices[1][0].depthwise.conv.weight
    weight.data = weight.data.flip(3).transpose(2, 3).contiguous().transpose(2, 3)


@change
def no_grad_copy(net: Supernet) -> None:
    with torch.no_grad():
        net.head.linear.weight.copy_(net.head.linear.weight.flip(0))


@change
def inference_mode_write(net: Supernet) -> None:
    with torch.inference_mode():
        net.head.linear.bias.add_(torch.arange(5.0))


@change
def numpy_view(net: Supernet) -> None:
    net.stem.conv.weight.detach().numpy()[:, 0] *= 3.0


@change
def numpy_view_of_squeeze_excitation(net: Supernet) -> None:
    net.choices[1][1].se.expand.bias.detach().numpy()[:] -= 2.0


def other_state(net: Supernet) -> dict[str, Tensor]:
    return make_supernet(small_space(), seed=5).state_dict()


@change
def load_state_dict(net: Supernet) -> None:
    net.load_state_dict(other_state(net))


@change
def load_state_dict_assign(net: Supernet) -> None:
    net.load_state_dict(other_state(net), assign=True)


@change
def ema_copied_back(net: Supernet) -> None:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(net)
    sgd(net)
    average.update_parameters(net)
    before = evaluate(net)
    for parameter, averaged in zip(net.parameters(), average.module.parameters(), strict=True):
        parameter.data.copy_(averaged)
    assert differ(before, evaluate(net))


@change
def ema_swapped_storages(net: Supernet) -> None:
    average = AveragedModel(net)
    with torch.no_grad():
        for averaged in average.module.parameters():
            averaged.mul_(0.9)
        for parameter, averaged in zip(net.parameters(), average.module.parameters(), strict=True):
            parameter.data, averaged.data = averaged.data, parameter.data


@change
def another_parameter(net: Supernet) -> None:
    conv = net.choices[1][0].expand.conv
    conv.weight = nn.Parameter(conv.weight.detach().roll(1, 0))


@change
def another_batch_norm_parameter(net: Supernet) -> None:
    norm = net.choices[1][0].expand.bn
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


@change
def without_affine(net: Supernet) -> None:
    norm = net.choices[1][0].expand.bn
    norm.weight = norm.bias = None


@change
def another_module(net: Supernet) -> None:
    net.choices[1][0] = copy.deepcopy(make_supernet(small_space(), seed=5).choices[1][0])


@change
def another_sub_module(net: Supernet) -> None:
    net.choices[1][0].depthwise.conv = copy.deepcopy(make_supernet(small_space(), seed=5).choices[1][0].depthwise.conv)


@change
def another_kernel(net: Supernet) -> None:
    net.choices[1][0].depthwise.conv = nn.Conv2d(36, 36, 7, padding=3, groups=36, bias=False, dtype=torch.float64)


@change
def another_activation_module(net: Supernet) -> None:
    net.choices[1][0].depthwise.act = nn.SiLU()
    net.choices[1][0].expand.act = nn.SiLU()


@change
def exchanged_operations(net: Supernet) -> None:
    net.choices[1][0], net.choices[1][2] = net.choices[1][2], net.choices[1][0]


@change
def eps_attribute(net: Supernet) -> None:
    net.choices[1][0].project.bn.eps = 0.5


@change
def upper_bound_attribute(net: Supernet) -> None:
    for part in (net.choices[1][0].expand, net.choices[1][0].depthwise):
        part.act = nn.Hardtanh(0.0, 6.0)
    evaluate(net)
    for part in (net.choices[1][0].expand, net.choices[1][0].depthwise):
        part.act.max_val = 1.0  # nothing that the kernels compute: the modules run


@change
def residual_attribute(net: Supernet) -> None:
    assert net.choices[1][0].residual
    net.choices[1][0].residual = False


@change
def squeeze_excitation_removed(net: Supernet) -> None:
    net.choices[1][1].se = None


@change
def stride_attribute(net: Supernet) -> None:
    for operation in net.choices[2]:
        conv = operation.conv if hasattr(operation, "conv") else operation.depthwise.conv
        conv.stride = (1, 1)


# Their factor would vanish in the batch normalisation that follows, so these are no scalings.
@change
def a_hook(net: Supernet) -> None:
    net.choices[1][0].register_forward_hook(lambda module, args, output: output.abs())


@change
def a_replaced_forward(net: Supernet) -> None:
    operation = net.choices[1][0]
    original = operation.forward
    operation.forward = lambda x: original(x).abs()


@change
def a_patched_class_attribute(net: Supernet) -> None:
    class Doubled(type(net.choices[1][0])):  # type: ignore[misc]
        def forward(self, features: Tensor) -> Tensor:
            output: Tensor = super().forward(features).abs()
            return output

    net.choices[1][0].__class__ = Doubled


ONLY_RUNNING: set[str] = set()  # what statistics of the batch do not depend on


def running(function: Change) -> Change:
    ONLY_RUNNING.add(function.__name__)
    return change(function)


@running
def a_training_forward(net: Supernet) -> None:
    images, _ = draw_images(6, 17, seed=3)
    with torch.no_grad():
        net.train()(images, [0, 0, 0])


@running
def running_mean_in_place(net: Supernet) -> None:
    net.choices[1][0].depthwise.bn.running_mean += 0.5


@running
def running_variance_replaced(net: Supernet) -> None:
    norm = net.choices[1][0].depthwise.bn
    norm.running_var = norm.running_var * 3


def evaluate(net: Supernet, bn: str = "batch", fused: bool | None = None) -> Tensor:
    images, targets = draw_images(4, 17)
    result = evaluate_paths(net, covering_paths(net), images, targets, bn=bn, fused=fused)
    return result.losses


def differ(one: Tensor, other: Tensor) -> bool:
    return relative_error(one, other) > 1e-6


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    net = small_supernet()
    before = {bn: evaluate(net, bn, fused=True) for bn in ("batch", "running")}
    CHANGES[name](net)
    for bn, earlier in before.items():
        after = evaluate(net, bn)
        assert relative_error(after, evaluate(net, bn, fused=False)) <= FP64
        assert differ(after, earlier) == seen_by(name, bn)


def seen_by(name: str, bn: str) -> bool:
    """Running statistics make no difference to those of the batch, and all else makes one to both."""
    return not (bn == "batch" and name in ONLY_RUNNING)


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_many_changes_one_after_the_other(bn: str) -> None:
    """Descriptions are kept from call to call; a second change must not find that of the first."""
    net = small_supernet()
    losses = [evaluate(net, bn, fused=True)]
    for name in ("sgd", "data_replaced", "eps_attribute", "another_module", "residual_attribute", "numpy_view"):
        CHANGES[name](net)
        losses.append(evaluate(net, bn, fused=True))
        assert relative_error(losses[-1], evaluate(net, bn, fused=False)) <= FP64
        assert differ(losses[-1], losses[-2])


def test_a_supernet_at_the_address_of_one_that_is_gone() -> None:
    images, targets = draw_images(4, 17)
    for seed in range(4):
        net = make_supernet(small_space(), seed=seed)
        paths = covering_paths(net)
        fused = evaluate_paths(net, paths, images, targets, fused=True).losses
        assert relative_error(fused, evaluate_paths(net, paths, images, targets, fused=False).losses) <= FP64
        del net
