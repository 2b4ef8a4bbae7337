"""Losses equal those of a loop over the unmodified modules, whatever the operations are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from supernets import (
    OPERATIONS,
    Chain,
    Function,
    build,
    draw_images,
    draw_paths,
    make_head,
    odd_supernet,
    plain_image_losses,
    randomise,
    relative_error,
)
from torch import Tensor, nn

import greedynas_ext
from greedynas_ext import evaluate_paths

POLICIES = ("batch", "running", "recalibrated")
# None evaluates depth-first; with room for everything it goes layer by layer.
TRAVERSALS = {"depth-first": None, "layer-by-layer": 1 << 45}


def compare(net: Any, paths: Tensor, bn: str, max_memory: int | None, tolerance: float, **kwargs: Any) -> Any:
    dtype = next(iter(net.head.parameters())).dtype
    size, count = kwargs.pop("size", 6), kwargs.pop("count", 3)
    classes = kwargs.pop("classes", 5)
    images, targets = draw_images(count, size, classes=classes, dtype=dtype, seed=3)
    calibration = draw_images(count + 1, size, dtype=dtype, seed=4)[0] if bn == "recalibrated" else None
    by_momentum = kwargs.pop("by_momentum", False)
    expected, accuracy = plain_image_losses(net, paths, images, targets, bn, calibration, by_momentum=by_momentum)
    result = evaluate_paths(
        net, paths, images, targets, bn=bn, calibration=calibration, max_memory=max_memory, per_image=True, **kwargs
    )
    assert result.losses.dtype == dtype
    assert relative_error(result.losses, expected.mean(1)) <= tolerance
    assert relative_error(result.image_losses, expected) <= 10 * tolerance
    torch.testing.assert_close(result.accuracy.double(), accuracy)
    return result


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_every_odd_operation(bn: str, traversal: str) -> None:
    net = odd_supernet()
    longest = max(map(len, net.choices))
    # every operation of every layer, some prefixes shared, one path three times
    covering = torch.tensor([[i % len(layer) for layer in net.choices] for i in range(longest)])
    paths = torch.cat([covering, draw_paths(net, 12), covering[:1], covering[:1]])
    result = compare(net, paths, bn, TRAVERSALS[traversal], 1e-10)
    assert result.plan.traversal == traversal
    assert result.plan.num_paths == len(paths)


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("traversal", TRAVERSALS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chain_of_odd_operations(bn: str, traversal: str, data: st.DataObject) -> None:
    names = st.sampled_from(sorted(OPERATIONS))
    layers = data.draw(st.lists(st.lists(names, min_size=1, max_size=3), min_size=1, max_size=5), label="layers")
    count = data.draw(st.integers(1, 6), label="paths")
    seed = data.draw(st.integers(0, 1000), label="seed")
    net = build(layers, seed=seed)
    stem = data.draw(st.sampled_from(["conv", "identity", "in place", "function", "slice"]), label="stem")
    if stem != "conv":
        net.stem = {
            "identity": nn.Identity(),
            "in place": nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)),
            "function": Function(lambda x: x.mul_(0.5)),
            "slice": Function(lambda x: x[:, :, ::1]),
        }[stem]
        net.head = nn.Sequential(nn.ReLU(inplace=True), make_head(4).double())
    if data.draw(st.booleans(), label="flat head"):  # logits that are a view of the last layer's output
        net.head = Function(lambda x: x.flatten(2)[..., :5].flatten(1)[:, :5])
    net.double()
    paths = draw_paths(net, count, seed)
    images, targets = draw_images(3, channels=3 if stem == "conv" else 4, seed=seed)
    calibration = draw_images(2, channels=images.shape[1], seed=seed + 1)[0] if bn == "recalibrated" else None
    before = images.clone(), None if calibration is None else calibration.clone()
    expected, _ = plain_image_losses(net, paths, images, targets, bn, calibration)
    result = evaluate_paths(
        net, paths, images, targets, bn=bn, calibration=calibration, max_memory=TRAVERSALS[traversal], per_image=True
    )
    torch.testing.assert_close(result.image_losses, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(images, before[0])
    assert calibration is None or torch.equal(calibration, before[1])


IN_PLACE_LAST = [["identity", "add_"], ["conv bn", "residual in place"], ["identity", "mul_ of a view"]]


@pytest.mark.parametrize("traversal", TRAVERSALS)
@pytest.mark.parametrize("first", ["identity", "view", "slice", "transposed view", "identities only", "function"])
def test_an_output_that_is_a_view_of_the_input_survives_a_sibling_that_writes(first: str, traversal: str) -> None:
    net = build(IN_PLACE_LAST)
    if first == "identities only":
        net.choices[0][0] = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity()))
    elif first == "function":
        net = Chain(net.stem, [[lambda x: x, net.choices[0][1]], *map(list, list(net.choices)[1:])], net.head)
    else:
        net.choices[0][0] = OPERATIONS[first](4)
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    compare(net, paths, "batch", TRAVERSALS[traversal], 1e-10)
    compare(net, paths, "running", TRAVERSALS[traversal], 1e-10)


@pytest.mark.parametrize("traversal", TRAVERSALS)
@pytest.mark.parametrize("how", ["pre-hook", "hook", "forward of the instance", "hook of a sequential"])
def test_a_convolution_or_identity_that_writes_to_its_input_after_all(how: str, traversal: str) -> None:
    """These are given their siblings' input without a copy, unless something about them is not as it comes."""
    net = build([["identity", "conv bn", "residual"], ["residual", "conv bn"]])
    conv = nn.Conv2d(4, 4, 1).double()
    if how == "pre-hook":
        conv.register_forward_pre_hook(lambda module, args: (args[0].add_(1.0),))
    elif how == "hook":
        conv.register_forward_hook(lambda module, args, output: output + args[0].mul_(2.0))
    elif how == "forward of the instance":
        conv.forward = lambda x: x.mul_(3.0)
    operation: nn.Module = conv
    if how == "hook of a sequential":
        operation = nn.Sequential(nn.Identity(), conv)
        operation.register_forward_pre_hook(lambda module, args: (args[0].add_(1.0),))
    net.choices[0][0] = operation
    paths = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    images, targets = draw_images(3)
    expected = []  # the replaced forward is bound to this module, so the module itself runs, on copies
    with torch.no_grad():
        for path in paths.tolist():
            x = net.stem(images.clone())
            for layer, op in zip(net.choices, path, strict=True):
                x = layer[op](x.clone())
            expected.append(F.cross_entropy(net.head(x), targets))
    result = evaluate_paths(net, paths, images, targets, max_memory=TRAVERSALS[traversal])
    assert relative_error(result.losses, torch.stack(expected)) < 1e-12


