"""Hand-written supernets for the tests of `evaluate_paths`, and the plain loop that they are compared with.

The loop runs deep copies of the unmodified modules one path after the other and shares no code with greedynas_ext.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operation = Callable[[Tensor], Tensor]


class Chain(nn.Module):
    """The contract: stem, choices[layer][op], head. Functions may stand for modules."""

    def __init__(self, stem: Operation, choices: Sequence[Sequence[Operation]], head: Operation) -> None:
        super().__init__()
        self.stem, self.head = stem, head
        if all(isinstance(op, nn.Module) for layer in choices for op in layer):
            self.choices: Any = nn.ModuleList(nn.ModuleList(layer) for layer in choices)
        else:
            self.choices = [list(layer) for layer in choices]
            self.registered = nn.ModuleList(op for layer in choices for op in layer if isinstance(op, nn.Module))


# Operations that keep the shape [N, channels, H, W] -----------------------------------------------------------------


class Function(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Operation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualInPlace(Residual):
    """Adds into its input: what `x += f(x)` does."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        x += y
        return x


class Attention(nn.Module):
    """Pixels attend to pixels, with dropout in the attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        normal = self.norm(tokens)
        attended, _ = self.attention(normal, normal, normal, need_weights=False)
        return (tokens + attended).transpose(1, 2).reshape(x.shape)


class DotProduct(nn.Module):
    """The functional attention, and the products that people write by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(channels, channels) / channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        keys = torch.einsum("nlc,cd->nld", tokens, self.key)
        out = F.scaled_dot_product_attention(tokens, keys, tokens @ self.key)
        return out.transpose(1, 2).reshape(x.shape)


class FunctionalBatchNorm(nn.Module):
    """Statistics and affine parameters of its own, normalised by the function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)
        self.shift = nn.Parameter(torch.randn(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.scale, self.shift, self.training, 0.3, 1e-3)


class RawBatchNorm(FunctionalBatchNorm):
    """`torch.batch_norm`, whose arguments stand in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, self.scale, self.shift, self.mean, self.variance, self.training, 0.3, 1e-3, False)


class ElasticBatchNorm(nn.BatchNorm2d):
    """Normalises the first channels that come with a slice of its statistics, as slimmable networks do."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        training = self.training or self.running_mean is None
        return F.batch_norm(
            x,
            self.running_mean[:count],
            self.running_var[:count],
            self.weight[:count],
            self.bias[:count],
            training,
            self.momentum,
            self.eps,
        )


class Elastic(nn.Module):
    """Half the channels through a slice of a convolution and of a batch normalisation, the others as they came."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = ElasticBatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        y = self.bn(F.conv2d(x[:, :half], self.conv.weight[:half, :half], padding=1))
        return torch.cat([y, x[:, half:]], 1)


def mirrored(x: Tensor) -> Tensor:
    """An operation that is no module."""
    return torch.roll(x.flip(-1), 1, 2) * 1.5


def conv_bn(channels: int, **kwargs: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels, **kwargs), nn.ReLU6()
    )


def spectral(x: Tensor) -> Tensor:
    return torch.fft.ifft2(torch.fft.fft2(x) * 0.7j).imag + x.mean((2, 3), keepdim=True)


