"""What a supernet's own modules compute while they are evaluated: batch normalisation by policy, dropout off.

Modules are run as they are. A torch function mode, which lives in the evaluating thread only, sees each call of a
torch function and changes the few that matter: no module, buffer or flag has to be touched for it, and a subclass, a
sliced or a functional batch normalisation is caught as well as `nn.BatchNorm2d`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from greedynas_ext.macs import COUNTS, Count

# mean [C], biased variance [C] of one batch normalisation, in the order in which a module calls them
Statistics: TypeAlias = list[tuple[Tensor, Tensor]]
# "capture" is "batch" that also keeps what it used; "constants" uses what was captured before; "probe" does the work
# of any of them, and does not mind a single value per channel.
Normalisation: TypeAlias = Literal["batch", "running", "capture", "constants", "probe"]

_NORMS: tuple[Callable[..., Tensor], ...] = (F.layer_norm, F.group_norm, F.rms_norm, F.prelu)
_DROPOUTS: tuple[Callable[..., Tensor], ...] = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.feature_dropout,
    torch.feature_dropout_,
    torch.alpha_dropout,
    torch.alpha_dropout_,
    torch.feature_alpha_dropout,
    torch.feature_alpha_dropout_,
)
# The position of the dropout probability among the arguments.
_ATTENTIONS: dict[Callable[..., Any], int] = {
    F.scaled_dot_product_attention: 4,
    F.multi_head_attention_forward: 10,
}
# What lies below the function that batch normalisation modules call.
_LOW_LEVEL_BATCH_NORMS: tuple[Any, ...] = (
    torch.native_batch_norm,
    torch._native_batch_norm_legit,
    torch.batch_norm_stats,
    torch.batch_norm_elemt,
    torch.ops.aten.batch_norm,
    torch.ops.aten.batch_norm.default,
    torch.ops.aten.native_batch_norm,
    torch.ops.aten.native_batch_norm.default,
)


class _Innermost(threading.local):
    """The interceptor that was entered last in this thread: those below it keep still."""

    interceptor: Interceptor | None = None


_innermost = _Innermost()


class Interceptor(TorchFunctionMode):
    """Carries out a batch normalisation policy and counts operations while supernet modules run.

    Attributes:
        normalisation: what batch normalisations do from now on.
        statistics: filled by "capture" and consumed, from the front, by "constants".
        macs: multiply-accumulates of convolutions, linear layers, matrix products and attention since it was last
            set to 0, summed over the images of the batch.
        macs_fused: those of them that fused kernels ran, which add them themselves.
        by_kernels: set to True by fused kernels, which may run without multiplying.
        needs_batch: set to True by a batch normalisation that stored statistics do not serve.
        place: what is being run, for error messages.
    """

    def __init__(self, cast_to: torch.dtype | None, cast_from: frozenset[torch.dtype]) -> None:
        """Floating arguments of a dtype in `cast_from` are cast to `cast_to` where arithmetic is done on weights."""
        super().__init__()
        self.normalisation: Normalisation = "batch"
        self.statistics: Statistics = []
        self.macs = self.macs_fused = 0
        self.by_kernels = False
        self.needs_batch = False
        self.place = "the supernet"
        self._outer: Interceptor | None = None
        self._cast_to = cast_to
        self._cast_from = cast_from
        self._handlers: dict[Any, Callable[..., Any]] = {
            F.batch_norm: self._batch_norm,
            torch.batch_norm: self._raw_batch_norm,
            F.instance_norm: self._instance_norm,
            torch.native_dropout: self._native_dropout,
        }
        self._handlers.update(dict.fromkeys(_DROPOUTS, self._dropout))
        self._handlers.update(dict.fromkeys(_LOW_LEVEL_BATCH_NORMS, self._refuse))
        for function, count in (*COUNTS.items(), *dict.fromkeys(_NORMS, None).items()):
            self._handlers[function] = self._counted(function, count)
        # Their dropout lies below the mode's sight.
        for function, position in _ATTENTIONS.items():
            self._handlers[function] = self._counted(function, COUNTS[function], dropout=(position, "dropout_p"))

    def __enter__(self) -> Interceptor:
        self._outer, _innermost.interceptor = _innermost.interceptor, self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _innermost.interceptor = self._outer

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = self._handlers.get(func)
        if handler is None or _innermost.interceptor is not self:
            return func(*args, **(kwargs or {}))
        return handler(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        if not self._cast_from:
            return value
        if isinstance(value, Tensor):
            return value.to(self._cast_to) if value.dtype in self._cast_from else value
        if isinstance(value, list | tuple):
            return type(value)(map(self._cast, value))
        return value

    def _counted(
        self,
        function: Callable[..., Any],
        count: Count | None,
        dropout: tuple[int, str] | None = None,
    ) -> Callable[..., Any]:
        """`function` on cast arguments, its MACs added up; `dropout`: place and name of a probability to set to 0."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._cast_from:
                args = tuple(map(self._cast, args))
                kwargs = {name: self._cast(value) for name, value in kwargs.items()}
            if dropout is not None:
                position, name = dropout
                if len(args) > position:
                    args = (*args[:position], 0.0, *args[position + 1 :])
                else:
                    kwargs[name] = 0.0
            output = function(*args, **kwargs)
            if count is not None:
                self.macs += count(output, args, kwargs)
            return output

        return run

    def _dropout(self, input: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return input

    def _native_dropout(self, input: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return input, torch.ones_like(input, dtype=torch.bool)

    def _refuse(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(
            f"{self.place}: expected batch normalisation by its module, F.batch_norm or torch.batch_norm, got a call "
            f"of a function below them, for which no policy is defined"
        )

    def _raw_batch_norm(
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
        self.needs_batch |= training  # in evaluation mode only where none are stored, or a function says so
        if self.normalisation == "constants":
            if not self.statistics:
                raise RuntimeError(f"{self.place} normalised more often than it did on the calibration images")
            mean, variance = self.statistics.pop(0)
            output = _normalise(input, mean, variance, weight, bias, eps)
        elif self.normalisation == "running" and not training:
            mean_, variance_ = self._cast(running_mean), self._cast(running_var)
            output = F.batch_norm(input, mean_, variance_, weight, bias, False, 0.0, eps)
        else:
            probing = self.normalisation == "probe"
            values = input.numel() // input.shape[1] if input.dim() > 1 and input.shape[1] else 0
            if values == 1 and not probing:
                argument = "calibration" if self.normalisation == "capture" else "images"
                raise ValueError(
                    f"{argument}: a batch normalisation in {self.place} sees a single value per channel (its input is "
                    f"{list(input.shape)}), whose variance is no statistic; expected more images or a larger "
                    f"resolution, or bn='running'"
                )
            if probing or self.normalisation == "capture":
                dims = [dim for dim in range(input.dim()) if dim != 1]
                variance, mean = torch.var_mean(
                    input if input.dtype == torch.float64 else input.float(), dims, correction=0
                )
                if values == 1:
                    return _normalise(input, mean, variance, weight, bias, eps)
                if not probing:
                    self.statistics.append((mean, variance))
            # Running statistics are left out of the call, so that there is nothing it could update; in their place
            # stand others where they alone make torch keep the statistics of a bfloat16 batch in float32.
            mean_ = variance_ = None
            stored = self._cast(running_mean)
            if weight is None and stored is not None and input.element_size() < stored.element_size() == 4:
                mean_, variance_ = torch.zeros_like(stored), torch.ones_like(stored)
            output = F.batch_norm(input, mean_, variance_, weight, bias, True, 0.0, eps)
        return output

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Statistics of each image, or the stored ones where the policy is to use them; none are updated."""
        input, weight, bias = self._cast(input), self._cast(weight), self._cast(bias)
        if use_input_stats or self.normalisation != "running":
            return F.instance_norm(input, None, None, weight, bias, True, 0.0, eps)
        mean, variance = self._cast(running_mean), self._cast(running_var)
        return F.instance_norm(input, mean, variance, weight, bias, False, 0.0, eps)


def _normalise(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if weight is not None and weight.dtype != mean.dtype:  # bf16 weights: the statistics stay as they are
        weight, bias = weight.to(mean.dtype), None if bias is None else bias.to(mean.dtype)
    return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)
