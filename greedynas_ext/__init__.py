"""Fast evaluation of the paths of a supernet, for PyTorch.

`evaluate_paths` computes the losses of many paths of a one-shot supernet on the same images, and `adapt` makes what it
takes of a supernet that already exists; `explain` says what would run fused, and why not; `ops` are the operations
below it, `reference` the same in plain torch.
`PathFilter` says which paths a training loop is to train next, with a `CandidatePool`, the samplers and an
`ExploitSchedule`. `python -m greedynas_ext.info` says what this build can do.
"""

from importlib.metadata import PackageNotFoundError, version

from greedynas_ext import ops, reference
from greedynas_ext.adapt import adapt
from greedynas_ext.adapted import AdaptedSupernet
from greedynas_ext.arguments import SupernetLike
from greedynas_ext.evaluate import evaluate_paths
from greedynas_ext.explain import explain
from greedynas_ext.explanation import ExplainedOperation, ExplainedStage, Explanation
from greedynas_ext.fused import release_memory
from greedynas_ext.path_filter import FilterRound, PathFilter
from greedynas_ext.plan import EvaluationPlan
from greedynas_ext.pool import CandidatePool
from greedynas_ext.prepared import PreparedEvaluation, prepare_paths
from greedynas_ext.profile import StageProfile
from greedynas_ext.results import PathEvaluation
from greedynas_ext.samplers import DrawnPaths, FairSampler, GreedySampler, UniformSampler
from greedynas_ext.schedules import ExploitSchedule

try:
    __version__ = version("greedynas_ext")
except PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdaptedSupernet",
    "CandidatePool",
    "DrawnPaths",
    "EvaluationPlan",
    "ExplainedOperation",
    "ExplainedStage",
    "Explanation",
    "ExploitSchedule",
    "FairSampler",
    "FilterRound",
    "GreedySampler",
    "PathEvaluation",
    "PathFilter",
    "PreparedEvaluation",
    "StageProfile",
    "SupernetLike",
    "UniformSampler",
    "adapt",
    "evaluate_paths",
    "explain",
    "ops",
    "prepare_paths",
    "reference",
    "release_memory",
]
