"""`evaluate_paths` as the benchmarks call it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from greedynas import Supernet
from greedynas_ext import PathEvaluation, evaluate_paths


def evaluate(
    supernet: Supernet,
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    bn: str,
    precision: str | None,
    fused: bool = True,
    **options: Any,
) -> PathEvaluation:
    """`evaluate_paths` that fails where it cannot fuse: a measurement must not silently be one of the modules."""
    options.update(bn=bn, precision=precision, fused=fused)
    return evaluate_paths(supernet, paths, images, targets, **options)
