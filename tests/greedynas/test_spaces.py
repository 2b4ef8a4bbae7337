"""The spaces' layers and sizes, names to paths and back, and what wrong input is told."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greedynas.layers import Layer, Operation
from greedynas.published import PUBLISHED, PUBLISHED_SPACE
from greedynas.spaces import available_spaces, get_space

NAMES = ["mbv2-7", "mbv2-se-13", "macro", "mini-28", "mini-16"]


def channels_and_strides(name):
    return [(layer.out_channels, layer.stride) for layer in get_space(name).layers]


def test_available_spaces_are_the_documented_ones():
    assert available_spaces() == NAMES
    assert [get_space(name).name for name in NAMES] == NAMES


@pytest.mark.parametrize(
    ("name", "size", "operations"),
    [
        ("mbv2-7", 558545864083284007, "e3k3 e3k5 e3k7 e6k3 e6k5 e6k7 id"),
        (
            "mbv2-se-13",
            247064529073450392704413,
            "e3k3 e3k5 e3k7 e6k3 e6k5 e6k7 e3k3s e3k5s e3k7s e6k3s e6k5s e6k7s id",
        ),
        ("macro", 6561, "id e3k3 e6k5"),
        ("mini-28", 282475249, "e3k3 e3k5 e3k7 e6k3 e6k5 e6k7 id"),
        ("mini-16", 5764801, "e3k3 e3k5 e3k7 e6k3 e6k5 e6k7 id"),
    ],
)
def test_size_and_order_of_operations(name, size, operations):
    space = get_space(name)
    assert space.size == size
    assert isinstance(space.size, int)
    assert [op.name for op in space.operations] == operations.split()


@pytest.mark.parametrize("name", ["mbv2-7", "mbv2-se-13"])
def test_layers_of_mbv2(name):
    space = get_space(name)
    assert (space.stem_channels, space.stem_stride, space.fixed) == (32, 2, (Layer(32, 16, 1),))
    assert channels_and_strides(name) == (
        [(32, 2)] + [(32, 1)] * 3
        + [(40, 2)] + [(40, 1)] * 3
        + [(80, 2)] + [(80, 1)] * 3
        + [(96, 1)] * 4
        + [(192, 2)] + [(192, 1)] * 3
        + [(320, 1)]
    )  # fmt: skip
    assert space.head_channels == 1280
    assert space.resolution == 224


def test_layers_of_the_small_spaces():
    assert channels_and_strides("macro") == [
        (64, 2), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1),
    ]  # fmt: skip
    assert channels_and_strides("mini-28") == (
        [(24, 2), (24, 1), (24, 1), (48, 2), (48, 1), (48, 1), (48, 1), (96, 1), (96, 1), (96, 1)]
    )
    assert channels_and_strides("mini-16") == [
        (16, 1), (16, 1), (24, 2), (24, 1), (24, 1), (40, 2), (40, 1), (40, 1),
    ]  # fmt: skip
    for name in ("macro", "mini-28", "mini-16"):
        assert get_space(name).fixed == ()
        assert get_space(name).stem_stride == 1


def test_activations():
    assert [get_space(name).activation for name in NAMES] == ["relu6", "hswish", "relu", "relu6", "relu6"]


def test_get_space_changes_what_it_is_given_and_nothing_else():
    space = get_space("mini-28", num_classes=7, in_channels=3, resolution=33, activation="silu")
    assert (space.num_classes, space.in_channels, space.resolution, space.activation) == (7, 3, 33, "silu")
    assert replace(space, num_classes=10, in_channels=1, resolution=28, activation="relu6") == get_space("mini-28")
    assert get_space("mini-28").num_classes == 10


def test_a_space_is_a_value():
    space = get_space("mini-16")
    space.macs([0] * 8)  # fills the cache, which must not take part in comparison, hash or copies
    fresh = replace(space)
    assert fresh == space
    assert hash(fresh) == hash(space)
    assert pickle.loads(pickle.dumps(space)) == space
    assert copy.deepcopy(space) == space


@given(data=st.data(), name=st.sampled_from(NAMES))
@settings(max_examples=60)
def test_encode_and_decode_are_inverse(data, name):
    space = get_space(name)
    names = data.draw(st.lists(st.sampled_from([op.name for op in space.operations]), min_size=space.num_layers,
                               max_size=space.num_layers))  # fmt: skip
    path = space.encode(names)
    assert path.dtype == torch.int64
    assert path.shape == (space.num_layers,)
    assert [space.operations[op].name for op in path.tolist()] == names
    assert space.decode(path) == names
    assert space.decode(path.tolist()) == names


@pytest.mark.parametrize("name", ["GreedyNAS-A", "GreedyNAS-B", "GreedyNAS-C"])
def test_published_architectures_are_paths(name):
    space = get_space(PUBLISHED_SPACE)
    assert space.decode(space.encode(PUBLISHED[name])) == list(PUBLISHED[name])


def test_published_architectures_cannot_be_changed():
    with pytest.raises(TypeError):
        PUBLISHED["GreedyNAS-A"] = ()


@pytest.mark.parametrize(
    ("name", "expansion", "kernel", "se", "identity"),
    [("e3k5s", 3, 5, True, False), ("e6k3", 6, 3, False, False), ("e1k11", 1, 11, False, False),
     ("id", 1, 1, False, True)],
)  # fmt: skip
def test_parse_an_operation(name, expansion, kernel, se, identity):
    op = Operation.parse(name)
    assert (op.name, op.expansion, op.kernel, op.se, op.identity) == (name, expansion, kernel, se, identity)


@pytest.mark.parametrize("name", ["", "e3", "k3e3", "e3k5x", "E3K5", "e0k3", "e3k3 ", "e03k3", "identity", "e3k5ss"])
def test_parse_refuses_other_names(name):
    with pytest.raises(ValueError, match="name: expected 'e<expansion>k<kernel>'"):
        Operation.parse(name)


def test_operations_that_make_no_sense():
    with pytest.raises(ValueError, match="an odd kernel"):
        Operation.parse("e3k4")
    with pytest.raises(TypeError, match=r"name: expected an operation's name .* got int"):
        Operation.parse(3)
    with pytest.raises(ValueError, match="'e3k3' does not describe"):
        Operation("e3k3", 6, 3)
    with pytest.raises(ValueError, match="'id' does not describe"):
        Operation("id", 3, 3, identity=True)


@pytest.mark.parametrize("name", ["mbv2", "", "MBV2-7", None])
def test_an_unknown_space_is_told_which_there_are(name):
    with pytest.raises(ValueError, match="name: expected one of mbv2-7, mbv2-se-13, macro, mini-28, mini-16"):
        get_space(name)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ({"in_channels": -1}, ValueError, "in_channels: expected at least 1, got -1"),
        ({"resolution": 2.5}, TypeError, "resolution: expected an integer, got float"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of relu, relu6, hswish, silu, got 'gelu'"),
    ],
)
def test_get_space_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        get_space("macro", **changes)


def test_a_space_must_fit_together():
    space = get_space("macro")
    with pytest.raises(ValueError, match=r"layers\[1\]\.in_channels: expected 64, .* got 32"):
        replace(space, layers=(Layer(32, 64, 1), Layer(32, 64, 1)))
    with pytest.raises(ValueError, match=r"fixed\[0\]\.in_channels: expected 32, .* got 16"):
        replace(space, fixed=(Layer(16, 16, 1),))
    with pytest.raises(ValueError, match="layers: expected at least one layer"):
        replace(space, layers=())
    with pytest.raises(ValueError, match="operations: expected one or more"):
        replace(space, operations=())
    with pytest.raises(ValueError, match=r"each once, got .*'id', 'id'"):
        replace(space, operations=(Operation.parse("id"), Operation.parse("id")))
    with pytest.raises(ValueError, match=r"se_ratio: expected a ratio in \(0, 1\], got 0"):
        replace(space, se_ratio=0.0)
    with pytest.raises(ValueError, match=r"layer\.stride: expected at least 1, got 0"):
        Layer(16, 16, 0)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["id"] * 7, ValueError, r"names: expected 8 \(one operation per layer\), got 7"),
        (["id"] * 6 + ["e3k5", "id"], ValueError, "names: layer 6: expected one of id, e3k3, e6k5 .* got 'e3k5'"),
        (["id"] * 7 + [2], TypeError, "names: layer 7: expected an operation's name, got int"),
        ("id", TypeError, "names: expected 8 operation names, got str 'id'"),
        (None, TypeError, "names: expected 8 operation names, got NoneType"),
    ],
)
def test_encode_refuses(names, error, message):
    with pytest.raises(error, match=message):
        get_space("macro").encode(names)


def test_check_paths_takes_tensors_arrays_and_sequences():
    space = get_space("macro")
    rows = [[0, 1, 2, 0, 1, 2, 0, 1], [2] * 8]
    arrays = [rows, tuple(map(tuple, rows)), np.array(rows), torch.tensor(rows), [torch.tensor(row) for row in rows]]
    for paths in arrays:
        checked = space.check_paths(paths)
        assert checked.dtype == torch.int64
        assert checked.tolist() == rows
    assert space.check_paths(torch.zeros(0, 8, dtype=torch.int64)).shape == (0, 8)
    assert space.check_paths([]).shape == (0, 8)
    assert space.check_path(torch.tensor(rows[0])) == (0, 1, 2, 0, 1, 2, 0, 1)
    assert all(type(op) is int for op in space.check_path(np.array(rows[0])))


INT8 = torch.zeros(2, 8, dtype=torch.int8)
ONE_WRONG = torch.zeros(4, 8, dtype=torch.int64)
ONE_WRONG[2, 5] = 3


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        (torch.zeros(3, 7), ValueError, r"paths: expected int64 \[m, 8\] \(one op.*\), got float32 \[3, 7\]"),
        (torch.zeros(3, 8), TypeError, r"paths: expected int64 \[m, 8\] .* got float32 \[3, 8\]"),
        (INT8, TypeError, r"got int8 \[2, 8\]"),
        (torch.zeros(8, dtype=torch.int64), ValueError, r"got int64 \[8\]"),
        (torch.zeros(1, 2, 8, dtype=torch.int64), ValueError, r"got int64 \[1, 2, 8\]"),
        (torch.tensor(1), ValueError, r"got int64 \[\]"),
        ([[0] * 8, [0] * 7], ValueError, r"paths\[1\]: expected 8 operation indices"),
        ([["id"] * 8], TypeError, r"paths\[0\]\[0\]: expected an integer, got str"),
        ([[2**70] * 8], ValueError, r"paths\[0\]\[0\]: expected an operation index of 0 to 2, got \d+"),
        (None, TypeError, "got NoneType"),
        (np.array([["id"] * 8]), TypeError, r"paths: expected int64 \[m, 8\], got <U2 \[1, 8\]"),
        (np.zeros((2, 8)), TypeError, r"got float64 \[2, 8\]"),
        ([[True] * 8], TypeError, r"paths\[0\]\[0\]: expected an integer, got bool True"),
        (ONE_WRONG, ValueError, r"paths\[2\]\[5\]: expected an operation index of 0 to 2, got 3"),
        ([[0] * 8, [0, -1] + [0] * 6], ValueError, r"paths\[1\]\[1\]: expected .* got -1"),
    ],
)  # fmt: skip
def test_check_paths_refuses(paths, error, message):
    with pytest.raises(error, match=message):
        get_space("macro").check_paths(paths)


def test_check_path_names_the_layer_and_the_argument():
    space = get_space("macro")
    with pytest.raises(ValueError, match=r"winner\[7\]: expected an operation index of 0 to 2, got 9"):
        space.check_path([0] * 7 + [9], argument="winner")
    with pytest.raises(TypeError, match=r"path\[0\]: expected an integer, got list"):
        space.check_path([[0] * 8])
    with pytest.raises(ValueError, match=r"path: expected 8 operation indices \(one per layer\), got 9"):
        space.decode([0] * 9)
