"""Checks of many paths at once: int64 tensors of one operation index per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greedynas_ext.checks import describe


def check_path_tensor(
    values: Tensor | Sequence[Any], argument: str, num_layers: int, num_operations: int, *, dims: tuple[int, ...]
) -> Tensor:
    """Check paths and return them as an int64 tensor in CPU memory.

    Args:
        values: int64 tensor or array, or (nested) sequence of integers: ``[L]`` or ``[m, L]``.
        argument: what the errors call it.
        num_layers: L.
        num_operations: indices run from 0 to this less one.
        dims: which are accepted: 1 for one path ``[L]``, 2 for m paths ``[m, L]``.

    Raises:
        TypeError: if the dtype is not int64 (or the elements are not integers).
        ValueError: if the shape is another, or an index is out of range.
    """
    shapes = {1: f"[{num_layers}]", 2: f"[m, {num_layers}]"}
    expected = f"{argument}: expected int64 {' or '.join(shapes[dim] for dim in dims)} (one operation index per layer)"
    paths = _to_tensor(values, expected)
    if paths.dim() not in dims or paths.shape[-1] != num_layers:
        raise ValueError(f"{expected}, got {describe(paths)}")
    if paths.dtype != torch.int64:
        raise TypeError(f"{expected}, got {describe(paths)}")
    wrong = (paths < 0) | (paths >= num_operations)
    if bool(wrong.any()):
        *path, layer = wrong.nonzero()[0].tolist()
        where = f"path {path[0]}, layer {layer}" if path else f"layer {layer}"
        raise ValueError(
            f"{argument}: {where}: expected an operation index in [0, {num_operations - 1}], "
            f"got {int(paths[(*path, layer)])}"
        )
    return paths


def _to_tensor(values: Tensor | Sequence[Any], expected: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        array = np.array(values)
    except ValueError as error:
        raise ValueError(f"{expected}, got rows of unequal length") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{expected}, got a {type(values).__name__} that holds {array.dtype.name}")
    return torch.from_numpy(array)
