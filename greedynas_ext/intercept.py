"""What a supernet's own modules compute while they are evaluated: batch normalisation by policy, dropout off.

Modules are run as they are. A torch function mode, which lives in the evaluating thread only, sees each call of a
torch function and changes the few that matter: no module, buffer or flag has to be touched for it, and a subclass, a
sliced or a functional batch normalisation is caught as well as `nn.BatchNorm2d`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# mean [C], biased variance [C] of one batch normalisation, in the order in which a module calls them
Statistics: TypeAlias = list[tuple[Tensor, Tensor]]
# "capture" is "batch" that also keeps what it used; "constants" uses what was captured before.
Normalisation: TypeAlias = Literal["batch", "running", "capture", "constants"]

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)
_PRODUCTS: tuple[Callable[..., Tensor], ...] = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm)
_NORMS: tuple[Callable[..., Tensor], ...] = (F.layer_norm, F.group_norm, F.instance_norm, F.prelu)
_DROPOUTS: tuple[Callable[..., Tensor], ...] = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.feature_dropout,
)


class Interceptor(TorchFunctionMode):
    """Carries out a batch normalisation policy and counts operations while supernet modules run.

    Attributes:
        normalisation: what batch normalisations do from now on.
        statistics: filled by "capture" and consumed, from the front, by "constants".
        macs: multiply-accumulates of convolutions, linear layers and matrix products since it was last set to 0,
            summed over the images of the batch.
        largest_bytes: bytes of the largest output of one of those and of batch normalisations since last set to 0.
        place: what is being run, for error messages.
    """

    def __init__(self, cast_to: torch.dtype | None, cast_from: frozenset[torch.dtype]) -> None:
        """Floating arguments of a dtype in `cast_from` are cast to `cast_to` where arithmetic is done on weights."""
        super().__init__()
        self.normalisation: Normalisation = "batch"
        self.statistics: Statistics = []
        self.macs = 0
        self.largest_bytes = 0
        self.place = "the supernet"
        self._cast_to = cast_to
        self._cast_from = cast_from
        self._handlers: dict[Any, Callable[..., Any]] = {F.batch_norm: self._batch_norm, torch.batch_norm: self._raw}
        self._handlers.update(dict.fromkeys(_DROPOUTS, self._dropout))
        for functions, count in (
            (_CONVOLUTIONS, _convolution_macs),
            (_TRANSPOSED, _transposed_macs),
            ((F.linear,), _linear_macs),
            (_PRODUCTS, _product_macs),
            (_NORMS, _no_macs),
        ):
            for function in functions:
                self._handlers[function] = self._counted(function, count)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = self._handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        if self._cast_to is not None and isinstance(value, Tensor) and value.dtype in self._cast_from:
            return value.to(self._cast_to)
        return value

    def _counted(
        self, function: Callable[..., Tensor], count: Callable[[Tensor, Sequence[Any], dict[str, Any]], int]
    ) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            if self._cast_to is not None:
                args = tuple(map(self._cast, args))
                kwargs = {name: self._cast(value) for name, value in kwargs.items()}
            output = function(*args, **kwargs)
            self.macs += count(output, args, kwargs)
            self._note_size(output)
            return output

        return run

    def _note_size(self, output: Tensor) -> None:
        self.largest_bytes = max(self.largest_bytes, output.numel() * output.element_size())

    def _dropout(self, input: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return input

    def _raw(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        """`torch.batch_norm`, whose arguments stand in another order."""
        return self._batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        input, weight, bias = self._cast(input), self._cast(weight), self._cast(bias)
        if self.normalisation == "constants":
            if not self.statistics:
                raise RuntimeError(f"{self.place} normalised more often than it did on the calibration images")
            mean, variance = self.statistics.pop(0)
            output = _normalise(input, mean, variance, weight, bias, eps)
        elif self.normalisation == "running" and not training:
            mean_, variance_ = self._cast(running_mean), self._cast(running_var)
            output = F.batch_norm(input, mean_, variance_, weight, bias, False, 0.0, eps)
        else:
            # Running statistics are left out of the call, so that there is nothing it could update.
            values = input.numel() // input.shape[1] if input.dim() > 1 and input.shape[1] else 0
            if values == 1:
                raise ValueError(
                    f"images: a batch normalisation in {self.place} sees a single value per channel (its input is "
                    f"{list(input.shape)}), whose variance is no statistic; expected more images or a larger "
                    f"resolution, or bn='running'"
                )
            if self.normalisation == "capture":
                dims = [dim for dim in range(input.dim()) if dim != 1]
                wide = input if input.dtype == torch.float64 else input.float()
                variance, mean = torch.var_mean(wide, dims, correction=0)
                self.statistics.append((mean, variance))
            output = F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
        self._note_size(output)
        return output


def _normalise(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if weight is not None and weight.dtype != mean.dtype:  # bf16 weights: the statistics stay as they are
        weight, bias = weight.to(mean.dtype), None if bias is None else bias.to(mean.dtype)
    return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str) -> Tensor:
    value = args[position] if len(args) > position else kwargs[name]
    assert isinstance(value, Tensor)
    return value


def _convolution_macs(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return output.numel() * _argument(args, kwargs, 1, "weight").shape[1:].numel()


def _transposed_macs(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return _argument(args, kwargs, 0, "input").numel() * _argument(args, kwargs, 1, "weight").shape[1:].numel()


def _linear_macs(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return output.numel() * _argument(args, kwargs, 1, "weight").shape[-1]


def _product_macs(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return output.numel() * _argument(args, kwargs, 0, "input").shape[-1]


def _no_macs(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return 0
