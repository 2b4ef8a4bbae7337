import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import time

import pytest

from greedynas_ext.files import errors_naming, remove_temporaries, write_bytes
from greedynas_ext.strict_json import read_json, write_json


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
    write_json(tmp_path / "json", [1])
    for name, write in {
        "bytes": lambda path: write_bytes(path, bytes(4097)),
        "json": lambda path: write_json(path, list(range(5000))),
    }.items():
        with small_files(), pytest.raises(OSError, match="nothing was written") as caught:
            write(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))
    assert (tmp_path / "bytes").read_bytes() == b"old"
    assert read_json(tmp_path / "json") == [1]
    assert sorted(os.listdir(tmp_path)) == ["bytes", "json"]


def test_a_full_disk_keeps_the_old_file(small_disk):
    target = small_disk / "file"
    write_bytes(target, b"x" * 16_000)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_bytes(target, bytes(200_000))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert os.listdir(small_disk) == ["file"]
    assert target.read_bytes() == b"x" * 16_000


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
    with pytest.raises(OSError, match=r"odd.*because"), errors_naming(tmp_path / "odd", "because"):
        raise OSError("odd")