OPERATIONS: dict[str, Callable[[int], Operation]] = {
    "relu in place": lambda c: nn.ReLU(inplace=True),
    "identity": lambda c: nn.Identity(),
    "identities, then in place": lambda c: nn.Sequential(
        nn.Identity(), nn.Sequential(nn.Identity(), nn.Hardswish(inplace=True)), nn.Conv2d(c, c, 1)
    ),
    "empty sequential": lambda c: nn.Sequential(),
    "conv bn": conv_bn,
    "bn first": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, c, 1)),
    "bn without affine": lambda c: conv_bn(c, affine=False),
    "bn without running statistics": lambda c: conv_bn(c, track_running_stats=False),
    "bn with momentum none": lambda c: conv_bn(c, momentum=None),
    "sync bn": lambda c: nn.Sequential(nn.SyncBatchNorm(c), nn.Conv2d(c, c, 1)),
    "group norm": lambda c: nn.Sequential(nn.GroupNorm(2, c), nn.SiLU(inplace=True)),
    "functional bn": FunctionalBatchNorm,
    "raw bn": RawBatchNorm,
    "elastic bn": Elastic,
    "bn 1d": lambda c: Function(lambda x: F.batch_norm(x.flatten(2), None, None, None, None, True).reshape(x.shape)),
    "cumsum": lambda c: nn.Sequential(Function(lambda x: x.cumsum(-1) / x.shape[-1]), nn.BatchNorm2d(c)),
    "spectral": lambda c: Function(spectral),
    "attention": Attention,
    "dot product": DotProduct,
    "residual": Residual,
    "residual in place": ResidualInPlace,
    "add_": lambda c: Function(lambda x: x.add_(0.25)),
    "mul_ of a view": lambda c: Function(_scaled_view),
    "view": lambda c: Function(lambda x: x.view_as(x)),
    "slice": lambda c: Function(lambda x: x[:, :, :, :]),
    "transposed view": lambda c: Function(lambda x: x.transpose(2, 3)),
    "plain function": lambda c: mirrored,
    "dropout": lambda c: nn.Sequential(nn.Dropout(0.5), nn.Conv2d(c, c, 1), nn.Dropout2d(0.3, inplace=True)),
}


def _scaled_view(x: Tensor) -> Tensor:
    x[:, ::2].mul_(-2.0)
    return x


def make_stem(channels: int, in_channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    )


def make_head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Running statistics and affine parameters that are not those of a fresh module."""
    generator = torch.Generator().manual_seed(seed)
    for inner in module.modules():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            if inner.running_mean is not None:
                inner.running_mean.normal_(0.0, 0.5, generator=generator)
                inner.running_var.uniform_(0.5, 2.0, generator=generator)
            if inner.affine:
                with torch.no_grad():
                    inner.weight.uniform_(0.5, 1.5, generator=generator)
                    inner.bias.normal_(0.0, 0.5, generator=generator)


def build(layers: Sequence[Sequence[str]], *, channels: int = 4, classes: int = 5, seed: int = 0) -> Chain:
    """A supernet of the operations named, in float64 and training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Chain(
            make_stem(channels),
            [[OPERATIONS[name](channels) for name in layer] for layer in layers],
            make_head(channels, classes),
        )
    randomise(net, seed)
    return net.double().train()


