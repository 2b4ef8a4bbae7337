"""Modelled times of the CUDA kernels on an H100, from their machine code, and how far they are from measured ones.

Run: python bench/gpu/gpu_model.py [--output FILE.json] [--markdown FILE.md] [--quick]

No GPU: nvcc compiles the kernels for 9.0, nvdisasm (sass.py says where it comes from) prints what it made, the
launches of every node are recorded (record_launches.cu), and instructions are counted (kernel_work.py). What the model
assumes is in `H100` and `modelled`. gpu_model_page.py writes it down beside the measured times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_model_page import page
from gpu_nodes import Measurable, Node, evaluation, layer_nodes
from gpu_traffic import Counted, Traffic
from kernel_work import Kinds, Launch, added, expand_depthwise, head_pool, moments, pieces, plain, pointwise
from nvcc import KERNELS, ROOT, SETUP, Compiled, Resources, compile_kernels
from occupancy import MULTIPROCESSORS, resident_blocks
from sass import Kernel, disassemble

from greedynas import get_space
from greedynas_ext.bench.inputs import make_paths
from greedynas_ext.files import write_bytes
from greedynas_ext.strict_json import write_json

ARCHITECTURE = "9.0"


@dataclass(frozen=True)
class Device:
    """What a GPU can do in a second, as the model takes it.

    Attributes:
        multiprocessors: their number.
        clock: cycles a second.
        dram, l2: bytes.
        tensor: operations of mma.sync.
        issue: share of a multiprocessor's four issue slots a cycle that is used where nothing else binds.
        half: half-precision instructions of a warp that a multiprocessor executes in a cycle.
        integer: the same of integer, comparison and conversion instructions.
        special: of exponentials, reciprocals.
        shared: wavefronts (128 bytes) of shared memory in a cycle.
        warps: that a multiprocessor needs to do so; with fewer, a share is added for each that is missing.
        launch: seconds from the end of a launch to the full speed of the next.
    """

    multiprocessors: int
    clock: float
    dram: float
    l2: float
    tensor: float
    issue: float
    half: float
    integer: float
    special: float
    shared: float
    warps: int
    launch: float


# 3.0 TB/s is what copies reach (bench/results/h100/kernels.json). 5.5 TB/s of L2, mma.sync at 60% of 798 TFLOP/s, 70%
# of the issue slots, 85% of the wavefronts, 12 warps and 1.7 GHz are those of the study that came before the kernels.
# Pipes are those of the CUDA programming guide, but for half precision: half of that, as a profiler on an H100 counted.
H100 = Device(
    multiprocessors=132,
    clock=1.7e9,
    dram=3.0e12,
    l2=5.5e12,
    tensor=0.6 * 798e12,
    issue=0.7,
    half=2.0,
    integer=2.0,
    special=0.5,
    shared=0.85,
    warps=12,
    launch=3e-6,
)


@dataclass(frozen=True)
class Modelled:
    """Of one node.

    Attributes:
        seconds: of all its launches.
        bound: what takes longest.
        parts: seconds that each resource alone would need.
        resident: blocks of a multiprocessor, of the launch that takes longest.
        instructions: of warps, by class.
        by_part: of those, all of each part of the launch that takes longest.
        counted: whether traffic of L2 and of shared memory was counted by executing the node under emulation.
        products: tensor instructions over those that were executed there; None where they were not counted.
        shared: dynamic shared memory of a block of that launch.
    """

    seconds: float
    bound: str
    parts: dict[str, float]
    resident: int
    instructions: dict[str, float]
    by_part: dict[str, float]
    counted: bool
    products: float | None
    shared: int


class Program:
    """The compiled kernels: their code, what they take, and how they would be launched."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self.resources: dict[str, Resources] = {
            entry.symbol: entry for entry in compiled.resources if entry.architecture == ARCHITECTURE
        }
        self._kernels: dict[str, Kernel] = {}
        self.recorder = build_recorder(compiled)

    def kernel(self, symbol: str) -> Kernel:
        if symbol not in self._kernels:
            source = self.resources[symbol].source
            self._kernels |= disassemble(self._compiled.cubin(source, ARCHITECTURE))
        return self._kernels[symbol]

    def launches(self, nodes: Iterable[Node], device: Device = H100) -> dict[Node, list[Launch]]:
        shared = MULTIPROCESSORS[ARCHITECTURE].block_shared
        return record(self.recorder, nodes, device.multiprocessors, shared)


