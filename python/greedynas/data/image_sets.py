"""Sets of labelled images that are read by index, as normalised batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from greedynas.data.augment import SmallAugmentation
from greedynas.data.prefetch import prefetched
from greedynas.data.seeds import derive_seed
from greedynas_ext.checks import check_count, check_index

PREFETCH_BATCHES = 2
STATISTICS_CHUNK = 1024  # images; bounds the float64 temporary


class Batch(NamedTuple):
    """A batch of images and their classes; unpacks as (images, targets)."""

    images: Tensor  # float32 [b, C, H, W], normalised
    targets: Tensor  # int64 [b]


class ImageSet(ABC):
    """Labelled images of one shape.

    Attributes:
        in_memory: reading is so cheap that loading ahead is pointless.
        can_augment: `batch` accepts an `augment_seed`.
    """

    in_memory: bool
    can_augment: bool

    @property
    @abstractmethod
    def targets(self) -> Tensor:
        """The images' classes: int64 [n]."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image in a batch."""

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor | Sequence[int], augment_seed: int | None = None) -> Batch:
        """Read images.

        Args:
            indices: int64 [b], each in 0..len - 1; an image may appear more than once.
            augment_seed: seed of the training augmentation; None leaves the images as they are.

        Returns:
            Images float32 [b, C, H, W], normalised, and targets int64 [b]; a pure function of the arguments.

        Raises:
            TypeError: `indices` or `augment_seed` are no integers.
            ValueError: `indices` are empty, out of range or not one-dimensional, or this set has no augmentation.
        """
        indices = _check_indices(indices, len(self))
        if augment_seed is not None:
            augment_seed = check_index("augment_seed", augment_seed)
            if not self.can_augment:
                raise ValueError("augment_seed: this image set has no augmentation, expected None")
        return self._read(indices, augment_seed)

    @abstractmethod
    def _read(self, indices: Tensor, augment_seed: int | None) -> Batch:
        """`batch` with checked arguments."""

    def batches(self, size: int) -> Iterator[Batch]:
        """One pass over the set in order, without augmentation; the last batch may be smaller.

        Args:
            size: images per batch.
        """
        size = check_count("size", size, 1)
        parts = (torch.arange(start, min(start + size, len(self))) for start in range(0, len(self), size))
        return prefetched(self.batch, parts, 0 if self.in_memory else PREFETCH_BATCHES)

    def calibration(self, count: int, *, seed: int) -> Tensor:
        """A fixed random selection of images, without augmentation, for recalibrating BatchNorm.

        Args:
            count: how many, at most len(self). A smaller selection is the beginning of a larger one.
            seed: of the selection.

        Returns:
            float32 [count, C, H, W].

        Raises:
            ValueError: `count` is not in 1..len.
        """
        count = check_count("count", count, 1)
        if count > len(self):
            raise ValueError(f"count: expected at most the {len(self)} images of the set, got {count}")
        generator = torch.Generator().manual_seed(derive_seed("calibration", check_index("seed", seed)))
        return self.batch(torch.randperm(len(self), generator=generator)[:count]).images


