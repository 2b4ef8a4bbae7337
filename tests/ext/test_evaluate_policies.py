"""Statistics, batches, precision, selection, and what the plan and the profile say."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from supernets import (
    Chain,
    Function,
    build,
    draw_images,
    draw_paths,
    odd_supernet,
    plain_image_losses,
    plain_logits,
    relative_error,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from greedynas_ext import evaluate_paths

POLICIES = ("batch", "running", "recalibrated")
PATHS = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]])


@pytest.fixture
def net() -> Chain:
    return build([["conv bn", "residual in place"], ["bn first", "residual"]])


def calibration_for(bn: str) -> Tensor | None:
    return draw_images(5, seed=9)[0] if bn == "recalibrated" else None


# Batches ------------------------------------------------------------------------------------------------------------


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [draw_images(size, seed=size) for size in sizes]


@pytest.mark.parametrize("bn", POLICIES)
def test_batches_of_different_sizes_have_statistics_of_their_own_and_one_mean_over_images(net: Chain, bn: str) -> None:
    loader, calibration = batches(4, 2, 7), calibration_for(bn)
    parts = [plain_image_losses(net, PATHS, *batch, bn, calibration) for batch in loader]
    expected = torch.cat([losses for losses, _ in parts], 1)
    result = evaluate_paths(net, PATHS, loader, bn=bn, calibration=calibration, per_image=True)
    torch.testing.assert_close(result.image_losses, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.losses, expected.mean(1), rtol=1e-12, atol=0)
    accuracy = sum(part[1] * len(batch[0]) for part, batch in zip(parts, loader, strict=True)) / 13
    torch.testing.assert_close(result.accuracy, accuracy, rtol=1e-12, atol=0)


def test_a_loader_is_read_once_and_one_batch_at_a_time(net: Chain) -> None:
    read: list[int] = []

    def loader() -> Iterator[list[Tensor]]:
        for number, batch in enumerate(batches(3, 2)):
            assert net.training, "flags are as the user left them while his code runs"
            read.append(number)
            yield list(batch)

    result = evaluate_paths(net, PATHS, loader())
    assert read == [0, 1]
    assert torch.equal(result.losses, evaluate_paths(net, PATHS, batches(3, 2)).losses)


def test_a_torch_data_loader(net: Chain) -> None:
    images, targets = draw_images(7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, targets), batch_size=3)
    result = evaluate_paths(net, PATHS, loader, bn="running")
    whole = evaluate_paths(net, PATHS, images, targets, bn="running")
    assert relative_error(result.losses, whole.losses) < 1e-12
    assert result.statistics == "running statistics"


@pytest.mark.parametrize(
    ("count", "micro_batch", "sizes", "text"),
    [
        (6, 2, [2, 2, 2], "batch statistics of 2 images at a time (micro_batch=2)"),
        (7, 3, [3, 2, 2], "batch statistics of 2 to 3 images at a time (micro_batch=3)"),
        (5, 9, [5], "batch statistics of 5 images at a time (micro_batch=9)"),
        (5, None, [5], "batch statistics of 5 images at a time"),
    ],
)
def test_micro_batches_are_parts_evaluated_by_hand(
    net: Chain, count: int, micro_batch: int | None, sizes: list[int], text: str
) -> None:
    images, targets = draw_images(count)
    parts = zip(images.split(sizes), targets.split(sizes), strict=True)
    expected = torch.cat([plain_image_losses(net, PATHS, *part)[0] for part in parts], 1)
    result = evaluate_paths(net, PATHS, images, targets, micro_batch=micro_batch, per_image=True)
    torch.testing.assert_close(result.image_losses, expected, rtol=1e-10, atol=0)
    assert result.statistics == text


@pytest.mark.parametrize(
    ("bn", "text"),
    [("running", "running statistics"), ("recalibrated", "constants from the calibration images")],
)
def test_micro_batches_change_nothing_where_statistics_do_not_depend_on_them(net: Chain, bn: str, text: str) -> None:
    images, targets = draw_images(5)
    kwargs: Any = {"bn": bn, "calibration": calibration_for(bn)}
    whole = evaluate_paths(net, PATHS, images, targets, **kwargs)
    parts = evaluate_paths(net, PATHS, images, targets, micro_batch=2, **kwargs)
    assert relative_error(parts.losses, whole.losses) < 1e-12
    assert parts.statistics == whole.statistics == text


def test_statistics_of_several_batches(net: Chain) -> None:
    assert evaluate_paths(net, PATHS, batches(4, 2)).statistics == "batch statistics of 2 to 4 images at a time"


# Policies -----------------------------------------------------------------------------------------------------------


class Frozen(nn.BatchNorm2d):
    """Stays in evaluation mode, as detection backbones do."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


