import errno
import math
import os
import pickle

import pytest
import safetensors.torch
import torch

from greedynas.storage import load_tensors, save_tensors


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 7)], ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype, shape):
    count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), generator=torch.Generator().manual_seed(3))
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape)  # any bits: NaN payloads and subnormals too
    save_tensors(tmp_path / "t", {"t": tensor})
    back, metadata = load_tensors(tmp_path / "t")
    assert (back["t"].dtype, back["t"].shape, bits(back["t"])) == (dtype, tensor.shape, bits(tensor))
    assert metadata == {}


def test_views_ties_gradients_and_strides_are_stored_by_value(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    halves = torch.arange(10.0).chunk(2)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    tensors = {
        "first half": halves[0],
        "second half": halves[1],
        "tail": torch.arange(10.0)[3:],
        "base": base,
        "tied": base,
        "slice": base[1, :, 1:3],
        "transposed": base.transpose(0, 2),
        "expanded": torch.tensor(7).expand(3),
        "parameter": weight,
        "channels_last": torch.arange(16.0).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last),
        "empty": torch.empty(0),
        "empty too": torch.empty(0),
    }
    save_tensors(tmp_path / "t", tensors)
    back, _ = load_tensors(tmp_path / "t")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
    back["base"].zero_()  # writable, and apart from what was tied to it
    assert torch.equal(back["tied"], base)
    assert not back["parameter"].requires_grad


def test_metadata_come_back_exactly_and_files_are_equal(tmp_path):
    metadata = {
        "step": 12,
        "lr": 0.1 + 0.2,
        "text": 'ε "quoted"\n',
        "none": None,
        "nested": {"list": [1, 1e-320, True]},
    }
    for name in "abcdefgh":
        save_tensors(tmp_path / name, {"w": torch.arange(3), "v": torch.ones(1), "a": torch.ones(1)}, metadata)
    assert load_tensors(tmp_path / "a")[1] == metadata
    assert len({(tmp_path / name).read_bytes() for name in "abcdefgh"}) == 1


def test_a_module_comes_back(tmp_path):
    def build():
        return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3))

    saved, loaded = build(), build()
    saved[1].running_mean.fill_(0.3)
    save_tensors(tmp_path / "m", saved.state_dict())
    loaded.load_state_dict(load_tensors(tmp_path / "m")[0])
    assert all(torch.equal(a, loaded.state_dict()[name]) for name, a in saved.state_dict().items())


@pytest.fixture
def saved(tmp_path):
    save_tensors(tmp_path / "t.safetensors", {"weight": torch.arange(6.0), "b": torch.tensor(2)}, {"step": 123})
    return tmp_path / "t.safetensors"


def test_every_truncation_is_noticed(saved):
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"t\.safetensors: damaged"):
            load_tensors(saved)


def test_a_failed_write_keeps_the_old_tensors(saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"No space left on device \(nothing was written\)"):
            save_tensors(saved, {"w": torch.zeros(2000)})
    assert os.listdir(saved.parent) == [saved.name]
    assert saved.read_bytes() == before


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_every_flipped_bit_is_noticed(saved, flip):
    data = saved.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= flip
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t\.safetensors: damaged"):
            load_tensors(saved)


def test_other_files_are_refused_without_being_executed(tmp_path, saved):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"w": Bomb()}, tmp_path / "torch")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "text").write_text("weights: none\n" * 20)
    for name in ("torch", "pickle", "text"):
        with pytest.raises(ValueError, match=f"{name}: damaged, or no safetensors file"):
            load_tensors(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_peoples_safetensors_are_read(tmp_path, metadata):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "t", metadata)
    tensors, found = load_tensors(tmp_path / "t")
    assert tensors["w"].tolist() == [1, 1]
    assert found == (metadata or {})


def test_missing_tensors_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({1: torch.ones(1)}, None, TypeError, "tensors: expected names that are strings, got 1"),
        ({"w": [1.0]}, None, TypeError, r"tensors\['w'\]: expected a dense tensor, got list"),
        ({"w": torch.ones(2, 2).to_sparse()}, None, TypeError, r"tensors\['w'\]: expected a dense tensor"),
        ({}, {"loss": math.nan}, ValueError, "metadata.loss: expected a finite number, got nan"),
        ({}, {"model": object()}, TypeError, "metadata.model: expected None, .* got object"),
    ],
)
def test_bad_tensors_and_metadata_are_refused_and_the_old_file_kept(saved, tensors, metadata, error, message):
    before = saved.read_bytes()
    with pytest.raises(error, match=message):
        save_tensors(saved, tensors, metadata)
    assert saved.read_bytes() == before
