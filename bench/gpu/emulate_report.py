"""What the CUDA kernels move, counted from executing them under emulation, against the bytes that have to move.

Run: make emulate-report     (python bench/gpu/emulate_report.py [--quick] [--kernels project ...] [--output FOLDER])

Every kernel is executed at each node shape of `mbv2-7` by a tracing build of the emulation (tests/emulation/trace),
and FOLDER (bench/results/emulated) gets traffic.json, which this describes, and traffic.md, its table. Nothing here has
run on a GPU, and nothing is a time.

The device is one multiprocessor of an H100, with its shared memory, and 8 images: what each of 132 has of 1,056 images.
Blocks are thus cut as they are there; where a kernel's plan can be asked for, it is asked for both and compared.

traffic.json:
    command, machine: how (options that change no count left out) and where it was made
    device: {"multiprocessors", "shared_bytes_per_block", "stands_for": {"multiprocessors", "images"}}
    limits: of the verdicts, by their names
    launches: a list with an entry for every launch, all counts of that launch alone
        kernel: as csrc/cuda/kernels.h calls it; a call of path_cross_entropy is two launches, one of finish_map two or,
            with many channels, three
        function: the __global__ function, without template arguments
        name: the shape in words, unique for a kernel: "56x32 t3 k7 s1"
        shape: the members of the kernel's struct that are numbers ("height", "in_channels", "hidden_channels",
            "kernel", "stride", "pixels", "channels", "activation", ...)
        images: of the launch; null for kernels that know none
        grid, block: three numbers each; blocks, threads: their products (threads: of a block)
        dynamic_shared_bytes, static_shared_bytes: of a block
        barriers: __syncthreads that were completed, of all blocks
        warp: {"barriers", "shuffles", "matrix_products"}: operations of warps (__syncwarp; shuffles and votes;
            mma.m16n8k16). Loads of matrices (ldmatrix.x4) are requests of `shared`
        buffers: by name ("x", "d", "y", "weights", "partials", ...), what happened to each range of global memory:
            role: "stream" (maps: x, d, y, logits, ...), "parameters", or "partials"
            bytes: its size
            floor_read, floor_written: bytes that have to be read and written: each input once, each output once
            read, written: {
                requests: instructions of warps
                lane_bytes: what their active lanes asked for
                sectors: of 32 bytes that the requests touched
                ideal_sectors: the fewest that hold the same bytes, request by request
                launch_bytes, launch_sectors: different ones in the launch: a cache that never forgets
                block_bytes, block_sectors: different ones in each block, summed over the blocks
            } (an atomic operation counts as both)
        shared: by kind of request ("load", "store", "matrix" for ldmatrix.x4, "async" for the shared side of cp.async):
            requests, lane_bytes
            wavefronts: passes over the 32 banks; 8 and 16 bytes a lane go by half and quarter warps, a matrix at a time
            ideal_wavefronts: the same without conflicts
            ways: the largest conflict
        sites: source lines whose shared requests conflict, the costliest first: {"line": "expand_depthwise.cuh:243",
            "kind", "bytes" a lane, "requests", "lane_bytes", "wavefronts", "ideal_wavefronts",
            "by_ways": requests by their ways}
    calls: a list with an entry for every (kernel, name), its launches together
        units: of partial sums, {"here", "there"}: of the device and of the one it stands for; null where there are none
        floor_bytes, launch_bytes (in whole sectors, read and written), block_bytes (of streams)
        verdicts: by limit (emulated_traffic.py says what they are of), {"value", "limit", "met"}, "why" where it is not
            met; "of": the buffer or the line that the value is of; "share": of that line's requests above the limit
Bytes and sectors of a launch grow with images where blocks do; parameters are read by every block.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from emulated_cases import KERNELS, PARTS, UNITS, Case, cases
from emulated_traffic import LIMITS, LOOP, SHARED_BYTES, Device, sides
from emulation_build import build_traced  # emulated_traffic knows where it is

from greedynas_ext.bench.measure import machine
from greedynas_ext.files import write_bytes
from greedynas_ext.strict_json import write_json

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 8

_worker: tuple[Device, list[Case]] | None = None


def _start_worker(folder: Path, quick: bool, kernels: list[str] | None) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Device(folder), cases(quick, kernels)


def _work(index: int, images: int) -> tuple[list[dict[str, Any]], dict[str, Any], float]:
    assert _worker is not None
    since = time.perf_counter()
    launches, call = _worker[0].count(_worker[1][index], images)
    return launches, call, time.perf_counter() - since


def report(folder: Path, images: int, quick: bool = False, kernels: list[str] | None = None) -> dict[str, Any]:
    """All that traffic.json holds; `folder`: of the tracing build."""
    launches: list[dict[str, Any]] = []
    calls = []
    count = len(cases(quick, kernels))
    options = ["--images", str(images)] + ["--quick"] * quick + (["--kernels", *kernels] if kernels else [])
    with ProcessPoolExecutor(2, get_context("spawn"), _start_worker, (folder, quick, kernels)) as pool:
        for of_call, call, seconds in pool.map(_work, range(count), [images] * count):
            launches += of_call
            calls.append(call)
            print(f"{call['kernel']:<20}{call['name']:<24}{_verdict_words(call)}  ({seconds:.1f} s)", flush=True)
    return {
        "command": " ".join(["python bench/gpu/emulate_report.py", *options]),
        "machine": machine(),
        "device": {
            "multiprocessors": 1,
            "shared_bytes_per_block": SHARED_BYTES,
            "stands_for": {"multiprocessors": PARTS, "images": PARTS * images},
        },
        "limits": LIMITS,
        "launches": launches,
        "calls": calls,
    }


def _verdict_words(call: dict[str, Any]) -> str:
    return "  ".join(
        f"{limit} {verdict['value']:.3g}{'' if verdict['met'] else ' (!)'}"
        for limit, verdict in call["verdicts"].items()
    )


def _cells(call: dict[str, Any], notes: dict[str, int]) -> dict[str, str]:
    """Values by limit; `notes`: numbers of reasons, to which new ones are added."""
    result = dict.fromkeys(LIMITS, "")
    for limit, verdict in call["verdicts"].items():
        result[limit] = f"{verdict['value']:.3g}"
        if not verdict["met"]:
            note = notes.setdefault(verdict["why"], len(notes) + 1)
            share = f" of {verdict['share']:.2%}" if "share" in verdict else ""
            result[limit] = f"**{result[limit]}**{share} [{note}]"
    return result


_COLUMNS = (
    "kernel",
    "shape",
    "floor",
    "launch",
    "blocks",
    "reads",
    "sectors",
    "of the fewest",
    "wavefronts",
    "conflict",
    "grid",
    "barriers",
)


def _over(part: int, whole: int, form: str) -> str:
    return format(part / whole, form) if whole else ""


def _row(call: dict[str, Any], launches: list[dict[str, Any]], notes: dict[str, int]) -> str:
    cells = _cells(call, notes)
    sums: dict[str, Counter[str]] = {"read": Counter(), "written": Counter()}
    for _, way, _, counts in sides(launches, "stream"):
        sums[way].update(counts)
    read, shared = sums["read"], Counter[str]()
    for launch in launches:
        for kind in launch["shared"].values():
            shared.update(kind)
    columns = [
        call["kernel"],
        call["name"],
        f"{call['floor_bytes']:,}",
        cells["launch"],
        cells["blocks"],
        _over(read["block_bytes"], read["launch_bytes"], ".3g"),
        ", ".join(_over(side["sectors"], side["requests"], ".1f") or "-" for side in sums.values()),
        cells["sectors"],
        _over(shared["wavefronts"], shared["requests"], ".2f"),
        cells["ways"],
        "+".join(str(launch["blocks"]) for launch in launches),
        "+".join(_over(launch["barriers"], launch["blocks"], ".0f") for launch in launches),
    ]
    return f"| {' | '.join(columns)} |"


def table(content: dict[str, Any]) -> str:
    """traffic.md."""
    stands_for = content["device"]["stands_for"]
    met = [verdict["met"] for call in content["calls"] for verdict in call["verdicts"].values()]
    notes: dict[str, int] = {}
    rows = []
    for call in content["calls"]:
        case = call["kernel"], call["name"]
        rows.append(_row(call, [x for x in content["launches"] if (x["kernel"], x["name"]) == case], notes))
    return (
        f"""# What the CUDA kernels move

