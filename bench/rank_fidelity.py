"""Whether less precise losses rank the paths of a trained supernet as exact ones do.

Run: python bench/rank_fidelity.py [--run runs/bench/mini-28] [--data-root DIR] [--output FILE.json]

Losses of random paths on validation images: in float64, which counts as the truth; by `evaluate_paths` in fp32 and
bf16; by PyTorch in fp32, under autocast, and with everything in bfloat16. The true ones are those of the kernels in
float64, since PyTorch's own are slow in it (an hour); for some paths the supernet's modules compute them too, and
nothing is reported where the two differ by 1e-9. --check-paths 200 has the modules compute all.

Besides errors: Kendall's tau-b over all paths, and what GreedyNAS needs, whether the best 5 of 10 random paths are the
true best 5. "kept" is how many of them are among the true ones on average, "same" in how many draws all five are.

Intervals are 95% bootstrap percentiles: of tau over the paths, of the others over the draws, the paths being given.
Where the run folder holds no finished training, one is made first (minutes), as bench/make_paths.py does.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from make_paths import RUNS, configs
from scipy.stats import kendalltau
from torch import Tensor

from greedynas import Supernet
from greedynas.config import TrainConfig
from greedynas.runs import RunFolder, load_run
from greedynas.training import train
from greedynas_ext.bench.measure import machine
from greedynas_ext.bench.ours import evaluate
from greedynas_ext.bench.ways import WAYS
from greedynas_ext.strict_json import write_json

Floats = npt.NDArray[np.float64]
TRUTH = "float64"
_TRUTH_TOLERANCE = 1e-9  # nats


def true_losses(supernet: Supernet, paths: Tensor, images: Tensor, targets: Tensor, checked: int) -> Floats:
    """Losses [m] in float64, the first `checked` of them confirmed by the supernet's modules.

    Raises:
        ValueError: they differ.
    """
    double, images = copy.deepcopy(supernet).double(), images.double()
    losses: Floats = evaluate(double, paths, images, targets, "batch", None).losses.numpy()
    modules = evaluate(double, paths[:checked], images, targets, "batch", None, fused=False).losses.numpy()
    difference = float(np.abs(losses[:checked] - modules).max())
    if not difference <= _TRUTH_TOLERANCE:
        raise ValueError(f"losses: expected those of the modules in float64, got ones that differ by {difference:.3g}")
    return losses


def losses_of(supernet: Supernet, paths: Tensor, images: Tensor, targets: Tensor, checked: int) -> dict[str, Floats]:
    """Losses [m] of each way, with the statistics of the batch."""
    losses = {TRUTH: true_losses(supernet, paths, images, targets, checked)}
    for precision in ("fp32", "bf16"):
        found = evaluate(supernet, paths, images, targets, "batch", precision).losses
        losses[f"evaluate_paths, {precision}"] = found.double().numpy()
    by_name = {way.name: way for way in WAYS}
    for name in ("eager, fp32", "eager, autocast", "eager, pure"):
        # Prefixes are shared, which changes no loss and saves time.
        way = by_name[f"{name}, sharing"]
        losses[name] = np.array(way.make(supernet, paths, images, targets, "batch")())
    return losses


def draw_tens(paths: int, draws: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Indices int64 [draws, 10] of 10 different paths."""
    return np.stack([generator.permutation(paths)[:10] for _ in range(draws)])


def kept_of_best(truth: Floats, losses: Floats, draws: npt.NDArray[np.int64]) -> Floats:
    """For each draw the fraction of its true best 5 that are its best 5 by `losses`, [draws]."""
    best, chosen = (np.argsort(values[draws], axis=1, kind="stable")[:, :5] for values in (truth, losses))
    matches: Floats = (best[:, :, None] == chosen[:, None, :]).any(axis=2).mean(axis=1)
    return matches


