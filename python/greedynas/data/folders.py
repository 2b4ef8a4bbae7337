"""Photographs in class folders (the layout of torchvision's ImageFolder), decoded when they are asked for."""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from greedynas.data.augment import augment_photo, centre_photo
from greedynas.data.image_sets import Batch, ImageSet
from greedynas.data.seeds import derive_seed

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"})
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ClassFolders:
    """The images below one folder: files sorted by class, then by path."""

    root: Path
    classes: tuple[str, ...]  # names of the class folders, sorted
    files: tuple[str, ...]  # [n]
    targets: Tensor  # int64 [n]: index into `classes`

    def part(self, indices: Tensor) -> "ClassFolders":
        """The images at `indices` (int64), all classes kept."""
        files = tuple(self.files[index] for index in indices.tolist())
        return replace(self, files=files, targets=self.targets[indices])

    def joined(self, other: "ClassFolders") -> "ClassFolders":
        """These images and then those of another folder with the same classes."""
        return replace(self, files=self.files + other.files, targets=torch.cat([self.targets, other.targets]))


def scan_class_folders(root: Path) -> ClassFolders:
    """List the images of a folder that holds one folder per class.

    Files are found at any depth of a class folder, links followed; names that begin with a dot and files that are no
    images by their extension are left out.

    Raises:
        FileNotFoundError: `root` is no folder.
        ValueError: it has no class folders, or one of them has no image.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."))
    if not classes:
        loose = sum(_is_image(entry.name) for entry in os.scandir(root))
        raise ValueError(f"{root}: expected one folder per class, got none (and {loose} image files beside)")
    files: list[str] = []
    counts: list[int] = []
    for name in classes:
        found = sorted(
            os.path.join(folder, file)
            for folder, _, names in os.walk(root / name, followlinks=True)
            for file in names
            if _is_image(file)
        )
        if not found:
            raise ValueError(
                f"{root / name}: a class folder without an image (extensions: {' '.join(sorted(EXTENSIONS))})"
            )
        files += found
        counts.append(len(found))
    targets = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts))
    return ClassFolders(root, classes, tuple(files), targets)


def check_same_classes(one: ClassFolders, other: ClassFolders) -> None:
    """Raise a ValueError that names the differing class folders, unless both have the same."""
    if one.classes != other.classes:
        missing = sorted(set(one.classes) - set(other.classes))
        unexpected = sorted(set(other.classes) - set(one.classes))
        raise ValueError(
            f"{other.root}: expected the {len(one.classes)} class folders of {one.root}, got {len(other.classes)}; "
            f"missing: {_some(missing)}; unexpected: {_some(unexpected)}"
        )


class FolderImageSet(ImageSet):
    """Image files, decoded to RGB by threads when they are asked for, normalised by ImageNet's mean and deviation.

    Training images are a random resized crop, mirrored with probability 1/2; their seed is that of the batch and the
    index of the image, so the number of threads changes nothing. Evaluation images are resized to resolution / 0.875
    on the shorter side and cropped to the centre.
    """

    in_memory = False

    def __init__(
        self, files: Sequence[str], targets: Tensor, *, resolution: int, workers: int, can_augment: bool
    ) -> None:
        """Make a set of image files; none is opened yet.

        Args:
            files: n paths.
            targets: int64 [n], the images' classes.
            resolution: height and width of the images of a batch.
            workers: threads that decode.
            can_augment: whether these are training images.
        """
        self._files = files
        self._targets = targets
        self._resolution = resolution
        self._workers = workers
        self.can_augment = can_augment

    @property
    def targets(self) -> Tensor:
        """The images' classes: int64 [n]."""
        return self._targets

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image in a batch."""
        return 3, self._resolution, self._resolution

    def _read(self, indices: Tensor, augment_seed: int | None) -> Batch:
        """`batch` with checked arguments.

        Raises:
            FileNotFoundError: an image is gone.
            ValueError: an image cannot be read; the message names its file.
        """
        pixels = np.empty((len(indices), self._resolution, self._resolution, 3), dtype=np.uint8)

        def decode(row: int, index: int) -> None:
            image = _open_photo(self._files[index])
            if augment_seed is None:
                image = centre_photo(image, self._resolution)
            else:
                generator = random.Random(derive_seed("photo", augment_seed, index))
                image = augment_photo(image, self._resolution, generator)
            pixels[row] = np.asarray(image)

        # The threads live as long as the batch: starting them costs less than decoding one photograph.
        with ThreadPoolExecutor(min(self._workers, len(indices))) as executor:
            for _ in executor.map(decode, range(len(indices)), indices.tolist()):
                pass
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
        std = torch.tensor(IMAGENET_STD)[:, None, None]
        return Batch(images.div_(255).sub_(mean).div_(std), self._targets[indices])


def _open_photo(path: str) -> Image.Image:
    """Decode an image file to 8-bit RGB."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such image (it was there when the folder was listed)") from error
    except Exception as error:  # what a decoder raises on damaged bytes depends on the format
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


def _is_image(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in EXTENSIONS


def _some(names: list[str], limit: int = 5) -> str:
    """The first few names, for a message."""
    if not names:
        return "none"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
