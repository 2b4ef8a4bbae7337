"""Endless streams of batches that resume from a counter: batch i depends on the seed and on i alone."""

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from greedynas.data.image_sets import PREFETCH_BATCHES, Batch, ImageSet
from greedynas.data.prefetch import prefetched
from greedynas.data.seeds import derive_seed
from greedynas_ext.checks import check_count, check_index


class BatchStream:
    """Training batches: each epoch is a new permutation of the images, cut into whole batches (the rest is dropped)."""

    def __init__(self, image_set: ImageSet, batch_size: int, *, seed: int, augment: bool) -> None:
        """Make a stream.

        Args:
            image_set: what to draw from.
            batch_size: images per batch, at most len(image_set).
            seed: of the permutations and of the augmentation.
            augment: augment the images, each batch anew.

        Raises:
            ValueError: `batch_size` exceeds the set, or `augment` is asked of a set that has no augmentation.
        """
        self._image_set = image_set
        self.batch_size = check_count("batch_size", batch_size, 1)
        self._seed = check_index("seed", seed)
        if self.batch_size > len(image_set):
            raise ValueError(f"batch_size: {batch_size} exceeds the {len(image_set)} images of the set")
        if augment and not image_set.can_augment:
            raise ValueError("augment: expected False for an image set without augmentation, got True")
        self._augment = augment
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass over the set."""
        return len(self._image_set) // self.batch_size

    def indices(self, number: int) -> Tensor:
        """Which images are in batch `number`: int64 [batch_size]."""
        epoch, place = divmod(check_count("number", number, 0), self.batches_per_epoch)
        cached, order = self._order
        if cached != epoch:
            generator = torch.Generator().manual_seed(derive_seed("order", self._seed, epoch))
            order = torch.randperm(len(self._image_set), generator=generator)
            self._order = (epoch, order)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def batch(self, number: int) -> Batch:
        """Batch `number`, counted from 0 through all epochs: a pure function of the seed and the number.

        Returns:
            Images float32 [batch_size, C, H, W] and targets int64 [batch_size].
        """
        indices = self.indices(number)
        return self._image_set.batch(indices, derive_seed("batch", self._seed, number) if self._augment else None)

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches start, start + 1, ... up to and without `stop`; endless where it is None.

        Sets that are not in memory are loaded ahead by a background thread; the batches are the same.
        """
        start = check_count("start", start, 0)
        numbers = count(start) if stop is None else range(start, check_count("stop", stop, start))
        return prefetched(self.batch, numbers, 0 if self._image_set.in_memory else PREFETCH_BATCHES)


class ValidationSampler:
    """The random validation batches of the path filter, and images for recalibrating BatchNorm."""

    def __init__(self, image_set: ImageSet, size: int, *, seed: int) -> None:
        """Make a sampler.

        Args:
            image_set: the validation images.
            size: images per batch (GreedyNAS: 1,000), at most len(image_set).
            seed: of the draws.

        Raises:
            ValueError: `size` exceeds the set.
        """
        self._image_set = image_set
        self.size = check_count("size", size, 1)
        self._seed = check_index("seed", seed)
        if self.size > len(image_set):
            raise ValueError(f"size: {size} exceeds the {len(image_set)} images of the validation set")

    def random_subset(self, step: int) -> Batch:
        """`size` different images for one step, without augmentation: a pure function of the seed and the step.

        Returns:
            Images float32 [size, C, H, W] and targets int64 [size].
        """
        seed = derive_seed("validation", self._seed, check_count("step", step, 0))
        order = torch.randperm(len(self._image_set), generator=torch.Generator().manual_seed(seed))
        return self._image_set.batch(order[: self.size])

    def calibration(self, count: int) -> Tensor:
        """A fixed selection of images: float32 [count, C, H, W]. See `ImageSet.calibration`."""
        return self._image_set.calibration(count, seed=self._seed)
