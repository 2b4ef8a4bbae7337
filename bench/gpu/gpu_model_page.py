"""The page about modelled times: what is assumed, what comes out, beside what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from greedynas.markdown import table

GOAL_MS = 100.0  # for ten uniform paths on 1,000 images
GOAL_SHARE = 0.75  # of the study's figures
# Modelled ns an image of the study that came before the kernels (128 images): layer, expansion, kernel.
STUDY = {
    ("112x16s2", 3, 3): 446, ("112x16s2", 3, 7): 756, ("112x16s2", 6, 3): 884, ("112x16s2", 6, 7): 1512,
    ("56x32s1", 3, 3): 450, ("56x32s1", 3, 7): 1016, ("56x32s1", 6, 3): 675, ("56x32s1", 6, 7): 1524,
    ("28x40s1", 3, 3): 128, ("28x40s1", 3, 7): 263, ("28x40s1", 6, 3): 256, ("28x40s1", 6, 7): 526,
    ("14x80s1", 3, 3): 85, ("14x80s1", 3, 7): 167, ("14x80s1", 6, 3): 170, ("14x80s1", 6, 7): 332,
    ("14x96s1", 3, 3): 114, ("14x96s1", 3, 7): 220, ("14x96s1", 6, 3): 228, ("14x96s1", 6, 7): 397,
    ("7x192s1", 3, 3): 98, ("7x192s1", 3, 7): 157, ("7x192s1", 6, 3): 196, ("7x192s1", 6, 7): 297,
}  # fmt: skip
# Choice layers of mbv2-7 whose expansion has that shape.
LAYERS_OF_SHAPE = {"112x16s2": 1, "56x32s1": 3, "28x40s1": 3, "14x80s1": 4, "14x96s1": 3, "7x192s1": 4}

_HEAD = """\
# Modelled times of the CUDA kernels on an H100

Computed by `make emulate-report` (`bench/gpu/gpu_model.py`) without a GPU; only what is called measured was measured
(`bench/results/h100/`: one H100, {images} images). No constant is fitted to that, but the form of
the model was chosen with the measured times known: it is no blind prediction.

## The model

nvcc compiles every kernel for compute capability 9.0, nvdisasm prints the machine code, and `bench/gpu/sass.py` finds
its loops. The host code of the kernels, linked with a runtime that records (`bench/gpu/launches/`), says how a node
would be launched on 132 multiprocessors with 227 KB of shared memory a block. `bench/gpu/kernel_work.py` multiplies
the instructions of each part with how often the plan executes it: of code around loops those that no way misses, of
activations ReLU6. A launch takes the longest of instruction issue, pipes and shared memory, then the tensor cores'
time, both multiplied by one and the share of the warps that are missing, and by (waves, rounded up) / waves; or L2's
time; or DRAM's, each map read and written once. Nodes run one after another."""
_QUARTER = """\
- A quarter less than the study's modelled figures for expansion with depthwise convolution (its 24 shapes, each as
  often as `mbv2-7` has it; us an image):"""


def study_sums(rows: Iterable[dict[str, Any]], images: int) -> dict[str, float]:
    """Microseconds an image over mbv2-7, of the study's shapes: by the study, modelled here, measured."""
    sums = {"study": 0.0, "modelled": 0.0, "measured": 0.0}
    seen = set()
    for row in rows:
        if row["kernel"] != "expand_depthwise":
            continue
        expansion, kernel = (int(word[1:]) for word in row["detail"].split())
        key = (row["layer"], expansion, kernel)
        if key not in STUDY or key in seen:
            continue
        seen.add(key)
        weight = LAYERS_OF_SHAPE[row["layer"]]
        sums["study"] += weight * STUDY[key] / 1e3
        for name in ("modelled", "measured"):
            seconds = row["seconds" if name == "modelled" else name]
            sums[name] += weight * (seconds or math.nan) / images * 1e6
    return sums


