"""Counts of a kernel's launches under the tracing emulation, and how far they are from what has to move."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import torch
from emulated_cases import PARTS, UNITS, Case
from kernel_nodes import STREAMS, Node, Nodes

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "emulation"))

from emulated_device import Configuration
from emulation_build import load
from emulation_trace import Trace

SHARED_BYTES = 227 * 1024  # of a block on an H100

# launch: different bytes of the call, in whole sectors, over the floor. blocks: bytes of the streams, different ones in
# each block and summed up over blocks, over the streams' floor. sectors: those of requests over the fewest, of the
# stream and the direction with the most. ways: of conflicts in inner loops: at source lines that a warp passes more
# often than LOOP times in a block, and that make a hundredth of the shared requests.
LOOP = 8  # the channels of a vector
LIMITS = {"launch": 1.05, "blocks": 2.0, "sectors": 1.25, "ways": 2}

# Why a limit is not met, by kernel and limit.
REASONS = {
    ("expand_depthwise", "ways"): (
        "A warp stores 8 neighbouring pixels at a time to the ring. Its pitch is made for the reads, of which "
        "there are more; where the 8 belong to two rows, or pass the border between two items' columns as well, "
        "up to three of them meet in a bank."
    ),
    ("expand_depthwise", "blocks"): (
        "With stride 2 the depthwise output has a quarter of the pixels, and with a kernel of 7 all expanded rows "
        "of an image do not fit into shared memory, so that each group of channels reads x again. That is traffic "
        "of L2, not of memory."
    ),
    ("finish_map", "launch"): (
        "The partial sums of the moments are written and read again. They may be up to half a map (cut_moments), "
        "so that small maps are cut into blocks enough."
    ),
    ("strided_conv", "launch"): (
        "A pixel's row of 80 bytes is no whole number of sectors, so that the pixels that are read share some "
        "with those that are not."
    ),
    ("stem_conv", "sectors"): (
        "With stride 2 a warp reads every second float along a row of the image. The next tap reads the others, "
        "in the same sectors."
    ),
    ("head_pool", "blocks"): (
        "A block has 256 of the 1,280 output channels, and its neighbours read the same x: 1.3 MB of L2's "
        "traffic, beside 0.8 MB of weights."
    ),
    ("head_pool", "sectors"): (
        "Chunks of 32 channels are 64 bytes of a row of 80, which begin in the middle of a sector."
    ),
    ("linear", "blocks"): (
        "A block has 64 rows and 64 columns of a product of two matrices, and reads both from L2. The classifier "
        "is a small part of an evaluation."
    ),
    ("path_cross_entropy", "launch"): ("A sector of 32 bytes holds a count of 8, where there are few logits."),
}


class Device:
    """The part of a device that is emulated, and its kernels."""

    def __init__(self, folder: Path) -> None:
        module = load(folder)
        path = str(module.__file__)
        self._config, self._trace = Configuration.of(path), Trace(path)
        self._config.shared_bytes, self._config.multiprocessors = SHARED_BYTES, 1
        self.nodes = Nodes(module.kernels, "cpu")

    def _units_there(self, node: Node) -> int | None:
        """Of the device that this is a part of, with as many more images."""
        kernels, shape = self.nodes.kernels, dict(node.shape)
        self._config.multiprocessors = PARTS
        try:
            if node.kernel == "expand_depthwise":
                shape["images"] *= PARTS
                return int(kernels.expand_depthwise_units(kernels.ExpandDepthwise(**shape)))
            if node.kernel == "finish_map":
                one = kernels.finish_map_floats(1, shape["channels"])
                return int(kernels.finish_map_floats(PARTS * shape["pixels"], shape["channels"])) // int(one)
        finally:
            self._config.multiprocessors = 1
        if "y" in node.buffers:
            tiles = -(-PARTS * len(node.buffers["y"]) // 128)
            return -(-tiles // -(-tiles // UNITS))
        return None

    def _units(self, node: Node) -> dict[str, int] | None:
        there = self._units_there(node)
        if there is None or "partials" not in node.buffers:
            return None
        partials = node.buffers["partials"]
        if node.kernel == "finish_map":
            return {
                "here": partials.numel() // int(self.nodes.kernels.finish_map_floats(1, node.shape["channels"])),
                "there": there,
            }
        return {"here": len(partials), "there": there}

    def count(self, case: Case, images: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The launches of a call, and the call."""
        torch.manual_seed(0)
        node = case.make(self.nodes, images)
        launches = self._trace.count(lambda: node.launch(self.nodes.kernels, 0), node.buffers)
        described = [describe(case, node, launch) for launch in launches]
        return described, judge((case.kernel, case.name), described, self._units(node))


def _role(name: str) -> str:
    return "stream" if name in STREAMS else "partials" if name == "partials" else "parameters"


