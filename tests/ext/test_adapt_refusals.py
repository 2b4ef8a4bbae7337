"""Bad adaptations get an error or a correct slow path, never a wrong number."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from foreign_by_attribute import MixedEdge
from foreign_by_path import FairNet, mb
from foreign_supernets import FOREIGN, by_argument, covering, make, own_losses
from supernets import draw_images, relative_error
from test_adapt import FP64
from test_adapt_told import prepared
from torch import Tensor, nn

from greedynas_ext import adapt, adapt_verify, evaluate_paths


class Small(nn.Module):
    """Two layers of `ops`, on 6 channels."""

    def __init__(self, *ops: nn.Module, layers: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.layers = nn.ModuleList(
            nn.ModuleList([mb(6, 6, 3, 1, 2), *(ops if layer == 0 else [mb(6, 6, 5, 1, 2)])]) for layer in range(layers)
        )
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        x = self.stem(x)
        for ops, op in zip(self.layers, path, strict=True):
            x = ops[op](x)
        return self.fc(x.mean((2, 3)))


def evaluated(net: nn.Module, **kwargs: Any) -> Any:
    view = adapt(net, **kwargs)
    paths = covering(tuple(map(len, view.options)))
    return evaluate_paths(view, paths, *draw_images(4, 20), per_image=True), paths


def check(net: nn.Module, **kwargs: Any) -> Any:
    """Adapted and evaluated, with the losses of its own loop."""
    result, paths = evaluated(net, **kwargs)
    expected = own_losses(net, by_argument, paths, *draw_images(4, 20))
    assert relative_error(result.image_losses, expected) < FP64
    return result


class Counting(nn.Module):
    """Keeps a state between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Remembering(nn.Module):
    """Gives what it was given the time before."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(x)
        return self.last[-2] if len(self.last) > 1 else x


class Meddling(nn.Module):
    """Writes to what another module reads."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.other[0].weight.mul_(1.5)
        return x


class Buffered(nn.Module):
    """A state in a buffer, which evaluation puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * 0.5


@pytest.mark.parametrize("make_op", [Counting, Remembering])
def test_a_state_between_calls(make_op: Any) -> None:
    net = prepared(Small(make_op()))
    with pytest.raises(ValueError, match=r"^supernet: on path .* logits differ from forward's by "):
        evaluated(net)
    with pytest.raises(ValueError, match=r"^supernet: on path .* logits differ from forward's by "):
        adapt(net, example=draw_images(4, 20)[0])
    assert net.layers[0][1].__dict__["calls" if make_op is Counting else "last"] in (0, [])


def test_side_effects_on_a_parameter() -> None:
    net = prepared(Small())
    net.layers[0].append(Meddling(net.layers[1][0][0][0]))
    with pytest.raises(RuntimeError, match="expected a forward that leaves its parameters alone"):
        evaluated(net)


def test_a_buffer_that_is_written_to() -> None:
    net = prepared(Small(Buffered()))
    check(net)
    assert net.layers[0][1].seen == 0


def test_candidates_of_other_shapes() -> None:
    net = prepared(Small(mb(6, 8, 3, 1, 2)))
    with pytest.raises(RuntimeError) as raised:
        evaluated(net)
    assert "channels" in str(raised.value)


def test_a_candidate_of_another_stride() -> None:
    """Correct, as its own forward is: the maps only get smaller."""
    result = check(prepared(Small(mb(6, 6, 3, 2, 2))))
    assert result.plan.macs_fused > 0


@pytest.mark.parametrize("where", ["a candidate", "a list", "an edge"])
def test_modules_shared_between_layers(where: str) -> None:
    net = Small(mb(6, 6, 3, 1, 3), mb(6, 6, 5, 1, 2))
    if where == "a candidate":
        net.layers[1][1] = net.layers[0][2]
    else:
        net.layers[1] = net.layers[0]
    check(prepared(net))


def test_the_same_candidate_twice() -> None:
    net = Small(mb(6, 6, 3, 1, 3))
    net.layers[0].append(net.layers[0][0])
    result = check(prepared(net))
    assert result.plan.nodes_per_layer[0] == 3


def test_hooks_of_candidates_run() -> None:
    net = prepared(Small(mb(6, 6, 5, 1, 2)))
    net.layers[0][1].register_forward_hook(lambda module, args, output: output.abs())
    result = check(net)
    assert "forward hooks are registered" in result.plan.kernels
    assert 0 < result.plan.macs_fused < result.plan.macs_computed


def test_hooks_of_what_chooses_are_refused() -> None:
    net = Small(nn.Identity())
    net.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="forward hooks are registered"):
        adapt(net)
    view = adapt(prepared(net), choices=[2, 2])
    assert view.reason is not None
    check(net, choices=[2, 2])


def test_a_wrong_description_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recognised is compared with the module."""
    net = prepared(Small(mb(6, 6, 5, 1, 2)))
    original = adapt_verify.recognise_operation

    def wrong(module: nn.Module, channels: int) -> Any:
        weights = original(module, channels)
        return weights if module is not net.layers[1][0] else original(net.layers[1][1], channels)

    monkeypatch.setattr(adapt_verify, "recognise_operation", wrong)
    text = r"supernet.choices\[1\]\[0\] is recognised as InvertedBottleneckWeights, which differs by "
    with pytest.raises(ValueError, match=text):
        evaluated(net)
    evaluated(net, verify=False)


