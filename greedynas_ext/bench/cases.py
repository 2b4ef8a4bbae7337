"""What is measured, as data: cases.toml, or a file of the same form."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from greedynas_ext.arguments import check_one_of
from greedynas_ext.checks import check_count
from greedynas_ext.files import PathLike

_FILE = Path(__file__).resolve().parent / "cases.toml"
_POLICIES = ("batch", "running")
_PRECISIONS = ("fp32", "bf16")

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


@dataclass(frozen=True)
class Case:
    """One comparison: a search space of `greedynas`, or a supernet of one's own.

    Attributes:
        name: what --case calls it.
        space: the search space; "" with `supernet`.
        source: where the paths are from: "uniform", "pool", "population", or a file, as `inputs.paths_from`.
        paths: m.
        images: N.
        resolution: height and width of the images in pixels; 0 for the space's own.
        bn: the statistics of batch normalisation, "batch" or "running".
        precision: "fp32" or "bf16", of both sides.
        isa: the instruction set that both sides are limited to (a key of ISA_LIMITS), or None.
        supernet: "module:function", which is called for a supernet that `evaluate_paths` takes.
        channels: of the images, with `supernet`.
        classes: with `supernet`.
        fused: whether it is an error where not all of it runs fused.
        device: "cpu" or a GPU.
    """

    name: str
    space: str = ""
    source: str = "uniform"
    paths: int = 10
    images: int = 32
    resolution: int = 0
    bn: str = "batch"
    precision: str = "fp32"
    isa: str | None = None
    supernet: str = ""
    channels: int = 3
    classes: int = 1000
    fused: bool = True
    device: str = "cpu"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Case:
        """A checked case.

        Raises:
            TypeError, ValueError: naming the field, what was expected and what came.
        """
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"{unknown[0]}: expected one of {', '.join(sorted(names))}, got a field of another name")
        if not isinstance(values.get("name"), str) or not values["name"]:
            raise ValueError(f"name: expected a case's name, got {values.get('name')!r}")
        case = cls(**values)
        if bool(case.space) == bool(case.supernet):
            came = "both" if case.space else "none"
            raise ValueError(f"space: expected either space or supernet (module:function), got {came}")
        for name in ("paths", "images", "channels", "classes"):
            check_count(name, getattr(case, name), 1)
        check_count("resolution", case.resolution, 1 if case.supernet else 0)
        check_one_of("bn", case.bn, _POLICIES)
        check_one_of("precision", case.precision, _PRECISIONS)
        check_one_of("isa", case.isa, (None, *ISA_LIMITS))
        if not isinstance(case.fused, bool):
            raise TypeError(f"fused: expected true or false, got {case.fused!r}")
        return case

    def quick(self) -> Case:
        """The same at a size that takes a second or so; its times say nothing about the real one."""
        small = {"mbv2-7": (6, 64), "mini-28": (32, 28), "mini-16": (32, 8)}
        images, resolution = small.get(self.space, (min(self.images, 8), min(self.resolution, 64)))
        return replace(self, paths=min(self.paths, 10), images=images, resolution=resolution)


def read_cases(file: PathLike) -> dict[str, Case]:
    """The cases of a TOML file, by their names, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML, or a case is none; the file and the case are named.
    """
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected a TOML file of cases: {error}") from error
    listed = content.pop("case", None)
    if content or not isinstance(listed, list) or not listed:
        raise ValueError(f"{file}: expected [[case]] tables alone, got {sorted(content) or 'none'}")
    cases: dict[str, Case] = {}
    for number, values in enumerate(listed):
        for each in _precisions(values):
            try:
                case = Case.from_mapping(each)
                if case.name in cases:
                    raise ValueError("name: expected each once, got one twice")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}: case {each.get('name') or number}: {error}") from error
            cases[case.name] = case
    return cases


def _precisions(values: dict[str, Any]) -> list[dict[str, Any]]:
    precisions = values.get("precision")
    if not isinstance(precisions, list):
        return [values]
    return [{**values, "name": f"{values.get('name')}-{each}", "precision": each} for each in precisions]


CASES: dict[str, Case] = read_cases(_FILE)