@pytest.mark.parametrize("bn", POLICIES)
def test_the_policy_is_for_every_batch_normalisation_whatever_its_flag(net: Chain, bn: str) -> None:
    other = copy.deepcopy(net)
    frozen = Frozen(4).double()
    frozen.load_state_dict(other.choices[0][0][1].state_dict())
    other.choices[0][0][1] = frozen.train()
    other.choices[1][0][0].eval()
    images, targets = draw_images(3)
    kwargs: Any = {"bn": bn, "calibration": calibration_for(bn)}
    one = evaluate_paths(net, PATHS, images, targets, **kwargs)
    assert torch.equal(one.losses, evaluate_paths(other, PATHS, images, targets, **kwargs).losses)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bn", POLICIES)
def test_the_supernets_own_mode_makes_no_difference(net: Chain, bn: str, training: bool) -> None:
    images, targets = draw_images(3)
    kwargs: Any = {"bn": bn, "calibration": calibration_for(bn)}
    expected = plain_image_losses(net, PATHS, images, targets, bn, kwargs["calibration"])[0].mean(1)
    assert (
        relative_error(evaluate_paths(net.train(training), PATHS, images, targets, **kwargs).losses, expected) < 1e-10
    )


@pytest.mark.parametrize("bn", POLICIES)
def test_instance_normalisation_uses_each_image_or_what_is_stored(bn: str) -> None:
    net = build([["conv bn"]])
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True).double().train()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    norm.running_var.fill_(2.0)
    net.choices[0][0] = norm
    images, targets = draw_images(3)
    state = copy.deepcopy(norm.state_dict())
    result = evaluate_paths(net, [[0]], images, targets, bn=bn, calibration=calibration_for(bn))
    for name, value in norm.state_dict().items():
        assert torch.equal(value, state[name]), name
    own = nn.InstanceNorm2d(4, affine=True).double()
    net.choices[0][0] = norm if bn == "running" else own
    expected = plain_image_losses(net, torch.tensor([[0]]), images, targets, bn, calibration_for(bn))[0].mean(1)
    assert relative_error(result.losses, expected) < 1e-10


def test_recalibrated_statistics_belong_to_the_prefix_and_not_to_the_operation() -> None:
    """The same operation behind two prefixes keeps two sets of constants."""
    net = build([["conv bn", "mul_ of a view"], ["bn first"]])
    paths = torch.tensor([[0, 0], [1, 0]])
    images, targets = draw_images(3)
    together = evaluate_paths(
        net, paths, images, targets, bn="recalibrated", calibration=calibration_for("recalibrated")
    )
    for row, path in enumerate(paths):
        alone = evaluate_paths(
            net, path[None], images, targets, bn="recalibrated", calibration=calibration_for("recalibrated")
        )
        assert together.losses[row] == alone.losses[0]


def test_calibrating_on_the_images_themselves_is_the_batch_policy(net: Chain) -> None:
    images, targets = draw_images(5)
    batch = evaluate_paths(net, PATHS, images, targets)
    recalibrated = evaluate_paths(net, PATHS, images, targets, bn="recalibrated", calibration=images)
    assert relative_error(recalibrated.losses, batch.losses) < 1e-10


# Precision ----------------------------------------------------------------------------------------------------------


