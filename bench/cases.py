"""What bench/evaluate_paths.py measures, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: what --case calls it.
        space: the search space.
        source: where the paths are from: "uniform", "pool" or "population", as `inputs.make_paths`.
        paths: m.
        images: N.
        resolution: height and width of the images in pixels; 0 for the space's own.
        bn: the statistics of batch normalisation, "batch" or "running".
        precision: "fp32" or "bf16", of both sides.
        isa: the instruction set that both sides are limited to (a key of ISA_LIMITS), or None.
    """

    name: str
    space: str
    source: str = "uniform"
    paths: int = 10
    images: int = 32
    resolution: int = 0
    bn: str = "batch"
    precision: str = "fp32"
    isa: str | None = None

    def quick(self) -> Case:
        """The same at a size that takes a second; its times say nothing about the real one."""
        small = {"mbv2-7": (6, 64), "mini-28": (32, 28), "mini-16": (32, 8)}
        images, resolution = small[self.space]
        return replace(self, paths=min(self.paths, 10), images=images, resolution=resolution)


def _in_both_precisions(case: Case) -> list[Case]:
    return [replace(case, name=f"{case.name}-{precision}", precision=precision) for precision in ("fp32", "bf16")]


def _cases() -> list[Case]:
    cases = [
        Case("mbv2-7", "mbv2-7"),
        Case("mbv2-7-n128", "mbv2-7", images=128),
        Case("mbv2-7-pool", "mbv2-7", source="pool"),
        Case("mbv2-7-population", "mbv2-7", source="population", paths=50),
        Case("mbv2-7-running", "mbv2-7", bn="running"),
        Case("mini-28", "mini-28", images=1000),
        Case("mini-28-pool", "mini-28", source="pool", images=1000),
        Case("mini-16", "mini-16", images=1000),
        Case("mini-16-population", "mini-16", source="population", paths=50, images=1000),
    ]
    limited = [Case(f"mbv2-7-{isa}", "mbv2-7", isa=isa) for isa in ("avx512", "avx2")]
    limited.append(Case("mbv2-7-avx512-bf16", "mbv2-7", precision="bf16", isa="avx512-bf16"))
    return [both for case in cases for both in _in_both_precisions(case)] + limited


CASES: dict[str, Case] = {case.name: case for case in _cases()}

# oneDNN's and PyTorch's own limits hold them to the same instructions: avx512 is Skylake's, avx512-bf16 Cooper Lake's,
# with products of bfloat16, but no matrix tiles.
ISA_LIMITS: dict[str, dict[str, str]] = {
    "avx512": {
        "GREEDYNAS_CPU_CAPABILITY": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
    "avx512-bf16": {
        "GREEDYNAS_CPU_CAPABILITY": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
    "avx2": {"GREEDYNAS_CPU_CAPABILITY": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "portable": {
        "GREEDYNAS_CPU_CAPABILITY": "portable",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}