class Workspace(nn.Module):
    """Writes its output into a buffer that it keeps from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("output", torch.zeros(3, 4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, 0.5, out=self.output[: len(x)])


@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_an_operation_that_reuses_its_output_buffer(traversal: str) -> None:
    net = build([["conv bn", "residual"], ["identity", "relu in place"], ["relu in place", "identity"]])
    net.choices[1][0] = Workspace().double()
    net.choices[2][1] = net.choices[1][0]
    images, targets = draw_images(3)
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    expected = plain_image_losses(net, paths, images, targets)[0]
    result = evaluate_paths(net, paths, images, targets, per_image=True, max_memory=TRAVERSALS[traversal])
    torch.testing.assert_close(result.image_losses, expected, rtol=1e-12, atol=0)
    assert torch.equal(net.choices[1][0].output, torch.zeros(3, 4, 6, 6))


@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_logits_that_are_the_last_layers_own_input(traversal: str) -> None:
    """They are kept for a while, and a sibling then writes into the tensor that they are."""
    net = SimpleNamespace(
        stem=lambda x: x.flatten(1)[:, :5].clone(),
        choices=[[nn.Identity(), lambda x: x.add_(torch.arange(5.0))]],
        head=nn.Identity(),
    )
    images, targets = draw_images(3)
    expected, _ = plain_image_losses(net, torch.tensor([[0], [1]]), images, targets)
    result = evaluate_paths(net, [[0], [1]], images, targets, per_image=True, max_memory=TRAVERSALS[traversal])
    torch.testing.assert_close(result.image_losses, expected, rtol=1e-12, atol=0)


class HiddenWorkspace(nn.Module):
    """The same, out of everybody's sight."""

    def __init__(self) -> None:
        super().__init__()
        self.output = [torch.zeros(3, 4, 6, 6, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        if self.output[0].shape != x.shape:
            self.output[0] = torch.empty_like(x)
        return torch.mul(x, 0.5, out=self.output[0])


@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_an_output_that_is_overwritten_while_it_is_needed_is_reported(traversal: str) -> None:
    """What cannot be kept apart is not computed wrongly in silence."""
    images, targets = draw_images(3)
    net = build([["conv bn", "residual"], ["identity"], ["residual", "conv bn"]])
    net.choices[1][0] = HiddenWorkspace()
    paths = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 1]])
    if traversal == "layer-by-layer":
        with pytest.raises(
            RuntimeError, match=r"^supernet\.choices\[1\]\[0\]: .* written to while it was still needed"
        ):
            evaluate_paths(net, paths, images, targets, max_memory=1 << 40)
    else:  # one after the other, an output is overwritten when it has served
        expected = plain_image_losses(net, paths, images, targets)[0]
        result = evaluate_paths(net, paths, images, targets, per_image=True)
        torch.testing.assert_close(result.image_losses, expected, rtol=1e-10, atol=0)


