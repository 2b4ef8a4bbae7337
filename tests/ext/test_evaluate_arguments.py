"""Bad input: the error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from supernets import Chain, Function, build, draw_images, make_head, make_stem
from torch import Tensor, nn

from greedynas_ext import SupernetLike, evaluate_paths


@pytest.fixture
def net() -> Chain:
    return build([["conv bn", "residual"], ["residual", "conv bn", "relu in place"]])


IMAGES, TARGETS = draw_images(3)
PATHS = [[0, 2], [1, 0]]


def call(net: Any, paths: Any = PATHS, images: Any = IMAGES, targets: Any = TARGETS, **kwargs: Any) -> Any:
    return evaluate_paths(net, paths, images, targets, **kwargs)


PATH_ERRORS = [
    (torch.zeros(2, 3, dtype=torch.int64), ValueError, r": expected int64 \[m, 2\] .* got int64 \[2, 3\]"),
    (torch.zeros(0, 2, dtype=torch.int64), ValueError, r": expected int64 \[m, 2\] with m >= 1, got none"),
    (torch.zeros(2, dtype=torch.int64), ValueError, r"got int64 \[2\]"),
    (torch.zeros(1, 1, 2, dtype=torch.int64), ValueError, r"got int64 \[1, 1, 2\]"),
    (torch.zeros(2, 2), TypeError, r"expected int64 \[m, 2\] .*, got float32 \[2, 2\]"),
    (torch.zeros(2, 2, dtype=torch.int32), TypeError, r"got int32 \[2, 2\]"),
    (torch.zeros(2, 2, dtype=torch.bool), TypeError, r"got bool \[2, 2\]"),
    (np.zeros((2, 2)), TypeError, r"got float64 \[2, 2\]"),
    (np.zeros((2, 2), np.uint64), TypeError, r"got uint64 \[2, 2\]"),
    (np.zeros((2, 3), np.int64), ValueError, r"got int64 \[2, 3\]"),
    ([[0, 0], [0, 3]], ValueError, r"\[1\]\[1\]: expected an operation index of 0 to 2, got 3"),
    ([[0, 0], [2, 0]], ValueError, r"\[1\]\[0\]: expected an operation index of 0 to 1, got 2"),
    ([[-1, 0]], ValueError, r"\[0\]\[0\]: expected an operation index of 0 to 1, got -1"),
    ([[0, 0], [0]], ValueError, r"\[1\]: expected 2 operation indices \(one per layer\), got 1"),
    ([[0, 0, 0]], ValueError, r"\[0\]: expected 2 operation indices \(one per layer\), got 3"),
    ([0, 1], TypeError, r"\[0\]: expected int64 \[L\] or a sequence of ints, got int"),
    ([], ValueError, r"with m >= 1, got none"),
    ([[0, 1.0]], TypeError, r"\[0\]\[1\]: expected an integer, got float 1\.0"),
    ([[0, True]], TypeError, r"\[0\]\[1\]: expected an integer, got bool True"),
    ([[0, "1"]], TypeError, r"\[0\]\[1\]: expected an integer, got str '1'"),
    ([[0, [1]]], TypeError, r"\[0\]\[1\]: expected an integer, got list \[1\]"),
    ([[0, 2**70]], ValueError, rf"\[0\]\[1\]: expected an operation index of 0 to 2, got {2**70}"),
    (3, TypeError, r": expected int64 \[m, L\] or nested sequences of ints, got int"),
    (None, TypeError, r"got NoneType"),
]


@pytest.mark.parametrize(("paths", "error", "message"), PATH_ERRORS)
def test_paths(net: Chain, paths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^paths.*" + message):
        call(net, paths)


@pytest.mark.parametrize(
    "paths",
    [
        torch.tensor(PATHS),
        np.array(PATHS),
        np.array(PATHS)[::-1][::-1],
        tuple(map(tuple, PATHS)),
        [torch.tensor(row) for row in PATHS],
        [[np.int64(op) for op in row] for row in PATHS],
        torch.tensor(PATHS).T.contiguous().T,
        iter(PATHS),
    ],
)
def test_paths_of_many_kinds(net: Chain, paths: Any) -> None:
    assert torch.equal(call(net, paths).losses, call(net, PATHS).losses)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"k": 3}, ValueError, r"k: expected 1 <= k <= 2 \(the number of paths\), got 3"),
        ({"k": 0}, ValueError, r"k: expected 1 <= k <= 2 .*, got 0"),
        ({"k": 1.0}, TypeError, r"k: expected an int or None, got float"),
        ({"k": True}, TypeError, r"k: expected an int or None, got bool"),
        ({"bn": "train"}, ValueError, r"bn: expected one of 'batch', 'running', 'recalibrated', got 'train'"),
        ({"bn": None}, ValueError, r"bn: expected one of .*, got None"),
        ({"precision": "fp8"}, ValueError, r"precision: expected one of None, 'fp32', 'bf16', 'fp16', got 'fp8'"),
        (
            {"precision": "fp16"},
            ValueError,
            r"precision: expected None, 'fp32' or 'bf16' for a supernet on cpu .*, got 'fp16'",
        ),
        ({"max_memory": 0}, ValueError, r"max_memory: expected at least 1, got 0"),
        ({"max_memory": 1e9}, TypeError, r"max_memory: expected an integer, got float"),
        ({"micro_batch": 0}, ValueError, r"micro_batch: expected at least 1, got 0"),
        ({"micro_batch": True}, TypeError, r"micro_batch: expected an integer, got bool"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing: expected a probability in \[0, 1\], got -0\.1"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a probability in \[0, 1\], got 1\.5"),
        ({"label_smoothing": math.nan}, ValueError, r"label_smoothing: expected a probability in \[0, 1\], got nan"),
        ({"label_smoothing": "0.1"}, TypeError, r"label_smoothing: expected a number, got str"),
        (
            {"calibration": IMAGES},
            ValueError,
            r"calibration: .*bn='recalibrated' and only then, got a value, bn='batch'",
        ),
        ({"bn": "recalibrated"}, ValueError, r"calibration: expected images .*, got None, bn='recalibrated'"),
    ],
)
def test_options(net: Chain, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        call(net, **kwargs)


BAD_IMAGES = [
    (IMAGES[0], ValueError, r"expected \[N, C, H, W\] with no empty dimension, got \[3, 6, 6\]"),
    (IMAGES[:0], ValueError, r"got \[0, 3, 6, 6\]"),
    (IMAGES[..., :0], ValueError, r"got \[3, 3, 6, 0\]"),
    (IMAGES.to(torch.uint8), TypeError, r"expected a floating tensor \[N, C, H, W\], got uint8 \[3, 3, 6, 6\]"),
    (IMAGES.to(torch.complex64), TypeError, r"got complex64"),
    (IMAGES.to("meta"), ValueError, r"expected the supernet's device cpu, got meta"),
]
NOT_FINITE = [(math.nan, 1), (math.inf, 2), (-math.inf, 3)]


@pytest.mark.parametrize(("images", "error", "message"), BAD_IMAGES)
def test_images_and_calibration(net: Chain, images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^images: .*" + message):
        call(net, images=images)
    with pytest.raises(error, match="^calibration: .*" + message):
        call(net, bn="recalibrated", calibration=images)
    with pytest.raises(error, match=r"^images \(batch 1\): .*" + message):
        call(net, images=[(IMAGES, TARGETS), (images, TARGETS)], targets=None)


@pytest.mark.parametrize(("value", "count"), NOT_FINITE)
def test_images_that_are_not_finite(net: Chain, value: float, count: int) -> None:
    images = IMAGES.clone()
    images[:count, 1, 2, 3] = value
    message = f"expected finite values, got NaN or infinity in {count} of 3 images"
    with pytest.raises(ValueError, match="^images: " + message):
        call(net, images=images)
    with pytest.raises(ValueError, match="^calibration: " + message):
        call(net, bn="recalibrated", calibration=images)
    images[:, 0, 0, 0] = -value  # infinities of both signs
    with pytest.raises(ValueError, match=r"^images: .* got NaN or infinity in 3 of 3 images"):
        call(net, images=images)


def test_finite_images_whose_sum_is_not() -> None:
    huge = torch.full((2, 3, 6, 6), 1.5e308, dtype=torch.float64)
    evaluate_paths(
        SimpleNamespace(stem=lambda x: x * 1e-308, choices=[[torch.sin]], head=lambda x: x.flatten(1)),
        [[0]],
        huge,
        TARGETS[:2],
    )


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (None, TypeError, r"expected int64 \[3\], got None"),
        ([0, 1, 2], TypeError, r"expected int64 \[3\] \(a class for each image\), got list"),
        (TARGETS.int(), TypeError, r"got int32 \[3\]"),
        (TARGETS.double(), TypeError, r"got float64 \[3\]"),
        (TARGETS[:2], ValueError, r"expected int64 \[3\] .*, got int64 \[2\]"),
        (TARGETS[:, None], ValueError, r"got int64 \[3, 1\]"),
        (torch.tensor([0, -1, 2]), ValueError, r"expected classes from 0, got -1"),
        (torch.tensor([0, 5, 2]), ValueError, r"expected classes below 5 \(the head's logits\), got 5"),
        (TARGETS.to("meta"), ValueError, r"expected the images' device cpu, got meta"),
    ],
)
def test_targets(net: Chain, targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^targets: .*" + message):
        call(net, targets=targets)


@pytest.mark.parametrize(
    ("images", "targets", "error", "message"),
    [
        (3, None, TypeError, r"images: expected a tensor or an iterable of \(images, targets\), got int"),
        ([(IMAGES, TARGETS)], TARGETS, TypeError, r"targets: expected None beside an iterable .*, got a value"),
        ([], None, ValueError, r"images: expected at least one batch, got an empty iterable"),
        ([IMAGES], None, TypeError, r"images: expected an iterable of \(images, targets\), got a Tensor in it"),
        ((IMAGES, TARGETS), None, TypeError, r"images: expected an iterable .*, got a Tensor in it"),
        ([(IMAGES,)], None, TypeError, r"images: expected an iterable .*, got a tuple in it"),
        ([(IMAGES, TARGETS[:1])], None, ValueError, r"targets: expected int64 \[3\]"),
        ([("images", TARGETS)], None, TypeError, r"images \(batch 0\): expected a floating tensor .*, got str"),
    ],
)
def test_loaders(net: Chain, images: Any, targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        call(net, images=images, targets=targets)


def one(*layers: Any, stem: Any = None, head: Any = None) -> SimpleNamespace:
    return SimpleNamespace(stem=stem or make_stem(4).double(), choices=list(layers), head=head or make_head(4).double())


class Eager(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("supernet", "paths", "error", "message"),
    [
        (
            nn.Identity(),
            [[0]],
            TypeError,
            r"supernet: expected attributes stem, .* got a Identity without stem, choices",
        ),
        (SimpleNamespace(stem=1, head=2), [[0]], TypeError, r"supernet: .*got a SimpleNamespace without choices"),
        (SimpleNamespace(stem=Eager(), choices=3, head=Eager()), [[0]], TypeError, r"supernet\.choices: .* got int"),
        (one(3), [[0]], TypeError, r"supernet\.choices: expected a sequence of layers, each a sequence .*, got list"),
        (one(), [[]], ValueError, r"supernet\.choices: expected at least one layer, got none"),
        (
            one([Eager()], []),
            [[0, 0]],
            ValueError,
            r"supernet\.choices\[1\]: expected at least one operation, got none",
        ),
        (one([Eager(), 3]), [[0]], TypeError, r"supernet\.choices\[0\]\[1\]: expected a module or function, got int"),
        (one(nn.ModuleDict({"a": Eager()})), [[0]], TypeError, r"choices\[0\]\[0\]: expected a module .*, got str"),
        (one([Eager()], stem="stem"), [[0]], TypeError, r"supernet\.stem: expected a module or function, got str"),
        (one([torch.jit.script(Eager())]), [[0]], TypeError, r"supernet\.choices\[0\]\[0\]: .* TorchScript in it"),
        (one([nn.Sequential(torch.jit.script(Eager()))]), [[0]], TypeError, r"choices\[0\]\[0\]: .* TorchScript in it"),
        (one([nn.LazyConv2d(4, 1)]), [[0]], ValueError, r"choices\[0\]\[0\]: .*parameters, got those of a LazyConv2d"),
        (one([nn.LazyBatchNorm2d()]), [[0]], ValueError, r"choices\[0\]\[0\]: .*got those of a LazyBatchNorm2d"),
    ],
)
def test_supernets_without_the_contract(supernet: Any, paths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(supernet, paths)


@pytest.mark.parametrize("max_memory", [None, 1 << 40])
@pytest.mark.parametrize(
    ("supernet", "error", "message"),
    [
        (one([lambda x: (x, x)]), TypeError, r"supernet\.choices\[0\]\[0\]: .* returns a tensor, got tuple"),
        (one([lambda x: x.mean()]), ValueError, r"choices\[0\]\[0\]: .* for each of \d images, got shape \[\]"),
        (one([lambda x: x[:1]]), ValueError, r"choices\[0\]\[0\]: .* each of \d images, got shape \[1, 4, 6, 6\]"),
        (one([Eager()], stem=lambda x: None), TypeError, r"supernet\.stem: .* returns a tensor, got NoneType"),
        (one([Eager()], head=lambda x: [x]), TypeError, r"supernet\.head: .* returns a tensor, got list"),
    ],
)
def test_operations_that_return_something_else(
    supernet: Any, error: type[Exception], message: str, max_memory: int | None
) -> None:
    with pytest.raises(error, match=message):
        call(supernet, [[0]], max_memory=max_memory)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda x: x, r"supernet\.head: expected floating logits \[3, classes\], got float64 \[3, 4, 6, 6\]"),
        (lambda x: x.flatten(1).argmax(1), r"supernet\.head: .*got int64 \[3\]"),
        (lambda x: x.flatten(1).long(), r"supernet\.head: .*got int64 \[3, 144\]"),
    ],
)
def test_heads_that_give_no_logits(head: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(one([Eager()], head=head), [[0]])


def test_an_error_inside_an_operation_says_where(net: Chain) -> None:
    net.choices[1][2] = nn.Conv2d(7, 4, 1).double()
    with pytest.raises(RuntimeError, match="channels") as raised:
        call(net)
    assert raised.value.__notes__ == ["while supernet.choices[1][2] ran on an input of shape [3, 4, 6, 6]"]


@pytest.mark.parametrize("bn", ["batch", "recalibrated"])
def test_a_single_value_per_channel(bn: str) -> None:
    net = build([["conv bn"]])
    net.choices[0][0] = nn.Sequential(nn.AdaptiveAvgPool2d(1), *net.choices[0][0])
    images, targets = draw_images(1)
    argument = "images" if bn == "batch" else "calibration"
    message = rf"^{argument}: a batch normalisation in supernet\.choices\[0\]\[0\] sees a single value per channel .*"
    with pytest.raises(ValueError, match=message + r"\[1, 4, 1, 1\].*expected more images or a larger resolution"):
        call(net, [[0]], images, targets, bn=bn, calibration=None if bn == "batch" else images)
    # Two images, or stored statistics, are enough; so are constants for a single image.
    call(net, [[0]], *draw_images(2))
    call(net, [[0]], images, targets, bn="running", max_memory=1 << 40)
    call(net, [[0]], images, targets, bn="recalibrated", calibration=IMAGES, max_memory=1 << 40)


def test_a_single_value_without_stored_statistics() -> None:
    net = build([["bn without running statistics"]])
    net.choices[0][0] = nn.Sequential(nn.AdaptiveAvgPool2d(1), *net.choices[0][0])
    images, targets = draw_images(1)
    with pytest.raises(ValueError, match=r"^images: .* single value per channel"):
        call(net, [[0]], images, targets, bn="running")
    call(net, [[0]], images, targets, bn="recalibrated", calibration=IMAGES, max_memory=1 << 40)


class Counting(nn.Module):
    """Normalises as often as the flag says: a forward that is not the same each time."""

    def __init__(self, times: Iterator[int]) -> None:
        super().__init__()
        self.norm, self.times = nn.BatchNorm2d(4), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(next(self.times)):
            x = self.norm(x)
        return x


@pytest.mark.parametrize(("times", "word"), [((1, 2), "more often"), ((2, 1), "less often")])
def test_an_operation_that_normalises_a_different_number_of_times(times: tuple[int, int], word: str) -> None:
    net = one([Counting(iter(times)).double()])
    with pytest.raises(
        RuntimeError, match=rf"supernet\.choices\[0\]\[0\] normalised {word} than .* calibration images"
    ):
        # A description would cost one more call, which this operation counts.
        call(net, [[0]], bn="recalibrated", calibration=IMAGES, fused=False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0],
        lambda x: torch.ops.aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0],
        lambda x: torch.ops.aten.native_batch_norm.default(x, None, None, None, None, True, 0.1, 1e-5)[0],
    ],
)
def test_batch_normalisation_below_the_functions_with_a_policy(function: Any) -> None:
    message = r"supernet\.choices\[0\]\[0\]: expected batch normalisation by its module, F\.batch_norm or torch\.batch"
    with pytest.raises(TypeError, match=message):
        call(one([Function(function)]), [[0]])


def test_the_protocol_can_be_asked_for(net: Chain) -> None:
    assert isinstance(net, SupernetLike)
    assert not isinstance(nn.Identity(), SupernetLike)