def mixed_net() -> Chain:
    names = ["conv bn", "bn first", "elastic bn", "functional bn", "raw bn", "sync bn", "bn without affine"]
    others = [
        "attention",
        "dot product",
        "group norm",
        "residual in place",
        "bn without running statistics",
        "identity",
    ]
    return build([names, others])


MIXED_PATHS = torch.tensor([[i, (5 * i + j) % 6] for i in range(7) for j in (0, 1)])


def autocast(dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("inside_autocast", [False, True])
def test_fp32_is_the_loop_over_a_float32_copy(bn: str, dtype: torch.dtype, inside_autocast: bool) -> None:
    net = mixed_net().to(dtype)
    images, targets = draw_images(3, dtype=torch.float32)
    calibration = draw_images(4, dtype=torch.float32, seed=9)[0] if bn == "recalibrated" else None
    expected, _ = plain_image_losses(copy.deepcopy(net).float(), MIXED_PATHS, images, targets, bn, calibration)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside_autocast):
        result = evaluate_paths(net, MIXED_PATHS, images, targets, bn=bn, calibration=calibration, precision="fp32")
    assert result.losses.dtype == torch.float32
    assert relative_error(result.losses, expected.mean(1)) < 1e-5


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bf16_is_the_loop_under_autocast(bn: str, dtype: torch.dtype) -> None:
    net = mixed_net().to(dtype)
    images, targets = draw_images(3, dtype=torch.float32)
    with autocast():
        expected, _ = plain_image_losses(copy.deepcopy(net).float(), MIXED_PATHS, images, targets, bn)
    result = evaluate_paths(net, MIXED_PATHS, images, targets, bn=bn, precision="bf16")
    assert result.losses.dtype == torch.float32
    assert relative_error(result.losses, expected.mean(1)) < 1e-5
    exact = evaluate_paths(net, MIXED_PATHS, images, targets, bn=bn, precision="fp32")
    assert 1e-5 < relative_error(result.losses, exact.losses) < 0.3, "it did run in bfloat16"


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_none_follows_an_active_autocast(bn: str) -> None:
    net = mixed_net().float()
    images, targets = draw_images(3, dtype=torch.float32)
    with autocast():
        result = evaluate_paths(net, MIXED_PATHS, images, targets, bn=bn)
    assert torch.equal(result.losses, evaluate_paths(net, MIXED_PATHS, images, targets, bn=bn, precision="bf16").losses)
    with torch.autocast("cpu", dtype=torch.float16):
        half = evaluate_paths(net, MIXED_PATHS[:2], images, targets, bn=bn)
        expected, _ = plain_image_losses(net, MIXED_PATHS[:2], images, targets, bn)
    assert relative_error(half.losses, expected.mean(1)) < 1e-5


@pytest.mark.parametrize("bn", POLICIES)
def test_a_bf16_supernet(bn: str, request: pytest.FixtureRequest) -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds elsewhere
    request.addfinalizer(lambda: torch.backends.mha.set_fastpath_enabled(fast))
    net = mixed_net().bfloat16()
    images, targets = draw_images(3, dtype=torch.float32)
    calibration = draw_images(4, seed=9)[0].bfloat16() if bn == "recalibrated" else None
    expected, _ = plain_image_losses(net, MIXED_PATHS, images.bfloat16(), targets, bn, calibration)
    result = evaluate_paths(net, MIXED_PATHS, images, targets, bn=bn, calibration=calibration)
    assert result.losses.dtype == torch.float32
    # The loop for recalibrated normalises in bfloat16 arithmetic, step by step.
    assert relative_error(result.losses, expected.mean(1)) < (0.05 if bn == "recalibrated" else 1e-5)
    forced = evaluate_paths(net, MIXED_PATHS, images, targets, bn=bn, calibration=calibration, precision="bf16")
    assert relative_error(forced.losses, expected.mean(1)) < 0.05


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_recalibrating_on_the_images_in_any_precision(bn: str, precision: str | None) -> None:
    """Constants and batch statistics of the same images agree as well as the precision allows."""
    net = mixed_net().float()
    images, targets = draw_images(4, dtype=torch.float32)
    batch = evaluate_paths(net, MIXED_PATHS, images, targets, precision=precision)
    constants = evaluate_paths(
        net, MIXED_PATHS, images, targets, bn="recalibrated", calibration=images, precision=precision
    )
    assert relative_error(constants.losses, batch.losses) < (0.02 if precision == "bf16" else 1e-5)