def test_logits_that_are_overwritten_are_reported() -> None:
    net = build([["conv bn", "residual"]])
    logits = torch.zeros(3, 5, dtype=torch.float64)
    linear = net.head
    net.head = Function(lambda x: torch.mul(linear(x), 1.0, out=logits))
    with pytest.raises(
        RuntimeError, match=r"^supernet\.head: expected logits of its own, got some that were written to"
    ):
        evaluate_paths(net, [[0], [1]], *draw_images(3))


def test_a_default_device_is_none_of_our_business() -> None:
    net = build([["conv bn", "residual"], ["bn first", "elastic bn"]])
    images, targets = draw_images(3)
    expected = evaluate_paths(net, [[0, 1], [1, 0]], images, targets, k=2)
    with torch.device("meta"):
        result = evaluate_paths(net, [[0, 1], [1, 0]], images, targets, k=2)
    assert torch.equal(result.losses, expected.losses)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_checkpointed_operations(bn: str, reentrant: bool) -> None:
    net = build([["conv bn"], ["residual"]])
    images, targets = draw_images(3)
    expected = plain_image_losses(net, torch.tensor([[0, 0]]), images, targets, bn)[0].mean(1)
    inner = net.choices[1][0]
    net.choices[1][0] = Function(lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=reentrant))
    net.choices[1][0].inner = inner
    assert relative_error(evaluate_paths(net, [[0, 0]], images, targets, bn=bn).losses, expected) < 1e-12


def in_nets_dtype(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 1e-5


@functools.cache
def space_supernet(name: str, dtype: torch.dtype) -> Any:
    spaces = pytest.importorskip("greedynas.spaces")
    supernet = pytest.importorskip("greedynas.supernet")
    space = spaces.get_space(name)
    net = supernet.Supernet(space, seed=1).to(dtype)
    randomise(net, 1)
    return net


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize(("dtype", "traversal"), [(torch.float32, "depth-first"), (torch.float64, "layer-by-layer")])
def test_macro_at_32(bn: str, dtype: torch.dtype, traversal: str) -> None:
    net = space_supernet("macro", dtype)
    paths = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 0, 2, 0, 0, 0], [1, 0, 0, 1, 1, 0, 1, 0]])
    compare(net, paths, bn, TRAVERSALS[traversal], in_nets_dtype(dtype), size=32, count=2, classes=10, by_momentum=True)


MBV2_PATHS = torch.tensor([[0, 1, 2, 6, 3, 4, 5] * 3, [0, 1, 2, 6, 3, 4, 5, 1] + [6, 0] * 6 + [2], [6] * 21])


@pytest.mark.parametrize("bn", POLICIES)
def test_mbv2_7_at_224(bn: str) -> None:
    net = space_supernet("mbv2-7", torch.float32)
    compare(net, MBV2_PATHS, bn, None, 1e-5, size=224, count=2, classes=1000, by_momentum=True)


@pytest.mark.slow
@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_mbv2_7_at_224_in_float64(bn: str, traversal: str) -> None:
    net = space_supernet("mbv2-7", torch.float64)
    compare(net, MBV2_PATHS, bn, TRAVERSALS[traversal], 1e-10, size=224, count=2, classes=1000, by_momentum=True)


def test_mbv2_7_in_float64_at_a_small_resolution() -> None:
    net = space_supernet("mbv2-7", torch.float64)
    compare(net, MBV2_PATHS, "batch", None, 1e-10, size=64, count=2, classes=1000)


