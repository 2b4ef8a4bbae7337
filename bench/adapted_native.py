"""`mbv2-7` as `adapt` views it in a foreign-looking tree, against the native supernet of the same weights.

Run: python bench/adapted_native.py [--images 32] [--paths 10] [--resolution 224] [--rounds 9] [--output FILE.json]

Both are evaluated by the fused kernels, interleaved in one process; losses are equal bit for bit, or nothing is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from adapted_supernets import Renamed

from greedynas import Supernet, get_space
from greedynas_ext import adapt
from greedynas_ext.bench.inputs import make_images, make_paths, make_targets
from greedynas_ext.bench.measure import interleave, machine
from greedynas_ext.bench.ours import evaluate
from greedynas_ext.strict_json import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 32), ("paths", 10), ("resolution", 224), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    space = get_space("mbv2-7")
    native = Supernet(space, seed=0).to(memory_format=torch.channels_last)
    paths = make_paths("uniform", options.paths, space)
    batch = make_images(options.images, 3, options.resolution), make_targets(options.images, space.num_classes)
    ways = {"native": native, "adapted": adapt(Renamed(native))}
    calls = {name: partial(evaluate, way, paths, *batch, "batch", "fp32", True) for name, way in ways.items()}
    losses = [call().losses for call in calls.values()]
    if not torch.equal(*losses):
        raise ValueError(f"losses: expected equal ones, got {losses[0].tolist()} and {losses[1].tolist()}")
    times = interleave(calls, options.rounds)
    ratio = times.ratio("adapted", "native")
    for name in calls:
        print(f"{name}: {times.spread(name).median:.3f} s")
    print(f"adapted over native: {ratio.median:.3f} ({ratio.lower:.3f} to {ratio.upper:.3f})")
    if options.output is not None:
        options_used = {key: value for key, value in vars(options).items() if key != "output"}
        result = {"options": options_used, "seconds": times.seconds, "ratio": asdict(ratio), "machine": machine()}
        write_json(options.output, result)


if __name__ == "__main__":
    main()
