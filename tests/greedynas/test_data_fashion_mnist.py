"""IDX files and Fashion-MNIST, with files that the tests write and, where they are installed, Debian's."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from greedynas.data import BatchStream, load_data, small_images
from greedynas.data.idx import read_idx
from greedynas.data.small_images import FASHION_MNIST_FILES, FASHION_MNIST_FOLDERS

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FASHION_MNIST_FILES


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def pixels(count: int, height: int = 6, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width))


def write(folder: Path, name: str, content: bytes, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)


def write_all(folder: Path, zipped: bool = False) -> Path:
    write(folder, TRAIN_IMAGES, idx(pixels(40)), zipped)
    write(folder, TRAIN_LABELS, idx(np.arange(40) % 10), zipped)
    write(folder, TEST_IMAGES, idx(pixels(12, seed=1)), zipped)
    write(folder, TEST_LABELS, idx(np.arange(12) % 10), zipped)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_reads_each_layout(tmp_path, place, zipped):
    write_all(tmp_path / place, zipped)
    splits = load_data("fashion-mnist", root=tmp_path, seed=0, validation=10)
    assert splits.description == "fashion-mnist: 30 training, 10 validation and 12 test images of 1x6x6, 10 classes"
    assert torch.bincount(splits.validation.targets).tolist() == [1] * 10
    assert not splits.test.opened
    train = splits.train.batch(range(30)).images
    # Oracle: the file's pixels, normalised by the training part's moments; images are told apart by their order.
    whole = pixels(40).astype(np.float64)
    both = splits.train_and_validation.batch(range(40))
    assert both.targets.tolist() == [i % 10 for i in range(40)]
    kept = [i for i in range(40) if any(torch.equal(both.images[i], one) for one in train)]
    assert len(kept) == 30
    mean, std = whole[kept].mean(), whole[kept].std()
    np.testing.assert_allclose(train[:, 0].numpy(), (whole[kept] - mean) / std, atol=1e-5)
    test = splits.test.batch(range(12))
    np.testing.assert_allclose(test.images[:, 0].numpy(), (pixels(12, seed=1) - mean) / std, atol=1e-5)
    assert test.targets.tolist() == [i % 10 for i in range(12)]
    assert splits.test.reads == 1


def test_training_images_are_shifted_and_mirrored(tmp_path):
    splits = load_data("fashion-mnist", root=write_all(tmp_path), seed=0, validation=0.25)
    plain = splits.train.batch([0] * 200).images[0, 0]
    augmented = splits.train.batch([0] * 200, augment_seed=0).images[:, 0]
    background = augmented.min()  # of a raw 0, which is in the image or in the padding
    centre = augmented[:, 2:4, 2:4].flatten(1)
    windows = {}
    for name, image in (("kept", plain), ("mirrored", plain.flip(-1))):
        for y in range(5):
            for x in range(5):
                windows[tuple(image[y : y + 2, x : x + 2].flatten().tolist())] = (name, y, x)
    found = [windows[tuple(row.tolist())] for row in centre]
    assert {name for name, _, _ in found} == {"kept", "mirrored"}
    assert {(y, x) for _, y, x in found} == {(y, x) for y in range(5) for x in range(5)}
    assert bool((augmented == background).any())


def test_without_root_looks_where_debian_puts_the_files(tmp_path, monkeypatch):
    write_all(tmp_path / "second", zipped=True)
    monkeypatch.setattr(small_images, "FASHION_MNIST_FOLDERS", (tmp_path / "first", tmp_path / "second"))
    assert len(load_data("fashion-mnist", seed=0, validation=4).train) == 36
    (tmp_path / "second" / f"{TEST_LABELS}.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_data("fashion-mnist", seed=0, validation=4)
    message = str(caught.value)
    assert f"{tmp_path / 'first'}: no such folder" in message
    assert f"{tmp_path / 'second'}: no {TEST_LABELS}[.gz]\n" in message
    assert "apt-get install dataset-fashion-mnist" in message


def test_missing_files_say_where_they_were_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_data("fashion-mnist", root=tmp_path, seed=0)
    message = str(caught.value)
    assert f"{tmp_path}: no {TRAIN_IMAGES}[.gz], {TRAIN_LABELS}[.gz], {TEST_IMAGES}[.gz], {TEST_LABELS}[.gz]" in message
    assert f"{tmp_path / 'FashionMNIST' / 'raw'}: no such folder" in message


def test_raw_files_come_before_zipped_ones(tmp_path):
    write_all(tmp_path)
    write(tmp_path, TRAIN_LABELS, b"broken", zipped=True)
    assert len(load_data("fashion-mnist", root=tmp_path, seed=0, validation=4).train) == 36


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN_IMAGES, b"", r"expected an IDX header of 16 bytes, got a file of 0 bytes"),
        (TRAIN_LABELS, b"\0\0\x08\x01\0\0\0", r"expected an IDX header of 8 bytes, got a file of 7 bytes"),
        (TRAIN_IMAGES, idx(np.zeros(40)), r"expected the IDX magic number 0x00000803 .*, got 0x00000801"),
        (TRAIN_LABELS, idx(pixels(40)), r"expected the IDX magic number 0x00000801 .*, got 0x00000803"),
        (TRAIN_IMAGES, idx(pixels(40))[:-1], r"promises 40 x 6 x 6 = 1440 bytes of values, got 1439"),
        (TRAIN_IMAGES, idx(pixels(40)) + b"!", r"promises 40 x 6 x 6 = 1440 bytes of values, got 1441"),
        (TRAIN_IMAGES, b"\0\0\x08\x03" + b"\xff" * 12, r"promises 4294967295 x 4294967295 x 4294967295"),
        (TRAIN_IMAGES, idx(np.zeros((0, 6, 6))), r"holds no values \(its dimensions are 0 x 6 x 6\)"),
        (TRAIN_IMAGES, idx(pixels(40, 6, 7)), r"expected square images, got images of 6x7"),
        (TRAIN_LABELS, idx(np.arange(39) % 10), r"expected a label for each of 40 images, got 39 labels"),
        (TRAIN_LABELS, idx(np.arange(40)), r"expected labels 0\.\.9, got 39"),
        (TEST_LABELS, idx(np.arange(12)), r"expected labels 0\.\.9, got 11"),
        (TEST_IMAGES, idx(pixels(12, 5, 5)), r"expected images of 6x6 as in .*train-images.*, got images of 5x5"),
        (TRAIN_IMAGES, idx(np.full((40, 6, 6), 9)), r"all pixels of a channel are equal \(means \[9\.0\]\)"),
    ],
)
def test_damaged_files_are_named_on_loading(tmp_path, name, content, message):
    write_all(tmp_path)
    write(tmp_path, name, content)
    prefix = "training images" if "channel" in message else str(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{prefix}: .*{message}|^{prefix}: {message}"):
        load_data("fashion-mnist", root=tmp_path, seed=0, validation=10)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"no gzip at all",
        lambda content: content[:-12],  # cut off
        lambda content: content[:40] + bytes(byte ^ 0xFF for byte in content[40:60]) + content[60:],
    ],
)
def test_damaged_gzip_is_named(tmp_path, damage):
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx(pixels(40)))))
    with pytest.raises(ValueError, match=r"images\.gz: damaged gzip file \(.+\)"):
        read_idx(path, 3)


def test_test_fraction_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"test_fraction: fashion-mnist has test images of its own.* got 0\.2"):
        load_data("fashion-mnist", root=tmp_path, seed=0, test_fraction=0.2)


def test_root_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_all(tmp_path / "data")
    assert len(load_data("fashion-mnist", root=Path("~/data"), seed=0, validation=4).test) == 12


installed = any((folder / f"{TRAIN_IMAGES}.gz").is_file() for folder in FASHION_MNIST_FOLDERS)


@pytest.mark.skipif(not installed, reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_files():
    splits = load_data("fashion-mnist", seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50_000, 10_000, 10_000)
    assert splits.train.shape == (1, 28, 28)
    assert torch.bincount(splits.validation.targets).tolist() == [1000] * 10
    assert torch.bincount(splits.train.targets).tolist() == [5000] * 10
    images = BatchStream(splits.train, 1000, seed=0, augment=False).batch(0).images
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.05
    assert len(splits.classes) == 10
    # The first three training images are an ankle boot and two T-shirts.
    assert splits.train_and_validation.targets[:3].tolist() == [9, 0, 0]