@pytest.mark.parametrize("bn", POLICIES)
def test_the_two_oracles_agree(bn: str) -> None:
    """Momentum 1 with its correction, and each call written down: where both apply they are the same numbers."""
    net = build([["conv bn", "residual"], ["bn first", "sync bn"]])
    paths = torch.tensor([[0, 1], [1, 0]])
    images, targets = draw_images(3)
    calibration, _ = draw_images(5, seed=1)
    one, two = (
        plain_image_losses(net, paths, images, targets, bn, calibration, by_momentum=by_momentum)[0]
        for by_momentum in (False, True)
    )
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_a_single_path_of_a_single_layer() -> None:
    result = compare(build([["conv bn"]]), torch.tensor([[0]]), "batch", None, 1e-10)
    assert result.losses.shape == (1,)
    assert result.plan.nodes_per_layer == (1,)
    assert result.plan.shared_fraction == 0


def test_duplicates_are_computed_once_and_reported_each() -> None:
    net = build([["conv bn", "residual"], ["residual", "conv bn"]])
    paths = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 0]])
    result = compare(net, paths, "batch", None, 1e-10)
    assert result.plan.unique_nodes == 4
    assert result.losses[0] == result.losses[2] == result.losses[3]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing(smoothing: float) -> None:
    net = build([["conv bn", "residual"]])
    paths = torch.tensor([[0], [1]])
    images, targets = draw_images(4)
    expected, _ = plain_image_losses(net, paths, images, targets, label_smoothing=smoothing)
    result = evaluate_paths(net, paths, images, targets, label_smoothing=smoothing)
    assert relative_error(result.losses, expected.mean(1)) < 1e-12


def test_a_supernet_that_is_no_module() -> None:
    scale = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    net = SimpleNamespace(
        stem=lambda x: x.mul_(scale),
        choices=[[torch.sin, lambda x: x.clamp_(-1, 1)], (torch.relu_, torch.square)],
        head=lambda x: x.flatten(1)[:, :5],
    )
    images, targets = draw_images(4)
    before = images.clone()
    result = evaluate_paths(net, [[0, 0], [0, 1], [1, 0], [1, 1]], images, targets, per_image=True)
    rows = []
    for first in (torch.sin, lambda x: x.clamp(-1, 1)):
        for second in (torch.relu, torch.square):
            logits = second(first(before * scale)).flatten(1)[:, :5]
            rows.append(F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(result.image_losses, torch.stack(rows), rtol=1e-12, atol=0)
    assert torch.equal(images, before)


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.9)


def attended(x: Tensor, dropout: float = 0.9) -> Tensor:
    tokens = x.flatten(2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=dropout).reshape(x.shape)


DROPOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "F.dropout": (dropped, lambda x: x),
    "F.dropout2d in place": (lambda x: F.dropout2d(x, 0.9, True, True), lambda x: x),
    "torch.dropout": (lambda x: torch.dropout(x, 0.9, True), lambda x: x),
    "torch.dropout_": (lambda x: torch.dropout_(x.clone(), 0.9, True), lambda x: x),
    "torch.feature_dropout_": (lambda x: torch.feature_dropout_(x.clone(), 0.9, True), lambda x: x),
    "torch.alpha_dropout": (lambda x: torch.alpha_dropout(x, 0.9, True), lambda x: x),
    "torch.feature_alpha_dropout": (lambda x: torch.feature_alpha_dropout(x, 0.9, True), lambda x: x),
    "F.alpha_dropout": (lambda x: F.alpha_dropout(x, 0.9, True), lambda x: x),
    "torch.native_dropout": (lambda x: torch.native_dropout(x, 0.9, True)[0], lambda x: x),
    "attention": (attended, functools.partial(attended, dropout=0.0)),
    "keyword": (lambda x: F.dropout(input=x, p=0.9, training=True), lambda x: x),
}


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_that_does_not_ask_for_the_mode_is_off_too(name: str, bn: str) -> None:
    net = build([["conv bn"], ["identity", "residual"]])
    with_dropout, without = DROPOUTS[name]
    images, targets = draw_images(3)
    calibration, _ = draw_images(2, seed=1)
    kwargs = {"bn": bn, "calibration": calibration if bn == "recalibrated" else None}
    net.choices[1][0] = Function(without)
    expected = evaluate_paths(net, [[0, 0], [0, 1]], images, targets, **kwargs)
    net.choices[1][0] = Function(with_dropout)
    result = evaluate_paths(net, [[0, 0], [0, 1]], images, targets, **kwargs)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-12, atol=0)


class Stochastic(nn.Module):
    """Drop-path as torchvision and timm write it."""

    def forward(self, x: Tensor) -> Tensor:
        torchvision = pytest.importorskip("torchvision")
        y = torchvision.ops.stochastic_depth(x * 2, 0.9, "row", self.training)
        if self.training:
            y = y * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.1) / 0.1
        return x + y


