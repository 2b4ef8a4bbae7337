"""Whole evaluations by the CUDA kernels: losses of many paths against a plain loop over the modules in float64."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_elastic import ONCE, set_once
from foreign_supernets import covering, make, once, own_losses
from precisions import of_all, of_both
from supernets import draw_images
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from greedynas import Supernet
from greedynas.layers import Layer, Operation
from greedynas.spaces import Space
from greedynas_ext import _library, adapt, arguments, evaluate, evaluate_paths, fused, fused_cuda
from greedynas_ext.arguments import Chain
from greedynas_ext.fused_chain import FusedChain
from greedynas_ext.fused_cuda import CudaEngine
from greedynas_ext.plan import Trie


def make_net(operations: str, activation: str = "relu6", seed: int = 0) -> Supernet:
    """Channels that fill no vector, a fixed block without expansion, strides, residuals, identities of both kinds."""
    space = Space(
        name="small",
        in_channels=3,
        num_classes=7,
        resolution=17,
        stem_channels=12,
        stem_stride=2,
        fixed=(Layer(12, 10, 1),),
        layers=(Layer(10, 20, 2), Layer(20, 20, 1), Layer(20, 28, 2), Layer(28, 28, 1)),
        operations=tuple(Operation.parse(name) for name in operations.split()),
        head_channels=40,
        activation=activation,
    )
    net = Supernet(space, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.normal_(0.0, 0.3, generator=generator)
        net.head.linear.weight.normal_(0.0, 0.1, generator=generator)
    return net


class EmulatedEngine(CudaEngine):
    """The same engine, its kernels executed on the host."""

    def _on_device(self) -> Any:
        return nullcontext()

    def _stream(self) -> int:
        return 0

    def _event(self) -> Any:
        return None

    def _free_memory(self) -> int:
        return 0


@pytest.fixture
def on_device(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluates with the kernels under test; everything given and returned is on the CPU."""
    monkeypatch.setattr(_library, "require_cuda", lambda: cuda.module)
    if cuda.device.type == "cpu":
        monkeypatch.setattr(evaluate, "FusedEngine", EmulatedEngine)
        monkeypatch.setattr(arguments, "check_precision", lambda precision, device: None)
        monkeypatch.setattr(evaluate, "refused", lambda images, precision, device: None)

    def run(net: nn.Module, paths: Tensor, images: Tensor, targets: Tensor, **kwargs: Any) -> Any:
        moved = {key: value.to(cuda.device) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        net = copy.deepcopy(net).to(cuda.device)
        batch = images.to(cuda.device), targets.to(cuda.device)
        result = evaluate_paths(net, paths, *batch, precision=cuda.precision, fused=True, **moved)
        assert result.plan.kernels == f"fused, CUDA, {cuda.precision}"
        return result

    return run


def draw(count: int, size: tuple[int, int] = (19, 17), seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, *size, generator=generator) * 1.3 + 0.2
    return images, torch.randint(7, (count,), generator=generator)


@dataclass(frozen=True)
class Exact:
    """What a plain loop over the modules gives in float64."""

    losses: Tensor
    image_losses: Tensor


def exact_losses(
    net: Any,
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    *,
    bn: str = "batch",
    calibration: Tensor | None = None,
    label_smoothing: float = 0.0,
    per_image: bool = True,
) -> Exact:
    """Each path by itself; BatchNorm by the statistics of the images, the stored ones, or the calibration's."""
    net = copy.deepcopy(net).double().eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]

    def use_those_of(module: nn.Module, inputs: tuple[Tensor]) -> None:
        module.running_mean = inputs[0].mean((0, 2, 3))
        module.running_var = inputs[0].var((0, 2, 3), unbiased=False)

    def logits(path: Tensor, x: Tensor, of_batch: bool) -> Tensor:
        hooks = [norm.register_forward_pre_hook(use_those_of) for norm in norms] if of_batch else []
        x = net.stem(x.double())
        for layer, op in zip(net.choices, path.tolist(), strict=True):
            x = layer[op](x)
        x = net.head(x)
        for hook in hooks:
            hook.remove()
        return x

    rows = []
    with torch.no_grad():
        for path in paths:
            if calibration is not None:
                logits(path, calibration, True)
            found = logits(path, images, bn == "batch")
            rows.append(F.cross_entropy(found, targets, reduction="none", label_smoothing=label_smoothing))
    image_losses = torch.stack(rows)
    return Exact(image_losses.mean(1), image_losses)


