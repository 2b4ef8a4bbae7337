import enum
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class Statistics(enum.Enum):
    BATCH = ...
    CAPTURE = ...
    RUNNING = ...
    CONSTANTS = ...

STAGE_PARTS: list[str]

class ChainEvaluation:
    kernels: str
    times: list[tuple[float, int, int, list[float]]]
    def __init__(
        self,
        rows: npt.NDArray[np.int64],
        eps: npt.NDArray[np.float64],
        stem_blocks: int,
        nodes: npt.NDArray[np.int32],
        classifier_weight: int,
        classifier_bias: int,
        classes: int,
        precision: str,
    ) -> None: ...
    def pack(self) -> None: ...
    def needed_bytes(
        self, steps: npt.NDArray[np.int32], count: int, height: int, width: int, statistics: Statistics
    ) -> int: ...
    def start(
        self,
        steps: npt.NDArray[np.int32],
        images: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        targets: int,
        label_smoothing: float,
        image_losses: int,
        correct: int,
        statistics: Statistics,
    ) -> None: ...
    def advance(self, seconds: float) -> bool: ...

class UnitEvaluation:
    kernels: str
    statistics_size: int
    def __init__(
        self,
        rows: npt.NDArray[np.int64],
        eps: npt.NDArray[np.float64],
        branches: npt.NDArray[np.int64],
        in_channels: int,
        out_channels: int,
        precision: str,
    ) -> None: ...
    def pack(self) -> None: ...
    def needed_bytes(self, count: int, height: int, width: int, wide: bool, statistics: Statistics) -> int: ...
    def run(
        self,
        input: int,
        wide: bool,
        sizes: Sequence[int],
        strides: Sequence[int],
        output: int,
        values: int,
        statistics: Statistics,
    ) -> None: ...

def machine_capability() -> str: ...
def used_capability() -> str: ...
def capability_reason() -> str: ...
def bf16_kernels() -> str: ...
def release_memory() -> int: ...
