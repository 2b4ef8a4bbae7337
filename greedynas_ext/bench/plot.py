"""Ratios of results as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from greedynas_ext.files import write_bytes

_BARS = {"ratio_plain": "plain loop", "ratio_loop": "fastest loop", "ratio_sharing": "fastest that shares prefixes"}


def draw(results: Sequence[dict[str, Any]], picture: Path) -> None:
    """Bars of how many times as long PyTorch takes, with quartiles, a group a case.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("results: expected at least one, got none")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # after the backend

    kinds = [kind for kind in _BARS if any(kind in result for result in results)]
    height = 0.8 / len(kinds)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(results)), layout="constrained")
    for number, kind in enumerate(kinds):
        there = [(place, result[kind]) for place, result in enumerate(results) if kind in result]
        medians = [ratio["median"] for _, ratio in there]
        errors = [
            [ratio["median"] - ratio["lower"] for _, ratio in there],
            [ratio["upper"] - ratio["median"] for _, ratio in there],
        ]
        places = [place + (number - (len(kinds) - 1) / 2) * height for place, _ in there]
        axes.barh(places, medians, height, xerr=errors, label=_BARS[kind], error_kw={"linewidth": 1})
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(results)), [result["case"]["name"] for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("times as long as evaluate_paths (median of rounds, quartiles)")
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format=picture.suffix[1:] or "png")
    plt.close(figure)
    write_bytes(picture, drawn.getbuffer())
