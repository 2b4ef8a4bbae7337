"""Splitting a data set into training, validation and test part."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from greedynas.data.image_sets import HeldOutImages, ImageSet
from greedynas.data.seeds import derive_seed

DEFAULT_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class DataSplits:
    """A data set in its parts.

    Attributes:
        name: of the data set, e.g. "digits".
        train: images to train on, with augmentation.
        validation: images for the path filter and the search.
        train_and_validation: both of them, with augmentation, for retraining the chosen architecture.
        test: images for the final accuracy alone; counts its reads.
        classes: names of the classes.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    train_and_validation: ImageSet
    test: HeldOutImages
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """1 for greyscale, 3 for colour."""
        return self.train.shape[0]

    @property
    def resolution(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train.shape[1]

    @property
    def description(self) -> str:
        """One line for a report."""
        return (
            f"{self.name}: {len(self.train):,} training, {len(self.validation):,} validation and "
            f"{len(self.test):,} test images of {'x'.join(map(str, self.train.shape))}, {self.num_classes} classes"
        )


def validation_size(validation: int | float, available: int) -> int:
    """How many images to hold out.

    Args:
        validation: a number of images (int) or a fraction of the available ones (float).
        available: images for training and validation together.

    Raises:
        TypeError: `validation` is neither int nor float.
        ValueError: nothing would be left for one of the two parts.
    """
    if isinstance(validation, bool) or not isinstance(validation, int | float):
        raise TypeError(
            f"validation: expected a number of images (int) or a fraction (float), "
            f"got {type(validation).__name__} {validation!r}"
        )
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise ValueError(f"validation: expected a fraction between 0 and 1, got {validation}")
        size = round(validation * available)
    else:
        size = validation
    if not 1 <= size < available:
        raise ValueError(
            f"validation: expected 1..{available - 1} of the {available} images for training and validation, "
            f"got {size} images" + (f" ({validation} of them)" if isinstance(validation, float) else "")
        )
    return size


def split_validation(targets: Tensor, validation: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw a validation part in which the classes are as frequent as in the whole.

    Each class gives its share, rounded by largest remainders so that the sizes add up. No class gives its last image as
    long as another can.

    Args:
        targets: int64 [n], the images' classes.
        validation: number of images or fraction of n.
        seed: of the draw.

    Returns:
        Indices of the training part and of the validation part, int64, each sorted.
    """
    size = validation_size(validation, len(targets))
    counts = torch.bincount(targets).tolist()
    present = sum(count > 0 for count in counts)
    spare = 1 if size <= len(targets) - present else 0
    shares = [Fraction(size * count, len(targets)) for count in counts]
    limits = [max(count - spare, 0) for count in counts]
    sizes = [min(int(share), limit) for share, limit in zip(shares, limits, strict=True)]
    while (rest := size - sum(sizes)) > 0:
        open_classes = [c for c in range(len(counts)) if sizes[c] < limits[c]]
        open_classes.sort(key=lambda c: (sizes[c] - shares[c], c))
        for c in open_classes[:rest]:
            sizes[c] += 1
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    generator = torch.Generator().manual_seed(derive_seed("split", seed))
    for c, class_size in enumerate(sizes):
        members = (targets == c).nonzero()[:, 0]
        held_out[members[torch.randperm(len(members), generator=generator)[:class_size]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def split_test(targets: Tensor, test_fraction: float) -> tuple[Tensor, Tensor]:
    """Set a test part aside by a fixed rule, the same whatever the seed, so that the results of runs compare.

    Of each class, counted in the order of the images from 0, image j belongs to the test part if
    floor((j + 1) * fraction) > floor(j * fraction): with 0.2, every fifth image of a class.

    Args:
        targets: int64 [n], the images' classes.
        test_fraction: part of each class that becomes the test part.

    Returns:
        Indices of the rest and of the test part, int64, each sorted.

    Raises:
        TypeError: `test_fraction` is no float.
        ValueError: it is not between 0 and 1, or leaves one of the parts empty.
    """
    if not isinstance(test_fraction, float):
        raise TypeError(f"test_fraction: expected a float, got {type(test_fraction).__name__} {test_fraction!r}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: expected a fraction between 0 and 1, got {test_fraction}")
    fraction = Fraction(str(test_fraction))  # decimal: 0.29 of 100 images is 29, not 28.999999999999996
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for c in range(int(targets.max()) + 1):
        members = (targets == c).nonzero()[:, 0]
        # Image number t of the test part is the first j with floor((j + 1) * fraction) = t + 1.
        picked = [-(-(t + 1) // fraction) - 1 for t in range(int(len(members) * fraction))]
        held_out[members[torch.tensor(picked, dtype=torch.int64)]] = True
    chosen = int(held_out.sum())
    if chosen in (0, len(targets)):
        raise ValueError(f"test_fraction: {test_fraction} makes {chosen} of {len(targets)} images the test part")
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
