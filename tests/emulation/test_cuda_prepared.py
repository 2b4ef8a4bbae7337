"""`prepare_paths` by the CUDA kernels: launches wait for nothing, and on a GPU a CUDA graph repeats them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_cuda_chain import EmulatedEngine, draw, drawn_paths, make_net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from greedynas_ext import _library, evaluate, evaluate_paths, prepare_paths


@pytest.fixture
def device(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(_library, "require_cuda", lambda: cuda.module)
    if cuda.device.type == "cpu":
        monkeypatch.setattr(evaluate, "FusedEngine", EmulatedEngine)
    return cuda.device


class ReadsNothingBack(TorchDispatchMode):
    """Raises where the program would have to wait for a tensor's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"), name
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # copies to the host
            devices = {value.device for value in (*args, result) if isinstance(value, Tensor) and value.dim()}
            assert len(devices) <= 1, name
        return result


def test_the_mode_finds_what_reads_back() -> None:
    with ReadsNothingBack(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        int(torch.ones(1))


@pytest.mark.parametrize("bn", ["batch", "recalibrated"])
def test_a_launch_reads_nothing_back(device: torch.device, bn: Any) -> None:
    net = make_net("e3k3 e6k5s id").to(device)
    images, targets = (tensor.to(device) for tensor in draw(5))
    options: dict[str, Any] = {"bn": bn, "precision": "bf16", "per_image": True, "k": 1}
    if bn == "recalibrated":
        options["calibration"] = draw(6, seed=8)[0].to(device)
    paths = drawn_paths(net, 3)
    prepared = prepare_paths(net, paths, images, targets, **options)
    next_images, next_targets = (tensor.to(device) for tensor in draw(5, seed=11))
    images.copy_(next_images)
    targets.copy_(next_targets)
    with torch.no_grad():
        net.choices[1][0].depthwise.conv.weight.mul_(-1.5)
    with ReadsNothingBack():
        prepared.launch()
    found, expected = prepared.result(), evaluate_paths(net, paths, images, targets, fused=True, **options)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.image_losses, expected.image_losses)
    assert torch.equal(found.top_k, expected.top_k)


def test_bad_images_and_targets_are_found_by_the_result(device: torch.device) -> None:
    net = make_net("e3k3 id").to(device)
    images, targets = (tensor.to(device) for tensor in draw(5))
    prepared = prepare_paths(net, drawn_paths(net, 2), images, targets, precision="bf16")
    targets[2] = 7
    prepared.launch()
    with pytest.raises(ValueError, match="targets: expected classes in"):
        prepared.result()
    targets[2] = 0
    images[3, 1, 2, 2] = float("inf")
    prepared.launch()
    with pytest.raises(ValueError, match="images: expected finite values, got NaN or infinity in 1 of 5"):
        prepared.result()


def test_a_cuda_graph_repeats_it(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    net = make_net("e3k3 e6k5 id").to(device)
    images, targets = (tensor.to(device) for tensor in draw(9))
    paths = drawn_paths(net, 4)
    prepared = prepare_paths(net, paths, images, targets, precision="bf16")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.launch()
    with pytest.raises(RuntimeError, match="replay the graph"):
        prepared.launch()
    for seed in (5, 6):
        next_images, next_targets = (tensor.to(device) for tensor in draw(9, seed=seed))
        images.copy_(next_images)
        targets.copy_(next_targets)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.1)
        graph.replay()
        found = prepared.result()
        other = copy.deepcopy(net)
        expected = evaluate_paths(other, paths, next_images, next_targets, precision="bf16", fused=True)
        assert torch.equal(found.losses, expected.losses)
    targets[0] = 99
    graph.replay()
    with pytest.raises(ValueError, match="targets: expected classes in"):
        prepared.result()
