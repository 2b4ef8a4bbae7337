"""What torch asks of custom operations: schemas, fake kernels, autograd, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from choice_blocks import ConvSpec, Spec, make_block
from torch._subclasses.fake_tensor import FakeTensorMode

from greedynas_ext import _library, ops


def path_cross_entropy_arguments(dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    return torch.zeros(2, 5, 3, dtype=dtype), torch.tensor([0, 1, 2, 0, 1]), 0.1


def select_top_k_arguments(dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    return torch.tensor([2.0, 1.0, 3.0], dtype=dtype), 2


def mixed_op_arguments(dtype: torch.dtype = torch.float32, given: bool = False) -> tuple[object, ...]:
    block = make_block([Spec(se=2), ConvSpec()], 3, 5, 2, dtype=dtype)
    inputs = torch.linspace(-1, 1, 2 * 2 * 5 * 4 * 3, dtype=dtype).view(2, 2, 5, 4, 3)
    op_index = torch.tensor([0, 1, 0])
    statistics = block.running(op_index) if given else None
    packed = block.packed
    return inputs, torch.tensor([1, 0, 0]), op_index, packed.weights, packed.op_table, packed.bn_eps, statistics


def no_nodes() -> tuple[object, ...]:
    inputs, _, _, *rest = mixed_op_arguments()
    none = torch.zeros(0, dtype=torch.int64)
    return inputs, none, none, *rest


CASES = {
    "path_cross_entropy": path_cross_entropy_arguments,
    "path_cross_entropy of strides": lambda: (torch.zeros(3, 5, 2).permute(2, 1, 0), torch.tensor([0, 1, 2, 0, 1])),
    "path_cross_entropy float64": lambda: path_cross_entropy_arguments(torch.float64),
    "path_cross_entropy bfloat16": lambda: path_cross_entropy_arguments(torch.bfloat16),
    "select_top_k": select_top_k_arguments,
    "select_top_k float64": lambda: select_top_k_arguments(torch.float64),
    "select_top_k none": lambda: (torch.zeros(0), 0),
    "mixed_op": mixed_op_arguments,
    "mixed_op float64 with statistics": lambda: mixed_op_arguments(torch.float64, given=True),
    "mixed_op without nodes": no_nodes,
}


def operation(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.greedynas, name.split()[0]).default


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str):
    torch.library.opcheck(operation(name), CASES[name]())


@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_autograd_with_gradients_wanted(name: str):
    first, *rest = CASES[name]()
    assert isinstance(first, torch.Tensor)
    torch.library.opcheck(
        operation(name), (first.requires_grad_(), *rest), test_utils=("test_schema", "test_autograd_registration")
    )


@pytest.mark.parametrize("name", CASES)
def test_there_is_no_gradient(name: str):
    first, *rest = CASES[name]()
    assert isinstance(first, torch.Tensor)
    result = operation(name)(first.requires_grad_(), *rest)
    results = result if isinstance(result, tuple) else (result,)
    floating = [r for r in results if r.is_floating_point()]
    if floating:
        assert floating[0].requires_grad
        with pytest.raises(NotImplementedError, match=rf"greedynas::{name.split()[0]} is for evaluation"):
            floating[0].sum().backward()
    with torch.no_grad():
        again = operation(name)(first, *rest)
    for r in again if isinstance(again, tuple) else (again,):
        assert not r.requires_grad


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (7, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_fake_mixed_op_has_the_real_shapes(size: tuple[int, int], stride: int):
    block = make_block([ConvSpec(), Spec()], 3, 5, stride).packed
    inputs, index = torch.ones(1, 2, *size, 3, dtype=torch.float64), torch.tensor([0, 0, 0])
    real = ops.mixed_op(inputs, index, index, block)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.mixed_op(inputs, index, index, block)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.path_cross_entropy(*path_cross_entropy_arguments()),
        lambda: ops.select_top_k(torch.zeros(1), 1),
    ],
)
def test_a_missing_library_explains_itself(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_library, "_ops_error", OSError("no such file"))
    with pytest.raises(ImportError, match=r"greedynas_ext\._ops could not be loaded: no such file"):
        call()
