"""A log of JSON lines that survives a kill at any moment: a run's metrics."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from greedynas_ext import strict_json
from greedynas_ext.checks import check_count
from greedynas_ext.files import PathLike, errors_naming, sync_folder, write_all, write_bytes


def append_jsonl(path: PathLike, record: Mapping[str, Any]) -> None:
    """Appends one record to a file of JSON lines, which is created where it is missing.

    The line goes to the system in one call, so that a kill leaves all or some of it, never a later line without an
    earlier one. What a kill left of a last line is removed first; if this write fails, the file is as before it.
    NaN and infinities are written as the strings "NaN", "Infinity" and "-Infinity", which `read_jsonl` turns back.

    Raises:
        TypeError: `record` is no mapping, or holds something JSON has no form for.
        OSError: the write failed; it names `path`.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"record: expected a mapping, got {type(record).__name__}")
    line = strict_json.dump(dict(record), "record", spell_non_finite=True) + b"\n"
    with errors_naming(path, "the record was not added"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = _end_of_last_line(descriptor)
            os.ftruncate(descriptor, end)
            try:
                write_all(descriptor, line)
            except BaseException:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
    """Reads the records of a file of JSON lines; a last line without its newline, torn by a kill, is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is damaged; it is named.
    """
    return [_parse_record(line, path, number) for number, line in enumerate(_lines(path), start=1)]


def truncate_jsonl(path: PathLike, keep: int | Callable[[dict[str, Any]], bool]) -> int:
    """Cuts a file of JSON lines off after its leading records, atomically; those that stay keep their bytes.

    Args:
        path: the file.
        keep: how many records stay, or a predicate: the first record for which it is false goes, with all after it.

    Returns:
        How many records are left.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are fewer than `keep` records, `keep` is negative, or a line that has to be read is damaged.
        OSError: as `write_bytes`.
    """
    if not callable(keep):
        keep = check_count("keep", keep, 0)
    kept: list[bytes] = []
    for line in _lines(path):
        if len(kept) == keep:
            break
        record = _parse_record(line, path, len(kept) + 1)
        if callable(keep) and not keep(record):
            break
        kept.append(line)
    if not callable(keep) and len(kept) < keep:
        raise ValueError(f"{os.fspath(path)}: expected at least {keep} records to keep, found {len(kept)}")
    data = b"".join(kept)
    if os.stat(path).st_size != len(data):
        write_bytes(path, data)
    return len(kept)


class MetricsLog:
    """A run's metrics: one JSON object per line, appended as the run goes; a missing file is a log without records.

    Only one process may append to it at a time.

    Args:
        path: the file; the first `append` creates it.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record; see `append_jsonl`."""
        append_jsonl(self.path, record)

    def read(self) -> list[dict[str, Any]]:
        """All whole records, oldest first; see `read_jsonl`."""
        return read_jsonl(self.path) if self.path.exists() else []

    def truncate_after(self, keep: int | Callable[[dict[str, Any]], bool]) -> int:
        """Drops what follows the leading records and returns how many are left; see `truncate_jsonl`."""
        if callable(keep) or keep == 0:
            return truncate_jsonl(self.path, keep) if self.path.exists() else 0
        return truncate_jsonl(self.path, keep)

    def sync(self) -> None:
        """Waits until all records are on the disk, so that a checkpoint written next never knows more than the log."""
        if not self.path.exists():
            return
        with errors_naming(self.path, "not synced"):
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_folder(os.fspath(self.path.parent))


def _end_of_last_line(descriptor: int) -> int:
    """Where the last newline ends, from the back: a log grows long, a torn line is short."""
    position = os.fstat(descriptor).st_size
    while position:
        start = max(0, position - 4096)
        found = os.pread(descriptor, position - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _lines(path: PathLike) -> list[bytes]:
    """The lines of a file that end in a newline, with it."""
    return [line + b"\n" for line in Path(path).read_bytes().split(b"\n")[:-1]]


def _parse_record(line: bytes, path: PathLike, number: int) -> dict[str, Any]:
    where = f"{os.fspath(path)}: line {number}"
    record = strict_json.load(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    return {key: strict_json.with_floats(value) for key, value in record.items()}