def test_float64_is_kept_and_images_are_cast() -> None:
    net = build([["conv bn", "residual"]])
    images, targets = draw_images(3, dtype=torch.float32)
    result = evaluate_paths(net, [[0], [1]], images, targets, per_image=True)
    assert result.losses.dtype == result.accuracy.dtype == torch.float64
    assert result.image_losses is not None
    assert result.image_losses.dtype == torch.float64
    expected, _ = plain_image_losses(net, torch.tensor([[0], [1]]), images.double(), targets)
    assert relative_error(result.losses, expected.mean(1)) < 1e-12


@pytest.mark.parametrize("precision", [None, "bf16", "fp32"])
def test_a_training_step_in_the_same_autocast_region_gets_its_gradients(precision: str | None) -> None:
    """Autocast keeps the weights that it casts: one cast without gradients would be found by the step."""
    images, targets = draw_images(4, dtype=torch.float32)

    def step(evaluated: bool) -> list[Tensor | None]:
        net = mixed_net().float()
        with autocast():
            if evaluated:
                evaluate_paths(net, MIXED_PATHS, images, targets, precision=precision)
            x = net.stem(images)
            for layer, op in zip(net.choices, (0, 4), strict=True):
                x = layer[op](x)
            F.cross_entropy(net.head(x).float(), targets).backward()
            if evaluated:
                evaluate_paths(net, MIXED_PATHS, images, targets, precision=precision)
        return [parameter.grad for parameter in net.parameters()]

    without, with_evaluation = step(False), step(True)
    assert sum(gradient is not None for gradient in without) > 5
    for one, two in zip(without, with_evaluation, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def test_autocast_is_as_before() -> None:
    net = mixed_net().float()
    images, targets = draw_images(2, dtype=torch.float32)
    for precision in (None, "fp32", "bf16"):
        evaluate_paths(net, MIXED_PATHS[:1], images, targets, precision=precision)
        assert not torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", dtype=torch.float16):
            evaluate_paths(net, MIXED_PATHS[:1], images, targets, precision=precision)
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == torch.float16
            assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients_whatever_the_mode(net: Chain, mode: Callable[[], Any]) -> None:
    images, targets = draw_images(3)
    seen: list[bool] = []
    net.choices[0][0] = nn.Sequential(
        Function(lambda x: (seen.append(torch.is_grad_enabled()), x)[1]), *net.choices[0][0]
    )
    expected = evaluate_paths(net, PATHS, images, targets)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        result = evaluate_paths(net, PATHS, images.requires_grad_(), targets)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(result.losses, expected.losses)
    assert not result.losses.requires_grad
    assert not any(seen)


def test_a_supernet_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = build([["conv bn", "cumsum"]])
    images, targets = draw_images(3)
    expected, _ = plain_image_losses(net, torch.tensor([[0], [1]]), images, targets)
    assert relative_error(evaluate_paths(net, [[0], [1]], images, targets).losses, expected.mean(1)) < 1e-10


# Selection ----------------------------------------------------------------------------------------------------------


def test_top_k_names_the_lowest_losses_first(net: Chain) -> None:
    images, targets = draw_images(4)
    paths = torch.cat([PATHS, PATHS])
    result = evaluate_paths(net, paths, images, targets, k=5)
    assert result.top_k is not None
    assert result.top_k.dtype == torch.int64
    # equal losses in order of index
    expected = sorted(range(8), key=lambda path: (float(result.losses[path]), path))[:5]
    assert result.top_k.tolist() == expected


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_path_whose_weights_are_not_finite_leaves_the_others_right(net: Chain, bn: str, value: float) -> None:
    images, targets = draw_images(3)
    calibration = calibration_for(bn)
    paths = torch.cat([PATHS, PATHS[:1]])
    expected, _ = plain_image_losses(net, paths, images, targets, bn, calibration)
    with torch.no_grad():
        net.choices[1][1].body[0].weight[0, 0, 0, 0] = value
    kwargs: Any = {"bn": bn, "calibration": calibration}
    bad = paths[:, 1] == 1
    for max_memory in (None, 1 << 40):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = evaluate_paths(net, paths, images, targets, k=2, max_memory=max_memory, **kwargs)
        assert torch.isnan(result.losses).tolist() == bad.tolist()
        assert relative_error(result.losses[~bad], expected.mean(1)[~bad]) < 1e-10
        assert not bad[result.top_k].any()
    with pytest.warns(RuntimeWarning, match="only 2 of 5 paths have a finite loss, fewer than k=3") as caught:
        result = evaluate_paths(net, paths, images, targets, k=3, **kwargs)
    assert caught[0].filename == __file__
    assert result.top_k is not None
    assert result.top_k.tolist()[2] == int(bad.nonzero()[0])


# Plan and profile ---------------------------------------------------------------------------------------------------


def counted_macs(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops() // 2


def test_macs_of_the_plan_are_those_that_torch_counts() -> None:
    net = odd_supernet()
    paths = torch.cat([draw_paths(net, 8), draw_paths(net, 2)])
    images, targets = draw_images(3)
    per_path = [counted_macs(lambda path=path: _with_grad(net, path, images)) for path in paths.tolist()]
    result = evaluate_paths(net, paths, images, targets)
    plan = result.plan
    assert 3 * (plan.macs_computed + plan.macs_saved) == sum(per_path)
    assert plan.macs_saved > 0
    assert plan.shared_fraction == plan.macs_saved / (plan.macs_computed + plan.macs_saved)
    assert (
        plan.unique_nodes
        == sum(plan.nodes_per_layer)
        == len({tuple(p[: n + 1]) for p in paths.tolist() for n in range(4)})
    )
    alone = evaluate_paths(net, paths[:1], images, targets).plan
    assert 3 * alone.macs_computed == per_path[0]
    assert alone.macs_saved == 0


def _with_grad(net: Chain, path: list[int], images: Tensor) -> Tensor:
    """With gradients torch takes no fast path for attention, whose products its counter would not see."""
    with torch.enable_grad():
        x = net.stem(images)
        for layer, op in zip(net.choices, path, strict=True):
            x = layer[op](x.clone())
        return net.head(x)


G = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


COUNTED: dict[str, Callable[[Tensor], Any]] = {
    "conv2d grouped": lambda x: F.conv2d(x, random(8, 2, 3, 3), groups=2, stride=2, padding=1),
    "conv2d by keyword": lambda x: F.conv2d(input=x, weight=random(8, 4, 3, 3), dilation=2),
    "conv1d": lambda x: F.conv1d(x.flatten(2), random(3, 4, 5)),
    "conv3d": lambda x: F.conv3d(x[:, None], random(3, 1, 2, 2, 2)),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, random(4, 3, 2, 2), stride=2, groups=2),
    "linear": lambda x: F.linear(x, random(7, 6), random(7)),
    "matmul": lambda x: torch.matmul(x, random(6, 5)),
    "method matmul": lambda x: x.matmul(random(6, 5)),
    "operator": lambda x: x @ random(4, 6, 5),
    "bmm": lambda x: torch.bmm(x[:, 0], random(3, 6, 2)) + x[:, 0].bmm(random(3, 6, 2)),
    "mm": lambda x: torch.mm(x.flatten(1), random(144, 2)) + x.flatten(1).mm(random(144, 2)),
    "addmm": lambda x: torch.addmm(random(2), x.flatten(1), random(144, 2)),
    "addmm by keyword": lambda x: torch.addmm(random(2), mat1=x.flatten(1), mat2=random(144, 2)),
    "baddbmm": lambda x: torch.baddbmm(random(3, 6, 2), x[:, 0], random(3, 6, 2)),
    "einsum": lambda x: torch.einsum("nchw,kc->nkhw", x, random(5, 4)),
    "einsum with an ellipsis": lambda x: torch.einsum("n...w,wk->n...k", x, random(6, 3)),
    "einsum without a result": lambda x: torch.einsum("nchw,wk", x, random(6, 3)),
    "einsum of a list": lambda x: torch.einsum("nchw,kc -> nkhw", [x, random(5, 4)]),
    "einsum of three": lambda x: torch.einsum("nchw,wk,kj->nchj", x, random(6, 3), random(3, 2)),
    "einsum without products": lambda x: torch.einsum("nchw->cn", x),
    "attention": lambda x: F.scaled_dot_product_attention(x, random(3, 4, 9, 6), random(3, 4, 9, 2)),
    "multi-head attention": lambda x: nn.MultiheadAttention(6, 2, dtype=torch.float64, batch_first=True)(
        *3 * [x[:, 0]]
    ),
    "multi-head attention of keys and values": lambda x: nn.MultiheadAttention(
        6, 3, kdim=4, vdim=2, dtype=torch.float64, batch_first=True
    )(x[:, 0], random(3, 9, 4), random(3, 9, 2), need_weights=False),
    "transformer": lambda x: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dtype=torch.float64)(x[:, 0]),
    "einsum of indices": lambda x: torch.einsum(x, [0, 1, 2, 3], random(6, 2), [3, 4], [0, 4]),
    "anything else": lambda x: x + 1,
}


