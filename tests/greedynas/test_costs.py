"""Parameters and multiply-accumulates: published figures, a benchmark's table, and an independent counter."""

import csv
import gzip
import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from greedynas.layers import Operation
from greedynas.network import Network
from greedynas.published import PUBLISHED, PUBLISHED_SPACE
from greedynas.spaces import available_spaces, get_space

BENCHMARK = "nas-bench-macro-cifar10.csv.gz"
BENCHMARK_DIGEST = "672d7cab8462f1cd347a9e2c45dd635f39fa6432d46cd736b20c0cc1033324ac"


def random_paths(space, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(space.num_operations, (count, space.num_layers), generator=generator)


def counted(space, path, resolution):
    """Parameters and multiply-accumulates of the built network, by torch's own counter (2 FLOPs each)."""
    network = Network(space, path).eval()
    images = torch.zeros(1, space.in_channels, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return sum(parameter.numel() for parameter in network.parameters()), flops // 2


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("GreedyNAS-A", 6.503, 370.0), ("GreedyNAS-B", 5.208, 323.5), ("GreedyNAS-C", 4.741, 284.3)],
)
def test_published_architectures_cost_what_is_published(name, params, macs):
    space = get_space(PUBLISHED_SPACE)
    path = space.encode(PUBLISHED[name])
    assert round(space.params(path) / 1e6, 3) == params
    assert round(space.macs(path, 224) / 1e6, 1) == macs


@pytest.mark.parametrize("name", available_spaces())
@pytest.mark.parametrize(
    "changes", [{}, {"in_channels": 2, "num_classes": 37, "resolution": 31}, {"resolution": 17, "in_channels": 4}]
)
def test_costs_agree_with_a_counter_of_the_built_network(name, changes):
    space = get_space(name, **changes)
    paths = random_paths(space, 2 if space.resolution < 100 else 1, seed=len(changes))
    built = [counted(space, path, space.resolution) for path in paths]
    assert list(zip(space.params(paths), space.macs(paths), strict=True)) == built


def test_every_operation_of_every_layer_agrees_with_the_counter():
    space = get_space(PUBLISHED_SPACE, num_classes=3)
    for op in range(space.num_operations):  # constant paths: each operation once in each layer
        path = [op] * space.num_layers
        assert (space.params(path), space.macs(path, 45)) == counted(space, path, 45)


def test_other_squeeze_ratios_and_expansions_agree_with_the_counter():
    operations = tuple(Operation.parse(name) for name in ("e1k3s", "e2k9", "e5k1s"))
    space = replace(get_space("mini-16"), operations=operations, se_ratio=0.1)
    path = [0, 1, 2, 0, 1, 2, 0, 1]
    assert (space.params(path), space.macs(path, 11)) == counted(space, path, 11)


def test_resolution_changes_macs_and_not_params():
    space = get_space("mini-28")
    path = [2] * space.num_layers
    assert space.macs(path) == space.macs(path, 28) == space.macs(path, resolution=28)
    assert space.macs(path, 27) < space.macs(path, 28)
    for resolution in (1, 27, 29, 112):
        assert space.macs(path, resolution) == counted(space, path, resolution)[1]


def test_one_path_gives_an_int_and_many_give_a_list():
    space = get_space("mini-16")
    paths = random_paths(space, 3, seed=5)
    for cost in (space.macs, space.params):
        many = cost(paths)
        assert [type(value) for value in many] == [int] * 3
        assert [cost(path) for path in paths] == many
        assert [cost(tuple(path.tolist())) for path in paths] == many
        assert cost(paths.tolist()) == many
        assert type(cost(paths[0])) is int
        assert cost(paths[:1]) == many[:1]
        assert cost(paths[:0]) == []


def test_mean_cost_of_a_uniform_path_of_mbv2_7():
    space = get_space("mbv2-7")
    table = space.cost_table()

    def mean(kind):
        per_layer = [sum(getattr(cost, kind) for cost in layer) / len(layer) for layer in table.operations]
        return getattr(table.fixed, kind) + sum(per_layer)

    assert round(mean("dense_macs") / 1e6, 1) == 337.6
    assert round(mean("depthwise_macs") / 1e6, 1) == 71.9
    assert round(mean("macs") / 1e6, 1) == 409.5
    drawn = space.macs(random_paths(space, 20_000, seed=1))
    assert sum(drawn) / len(drawn) == pytest.approx(409.5e6, rel=2e-3)  # six standard errors


def macro_costs():
    space = get_space("macro")
    paths = torch.tensor(list(itertools.product(range(3), repeat=8)))
    names = ["".join(map(str, path)) for path in paths.tolist()]
    return list(zip(names, space.params(paths), space.macs(paths), strict=True))


def test_nas_bench_macro_digest():
    lines = "".join(f"{name},{params},{macs}\n" for name, params, macs in macro_costs())
    assert hashlib.sha256(lines.encode()).hexdigest() == BENCHMARK_DIGEST


def benchmark_file():
    """The table, in the folder the environment names or in a `data` folder beside the checkout."""
    named = os.environ.get("GREEDYNAS_BENCHMARK_DATA")
    beside = sorted(Path(__file__).resolve().parents[3].glob(f"*/data/{BENCHMARK}"))
    files = [Path(named) / BENCHMARK] if named else beside
    if not files:
        pytest.skip(f"needs {BENCHMARK}: set GREEDYNAS_BENCHMARK_DATA to its folder")
    return files[0]


def test_nas_bench_macro_row_by_row():
    with gzip.open(benchmark_file(), "rt", encoding="utf-8") as file:
        rows = [(row["path"], int(row["params"]), int(row["macs"])) for row in csv.DictReader(file)]
    assert len(rows) == 6561
    assert rows == macro_costs()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ([0] * 7, ValueError, r"path: expected 8 operation indices \(one per layer\), got 7"),
        ([[[0] * 8]], TypeError, r"path\[0\]\[0\]: expected an integer, got list"),
        ([0.0] * 8, TypeError, r"path\[0\]: expected an integer, got float 0.0"),
        (torch.zeros(8), TypeError, r"path: expected int64 \[8\] .* got float32 \[8\]"),
        (torch.zeros(1, 1, 8).long(), ValueError, r"path: expected int64 \[m, 8\] .* got int64 \[1, 1, 8\]"),
        ([], ValueError, "path: expected 8 operation indices"),
        (None, TypeError, r"path: expected int64 \[L\] or a sequence of ints, got NoneType"),
        ([0] * 7 + [7], ValueError, r"path\[7\]: expected an operation index of 0 to 6, got 7"),
        ([[0] * 8, [-1] * 8], ValueError, r"path\[1\]\[0\]: .* got -1"),
    ],
)
def test_costs_refuse_what_is_no_path(path, error, message):
    space = get_space("mini-16")
    for cost in (space.macs, space.params):
        with pytest.raises(error, match=message):
            cost(path)


def test_costs_refuse_a_wrong_resolution():
    space = get_space("mini-16")
    with pytest.raises(ValueError, match="resolution: expected at least 1, got 0"):
        space.macs([0] * 8, resolution=0)
    with pytest.raises(TypeError, match="resolution: expected an integer, got float"):
        space.macs([0] * 8, resolution=8.0)
