"""Checks of arguments that several modules share."""

import operator
from typing import Any

import torch


def check_count(name: str, value: Any, minimum: int) -> int:
    """Returns `value` as an int that is at least `minimum`.

    Raises:
        TypeError: `value` is no integer (a bool is none).
        ValueError: `value` is below `minimum`.
    """
    count = check_index(name, value)
    if count < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {count}")
    return count


def check_index(name: str, value: Any) -> int:
    """Returns `value` as a Python int; numpy integers pass, bools and floats do not.

    Raises:
        TypeError: `value` is no integer.
    """
    if not isinstance(value, bool | torch.Tensor):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")


def check_number(name: str, value: Any) -> float:
    """Returns `value`, a real number or a tensor that holds one, as a Python float (it may be NaN or infinite).

    Raises:
        TypeError: `value` is no real number.
        ValueError: `value` is an integer too large for a float.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype is torch.bool:
            raise TypeError(f"{name}: expected one real number, got {describe(value)}")
        return float(value.item())
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number within the range of a float, got a larger one") from None


def check_probability(name: str, value: Any) -> float:
    """Returns `value` as a float in [0, 1].

    Raises:
        TypeError: `value` is no real number.
        ValueError: `value` is outside [0, 1] or NaN.
    """
    probability = check_number(name, value)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {probability!r}")
    return probability


def check_generator(generator: Any) -> torch.Generator:
    """Returns `generator`, a CPU generator; None is refused because torch would then use its global state.

    Raises:
        TypeError: `generator` is no torch.Generator.
        ValueError: it lives on another device than the CPU.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator: expected one on the CPU, got one on {generator.device}")
    return generator


def describe(value: Any) -> str:
    """Says what `value` is: "float32 [3, 20]" for a tensor, else the name of its type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
