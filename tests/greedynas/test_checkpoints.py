import errno
import os
import pickle

import pytest
import torch
from torch import nn

from greedynas.checkpoints import load_checkpoint, save_checkpoint
from greedynas.rmsprop import TensorFlowRMSprop
from greedynas.storage import load_tensors, save_tensors


class Pieces:
    """A network two of whose parameters were never trained, an optimizer and a generator."""

    def __init__(self, seed=0, optimizer="sgd", width=4):
        self.generator = torch.Generator().manual_seed(seed)
        self.network = nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.LazyLinear(3))
        self.network(torch.zeros(2, 2, 5, 5))
        self.unused = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=self.generator))
        self.network.to(memory_format=torch.channels_last)
        groups = [{"params": self.parameters(), "weight_decay": 0.1}]
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
        else:
            self.optimizer = TensorFlowRMSprop(groups, lr=0.01)

    def parameters(self):
        return [*self.network.parameters(), *self.unused.parameters()]

    @property
    def modules(self):
        return {"network": self.network, "unused": self.unused}

    def step(self):
        images = torch.rand(6, 2, 5, 5, generator=self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        self.network(images).square().mean().backward()
        self.optimizer.step()

    def save(self, path, **state):
        save_checkpoint(path, self.modules, self.optimizer, self.generator, state)

    def load(self, path):
        return load_checkpoint(path, self.modules, self.optimizer, self.generator)

    def everything(self):
        tensors = {"generator": self.generator.get_state()}
        for prefix, module in self.modules.items():
            tensors |= {f"{prefix}/{name}": value.clone() for name, value in module.state_dict().items()}
        for number, parameter in enumerate(self.parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{number}/{name}"] = value.clone()
        return tensors


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_goes_on_bit_for_bit(optimizer, tmp_path):
    first = Pieces(optimizer=optimizer)
    for _ in range(3):
        first.step()
    first.save(tmp_path / "c.safetensors", epoch=3, counts={"a": [1, 2.5, None]})
    second = Pieces(seed=8, optimizer=optimizer)
    second.step()  # what is there is replaced
    assert second.load(tmp_path / "c.safetensors") == {"epoch": 3, "counts": {"a": [1, 2.5, None]}}
    assert_equal(first.everything(), second.everything())
    for _ in range(3):
        first.step()
        second.step()
    assert_equal(first.everything(), second.everything())


def test_buffers_lie_in_memory_as_their_parameters_do(tmp_path):
    pieces = Pieces()
    pieces.step()
    pieces.save(tmp_path / "c")
    pieces.load(tmp_path / "c")
    convolution = pieces.network[0].weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert pieces.optimizer.state[convolution]["momentum_buffer"].stride() == convolution.stride()
    assert not pieces.optimizer.state[convolution]["momentum_buffer"].requires_grad


def test_parameters_without_momentum_have_none_afterwards(tmp_path):
    pieces = Pieces()
    pieces.step()
    pieces.save(tmp_path / "c")
    for parameter in pieces.unused.parameters():
        pieces.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    pieces.load(tmp_path / "c")
    assert not any(parameter in pieces.optimizer.state for parameter in pieces.unused.parameters())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        Pieces().load(tmp_path / "nothing")


def test_cut_off_at_any_length_it_is_refused(tmp_path):
    pieces = Pieces()
    pieces.step()
    pieces.save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 8, len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut: damaged"):
            pieces.load(tmp_path / "cut")


def test_one_changed_byte_is_noticed(tmp_path):
    pieces = Pieces()
    pieces.save(tmp_path / "whole", epoch=5)
    data = (tmp_path / "whole").read_bytes()
    for position in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1, data.index(b"epoch") + 8]:
        damaged = bytearray(data)
        damaged[position] ^= 0x11
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"/bad"):
            pieces.load(tmp_path / "bad")


def test_a_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "c").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        Pieces().load(tmp_path / "c")
    assert not (tmp_path / "executed").exists()


def changed(path, change):
    tensors, state = load_tensors(path)
    change(tensors)
    save_tensors(path, tensors, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("network/0.weight"), r"c: no tensor '0\.weight'"),
        (lambda t: t.update({"network/9.weight": torch.zeros(1)}), r"c: unexpected tensor '9\.weight'"),
        (lambda t: t.update({"supernet/a": torch.zeros(1)}), r"c: unexpected tensor 'supernet/a'"),
        (lambda t: t.update({"network/0.weight": torch.zeros(1)}), r"c: expected '0\.weight' as torch\.float32 \[4, 2"),
        (
            lambda t: t.update({"network/0.weight": t["network/0.weight"].double()}),
            r"c: expected '0\.weight' as torch\.float32 .*, got torch\.float64",
        ),
        (lambda t: t.pop("generator"), r"c: no tensor 'generator'"),
        (lambda t: t.update(generator=torch.zeros(3, dtype=torch.uint8)), r"c: expected the state of a generator"),
        (lambda t: t.update(generator=torch.zeros(5056)), r"c: expected the state of a generator"),
        (
            lambda t: t.update({"optimizer/99/momentum_buffer": torch.zeros(1)}),
            r"c: unexpected tensor 'optimizer/99/momentum_buffer'",
        ),
        (lambda t: t.update({"optimizer/x": torch.zeros(1)}), r"c: unexpected tensor 'optimizer/x'"),
        (
            lambda t: t.update({"optimizer/0/momentum_buffer": torch.zeros(3)}),
            r"c: expected 'optimizer/0/momentum_buffer' of shape \[4, 2, 3, 3\], got \[3\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    pieces = Pieces()
    pieces.step()
    pieces.save(tmp_path / "c")
    changed(tmp_path / "c", change)
    with pytest.raises(ValueError, match=message):
        pieces.load(tmp_path / "c")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    pieces = Pieces()
    pieces.step()
    pieces.save(tmp_path / "c", epoch=1)
    saved = pieces.everything()
    pieces.step()
    write, room = os.write, [2000]

    def full(descriptor, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device \(nothing was written\).*c'"):
        pieces.save(tmp_path / "c", epoch=2)
    monkeypatch.undo()
    assert room[0] <= 0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert pieces.load(tmp_path / "c") == {"epoch": 1}
    assert_equal(pieces.everything(), saved)
