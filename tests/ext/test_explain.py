"""`explain` says what `evaluate_paths` then does, for supernets of every making."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from foreign_supernets import FOREIGN, covering, make
from supernets import build, draw_images, draw_paths, odd_supernet
from test_adapt import assert_same, state_of
from test_fused_fallback import CASES, Seen, change_
from test_fused_spaces import POLICIES, calibration_for, covering_paths, small_supernet, space_supernet
from torch import Tensor, nn

from greedynas_ext import Explanation, adapt, evaluate_paths, explain

FIELDS = (
    "num_paths", "num_layers", "unique_nodes", "nodes_per_layer", "kernels",
    "macs_computed", "macs_saved", "macs_fused", "shared_fraction",
)  # fmt: skip


def check(net: Any, paths: Tensor, images: Tensor, targets: Tensor, bn: Any = "batch", **options: Any) -> Explanation:
    """Explained as it is evaluated; stages are those of the profile, and add up."""
    explained = explain(net, paths, images, bn=bn, **options)
    result = evaluate_paths(
        net, paths, images, targets, bn=bn, calibration=calibration_for(bn, images), profile=True, **options
    )
    for field in FIELDS:
        assert getattr(explained, field) == getattr(result.plan, field), field
    assert result.profile is not None
    measured = {stage.stage: stage for stage in result.profile}
    names = [stage.stage for stage in explained.stages]
    assert len(set(names)) == len(names)
    assert set(names) == set(measured) - {"loss"}
    for stage in explained.stages:
        if bn != "recalibrated":  # whose pass over the calibration images is in the profile
            assert measured[stage.stage].macs == len(images) * stage.macs, stage.stage
            assert measured[stage.stage].calls == stage.nodes, stage.stage
        assert stage.of_paths == len(paths)
        for operation in stage.operations:
            if operation.reason is None:
                whole = explained.kernels.startswith("fused, ")
                assert 0 < operation.macs_fused <= operation.macs or operation.macs == 0 or whole
            else:
                assert operation.macs_fused == 0
            assert 0 < operation.nodes <= operation.of_paths
    totals = {name: sum(getattr(stage, name) for stage in explained.stages) for name in ("macs", "macs_fused", "share")}
    assert totals["macs"] == explained.macs_computed
    assert totals["macs_fused"] == explained.macs_fused
    assert totals["share"] == pytest.approx(1.0)
    assert sum(stage.macs_of_paths for stage in explained.stages) == explained.macs_computed + explained.macs_saved
    return explained


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("name", FOREIGN)
def test_supernets_of_other_makings(name: str, bn: str) -> None:
    net = make(name)
    view = adapt(net, **FOREIGN[name].arguments)
    before = state_of(net)
    explain(view, covering(FOREIGN[name].sizes), draw_images(4, 24)[0], bn=bn)  # type: ignore[arg-type]
    assert_same(before, state_of(net))
    explained = check(view, covering(FOREIGN[name].sizes), *draw_images(4, 24), bn=bn)
    assert explained.fused_fraction >= FOREIGN[name].share
    if view.reason is not None:
        assert set(explained.reasons.values()) == {f"called path by path: {view.reason}"}


@pytest.mark.parametrize("name", ["fairnas", "mutable ops", "elastic"])
@pytest.mark.parametrize("options", [{"fused": False}, {"precision": "bf16"}, {"precision": "fp32"}])
def test_options_of_adapted_supernets(name: str, options: dict[str, Any]) -> None:
    view = adapt(make(name, torch.float32), **FOREIGN[name].arguments)
    images, targets = draw_images(4, 24, dtype=torch.float32)
    explained = check(view, covering(FOREIGN[name].sizes), images, targets, **options)
    if options.get("fused") is False:
        assert explained.macs_fused == 0
        assert set(explained.reasons.values()) == {"fused=False"}


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("fused", [None, False])
def test_recognised_chains(bn: str, fused: bool | None) -> None:
    net = small_supernet(torch.float32)
    explained = check(net, covering_paths(net), *draw_images(3, 17, dtype=torch.float32), bn=bn, fused=fused)
    assert explained.fused_fraction == (0 if fused is False else 1)
    assert bool(explained.reasons) == (fused is False)


@pytest.mark.parametrize("name", ["mbv2-7", "mini-16"])
def test_a_space(name: str) -> None:
    net = space_supernet(name)
    images, targets = draw_images(2, 33, channels=net.space.in_channels, dtype=torch.float32)
    check(net, covering_paths(net), images, targets)


@pytest.mark.parametrize("name", CASES)
def test_refusals(name: str) -> None:
    net, reason = change_(name)
    paths, (images, targets) = covering_paths(net), draw_images(3, 17)
    explained = check(net, paths, images, targets)
    assert explained.kernels.startswith(f"modules: {reason}")
    place, _, why = explained.kernels.removeprefix("modules: ").partition(": ")
    if place != "supernet.choices":
        assert explained.reasons[place] == why
    assert set(explained.reasons) == {operation.place for stage in explained.stages for operation in stage.operations}
    with pytest.raises(ValueError, match=r"^fused: expected a supernet that the fused kernels can evaluate; "):
        explain(net, paths, images, fused=True)


def test_each_operation_has_a_reason_of_its_own() -> None:
    net = small_supernet()
    net.choices[0][1] = nn.Sequential(nn.Conv2d(9, 12, 3, padding=1), nn.PixelShuffle(1)).double()
    net.choices[2][0] = nn.Sequential(nn.Conv2d(12, 20, 1, 2), nn.PReLU(20)).double()
    paths = torch.tensor([[1, 3, 0], [0, 0, 1]])
    reasons = check(net, paths, *draw_images(3, 17)).reasons
    alone = "fused kernels run all of a chain that is not adapted, or nothing"
    assert reasons.pop("supernet.choices[0][1]").startswith("pixel_shuffle: ")
    assert reasons.pop("supernet.choices[2][0]") != alone
    assert set(reasons.values()) == {alone}
    assert set(reasons) == {
        "supernet.stem", "supernet.choices[0][0]", "supernet.choices[1][0]", "supernet.choices[1][3]",
        "supernet.choices[2][1]", "supernet.head",
    }  # fmt: skip


@pytest.mark.parametrize("bn", POLICIES)
def test_odd_operations(bn: str) -> None:
    net = odd_supernet()
    check(net, draw_paths(net, 6), *draw_images(3, 8), bn=bn)


def test_running_statistics_that_are_not_stored() -> None:
    net = small_supernet()
    net.choices[1][0].expand.bn = nn.BatchNorm2d(36, track_running_stats=False, dtype=torch.float64)
    explained = check(net, covering_paths(net), *draw_images(3, 17), bn="running")
    assert set(explained.reasons.values()) == {"a batch normalisation stores no running statistics"}


def test_a_mode_that_wants_to_see_the_modules() -> None:
    net = small_supernet()
    with Seen():
        explained = explain(net, covering_paths(net), draw_images(3, 17)[0])
    assert set(explained.reasons.values()) == {"a torch mode is active, which wants to see what the modules do"}


@pytest.mark.parametrize("name", ["native", "fairnas", "elastic"])
def test_a_resolution_for_images(name: str) -> None:
    net: Any = small_supernet() if name == "native" else adapt(make(name), **FOREIGN[name].arguments)
    paths = covering_paths(net) if name == "native" else covering(FOREIGN[name].sizes)
    by_images = explain(net, paths, draw_images(3, 18)[0])
    assert explain(net, paths, resolution=18) == explain(net, paths, resolution=(18, 18)) == by_images
    assert explain(net, paths, resolution=(18, 24)).macs_computed > by_images.macs_computed


def test_arguments() -> None:
    net = small_supernet()
    paths, (images, _) = covering_paths(net), draw_images(3, 17)
    with pytest.raises(TypeError, match=r"^images: expected either images or resolution=, got none$"):
        explain(net, paths)
    with pytest.raises(TypeError, match=r"^images: expected either images or resolution=, got both$"):
        explain(net, paths, images, resolution=17)
    with pytest.raises(ValueError, match=r"^resolution: "):
        explain(net, paths, resolution=0)
    with pytest.raises(ValueError, match=r"^resolution: expected a number or \(height, width\), got \(1, 2, 3\)$"):
        explain(net, paths, resolution=(1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^images: expected 3 channels, got \[2, 4, 17, 17\]$"):
        explain(net, paths, images.repeat(1, 2, 1, 1)[:, :4])
    with pytest.raises(ValueError, match=r"^bn: "):
        explain(net, paths, images, bn="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^precision: "):
        explain(net, paths, images, precision="fp16")
    functions = type("Net", (), {"stem": torch.relu, "choices": [[torch.relu]], "head": torch.relu})()
    with pytest.raises(TypeError, match=r"^images: expected images, since no convolution says how many channels"):
        explain(functions, [[0]], resolution=8)


def test_bytes_written_by_modules_and_by_kernels() -> None:
    net = build([["conv bn"]])
    explained = explain(net, [[0]], draw_images(2, 6)[0])
    (operation,) = explained.stages[1].operations
    # Convolution, batch normalisation (with the statistics that it saves) and ReLU6 of 4 channels at 6x6 in float64.
    assert 3 * 4 * 36 * 8 <= operation.written <= 3 * 4 * 36 * 8 + 4 * 4 * 8
    small = small_supernet(torch.float32)
    paths = torch.tensor([[0, 0, 0], [0, 0, 3]])
    images = draw_images(2, 17, dtype=torch.float32)[0]
    for bn, numbers in (("batch", 27 + 2 * 12), ("running", 27 + 12)):
        stage = explain(small, paths, images, bn=bn).stages[1]  # type: ignore[arg-type]
        assert stage.written == 4 * 9 * 9 * numbers, bn  # e3k3 from 9 to 12 channels at 9x9
    half = explain(small, paths, images, precision="bf16").stages[1].written
    assert half == 2 * 9 * 9 * (27 + 2 * 12)


def test_text_and_data() -> None:
    net = small_supernet()
    net.choices[1][0].expand.act = nn.GELU()
    paths = covering_paths(net)
    explained = explain(net, paths, resolution=17)
    lines = str(explained).splitlines()
    assert lines[0].startswith(f"{len(paths)} paths of 3 layers on images of 17x17: modules: supernet.choices[1][0]: ")
    assert [line.split()[0] for line in lines[4:9]] == ["stem", "layer", "layer", "layer", "head"]
    assert "not fused:" in lines
    assert any(line.startswith("  supernet.choices[1][0]: ") for line in lines)
    assert all(len(line) < 200 for line in lines)
    data = json.loads(json.dumps(explained.as_dict()))
    assert data["kernels"] == explained.kernels
    assert [stage["stage"] for stage in data["stages"]] == ["stem", "layer 0", "layer 1", "layer 2", "head"]
    assert data["stages"][2]["operations"][0]["reason"] == explained.reasons["supernet.choices[1][0]"]