def drawn_paths(net: Any, count: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(len(layer), (count,), generator=generator) for layer in net.choices], 1)


# Rounding maps to bfloat16 (2^-9 relative) in a dozen places, each renormalised by BatchNorm, moves logits of size 1
# by about 1e-2, and losses of 2 by about as much; a wrong weight, tap, or statistic moves them by tenths. In half
# precision it is an eighth of that, and what depthwise convolutions add, whose sums are halves in both cases (1e-3
# relative, test_expand_depthwise.py). In single precision losses are found to 1e-5 (7e-7 at most, here).
TOLERANCES = {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-5}


def check(result: Any, expected: Any) -> None:
    tolerance = TOLERANCES[result.plan.kernels.split()[-1]]
    losses, image_losses = result.losses.double().cpu(), result.image_losses.double().cpu()
    assert expected.image_losses.std(0).mean() > 0.05, "paths differ, so a mix-up would show"
    assert float((losses - expected.losses).abs().max()) < tolerance
    assert float((image_losses - expected.image_losses).abs().max()) < 10 * tolerance
    assert float((image_losses - expected.image_losses).pow(2).mean().sqrt()) < 1.5 * tolerance


POLICIES = ["batch", "running", "recalibrated"]
NETS = [("e3k3 e6k5 id", "relu6"), ("e6k7 e3k5s id", "hswish"), ("e1k3 e3k3s id", "silu"), ("e6k3 e3k7 id", "relu")]
CASES = [(precision, *net, bn) for precision in ("bf16", "fp32") for net in NETS for bn in POLICIES]
CASES += [("fp16", *net, bn) for net, bn in zip(NETS, [*POLICIES, "batch"], strict=True)]
CASES += [
    ("fp16 on sm_75", *net, bn) for net, bn in zip(NETS, ["recalibrated", "batch", "batch", "running"], strict=True)
]
CASES += [("fp32 on sm_75", *net, "batch") for net in NETS[1:3]]


@pytest.mark.parametrize(("cuda", "operations", "activation", "bn"), CASES, indirect=["cuda"])
def test_losses_are_those_of_the_modules(on_device: Any, operations: str, activation: str, bn: str) -> None:
    net = make_net(operations, activation)
    images, targets = draw(9)
    paths = drawn_paths(net, 4)
    kwargs: dict[str, Any] = {"bn": bn, "per_image": True, "label_smoothing": 0.1}
    if bn == "recalibrated":
        kwargs["calibration"] = draw(11, seed=8)[0]
    check(on_device(net, paths, images, targets, **kwargs), exact_losses(net, paths, images, targets, **kwargs))


@of_all
def test_each_operation_by_itself(on_device: Any) -> None:
    net = make_net("e3k3 e6k7 id")
    images, targets = draw(6)
    paths = torch.tensor([[op] * 4 for op in range(3)])
    check(
        on_device(net, paths, images, targets, per_image=True),
        exact_losses(net, paths, images, targets, per_image=True),
    )


@of_all
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_activations_that_differ_between_stages(on_device: Any, bn: str) -> None:
    """Nothing after the depthwise convolution, an activation after the projection."""
    net: Any = make_net("e3k3 e6k5s id")
    for layer in net.choices:
        for number, op in enumerate(list(layer)[:2]):
            op.depthwise = nn.Sequential(*list(op.depthwise.children())[:2])
            op.project = nn.Sequential(op.project, (nn.ReLU(), nn.Hardswish())[number])
    images, targets = draw(6)
    paths = drawn_paths(net, 3)
    kwargs: dict[str, Any] = {"bn": bn, "per_image": True}
    check(on_device(net, paths, images, targets, **kwargs), exact_losses(net, paths, images, targets, **kwargs))


