"""ops.mixed_op and reference.mixed_op against modules of torch.nn, in float64 unless said otherwise.

Tolerance 1e-11 relative to values of about 1: sums of at most some thousand float64 products, in another order, through
three BatchNorms.
"""

from __future__ import annotations

import pytest
import torch
from choice_blocks import Block, ConvSpec, Spec, make_block
from native_memory import poisoned_memory
from torch import Tensor

from greedynas_ext import ops, reference
from greedynas_ext.block_layout import unpack_statistics

TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}
ALL_SPECS = (
    Spec(expansion=3, kernel=3, activation="relu6"),
    Spec(expansion=6, kernel=5, activation="hswish", se=7),
    Spec(expansion=2, kernel=7, activation="silu", se=1, gate="sigmoid", eps=1e-3),
    Spec(expansion=None, kernel=3, activation="relu"),
    Spec(expansion=1, kernel=1, activation="linear"),
    Spec(expansion=2, kernel=5, activation="relu", se=3, depthwise_activation="linear", project_activation="relu"),
    Spec(expansion=None, kernel=3, activation="linear", project_activation="silu"),
    ConvSpec(),
    ConvSpec("relu"),
)


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def every_operation(block: Block, batches: int) -> tuple[Tensor, Tensor]:
    """Each operation on each input, and a repeated node at the end."""
    op_index = torch.arange(block.packed.num_operations).repeat(batches)
    input_index = torch.arange(batches).repeat_interleave(block.packed.num_operations)
    return torch.cat([input_index, input_index[:1]]), torch.cat([op_index, op_index[:1]])


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    "size",
    [
        (2, 1, 1, 17),  # one pixel: two values per channel
        (1, 9, 7, 16),
        (3, 8, 8, 1),
        (2, 17, 3, 33),
        (1, 2, 5, 15),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_equals_the_modules(size: tuple[int, int, int, int], stride: int, training: bool):
    images_, height, width, channels = size
    if training and images_ * -(-height // stride) * -(-width // stride) == 1:
        pytest.skip("a single value per channel: refused, and tested as such")
    specs = [*ALL_SPECS, *([None] if stride == 1 else [])]
    block = make_block(specs, channels, channels, stride)
    inputs = images(2, images_, height, width, channels)
    input_index, op_index = every_operation(block, 2)
    statistics = None if training else block.running(op_index)
    expected = block.expected(inputs, input_index, op_index, training)
    for implementation in (ops.mixed_op, reference.mixed_op):
        outputs, used = implementation(inputs, input_index, op_index, block.packed, statistics)
        torch.testing.assert_close(outputs, expected, **TOLERANCE)
        if statistics is not None:
            assert torch.equal(used, statistics)


@pytest.mark.parametrize("pixels", [95, 96, 97, 193])  # around the tile of 96 rows
@pytest.mark.parametrize("channels", [(15, 31), (16, 32), (17, 8), (4, 49)])  # around whole vectors
def test_sizes_around_the_tiles(pixels: int, channels: tuple[int, int]):
    block = make_block([Spec(kernel=3, se=3), ConvSpec()], *channels)
    inputs = images(1, 1, pixels, 1, channels[0])
    index = torch.tensor([0, 0]), torch.tensor([0, 1])
    outputs, _ = ops.mixed_op(inputs, *index, block.packed)
    torch.testing.assert_close(outputs, block.expected(inputs, *index, True), **TOLERANCE)


@pytest.mark.parametrize("height", [7, 8, 9, 15, 16, 17])  # around bands of 8 rows
@pytest.mark.parametrize("stride", [1, 2])
def test_heights_around_the_bands(height: int, stride: int):
    block = make_block([Spec(expansion=1, kernel=7)], 3, 5, stride)
    inputs = images(1, 2, height, 40, 3)
    index = torch.tensor([0]), torch.tensor([0])
    outputs, _ = ops.mixed_op(inputs, *index, block.packed)
    torch.testing.assert_close(outputs, block.expected(inputs, *index, True), **TOLERANCE)


def test_float32_is_near_float64():
    # 1e-5 of values of about 1: float32 rounds at 6e-8, and a BatchNorm can enlarge errors some ten times.
    block = make_block(ALL_SPECS, 24, 24)
    inputs = images(1, 8, 14, 14, 24, dtype=torch.float32)
    index = every_operation(block, 1)
    small = make_block(ALL_SPECS, 24, 24, dtype=torch.float32)
    outputs, used = ops.mixed_op(inputs, *index, small.packed)
    assert outputs.dtype == used.dtype == torch.float32
    expected, expected_used = reference.mixed_op(inputs.double(), *index, block.packed)
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(used.double(), expected_used, rtol=1e-5, atol=1e-5)


def test_returns_the_statistics_of_the_batch():
    block = make_block([Spec(expansion=3), ConvSpec(), None], 5, 5)
    inputs = images(2, 3, 6, 4, 5)
    index = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2])
    _, used = ops.mixed_op(inputs, *index, block.packed)
    seen = {}
    bottleneck = block.modules[0].train()
    for stage in ("expand", "depthwise", "project"):
        getattr(bottleneck, f"{stage}_bn").register_forward_pre_hook(
            lambda _, arguments, stage=stage: seen.update({stage: arguments[0]})
        )
    block.expected(inputs, index[0][:1], index[1][:1], True)
    for stage, (mean, var) in unpack_statistics(block.packed, 0, used[0]).items():
        torch.testing.assert_close(mean, seen[stage].mean((0, 2, 3)), **TOLERANCE)
        torch.testing.assert_close(var, seen[stage].var((0, 2, 3), correction=0), **TOLERANCE)
    conv = block.modules[1][0](inputs[0].permute(0, 3, 1, 2))
    torch.testing.assert_close(unpack_statistics(block.packed, 1, used[1])["project"][0], conv.mean((0, 2, 3)))
    assert used[1].count_nonzero() == 2 * 5
    assert used[2].count_nonzero() == 0
    assert unpack_statistics(block.packed, 2, used[2]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_given_back_repeat_the_outputs_bit_for_bit(dtype: torch.dtype):
    block = make_block(ALL_SPECS, 6, 10, 2, dtype=dtype)
    inputs = images(2, 3, 11, 9, 6, dtype=dtype)
    index = every_operation(block, 2)
    outputs, used = ops.mixed_op(inputs, *index, block.packed)
    again, used_again = ops.mixed_op(inputs, *index, block.packed, used)
    assert torch.equal(again, outputs)
    assert torch.equal(used_again, used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype):
    block = make_block(ALL_SPECS, 19, 19, dtype=dtype)
    inputs = images(1, 5, 21, 13, 19, dtype=dtype)
    index = every_operation(block, 1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.mixed_op(inputs, *index, block.packed))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_a_node_does_not_depend_on_its_neighbours():
    block = make_block(ALL_SPECS, 8, 8)
    inputs = images(3, 2, 9, 9, 8)
    index = every_operation(block, 3)
    outputs, _ = ops.mixed_op(inputs, *index, block.packed)
    alone, _ = ops.mixed_op(inputs[2:], torch.tensor([0]), torch.tensor([1]), block.packed)
    assert torch.equal(outputs[2 * len(ALL_SPECS) + 1], alone[0])


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
def test_variance_survives_a_large_mean(ratio: float):
    # The moments of float32 values are exact to float32's rounding, whatever the ratio of mean to deviation.
    block = make_block([ConvSpec()], 3, 3, dtype=torch.float32)
    weights = block.packed.weights.clone()
    weights[: 3 * 16] = torch.nn.functional.pad(torch.eye(3), (0, 13)).flatten()  # the convolution copies its input
    packed = type(block.packed)(weights, block.packed.op_table, block.packed.bn_eps)
    inputs = (images(1, 4, 30, 30, 3) + ratio).float()
    outputs, used = ops.mixed_op(inputs, torch.tensor([0]), torch.tensor([0]), packed)
    mean, var = unpack_statistics(packed, 0, used[0])["project"]
    exact = inputs[0].double().reshape(-1, 3)
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact.var(0, correction=0), rtol=1e-6, atol=0)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_non_finite_values_go_where_the_modules_put_them(value: float, training: bool):
    block = make_block(ALL_SPECS, 4, 4)
    inputs = images(1, 2, 6, 5, 4)
    inputs[0, 1, 3, 2, 1] = value
    index = every_operation(block, 1)
    statistics = None if training else block.running(index[1])
    outputs, _ = ops.mixed_op(inputs, *index, block.packed, statistics)
    expected = block.expected(inputs, *index, training)
    assert expected.isnan().any()
    torch.testing.assert_close(outputs, expected, equal_nan=True, **TOLERANCE)