# A supernet that changed --------------------------------------------------------------------------------------------


def changes(net: Any) -> dict[str, Any]:
    return {
        "a candidate is replaced": lambda: net.choice_blocks[1].__setitem__(2, mb(6, 10, 3, 2, 2)),
        "a candidate is removed": lambda: net.choice_blocks[2].__delitem__(5),
        "a candidate is added": lambda: net.choice_blocks[2].append(mb(10, 10, 3, 1, 2)),
        "another stem": lambda: setattr(net, "stem", mb(3, 8, 3, 2, 2)),
        "another forward": lambda: setattr(net, "classifier", nn.Sequential(net.classifier)),
        "a hook": lambda: net.register_forward_hook(lambda module, args, output: output * 2),
    }


@pytest.mark.parametrize("change", list(changes(None)))
def test_a_changed_structure_is_noticed(change: str) -> None:
    net = make("fairnas")
    view = adapt(net)
    paths, batch = covering((6, 6, 6)), draw_images(3, 20)
    evaluate_paths(view, paths, *batch)
    changes(net)[change]()
    with pytest.raises(RuntimeError, match=r"^supernet: "):
        evaluate_paths(view, paths, *batch)


def test_another_attribute_of_what_chooses_is_noticed() -> None:
    net = make("scarlet")
    view = adapt(net)
    paths, batch = covering(FOREIGN["scarlet"].sizes), draw_images(3, 20)
    net.depth = 3
    with pytest.raises(RuntimeError, match=r"on path .* forward does something else"):
        evaluate_paths(view, paths, *batch)


def test_other_parameters_in_the_same_modules() -> None:
    net = make("keyed")
    view = adapt(net, output=0)
    paths, (images, targets) = covering((3, 2, 2)), draw_images(3, 20)
    evaluate_paths(view, paths, images, targets)
    net.scale = nn.Parameter(net.scale.detach() * 2)
    net.conv.weight = nn.Parameter(net.conv.weight.detach() * 0.7)
    result = evaluate_paths(view, paths, images, targets, per_image=True)
    expected = own_losses(net, FOREIGN["keyed"].run, paths, images, targets)
    assert relative_error(result.image_losses, expected) < FP64


# What adapt is given ------------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    def forward(self, x: Tensor, mask: Any, path: Any) -> Tensor:
        return x


class TwoAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.ModuleList([nn.Identity(), nn.ReLU()])
        self.one, self.two = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.ops[max(self.one, self.two)](x)


