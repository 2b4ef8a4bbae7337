"""Checks of paths: sequences of one operation index per layer."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from greedynas_ext.checks import check_count, check_index, check_number, describe

PathTuple = tuple[int, ...]


def check_num_choices(num_choices: Any) -> tuple[int, ...]:
    """Returns `num_choices`, how many operations each layer has, as a tuple of at least one positive int.

    Raises:
        TypeError: it is no sequence of ints.
        ValueError: it is empty, or a layer has none.
    """
    if isinstance(num_choices, str | bytes) or not isinstance(num_choices, Iterable):
        raise TypeError(f"num_choices: expected a sequence of ints, one per layer, got {describe(num_choices)}")
    if isinstance(num_choices, torch.Tensor):
        num_choices = num_choices.tolist()
    counts = tuple(check_count(f"num_choices[{i}]", count, 1) for i, count in enumerate(num_choices))
    if not counts:
        raise ValueError("num_choices: expected at least one layer, got none")
    return counts


def check_path(name: str, path: Any, length: int | None, num_choices: Sequence[int] | None) -> PathTuple:
    """Returns one path, int64 [L] or a sequence of ints, as a tuple of `length` indices within `num_choices`.

    Raises:
        TypeError: `path` is no int64 tensor and no sequence of ints.
        ValueError: another shape, another length than `length`, or an index out of range.
    """
    if isinstance(path, torch.Tensor):
        _check_tensor(name, path, 1, length)
        path = path.tolist()
    elif isinstance(path, str | bytes) or not isinstance(path, Iterable):
        raise TypeError(f"{name}: expected int64 [L] or a sequence of ints, got {describe(path)}")
    indices = tuple(check_index(f"{name}[{layer}]", index) for layer, index in enumerate(path))
    if not indices or (length is not None and len(indices) != length):
        expected = "at least 1" if length is None else str(length)
        raise ValueError(f"{name}: expected {expected} operation indices (one per layer), got {len(indices)}")
    for layer, index in enumerate(indices):
        choices = None if num_choices is None else num_choices[layer]
        if index < 0 or (choices is not None and index >= choices):
            allowed = "at least 0" if choices is None else f"0 to {choices - 1}"
            raise ValueError(f"{name}[{layer}]: expected an operation index of {allowed}, got {index}")
    return indices


def check_paths(name: str, paths: Any, length: int | None, num_choices: Sequence[int] | None) -> list[PathTuple]:
    """Returns paths, int64 [m, L] or nested sequences of ints, as tuples of one length; see `check_path`.

    Raises:
        TypeError: `paths` is no int64 tensor and no sequence of sequences of ints.
        ValueError: another shape, another length than `length`, or an index out of range.
    """
    rows: Iterable[Any] = paths
    if isinstance(paths, torch.Tensor):
        _check_tensor(name, paths, 2, length)
        rows = paths.tolist()
    elif isinstance(paths, str | bytes) or not isinstance(paths, Iterable):
        raise TypeError(f"{name}: expected int64 [m, L] or nested sequences of ints, got {describe(paths)}")
    checked: list[PathTuple] = []
    for i, row in enumerate(rows):
        checked.append(check_path(f"{name}[{i}]", row, length, num_choices))
        length = len(checked[0])
    return checked


def check_path_tensor(name: str, paths: Any, num_choices: Sequence[int]) -> torch.Tensor:
    """Returns m paths, m >= 0, as a contiguous int64 CPU tensor [m, L]; many at once cost no Python a path.

    Args:
        name: what the errors call them.
        paths: int64 [m, L], a tensor or a NumPy array, or nested sequences of ints.
        num_choices: how many operations each of the L layers has.

    Raises:
        TypeError: `paths` is none of these.
        ValueError: another shape, or an index out of range.
    """
    length = len(num_choices)
    if isinstance(paths, np.ndarray):
        try:
            paths = torch.from_numpy(paths.copy())
        except TypeError:  # of strings or objects
            raise TypeError(f"{name}: expected int64 [m, {length}], got {paths.dtype} {list(paths.shape)}") from None
    if not isinstance(paths, torch.Tensor):
        rows = check_paths(name, paths, length, num_choices)
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), length)
    _check_tensor(name, paths, 2, length)
    checked = paths.detach().cpu().contiguous()
    wrong = ((checked < 0) | (checked >= torch.tensor(num_choices, device="cpu"))).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        check_path(f"{name}[{row}]", checked[row], length, num_choices)  # which raises the error
    return checked


def check_losses(losses: Any) -> list[float]:
    """Returns losses, floating point [m] or a sequence of numbers, as floats; NaN and infinities pass.

    Raises:
        TypeError: `losses` is no floating-point tensor and no sequence of numbers.
        ValueError: a tensor of another shape.
    """
    if isinstance(losses, torch.Tensor):
        if losses.dim() != 1:
            raise ValueError(f"losses: expected floating point [m], got {describe(losses)}")
        if not losses.is_floating_point():
            raise TypeError(f"losses: expected floating point [m], got {describe(losses)}")
        values: list[float] = losses.tolist()
        return values
    if isinstance(losses, str | bytes) or not isinstance(losses, Iterable):
        raise TypeError(f"losses: expected floating point [m] or a sequence of numbers, got {describe(losses)}")
    return [check_number(f"losses[{i}]", loss) for i, loss in enumerate(losses)]


def _check_tensor(name: str, paths: torch.Tensor, dims: int, length: int | None) -> None:
    layers = "L" if length is None else str(length)
    shape = f"[{layers}]" if dims == 1 else f"[m, {layers}]"
    message = f"{name}: expected int64 {shape} (one operation index per layer), got {describe(paths)}"
    if paths.dim() != dims or (length is not None and paths.shape[-1] != length):
        raise ValueError(message)
    if paths.dtype is not torch.int64:
        raise TypeError(message)