def test_a_bad_input_leaves_other_nodes_alone():
    block = make_block(ALL_SPECS, 17, 17)
    inputs = images(2, 2, 6, 5, 17)
    index = every_operation(block, 2)
    clean, _ = ops.mixed_op(inputs, *index, block.packed)
    inputs[0, 0, 0, 0, 0] = float("nan")
    outputs, _ = ops.mixed_op(inputs, *index, block.packed)
    assert torch.equal(outputs[index[0] == 1], clean[index[0] == 1])


def test_strided_arguments():
    block = make_block(ALL_SPECS, 5, 6)
    inputs = images(2, 3, 7, 8, 5)
    index = every_operation(block, 2)
    outputs, used = ops.mixed_op(inputs, *index, block.packed)
    nchw = inputs.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    spread = [torch.stack([i, i + 100], dim=1)[:, 0] for i in index]
    packed = type(block.packed)(
        torch.stack([block.packed.weights] * 2, dim=1)[:, 0], block.packed.op_table, block.packed.bn_eps
    )
    statistics = used.t().contiguous().t()
    assert not any(t.is_contiguous() for t in (nchw, *spread, packed.weights, statistics))
    assert torch.equal(ops.mixed_op(nchw, *spread, packed)[0], outputs)
    assert torch.equal(ops.mixed_op(nchw, *spread, packed, statistics)[0], outputs)


