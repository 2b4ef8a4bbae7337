"""Strict JSON: exact floats, keys that are strings, no NaN unless it is spelled out, errors that say where."""

import json
import math
import os
from pathlib import Path
from typing import Any

from greedynas_ext.checks import describe
from greedynas_ext.files import PathLike, write_bytes

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_json(path: PathLike, value: Any, *, indent: int | None = 2) -> None:
    """Writes `value` as strict JSON, atomically; `read_json` gives equal values back, floats bit for bit.

    Tuples become lists. NaN and infinities are refused: JSON has none, and what is stored here (pools, checkpoints,
    fronts) has no use for them; `dump` can spell them out.

    Raises:
        TypeError: `value` holds something JSON has no form for, or a dict key that is no string.
        ValueError: `value` holds NaN or an infinity.
        OSError: as `files.write_bytes`.
    """
    write_bytes(path, dump(value, os.fspath(path), indent=indent) + b"\n")


def read_json(path: PathLike) -> Any:
    """Reads a file of strict JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged: empty, cut off, no UTF-8, no JSON, or it holds a number that no float can.
    """
    return load(Path(path).read_bytes(), os.fspath(path))


def dump(value: Any, where: str, *, indent: int | None = None, spell_non_finite: bool = False) -> bytes:
    """`value` as JSON in UTF-8; `where` names it in errors.

    Raises:
        TypeError: `value` holds something JSON has no form for, or a dict key that is no string.
        ValueError: `value` holds NaN or an infinity and `spell_non_finite` is off.
    """
    plain_value = _plain(value, where, spell_non_finite=spell_non_finite)
    return json.dumps(plain_value, indent=indent, allow_nan=False).encode()


def load(data: bytes, where: str) -> Any:
    """The value of JSON in UTF-8; `where` names it in the ValueError for anything damaged."""

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text} is no finite number")
        return number

    if not data.strip():
        raise ValueError(f"{where}: damaged (it is empty)")
    try:
        return json.loads(data.decode(), parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: damaged, or no JSON ({error})") from error


def with_floats(value: Any) -> Any:
    """`value` with the strings that `spell_non_finite` wrote turned back into floats."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    return value


def _plain(value: Any, where: str, *, spell_non_finite: bool) -> Any:
    """A copy of `value` in JSON's own types; `where` says in errors which part of it is wrong."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if not spell_non_finite:
            raise ValueError(f"{where}: expected a finite number, got {value!r} (JSON has none)")
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: expected keys that are strings, got {key!r}")
        return {key: _plain(item, f"{where}.{key}", spell_non_finite=spell_non_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", spell_non_finite=spell_non_finite) for i, item in enumerate(value)]
    raise TypeError(f"{where}: expected None, bool, int, float, str, list or dict, got {describe(value)}")