def odd_supernet(channels: int = 4, classes: int = 5) -> Chain:
    """Every operation above, layers of different lengths, a stride by slicing, a module shared by two layers."""
    names = list(OPERATIONS)
    thirds = [names[0::3], names[1::3], names[2::3]]
    net = build(thirds, channels=channels, classes=classes)
    down = build([["conv bn"]], channels=channels, seed=1).choices[0][0]
    shared = build([["residual"]], channels=channels, seed=2).choices[0][0]
    strided: list[Operation] = [Function(lambda x: x[:, :, ::2, ::2]), nn.Sequential(down, nn.AvgPool2d(2)), _halved]
    choices = [[shared, *net.choices[0]], list(net.choices[1]), strided, [*net.choices[2], shared]]
    return Chain(net.stem, choices, net.head).double().train()


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def draw_paths(net: Any, count: int, seed: int = 0) -> Tensor:
    """[count, layers], uniformly."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(len(layer), (count,), generator=generator) for layer in net.choices]
    return torch.stack(columns, 1)


def draw_images(
    count: int, size: int = 6, *, classes: int = 5, channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(classes, (count,), generator=generator)


# The plain loop -----------------------------------------------------------------------------------------------------


def _copies(net: Any, path: Sequence[int]) -> list[Operation]:
    """Deep copies of the operations of one path; a module that occurs twice stays one module."""
    parts = [net.stem, *(net.choices[layer][op] for layer, op in enumerate(path)), net.head]
    return copy.deepcopy(parts)


def _modules(parts: Sequence[Operation]) -> list[nn.Module]:
    return [inner for part in parts if isinstance(part, nn.Module) for inner in part.modules()]


def _set_training(parts: Sequence[Operation], training: bool) -> None:
    for module in _modules(parts):
        module.training = training and not isinstance(module, nn.modules.dropout._DropoutNd)
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


def _forward(parts: Sequence[Operation], images: Tensor) -> Tensor:
    features = images.clone()
    for part in parts:
        features = part(features)
    return features


@contextlib.contextmanager
def _patched_batch_norm(function: Callable[..., Tensor]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "batch_norm", function)
        patch.setattr(
            torch,
            "batch_norm",
            lambda x, weight, bias, mean, variance, training, momentum, eps, _cudnn: function(
                x, mean, variance, weight, bias, training, momentum, eps
            ),
        )
        yield


def _recalibrated_by_record(parts: Sequence[Operation], images: Tensor, calibration: Tensor) -> Tensor:
    """Each call of a batch normalisation, in order: its biased statistics written down, then used as constants."""
    original = torch.batch_norm
    written: list[tuple[Tensor, Tensor]] = []

    def shaped(vector: Tensor, x: Tensor) -> Tensor:
        return vector.reshape(1, -1, *[1] * (x.dim() - 2))

    def record(x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):  # type: ignore[no-untyped-def]
        values = x.double().transpose(0, 1).flatten(1)
        written.append((values.mean(1), values.var(1, unbiased=False)))
        return original(x, weight, bias, None, None, True, 0.0, eps, False)

    def replay(x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):  # type: ignore[no-untyped-def]
        kept_mean, kept_variance = (shaped(value.to(x.dtype), x) for value in written.pop(0))
        y = (x - kept_mean) / (kept_variance + eps).sqrt()
        return y if weight is None else y * shaped(weight, x) + shaped(bias, x)

    with _patched_batch_norm(record):
        _forward(parts, calibration)
    with _patched_batch_norm(replay):
        logits = _forward(parts, images)
    assert not written
    return logits


def _recalibrated_by_momentum(parts: Sequence[Operation], images: Tensor, calibration: Tensor) -> Tensor:
    """One training pass at momentum 1 leaves the unbiased statistics in the buffers; they are corrected to biased."""
    norms = [module for module in _modules(parts) if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    counts: dict[nn.Module, int] = {}
    handles = [
        norm.register_forward_pre_hook(lambda m, args: counts.__setitem__(m, args[0].numel() // args[0].shape[1]))
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 1.0
    _forward(parts, calibration)
    for handle in handles:
        handle.remove()
    for norm in norms:
        norm.running_var.mul_((counts[norm] - 1) / counts[norm])
    _set_training(parts, False)
    return _forward(parts, images)


@torch.no_grad()
def plain_logits(
    net: Any,
    path: Sequence[int],
    images: Tensor,
    bn: str,
    calibration: Tensor | None = None,
    *,
    by_momentum: bool = False,
) -> Tensor:
    """Logits of one path by a forward of copies of its modules."""
    parts = _copies(net, path)
    _set_training(parts, bn != "running")
    with torch.random.fork_rng(devices=[]):
        if bn != "recalibrated":
            return _forward(parts, images)
        assert calibration is not None
        recalibrated = _recalibrated_by_momentum if by_momentum else _recalibrated_by_record
        return recalibrated(parts, images, calibration)


def plain_image_losses(
    net: Any,
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    bn: str = "batch",
    calibration: Tensor | None = None,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """(losses [m, N], accuracy [m]) of one batch, path by path."""
    losses, accuracy = [], []
    for path in paths.tolist():
        logits = plain_logits(net, path, images, bn, calibration, **kwargs)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses.append(F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none"))
        accuracy.append((logits.argmax(1) == targets).double().mean())
    return torch.stack(losses), torch.stack(accuracy)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual.double() - expected.double()).abs() / expected.double().abs()).max())