def test_outputs_are_written_everywhere():
    block = make_block([*ALL_SPECS, None], 5, 5)
    inputs, index = images(1, 3, 7, 8, 5), every_operation(block, 1)
    with poisoned_memory():
        outputs, used = ops.mixed_op(inputs, *index, block.packed)
    assert outputs.isfinite().all()
    assert used.isfinite().all()


def test_no_nodes():
    block = make_block([Spec(), ConvSpec()], 5, 6, 2)
    none = torch.zeros(0, dtype=torch.int64)
    outputs, used = ops.mixed_op(images(2, 3, 7, 8, 5), none, none, block.packed)
    assert outputs.shape == (0, 3, 4, 4, 6)
    assert used.shape == (0, block.packed.statistics_width)


def test_identity_alone_has_no_statistics():
    block = make_block([None], 5, 5)
    inputs = images(2, 1, 1, 1, 5)
    outputs, used = ops.mixed_op(inputs, torch.tensor([1]), torch.tensor([0]), block.packed)
    assert torch.equal(outputs[0], inputs[1])
    assert used.shape == (1, 0)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_a_single_value_per_channel_is_refused_in_batch_mode(size: tuple[int, int, int, int]):
    count, height, width, stride = size
    block = make_block([ConvSpec(), Spec()], 4, 4, stride)
    inputs = images(1, count, height, width, 4)
    index = torch.tensor([0]), torch.tensor([1])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block.expected(inputs, *index, True)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel .* 1x1 after operation 1 \(node 0\)"):
        ops.mixed_op(inputs, *index, block.packed)
    outputs, _ = ops.mixed_op(inputs, *index, block.packed, block.running(index[1]))
    torch.testing.assert_close(outputs, block.expected(inputs, *index, False), **TOLERANCE)


