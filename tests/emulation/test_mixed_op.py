"""`ops.mixed_op` by the CUDA kernels against `reference.mixed_op` in float64 on the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from mixed_op_cases import SPECS, Case, ConvSpec, Spec
from precisions import ALL, of_floats
from torch import Tensor

from greedynas_ext import ops, ops_cuda
from greedynas_ext.block_layout import PackedBlock, padded, stage_channels

# Sums of some hundred products in float32, rounded at 6e-8, through three BatchNorms of which each can enlarge errors
# some ten times where a channel hardly varies (5e-6 at most, here); the SiLU of a GPU has a few 1e-7 of its own.
TOLERANCE = 2e-5

MixedOp = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors begin as NaN, bytes as those of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert torch.empty(4, dtype=torch.uint8).view(torch.float32).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def mixed_op(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> MixedOp:
    """The operation under test, with the arguments of `ops.mixed_op`."""
    if cuda.device.type == "cuda":
        return ops.mixed_op
    known = (torch.float32,)
    monkeypatch.setattr(ops_cuda, "_module", lambda x, *others: cuda.module if x.dtype in (*known, *others) else None)
    monkeypatch.setattr(ops_cuda, "stream_of", lambda tensor: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def emulated(
        inputs: Tensor, input_index: Tensor, op_index: Tensor, block: PackedBlock, statistics: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops_cuda.mixed_op(inputs, input_index, op_index, block.weights, block.op_table, block.bn_eps, statistics)

    return emulated


@pytest.fixture
def compute(cuda: Any, mixed_op: MixedOp) -> Callable[..., tuple[Tensor, Tensor]]:
    """Outputs and used statistics of a case, on the CPU. The inputs are afterwards as before."""

    def run(case: Case, statistics: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = case.inputs.clone().to(cuda.device)
        block = replace(case.block, weights=case.block.weights.to(cuda.device))
        given = None if statistics is None else statistics.to(cuda.device)
        with poisoned_memory():
            outputs, used = mixed_op(inputs, case.input_index, case.op_index.to(cuda.device), block, given)
        torch.testing.assert_close(inputs.cpu(), case.inputs, rtol=0, atol=0, equal_nan=True)
        assert outputs.is_contiguous()
        return outputs.cpu(), used.cpu()

    return run


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    """Outputs and statistics; the latter always within TOLERANCE."""
    for ours, exact, allowed in zip(found, expected, (tolerance, TOLERANCE), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=allowed, atol=allowed)


@of_floats
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "out"),
    [
        ((2, 1, 1, 17), 17),  # one pixel: two values per channel
        ((1, 9, 7, 16), 24),
        ((3, 8, 8, 1), 3),
        ((2, 17, 3, 33), 33),
        ((1, 2, 5, 15), 20),
        ((2, 7, 6, 24), 24),
    ],
    ids=str,
)
@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
def test_equals_the_reference(
    compute: Any, size: tuple[int, int, int, int], out: int, stride: int, given: bool
) -> None:
    specs = [*SPECS, *([None] if stride == 1 and size[3] == out else [])]
    case = Case.of(specs, size, out, stride)
    statistics = case.running if given else None
    expected = case.expected(statistics)
    found = compute(case, statistics)
    # Of two values each is one deviation from the mean, however near to each other they are: that enlarges errors some
    # hundred times.
    two = size[:3] == (2, 1, 1) and not given
    check(found, expected, 2e-3 if two else TOLERANCE)
    if given:
        assert torch.equal(found[1], case.running)


HALVES = {"bf16": (torch.bfloat16, 0.015), "fp16": (torch.float16, 0.005)}


@pytest.mark.parametrize("cuda", [name for name in ALL if not name.startswith("fp32")], indirect=True)
@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
@pytest.mark.parametrize(("into", "out", "stride"), [(24, 24, 1), (10, 13, 2), (16, 33, 1)])
def test_maps_of_16_bits(cuda: Any, compute: Any, into: int, out: int, stride: int, given: bool) -> None:
    """Against float64 on the same inputs, the weights not rounded; operations without kernels are among them.

    A few roundings, of 2^-9 in bfloat16 and 2^-12 in half precision, of inputs that BatchNorm enlarges: at most 0.006
    and 0.0024 of the largest output here.
    """
    dtype, tolerance = HALVES[cuda.precision]
    specs = [*SPECS, Spec(kernel=9, se=3), *([None] if stride == 1 and into == out else [])]
    case = Case.of(specs, (3, 9, 7, into), out, stride)
    case = replace(case, inputs=case.inputs.to(dtype).float())
    statistics = case.running if given else None
    expected, expected_used = case.expected(statistics)
    outputs, used = compute(replace(case, inputs=case.inputs.to(dtype)), statistics)
    assert (outputs.dtype, used.dtype) == (dtype, torch.float32)
    errors = (outputs.double() - expected).abs().amax((1, 2, 3, 4)) / expected.abs().amax((1, 2, 3, 4))
    assert errors.max() <= tolerance, errors
    torch.testing.assert_close(used.double(), expected_used, rtol=tolerance, atol=tolerance)


@of_floats
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("into", "out"), [(24, 24), (10, 13)])
def test_statistics_given_back_repeat_the_outputs_bit_for_bit(compute: Any, into: int, out: int, stride: int) -> None:
    case = Case.of(SPECS, (3, 11, 9, into), out, stride)
    outputs, used = compute(case)
    again, used_again = compute(case, used)
    assert torch.equal(again, outputs)
    assert torch.equal(used_again, used)


@pytest.mark.parametrize("cuda", ["fp32"], indirect=True)
def test_few_pixels(compute: Any) -> None:
    """Small enough for the thread sanitizer."""
    case = Case.of([Spec(se=2), ConvSpec("relu")], (2, 2, 2, 5), 6, nodes=[(0, 0), (1, 0), (0, 1)], inputs=2)
    found = compute(case)
    check(found, case.expected(None))
    assert torch.equal(compute(case, found[1])[0], found[0])


@of_floats
def test_columns_without_use_do_not_matter(compute: Any) -> None:
    case = Case.of([*SPECS, None], (2, 5, 6, 10), 10)
    marked = used_columns(case)
    statistics = torch.where(marked, case.running, torch.nan)
    assert statistics.isnan().any(1).all()
    outputs, used = compute(case, statistics)
    expected, expected_used = compute(case, case.running)
    assert torch.equal(outputs, expected)
    assert torch.equal(used, expected_used)
    assert (used[~marked] == 0).all()


def used_columns(case: Case) -> Tensor:
    """Of each node's statistics [P, S]."""
    mask = torch.zeros(case.running.shape, dtype=torch.bool)
    for node, op in enumerate(case.op_index.tolist()):
        entry = case.block.operation(op)
        for stage, channels in stage_channels(entry).items():
            for start in (entry[f"{stage}_statistics"], entry[f"{stage}_statistics"] + padded(channels)):
                mask[node, start : start + channels] = True
    return mask


