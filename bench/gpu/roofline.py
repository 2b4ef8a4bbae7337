"""Bytes and operations of a path for PyTorch's ways and for the CUDA kernels, and what they imply on an H100.

Run: python bench/gpu/roofline.py [--markdown docs/roofline.md] [--picture docs/roofline.png] [--paths 10]
    [--images 1000]

No GPU: bytes are counted tensor by tensor, as each way reads and writes them; times that are called measured are those
of bench/results/h100/.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from gpu_nodes import evaluation
from nvcc import ROOT

from greedynas import Space, get_space
from greedynas.costs import output_size
from greedynas.markdown import image, table
from greedynas_ext.bench.inputs import make_paths
from greedynas_ext.files import write_bytes

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend

DRAM = 3.0e12  # bytes a second of an H100
TENSOR = 798e12  # operations a second, bfloat16
_BYTES = 2  # of a number of a map


@dataclass(frozen=True)
class Passes:
    """How often a map is read and written around the operations that make it and use it.

    Attributes:
        activated: of a convolution's output that a BatchNorm and an activation follow: until it is ready.
        linear: the same without an activation.
        added: of a residual's sum beyond that.
    """

    activated: int
    linear: int
    added: int


# Eager: the convolution writes; BatchNorm reads for the statistics, reads and writes; the activation reads and writes;
# the sum reads twice and writes. Compiled: what follows the statistics is one pass, which reads the residual too.
EAGER = Passes(activated=6, linear=4, added=3)
COMPILED = Passes(activated=4, linear=4, added=1)


def path_bytes(space: Space, path: Sequence[int], resolution: int, passes: Passes) -> int:
    """Bytes that move for one image along one path, convolution by convolution: inputs are read once by each."""
    size = output_size(resolution, space.stem_stride)
    # Images are bfloat16 where everything is.
    numbers = resolution**2 * space.in_channels + passes.activated * size**2 * space.stem_channels
    layers = [(layer, space.fixed_operation) for layer in space.fixed]
    layers += [(layer, space.operations[op]) for layer, op in zip(space.layers, path, strict=True)]
    for layer, op in layers:
        before = size**2
        size = output_size(size, layer.stride)
        pixels, hidden = size**2, op.expansion * layer.in_channels
        if op.identity:
            if not layer.keeps_shape:
                numbers += pixels * layer.in_channels + passes.linear * pixels * layer.out_channels
            continue
        if op.expansion > 1:
            numbers += before * layer.in_channels + passes.activated * before * hidden
        numbers += before * hidden + passes.activated * pixels * hidden  # depthwise
        numbers += pixels * hidden + passes.linear * pixels * layer.out_channels  # projection
        if layer.keeps_shape:
            numbers += passes.added * pixels * layer.out_channels
    pixels, channels = size**2, space.layers[-1].out_channels
    numbers += pixels * channels + passes.activated * pixels * space.head_channels
    numbers += pixels * space.head_channels + 2 * space.head_channels + space.num_classes  # pooled, classified
    return _BYTES * numbers


def operations(space: Space, path: Sequence[int], resolution: int) -> tuple[int, int]:
    """Dense and depthwise ones for an image, two to a multiply-accumulate."""
    costs = space.cost_table(resolution)
    cost = costs.fixed
    for layer, op in zip(costs.operations, path, strict=True):
        cost += layer[op]
    return 2 * cost.dense_macs, 2 * cost.depthwise_macs


@dataclass(frozen=True)
class Way:
    """Of an image and path, on the average of the paths.

    Attributes:
        name: what the table calls it.
        bytes: that move.
        dense, depthwise: operations.
        measured: seconds on an H100, or None; and for how many paths.
    """

    name: str
    bytes: float
    dense: float
    depthwise: float
    measured: float | None
    measured_paths: int

    @property
    def by_bytes(self) -> float:
        return self.bytes / DRAM

    @property
    def by_operations(self) -> float:
        return self.dense / TENSOR


def ways(space: Space, paths: Sequence[Sequence[int]], images: int, results: Path) -> list[Way]:
    """PyTorch's two, and ours; those loop over paths, ours computes common prefixes once."""
    counted = [operations(space, path, space.resolution) for path in paths]
    dense, depthwise = (statistics.fmean(pair[at] for pair in counted) for at in (0, 1))
    ten, one = (json.loads((results / file).read_text()) for file in ("uniform.json", "compiled.json"))

    def measured(found: dict[str, Any], way: str, paths: int) -> float:
        seconds: list[float] = found["ways"][way]["seconds"]
        return statistics.median(seconds) / (paths * 1000)

    def loop(passes: Passes) -> float:
        return statistics.fmean(path_bytes(space, path, space.resolution, passes) for path in paths)

    nodes: Counter[Any] = Counter()
    for stage in evaluation(space, paths, images, space.resolution).values():
        nodes.update(stage)
    share = 1 / (len(paths) * images)
    ours = sum(node.dram_bytes * count for node, count in nodes.items()) * share
    left = sum(node.tensor_flop * count for node, count in nodes.items() if node.function != "finish_map") * share
    return [
        Way("eager, pure bfloat16", loop(EAGER), dense, depthwise, measured(ten, "eager, pure", 10), 10),
        Way(
            "blocks under torch.compile", loop(COMPILED), dense, depthwise, measured(one, "compiled blocks, pure", 1), 1
        ),
        Way("these kernels", ours, left, depthwise * left / dense, measured(ten, "evaluate_paths", 10), 10),
    ]


