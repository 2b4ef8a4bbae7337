"""Atomic writes: a file holds either all of the new bytes or what it held before."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

PathLike = str | os.PathLike[str]

_TEMPORARY_NAME = re.compile(r"\.greedynas-[0-9a-f]{16}\.tmp")


def write_bytes(path: PathLike, data: bytes | bytearray | memoryview) -> None:
    """Writes `data` to `path` so that the file afterwards holds either all of it or what it held before.

    A link is followed and stays a link. If only the last step fails, syncing the folder after the rename, the new
    file is in place and the error says that it may not survive a power cut.

    Raises:
        TypeError: `data` is no bytes.
        OSError: the write failed (disk full, no such folder, ...); it names `path`, and no temporary file is left.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"data: expected bytes, got {type(data).__name__}")
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".greedynas-{secrets.token_hex(8)}.tmp")
    with errors_naming(path, "nothing was written"):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    with errors_naming(path, "written, but it may not survive a power cut"):
        sync_folder(folder)


def remove_temporaries(folder: PathLike) -> list[Path]:
    """Removes what a killed process left half-written in `folder`; call it where nothing else writes there.

    Returns:
        The files removed, sorted.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    stale = sorted(entry for entry in Path(folder).iterdir() if _TEMPORARY_NAME.fullmatch(entry.name))
    for entry in stale:
        entry.unlink(missing_ok=True)
    return stale


@contextlib.contextmanager
def errors_naming(path: PathLike, consequence: str) -> Iterator[None]:
    """Makes every OSError name the user's file, not a temporary one, and say what became of it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} ({consequence})", os.fspath(path)) from error


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Writes all of `data`, in as many calls as the system takes for it."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: str) -> None:
    """Syncs the entries of a folder to the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
