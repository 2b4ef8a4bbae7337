import errno
import json
import math
import os
import resource
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greedynas.metrics_log import MetricsLog, append_jsonl, read_jsonl, truncate_jsonl

# The strings that stand for NaN and the infinities are the only ones that do not come back.
texts = st.text().filter(lambda text: text not in ("NaN", "Infinity", "-Infinity"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(5):
        log.append({"step": step, "loss": 1 / (step + 1)})
    return log


def steps(log):
    return [record["step"] for record in log.read()]


@settings(max_examples=30)
@given(records=st.lists(st.dictionaries(st.text(), values), max_size=5))
def test_records_come_back(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    path.unlink(missing_ok=True)
    log = MetricsLog(path)
    for record in records:
        log.append(record)
    assert repr(log.read()) == repr(records)  # repr: NaN is not equal to itself


def test_not_finite_numbers_are_strict_json_on_disk(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"loss": math.nan, "losses": (math.inf, {"low": -math.inf})})
    assert log.path.read_text() == '{"loss": "NaN", "losses": ["Infinity", {"low": "-Infinity"}]}\n'
    (record,) = log.read()
    assert math.isnan(record["loss"])
    assert record["losses"] == [math.inf, {"low": -math.inf}]


def test_a_line_is_one_write(log, monkeypatch):
    written = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(bytes(data)) or real(fd, data))
    log.append({"step": 5, "text": "a\nb\u2028"})
    assert [json.loads(line) for line in written] == [{"step": 5, "text": "a\nb\u2028"}]
    assert log.path.read_bytes().endswith(written[0])


def test_a_torn_last_line_is_left_out_and_replaced(log):
    data = log.path.read_bytes()
    start = data[:-1].rindex(b"\n") + 1
    for length in range(start, len(data)):
        log.path.write_bytes(data[:length])
        assert steps(log) == [0, 1, 2, 3]
        log.append({"step": 9})
        assert steps(log) == [0, 1, 2, 3, 9]
        assert log.path.read_bytes().startswith(data[:start])


@pytest.mark.parametrize("length", [4095, 4096, 4097, 9000])
@pytest.mark.parametrize("whole", [b"", b'{"step": 0}\n', b'{"step": 0}\n' * 1000])
def test_a_long_torn_line_is_found(tmp_path, length, whole):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.path.write_bytes(whole + b'{"text": "' + b"x" * length)
    log.append({"step": 1})
    assert log.path.read_bytes() == whole + b'{"step": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 2, "lo', "line 3: damaged"),
        (b"", r"line 3: damaged \(it is empty\)"),
        (b"\0\0\0", "line 3: damaged"),
        (b'{"loss": NaN}', "line 3: damaged.*NaN is no finite number"),
        (b"[1]", "line 3: expected an object, got list"),
    ],
)
def test_damage_elsewhere_is_named(log, line, message):
    lines = log.path.read_bytes().split(b"\n")
    lines[2] = line
    log.path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"metrics.jsonl: {message}"):
        log.read()
    assert log.truncate_after(2) == 2  # cutting the damage off mends the log
    assert steps(log) == [0, 1]


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_truncating_to_a_count_keeps_the_bytes_before(log, count):
    data = log.path.read_bytes()
    assert log.truncate_after(count) == count
    assert steps(log) == list(range(count))
    assert data.startswith(log.path.read_bytes())
    assert os.listdir(log.path.parent) == ["metrics.jsonl"]


def test_truncating_by_a_predicate_stops_at_the_first_that_fails(log):
    log.append({"step": 1})
    assert log.truncate_after(lambda record: record["step"] <= 2) == 3
    assert steps(log) == [0, 1, 2]
    assert log.truncate_after(lambda record: True) == 3
    assert log.truncate_after(lambda record: False) == 0
    assert log.read() == []


def test_truncating_drops_a_torn_line(log):
    data = log.path.read_bytes()
    log.path.write_bytes(data + b'{"torn')
    assert log.truncate_after(5) == 5
    assert log.path.read_bytes() == data


def test_truncating_nothing_writes_nothing(log):
    before = log.path.stat()
    log.truncate_after(5)
    assert (log.path.stat().st_ino, log.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_truncation_that_fails_changes_nothing(log, monkeypatch):
    data = log.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            log.truncate_after(2)
    assert log.path.read_bytes() == data


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (6, ValueError, "metrics.jsonl: expected at least 6 records to keep, found 5"),
        (-1, ValueError, "keep: expected at least 0, got -1"),
        (1.5, TypeError, "keep: expected an integer"),
    ],
)
def test_bad_truncations_are_refused(log, keep, error, message):
    data = log.path.read_bytes()
    with pytest.raises(error, match=message):
        log.truncate_after(keep)
    assert log.path.read_bytes() == data


def test_a_missing_log_has_no_records_but_a_missing_file_is_missing(tmp_path):
    log = MetricsLog(tmp_path / "none.jsonl")
    assert log.read() == []
    assert log.truncate_after(0) == 0
    assert log.truncate_after(lambda record: True) == 0
    log.sync()
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        log.truncate_after(1)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_jsonl(log.path)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        truncate_jsonl(log.path, 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [([1], "record: expected a mapping, got list"), ({"a": {"b": b""}}, "record.a.b: expected None, .* got bytes")],
)
def test_bad_records_are_refused(log, record, message):
    with pytest.raises(TypeError, match=message):
        log.append(record)
    assert len(log.read()) == 5


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_failed_append_leaves_no_part_of_a_line(log, monkeypatch, error):
    data = log.path.read_bytes()
    real = os.write

    def failing(descriptor, content):
        real(descriptor, content[: len(content) // 2])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing)
        with pytest.raises(type(error)) as caught:
            log.append({"step": 5})
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(log.path))
        assert "the record was not added" in str(caught.value)
    assert log.path.read_bytes() == data


def test_a_log_that_may_not_grow_keeps_its_records(log):
    data = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) + 10, hard))
    try:
        with pytest.raises(OSError, match="the record was not added") as caught:
            append_jsonl(log.path, {"step": 5, "loss": 0.125})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(log.path))
    assert log.path.read_bytes() == data
    log.append({"step": 5})
    assert steps(log) == list(range(6))


def test_sync_reaches_the_file_and_its_folder(log, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    log.append({"step": 5})
    assert synced == []
    log.sync()
    assert synced == [False, True]


def test_a_log_in_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the record was not added\): '.*missing/m.jsonl'"):
        MetricsLog(tmp_path / "missing" / "m.jsonl").append({})
