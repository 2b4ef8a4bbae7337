"""What torch.profiler shows of an evaluation, and what profile=True counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from foreign_supernets import FOREIGN, covering, make
from supernets import draw_images
from test_fused_spaces import POLICIES, calibration_for, covering_paths, small_supernet
from torch.profiler import ProfilerActivity, profile

from greedynas_ext import adapt, evaluate_paths, ranges
from greedynas_ext.arguments import Chain
from greedynas_ext.fused_chain import FusedChain
from greedynas_ext.plan import Trie

PREFIX = "greedynas: "


def traced(function: Any) -> tuple[Any, Counter[str]]:
    """What `function` returns, and how often each range of ours was recorded."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        result = function()
    names = Counter(event.name for event in recorded.events() if event.name.startswith(PREFIX))
    return result, Counter({name.removeprefix(PREFIX): count for name, count in names.items()})


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_each_layer_of_a_fused_evaluation_has_its_range(bn: Any) -> None:
    net = small_supernet(torch.float32)
    paths, (images, targets) = covering_paths(net), draw_images(3, 17, dtype=torch.float32)
    expected = evaluate_paths(net, paths, images, targets, bn=bn, per_image=True)
    result, names = traced(lambda: evaluate_paths(net, paths, images, targets, bn=bn, per_image=True))
    assert torch.equal(result.image_losses, expected.image_losses)
    assert result.plan == expected.plan
    assert names.pop("stem") == 1
    assert names.pop("pack weights") == 1
    counts = Counter(name.split(":")[0] for name in names.elements())
    assert counts == {f"layer {number}": nodes for number, nodes in enumerate(result.plan.nodes_per_layer)}
    for layer, op in set(enumerate(paths[0].tolist())):
        end = ", head and loss" if layer == 2 else ""
        assert names[f"layer {layer}: supernet.choices[{layer}][{op}]{end}"] >= 1


@pytest.mark.parametrize("name", ["keyed", "elastic"])
def test_each_layer_of_modules_has_its_range(name: str) -> None:
    view = adapt(make(name), **FOREIGN[name].arguments)
    paths, batch = covering(FOREIGN[name].sizes), draw_images(3, 24)
    evaluate_paths(view, paths, *batch)  # verified
    result, names = traced(lambda: evaluate_paths(view, paths, *batch, profile=True))
    assert names.pop("loss") >= 1
    counts = Counter(entry.split(":")[0] for entry in names.elements())
    assert counts == {stage.stage: stage.calls for stage in result.profile if stage.stage != "loss"}


def test_time_in_a_trace_stands_under_the_ranges() -> None:
    view = adapt(make("keyed"), **FOREIGN["keyed"].arguments)
    paths, batch = covering(FOREIGN["keyed"].sizes), draw_images(3, 24)
    evaluate_paths(view, paths, *batch)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        evaluate_paths(view, paths, *batch)
    inside = [event for event in recorded.events() if event.name in ("aten::conv2d", "aten::max_pool2d")]
    assert inside
    for event in inside:
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith(PREFIX):
            parent = parent.cpu_parent
        assert parent is not None
        alone = (f"{PREFIX}stem", f"{PREFIX}head", f"{PREFIX}fixed")
        assert ": supernet.choices[" in parent.name or parent.name.startswith(alone)


def test_nothing_is_recorded_where_no_profiler_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError(f"a range was made: {arguments}")

    monkeypatch.setattr(ranges, "record_function", fail)
    net = small_supernet()
    for fused in (True, False):
        evaluate_paths(net, covering_paths(net), *draw_images(3, 17), fused=fused)
    assert ranges.named("one") is ranges.named("another")
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(AssertionError, match="a range was made"):
        evaluate_paths(net, covering_paths(net), *draw_images(3, 17))


def test_nvtx_ranges_are_pushed_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda.nvtx, "range", seen.append)
    ranges.named("layer 3", torch.device("cuda"))
    ranges.named("layer 3", torch.device("cpu"))
    assert seen == ["greedynas: layer 3"]


KERNELS = {"statistics", "expand and depthwise", "squeeze-excitation", "project", "finish"}


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("fused", [True, False])
def test_parts_of_stages(bn: Any, fused: bool) -> None:
    net = small_supernet(torch.float32)
    paths, (images, targets) = torch.tensor([[0, 0, 0], [1, 2, 1], [1, 3, 1]]), draw_images(4, 33, dtype=torch.float32)
    options: dict[str, Any] = {"bn": bn, "calibration": calibration_for(bn, images), "fused": fused}
    result = evaluate_paths(net, paths, images, targets, profile=True, **options)
    assert result.profile is not None
    stages = {stage.stage: stage for stage in result.profile}
    for stage in result.profile:
        assert all(seconds > 0 for seconds in stage.parts.values())
        assert sum(stage.parts.values()) <= stage.seconds * (1 + 1e-9)
    if not fused:
        assert set(stages["layer 1"].parts) == {f"supernet.choices[1][{op}]" for op in (0, 2, 3)}
        assert set(stages["stem"].parts) == {"supernet.stem"}
        assert all(sum(stage.parts.values()) == pytest.approx(stage.seconds) for stage in result.profile)
        return
    known, measured = {"block"}, KERNELS
    expected = {"batch": measured, "running": known, "recalibrated": known | measured}[bn]
    assert set(stages["layer 2"].parts) == expected
    assert set(stages["layer 0"].parts) == expected
    assert "convolution" in stages["stem"].parts
    assert stages["loss"].parts == {}


def test_parts_of_a_block_without_squeeze_excitation() -> None:
    net = small_supernet(torch.float32)
    result = evaluate_paths(net, [[0, 3, 0]], *draw_images(4, 33, dtype=torch.float32), profile=True)
    assert result.profile is not None
    stages = {stage.stage: stage for stage in result.profile}
    assert set(stages["layer 0"].parts) == KERNELS - {"squeeze-excitation"}
    assert stages["layer 1"].parts == {}  # an identity


def test_bytes_of_outputs_follow_from_shapes() -> None:
    """What the GPU's profile says is what the CPU's kernels count."""
    net = small_supernet(torch.float32)
    paths, (images, targets) = covering_paths(net), draw_images(3, 17, dtype=torch.float32)
    chain = Chain.of(net)
    trie = Trie(paths)
    described = FusedChain.of(chain, trie, torch.device("cpu"))
    assert isinstance(described, FusedChain)
    stem, nodes, classes = described.output_numbers(trie, (17, 17))
    stages = evaluate_paths(net, paths, images, targets, profile=True).profile
    assert stages is not None
    layers = [sum(size for node, size in zip(trie.nodes, nodes, strict=True) if node.layer == at) for at in range(3)]
    leaves = len(set(trie.leaf_of_path))
    assert [stage.bytes for stage in stages] == [12 * size for size in (stem, *layers, leaves * classes, leaves)]
