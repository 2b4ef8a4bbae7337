"""Splitting into parts, on its own and on scikit-learn's digits."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.nn import functional

from greedynas.data import available_datasets, load_data
from greedynas.data.splits import split_test, split_validation, validation_size


def labels(*counts: int) -> torch.Tensor:
    """Targets with the given number of images per class, mixed up."""
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]


class_counts = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) >= 2)


@given(class_counts, st.data())
def test_validation_split_is_a_stratified_partition(counts, data):
    total = sum(counts)
    size = data.draw(st.integers(1, total - 1))
    targets = labels(*counts)
    train, held_out = split_validation(targets, size, seed=3)
    assert len(held_out) == size
    assert sorted(train.tolist() + held_out.tolist()) == list(range(total))
    assert train.tolist() == sorted(train.tolist())
    given_away = torch.bincount(targets[held_out], minlength=len(counts)).tolist()
    present = sum(count > 0 for count in counts)
    if size <= total - present:
        assert all(given < count for given, count in zip(given_away, counts, strict=True) if count)
    if min(count - size * count / total for count in counts if count) >= 1:  # nobody's last image is at stake
        for given_c, count in zip(given_away, counts, strict=True):
            assert abs(given_c - size * count / total) < 1


def test_validation_split_rounds_by_largest_remainder():
    # Shares 3.5, 1.75 and 1.75 of 7: the two larger remainders get the two images left.
    _, held_out = split_validation(labels(20, 10, 10), 7, seed=0)
    assert torch.bincount(labels(20, 10, 10)[held_out]).tolist() == [3, 2, 2]


def test_validation_split_follows_the_seed():
    targets = labels(50, 50)
    first, again, other = (split_validation(targets, 0.3, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first) == 30


@pytest.mark.parametrize(
    ("validation", "available", "size"), [(1, 2, 1), (9, 10, 9), (0.25, 10, 2), (0.5, 3, 2), (0.999, 1000, 999)]
)
def test_validation_size(validation, available, size):
    assert validation_size(validation, available) == size


@pytest.mark.parametrize(
    ("validation", "error", "message"),
    [
        (0, ValueError, r"validation: expected 1\.\.99 of the 100 images .* got 0 images$"),
        (100, ValueError, r"expected 1\.\.99 of the 100 images .* got 100 images$"),
        (-3, ValueError, r"got -3 images"),
        (0.001, ValueError, r"got 0 images \(0\.001 of them\)"),
        (0.999, ValueError, r"got 100 images \(0\.999 of them\)"),
        (0.0, ValueError, r"expected a fraction between 0 and 1, got 0\.0"),
        (1.0, ValueError, r"expected a fraction between 0 and 1, got 1\.0"),
        (float("nan"), ValueError, r"got nan"),
        (True, TypeError, r"validation: expected a number of images \(int\) or a fraction \(float\), got bool True"),
        ("10%", TypeError, r"got str '10%'"),
    ],
)
def test_validation_size_errors(validation, error, message):
    with pytest.raises(error, match=message):
        validation_size(validation, 100)


@given(class_counts, st.sampled_from([0.1, 0.2, 0.25, 0.29, 0.5, 0.75, 0.9]))
def test_test_split_follows_its_documented_rule(counts, fraction):
    targets = labels(*counts)
    exact = Fraction(str(fraction))
    expected, seen = [], [0] * len(counts)
    for index, c in enumerate(targets.tolist()):
        j = seen[c]
        seen[c] += 1
        if (j + 1) * exact // 1 > j * exact // 1:
            expected.append(index)
    if not expected:
        with pytest.raises(ValueError, match=f"{fraction} makes 0 of {len(targets)} images the test part"):
            split_test(targets, fraction)
        return
    rest, test = split_test(targets, fraction)
    assert test.tolist() == expected
    assert sorted(rest.tolist() + expected) == list(range(len(targets)))


def test_test_split_is_decimal():
    assert len(split_test(torch.zeros(100, dtype=torch.int64), 0.29)[1]) == 29
    assert split_test(torch.zeros(11, dtype=torch.int64), 0.2)[1].tolist() == [4, 9]


@pytest.mark.parametrize(
    ("fraction", "error", "message"),
    [
        (0.0, ValueError, r"test_fraction: expected a fraction between 0 and 1, got 0\.0"),
        (1.5, ValueError, r"got 1\.5"),
        (float("nan"), ValueError, r"got nan"),
        (1, TypeError, r"test_fraction: expected a float, got int 1"),
    ],
)
def test_test_split_errors(fraction, error, message):
    with pytest.raises(error, match=message):
        split_test(labels(10, 10), fraction)


def all_images(image_set):
    return torch.cat([batch.images for batch in image_set.batches(100)])


def test_digits_parts_are_the_data_set():
    splits = load_data("digits", seed=0, validation=300)
    assert splits.description == "digits: 1,142 training, 300 validation and 355 test images of 1x8x8, 10 classes"
    assert (splits.num_classes, splits.in_channels, splits.resolution) == (10, 1, 8)
    data = load_digits()
    train = all_images(splits.train)
    # The standard deviation and the background tell the scale and the offset: undo them and look for the raw digits.
    parts = [train, all_images(splits.validation), all_images(splits.test)]
    images = torch.cat(parts)
    scale = 16 / (images.max() - images.min())
    raw = ((images - images.min()) * scale).round().to(torch.int64)
    targets = torch.cat([splits.train.targets, splits.validation.targets, splits.test.targets])
    found = sorted((*row, target) for row, target in zip(raw.flatten(1).tolist(), targets.tolist(), strict=True))
    expected = sorted((*map(int, row), int(target)) for row, target in zip(data.data, data.target, strict=True))
    assert found == expected
    torch.testing.assert_close(train.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(unbiased=False), torch.tensor(1.0), atol=1e-6, rtol=0)


def test_digits_test_part_ignores_the_seed():
    one, two = load_data("digits", seed=0), load_data("digits", seed=1)
    assert torch.equal(one.test.targets, two.test.targets)
    assert not torch.equal(one.validation.targets, two.validation.targets)
    # The same images, each normalised by its own run's training part.
    corr = np.corrcoef(all_images(one.test).flatten().numpy(), all_images(two.test).flatten().numpy())[0, 1]
    assert corr > 1 - 1e-6
    # Raw test images by the documented rule, normalised by hand from the rest of the data set.
    data = load_digits()
    first_zero = (data.target == 0).nonzero()[0][4]
    position = int((one.test.targets == 0).nonzero()[0, 0])
    image = one.test.batch([position]).images[0, 0]
    raw = torch.from_numpy(data.images[first_zero]).float()
    torch.testing.assert_close((image - image.min()) / (image.max() - image.min()), raw / 16)


def test_digits_test_fraction_and_default_sizes():
    splits = load_data("digits", seed=0, test_fraction=0.5)
    assert len(splits.test) == sum(count // 2 for count in np.bincount(load_digits().target))
    assert len(splits.validation) == round(0.2 * (1797 - len(splits.test)))


def test_train_and_validation_is_their_union():
    splits = load_data("digits", seed=5)
    both = splits.train_and_validation
    assert both.can_augment
    assert len(both) == len(splits.train) + len(splits.validation)
    union = torch.cat([all_images(splits.train), all_images(splits.validation)]).flatten(1)
    assert sorted(union.tolist()) == sorted(all_images(both).flatten(1).tolist())


def test_resized_digits():
    small, large = load_data("digits", seed=0), load_data("digits", seed=0, resolution=13)
    images = all_images(large.train)
    assert large.resolution == 13
    assert large.test.shape == (1, 13, 13)
    assert large.test.batch([0]).images.shape == (1, 1, 13, 13)
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std(unbiased=False)) - 1) < 1e-5
    # Up to the normalisation, which is that of the resized images, they are the small ones resized.
    expected = functional.interpolate(all_images(small.train), (13, 13), mode="bilinear", antialias=True)
    expected = (expected - expected.mean()) / expected.std(unbiased=False)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_downsizing_is_antialiased():
    images = load_data("digits", seed=0, resolution=4).validation.batch([0]).images
    full = load_data("digits", seed=0).validation.batch([0]).images
    aliased = functional.interpolate(full, (4, 4), mode="bilinear", antialias=False)
    smooth = functional.interpolate(full, (4, 4), mode="bilinear", antialias=True)

    def agreement(other):
        return np.corrcoef(images.flatten().numpy(), other.flatten().numpy())[0, 1]

    assert agreement(smooth) > 1 - 1e-6
    assert agreement(aliased) < 0.999


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"name": "cifar"},
            ValueError,
            r"name: expected one of digits, fashion-mnist, .*, got 'cifar'",
        ),
        ({"seed": 1.5}, TypeError, r"seed: expected an integer, got float 1\.5"),
        ({"resolution": 0}, ValueError, r"resolution: expected at least 1, got 0"),
        ({"resolution": True}, TypeError, r"resolution: expected an integer, got bool True"),
        ({"workers": 0}, ValueError, r"workers: expected at least 1, got 0"),
        ({"validation": 1442}, ValueError, r"validation: expected 1\.\.1441 of the 1442 images"),
        ({"test_fraction": 2.0}, ValueError, r"test_fraction: expected a fraction between 0 and 1, got 2\.0"),
    ],
)
def test_load_data_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        load_data(**{"name": "digits", "seed": 0} | arguments)


def test_available_datasets():
    assert available_datasets() == ["digits", "fashion-mnist", "imagefolder", "imagenet"]