class TensorImageSet(ImageSet):
    """Small images in memory, kept as bytes and shared between the parts of a split."""

    in_memory = True

    def __init__(
        self,
        images: Tensor,  # uint8 [N, C, H, W]
        targets: Tensor,  # int64 [N]
        indices: Tensor,  # int64 [n]: the images of this set
        *,
        mean: Tensor,  # float32 [C], in the units of `images`
        std: Tensor,  # float32 [C]
        resolution: int,
        augmentation: SmallAugmentation | None = None,
    ) -> None:
        """Make a view of the images at `indices`; they are resized (bilinear, antialiased) to resolution x resolution.

        Args:
            images: uint8 [N, C, H, W], not copied.
            targets: int64 [N].
            indices: int64 [n], which of the N images belong to this set, and in which order.
            mean: float32 [C], subtracted from the (resized) pixels.
            std: float32 [C], which they are then divided by.
            resolution: height and width of the images of a batch.
            augmentation: applied before resizing, so that its pixels are those of the stored image; None for none.
        """
        self._images, self._indices = images, indices
        self._targets = targets[indices]
        self._mean, self._std = mean[:, None, None], std[:, None, None]
        self._resolution = resolution
        self._augmentation = augmentation
        self.can_augment = augmentation is not None

    @property
    def targets(self) -> Tensor:
        """The images' classes: int64 [n]."""
        return self._targets

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image in a batch."""
        return self._images.shape[1], self._resolution, self._resolution

    def _read(self, indices: Tensor, augment_seed: int | None) -> Batch:
        pixels = self._images[self._indices[indices]]
        if augment_seed is not None and self._augmentation is not None:
            generator = torch.Generator().manual_seed(derive_seed("augment", augment_seed))
            pixels = self._augmentation(pixels, generator)
        images = resize(pixels.to(torch.float32), self._resolution)
        return Batch((images - self._mean).div_(self._std), self._targets[indices])


class HeldOutImages(ImageSet):
    """A test set that opens on first use and counts how often its images were read.

    The choice of an architecture must not depend on the test set. The counts let a run prove in its report that the
    test set was untouched until the end (`reads` 0) and then read once (`reads` 1).
    """

    can_augment = False

    def __init__(
        self, open_set: Callable[[], ImageSet], size: int, shape: tuple[int, int, int], *, in_memory: bool
    ) -> None:
        """Wrap a set that is still closed.

        Args:
            open_set: opens it; called once, when an image or the targets are first asked for.
            size: how many images it has.
            shape: (C, H, W) of its images.
            in_memory: as in `ImageSet`.
        """
        self.in_memory = in_memory
        self._open_set = open_set
        self._size, self._shape = size, shape
        self._set: ImageSet | None = None
        self._counts = torch.zeros(size, dtype=torch.int64)

    def __len__(self) -> int:
        return self._size

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image in a batch."""
        return self._shape

    @property
    def targets(self) -> Tensor:
        """The images' classes: int64 [n]. Opens the set, but reads no image."""
        return self._opened().targets

    @property
    def opened(self) -> bool:
        """Whether images or targets were asked for."""
        return self._set is not None

    @property
    def reads(self) -> int:
        """How often the most-read image was read: 0 before the first, 1 after one pass over all or part of the set."""
        return int(self._counts.max())

    @property
    def images_read(self) -> int:
        """How many images were read, repetitions included."""
        return int(self._counts.sum())

    def _opened(self) -> ImageSet:
        if self._set is None:
            self._set = self._open_set()
        return self._set

    def _read(self, indices: Tensor, augment_seed: int | None) -> Batch:
        batch = self._opened().batch(indices)
        self._counts += torch.bincount(indices, minlength=self._size)
        return batch


def resize(images: Tensor, resolution: int) -> Tensor:
    """Resize float [b, C, H, W] to resolution x resolution, bilinear with antialiasing."""
    if images.shape[-2:] == (resolution, resolution):
        return images
    return functional.interpolate(
        images, size=(resolution, resolution), mode="bilinear", align_corners=False, antialias=True
    )


def channel_statistics(images: Tensor, indices: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) standard deviation of each channel over chosen images, after resizing.

    Args:
        images: uint8 [N, C, H, W].
        indices: int64 [n], the images to count.
        resolution: height and width to resize to first.

    Returns:
        float32 [C] and float32 [C], in the units of `images`.

    Raises:
        ValueError: a channel is constant, so that it cannot be normalised.
    """
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(indices), STATISTICS_CHUNK):
        pixels = resize(images[indices[start : start + STATISTICS_CHUNK]].to(torch.float32), resolution).to(
            torch.float64
        )
        total += pixels.sum((0, 2, 3))
        squares += pixels.square().sum((0, 2, 3))
    count = len(indices) * resolution**2
    mean = total / count
    # Sums of bytes are exact in float64, so a constant channel has a variance of 0 up to one rounding.
    variance = squares / count - mean.square()
    if bool((variance <= 1e-9 * squares / count).any()):
        raise ValueError(
            f"training images: all pixels of a channel are equal (means {mean.tolist()}), no normalisation"
        )
    return mean.to(torch.float32), variance.sqrt().to(torch.float32)


def _check_indices(indices: Tensor | Sequence[int], size: int) -> Tensor:
    if not isinstance(indices, Tensor):
        indices = torch.tensor(indices, dtype=None if len(indices) else torch.int64)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64 [b], got {str(indices.dtype).removeprefix('torch.')}")
    if indices.ndim != 1 or indices.numel() == 0:
        raise ValueError(f"indices: expected int64 [b] with b >= 1, got the shape {list(indices.shape)}")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise ValueError(f"indices: expected 0..{size - 1}, got {low if low < 0 else high}")
    return indices