def bootstrap(
    statistic: Callable[[npt.NDArray[np.int64]], float], size: int, generator: np.random.Generator, resamples: int
) -> tuple[float, float]:
    """95% percentile interval of a statistic of resampled indices."""
    values = [statistic(generator.integers(size, size=size)) for _ in range(resamples)]
    lower, upper = np.percentile(values, [2.5, 97.5])
    return float(lower), float(upper)


def fidelity(
    truth: Floats, losses: Floats, draws: npt.NDArray[np.int64], generator: np.random.Generator, resamples: int = 1000
) -> dict[str, Any]:
    """Errors, tau and agreement of some losses with the true ones."""
    error = np.abs(losses - truth)
    kept = kept_of_best(truth, losses, draws)
    same = (kept == 1.0).astype(np.float64)
    return {
        "max_error": float(error.max()),
        "mean_error": float(error.mean()),
        "tau": float(kendalltau(truth, losses).statistic),
        "tau_interval": bootstrap(
            lambda index: float(kendalltau(truth[index], losses[index]).statistic), len(truth), generator, resamples
        ),
        "kept": float(kept.mean()),
        "kept_interval": bootstrap(lambda index: float(kept[index].mean()), len(kept), generator, resamples),
        "same": float(same.mean()),
        "same_interval": bootstrap(lambda index: float(same[index].mean()), len(same), generator, resamples),
    }


def trained(run: Path, data_root: Path | None) -> RunFolder:
    """The folder of a finished training; trains mini-28 where there is none."""
    folder = RunFolder(run)
    if folder.finished:
        return folder
    config, _ = configs("mini-28", run.parent, data_root)
    return train(TrainConfig(**{**vars(config), "run": run}), resume=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUNS / "mini-28", help="folder of a finished `greedynas train`")
    parser.add_argument("--data-root", type=Path, help="folder of Fashion-MNIST's files, for a training")
    parser.add_argument("--paths", type=int, default=200)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000, help="draws of 10 paths")
    parser.add_argument("--check-paths", type=int, default=3, help="paths whose true losses the modules confirm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file of everything measured")
    options = parser.parse_args()
    run = load_run(trained(options.run, options.data_root).root)
    space, validation = run.task.space, run.task.data.validation
    torch_generator = torch.Generator().manual_seed(options.seed)
    paths = torch.randint(space.num_operations, (options.paths, space.num_layers), generator=torch_generator)
    order = torch.randperm(len(validation), generator=torch_generator)[: options.images]
    images, targets = validation.batch(order)
    images = images.contiguous(memory_format=torch.channels_last)
    losses = losses_of(run.supernet.eval(), paths, images, targets, options.check_paths)
    truth = losses[TRUTH]
    generator = np.random.default_rng(options.seed)
    draws = draw_tens(len(paths), options.draws, generator)
    print(
        f"{space.name}, {run.summary['optimizer_steps']} steps on {run.summary['data']}\n"
        f"{len(paths)} paths on {len(images)} images; true losses {truth.min():.3f} to {truth.max():.3f}, "
        f"standard deviation {truth.std():.3f}; best 5 of 10 in {len(draws)} draws"
    )
    print(f"{'':<24}{'max error':>10}{'mean':>10}  {'tau':<26}{'kept':<26}{'same':<26}")
    results = {}
    for name, values in losses.items():
        if name == TRUTH:
            continue
        results[name] = found = fidelity(truth, values, draws, generator)
        figures = [
            f"{found[key]:.4f} ({found[f'{key}_interval'][0]:.4f} to {found[f'{key}_interval'][1]:.4f})"
            for key in ("tau", "kept", "same")
        ]
        print(
            f"{name:<24}{found['max_error']:>10.1e}{found['mean_error']:>10.1e}  "
            + "".join(f"{f:<26}" for f in figures)
        )
    if options.output is not None:
        write_json(
            options.output,
            {
                "command": sys.argv,
                "machine": machine(),
                "training": run.summary,
                "results": results,
                "losses": {name: values.tolist() for name, values in losses.items()},
            },
        )


if __name__ == "__main__":
    main()
