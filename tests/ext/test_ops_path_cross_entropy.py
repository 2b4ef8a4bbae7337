"""ops.path_cross_entropy against torch.nn.functional.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_memory import poisoned_memory
from torch import Tensor

from greedynas_ext import ops, reference

INF, NAN = float("inf"), float("nan")


def draw(paths: int, images: int, classes: int, *, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(paths, images, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (images,), generator=generator)


def plain(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses and image losses by one flat call of torch's."""
    paths, images, classes = logits.shape
    flat = F.cross_entropy(
        logits.reshape(-1, classes), targets.repeat(paths), reduction="none", label_smoothing=label_smoothing
    )
    return flat.view(paths, images).mean(1), flat.view(paths, images)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("classes", [1, 2, 10, 1001])
@pytest.mark.parametrize("images", [1, 63, 64, 65, 129])  # around the chunk of 64
def test_float64_equals_torch(images: int, classes: int, label_smoothing: float):
    logits, targets = draw(3, images, classes)
    expected, expected_images = plain(logits, targets, label_smoothing)
    # Both are float64; log_softmax in torch and here differ by some roundings of values of about 10.
    for implementation in (ops.path_cross_entropy, reference.path_cross_entropy):
        losses, image_losses, correct = implementation(logits, targets, label_smoothing)
        torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(image_losses, expected_images, rtol=1e-13, atol=1e-14)
        assert torch.equal(correct, (logits.argmax(2) == targets).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_lower_precisions_are_right_to_a_millionth(dtype: torch.dtype, label_smoothing: float):
    logits, targets = draw(2, 4097, 37)
    logits = logits.to(dtype)
    losses, image_losses, correct = ops.path_cross_entropy(logits, targets, label_smoothing)
    assert losses.dtype == image_losses.dtype == torch.float32
    expected, expected_images = plain(logits.double(), targets, label_smoothing)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(image_losses.double(), expected_images, rtol=1e-7, atol=1e-30)
    assert torch.equal(correct, (logits.argmax(2) == targets).sum(1))


def test_small_losses_keep_their_digits():
    # A confident network: the loss is about 1e-9, far below the rounding of the logits themselves.
    logits = torch.tensor([[[1000.0, 980.0, 979.0]]])
    losses, _, _ = ops.path_cross_entropy(logits, torch.tensor([0]))
    expected = torch.log1p(torch.tensor([-20.0, -21.0], dtype=torch.float64).exp().sum())
    torch.testing.assert_close(losses.double()[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value(dtype: torch.dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    logits = torch.stack([values, torch.zeros_like(values)], dim=1)[None]
    for target in (0, 1):
        targets = torch.full((len(values),), target)
        _, image_losses, correct = ops.path_cross_entropy(logits, targets)
        _, expected = plain(logits.double(), targets, 0.0)
        # Losses below float32's normal numbers round to multiples of its smallest.
        torch.testing.assert_close(image_losses, expected.float(), rtol=1e-6, atol=2e-45, equal_nan=True)
        assert torch.equal(correct, (logits.argmax(2) == targets).sum(1))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize(
    "row",
    [
        [NAN, 1.0, 2.0],
        [1.0, 2.0, NAN],
        [INF, 1.0, 2.0],
        [INF, INF, 2.0],
        [-INF, 1.0, 2.0],
        [-INF, -INF, -INF],
        [INF, -INF, NAN],
        [NAN, NAN, 1.0],
        [3.0, 3.0, 3.0],
        [0.0, -0.0, -1.0],
        [1e300, -1e300, 0.0],
        [INF, -INF, 0.0],
    ],
    ids=str,
)
def test_special_values_go_where_torch_puts_them(row: list[float], target: int, label_smoothing: float):
    logits = torch.tensor([[row], [[1.0, 2.0, 3.0]]], dtype=torch.float64)
    targets = torch.tensor([target])
    losses, image_losses, correct = ops.path_cross_entropy(logits, targets, label_smoothing)
    expected, expected_images = plain(logits, targets, label_smoothing)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    torch.testing.assert_close(image_losses, expected_images, equal_nan=True)
    assert torch.equal(correct, (logits.argmax(2) == targets).sum(1))
    assert losses[1].isfinite()


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_same_bits_for_any_number_of_threads(threads: int):
    logits, targets = draw(5, 1000, 17)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.path_cross_entropy(logits, targets, 0.1)
        torch.set_num_threads(threads)
        many = ops.path_cross_entropy(logits, targets, 0.1)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a, b)


def test_a_path_does_not_depend_on_its_neighbours():
    logits, targets = draw(6, 130, 11)
    together = ops.path_cross_entropy(logits, targets, 0.1)
    alone = ops.path_cross_entropy(logits[4:5], targets, 0.1)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[4:5], b)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        lambda x: torch.stack([x, x + 1], dim=3)[..., 0],
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    ],
    ids=["paths inside images", "classes outermost", "spread classes", "cut images"],
)
def test_any_strides(view):
    logits, targets = draw(3, 70, 5)
    expected = ops.path_cross_entropy(logits, targets, 0.1)
    strided, spread = view(logits), torch.stack([targets, targets + 1000], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert not spread.is_contiguous()
    for a, b in zip(ops.path_cross_entropy(strided, spread, 0.1), expected, strict=True):
        assert torch.equal(a, b)


def test_expanded_logits():
    logits, targets = draw(1, 9, 5)
    losses, _, _ = ops.path_cross_entropy(logits.expand(4, -1, -1), targets)
    assert torch.equal(losses, ops.path_cross_entropy(logits, targets)[0].expand(4))


def test_no_paths():
    losses, image_losses, correct = ops.path_cross_entropy(torch.zeros(0, 4, 3), torch.zeros(4, dtype=torch.int64))
    assert losses.shape == correct.shape == (0,)
    assert image_losses.shape == (0, 4)


def test_outputs_are_written_everywhere():
    logits, targets = draw(3, 65, 4)
    with poisoned_memory():
        losses, image_losses, correct = ops.path_cross_entropy(logits, targets)
    assert losses.isfinite().all()
    assert image_losses.isfinite().all()
    assert (correct <= 65).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(4, 3)}, r"logits should be float64, .* \[m, N, C\], got float32 \[4, 3\]"),
        ({"logits": torch.zeros(2, 4, 3, dtype=torch.int32)}, r"logits should be .*, got int32 \[2, 4, 3\]"),
        ({"logits": torch.zeros(2, 4, 3, dtype=torch.complex64)}, r"logits should be .*, got ComplexFloat"),
        ({"logits": torch.zeros(2, 0, 3)}, r"at least one image and one class .*, got float32 \[2, 0, 3\]"),
        ({"logits": torch.zeros(2, 4, 0)}, r"at least one image and one class .*, got float32 \[2, 4, 0\]"),
        ({"targets": torch.zeros(7)}, r"targets should be int64 \[N=4\], got float32 \[7\]"),
        ({"targets": torch.zeros(4, dtype=torch.bool)}, r"targets should be int64 \[N=4\], got bool \[4\]"),
        ({"targets": torch.zeros(4, 1, dtype=torch.int64)}, r"targets should be int64 \[N=4\], got int64 \[4, 1\]"),
        ({"targets": torch.tensor([0, 1, 3, -1])}, r"targets should be in \[0, C=3\), got 3 at position 2"),
        ({"targets": torch.tensor([0, -100, 1, 2])}, r"targets should be in \[0, C=3\), got -100 at position 1"),
        ({"label_smoothing": -0.1}, r"label_smoothing should be in \[0, 1\], got -0.1"),
        ({"label_smoothing": 1.5}, r"label_smoothing should be in \[0, 1\], got 1.5"),
        ({"label_smoothing": NAN}, r"label_smoothing should be in \[0, 1\], got nan"),
    ],
    ids=str,
)
def test_errors(changes: dict[str, object], message: str):
    arguments = {
        "logits": torch.zeros(2, 4, 3),
        "targets": torch.zeros(4, dtype=torch.int64),
        "label_smoothing": 0.0,
    }
    with pytest.raises(ValueError, match="^path_cross_entropy: .*" + message):
        ops.path_cross_entropy(**(arguments | changes))