ERRORS: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (TypeError, "module: expected an nn.Module, got function", lambda: by_argument, {}),
    (ValueError, "found none", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), {}),
    (ValueError, r"more than images and a path \(mask, path\)", Unknown, {}),
    (ValueError, "any of 'one', 'two' may choose", TwoAttributes, {}),
    (TypeError, "select: expected a name or a function, got int", FairNet, {"select": 3}),
    (ValueError, "choices: expected the values of each layer's options", FairNet, {"select": lambda *args: None}),
    (TypeError, "choices: expected names", FairNet, {"choices": 3}),
    (ValueError, "choices: expected at least one layer", FairNet, {"choices": []}),
    (
        ValueError,
        r"choices\[1\]: expected the name of a module of the supernet, got 'no'",
        FairNet,
        {"choices": ["stem", "no"]},
    ),
    (ValueError, r"choices\[0\]: expected at least 1 option, got 0", FairNet, {"choices": [0]}),
    (TypeError, r"choices\[0\]: expected a name, a number", FairNet, {"choices": [2.5]}),
    (TypeError, "one of 3 arguments", FairNet, {"choices": lambda a, b, c: True}),
    (ValueError, r"choices\[0\]\[0\]: expected a module of the supernet", FairNet, {"choices": [[nn.ReLU()]]}),
    (
        ValueError,
        r"choices\[0\]\[0\]: expected that this option runs choice_blocks.0.5, which it does not",
        FairNet,
        {"choices": lambda net: [list(ops)[::-1] for ops in net.choice_blocks], "select": "nothing of the kind"},
    ),
    (TypeError, "output: expected an index, a key or a function, got float", FairNet, {"output": 1.5}),
    (
        TypeError,
        "example: expected a floating tensor",
        FairNet,
        {"example": torch.zeros(1, 3, 8, 8, dtype=torch.int64)},
    ),
    (
        ValueError,
        "no attribute of 'ops' was found that chooses",
        TwoAttributes,
        {"choices": ["ops"], "select": "three"},
    ),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_errors_name_what_is_wrong(number: int) -> None:
    kind, text, build, arguments = ERRORS[number]
    if arguments.get("select") == "nothing of the kind":
        arguments = {"choices": arguments["choices"]}
    with pytest.raises(kind, match=text):
        adapt(build(), **arguments)


def test_wrong_paths_are_refused_as_ever() -> None:
    view = adapt(make("fairnas"))
    images, targets = draw_images(3, 20)
    with pytest.raises(ValueError, match=r"paths: expected int64 \[m, 3\]"):
        evaluate_paths(view, torch.zeros(2, 5, dtype=torch.int64), images, targets)
    with pytest.raises(ValueError, match=r"paths\[0\]\[1\]: expected an operation index of 0 to 5, got 6"):
        evaluate_paths(view, [[0, 6, 0]], images, targets)


def test_select_that_fails_or_returns_something_else() -> None:
    net = make("fairnas")
    view = adapt(net, choices=[6, 6, 6], select=lambda module, path: 1 / 0)
    assert view.reason == "select on a shadow: ZeroDivisionError: division by zero"
    with pytest.raises(ZeroDivisionError):
        evaluate_paths(view, covering((6, 6, 6)), *draw_images(3, 20))
    view = adapt(net, choices=[6, 6, 6], select=lambda module, path: 3)
    with pytest.raises(TypeError, match="select: expected a function that returns None, a tuple or a dict"):
        evaluate_paths(view, covering((6, 6, 6)), *draw_images(3, 20))


def test_two_threads_evaluate_a_view() -> None:
    net = make("proxyless")
    view, sizes = adapt(net), FOREIGN["proxyless"].sizes
    paths, batch = covering(sizes), draw_images(3, 20)
    expected = evaluate_paths(view, paths, *batch).losses
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(evaluate_paths(view, paths, *batch).losses)) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(losses, expected) for losses in found)
    assert [edge.active_index for edge in net.modules() if isinstance(edge, MixedEdge)] == [[0]] * 4