@pytest.mark.parametrize("bn", POLICIES)
def test_drop_path_is_off(bn: str) -> None:
    net = build([["conv bn"], ["identity"]])
    net.choices[1][0] = Stochastic()
    images, targets = draw_images(3)
    calibration = draw_images(2, seed=1)[0] if bn == "recalibrated" else None
    result = evaluate_paths(net, [[0, 0]], images, targets, bn=bn, calibration=calibration)
    net.choices[1][0] = Function(lambda x: 3 * x)
    expected = plain_image_losses(net, torch.tensor([[0, 0]]), images, targets, bn, calibration)[0].mean(1)
    assert relative_error(result.losses, expected) < 1e-12


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("kind", ["closure", "method", "partial", "object"])
def test_functions_that_hold_modules(kind: str, bn: str) -> None:
    """A function's own modules get the policy, and are left as they are."""
    norm, dropout = nn.BatchNorm2d(4).double(), nn.Dropout(0.5)
    randomise(norm)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dropout = norm, dropout

        def run(self, x: Tensor) -> Tensor:
            return self.dropout(self.norm(x))

    class Callable_:
        def __init__(self) -> None:
            self.block = Block()

        def __call__(self, x: Tensor) -> Tensor:
            return self.block.run(x)

    block = Block().train()
    function = {
        "closure": lambda x: block.run(x),
        "method": block.run,
        "partial": functools.partial(Block.run, block),
        "object": Callable_(),
    }[kind]
    plain = build([["conv bn"], ["identity"]])
    plain.choices[1][0] = nn.Sequential(norm, nn.Dropout(0.0))
    images, targets = draw_images(3)
    calibration = draw_images(2, seed=1)[0] if bn == "recalibrated" else None
    expected = plain_image_losses(plain, torch.tensor([[0, 0]]), images, targets, bn, calibration)[0].mean(1)
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    net = SimpleNamespace(stem=plain.stem, choices=[[plain.choices[0][0]], [function]], head=plain.head)
    result = evaluate_paths(net, [[0, 0]], images, targets, bn=bn, calibration=calibration)
    assert relative_error(result.losses, expected) < 1e-12
    assert norm.training
    assert dropout.training
    for name, value in norm.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_subclassed_image_tensors() -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    net = build([["conv bn", "relu in place"], ["residual"]])
    images, targets = draw_images(3)
    plain = evaluate_paths(net, [[0, 0], [1, 0]], images, targets)
    result = evaluate_paths(net, [[0, 0], [1, 0]], tv_tensors.Image(images), targets)
    assert type(result.losses) is Tensor
    assert torch.equal(result.losses, plain.losses)


@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_channels_last_and_other_strides(traversal: str) -> None:
    net = build([["conv bn", "residual", "bn first"], ["residual in place", "conv bn"]])
    net.float()
    images, targets = draw_images(4, dtype=torch.float32)
    paths = draw_paths(net, 5)
    expected = plain_image_losses(net, paths, images, targets)[0].mean(1)
    double = torch.cat([images, images], 3)[..., ::2]
    double.copy_(images)
    for other in (images.contiguous(memory_format=torch.channels_last), double, images.mT.contiguous().mT):
        result = evaluate_paths(net, paths, other, targets, max_memory=TRAVERSALS[traversal])
        assert relative_error(result.losses, expected) < 1e-5


def test_compiled_operations() -> None:
    """A compiled operation is evaluated under the policy too, or as it is in eager mode."""
    net = build([["conv bn", "residual"], ["conv bn"]])
    images, targets = draw_images(3)
    paths = torch.tensor([[0, 0], [1, 0]])
    expected = {bn: plain_image_losses(net, paths, images, targets, bn)[0].mean(1) for bn in ("batch", "running")}
    for layer in net.choices:
        for op in layer:
            op.compile(backend="eager")
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for bn, losses in expected.items():
        result = evaluate_paths(net, paths, images, targets, bn=bn)
        assert relative_error(result.losses, losses) < 1e-10
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_results_of_the_package() -> None:
    result = evaluate_paths(build([["conv bn"]]), [[0]], *draw_images(3))
    assert isinstance(result, greedynas_ext.PathEvaluation)
    assert result.top_k is None
    assert result.image_losses is None
    assert result.profile is None
    assert not result.losses.requires_grad
    assert isinstance(Chain, type)
