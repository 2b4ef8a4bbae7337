"""`evaluate_paths` as the benchmarks call it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from greedynas_ext.arguments import SupernetLike
from greedynas_ext.evaluate import evaluate_paths
from greedynas_ext.results import PathEvaluation


def evaluate(
    supernet: SupernetLike,
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    bn: str,
    precision: str | None,
    fused: bool | None = True,
    **options: Any,
) -> PathEvaluation:
    """`evaluate_paths` that fails where it cannot fuse: a measurement must not silently be one of the modules.

    `fused`: None allows it.
    """
    options.update(bn=bn, precision=precision, fused=fused)
    return evaluate_paths(supernet, paths, images, targets, **options)
