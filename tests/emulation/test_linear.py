"""csrc/cuda/linear.cu against float64."""

import math

import pytest
import torch

ACTIVATIONS = [lambda x: x, torch.relu, torch.nn.functional.hardsigmoid, torch.sigmoid]
GUARD = 64


class Case:
    def __init__(self, cuda, generator, rows, depth, channels, *, in_stride=0, out_stride=0, bias=True, activation=0):
        in_stride, self.out_stride = in_stride or depth, out_stride or channels
        x = torch.full((rows, in_stride), math.nan)  # behind the row nothing is read
        x[:, :depth] = torch.randn(rows, depth, generator=generator)
        weight = torch.randn(channels, depth, generator=generator) / depth**0.5
        b = torch.randn(channels, generator=generator)
        products = x[:, :depth].double() @ weight.double().T + (b.double() if bias else 0)
        self.expected = ACTIVATIONS[activation](products)
        # Each product and sum is off by 2^-24 of the sum of magnitudes at most; rounding errors mostly cancel.
        size = x[:, :depth].double().abs() @ weight.double().abs().T + (b.double().abs() if bias else 0)
        self.tolerance = 2.0**-24 * (4 + depth**0.5) * size + 1e-7
        self.rows, self.channels = rows, channels
        self.memory = [v.to(cuda.device) for v in (x, weight, b)]
        self.result = torch.full((rows * self.out_stride + GUARD,), math.nan, device=cuda.device)
        self.node = cuda.kernels.Linear(
            input=self.memory[0].data_ptr(),
            weight=self.memory[1].data_ptr(),
            bias=self.memory[2].data_ptr() if bias else 0,
            output=self.result.data_ptr(),
            rows=rows,
            depth=depth,
            in_stride=in_stride,
            channels=channels,
            out_stride=self.out_stride,
            activation=activation,
        )

    def output(self):
        assert self.result[-GUARD:].isnan().all()
        return self.result[:-GUARD].view(self.rows, self.out_stride).cpu()

    def check(self):
        output = self.output()
        assert (output[:, self.channels :] == 0).all()
        error = (output[:, : self.channels].double() - self.expected).abs()
        assert (error <= self.tolerance).all(), (error / self.tolerance).max()


def run(cuda, cases):
    cuda.kernels.linear([case.node for case in cases], cuda.stream)
    cuda.synchronize()


# Tiles are of 64 rows and channels, 16 of the depth at a time.
@pytest.mark.parametrize("rows", [1, 63, 64, 65])
@pytest.mark.parametrize(("depth", "channels"), [(1, 1), (15, 63), (16, 64), (17, 65), (10, 240), (240, 10)])
def test_shapes(cuda, rows, depth, channels):
    generator = torch.Generator().manual_seed(rows + 100 * depth)
    case = Case(cuda, generator, rows, depth, channels, bias=rows != 63)
    run(cuda, [case])
    case.check()


@pytest.mark.parametrize("activation", range(4))
@pytest.mark.parametrize("out_stride", [10, 16, 64, 72, 130])
def test_strides_and_activations(cuda, activation, out_stride):
    generator = torch.Generator().manual_seed(out_stride)
    case = Case(cuda, generator, 5, 21, 10, in_stride=24 + activation, out_stride=out_stride, activation=activation)
    run(cuda, [case])
    case.check()


def test_a_classifier(cuda):
    case = Case(cuda, torch.Generator().manual_seed(1), 70, 1280, 100)
    run(cuda, [case])
    case.check()


def test_group(cuda):
    """Nodes of different sizes; a node's results are the same in any company, and in every run."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(40, 24, 100), (40, 72, 6), (3, 6, 72), (129, 5, 8)]
    cases = [Case(cuda, generator, *shape, activation=i) for i, shape in enumerate(shapes)]
    run(cuda, cases)
    for case in cases:
        case.check()
        together = case.output()
        case.result.fill_(math.nan)
        run(cuda, [case])
        assert torch.equal(case.output(), together)


@pytest.mark.parametrize("activation", range(4))
def test_nan_and_infinity_stay_in_their_row(cuda, activation):
    case = Case(cuda, torch.Generator().manual_seed(3), 4, 9, 12, activation=activation)
    case.memory[0][1, 4], case.memory[0][2, 8] = math.nan, math.inf
    run(cuda, [case])
    output = case.output()
    assert output[1].isnan().all()
    expected = ACTIVATIONS[activation](math.inf * case.memory[1][:, 8].sign()).cpu()
    torch.testing.assert_close(output[2], expected, rtol=0, atol=0, equal_nan=True)
    assert output[[0, 3]].isfinite().all()
