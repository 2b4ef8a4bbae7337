"""What the emulated device of a built module is like, and in which order its threads run; tests change it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class Configuration(ctypes.Structure):
    """emu::Config (emulation/configuration.h)."""

    _fields_: ClassVar = [
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("stop_at_error", ctypes.c_bool),
        ("static_bytes", ctypes.c_size_t),
        ("shared_bytes", ctypes.c_size_t),
        ("arch", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("last_blocks", ctypes.c_int),
    ]

    @classmethod
    def of(cls, module: str) -> Configuration:
        """Of the module in that file."""
        return cls.in_dll(ctypes.CDLL(module), "_ZN3emu3cfgE")


@contextmanager
def configured(module: str) -> Iterator[Configuration]:
    """The configuration of the module in that file, which is afterwards as before."""
    found = Configuration.of(module)
    before = {name: getattr(found, name) for name, *_ in Configuration._fields_}
    try:
        yield found
    finally:
        for name, value in before.items():
            setattr(found, name, value)
