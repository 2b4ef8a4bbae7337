"""Fast evaluation of the paths of a supernet, for PyTorch.

`evaluate_paths` computes the losses of many paths of a one-shot supernet on the same images, and `adapt` makes what it
takes of a supernet that already exists; `ops` are the operations below it, `reference` the same in plain torch.
`python -m greedynas_ext.info` says what this build can do.
"""

from importlib.metadata import PackageNotFoundError, version

from greedynas_ext import ops, reference
from greedynas_ext.adapt import adapt
from greedynas_ext.adapted import AdaptedSupernet
from greedynas_ext.arguments import SupernetLike
from greedynas_ext.evaluate import PathEvaluation, evaluate_paths
from greedynas_ext.fused import release_memory
from greedynas_ext.plan import EvaluationPlan
from greedynas_ext.runner import StageProfile

try:
    __version__ = version("greedynas_ext")
except PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdaptedSupernet",
    "EvaluationPlan",
    "PathEvaluation",
    "StageProfile",
    "SupernetLike",
    "adapt",
    "evaluate_paths",
    "ops",
    "reference",
    "release_memory",
]
