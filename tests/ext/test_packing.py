"""The packed form of a choice block: layout, descriptions that do not fit, agreement with the C++ header."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
from choice_blocks import ConvSpec, Spec, make_block
from torch import Tensor

from greedynas_ext import block_layout, ops, reference
from greedynas_ext.block_layout import ACTIVATIONS, FIELDS, GATES, KINDS, LANES, padded, unpack_statistics
from greedynas_ext.packing import (
    BatchNormWeights,
    ConvBNWeights,
    IdentityWeights,
    InvertedBottleneckWeights,
    SqueezeExcitationWeights,
    pack_choice_block,
    running_statistics,
)

HEADER = Path(__file__).parents[2] / "csrc/choice_block.h"


def enumerators(name: str) -> dict[str, int]:
    body = re.search(rf"enum {name} : int64_t {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    pairs = re.findall(r"\bk(\w+)\s*=\s*(\d+)", body[1])
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower(): int(value) for key, value in pairs}


class TestHeader:
    """csrc/choice_block.h and block_layout say the same."""

    def test_codes(self):
        assert enumerators("Kind") == KINDS
        assert enumerators("Activation") == ACTIVATIONS
        assert enumerators("Gate") == GATES

    def test_stages(self):
        stages = enumerators("BatchNormStage")
        assert stages.pop("batch_norm_stages") == len(block_layout.STAGES)
        assert list(stages) == [f"{stage}_bn" for stage in block_layout.STAGES]

    def test_columns(self):
        body = re.search(r"struct ChoiceOperation {(.*?)};", HEADER.read_text(), re.DOTALL)
        assert body is not None
        assert tuple(re.findall(r"int64_t (\w+);", body[1])) == FIELDS

    @pytest.mark.parametrize(
        ("constant", "value"),
        [
            ("kLanes", LANES),
            ("kSectionAlignment", block_layout.SECTION_ALIGNMENT),
            ("kOperationFields", len(FIELDS)),
            ("kNone", -1),
        ],
    )
    def test_constants(self, constant: str, value: int):
        assert f"constexpr int64_t {constant} = {value};" in HEADER.read_text()


def batch_norm(channels: int, **changes: object) -> BatchNormWeights:
    values = {"weight": torch.ones(channels), "bias": torch.zeros(channels)}
    return BatchNormWeights(**(values | changes))  # type: ignore[arg-type]


def bottleneck(**changes: object) -> InvertedBottleneckWeights:
    """4 -> 12 -> 6 channels, stride 2."""
    weights = InvertedBottleneckWeights(
        expand=torch.arange(48.0).view(12, 4, 1, 1),
        expand_bn=batch_norm(12),
        depthwise=torch.arange(108.0).view(12, 1, 3, 3),
        depthwise_bn=batch_norm(12),
        project=torch.arange(72.0).view(6, 12, 1, 1),
        project_bn=batch_norm(6),
        stride=2,
        activation="relu",
        residual=False,
    )
    return dataclasses.replace(weights, **changes)  # type: ignore[arg-type]


def squeeze_excitation(**changes: object) -> SqueezeExcitationWeights:
    weights = SqueezeExcitationWeights(
        torch.arange(36.0).view(3, 12, 1, 1), torch.ones(3), torch.zeros(12, 3, 1, 1), torch.arange(12.0)
    )
    return dataclasses.replace(weights, **changes)  # type: ignore[arg-type]


def conv(**changes: object) -> ConvBNWeights:
    weights = ConvBNWeights(torch.ones(6, 4, 1, 1), batch_norm(6), stride=2)
    return dataclasses.replace(weights, **changes)  # type: ignore[arg-type]


class TestLayout:
    """Where each value stands."""

    def section(self, weights: Tensor, offset: int, rows: int) -> Tensor:
        assert offset % 32 == 0
        return weights[offset : offset + rows * 16].view(rows, 16)

    def test_an_inverted_bottleneck(self):
        operation = bottleneck(
            squeeze_excitation=squeeze_excitation(), project_bn=batch_norm(6, bias=torch.arange(6.0), eps=1e-3)
        )
        block = pack_choice_block([operation])
        row, weights = block.operation(0), block.weights
        assert {field: row[field] for field in FIELDS[:12]} == {
            "kind": 2,
            "in_channels": 4,
            "hidden_channels": 12,
            "out_channels": 6,
            "kernel": 3,
            "stride": 2,
            "activation": 1,
            "depthwise_activation": 1,
            "project_activation": 0,
            "se_channels": 3,
            "se_gate": 0,
            "residual": 0,
        }
        expand = self.section(weights, row["expand_weight"], 4)
        assert expand[3, 5] == operation.expand[5, 3, 0, 0]
        assert expand[:, 12:].count_nonzero() == 0
        depthwise = self.section(weights, row["depthwise_weight"], 9)
        assert depthwise[5, 7] == operation.depthwise[7, 0, 1, 2]
        project = self.section(weights, row["project_weight"], 12)
        assert project[11, 2] == operation.project[2, 11, 0, 0]
        reduce = self.section(weights, row["se_reduce_weight"], 12)
        assert reduce[9, 1] == operation.squeeze_excitation.reduce_weight[1, 9, 0, 0]
        assert self.section(weights, row["se_expand_bias"], 1)[0].tolist() == [*range(12), 0, 0, 0, 0]
        gamma, beta = self.section(weights, row["project_bn"], 2)
        assert gamma.tolist() == [1] * 6 + [0] * 10
        assert beta.tolist() == [*range(6)] + [0] * 10
        assert block.bn_eps == (1e-5, 1e-5, 1e-3)
        assert (row["expand_statistics"], row["depthwise_statistics"], row["project_statistics"]) == (0, 32, 64)
        assert block.statistics_width == 96

    def test_a_convolution_and_the_properties(self):
        block = pack_choice_block([conv(), bottleneck()])
        row = block.operation(0)
        assert (block.num_operations, block.in_channels, block.out_channels, block.stride) == (2, 4, 6, 2)
        assert (row["kind"], row["kernel"], row["activation"]) == (1, 1, 0)
        absent = [name for name in FIELDS[12:] if row[name] == -1]
        assert set(FIELDS[12:]) - set(absent) == {"project_weight", "project_bn", "project_statistics"}
        assert block.bn_eps[:3] == (0.0, 0.0, 1e-5)

    def test_sections_do_not_overlap(self):
        block = make_block([Spec(se=5), ConvSpec(), Spec(expansion=None, kernel=7)], 17, 33, 2).packed
        taken: list[tuple[int, int]] = []
        for op in range(3):
            row = block.operation(op)
            hidden, out, squeezed = padded(row["hidden_channels"]), padded(row["out_channels"]), row["se_channels"]
            into = 17 if row["kind"] == KINDS["conv_bn"] else row["hidden_channels"]
            sizes = {
                "expand_weight": 17 * hidden,
                "expand_bn": 2 * hidden,
                "depthwise_weight": row["kernel"] ** 2 * hidden,
                "depthwise_bn": 2 * hidden,
                "se_reduce_weight": row["hidden_channels"] * padded(squeezed),
                "se_reduce_bias": padded(squeezed),
                "se_expand_weight": squeezed * hidden,
                "se_expand_bias": hidden,
                "project_weight": into * out,
                "project_bn": 2 * out,
            }
            taken += [(row[name], row[name] + size) for name, size in sizes.items() if row[name] >= 0]
        taken.sort()
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(taken))
        assert taken[0][0] == 0
        assert taken[-1][1] <= block.weights.numel()
        assert len(taken) == 10 + 2 + 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype(self, dtype: torch.dtype):
        assert pack_choice_block([bottleneck(), conv()], dtype=dtype).weights.dtype == dtype
        assert pack_choice_block([IdentityWeights(3)], dtype=dtype).weights.dtype == dtype
        assert pack_choice_block([IdentityWeights(3)]).weights.dtype == torch.float32

    def test_weights_are_a_copy_without_history(self):
        weight = torch.ones(6, 4, 1, 1, requires_grad=True)
        block = pack_choice_block([conv(weight=weight)])
        assert not block.weights.requires_grad
        with torch.no_grad():
            weight.zero_()
        assert block.weights.count_nonzero() > 0

    def test_batch_norm_without_affine_weights(self):
        plain = pack_choice_block([conv(bn=BatchNormWeights(None, None))])
        assert torch.equal(plain.weights, pack_choice_block([conv()]).weights)


def test_running_statistics_and_their_unpacking():
    block = make_block([Spec(expansion=2), ConvSpec(), None], 20, 20)
    rows = running_statistics(block.operations, block.packed)
    assert rows.shape == (3, block.packed.statistics_width)
    for stage, (mean, var) in unpack_statistics(block.packed, 0, rows[0]).items():
        bn = getattr(block.modules[0], f"{stage}_bn")
        assert torch.equal(mean, bn.running_mean)
        assert torch.equal(var, bn.running_var)
    assert set(unpack_statistics(block.packed, 1, rows[1])) == {"project"}
    assert torch.equal(unpack_statistics(block.packed, 1, rows[1])["project"][1], block.modules[1][1].running_var)
    assert rows[2].count_nonzero() == 0


def test_running_statistics_that_are_missing():
    operations = [conv(), bottleneck()]
    block = pack_choice_block(operations)
    with pytest.raises(ValueError, match=r"operations\[0\]\.bn: expected running_mean and running_var \[6\], got None"):
        running_statistics(operations, block)
    operations[0] = conv(bn=batch_norm(6, running_mean=torch.zeros(6), running_var=torch.ones(6)))
    with pytest.raises(ValueError, match=r"operations\[1\]\.expand_bn: expected running_mean and running_var \[12\]"):
        running_statistics(operations, block)


def test_weights_as_matrices():
    four = bottleneck(squeeze_excitation=squeeze_excitation())
    se = squeeze_excitation(reduce_weight=torch.arange(36.0).view(3, 12), expand_weight=torch.zeros(12, 3))
    two = bottleneck(expand=four.expand.flatten(1), project=four.project.flatten(1), squeeze_excitation=se)
    assert torch.equal(pack_choice_block([four]).weights, pack_choice_block([two]).weights)


def test_the_reference_runs_without_the_native_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "_call", None)
    block = make_block([Spec()], 3, 3)
    inputs, index = torch.ones(1, 2, 3, 3, 3, dtype=torch.float64), torch.tensor([0])
    torch.testing.assert_close(
        reference.mixed_op(inputs, index, index, block.packed)[0], block.expected(inputs, index, index, True)
    )


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ([], r"operations: expected at least one, got none"),
        ([IdentityWeights(0)], r"operations\[0\]\.channels: expected at least 1, got 0"),
        ([conv(stride=0)], r"operations\[0\]\.stride: expected at least 1, got 0"),
        ([conv(activation="gelu")], r"activation: expected one of linear, relu, relu6, hswish, silu, got 'gelu'"),
        ([conv(weight=torch.ones(6, 4, 3, 3))], r"\.weight: expected a 1x1 .* \[out, in, 1, 1\], got \[6, 4, 3, 3\]"),
        ([conv(weight=torch.ones(6))], r"\.weight: expected a 1x1 convolution's weight .*, got \[6\]"),
        ([conv(weight=torch.ones(6, 4, 1, 1).half())], r"\.weight: expected float32 or float64, got float16 on cpu"),
        ([conv(weight=torch.ones(6, 4, 1, 1).double())], r"\.bn: expected float64 on cpu .*\.weight is, got float32"),
        ([conv(bn=batch_norm(5))], r"operations\[0\]\.bn\.weight: expected \[6\], got \[5\]"),
        ([conv(bn=batch_norm(6, running_var=torch.ones(7)))], r"\.bn\.running_var: expected \[6\], got \[7\]"),
        ([conv(), conv(stride=1)], r"operations\[1\]: expected stride 2 as operations\[0\] has, got 1"),
        ([conv(), IdentityWeights(4)], r"operations\[1\]: expected out_channels 6 as operations\[0\] has, got 4"),
        ([bottleneck(depthwise=torch.ones(12, 1, 2, 2))], r"depthwise: expected .* k odd, got \[12, 1, 2, 2\]"),
        ([bottleneck(depthwise=torch.ones(12, 2, 3, 3))], r"depthwise: expected \[hidden, 1, k, k\]"),
        ([bottleneck(expand_bn=None)], r"\.expand and operations\[0\]\.expand_bn: expected both or neither"),
        ([bottleneck(expand=torch.ones(11, 4, 1, 1))], r"\.expand: expected \[12, 4, 1, 1\], got \[11, 4, 1, 1\]"),
        ([bottleneck(project=torch.ones(6, 11, 1, 1))], r"\.project: expected \[6, 12, 1, 1\], got \[6, 11, 1, 1\]"),
        ([bottleneck(residual=True)], r"\.residual: expected False .* \(4 -> 6 channels, stride 2\), got True"),
        (
            [bottleneck(squeeze_excitation=squeeze_excitation(gate="relu"))],
            r"squeeze_excitation\.gate: expected one of hsigmoid, sigmoid, got 'relu'",
        ),
        (
            [bottleneck(squeeze_excitation=squeeze_excitation(reduce_bias=torch.ones(4)))],
            r"squeeze_excitation\.reduce_bias: expected \[3\], got \[4\]",
        ),
        (
            [bottleneck(squeeze_excitation=squeeze_excitation(expand_weight=torch.ones(3, 12, 1, 1)))],
            r"squeeze_excitation\.expand_weight: expected \[12, 3, 1, 1\], got \[3, 12, 1, 1\]",
        ),
    ],
)
def test_errors(operations: list[object], message: str):
    with pytest.raises(ValueError, match=message):
        pack_choice_block(operations)  # type: ignore[arg-type]


def test_errors_of_type():
    with pytest.raises(TypeError, match=r"operations\[0\]: expected a description of weights, got Tensor"):
        pack_choice_block([torch.zeros(3)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"dtype: expected float32 or float64, got torch\.float16"):
        pack_choice_block([conv()], dtype=torch.float16)