def page(found: Sequence[Way], paths: int, images: int, picture: str, modelled: float | None) -> str:
    """Markdown. `modelled`: seconds of all paths on all images, of bench/gpu/gpu_model.py."""
    rows = []
    for way in found:
        flop = way.dense + way.depthwise
        longest = max(way.by_bytes, way.by_operations)
        rows.append(
            [
                way.name,
                f"{way.bytes / 1e6:.1f}",
                f"{way.dense / 1e6:.0f}",
                f"{way.depthwise / 1e6:.0f}",
                f"{flop / way.bytes:.1f}",
                f"{way.by_bytes * 1e6:.2f}",
                f"{way.by_operations * 1e6:.2f}",
                f"{longest * paths * images * 1e3:.0f}",
                f"{way.measured * 1e6:.1f} ({way.measured_paths})" if way.measured else "",
            ]
        )
    header = ["", "MB", "dense, M", "depthwise, M", "operations a byte", "us by bytes", "us by operations",
              f"all, ms: {paths} paths, {images:,} images", "us measured (paths)"]  # fmt: skip
    ours, eager, best = found[2], found[0], found[1]
    model = ""
    if modelled is not None:
        took = f"{modelled * 1e3:.0f} ms for all of it"
        model = f"By [the model of their machine code](gpu-model.md) these kernels take {took}:\n"
        model += "instruction issue binds them, not bytes.\n"
    return _PAGE.format(
        paths=paths,
        images=f"{images:,}",
        table=table(header, rows, right=range(1, 9)),
        picture=image("Operations a second against operations a byte", picture),
        fewer_eager=f"{eager.bytes / ours.bytes:.1f}",
        fewer_best=f"{best.bytes / ours.bytes:.1f}",
        model=model,
        dram=f"{DRAM / 1e12:.1f}",
        tensor=f"{TENSOR / 1e12:.0f}",
        ridge=f"{TENSOR / DRAM:.0f}",
    )


_PAGE = """\
# What bytes and operations imply on an H100

**Computed**, by `make emulate-report` (`bench/gpu/roofline.py`), but for the last column, which an H100 was
measured for (`bench/results/h100/`). For one image and path, the average of {paths} uniform paths of `mbv2-7` at
224x224 with batch statistics, every map in bfloat16; operations are two to a multiply-accumulate.

{table}

"By bytes": at {dram} TB/s, as if every tensor went to memory and came from there and nothing else took time. "By
operations": dense convolutions and the classifier at {tensor} TFLOP/s. The longer of them is the least that a way can
take; below {ridge} operations a byte that is bytes.

- Eager PyTorch writes the output of each convolution, reads it for the statistics, reads and writes it to normalise,
  reads and writes it for the activation, and reads it in the next convolution.
- `torch.compile` of each block, the best of PyTorch's ways, has one pass for normalising, activation and residual.
- These kernels read the block's input and write the depthwise output, read that and write the projection, and read and
  write that to normalise it and take its moments: {fewer_eager} times fewer bytes than eager, {fewer_best} times fewer
  than compiled blocks. Common prefixes are computed once.

{model}
{picture}

Lines: what {dram} TB/s and {tensor} TFLOP/s allow. Filled: what the bytes allow; open: what was measured.
"""


def draw(found: Sequence[Way], picture: Path) -> None:
    """Operations a second against operations a byte, both logarithmic."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    intensities = [4.0, TENSOR / DRAM, 1024.0]
    axes.plot(intensities, [min(x * DRAM, TENSOR) / 1e12 for x in intensities], color="black", label="H100")
    for way, colour in zip(found, ("tab:orange", "tab:green", "tab:blue"), strict=True):
        flop = way.dense + way.depthwise
        x = flop / way.bytes
        axes.plot([x], [min(x * DRAM, TENSOR) / 1e12], "o", color=colour, label=way.name)
        if way.measured is not None:
            y = flop / way.measured / 1e12
            axes.plot([x], [y], "o", color=colour, fillstyle="none")
            axes.annotate(f"{y:.0f}", (x, y), textcoords="offset points", xytext=(8, -4), fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = ROOT / "bench/results"
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs/roofline.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/roofline.png")
    parser.add_argument(
        "--modelled", type=Path, default=results / "emulated/modelled.json", help="of bench/gpu/gpu_model.py"
    )
    parser.add_argument("--paths", type=int, default=10)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    space = get_space("mbv2-7")
    paths = make_paths("uniform", options.paths, space).tolist()
    found = ways(space, paths, options.images, results / "h100")
    modelled = None
    if options.modelled.exists():
        of = json.loads(options.modelled.read_text())
        if of["paths"] == paths and of["images"] == options.images:
            modelled = sum(sum(by.values()) for by in of["stages"].values())
    draw(found, options.picture)
    text = page(found, options.paths, options.images, options.picture.name, modelled)
    write_bytes(options.markdown, text.encode())
    for way in found:
        print(f"{way.name:<28}{way.bytes / 1e6:>7.1f} MB{way.by_bytes * 1e6:>7.2f} us by bytes")


if __name__ == "__main__":
    main()
