"""What bench/gpu/emulate_report.py counted of a node: traffic and tensor operations, by image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_nodes import Node

# Members that have to agree; the number of images need not.
_SHAPE = {
    "expand_depthwise": ("height", "in_channels", "hidden_channels", "kernel", "stride"),
    "project": ("image_pixels", "hidden_channels", "channels"),
    "finish_map": ("channels", "residual"),
    "strided_conv": ("height", "in_channels", "channels", "stride"),
    "stem_conv": ("height", "in_channels", "channels", "kernel", "stride"),
    "head_pool": ("image_pixels", "in_channels", "channels"),
}


def images_of(shape: dict[str, Any]) -> float:
    """Images of a launch; of one that knows pixels alone, those."""
    if "pixels" in shape:
        return float(shape["pixels"]) / (shape.get("image_pixels") or 1)
    return float(shape["images"])


def _ways(buffer: dict[str, Any]) -> list[dict[str, int]]:
    return [buffer[way] for way in ("read", "written") if buffer.get(way)]


@dataclass(frozen=True)
class Counted:
    """Of one image, all launches of a node together.

    Attributes:
        l2: bytes of the sectors that requests to global memory touch.
        wavefronts: of shared memory, bank conflicts included.
        matrix_products: m16n8k16, of warps.
    """

    l2: float
    wavefronts: float
    matrix_products: float


class Traffic:
    """Counts of nodes; empty where there is no file."""

    def __init__(self, file: Path | None) -> None:
        self._counted: dict[tuple[Any, ...], Counted] = {}
        launches = json.loads(file.read_text())["launches"] if file is not None and file.exists() else []
        # Several launches may be one call: they have the same name.
        residual = {launch["name"] for launch in launches if "residual" in launch["buffers"]}
        for launch in launches:
            names = _SHAPE.get(launch["kernel"])
            if names is None:
                continue
            shape = {**launch["shape"], "residual": int(launch["name"] in residual)}
            key = (launch["kernel"], *(shape.get(name) for name in names))
            each = images_of(launch["shape"] | {"images": launch["images"]})
            sectors = sum(way["sectors"] for buffer in launch["buffers"].values() for way in _ways(buffer))
            before = self._counted.get(key, Counted(0.0, 0.0, 0.0))
            self._counted[key] = Counted(
                before.l2 + 32 * sectors / each,
                before.wavefronts + sum(kind["wavefronts"] for kind in launch["shared"].values()) / each,
                before.matrix_products + launch["warp"]["matrix_products"] / each,
            )

    def __len__(self) -> int:
        return len(self._counted)

    def of(self, node: Node) -> Counted | None:
        """Of the whole node; None where nothing was counted."""
        names = _SHAPE.get(node.function)
        if names is None:
            return None
        shape = node.shape
        found = self._counted.get((node.function, *(shape[name] for name in names)))
        if found is None:
            return None
        images = images_of(shape)
        return Counted(found.l2 * images, found.wavefronts * images, found.matrix_products * images)