@pytest.mark.parametrize("cuda", ["fp32"], indirect=True)
@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
def test_more_nodes_than_a_launch_takes(compute: Any, given: bool) -> None:
    """And more inputs whose moments are needed."""
    specs = [Spec(), Spec(expansion=2), Spec(expansion=None)]
    nodes = [(source, op) for source in range(19) for op in range(3) if (source, op) != (4, 0)]
    case = Case.of(specs, (2, 3, 4, 8), 8, nodes=nodes, inputs=20)
    statistics = case.running if given else None
    check(compute(case, statistics), case.expected(statistics))


@pytest.mark.parametrize("cuda", ["fp32"], indirect=True)
def test_a_node_does_not_depend_on_its_neighbours(compute: Any) -> None:
    case = Case.of(SPECS, (2, 9, 6, 13), 13)
    outputs, used = compute(case)
    for node in range(len(case.op_index)):
        alone, used_alone = compute(case.node(node))
        assert torch.equal(alone[0], outputs[node])
        assert torch.equal(used_alone[0], used[node])
    clean = outputs
    case.inputs[0, 1, 3, 2, 5] = torch.nan
    outputs, _ = compute(case)
    bad = case.input_index == 0
    assert outputs[bad].isnan().flatten(1).any(1).all()
    assert torch.equal(outputs[~bad], clean[~bad])


@pytest.mark.parametrize("cuda", ["fp32"], indirect=True)
@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
def test_operations_without_kernels_are_computed_otherwise(compute: Any, given: bool) -> None:
    """Depthwise kernel 1 beside one that there is; stride 3, which only the 1x1 convolution has."""
    for stride, out in ((1, 10), (3, 12)):
        specs = [Spec(kernel=1), Spec(kernel=5), ConvSpec("relu"), Spec(kernel=9, se=3), Spec(expansion=None)]
        case = Case.of(specs, (3, 7, 10, 10), out, stride)
        rows = [case.block.operation(op) for op in range(len(specs))]
        taken = [False, True, True, False, True] if stride == 1 else [False, False, True, False, False]
        assert list(map(ops_cuda.takes, rows)) == taken
        statistics = case.running if given else None
        check(compute(case, statistics), case.expected(statistics))
    assert not ops_cuda.takes(rows[1] | {"stride": 2, "in_channels": ops_cuda.MOST_MEASURED + 1})
    assert ops_cuda.takes(rows[1] | {"stride": 2, "in_channels": ops_cuda.MOST_MEASURED})


