import math

import pytest
import torch

from greedynas.rmsprop import TensorFlowRMSprop


def test_equals_tensorflows_recurrence():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    parameter = start.clone().requires_grad_()
    optimizer = TensorFlowRMSprop([{"params": [parameter], "weight_decay": 0.01}], lr=0.1, alpha=0.8, momentum=0.7)
    weights, square, buffer = start.tolist(), [1.0] * 5, [0.0] * 5
    for step in range(6):
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        rate = 0.1 / (step + 1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for i, g in enumerate(gradient.tolist()):
            g += 0.01 * weights[i]
            square[i] = 0.8 * square[i] + 0.2 * g * g
            buffer[i] = 0.7 * buffer[i] + rate * g / math.sqrt(square[i] + 1e-3)
            weights[i] -= buffer[i]
        assert parameter.tolist() == pytest.approx(weights, rel=1e-12)


def test_first_step_is_small_where_torchs_is_not():
    # torch's mean square starts at 0: its first step is lr / sqrt(1 - alpha), however small the gradient.
    ours, theirs = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    for parameter in (ours, theirs):
        parameter.grad = torch.full((1,), 0.1)
    TensorFlowRMSprop([{"params": [ours]}], lr=0.01).step()
    torch.optim.RMSprop([theirs], lr=0.01, alpha=0.9, eps=1e-3).step()
    assert -ours.item() == pytest.approx(0.01 * 0.1 / math.sqrt(0.9 + 0.1 * 0.01 + 1e-3))
    assert -theirs.item() > 0.03


def test_parameters_without_a_gradient_stay():
    parameter = torch.ones(2, requires_grad=True)
    optimizer = TensorFlowRMSprop([{"params": [parameter], "weight_decay": 0.5}], lr=0.1)
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0]
    assert not optimizer.state
