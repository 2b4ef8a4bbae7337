"""Data sets of photographs in class folders: any ImageFolder, and ImageNet."""

from pathlib import Path

from greedynas.data.folders import ClassFolders, FolderImageSet, check_same_classes, scan_class_folders
from greedynas.data.image_sets import HeldOutImages
from greedynas.data.splits import DEFAULT_TEST_FRACTION, DataSplits, split_test, split_validation

RESOLUTION = 224
DEFAULT_VALIDATION = 0.1


def image_folder(
    root: Path,
    resolution: int | None,
    validation: int | float | None,
    test_fraction: float | None,
    seed: int,
    workers: int,
) -> DataSplits:
    """Class folders in train/ with test/ or val/ beside (or both), or in `root` itself."""
    present = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    if present and "train" not in present:
        raise FileNotFoundError(f"{root / 'train'}: no such folder, though there is {', '.join(present)} beside")
    drawn = DEFAULT_VALIDATION if validation is None else validation
    if "val" not in present and "test" not in present:
        whole = scan_class_folders(present.get("train", root))
        rest, test = split_test(whole.targets, DEFAULT_TEST_FRACTION if test_fraction is None else test_fraction)
        return _photos("imagefolder", whole.part(rest), whole.part(test), resolution, drawn, seed, workers)
    if test_fraction is not None:
        raise ValueError(f"test_fraction: {root} has test images of its own, expected None, got {test_fraction}")
    train = scan_class_folders(present["train"])
    test_folder = scan_class_folders(present.get("test", root / "val"))
    check_same_classes(train, test_folder)
    if len(present) < 3:
        return _photos("imagefolder", train, test_folder, resolution, drawn, seed, workers)
    if validation is not None:
        raise ValueError(f"validation: {present['val']} holds the validation images, expected None, got {validation}")
    val = scan_class_folders(present["val"])
    check_same_classes(train, val)
    return _photo_splits("imagefolder", train, val, train.joined(val), test_folder, resolution, workers)


def imagenet(root: Path, resolution: int | None, validation: int | float, seed: int, workers: int) -> DataSplits:
    """ImageNet's layout: train/ to draw the validation images from, val/ as the test set."""
    train, test = scan_class_folders(root / "train"), scan_class_folders(root / "val")
    check_same_classes(train, test)
    return _photos("imagenet", train, test, resolution, validation, seed, workers)


def _photos(
    name: str,
    development: ClassFolders,
    test: ClassFolders,
    resolution: int | None,
    validation: int | float,
    seed: int,
    workers: int,
) -> DataSplits:
    """Splits of photographs of which some are drawn for validation."""
    train, held_out = split_validation(development.targets, validation, seed)
    return _photo_splits(
        name, development.part(train), development.part(held_out), development, test, resolution, workers
    )


def _photo_splits(
    name: str,
    train: ClassFolders,
    validation: ClassFolders,
    both: ClassFolders,
    test: ClassFolders,
    resolution: int | None,
    workers: int,
) -> DataSplits:
    resolution = RESOLUTION if resolution is None else resolution

    def image_set(part: ClassFolders, can_augment: bool) -> FolderImageSet:
        return FolderImageSet(part.files, part.targets, resolution=resolution, workers=workers, can_augment=can_augment)

    size, shape = len(test.files), (3, resolution, resolution)
    return DataSplits(
        name=name,
        train=image_set(train, True),
        validation=image_set(validation, False),
        train_and_validation=image_set(both, True),
        test=HeldOutImages(lambda: image_set(test, False), size, shape, in_memory=False),
        classes=train.classes,
    )