@pytest.mark.parametrize("cuda", ["fp32"], indirect=True)
def test_float64_is_computed_in_plain_torch(compute: Any) -> None:
    case = Case.of(SPECS, (2, 5, 4, 6), 6)
    double = replace(case, inputs=case.inputs.double(), block=replace(case.block, weights=case.block.weights.double()))
    for found, exact in zip(compute(double), case.expected(None), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuda", ["fp32"], indirect=True)
@pytest.mark.parametrize(("into", "out"), [(16, 24), (5, 6)])
def test_strided_arguments(cuda: Any, mixed_op: MixedOp, into: int, out: int) -> None:
    case = Case.of(SPECS, (2, 7, 6, into), out)
    block = replace(case.block, weights=case.block.weights.to(cuda.device))
    inputs, *index = (tensor.to(cuda.device) for tensor in (case.inputs, case.input_index, case.op_index))
    outputs, used = mixed_op(inputs, *index, block)
    nchw = inputs.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    unaligned = inputs.new_empty(inputs.numel() + 1)[1:].view_as(inputs).copy_(inputs)
    assert unaligned.data_ptr() % 16
    spread = [torch.stack([i, i + 100], dim=1)[:, 0] for i in index]
    packed = replace(block, weights=torch.stack([block.weights] * 2, dim=1)[:, 0])
    statistics = used.t().contiguous().t()
    for given in (None, statistics):
        for x in (nchw, unaligned):
            assert torch.equal(mixed_op(x, *spread, packed, given)[0], outputs)


@pytest.mark.parametrize("cuda", ["fp32"], indirect=True)
def test_no_nodes(compute: Any) -> None:
    case = Case.of(SPECS, (3, 7, 8, 5), 6, 2)
    none = torch.zeros(0, dtype=torch.int64)
    outputs, used = compute(replace(case, input_index=none, op_index=none))
    assert outputs.shape == (0, 3, 4, 4, 6)
    assert used.shape == (0, case.block.statistics_width)
    identity = Case.of([None], (2, 1, 1, 5), 5, nodes=[(1, 0)])
    outputs, used = compute(identity)
    assert torch.equal(outputs[0], identity.inputs[1])
    assert used.shape == (1, 0)


@pytest.mark.parametrize("cuda", ["fp32"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": torch.zeros(2, 3, 5, 4)},
        {"inputs": torch.zeros(2, 3, 5, 5, 4).int()},
        {"inputs": torch.zeros(2, 0, 5, 5, 4)},
        {"inputs": torch.zeros(2, 3, 5, 5, 3)},
        {"inputs": torch.zeros(2, 1, 1, 1, 4), "statistics": None},
        {"input_index": torch.tensor([0.0, 1.0, 1.0])},
        {"input_index": torch.tensor([0, 2, 1])},
        {"op_index": torch.tensor([0, 1])},
        {"op_index": torch.tensor([0, 1, -1])},
        {"weights": torch.zeros(7, dtype=torch.float64)},
        {"weights": torch.zeros(7)},
        {"op_table": []},
        {"bn_eps": [1e-5]},
        {"statistics": torch.ones(3, 5)},
        {"statistics": torch.ones(3, 5).double()},
    ],
    ids=str,
)
def test_errors_are_those_of_the_cpu(cuda: Any, mixed_op: MixedOp, changes: dict[str, Any]) -> None:
    case = Case.of([Spec(), ConvSpec()], (3, 5, 5, 4), 6, nodes=[(0, 1), (1, 0), (1, 1)], inputs=2)
    arguments = {
        "inputs": case.inputs,
        "input_index": case.input_index,
        "op_index": case.op_index,
        "weights": case.block.weights,
        "op_table": case.block.op_table,
        "bn_eps": case.block.bn_eps,
        "statistics": case.running,
    } | changes
    with pytest.raises(ValueError, match=r"^mixed_op: ") as expected:
        torch.ops.greedynas.mixed_op(*arguments.values())
    moved = {name: value.to(cuda.device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    block = PackedBlock(moved.pop("weights"), tuple(moved.pop("op_table")), tuple(moved.pop("bn_eps")))
    with pytest.raises(ValueError, match=r"^mixed_op: ") as found:
        mixed_op(moved["inputs"], moved["input_index"], moved["op_index"], block, moved["statistics"])
    assert str(found.value) == str(expected.value)
