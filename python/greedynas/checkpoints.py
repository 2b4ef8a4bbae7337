"""The state of a training as tensors and plain values, for one file that is whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from greedynas.runs import load_state
from greedynas.storage import load_tensors, save_tensors


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer,
    generator: torch.Generator,
    state: Mapping[str, Any],
) -> None:
    """Writes modules, the optimizer's buffers, a random generator and `state` (what JSON holds) to one file."""
    tensors = {"generator": generator.get_state()}
    for prefix, module in modules.items():
        tensors.update({f"{prefix}/{name}": tensor for name, tensor in module.state_dict().items()})
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer/{number}/{name}"] = torch.as_tensor(value)
    save_tensors(path, tensors, state)


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, generator: torch.Generator
) -> dict[str, Any]:
    """Restores what `save_checkpoint` wrote and returns its `state`.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is damaged, or of other modules; names what does not fit.
    """
    tensors, state = load_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("generator", "optimizer", *modules)}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise ValueError(f"{path}: unexpected tensor {name!r}")
        parts[part][rest] = tensor
    if "" not in parts["generator"]:
        raise ValueError(f"{path}: no tensor 'generator'")
    for prefix, module in modules.items():
        load_state(module, parts[prefix], path)
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for name, tensor in parts["optimizer"].items():
        number, _, key = name.partition("/")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise ValueError(f"{path}: unexpected tensor 'optimizer/{name}'")
        parameter = parameters[int(number)]
        if tensor.dim() and tensor.shape != parameter.shape:
            raise ValueError(
                f"{path}: expected 'optimizer/{name}' of shape {list(parameter.shape)}, got {list(tensor.shape)}"
            )
        # Buffers lie in memory as the parameter does.
        optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(tensor) if tensor.dim() else tensor
    try:
        generator.set_state(parts["generator"][""])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: expected the state of a generator, got {error}") from error
    return state


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
