"""GreedyNAS: one-shot neural architecture search that trains promising paths only.

The method is that of You et al., "GreedyNAS: Towards Fast One-Shot NAS with Greedy Supernet", CVPR 2020. Losses of
paths, candidate pool, samplers and schedule come from `greedynas_ext`. The command line is `greedynas`.
"""

from greedynas.network import Network
from greedynas.spaces import Space, available_spaces, get_space
from greedynas.supernet import Supernet
from greedynas.theory import corrected_optimizations, exploit_q, theorem1
from greedynas_ext import CandidatePool, DrawnPaths, ExploitSchedule, FairSampler, GreedySampler, UniformSampler

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