@of_both
def test_layer_by_layer_and_depth_first_agree_bit_for_bit(on_device: Any) -> None:
    net = make_net("e3k3 e6k5 id")
    images, targets = draw(5)
    paths = drawn_paths(net, 6)
    first = on_device(net, paths, images, targets, max_memory=1 << 40)
    assert first.plan.traversal == "layer-by-layer"
    smallest = 0
    try:
        on_device(net, paths, images, targets, max_memory=1)
    except ValueError as error:
        smallest = int(str(error).split("at least ")[1].split()[0])
    second = on_device(net, paths, images, targets, max_memory=smallest)
    assert second.plan.traversal == "depth-first"
    assert torch.equal(first.losses, second.losses)


@of_both
def test_strides_of_the_images_change_nothing(on_device: Any) -> None:
    net = make_net("e3k3 id")
    images, targets = draw(5)
    paths = drawn_paths(net, 2)
    expected = on_device(net, paths, images, targets).losses
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(on_device(net, paths, channels_last, targets).losses, expected)
    wider = torch.zeros(5, 3, 19, 40)
    wider[..., ::2][..., :17] = images
    assert torch.equal(on_device(net, paths, wider[..., ::2][..., :17], targets).losses, expected)


def test_targets_out_of_range(on_device: Any) -> None:
    net = make_net("e3k3 id")
    images, targets = draw(5)
    targets[3] = 7
    with pytest.raises(ValueError, match="targets: expected classes in"):
        on_device(net, drawn_paths(net, 2), images, targets)


@of_all
@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_weights_scaled_by_batch_norm_away(on_device: Any, factor: float) -> None:
    """Weights of all convolutions times 1e-5 or 1e5: BatchNorm with a small eps takes it away again."""
    net = make_net("e3k3 e6k5 id")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-20
    images, targets = draw(6)
    paths = drawn_paths(net, 3)
    expected = exact_losses(net, paths, images, targets, per_image=True)
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        for module in scaled.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(factor)
    check(on_device(scaled, paths, images, targets, per_image=True), expected)


@of_all
@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite(on_device: Any, value: float, bn: str) -> None:
    """It shows in the paths that use it, as in the modules, and in no others."""
    net = make_net("e3k3 e6k5 id")
    images, targets = draw(5)
    paths = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]])
    clean = on_device(net, paths, images, targets, bn=bn).losses
    with torch.no_grad():
        next(m for m in net.choices[1][1].modules() if isinstance(m, nn.Conv2d)).weight[3, 2] = value
    found = on_device(net, paths, images, targets, bn=bn).losses
    expected = exact_losses(net, paths, images, targets, bn=bn).losses
    assert torch.equal(found.isnan().cpu(), expected.isnan())
    if math.isnan(value) or bn == "batch":  # ReLU6 limits what is infinite
        assert expected.isnan().tolist() == [True, False, True]
    assert torch.equal(found[1], clean[1])


@pytest.mark.parametrize("cuda", ["fp16"], indirect=True)
def test_activations_beyond_half_precision_are_infinite(on_device: Any) -> None:
    """As in torch's half precision; in bfloat16 they are not."""
    net = make_net("e3k3 e6k5 id")
    images, targets = draw(5)
    with torch.no_grad():
        next(m for m in reversed(list(net.choices[1][0].modules())) if isinstance(m, nn.BatchNorm2d)).weight.fill_(1e6)
    losses = on_device(net, torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]]), images, targets).losses
    assert losses.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("cuda", ["fp16", "fp16 on sm_75"], indirect=True)
def test_images_of_any_scale(on_device: Any) -> None:
    """The stem's sums stay within half precision for images of some thousands, and of some thousandths."""
    net = make_net("e3k3 id")
    net.stem[0].weight.data.abs_()
    for module in net.stem.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-20
    images, targets = draw(5)
    paths = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]])
    for scale in (1e-3, 3e3):
        scaled = images * scale
        expected = exact_losses(net, paths, scaled, targets, per_image=True)
        check(on_device(net, paths, scaled, targets, per_image=True), expected)


def test_which_precision_a_supernet_on_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {dtype: fused.fused_precision(dtype, None, "cuda") for dtype in (torch.float16, torch.bfloat16)}
    assert found == {torch.float16: "fp16", torch.bfloat16: "bf16"}
    assert fused.fused_precision(torch.float16, None, "cpu") == "a supernet of torch.float16 is not computed"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    assert fused.fused_precision(torch.float32, None, "cuda") == "fp16"
    assert fused.fused_precision(torch.float32, "bf16", "cuda") == "bf16"