def describe(case: Case, node: Node, launch: dict[str, Any]) -> dict[str, Any]:
    """An entry of `launches`."""
    shared: dict[str, dict[str, int]] = {}
    for site in launch["shared"]:
        kind = shared.setdefault(site["kind"], dict.fromkeys(("requests", "lane_bytes", "wavefronts"), 0))
        kind.setdefault("ideal_wavefronts", 0)
        for name in ("requests", "lane_bytes", "wavefronts", "ideal_wavefronts"):
            kind[name] += site[name]
        kind["ways"] = max(kind.get("ways", 1), *site["by_ways"])
    grid, block = launch["grid"], launch["block"]
    return {
        "kernel": case.kernel,
        "function": re.sub(r"\(|\)|<.*|\w+::|_of_tile", "", launch["kernel"]),
        "name": case.name,
        "shape": node.shape,
        "images": node.images,
        "grid": grid,
        "block": block,
        "blocks": grid[0] * grid[1] * grid[2],
        "threads": block[0] * block[1] * block[2],
        **{name: launch[name] for name in ("dynamic_shared_bytes", "static_shared_bytes", "barriers")},
        "warp": {name: launch["warp"][name] for name in ("barriers", "shuffles", "matrix_products")},
        "buffers": {
            name: {
                "role": _role(name),
                "bytes": node.buffers[name].nbytes,
                "floor_read": node.read.get(name, 0) if counts["read"]["requests"] else 0,
                "floor_written": node.written.get(name, 0) if counts["written"]["requests"] else 0,
                **counts,
            }
            for name, counts in launch["buffers"].items()
        },
        "shared": shared,
        "sites": [
            {**site, "by_ways": {str(ways): n for ways, n in site["by_ways"].items()}}
            for site in sorted(launch["shared"], key=lambda site: -site["wavefronts"])
            if max(site["by_ways"]) > 1
        ],
    }


# ---- verdicts

Sides = Iterator[tuple[str, str, dict[str, Any], dict[str, int]]]


def sides(launches: list[dict[str, Any]], role: str | None = None) -> Sides:
    """Buffer, "read" or "written", what is known of the buffer, and counts, of what was accessed."""
    for launch in launches:
        for name, buffer in launch["buffers"].items():
            for way in ("read", "written"):
                if buffer[way]["requests"] and role in (None, buffer["role"]):
                    yield name, way, buffer, buffer[way]


def floor_of(launches: list[dict[str, Any]], role: str | None = None) -> int:
    """Bytes that a call has to read and write."""
    floors = {(name, way): buffer[f"floor_{way}"] for name, way, buffer, _ in sides(launches, role)}
    return sum(floors.values())


def judge(case: tuple[str, str], launches: list[dict[str, Any]], units: dict[str, int] | None) -> dict[str, Any]:
    """An entry of `calls`; case: its kernel and name."""
    floor, moved = floor_of(launches), 32 * sum(counts["launch_sectors"] for *_, counts in sides(launches))
    of_blocks = sum(counts["block_bytes"] for *_, counts in sides(launches, "stream"))
    verdicts = {"launch": _verdict(case, "launch", moved / floor)}
    if streams := floor_of(launches, "stream"):
        verdicts["blocks"] = _verdict(case, "blocks", of_blocks / streams)
        ratio, where = max(
            (counts["sectors"] / counts["ideal_sectors"], f"{name} {way}")
            for name, way, _, counts in sides(launches, "stream")
        )
        verdicts["sectors"] = {**_verdict(case, "sectors", ratio), "of": where}
    if any(launch["shared"] for launch in launches):
        verdicts["ways"] = _conflicts(case, launches)
    return {
        "kernel": case[0],
        "name": case[1],
        "units": units,
        "floor_bytes": floor,
        "launch_bytes": moved,
        "block_bytes": of_blocks,
        "verdicts": verdicts,
    }


def _verdict(case: tuple[str, str], limit: str, value: float) -> dict[str, Any]:
    verdict = {"value": round(value, 4), "limit": LIMITS[limit], "met": value <= LIMITS[limit]}
    return verdict if verdict["met"] else {**verdict, "why": REASONS.get((case[0], limit), "Not known yet.")}


def _conflicts(case: tuple[str, str], launches: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict, and the share of a source line's requests that are above the limit."""
    worst, where, share = 1, "", 0.0
    for launch in launches:
        requests = sum(kind["requests"] for kind in launch["shared"].values())
        least = LOOP * launch["blocks"] * ceil(launch["threads"] / 32)
        for site in launch["sites"]:
            ways = {int(ways): requests for ways, requests in site["by_ways"].items()}
            if site["requests"] <= max(least, 0.01 * requests) or max(ways) <= worst:
                continue
            worst, where = max(ways), f"{site['line']} {site['kind']}"
            share = sum(n for w, n in ways.items() if w > LIMITS["ways"]) / site["requests"]
    return {**_verdict(case, "ways", worst), "of": where, "share": round(share, 5)}
