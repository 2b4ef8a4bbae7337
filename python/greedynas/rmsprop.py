"""RMSprop as TensorFlow has it, which ImageNet's mobile networks were trained with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class TensorFlowRMSprop(Optimizer):
    """RMSprop with TensorFlow 1's three differences from torch's.

    epsilon stands inside the root, the mean square starts at 1 and not at 0, and the learning rate enters the momentum
    buffer, so that a change of it does not rescale the steps already in there. With torch's the same settings diverge
    more easily in the first epochs.

    Args:
        groups: parameter groups, each with its `weight_decay`.
        lr: learning rate.
        alpha: decay of the mean square.
        momentum: decay of the momentum buffer.
        eps: added to the mean square.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        alpha: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
    ) -> None:
        super().__init__(groups, {"lr": lr, "alpha": alpha, "momentum": momentum, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if not state:
            state["mean_square"] = torch.ones_like(parameter)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["mean_square"].lerp_(gradient.square(), 1.0 - group["alpha"])
        root = state["mean_square"].add(group["eps"]).sqrt_()
        state["momentum_buffer"].mul_(group["momentum"]).addcdiv_(gradient, root, value=group["lr"])
        parameter.sub_(state["momentum_buffer"])
