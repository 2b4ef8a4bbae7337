import json
import math
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greedynas_ext.strict_json import read_json, write_json

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=40)
@given(value=json_values, indent=st.sampled_from([None, 2]))
def test_json_comes_back_as_it_was(tmp_path_factory, value, indent):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value, indent=indent)
    assert read_json(path) == value


@settings(max_examples=100)
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


def test_json_stays_json_for_other_readers(tmp_path):
    write_json(tmp_path / "a.json", {"ε": [0.1, True, None, "é\ud800"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ε": [0.1, True, None, "é\ud800"]}
