"""Photographs in class folders: layouts, decoding, augmentation, errors. torchvision is the oracle."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as oracle

from greedynas.data import BatchStream, load_data
from greedynas.data.augment import augment_photo, random_crop_box
from greedynas.data.folders import FolderImageSet, scan_class_folders

NORMALISE = v2.Compose(
    [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def photo(path: Path, width: int = 12, height: int = 9, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)


def class_folders(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    for name, count in counts.items():
        for i in range(count):
            photo(root / name / f"{i:03}.png", 9 + i % 5, 8 + i % 3, seed + 100 * len(name) + i)
    return root


def names(image_set) -> list[str]:
    """Class and file of each image."""
    return [f"{Path(file).parent.name}/{Path(file).name}" for file in image_set._files]


def held_out_names(splits) -> list[str]:
    return names(splits.test._opened())


def test_single_folder_is_split_by_the_fixed_rule(tmp_path):
    class_folders(tmp_path, {"cat": 10, "dog": 5})
    one, two = (load_data("imagefolder", root=tmp_path, seed=seed, validation=4, resolution=8) for seed in (0, 1))
    assert one.description == "imagefolder: 8 training, 4 validation and 3 test images of 3x8x8, 2 classes"
    assert one.classes == ("cat", "dog")
    assert not one.test.opened
    assert held_out_names(one) == held_out_names(two) == ["cat/004.png", "cat/009.png", "dog/004.png"]
    assert names(one.validation) != names(two.validation)
    everything = names(one.train) + names(one.validation) + held_out_names(one)
    assert sorted(everything) == [f"cat/{i:03}.png" for i in range(10)] + [f"dog/{i:03}.png" for i in range(5)]
    assert sorted(names(one.train_and_validation)) == sorted(names(one.train) + names(one.validation))
    for part in (one.train, one.validation, one.train_and_validation):
        assert part.targets.tolist() == [one.classes.index(name.split("/")[0]) for name in names(part)]
    assert len(load_data("imagefolder", root=tmp_path, seed=0, validation=1, test_fraction=0.6).test) == 9


def test_train_alone_is_split_like_a_single_folder(tmp_path):
    class_folders(tmp_path / "train", {"cat": 10, "dog": 10})
    splits = load_data("imagefolder", root=tmp_path, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (14, 2, 4)
    assert splits.resolution == 224


@pytest.mark.parametrize("part", ["val", "test"])
def test_train_with_one_other_folder_takes_it_for_the_test(tmp_path, part):
    class_folders(tmp_path / "train", {"cat": 6, "dog": 6})
    class_folders(tmp_path / part, {"cat": 2, "dog": 3})
    splits = load_data("imagefolder", root=tmp_path, seed=0, validation=0.5)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 6, 5)
    assert splits.test.targets.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"test_fraction: .* has test images of its own, expected None, got 0\.3"):
        load_data("imagefolder", root=tmp_path, seed=0, test_fraction=0.3)


def test_three_folders_are_the_three_parts(tmp_path):
    class_folders(tmp_path / "train", {"cat": 4, "dog": 4})
    class_folders(tmp_path / "val", {"cat": 1, "dog": 2})
    class_folders(tmp_path / "test", {"cat": 3, "dog": 3})
    splits = load_data("imagefolder", root=tmp_path, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 3, 6)
    assert splits.validation.targets.tolist() == [0, 1, 1]
    assert splits.train_and_validation.targets.tolist() == [0] * 4 + [1] * 4 + [0, 1, 1]
    assert names(splits.train_and_validation) == names(splits.train) + names(splits.validation)
    with pytest.raises(ValueError, match=r"validation: .*val holds the validation images, expected None, got 3"):
        load_data("imagefolder", root=tmp_path, seed=0, validation=3)


def test_imagenet_layout(tmp_path):
    class_folders(tmp_path / "train", {"n01440764": 8, "n01443537": 8})
    class_folders(tmp_path / "val", {"n01440764": 2, "n01443537": 2})
    splits = load_data("imagenet", root=tmp_path, seed=0, validation=4)
    assert splits.description == "imagenet: 12 training, 4 validation and 4 test images of 3x224x224, 2 classes"
    with pytest.raises(ValueError, match=r"validation: expected 1\.\.15 of the 16 images .* got 50000 images"):
        load_data("imagenet", root=tmp_path, seed=0)
    with pytest.raises(ValueError, match=r"test_fraction: imagenet has test images of its own"):
        load_data("imagenet", root=tmp_path, seed=0, test_fraction=0.1)


def test_scan_agrees_with_torchvision(tmp_path):
    class_folders(tmp_path / "root", {"b": 2, "a": 3, "c": 1})
    photo(tmp_path / "root" / "b" / "deeper" / "x.JPEG")
    photo(tmp_path / "root" / "c" / "upper.PNG")
    (tmp_path / "root" / "c" / "notes.txt").write_text("no image")
    photo(tmp_path / "elsewhere" / "linked.png")
    root = tmp_path / "root"
    (root / "a" / "link").symlink_to(tmp_path / "elsewhere")
    expected = ImageFolder(str(root))
    found = scan_class_folders(root)
    assert len(found.files) == 9
    assert list(found.classes) == expected.classes
    assert list(zip(found.files, found.targets.tolist(), strict=True)) == sorted(
        expected.samples, key=lambda sample: (sample[1], sample[0])
    )
    (root / ".cache").mkdir()
    (root / "c" / "._upper.PNG").write_bytes(b"left by another system")
    assert scan_class_folders(root).files == found.files


@pytest.mark.parametrize("size", [(12, 9), (9, 12), (10, 10), (40, 3), (3, 40), (1, 1), (31, 32)])
@pytest.mark.parametrize("resolution", [7, 8, 32])
def test_evaluation_images_equal_torchvisions(tmp_path, size, resolution):
    photo(tmp_path / "image.png", *size)
    image_set = FolderImageSet(
        [str(tmp_path / "image.png")], torch.tensor([3]), resolution=resolution, workers=1, can_augment=False
    )
    images, targets = image_set.batch([0])
    transform = v2.Compose([v2.Resize(round(resolution / 0.875)), v2.CenterCrop(resolution), NORMALISE])
    expected = transform(Image.open(tmp_path / "image.png"))
    torch.testing.assert_close(images[0], expected, atol=1e-6, rtol=0)
    assert images.is_contiguous()
    assert targets.tolist() == [3]


@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_crop_boxes_lie_in_the_image_and_keep_scale_and_ratio(width, height, seed):
    left, top, right, bottom = random_crop_box(width, height, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) >= 20:  # or rounding to whole pixels dominates
        assert 0.05 < (right - left) * (bottom - top) / (width * height) <= 1
        if max(width, height) / min(width, height) < 4 / 3:
            assert 0.6 < (right - left) / (bottom - top) < 1 / 0.6


def test_crop_boxes_are_distributed_like_torchvisions():
    ours = [random_crop_box(200, 150, random.Random(seed)) for seed in range(6000)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        crop, image = v2.RandomResizedCrop(16), torch.empty(3, 150, 200)
        drawn = [crop.make_params([image]) for _ in range(6000)]
    theirs = [(p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) for p in drawn]
    for quantity in (
        lambda left, top, right, bottom: (right - left) * (bottom - top) / 30_000,
        lambda left, top, right, bottom: np.log((right - left) / (bottom - top)),
        lambda left, top, right, bottom: left / 200,
        lambda left, top, right, bottom: bottom / 150,
    ):
        one, other = ([quantity(*box) for box in boxes] for boxes in (ours, theirs))
        # Chance alone exceeds this once in a thousand; a ratio uniform on the linear scale would give 0.07.
        assert ks_2samp(one, other).statistic < 0.035


@pytest.mark.parametrize(("width", "height"), [(1000, 1), (1, 1000), (900, 30)])
def test_crop_of_an_extreme_shape_is_the_central_box(width, height):
    boxes = {random_crop_box(width, height, random.Random(seed)) for seed in range(60)}
    if width > height:
        expected = min(width, max(1, round(height * 4 / 3)))
        centre = ((width - expected) // 2, 0, (width - expected) // 2 + expected, height)
    else:
        expected = min(height, max(1, round(width * 4 / 3)))
        centre = (0, (height - expected) // 2, width, (height - expected) // 2 + expected)
    assert centre in boxes


def test_training_images_equal_torchvisions_for_the_same_box():
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    flips = 0
    for seed in range(40):
        result = augment_photo(image, 16, random.Random(seed))
        generator = random.Random(seed)
        left, top, right, bottom = random_crop_box(50, 40, generator)
        expected = oracle.resized_crop(image, top, left, bottom - top, right - left, [16, 16])
        mirrored = np.array_equal(np.asarray(result), np.asarray(oracle.horizontal_flip(expected)))
        assert mirrored or np.array_equal(np.asarray(result), np.asarray(expected))
        flips += mirrored
    assert 10 < flips < 30


@pytest.fixture
def folder(tmp_path):
    class_folders(tmp_path, {"cat": 12, "dog": 8})
    return tmp_path


def test_batches_do_not_depend_on_workers_or_neighbours(folder):
    one, four = (
        load_data("imagefolder", root=folder, seed=0, resolution=16, validation=4, workers=workers).train
        for workers in (1, 4)
    )
    indices = torch.tensor([5, 2, 9, 0, 11, 2])
    for seed in (None, 1):
        assert torch.equal(one.batch(indices, seed).images, four.batch(indices, seed).images)
    assert torch.equal(one.batch(indices, 1).images[3], four.batch([0], 1).images[0])
    assert not torch.equal(one.batch(indices, 1).images, one.batch(indices, 2).images)


def test_stream_loads_ahead_and_resumes(folder):
    splits = load_data("imagefolder", root=folder, seed=0, resolution=8, validation=4)
    stream = BatchStream(splits.train, 5, seed=2, augment=True)
    expected = [stream.batch(i) for i in range(6)]
    resumed = BatchStream(splits.train, 5, seed=2, augment=True).iterate(2)
    for batch in expected[2:]:
        images, targets = next(resumed)
        assert torch.equal(images, batch.images)
        assert torch.equal(targets, batch.targets)
    resumed.close()
    whole = torch.cat([batch.images for batch in splits.test.batches(3)])
    assert torch.equal(whole, splits.test.batch(range(len(splits.test))).images)
    assert splits.test.reads == 2


def test_nothing_touches_the_global_generators(folder):
    before = torch.get_rng_state(), random.getstate()
    splits = load_data("imagefolder", root=folder, seed=0, resolution=8, validation=4)
    BatchStream(splits.train, 5, seed=2, augment=True).batch(1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", ".png"), ("RGBA", ".png"), ("P", ".png"), ("1", ".bmp"), ("CMYK", ".jpg")]
)
def test_any_colour_mode_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image{suffix}"
    photo(path, 8, 8, mode=mode)
    image_set = FolderImageSet([str(path)], torch.tensor([0]), resolution=7, workers=1, can_augment=False)
    expected = v2.Compose([v2.Resize(8), v2.CenterCrop(7), NORMALISE])(Image.open(path).convert("RGB"))
    torch.testing.assert_close(image_set.batch([0]).images[0], expected, atol=1e-6, rtol=0)


def png(path: Path) -> bytes:
    photo(path, 20, 20)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_damaged_image_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"broken{suffix}"
    photo(path, 40, 40)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"text", "cut": content[: len(content) // 2]}[damage])
    good = tmp_path / "good.png"
    photo(good)
    image_set = FolderImageSet([str(good), str(path)], torch.tensor([0, 1]), resolution=8, workers=2, can_augment=False)
    with pytest.raises(ValueError, match=rf"{path}: cannot be read as an image \(.+\)"):
        image_set.batch([0, 1])
    assert image_set.batch([0]).images.shape == (1, 3, 8, 8)


def test_damaged_chunk_of_a_png_is_named(tmp_path):
    content = bytearray(png(tmp_path / "x.png"))
    start = content.index(b"IDAT") + 4
    content[start : start + 30] = bytes(30)
    (tmp_path / "x.png").write_bytes(content)
    image_set = FolderImageSet([str(tmp_path / "x.png")], torch.tensor([0]), resolution=8, workers=1, can_augment=False)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as an image"):
        image_set.batch([0])


def test_vanished_and_huge_images_are_named(tmp_path, monkeypatch):
    photo(tmp_path / "x.png", 30, 30)
    image_set = FolderImageSet([str(tmp_path / "x.png")], torch.tensor([0]), resolution=8, workers=1, can_augment=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as an image .*decompression bomb"):
        image_set.batch([0])
    (tmp_path / "x.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.png: no such image \(it was there"):
        image_set.batch([0])


def layout(root: Path, *parts: str) -> None:
    for part in parts:
        photo(root / part)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], ValueError, r"expected one folder per class, got none \(and 0 image files beside\)"),
        (["a.png", "b.jpg"], ValueError, r"expected one folder per class, got none \(and 2 image files beside\)"),
        (["val/cat/a.png"], FileNotFoundError, r"train: no such folder, though there is val beside"),
        (
            ["train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/cow/a.png"],
            ValueError,
            r"val: expected the 2 class folders of .*train, got 2; missing: dog; unexpected: cow",
        ),
        (
            ["train/cat/a.png", "train/dog/a.png", "test/cat/a.png"],
            ValueError,
            r"test: expected the 2 class folders of .*train, got 1; missing: dog; unexpected: none",
        ),
        (
            ["train/cat/a.png", "test/cat/a.png", *(f"val/{name}/a.png" for name in ["cat", *"abcdefg"])],
            ValueError,
            r"val: expected .* got 8; missing: none; unexpected: a, b, c, d, e and 2 more",
        ),
    ],
)
def test_layout_errors(tmp_path, files, error, message):
    layout(tmp_path, *files)
    with pytest.raises(error, match=message):
        load_data("imagefolder", root=tmp_path, seed=0)


def test_class_folder_without_images_is_named(tmp_path):
    layout(tmp_path, "cat/a.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"dog: a class folder without an image \(extensions: \.bmp "):
        load_data("imagefolder", root=tmp_path, seed=0)


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_missing_roots(tmp_path, name):
    with pytest.raises(ValueError, match=f"root: {name} needs the folder of its images, got None"):
        load_data(name, seed=0)
    with pytest.raises(FileNotFoundError, match=r"root: .*nowhere: no such folder"):
        load_data(name, root=tmp_path / "nowhere", seed=0)


def test_imagenet_needs_both_folders(tmp_path):
    layout(tmp_path, "train/n01440764/a.png")
    with pytest.raises(FileNotFoundError, match=r"val: no such folder"):
        load_data("imagenet", root=tmp_path, seed=0)
