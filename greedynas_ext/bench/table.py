"""Results as a table and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from greedynas_ext.bench.contest import OURS
from greedynas_ext.bench.measure import Spread
from greedynas_ext.files import PathLike, write_bytes
from greedynas_ext.strict_json import read_json

HEADER = (
    f"{'case':<24}{'fastest PyTorch loop':<32}{'ms':>8}{'ours ms':>9}  {'ratio (quartiles)':<24}"
    f"{'over the plain loop':<24}{'over sharing':<24}{'MACs left':>9}{'of ceilings':>14}{'max |error|':>13}"
    f"{'of the loop':>13}"
)
_RATIOS = ("ratio_loop", "ratio_plain", "ratio_sharing")


def read_results(file: PathLike) -> list[dict[str, Any]]:
    """What --output wrote, now or earlier.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds none.
    """
    content = read_json(file)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, list) or not all(isinstance(each, dict) and "ratio_loop" in each for each in results):
        raise ValueError(f"{file}: expected results of python -m greedynas_ext.bench, got another file")
    return results


def row(result: dict[str, Any]) -> str:
    """A line of the table; what an earlier version did not measure is "-"."""
    milliseconds = {name: spread["median"] for name, spread in result["milliseconds"].items()}
    ratios = (str(Spread(**result[name])) if name in result else "-" for name in _RATIOS)
    return (
        f"{result['case']['name']:<24}{result['loop']:<32}{milliseconds[result['loop']]:>8.0f}"
        f"{milliseconds[OURS]:>9.0f}  {''.join(f'{ratio:<24}' for ratio in ratios)}"
        f"{result['macs_left']:>9.1%}{_of_ceilings(result):>14}"
        f"{result['errors'][OURS]:>13.1e}{result['errors'][result['loop']]:>13.1e}"
    )


def _of_ceilings(result: dict[str, Any]) -> str:
    """The larger share, and of what."""
    shares: dict[str, float] = result.get("of_ceilings", {})
    if not shares:
        return "-"
    name = max(shares, key=lambda each: shares[each])
    return f"{shares[name]:.0%} {name}"


def record(result: dict[str, Any]) -> dict[str, Any]:
    """One flat line: the case, milliseconds and ratios with quartiles, and what else is one number."""
    flat: dict[str, Any] = dict(result["case"])
    for kind in ("plain", "loop", "sharing"):
        flat[kind] = result.get(kind)
        flat.update(_spread(f"{kind}_ms", result["milliseconds"].get(result.get(kind))))
        flat.update(_spread(f"ratio_{kind}", result.get(f"ratio_{kind}")))
    flat.update(_spread("ours_ms", result["milliseconds"][OURS]))
    flat.update({name: result.get(name) for name in ("kernels", "macs_left", "macs_fused", "rounds")})
    flat["error"], flat["loop_error"] = result["errors"][OURS], result["errors"][result["loop"]]
    shares, ceilings = result.get("of_ceilings", {}), result.get("ceilings", {})
    flat.update({f"of_{name}": shares.get(name) for name in ("products", "memory")})
    flat.update({f"ceiling_{name}": ceilings.get(name) for name in ("macs", "bytes")})
    flat.update({name: result["machine"].get(name) for name in ("cpu", "threads", "torch", "date", "commit")})
    return flat


def _spread(name: str, spread: dict[str, float] | None) -> dict[str, float | None]:
    return {
        f"{name}{'' if part == 'median' else f'_{part}'}": None if spread is None else spread[part]
        for part in ("median", "lower", "upper")
    }


def write_csv(file: Path, results: Sequence[dict[str, Any]]) -> None:
    """A line for each result, under a header."""
    records = [record(result) for result in results]
    names: Iterable[str] = dict.fromkeys(name for each in records for name in each)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_bytes(file, text.getvalue().encode())
