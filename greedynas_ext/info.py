"""`python -m greedynas_ext.info`: build, features and versions on one screen, to paste into a report."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import greedynas_ext
from greedynas_ext import _library

_BUILD_INFO = Path(__file__).resolve().parent / "_build_info.json"


def build_info() -> dict[str, Any]:
    """What the build decided: `torch`, `cuda` (`build`, `reason`), `flags`; empty where it is unknown."""
    try:
        info = json.loads(_BUILD_INFO.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return info if isinstance(info, dict) else {}


def describe() -> dict[str, str]:
    """Lines of the report: name -> value."""
    build = build_info()
    cuda = build.get("cuda", {})
    built = "built" if cuda.get("build") else "left out"
    return {
        "greedynas_ext": greedynas_ext.__version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": f"{torch.__version__} (built against {build.get('torch', 'unknown')})",
        "operations": _state(_library.require_ops),
        "path plan": _state(_library.require_plan),
        "CPU kernels": _cpu_kernels(),
        "CUDA kernels": f"{built}: {cuda['reason']}" if cuda else "unknown: no build information",
        "CUDA devices": str(torch.cuda.device_count()) if torch.cuda.is_available() else "none",
        "threads": f"{torch.get_num_threads()}",
    }


def _cpu_kernels() -> str:
    try:
        module = _library.require_chain()
        bf16 = f"bf16 by {module.bf16_kernels()}" if module.bf16_kernels() else "bf16 computed in float32"
        return f"{module.used_capability()}, {bf16}: {module.capability_reason()}"
    except (ImportError, ValueError) as error:
        return str(error)


def _state(require: Any) -> str:
    try:
        require()
    except ImportError as error:
        return str(error)
    return "loaded"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report; with --brief only what was built and what was left out."""
    parser = argparse.ArgumentParser(prog="python -m greedynas_ext.info", description=__doc__)
    parser.add_argument("--brief", action="store_true", help="one line: what was built and what was left out")
    options = parser.parse_args(arguments)
    lines = describe()
    if options.brief:
        print(f"greedynas_ext {lines['greedynas_ext']}: CPU kernels built, CUDA kernels {lines['CUDA kernels']}")
        return
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