def evaluated_macs(function: Callable[[Tensor], Any]) -> int:
    def operation(x: Tensor) -> Tensor:
        function(x)
        return x

    net = SimpleNamespace(stem=torch.sin, choices=[[operation]], head=lambda x: x.flatten(1))
    images, targets = draw_images(3, channels=4)
    result = evaluate_paths(net, [[0]], images, targets, profile=True)
    assert result.profile is not None
    return {stage.stage: stage.macs for stage in result.profile}["layer 0"]


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # modules are made on the way, whose weights are drawn
def test_macs_of_a_function(name: str) -> None:
    x, _ = draw_images(3, channels=4)
    assert evaluated_macs(COUNTED[name]) == counted_macs(lambda: COUNTED[name](x))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_macs_that_torch_does_not_count() -> None:
    assert evaluated_macs(lambda x: F.bilinear(x, x, random(2, 6, 6))) == 3 * 4 * 6 * 2 * 36


@pytest.mark.parametrize("max_memory", [None, 1 << 40])
def test_profile(net: Chain, max_memory: int | None) -> None:
    images, targets = draw_images(4)
    result = evaluate_paths(net, PATHS, images, targets, profile=True, max_memory=max_memory)
    assert result.profile is not None
    stages = {stage.stage: stage for stage in result.profile}
    assert list(stages) == ["stem", "layer 0", "layer 1", "head", "loss"]
    assert [stages[name].calls for name in list(stages)[:4]] == [1, 2, 4, 4]
    assert sum(stage.macs for stage in stages.values()) == 4 * result.plan.macs_computed
    assert stages["layer 1"].bytes == 4 * images[:, :1].nbytes * 4
    assert stages["head"].bytes == 4 * 4 * 5 * 8
    assert all(stage.seconds > 0 for stage in stages.values())


def test_profile_sums_over_batches(net: Chain) -> None:
    result = evaluate_paths(net, PATHS, batches(3, 2), profile=True)
    assert result.profile is not None
    assert [stage.calls for stage in result.profile][:4] == [2, 4, 8, 8]
    assert sum(stage.macs for stage in result.profile) == 5 * result.plan.macs_computed


def test_logits_in_the_loop_are_the_modules_own(net: Chain) -> None:
    """The oracle itself: a loop in evaluation mode is a chain of calls."""
    images, _ = draw_images(2)
    net.eval()
    expected = net.head(net.choices[1][0](net.choices[0][0](net.stem(images))))
    assert torch.equal(plain_logits(net, [0, 0], images, "running"), expected)
