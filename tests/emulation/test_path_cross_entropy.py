"""csrc/cuda/path_cross_entropy.cu against torch in float64 on the same logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from precisions import of_floats

GUARD = 16

# exp and log are good to 2 units of 2^-24, and the sums of a row (at most 86 additions per thread, 8 to join the
# threads, all numbers of one sign) round in random directions, which leaves about one more, as do the last steps.
# Measured: 2 units; torch in float is as far off.
TOLERANCE = 2.0**-24 * 8


def run(cuda, logits, targets, smoothing, offset=0):
    """Losses [paths][images], counts and status; logits begin `offset` floats off alignment."""
    paths, images, classes = logits.shape
    memory = torch.empty(logits.numel() + offset, device=cuda.device)
    memory[offset:] = logits.flatten().to(cuda.device)
    device_targets = targets.to(cuda.device)
    losses = torch.full((paths * images + GUARD,), -7.0, device=cuda.device)
    correct = torch.full((paths + GUARD,), -7, dtype=torch.int64, device=cuda.device)
    status = torch.tensor([0, -7], dtype=torch.int32, device=cuda.device)
    arguments = cuda.kernels.PathCrossEntropy(
        logits=memory[offset:].data_ptr(),
        targets=device_targets.data_ptr(),
        image_losses=losses.data_ptr(),
        correct=correct.data_ptr(),
        status=status.data_ptr(),
        paths=paths,
        images=images,
        classes=classes,
        label_smoothing=smoothing,
    )
    cuda.kernels.path_cross_entropy(arguments, cuda.stream)
    cuda.synchronize()
    for output, size in ((losses, paths * images), (correct, paths), (status, 1)):
        assert (output[size:] == -7).all()
    return losses[: paths * images].view(paths, images).cpu(), correct[:paths].cpu(), status[0].item()


def reference(logits, targets, smoothing, dtype=torch.float64):
    smoothing = torch.tensor(smoothing, dtype=torch.float32).item()
    rows, repeated = logits.to(dtype).flatten(0, 1), targets.repeat(len(logits))
    losses = F.cross_entropy(rows, repeated, reduction="none", label_smoothing=smoothing)
    return losses.view(logits.shape[:2]), (logits.argmax(2) == targets).sum(1)


def check(cuda, logits, targets, smoothing, offset=0, dtype=torch.float64):
    losses, correct, status = run(cuda, logits, targets, smoothing, offset)
    expected, expected_correct = reference(logits, targets, smoothing, dtype)
    torch.testing.assert_close(losses, expected.float(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    assert torch.equal(correct, expected_correct)
    assert status == 0


@pytest.mark.parametrize("classes", [2, 31, 32, 33, 255, 256, 257, 1000, 1024, 1025, 8192, 8193, 21841])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses(cuda, classes, smoothing):
    generator = torch.Generator().manual_seed(classes)
    paths, images = (3, 5) if classes < 8000 else (1, 3)
    logits = 3 * torch.randn(paths, images, classes, generator=generator)
    targets = torch.randint(0, classes, (images,), generator=generator)
    targets[0] = classes - 1
    logits[0, 1, targets[1]] += 20  # a confident row; it is counted
    logits[0, 2] += 1000
    check(cuda, logits, targets, smoothing, offset=classes % 4)


def test_smoothing_of_one(cuda):
    generator = torch.Generator().manual_seed(1)
    check(cuda, torch.randn(2, 9, 10, generator=generator), torch.randint(0, 10, (9,), generator=generator), 1.0)


@of_floats
@pytest.mark.parametrize("classes", [5, 300, 1500])
def test_counts(cuda, classes):
    """The first of equal logits is the predicted class, wherever the threads' borders lie; counts start from 0."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(0, 3, (4, 40, classes), generator=generator).float()
    targets = logits[0].argmax(1)
    targets[::3] = torch.randint(0, classes, targets[::3].shape, generator=generator)
    expected = (logits.argmax(2) == targets).sum(1)
    assert 10 < expected[0] < 40
    check(cuda, logits, targets, 0.0)


@pytest.mark.parametrize("classes", [4, 300, 1500])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_special_values(cuda, classes, smoothing):
    """inf and NaN, at the target and elsewhere, and what overflows: as torch does it in float."""
    inf, nan = math.inf, math.nan
    rows = [
        [nan, 0, 1, 2],
        [0, nan, nan, 2],
        [nan, nan, nan, nan],
        [inf, 0, 1, 2],
        [0, inf, inf, 2],
        [-inf, 0, 1, 2],
        [0, 1, -inf, 2],
        [-inf, -inf, -inf, -inf],
        [-inf, -inf, 3, -inf],
        [3e38, 0, -3e38, 1],
        [inf, -inf, nan, 0],
    ]
    values = torch.zeros(1, len(rows), classes)
    places = [0, 1, classes // 2, classes - 1]
    for image, row in enumerate(rows):
        if all(x != x for x in row) or row.count(-inf) == 4:
            values[0, image] = row[0]
        values[0, image, places] = torch.tensor(row, dtype=torch.float32)
    for place in places:
        check(cuda, values, torch.full((len(rows),), place), smoothing, dtype=torch.float32)


@pytest.mark.parametrize("classes", [10, 300, 1100])
@pytest.mark.parametrize("wrong", [-1, -100, 0, 2**32, -(2**40)])  # 0: that many classes
def test_targets_out_of_range(cuda, classes, wrong):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 6, classes, generator=generator)
    targets = logits[0].argmax(1)
    expected, _ = reference(logits, targets, 0.1)
    targets[3] = wrong or classes
    losses, correct, status = run(cuda, logits, targets, 0.1)
    others = [0, 1, 2, 4, 5]
    assert status == 1
    assert losses[:, 3].isnan().all()
    torch.testing.assert_close(losses[:, others], expected[:, others].float(), rtol=TOLERANCE, atol=TOLERANCE)
    assert correct[0] == 5


def test_many_rows(cuda):
    """More rows than a block takes, of more paths than a block of counters."""
    generator = torch.Generator().manual_seed(3)
    check(cuda, torch.randn(300, 7, 3, generator=generator), torch.randint(0, 3, (7,), generator=generator), 0.1)


def test_results_are_equal_in_every_run(cuda):
    generator = torch.Generator().manual_seed(4)
    logits, targets = torch.randn(2, 9, 1200, generator=generator), torch.randint(0, 1200, (9,), generator=generator)
    first, second = (run(cuda, logits, targets, 0.1) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
