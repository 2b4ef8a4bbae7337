"""How long `evaluate_paths` takes on a GPU, against PyTorch's loops over paths and over prefixes there.

Run: python bench/gpu/gpu.py [--space mbv2-7] [--images 1000] [--paths 10] [--resolution 224] [--source uniform]
         [--rounds 7] [--compile] [--ways NAME ...] [--output FILE.json]

Batch statistics, bf16, images on the GPU. Every way is warmed up, its losses are compared with those of the modules in
float32 (TF32 off), and then all are timed in interleaved rounds, each call up to its losses on the host. A ratio is the
median over rounds of the ratios within each, with quartiles. "sharing" computes common prefixes once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from greedynas import get_space
from greedynas_ext import evaluate_paths
from greedynas_ext.bench.inputs import make_images, make_paths, make_targets
from greedynas_ext.bench.measure import interleave, machine
from greedynas_ext.bench.subjects import make_supernet
from greedynas_ext.bench.ways import WAYS, reference_losses
from greedynas_ext.strict_json import write_json

OURS = "evaluate_paths"


def peak_bytes(call: Callable[[], object]) -> int:
    """Of GPU memory during a call, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mbv2-7")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--paths", type=int, default=10)
    parser.add_argument("--resolution", type=int, default=224, help="pixels")
    parser.add_argument("--source", default="uniform", help="of the paths: uniform, pool or population")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--compile", action="store_true", help="blocks under torch.compile too, which takes minutes")
    parser.add_argument("--ways", nargs="+", help="of PyTorch, those alone, as the table calls them")
    parser.add_argument("--output", type=Path, help="JSON file of everything measured")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a GPU, found none")

    space = get_space(options.space)
    supernet = make_supernet(space).cuda()
    paths = make_paths(options.source, options.paths, space)
    images = make_images(options.images, space.in_channels, options.resolution).cuda()
    targets = make_targets(options.images, space.num_classes).cuda()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected = torch.tensor(reference_losses(supernet, paths, images, targets, "batch"))
    torch.cuda.empty_cache()

    def ours() -> list[float]:
        losses: list[float] = evaluate_paths(
            supernet, paths, images, targets, precision="bf16", fused=True
        ).losses.tolist()
        return losses

    ways: dict[str, Callable[[], list[float]]] = {OURS: ours}
    for way in WAYS:
        wanted = way.name in options.ways if options.ways else options.compile or not way.compiled
        if way.precision == "bf16" and "batch" in way.policies and way.serves(supernet) and wanted:
            ways[way.name] = way.make(supernet, paths, images, targets, "batch")
    results: dict[str, Any] = {
        "command": sys.argv,
        "machine": {**machine(), "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "expected_losses": expected.tolist(),
        "ways": {},
    }
    for name, call in list(ways.items()):
        call()
        errors = (torch.tensor(call()) - expected).abs()
        results["ways"][name] = {"max_error": float(errors.max()), "peak_bytes": peak_bytes(call)}
    times = interleave(ways, options.rounds)
    print(
        f"{torch.cuda.get_device_name()}: {options.space}, {options.paths} {options.source} paths, "
        f"{options.images} images of {options.resolution}x{options.resolution}"
    )
    for name in ways:
        entry = results["ways"][name]
        entry["seconds"] = times.seconds[name]
        entry["ratio"] = asdict(times.ratio(name, OURS))
        print(
            f"{name:<36}{times.spread(name).median * 1e3:>9.1f} ms{entry['peak_bytes'] / 1e9:>7.2f} GB   error "
            f"{entry['max_error']:.1e}   {times.ratio(name, OURS)} times as long",
            flush=True,
        )
    result = evaluate_paths(supernet, paths, images, targets, precision="bf16", fused=True, profile=True)
    assert result.profile is not None
    results["profile"] = {stage.stage: stage.seconds for stage in result.profile}
    results["shared_fraction"] = result.plan.shared_fraction
    print("ms a stage:", ", ".join(f"{stage.stage} {stage.seconds * 1e3:.2f}" for stage in result.profile))
    if options.output is not None:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
