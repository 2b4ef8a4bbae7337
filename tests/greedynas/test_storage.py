import contextlib
import errno
import json
import math
import os
import pickle
import resource
import signal
import stat
import struct
import subprocess
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greedynas import _files
from greedynas.storage import (
    load_tensors,
    read_json,
    remove_temporaries,
    save_tensors,
    write_bytes,
    write_json,
)


@contextlib.contextmanager
def small_files():
    """No file may grow past 4096 bytes: a write fails half-way with EFBIG, as the kernel does it, not a mock.

    No fixture: pytest writes its progress before fixtures end, and that may go to a file which is larger.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# --- write_bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000, bytearray(b"ab"), memoryview(b"cd")])
def test_bytes_replace_an_older_file_and_leave_nothing_else(tmp_path, data):
    target = tmp_path / "file"
    target.write_bytes(b"older and longer than some")
    write_bytes(target, data)
    assert target.read_bytes() == bytes(data)
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"new"


def test_relative_paths_and_the_umask_are_respected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = os.umask(0o027)
    try:
        write_bytes("file", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    write_bytes(tmp_path / "file", b"0123456789" * 10)
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 10


def fail_half_way(monkeypatch, call, error):
    """Makes os.`call` fail; os.write after it wrote half."""
    real = os.write

    def failing(*arguments, **_):
        if call == "write" and len(arguments[1]) > 1:
            real(arguments[0], arguments[1][: len(arguments[1]) // 2])
        raise error

    monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, call, existed):
    target = tmp_path / "file"
    if existed:
        target.write_bytes(b"old")
    with monkeypatch.context() as patch:
        fail_half_way(patch, call, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OSError, match=r"No space left on device \(nothing was written\).*file'") as caught:
            write_bytes(target, b"something new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert os.listdir(tmp_path) == (["file"] if existed else [])
    assert not existed or target.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["ctrl-c", "memory"])
def test_other_exceptions_pass_and_keep_the_old_file(tmp_path, monkeypatch, call, error):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with monkeypatch.context() as patch:
        fail_half_way(patch, call, error)
        with pytest.raises(type(error)):
            write_bytes(target, b"something new")
    assert os.listdir(tmp_path) == ["file"]
    assert target.read_bytes() == b"old"


def test_no_file_descriptor_leaks_from_failures(tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    for call in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            fail_half_way(patch, call, OSError(errno.EIO, "broken"))
            with pytest.raises(OSError, match="broken"):
                write_bytes(tmp_path / "file", b"data")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_file_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def spy_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_bytes(tmp_path / "file", b"x")
    assert calls == ["file", "rename", "folder"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_folder_that_does_not_sync(tmp_path, monkeypatch, code):
    real = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    if code == errno.EINVAL:  # a file system that cannot sync folders
        write_bytes(tmp_path / "file", b"new")
    else:
        with pytest.raises(OSError, match="may not survive a power cut"):
            write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_past_the_file_size_limit_keeps_the_old_files(tmp_path):
    write_bytes(tmp_path / "bytes", b"old")
    save_tensors(tmp_path / "tensors", {"w": torch.ones(3)}, {"step": 1})
    write_json(tmp_path / "json", [1])
    for name, write in {
        "bytes": lambda path: write_bytes(path, bytes(4097)),
        "tensors": lambda path: save_tensors(path, {"w": torch.zeros(2000)}),
        "json": lambda path: write_json(path, list(range(5000))),
    }.items():
        with small_files(), pytest.raises(OSError, match="nothing was written") as caught:
            write(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))
    assert (tmp_path / "bytes").read_bytes() == b"old"
    tensors, metadata = load_tensors(tmp_path / "tensors")
    assert tensors["w"].tolist() == [1, 1, 1]
    assert metadata == {"step": 1}
    assert read_json(tmp_path / "json") == [1]
    assert sorted(os.listdir(tmp_path)) == ["bytes", "json", "tensors"]


def test_a_full_disk_keeps_the_old_file(small_disk):
    target = small_disk / "checkpoint"
    save_tensors(target, {"w": torch.ones(4000)})
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_tensors(target, {"w": torch.zeros(50_000)})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert os.listdir(small_disk) == ["checkpoint"]
    assert load_tensors(target)[0]["w"].sum() == 4000


def test_a_killed_writer_leaves_one_of_its_files_whole(tmp_path):
    contents = [bytes([value]) * 300_000 for value in (1, 2)]
    write_bytes(tmp_path / "file", contents[0])
    for attempt in range(12):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for content in contents:
                        write_bytes(tmp_path / "file", content)
            finally:
                os._exit(1)
        time.sleep(0.005 + 0.003 * attempt)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert (tmp_path / "file").read_bytes() in contents
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_only_left_over_temporaries_are_removed(tmp_path):
    stale = tmp_path / ".greedynas-0123456789abcdef.tmp"
    mine = [tmp_path / name for name in ("a.tmp", ".greedynas.tmp", "x.greedynas-0123456789abcdef.tmp")]
    for file in [stale, *mine]:
        file.touch()
    assert remove_temporaries(tmp_path) == [stale]
    assert sorted(tmp_path.iterdir()) == sorted(mine)
    assert remove_temporaries(tmp_path) == []


def test_the_temporaries_are_those_that_are_removed_later(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda source, target: os.link(source, source + ".kept"))
    monkeypatch.setattr(os, "unlink", lambda path: None)
    write_bytes(tmp_path / "file", b"x")
    monkeypatch.undo()
    left = [name for name in os.listdir(tmp_path) if not name.endswith(".kept")]
    assert [str(path.name) for path in remove_temporaries(tmp_path)] == left
    assert len(left) == 1


def test_write_bytes_refuses_bad_targets(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing was written\): '.*missing/file'"):
        write_bytes(tmp_path / "missing" / "file", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_bytes(tmp_path / "folder", b"")
    assert os.listdir(tmp_path) == ["folder"]
    with pytest.raises(TypeError, match="data: expected bytes, got str"):
        write_bytes(tmp_path / "file", "text")


def test_an_oserror_without_text_still_says_something(tmp_path):
    with pytest.raises(OSError, match=r"odd.*because"), _files.errors_naming(tmp_path / "odd", "because"):
        raise OSError("odd")


# --- JSON ------------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=40, deadline=None)
@given(value=json_values, indent=st.sampled_from([None, 2]))
def test_json_comes_back_as_it_was(tmp_path_factory, value, indent):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value, indent=indent)
    assert read_json(path) == value


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(finite))
def test_json_floats_come_back_bit_for_bit(tmp_path_factory, numbers):
    path = tmp_path_factory.getbasetemp() / "floats.json"
    write_json(path, numbers)
    back = read_json(path)
    assert struct.pack(f"{len(back)}d", *back) == struct.pack(f"{len(numbers)}d", *numbers)


def test_tuples_become_lists(tmp_path):
    write_json(tmp_path / "a.json", {"path": (1, (2,))})
    assert read_json(tmp_path / "a.json") == {"path": [1, [2]]}


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"losses": [0.5, math.nan]}, ValueError, r"a.json.losses\[1\]: expected a finite number, got nan"),
        (math.inf, ValueError, r"a.json: expected a finite number, got inf"),
        ({"x": {1: 2}}, TypeError, r"a.json.x: expected keys that are strings, got 1"),
        ([torch.ones(2)], TypeError, r"a.json\[0\]: expected None, .* got float32 \[2\]"),
        ({"s": {1}}, TypeError, r"a.json.s: expected None, .* got set"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_the_old_file_kept(tmp_path, value, error, message):
    write_json(tmp_path / "a.json", "old")
    with pytest.raises(error, match=message):
        write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == "old"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" \n",
        b'{"a": [1, 2',
        b'{"a": NaN}',
        b"[-Infinity]",
        b"[1e999]",
        b'"\xff"',
        b"{} {}",
        b"[" * 100_000,
        b"9" * 5000,
        pickle.dumps({"a": 1}),
    ],
)
def test_damaged_json_is_named(tmp_path, data):
    (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.json: damaged"):
        read_json(tmp_path / "bad.json")


def test_missing_json_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_json(tmp_path / "none.json")


# --- tensors ---------------------------------------------------------------------------------------------------------


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


def test_json_stays_json_for_other_readers(tmp_path):
    write_json(tmp_path / "a.json", {"ε": [0.1, True, None, "é\ud800"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ε": [0.1, True, None, "é\ud800"]}