Counted from executing them under emulation (`make emulate-report`); nothing here has run on a GPU, and nothing is a
time. The device is one of the {stands_for["multiprocessors"]} multiprocessors of an H100, with its share of \
{stands_for["images"]:,} images. `traffic.json` has every
count; `bench/gpu/emulate_report.py` says how it is laid out.

- floor: bytes of the call, each input once and each output once
- launch: different bytes that it moves, in whole sectors, over the floor (at most {LIMITS["launch"]})
- blocks: bytes of the maps that it reads and writes, different ones in each block and summed up over the blocks, over
  the maps once (at most {LIMITS["blocks"]:g}); reads: the same of what is read: above 1 are halos, and blocks that read
  the same for other channels
- sectors: of 32 bytes, a request of a warp to these maps, read and written; then the largest ratio to the fewest that
  hold the same bytes (at most {LIMITS["sectors"]})
- wavefronts: of shared memory, a request (at best 1 with 4 bytes a lane, 2 with 8, 4 with 16 and for ldmatrix); then
  the largest conflict of a source line in an inner loop: one that a warp passes more than {LOOP} times in a block and
  that makes a hundredth of the requests (at most {LIMITS["ways"]}-way)
- grid: blocks; barriers: of a block. A sum is over the call's launches

{sum(met)} of {len(met)} limits are met. Where one is not, a number in brackets says why, and for conflicts a \
percentage how many of the
line's requests are above it.

| {" | ".join(_COLUMNS)} |
|:--|:--|{"--:|" * (len(_COLUMNS) - 2)}
"""
        + "".join(f"{row}\n" for row in rows)
        + "".join(f"\n{number}. {text}" for text, number in notes.items())
        + "\n" * bool(notes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each kernel at one small shape")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="those alone")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--build", type=Path, help="folder of a tracing build that is there already")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/emulated", help="folder of the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.build or build_traced(Path(temporary), -(-UNITS // PARTS))
        content = report(folder, options.images, options.quick, options.kernels)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "traffic.json", content, indent=None)
    write_bytes(options.output / "traffic.md", table(content).encode())
    print(f"{options.output}: {len(content['launches'])} launches")


if __name__ == "__main__":
    main()