@pytest.mark.parametrize(
    ("precision", "capability", "reason"),
    [
        ("fp16", (7, 5), None),
        ("fp32", (7, 5), None),
        ("bf16", (8, 0), None),
        (
            "bf16",
            (7, 5),
            "bf16 on a GPU of compute capability 7.5 (the CUDA kernels need 8.0 for it; fp32 and fp16 need 7.5)",
        ),
        ("fp16", (7, 0), "fp16 on a GPU of compute capability 7.0 (the CUDA kernels need 7.5 for it)"),
    ],
)
def test_what_a_gpu_can_compute(
    precision: str, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fused.cuda_refused(precision, torch.device("cuda")) == reason


def test_a_stride_of_three_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device, net = torch.device("cpu"), make_net("e3k3")
    monkeypatch.setattr(fused_cuda, "most_inputs", lambda device, precision: (400, 1300))
    for module in net.choices[2].modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.stride = (3, 3)
    described = FusedChain.of(Chain.of(net), Trie(torch.zeros(1, 4, dtype=torch.int64)), device)
    assert isinstance(described, FusedChain)
    reason = fused_cuda.unsupported(described, device, "fp16")
    assert reason == "supernet.choices[2][0]: stride 3 (the CUDA kernels have 1 and 2)"


def test_more_input_channels_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device, net = torch.device("cpu"), make_net("e3k3")
    described = FusedChain.of(Chain.of(net), Trie(torch.zeros(1, 4, dtype=torch.int64)), device)
    assert isinstance(described, FusedChain)
    assert fused_cuda.unsupported(described, device, "fp32") is None  # whatever the device
    monkeypatch.setattr(fused_cuda, "most_inputs", lambda device, precision: (28, 1300))
    assert fused_cuda.unsupported(described, device, "fp16") is None
    monkeypatch.setattr(fused_cuda, "most_inputs", lambda device, precision: (16, 1300))
    reason = fused_cuda.unsupported(described, device, "fp16")
    assert reason == "supernet.choices[1][0]: 20 input channels (on this GPU the CUDA kernels take 16)"
    monkeypatch.setattr(fused_cuda, "most_inputs", lambda device, precision: (400, 24))
    reason = fused_cuda.unsupported(described, device, "fp16")
    assert reason == "supernet.head: 28 input channels (on this GPU the CUDA kernels take 24)"


def test_both_native_modules_are_loaded_at_once(cuda: Any) -> None:
    """They bind types of the same names."""
    assert _library.require_chain().Statistics.BATCH is not cuda.module.Statistics.BATCH


def test_a_profiler_sees_the_stages_by_their_names(on_device: Any) -> None:
    net = make_net("e3k3 e6k5 id")
    paths, batch = drawn_paths(net, 4), draw(3)
    expected = on_device(net, paths, *batch, per_image=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        result = on_device(net, paths, *batch, per_image=True)
    assert torch.equal(result.image_losses, expected.image_losses)
    names = [event.name for event in recorded.events() if event.name.startswith("greedynas: ")]
    stages = [name.removeprefix("greedynas: ") for name in names if "pack" not in name]
    assert set(stages) == {"stem", "layer 0", "layer 1", "layer 2", "layer 3", "head", "loss"}
    assert stages[0] == "stem"
    assert stages.count("stem") == 1


@of_all
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_elastic_networks(cuda: Any, on_device: Any, bn: Any) -> None:
    """Weights that are computed of parameters, for each path of its own, are packed on the device."""
    net, (images, targets) = make("once for all"), draw_images(4, 20)
    paths = covering(tuple(map(len, ONCE)))
    expected = own_losses(net, once, paths, images, targets, bn)
    view = adapt(net.float().to(cuda.device), choices=ONCE, select=set_once)
    batch = images.float().to(cuda.device), targets.to(cuda.device)
    result = evaluate_paths(view, paths, *batch, bn=bn, per_image=True, precision=cuda.precision)
    assert result.plan.kernels == f"fused, CUDA, {cuda.precision}"
    tolerance = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.05}[cuda.precision]
    torch.testing.assert_close(result.image_losses.double().cpu(), expected, rtol=tolerance, atol=tolerance)
