"""Image sets in memory, their augmentation, and the streams of batches."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from greedynas.data import BatchStream, HeldOutImages, TensorImageSet, ValidationSampler, load_data
from greedynas.data.augment import SmallAugmentation, random_flip, random_shift
from greedynas.data.image_sets import channel_statistics
from greedynas.data.prefetch import prefetched
from greedynas.data.seeds import derive_seed


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, augmentation: SmallAugmentation | None = None) -> TensorImageSet:
    """Image i is all i (a byte), its class is i % 3; not normalised."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 2, 2)
    return TensorImageSet(
        images,
        torch.arange(count) % 3,
        torch.arange(count),
        mean=torch.zeros(1),
        std=torch.ones(1),
        resolution=2,
        augmentation=augmentation,
    )


def values(batch) -> list[int]:
    return batch.images[:, 0, 0, 0].to(torch.int64).tolist()


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", seed=0)


def test_batch_picks_and_normalises():
    images = torch.randint(0, 256, (9, 2, 3, 3), dtype=torch.uint8, generator=seeded(0))
    targets = torch.tensor([5, 4, 3, 2, 1, 0, 1, 2, 3])
    part = TensorImageSet(
        images,
        targets,
        torch.tensor([8, 2, 4]),
        mean=torch.tensor([10.0, 20]),
        std=torch.tensor([2.0, 4]),
        resolution=3,
    )
    assert len(part) == 3
    assert part.shape == (2, 3, 3)
    assert part.targets.tolist() == [3, 3, 1]
    batch = part.batch([2, 0, 0])
    assert batch.images.dtype == torch.float32
    assert batch.targets.dtype == torch.int64
    assert batch.targets.tolist() == [1, 3, 3]
    expected = (images[[4, 8, 8]].numpy() - np.array([10, 20])[:, None, None]) / np.array([2, 4])[:, None, None]
    np.testing.assert_allclose(batch.images.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([], ValueError, r"indices: expected int64 \[b\] with b >= 1, got the shape \[0\]"),
        ([[1, 2]], ValueError, r"got the shape \[1, 2\]"),
        ([0, 7], ValueError, r"indices: expected 0\.\.6, got 7"),
        ([-1, 0], ValueError, r"indices: expected 0\.\.6, got -1"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, r"indices: expected int64 \[b\], got int32"),
        ([0.5], TypeError, r"got float32"),
    ],
)
def test_batch_refuses_bad_indices(indices, error, message):
    with pytest.raises(error, match=message):
        numbered(7).batch(indices)


def test_batch_refuses_bad_augment_seeds():
    with pytest.raises(ValueError, match="augment_seed: this image set has no augmentation, expected None"):
        numbered(7).batch([0], augment_seed=1)
    with pytest.raises(TypeError, match=r"augment_seed: expected an integer, got float 1\.0"):
        numbered(7, SmallAugmentation(1, False)).batch([0], augment_seed=1.0)


