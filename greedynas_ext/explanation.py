"""What `explain` says: as data, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ExplainedOperation:
    """One operation that the paths use: a candidate of a layer, a fixed block, the stem or the head.

    Attributes:
        place: its name, as reasons and errors give it.
        nodes: how often it is run, once for each unique prefix that ends in it.
        of_paths: how often a loop over the paths would run it.
        macs: multiply-accumulates of those `nodes`, of one image.
        macs_of_paths: likewise of the loop.
        macs_fused: those of `macs` that fused kernels run.
        written: bytes that it writes to maps, of one image.
        share: of the time that is expected, in [0, 1].
        reason: why it does not run fused; None where it does.
    """

    place: str
    nodes: int
    of_paths: int
    macs: int
    macs_of_paths: int
    macs_fused: int
    written: int
    share: float
    reason: str | None


@dataclass(frozen=True)
class ExplainedStage:
    """The operations of the stem, a layer, a fixed block or the head together, by the names of `profile`'s stages."""

    stage: str
    nodes: int
    of_paths: int
    macs: int
    macs_of_paths: int
    macs_fused: int
    written: int
    share: float
    operations: tuple[ExplainedOperation, ...]

    @classmethod
    def of(cls, stage: str, operations: Sequence[ExplainedOperation]) -> ExplainedStage:
        """Adds up."""
        names = ("nodes", "of_paths", "macs", "macs_of_paths", "macs_fused", "written", "share")
        sums: dict[str, Any] = {name: sum(getattr(operation, name) for operation in operations) for name in names}
        return cls(stage, **sums, operations=tuple(operations))


@dataclass(frozen=True)
class Explanation:
    """What `evaluate_paths` would do with m paths. Made by `explain`; `str` gives a table.

    Fields that `EvaluationPlan` has too are what it would say.

    Attributes:
        num_paths: m.
        num_layers: columns of the paths.
        resolution: height and width of the images.
        unique_nodes: operations that are run: unique prefixes of the paths.
        nodes_per_layer: the same for each layer.
        kernels: what computes: "fused, " and the instruction set, or "modules: " and why; "partly fused; ".
        macs_computed: multiply-accumulates of one image, each unique prefix once.
        macs_saved: what running each path on its own would add.
        macs_fused: those of `macs_computed` that fused kernels run.
        stages: stem, layers and fixed blocks, head.
    """

    num_paths: int
    num_layers: int
    resolution: tuple[int, int]
    unique_nodes: int
    nodes_per_layer: tuple[int, ...]
    kernels: str
    macs_computed: int
    macs_saved: int
    macs_fused: int
    stages: tuple[ExplainedStage, ...]

    @property
    def fused_fraction(self) -> float:
        """Of the multiply-accumulates that are computed."""
        return self.macs_fused / max(1, self.macs_computed)

    @property
    def shared_fraction(self) -> float:
        """Of the multiply-accumulates of running each path on its own: what sharing prefixes saves."""
        return self.macs_saved / max(1, self.macs_computed + self.macs_saved)

    @property
    def reasons(self) -> dict[str, str]:
        """Why operations do not run fused, by their places."""
        operations = [operation for stage in self.stages for operation in stage.operations]
        return {operation.place: operation.reason for operation in operations if operation.reason is not None}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        height, width = self.resolution
        lines = [
            f"{self.num_paths} paths of {self.num_layers} layers on images of {height}x{width}: {self.kernels}",
            f"{self.unique_nodes} of {self.num_paths * self.num_layers} operations run, "
            f"{1 - self.shared_fraction:.1%} of the multiply-accumulates of separate paths, "
            f"{self.fused_fraction:.1%} of them fused",
            "",
            f"{'':<10}{'runs':>6}{'for':>6}{'MMACs':>10}{'fused':>7}{'MB':>9}{'time':>7}",
        ]
        lines += [_row(stage) for stage in self.stages]
        lines += _in_words(self.reasons)
        return "\n".join(lines)


def _row(stage: ExplainedStage) -> str:
    fused = f"{stage.macs_fused / stage.macs:.0%}" if stage.macs else "-"
    return (
        f"{stage.stage:<10}{stage.nodes:>6}{stage.of_paths:>6}{stage.macs / 1e6:>10.2f}{fused:>7}"
        f"{stage.written / 1e6:>9.2f}{stage.share:>7.1%}"
    )


def _in_words(reasons: dict[str, str]) -> list[str]:
    """A line for each reason, and the places that share it."""
    places: dict[str, list[str]] = {}
    for place, reason in reasons.items():
        places.setdefault(reason, []).append(place)
    if not places:
        return []
    lines = ["", "not fused:"]
    for reason, there in places.items():
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        lines.append(f"  {', '.join(there[:3])}{more}: {reason}")
    return lines