class TestErrors:
    """Arguments that are refused, each by name."""

    def call(self, **changes: object) -> None:
        block = make_block([Spec(), ConvSpec()], 4, 6, dtype=torch.float32).packed
        arguments = {
            "inputs": torch.zeros(2, 3, 5, 5, 4),
            "input_index": torch.tensor([0, 1, 1]),
            "op_index": torch.tensor([1, 0, 1]),
            "weights": block.weights,
            "op_table": list(block.op_table),
            "bn_eps": list(block.bn_eps),
            "statistics": torch.ones(3, block.statistics_width),
        }
        assert changes.keys() <= arguments.keys()
        torch.ops.greedynas.mixed_op(*(arguments | changes).values())

    def table(self, **fields: int) -> list[int]:
        """The table of `call` with fields of operation 0 changed."""
        block = make_block([Spec(), ConvSpec()], 4, 6, dtype=torch.float32).packed
        return [*(block.operation(0) | fields).values(), *block.operation(1).values()]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"inputs": torch.zeros(2, 3, 5, 4)},
                r"inputs should be float64 or float32, .*, \[B, N, H, W, C\], got float32",
            ),
            ({"inputs": torch.zeros(2, 3, 5, 5, 4).half()}, r"inputs should .*, got float16 \[2, 3, 5, 5, 4\]"),
            ({"inputs": torch.zeros(2, 3, 5, 5, 4).int()}, r"inputs should .*, got int32"),
            ({"inputs": torch.zeros(2, 0, 5, 5, 4)}, r"inputs should be empty in no dimension .* got float32 \[2, 0,"),
            ({"inputs": torch.zeros(2, 3, 5, 5, 3)}, r"inputs should have C=4 channels for operation 0, got 3"),
            ({"input_index": torch.tensor([0.0, 1.0, 1.0])}, r"input_index should be int64 \[P\], got float32 \[3\]"),
            ({"input_index": torch.tensor([0, 2, 1])}, r"input_index should be in \[0, B=2\), got 2 at position 1"),
            (
                {"op_index": torch.tensor([0, 1])},
                r"op_index should be int64 \[P=3\] as input_index is, got int64 \[2\]",
            ),
            ({"op_index": torch.tensor([0, 1, -1])}, r"op_index should be in \[0, O=2\), got -1 at position 2"),
            (
                {"weights": torch.zeros(7, dtype=torch.float64)},
                r"weights should be float32 \[size\] .*got float64 \[7\]",
            ),
            ({"weights": torch.zeros(7)}, r"operation 0: expand_weight should be .* in weights \[7\], got 0"),
            ({"op_table": []}, r"op_table should hold 25 entries .* got 0"),
            ({"op_table": [0] * 24}, r"op_table should hold 25 entries .* got 24"),
            ({"bn_eps": [1e-5]}, r"bn_eps should hold 6 values \(3 for each operation\), got 1"),
            ({"bn_eps": [1e-5] * 5 + [float("nan")]}, r"bn_eps should be finite .* got nan for operation 1"),
            ({"statistics": torch.ones(3, 5)}, r"statistics should be float32 \[P=3, S=\d+\], got float32 \[3, 5\]"),
            ({"statistics": torch.ones(3, 5).double()}, r"statistics should be float32 .*, got float64"),
        ],
        ids=str,
    )
    def test_arguments(self, changes: dict[str, object], message: str):
        with pytest.raises(ValueError, match="^mixed_op: .*" + message):
            self.call(**changes)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"kind": 3}, "unknown kind 3"),
            ({"kind": 0}, "a plain identity should keep the shape"),
            ({"kind": 1, "kernel": 3}, "kernel should be 1 in a convolution with BatchNorm, got 3"),
            ({"in_channels": 0}, "in_channels and out_channels should be positive"),
            ({"hidden_channels": 0}, "hidden_channels should be positive, got 0"),
            ({"stride": 0}, "stride should be positive, got 0"),
            ({"activation": 5}, "unknown activation code 5"),
            ({"se_gate": 2}, "unknown se_gate code 2"),
            ({"se_channels": -1}, "se_channels should not be negative, got -1"),
            ({"se_channels": 2}, "se_reduce_weight should be a multiple of 16 .* got -1"),
            ({"residual": 1}, "residual should be 0, or 1 where the operation keeps the shape, got 1"),
            ({"kernel": 4}, "kernel should be odd, got 4"),
            ({"expand_weight": -1}, "hidden_channels should equal in_channels=4 without an expand stage, got 12"),
            ({"project_weight": 8}, "project_weight should be a multiple of 16"),
            ({"project_weight": 1 << 62}, "project_weight should be a multiple of 16"),
            ({"project_statistics": -16}, "project_statistics should be a multiple of 16, got -16"),
            ({"stride": 2}, r"operation 1 should have the output shape of operation 0 \(6 channels, stride 2\), got 6"),
        ],
        ids=str,
    )
    def test_table(self, fields: dict[str, int], message: str):
        with pytest.raises(ValueError, match=r"^mixed_op: op_table: (operation 0: |operation 1 should).*") as caught:
            self.call(op_table=self.table(**fields))
        caught.match(message)