def page(found: dict[str, Any], evaluated: dict[str, Any]) -> str:
    """Markdown. `found`: of bench/gpu/gpu_model.py; `evaluated`: what bench/gpu/gpu.py measured of the same paths."""
    rows, images, device = found["kernels"], found["images"], found["device"]
    stages = {stage: sum(by.values()) for stage, by in found["stages"].items()}
    total = sum(stages.values())
    sums = study_sums(rows, images)
    reached = sums["modelled"] / sums["study"] if sums["study"] else math.nan
    measured_total = sum(evaluated["profile"].values())
    quarter = f"study {sums['study']:.2f}, modelled here {sums['modelled']:.2f}, measured {sums['measured']:.2f}."
    filter_ = f"{len(found['paths'])} uniform paths on {images:,} images in {GOAL_MS:.0f} ms"
    parts = [
        _HEAD.format(images=f"{images:,}"),
        _assumptions(device),
        "Not in the model: waiting (for memory, barriers, earlier instructions) beyond that, caches, and the CPU.",
        "## How far it is from what was measured",
        _by_kernel(rows),
        _cross_check(rows),
        "## Against the goals",
        f"{_QUARTER} {quarter} {_verdict(reached, GOAL_SHARE)}",
        f"- {filter_}: modelled {total * 1e3:.1f} ms, measured {measured_total * 1e3:.1f} ms on the GPU. "
        + _verdict(total * 1e3 / GOAL_MS, 1.0),
        _stages(found["stages"], evaluated["profile"]),
        "## Where the instructions of expand_depthwise are",
        _parts(rows),
        "## Every node",
        f"{images:,} images, us. `bound`: what alone would take longest. Instructions are those of warps, in millions.",
        _nodes(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _assumptions(device: dict[str, float]) -> str:
    pipes = f"half precision {device['half']:g}, integer, comparison and conversion {device['integer']:g}, "
    rows = [
        ["multiprocessors, clock", f"{device['multiprocessors']}, {device['clock'] / 1e9:.2f} GHz"],
        ["issue", f"{device['issue']:.0%} of four instructions a cycle"],
        ["pipes, instructions of a warp a cycle", f"{pipes}special functions {device['special']:g}"],
        ["shared memory", f"{device['shared']:.0%} of a wavefront a cycle"],
        ["warps for that", f"{device['warps']} of a multiprocessor"],
        ["tensor cores (mma.sync)", f"{device['tensor'] / 1e12:.0f} TFLOP/s"],
        ["L2, DRAM", f"{device['l2'] / 1e12:.1f} TB/s, {device['dram'] / 1e12:.1f} TB/s"],
        ["a launch", f"{device['launch'] * 1e6:.0f} us beside"],
    ]
    return table(["assumed", ""], rows)


def _cross_check(rows: list[dict[str, Any]]) -> str:
    counted = [row for row in rows if row["counted"]]
    if not counted:
        return "Traffic of L2 and of shared memory follows from plans and code; none was counted under emulation."
    ratios = sorted(row["products"] for row in counted if row["products"] is not None)
    products = f"{ratios[0]:.2f} to {ratios[-1]:.2f} times" if ratios else "not compared with"
    return (
        f"Traffic of L2 and of shared memory (bank conflicts included) is that counted by executing the kernels under "
        f"emulation, of {len(counted)} of {len(rows)} nodes (`bench/results/emulated/traffic.json`). Tensor "
        f"instructions by this model are {products} those executed there, where last tiles of 8 images are not full."
    )


def _verdict(reached: float, goal: float) -> str:
    share = f"{reached:.0%} of {'it' if goal == 1.0 else 'the study'}"
    return f"{'Reached' if reached <= goal else '**Not reached**'}: {share}."


def _by_kernel(rows: list[dict[str, Any]]) -> str:
    kernels: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["measured"] is not None:
            kernels.setdefault(row["kernel"], []).append((row["seconds"], row["measured"]))
    lines = []
    for kernel, pairs in kernels.items():
        ratios = sorted(modelled / measured for modelled, measured in pairs)
        lines.append(
            [
                kernel,
                str(len(pairs)),
                f"{sum(pair[0] for pair in pairs) * 1e3:.2f}",
                f"{sum(pair[1] for pair in pairs) * 1e3:.2f}",
                f"{sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs):.2f}",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            ]
        )
    header = [
        "kernel",
        "nodes",
        "modelled, ms",
        "measured, ms",
        "ratio of sums",
        "ratios of nodes: median (least to most)",
    ]
    return table(header, lines, right=range(1, 5))


def _stages(stages: dict[str, dict[str, float]], measured: dict[str, float]) -> str:
    functions = list(dict.fromkeys(name for by in stages.values() for name in by))
    totals = {name: sum(by.get(name, 0.0) for by in stages.values()) for name in functions}
    kinds = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in sorted(totals.items(), key=lambda i: -i[1]))
    lines = [
        [stage, f"{sum(by.values()) * 1e3:.2f}", f"{measured[stage] * 1e3:.2f}" if stage in measured else ""]
        for stage, by in stages.items()
    ]
    return f"By function, ms: {kinds}. By stage:\n\n" + table(
        ["stage", "modelled, ms", "measured, ms"], lines, right=(1, 2)
    )


def _parts(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["kernel"] == "expand_depthwise" and len(row["by_part"]) > 1:
            total = sum(row["by_part"].values())
            lines.append([row["layer"], row["detail"], *(f"{part / total:.0%}" for part in row["by_part"].values())])
    names = next((list(row["by_part"]) for row in rows if len(row["by_part"]) > 1), [])
    return table(["layer", "", *names], lines, right=range(2, 2 + len(names)))


def _nodes(rows: list[dict[str, Any]]) -> str:
    header = ["kernel", "layer", "", "blocks", "KB", "instr.", "issue", "shared", "tensor", "L2", "DRAM", "bound",
              "modelled", "measured", "ratio"]  # fmt: skip
    lines = []
    for row in rows:
        part, measured = row["parts"], row["measured"]
        lines.append(
            [
                row["kernel"],
                row["layer"],
                row["detail"],
                str(row["resident"]),
                f"{row['shared'] / 1024:.0f}",
                f"{row['instructions'].get('issue', 0) / 1e6:.0f}",
                *(f"{part[name] * 1e6:.0f}" for name in ("issue", "shared", "tensor", "l2", "dram")),
                row["bound"],
                f"{row['seconds'] * 1e6:.0f}",
                f"{measured * 1e6:.0f}" if measured is not None else "",
                f"{row['seconds'] / measured:.2f}" if measured is not None else "",
            ]
        )
    return table(header, lines, right=[*range(3, 11), 12, 13, 14])
