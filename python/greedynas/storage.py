"""Tensors in files without pickle: whole or not there, checked by a digest; reading never executes code."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from greedynas_ext import strict_json
from greedynas_ext.checks import describe
from greedynas_ext.files import PathLike, write_bytes

# The one entry of a file's own metadata: "sha256:<digest> <JSON>". One, for safetensors writes several in any order.
_KEY, _PREFIX = "greedynas", "sha256:"


def save_tensors(
    path: PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes tensors and their metadata to one safetensors file, atomically, with a SHA-256 over both.

    Tensors of any shape, strides and device are stored as contiguous copies: strides are not kept, and tensors that
    share memory come back separate. While it is written the file is held in memory once, beside the tensors.

    Args:
        path: the file.
        tensors: the tensors by name.
        metadata: values that JSON can hold, without NaN and infinities; kept exactly.

    Raises:
        TypeError: a name is no string, a value no dense tensor, or `metadata` has no form in JSON.
        ValueError: `metadata` holds NaN or an infinity.
        OSError: as `files.write_bytes`.
    """
    packed: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: expected names that are strings, got {name!r}")
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise TypeError(f"tensors[{name!r}]: expected a dense tensor, got {describe(tensor)}")
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:  # safetensors refuses tensors that share memory
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        packed[name] = plain
    text = strict_json.dump(dict(metadata or {}), "metadata").decode()
    write_bytes(path, safetensors.torch.save(packed, {_KEY: f"{_PREFIX}{_digest(packed, text)} {text}"}))


def load_tensors(path: PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads a safetensors file; nothing in it is executed.

    Returns:
        The tensors by name, on the CPU, and the metadata. For a file that `save_tensors` did not write the metadata
        are the file's own strings, and no checksum is compared.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or is damaged or cut off.
    """
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        header: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)}: damaged, or no safetensors file ({error})") from error
    if _KEY not in header and not any(value.startswith(_PREFIX) for value in header.values()):
        return tensors, dict(header)
    digest, _, text = header.get(_KEY, "").partition(" ")
    if digest != _PREFIX + _digest(tensors, text):
        raise ValueError(f"{os.fspath(path)}: damaged (its contents do not match its SHA-256)")
    return tensors, strict_json.load(text.encode(), f"{os.fspath(path)}: metadata")


def _digest(tensors: Mapping[str, torch.Tensor], metadata: str) -> str:
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
