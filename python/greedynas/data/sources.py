"""The data sets by name. Nothing is ever downloaded."""

import os
from pathlib import Path

from greedynas.data.photos import image_folder, imagenet
from greedynas.data.small_images import digits, fashion_mnist
from greedynas.data.splits import DEFAULT_TEST_FRACTION, DataSplits
from greedynas_ext.checks import check_count, check_index

DATASETS = ("digits", "fashion-mnist", "imagefolder", "imagenet")


def available_datasets() -> list[str]:
    """The names that `load_data` knows."""
    return list(DATASETS)


def load_data(
    name: str,
    *,
    seed: int,
    root: Path | None = None,
    resolution: int | None = None,
    validation: int | float | None = None,
    test_fraction: float | None = None,
    workers: int | None = None,
) -> DataSplits:
    """Load a data set and split it into training, validation and test images.

    - "digits": scikit-learn's 1,797 handwritten digits of 8x8, always at hand. `root` is not used.
    - "fashion-mnist": 60,000 + 10,000 articles of 28x28, from IDX files, raw or .gz, in `root` or in torchvision's
      place, `root`/FashionMNIST/raw; without a root, where Debian's package dataset-fashion-mnist puts them.
    - "imagefolder": photographs in `root`/train/<class>/, and test images in `root`/test/<class>/ or
      `root`/val/<class>/ (where there are both, val/ is the validation part); or all photographs in `root`/<class>/.
    - "imagenet": `root`/train/<wnid>/, from which 50,000 validation images are drawn, and `root`/val/<wnid>/, which
      serves as the test set.

    The validation part is drawn by `seed`, stratified by class. The test part is the data set's own; where it has none
    (digits, a single folder), a fixed rule independent of the seed sets it aside (see `splits.split_test`). Small
    images are normalised by the mean and standard deviation of the training part, photographs by ImageNet's.

    Args:
        name: one of `available_datasets()`.
        seed: of the validation split.
        root: folder of the files.
        resolution: height and width of the images in pixels; None for the data set's own, 224 for photographs.
        validation: validation images (int) or their fraction of the images that are not for testing (float); None for
            the data set's default: a fifth for digits, 10,000 for Fashion-MNIST, a tenth for an image folder, 50,000
            for ImageNet.
        test_fraction: for a data set without a test part of its own, the fraction that becomes one; None for 0.2.
        workers: threads that decode photographs; None for one per CPU.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown name, an argument out of range, a damaged file, an empty folder, differing class folders.
        FileNotFoundError: the files are not there; the message says where they were looked for.
    """
    if name not in DATASETS:
        raise ValueError(f"name: expected one of {', '.join(DATASETS)}, got {name!r}")
    seed = check_index("seed", seed)
    if resolution is not None:
        resolution = check_count("resolution", resolution, 1)
    threads = len(os.sched_getaffinity(0)) if workers is None else check_count("workers", workers, 1)
    root = None if root is None else Path(root).expanduser()
    if name == "digits":
        fraction = DEFAULT_TEST_FRACTION if test_fraction is None else test_fraction
        return digits(resolution, 0.2 if validation is None else validation, fraction, seed)
    if name == "imagefolder":
        return image_folder(_existing(name, root), resolution, validation, test_fraction, seed, threads)
    if test_fraction is not None:
        raise ValueError(f"test_fraction: {name} has test images of its own, expected None, got {test_fraction}")
    if name == "fashion-mnist":
        return fashion_mnist(root, resolution, 10_000 if validation is None else validation, seed)
    validation = 50_000 if validation is None else validation
    return imagenet(_existing(name, root), resolution, validation, seed, threads)


def _existing(name: str, root: Path | None) -> Path:
    if root is None:
        raise ValueError(f"root: {name} needs the folder of its images, got None")
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root}: no such folder")
    return root
