"""Data sets of small images that are held in memory: digits and Fashion-MNIST."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from greedynas.data.augment import SmallAugmentation
from greedynas.data.idx import read_idx
from greedynas.data.image_sets import HeldOutImages, TensorImageSet, channel_statistics
from greedynas.data.splits import DataSplits, split_test, split_validation

# Debian's package dataset-fashion-mnist puts its files into the first; the second is the package's own name.
FASHION_MNIST_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
FASHION_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def digits(resolution: int | None, validation: int | float, test_fraction: float, seed: int) -> DataSplits:
    """Scikit-learn's digits: 1,797 images of 8x8, the test part set aside by `splits.split_test`."""
    from sklearn.datasets import load_digits  # takes a second to import, and only digits need it

    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8)[:, None]  # [1797, 1, 8, 8], values 0..16
    targets = torch.from_numpy(data.target).to(torch.int64)
    rest, test = split_test(targets, test_fraction)
    return _split_small_images(
        "digits",
        (images[rest], targets[rest]),
        lambda: (images[test], targets[test]),
        test_size=len(test),
        classes=tuple("0123456789"),
        resolution=resolution,
        validation=validation,
        seed=seed,
        augmentation=SmallAugmentation(shift=1, flip=False),
    )


def fashion_mnist(root: Path | None, resolution: int | None, validation: int | float, seed: int) -> DataSplits:
    """Fashion-MNIST from its four IDX files: 60,000 training and 10,000 test images of 28x28."""
    files = _find_fashion_mnist(root)
    train = _read_labelled(files[0], files[1])
    # Damage must show now and not after hours of training, so the test files are read and checked, but not kept.
    test_images, _ = _read_labelled(files[2], files[3])
    if test_images.shape[1:] != train[0].shape[1:]:
        raise ValueError(
            f"{files[2]}: expected images of {_by(train[0])} as in {files[0]}, got images of {_by(test_images)}"
        )
    return _split_small_images(
        "fashion-mnist",
        train,
        lambda: _read_labelled(files[2], files[3]),
        test_size=len(test_images),
        classes=FASHION_MNIST_CLASSES,
        resolution=resolution,
        validation=validation,
        seed=seed,
        augmentation=SmallAugmentation(shift=2, flip=True),
    )


def _find_fashion_mnist(root: Path | None) -> list[Path]:
    """The four files of the first folder that has them all, raw ones before gzipped ones."""
    folders = FASHION_MNIST_FOLDERS if root is None else (root, root / "FashionMNIST" / "raw")
    looked: list[str] = []
    for folder in folders:
        found = [
            next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
            for name in FASHION_MNIST_FILES
        ]
        files = [path for path in found if path is not None]
        if len(files) == len(FASHION_MNIST_FILES):
            return files
        missing = [f"{name}[.gz]" for name, path in zip(FASHION_MNIST_FILES, found, strict=True) if path is None]
        looked.append(f"  {folder}: " + (f"no {', '.join(missing)}" if folder.is_dir() else "no such folder"))
    raise FileNotFoundError(
        "fashion-mnist: its files were not found. Looked in\n"
        + "\n".join(looked)
        + "\nInstall them with `apt-get install dataset-fashion-mnist` (Debian), or give `root`, the folder that holds "
        "them or torchvision's FashionMNIST folder."
    )


def _read_labelled(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 1, H, W] and classes int64 [n] of a pair of IDX files."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"{images_path}: expected square images, got images of {_by(images)}")
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: expected a label for each of {len(images)} images, got {len(labels)} labels")
    if int(labels.max()) >= len(FASHION_MNIST_CLASSES):
        raise ValueError(f"{labels_path}: expected labels 0..{len(FASHION_MNIST_CLASSES) - 1}, got {int(labels.max())}")
    return images[:, None], labels.to(torch.int64)


def _split_small_images(
    name: str,
    development: tuple[Tensor, Tensor],
    open_test: Callable[[], tuple[Tensor, Tensor]],
    *,
    test_size: int,
    classes: tuple[str, ...],
    resolution: int | None,
    validation: int | float,
    seed: int,
    augmentation: SmallAugmentation,
) -> DataSplits:
    """Splits of images that are held in memory; `development` are the images for training and validation."""
    images, targets = development
    channels, size = images.shape[1], images.shape[2]
    resolution = size if resolution is None else resolution
    train, held_out = split_validation(targets, validation, seed)
    mean, std = channel_statistics(images, train, resolution)
    view = partial(TensorImageSet, mean=mean, std=std, resolution=resolution)

    def test_set() -> TensorImageSet:
        test_images, test_targets = open_test()
        return view(test_images, test_targets, torch.arange(test_size))

    return DataSplits(
        name=name,
        train=view(images, targets, train, augmentation=augmentation),
        validation=view(images, targets, held_out),
        train_and_validation=view(images, targets, torch.arange(len(targets)), augmentation=augmentation),
        test=HeldOutImages(test_set, test_size, (channels, resolution, resolution), in_memory=True),
        classes=classes,
    )


def _by(images: Tensor) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"
