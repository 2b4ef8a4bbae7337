"""GreedyNAS: one-shot neural architecture search that trains promising paths only.

The method is that of You et al., "GreedyNAS: Towards Fast One-Shot NAS with Greedy Supernet", CVPR 2020. Losses of
paths come from `greedynas_ext.evaluate_paths`. The command line is `greedynas`.
"""

from greedynas.network import Network
from greedynas.pool import CandidatePool
from greedynas.samplers import DrawnPaths, FairSampler, GreedySampler, UniformSampler
from greedynas.schedules import ExploitSchedule
from greedynas.spaces import Space, available_spaces, get_space
from greedynas.supernet import Supernet
from greedynas.theory import corrected_optimizations, exploit_q, theorem1

__all__ = [
    "CandidatePool",
    "DrawnPaths",
    "ExploitSchedule",
    "FairSampler",
    "GreedySampler",
    "Network",
    "Space",
    "Supernet",
    "UniformSampler",
    "available_spaces",
    "corrected_optimizations",
    "exploit_q",
    "get_space",
    "theorem1",
]