@pytest.mark.parametrize("size", [1, 6, 7, 8])
def test_batches_are_one_pass_in_order(size):
    parts = list(numbered(7).batches(size))
    assert [index for part in parts for index in values(part)] == list(range(7))
    assert [len(part.targets) for part in parts] == [size] * (7 // size) + ([7 % size] if 7 % size else [])
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        numbered(7).batches(0)


def test_calibration_is_fixed_and_nested(digits):
    big = digits.train.calibration(50, seed=1)
    assert torch.equal(big[:20], digits.train.calibration(20, seed=1))
    assert not torch.equal(big, digits.train.calibration(50, seed=2))
    assert len(set(values_of(numbered(30).calibration(30, seed=0)))) == 30
    with pytest.raises(ValueError, match="count: expected at most the 7 images of the set, got 8"):
        numbered(7).calibration(8, seed=0)


def values_of(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].to(torch.int64).tolist()


def test_channel_statistics_count_the_chosen_images_only():
    images = torch.randint(0, 256, (3000, 2, 3, 3), dtype=torch.uint8, generator=seeded(0))
    chosen = torch.arange(0, 3000, 2)
    mean, std = channel_statistics(images, chosen, 3)
    picked = images[::2].numpy().astype(np.float64)
    np.testing.assert_allclose(mean, picked.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, picked.std((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("level", [0, 7, 255])
def test_channel_statistics_refuse_constant_channels(level):
    images = torch.randint(0, 256, (5, 2, 3, 3), dtype=torch.uint8, generator=seeded(0))
    images[:, 1] = level
    with pytest.raises(ValueError, match="training images: all pixels of a channel are equal"):
        channel_statistics(images, torch.arange(5), 3)


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Oracle: copy pixel by pixel."""
    height, width = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[y, x] = image[y - down, x - right]
    return result


@pytest.mark.parametrize("shift", [1, 2])
def test_random_shift_gives_every_shift_and_nothing_else(shift):
    image = torch.randint(1, 256, (4, 5), dtype=torch.uint8, generator=seeded(0))
    images = image.expand(600, 2, 4, 5).clone()
    images[:, 1] += 3  # channels of an image move together
    result = random_shift(images, shift, seeded(1)).numpy()
    moves = range(-shift, shift + 1)
    possible = {
        (shifted(image.numpy(), y, x).tobytes() + shifted((image + 3).numpy(), y, x).tobytes()): (y, x)
        for y in moves
        for x in moves
    }
    found = [possible[one.tobytes()] for one in result]
    assert set(found) == set(possible.values())
    assert random_shift(images, 0, seeded(1)) is images


def test_random_flip_mirrors_half():
    images = torch.randint(0, 256, (400, 1, 2, 3), dtype=torch.uint8, generator=seeded(0))
    result = random_flip(images, seeded(1))
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(result, images, strict=True)]
    kept = [torch.equal(new, old) for new, old in zip(result, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250


def test_augmentation_is_a_function_of_its_seed(digits):
    indices = torch.arange(64)
    plain = digits.train.batch(indices).images
    one, again, other = (digits.train.batch(indices, seed).images for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain)
    # Digits keep their orientation: unshifted, each image appears in the augmented one's neighbourhood.
    inner = one[:, 0, 1:7, 1:7]
    windows = torch.stack([plain[:, 0, y : y + 6, x : x + 6] for y in range(3) for x in range(3)])
    assert bool((windows == inner).flatten(2).all(2).any(0).all())


def test_augmentation_flips_where_told():
    both = SmallAugmentation(shift=0, flip=True)
    images = torch.arange(6, dtype=torch.uint8).reshape(1, 1, 2, 3).expand(50, 1, 2, 3)
    rows = {tuple(image.flatten().tolist()) for image in both(images, seeded(0))}
    assert rows == {(0, 1, 2, 3, 4, 5), (2, 1, 0, 5, 4, 3)}


def test_nothing_touches_the_global_generators(digits):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    BatchStream(digits.train, 32, seed=0, augment=True).batch(3)
    ValidationSampler(digits.validation, 32, seed=0).random_subset(3)
    digits.train.calibration(10, seed=0)
    load_data("digits", seed=7)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@given(count=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(-5, 5))
def test_stream_epochs_are_permutations_cut_into_batches(count, size, seed):
    if size > count:
        with pytest.raises(ValueError, match=f"batch_size: {size} exceeds the {count} images of the set"):
            BatchStream(numbered(count), size, seed=seed, augment=False)
        return
    stream = BatchStream(numbered(count), size, seed=seed, augment=False)
    whole = stream.batches_per_epoch
    assert whole == count // size
    for epoch in range(2):
        drawn = [index for i in range(whole) for index in stream.indices(epoch * whole + i).tolist()]
        assert len(drawn) == len(set(drawn)) == whole * size


def test_stream_batches_depend_on_seed_and_number_alone(digits):
    stream = BatchStream(digits.train, 100, seed=4, augment=True)
    numbers = [0, 25, 3, 11, 0, 12, 10]
    batches = [stream.batch(number) for number in numbers]
    for number, batch in zip(numbers, batches, strict=True):
        fresh = BatchStream(digits.train, 100, seed=4, augment=True).batch(number)
        assert torch.equal(batch.images, fresh.images)
        assert torch.equal(batch.targets, fresh.targets)
    assert not torch.equal(batches[0].targets, batches[1].targets)
    assert not torch.equal(batches[0].images, BatchStream(digits.train, 100, seed=5, augment=True).batch(0).images)


def test_stream_epochs_differ_in_order_and_augmentation(digits):
    stream = BatchStream(digits.train, 100, seed=4, augment=True)
    assert not torch.equal(stream.indices(0), stream.indices(stream.batches_per_epoch))
    whole = BatchStream(digits.train, len(digits.train), seed=4, augment=True)
    first, second = (whole.batch(i).images[whole.indices(i).argsort()] for i in (0, 1))
    assert not torch.equal(first, second)
    plain = BatchStream(digits.train, len(digits.train), seed=4, augment=False)
    first, second = (plain.batch(i).images[plain.indices(i).argsort()] for i in (0, 1))
    assert torch.equal(first, second)


def test_stream_augments_each_batch_by_another_seed(monkeypatch):
    seeds = []
    image_set = numbered(12, SmallAugmentation(1, False))
    monkeypatch.setattr(image_set, "_read", lambda indices, seed: seeds.append(seed))
    for seed in (0, 1):
        stream = BatchStream(image_set, 3, seed=seed, augment=True)
        for number in range(20):
            stream.batch(number)
    assert len(set(seeds)) == 40
    BatchStream(image_set, 3, seed=0, augment=False).batch(0)
    assert seeds[-1] is None


def test_stream_targets_belong_to_the_images():
    stream = BatchStream(numbered(50), 8, seed=0, augment=False)
    batch = stream.batch(9)
    assert values(batch) == stream.indices(9).tolist()
    assert batch.targets.tolist() == [value % 3 for value in values(batch)]


def test_stream_iterates_and_resumes():
    stream = BatchStream(numbered(10), 3, seed=0, augment=False)
    expected = [values(stream.batch(i)) for i in range(8)]
    assert [values(batch) for batch in stream.iterate(0, 8)] == expected
    assert [values(batch) for batch in stream.iterate(5, 8)] == expected[5:]
    assert list(stream.iterate(8, 8)) == []
    endless = stream.iterate(2)
    assert [values(next(endless)) for _ in range(6)] == expected[2:]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda s: BatchStream(s, 0, seed=0, augment=False),
            ValueError,
            r"batch_size: expected at least 1, got 0",
        ),
        (
            lambda s: BatchStream(s, 2.0, seed=0, augment=False),
            TypeError,
            r"batch_size: expected .*, got float 2",
        ),
        (lambda s: BatchStream(s, 2, seed=None, augment=False), TypeError, r"seed: expected an integer, got NoneType"),
        (
            lambda s: BatchStream(s, 2, seed=0, augment=True),
            ValueError,
            r"augment: expected False for an image",
        ),
        (
            lambda s: BatchStream(s, 2, seed=0, augment=False).batch(-1),
            ValueError,
            r"number: .*at least 0, got -1",
        ),
        (lambda s: BatchStream(s, 2, seed=0, augment=False).iterate(-1), ValueError, r"start: expected .* got -1"),
        (
            lambda s: BatchStream(s, 2, seed=0, augment=False).iterate(5, 4),
            ValueError,
            r"stop: .*at least 5, got 4",
        ),
        (lambda s: ValidationSampler(s, 8, seed=0), ValueError, r"size: 8 exceeds the 7 images of the validation set"),
        (lambda s: ValidationSampler(s, 7, seed=0).random_subset(-1), ValueError, r"step: expected .* got -1"),
    ],
)
def test_stream_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(numbered(7))


def test_validation_subsets_have_no_repetitions_and_change():
    sampler = ValidationSampler(numbered(40), 30, seed=3)
    drawn = [values(sampler.random_subset(step)) for step in range(5)]
    assert all(len(set(one)) == 30 for one in drawn)
    assert len({tuple(sorted(one)) for one in drawn}) == 5
    assert {index for one in drawn for index in one} == set(range(40))
    assert values(ValidationSampler(numbered(40), 30, seed=3).random_subset(4)) == drawn[4]
    assert values(ValidationSampler(numbered(40), 30, seed=4).random_subset(4)) != drawn[4]
    assert torch.equal(sampler.calibration(9), numbered(40).calibration(9, seed=3))


def test_held_out_images_open_late_and_count_reads():
    opened = []
    held_out = HeldOutImages(lambda: opened.append(1) or numbered(5), 5, (1, 2, 2), in_memory=True)
    assert (len(held_out), held_out.shape, held_out.opened, held_out.reads) == (5, (1, 2, 2), False, 0)
    assert opened == []
    assert held_out.targets.tolist() == [0, 1, 2, 0, 1]
    assert (held_out.opened, held_out.reads, held_out.images_read) == (True, 0, 0)
    assert sum(len(batch.targets) for batch in held_out.batches(2)) == 5
    assert (held_out.reads, held_out.images_read) == (1, 5)
    assert values(held_out.batch([3, 3])) == [3, 3]
    assert (held_out.reads, held_out.images_read) == (3, 7)
    assert opened == [1]
    with pytest.raises(ValueError, match="no augmentation"):
        held_out.batch([0], augment_seed=1)


def test_digits_leave_the_test_part_closed(digits):
    splits = load_data("digits", seed=1)
    BatchStream(splits.train_and_validation, 16, seed=0, augment=True).batch(0)
    assert splits.description
    assert not splits.test.opened
    assert sum(len(batch.targets) for batch in splits.test.batches(64)) == len(splits.test)
    assert splits.test.reads == 1


def test_derived_seeds_are_fixed_and_apart():
    # Written down: a change would silently change every run.
    assert derive_seed("order", 0, 0) == 2744815721171672521
    seeds = {derive_seed(purpose, a, b) for purpose in ("order", "batch") for a in range(-3, 12) for b in range(12)}
    assert len(seeds) == 2 * 15 * 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("order", 1, 12) != derive_seed("order", 11, 2)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_keeps_the_order(depth):
    assert list(prefetched(lambda key: key * key, range(7), depth)) == [0, 1, 4, 9, 16, 25, 36]


def test_prefetch_loads_ahead_in_one_other_thread_and_not_too_far():
    loaded, threads = [], set()

    def load(key: int) -> int:
        threads.add(threading.current_thread())
        loaded.append(key)
        return key

    endless = prefetched(load, iter(range(10**9)), 2)
    assert next(endless) == 0
    deadline = time.monotonic() + 5
    while len(loaded) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert loaded == [0, 1, 2]
    assert next(endless) == 1
    endless.close()
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert not threads.pop().is_alive()


def test_prefetch_raises_where_the_value_would_be():
    def load(key: int) -> int:
        if key == 2:
            raise ValueError("third")
        return key

    got = []
    with pytest.raises(ValueError, match="third"):
        got.extend(prefetched(load, range(9), 2))
    values = prefetched(load, range(9), 2)
    assert [next(values), next(values)] == [0, 1]