def build_recorder(compiled: Compiled) -> Path:
    """Links the kernels' host code with what records launches."""
    nvcc, folder, target = SETUP.find_nvcc(), ROOT / "bench/gpu/launches", compiled.folder / "record_launches"
    headers = ["-I", str(ROOT / "csrc"), "-I", str(KERNELS), "-I", str(folder)]
    cases, runtime = (str(compiled.folder / f"{name}.recorder") for name in ("cases", "runtime"))
    objects = [str(path) for path in sorted(compiled.folder.glob("*.o"))]
    include = f"{SETUP.cuda_home(nvcc)}/include"
    for step in (
        [
            nvcc,
            *SETUP.NVCC_FLAGS,
            *headers,
            *SETUP.gencode([ARCHITECTURE]),
            "-c",
            str(folder / "record_launches.cu"),
            "-o",
            cases,
        ],
        ["g++", "-O1", "-std=c++20", "-isystem", include, "-c", str(folder / "recorded_runtime.cpp"), "-o", runtime],
        ["g++", cases, runtime, *objects, "-o", str(target)],
    ):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"record_launches: {step[0]} failed:\n{done.stdout}{done.stderr}")
    return target


def record(recorder: Path, nodes: Iterable[Node], multiprocessors: int, shared: int) -> dict[Node, list[Launch]]:
    """Launches of each node on such a device; raises ValueError where a node does not fit it."""
    nodes = list(dict.fromkeys(nodes))
    said = subprocess.run(
        [str(recorder), str(multiprocessors), str(shared)],
        input="".join(node.line + "\n" for node in nodes),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = {}
    for node, line in zip(nodes, said, strict=True):
        entry = json.loads(line)
        if "error" in entry:
            raise ValueError(f"{node.line}: {entry['error']}")
        found[node] = [Launch(**{**launch, "grid": tuple(launch["grid"])}) for launch in entry["launches"]]
    return found


def work(program: Program, node: Node, launch: Launch) -> dict[str, Kinds]:
    """Instructions of one of a node's launches, by part; none of kernels that are small beside the maps."""
    shape, name = node.shape, program.resources[launch.symbol].kernel
    if name.startswith("expand_depthwise_kernel"):
        return expand_depthwise(program.kernel(launch.symbol), launch, shape)
    return {"all": _work(program, node, launch, name)}


def _work(program: Program, node: Node, launch: Launch, name: str) -> Kinds:
    shape = node.shape
    if node.function == "project":
        kernel, depth = program.kernel(launch.symbol), shape["hidden_channels"]
        return pointwise(kernel, name, launch, shape["pixels"], depth, shape["activation"])
    if node.function in ("strided_conv", "stem_conv"):
        small = -(-shape["height"] // shape["stride"]) * -(-shape["width"] // shape["stride"])
        depth = launch.plan.get("depth", shape["in_channels"])
        kernel = program.kernel(launch.symbol)
        return pointwise(kernel, name, launch, shape["images"] * small, depth, None)
    if name.startswith("moments_kernel"):
        return moments(program.kernel(launch.symbol), launch, shape["pixels"])
    if name.startswith("plain_kernel"):
        return plain(program.kernel(launch.symbol), launch, shape["pixels"] * shape["channels"] // 8)
    if node.function == "head_pool":
        images, pixels, depth = shape["images"], shape["image_pixels"], shape["in_channels"]
        return head_pool(program.kernel(launch.symbol), launch, images, pixels, depth)
    return Kinds()


def l2_bytes(node: Node, launch: Launch) -> float:
    """What a launch asks of the L2 cache: maps as often as they are read, weights for each block."""
    shape, plan = node.shape, launch.plan
    if node.function == "expand_depthwise":
        groups = -(-shape["hidden_channels"] // plan["group"])
        whole = plan["step"] >= plan["rows"]
        read = sum(piece.pixels for piece in pieces(shape, plan)) / plan["images"] * shape["images"]
        x = 2 * read * shape["in_channels"] * (plan["group_blocks"] if whole else groups)
        weights = 2 * plan["group"] * (shape["in_channels"] + shape["kernel"] ** 2 + 6)
        units = launch.grid[0] / plan["group_blocks"]
        small = -(-shape["height"] // shape["stride"]) * -(-shape["width"] // shape["stride"])
        return x + units * groups * weights + 2 * shape["images"] * small * shape["hidden_channels"]
    if "passes" in plan:
        depth = shape.get("hidden_channels", plan.get("depth", shape.get("in_channels", 0)))
        once = node.dram_bytes - 2 * shape.get("pixels", 0) * shape["channels"]
        written = node.dram_bytes - once
        return once * plan["passes"] + written + launch.grid[0] * 2 * depth * shape["channels"] / plan["passes"]
    return float(node.dram_bytes)


def modelled(
    program: Program, node: Node, launches: Sequence[Launch], counted: Counted | None = None, device: Device = H100
) -> Modelled:
    """The time of a node.

    A launch takes as long as what binds it: instruction issue, a pipe or shared memory, and the tensor cores after
    that (a block multiplies in phases of its own); or L2; or DRAM. The first of these is multiplied by 1 + the share of
    `device.warps` that is missing, and, for the last blocks run on part of the machine, by (waves, rounded up) / waves.
    Each launch costs `device.launch` beside. Small
    kernels (statistics, loss) are counted by their bytes. What was counted of a node stands for all its launches.
    """
    longest, seconds, most = "", 0.0, -1.0
    total: Kinds = Kinds()
    parts: dict[str, float] = {}
    shares: dict[str, float] = {}
    resident = shared = 0
    rate = device.multiprocessors * device.clock
    for number, launch in enumerate(launches):
        entry = program.resources[launch.symbol]
        blocks = resident_blocks(
            ARCHITECTURE, launch.threads, entry.registers, entry.static_shared + launch.dynamic_shared
        )
        if blocks == 0:
            raise ValueError(f"{node.line}: {entry.kernel} does not fit with {launch.dynamic_shared} bytes")
        by_part = work(program, node, launch)
        kinds = added(by_part.values())
        wavefronts, asked = float(kinds["wavefronts"]), l2_bytes(node, launch) if kinds or number == 0 else 0.0
        if counted is not None:
            wavefronts, asked = (counted.wavefronts, counted.l2) if number == 0 else (0.0, 0.0)
        once = {
            "issue": kinds["issue"] / (rate * 4 * device.issue),
            "half": kinds["half"] / (rate * device.half),
            "integer": (kinds["integer"] + kinds["convert"]) / (rate * device.integer),
            "special": kinds["special"] / (rate * device.special),
            "shared": wavefronts / (rate * device.shared),
            "tensor": kinds["tensor"] * 4096 / device.tensor,
            "l2": asked / device.l2,
            "dram": node.dram_bytes / device.dram if number == 0 else 0.0,
        }
        waves = launch.blocks / (device.multiprocessors * blocks)
        warps = blocks * launch.threads / 32
        slow = 1 + max(0.0, 1 - warps / device.warps)
        tail = -(-launch.blocks // (device.multiprocessors * blocks)) / waves if waves > 1 else 1.0
        chip = (
            (max(once[name] for name in ("issue", "half", "integer", "special", "shared")) + once["tensor"])
            * slow
            * tail
        )
        own = max(chip, once["l2"], once["dram"]) + device.launch
        seconds += own
        if own > most:
            most, resident, shared = own, blocks, launch.dynamic_shared
            longest = max(once, key=lambda name: once[name])
            shares = {part: float(of["issue"]) for part, of in by_part.items()}
        total = added([total, kinds])
        parts = {name: parts.get(name, 0.0) + value for name, value in once.items()}
    executed = counted.matrix_products if counted is not None else 0.0
    products = total["tensor"] / executed if executed else None
    return Modelled(seconds, longest, parts, resident, dict(total), shares, counted is not None, products, shared)


def compare(
    program: Program, nodes: Sequence[Measurable], images: int, measured: Any, traffic: Traffic
) -> list[dict[str, Any]]:
    """Each node beside what an H100 took; `measured` is what bench/gpu/gpu_kernels.py wrote."""
    launches = program.launches(entry.node for entry in nodes)
    known: dict[tuple[str, str, str], list[float]] = {}
    for entry in measured["kernels"]:
        known.setdefault((entry["kernel"], entry["layer"], entry["detail"]), []).append(entry["seconds"])
    rows = []
    for entry in nodes:
        found = modelled(program, entry.node, launches[entry.node], traffic.of(entry.node))
        times = known.get((entry.node.function, entry.layer, entry.detail), [])
        # Two layers may have a name in common: the first of the times is the first one's.
        seconds = times.pop(0) / measured["images"] * images if times else None
        rows.append(
            {
                "kernel": entry.node.function,
                "layer": entry.layer,
                "detail": entry.detail,
                "measured": seconds,
                "dram_bytes": entry.node.dram_bytes,
                "tensor_flop": entry.node.tensor_flop,
                **asdict(found),
            }
        )
    return rows


def evaluated(program: Program, stages: dict[str, Any], traffic: Traffic) -> dict[str, dict[str, float]]:
    """Seconds by stage and function, launches one after another."""
    launches = program.launches(node for nodes in stages.values() for node in nodes)
    times = {node: modelled(program, node, of, traffic.of(node)).seconds for node, of in launches.items()}
    found: dict[str, dict[str, float]] = {}
    for stage, nodes in stages.items():
        for node, count in nodes.items():
            by = found.setdefault(stage, {})
            by[node.function] = by.get(node.function, 0.0) + count * times[node]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = ROOT / "bench/results"
    parser.add_argument("--output", type=Path, help="JSON file of everything modelled")
    parser.add_argument("--markdown", type=Path, help="the page about it")
    parser.add_argument(
        "--measured", type=Path, default=results / "h100/kernels.json", help="of bench/gpu/gpu_kernels.py"
    )
    parser.add_argument("--evaluated", type=Path, default=results / "h100/uniform.json", help="of bench/gpu/gpu.py")
    traffic_file = results / "emulated/traffic.json"
    parser.add_argument("--traffic", type=Path, default=traffic_file, help="of bench/gpu/emulate_report.py")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="two layers and two paths: does it run?")
    options = parser.parse_args()
    nodes = list(layer_nodes(options.images))
    space = get_space("mbv2-7")
    paths = make_paths("uniform", 10, space)[: 2 if options.quick else 10].tolist()
    if options.quick:
        nodes = [entry for entry in nodes if entry.layer in ("56x32s1", "56x32")][:10]
    traffic = Traffic(options.traffic)
    with tempfile.TemporaryDirectory() as folder:
        program = Program(compile_kernels([ARCHITECTURE], Path(folder)))
        rows = compare(program, nodes, options.images, json.loads(options.measured.read_text()), traffic)
        stages = evaluated(program, evaluation(space, paths, options.images, space.resolution), traffic)
    found = {
        "command": sys.argv,
        "device": asdict(H100),
        "images": options.images,
        "kernels": rows,
        "paths": paths,
        "stages": stages,
    }
    total = sum(sum(by.values()) for by in stages.values())
    print(f"{len(rows)} nodes; {len(paths)} paths on {options.images:,} images: {total * 1e3:.1f} ms modelled")
    if options.output is not None:
        write_json(options.output, found)
    if options.markdown is not None:
        write_bytes(options.markdown, page(found, json.loads(options.evaluated.read_text())).encode())


if __name__ == "__main__":
    main()
