"""Whether results are worse than earlier ones: ratios against ratios, so that the machine counts less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from greedynas_ext.bench.cases import Case
from greedynas_ext.bench.measure import Spread

_WHAT_IT_IS = [field.name for field in fields(Case) if field.name not in ("name", "fused")]


@dataclass(frozen=True)
class Change:
    """The ratio over the fastest loop of one case, before and now."""

    case: str
    before: Spread
    now: Spread

    @property
    def verdict(self) -> str:
        """A "regression" or "improvement" where the quartiles of the two do not overlap; else "within the spread"."""
        if self.now.upper < self.before.lower:
            return "regression"
        return "improvement" if self.now.lower > self.before.upper else "within the spread"

    def __str__(self) -> str:
        return f"{self.case:<24}{self.before!s:<24}{self.now!s:<24}{self.verdict}"


def compare(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[Change]:
    """The change of each case that both have.

    Raises:
        ValueError: a case of the same name is another one, or there is none in common.
    """
    earlier = {result["case"]["name"]: result for result in before}
    changes = []
    for result in now:
        name = result["case"]["name"]
        if name not in earlier:
            continue
        old, new = (Case(**each["case"]) for each in (earlier[name], result))
        for field in _WHAT_IT_IS:
            if getattr(old, field) != getattr(new, field):
                raise ValueError(
                    f"case {name}: expected {field} {getattr(old, field)!r} as before, got {getattr(new, field)!r}"
                )
        changes.append(Change(name, *(Spread(**each["ratio_loop"]) for each in (earlier[name], result))))
    if not changes:
        raise ValueError(f"results: expected a case of {', '.join(earlier)}, got none of them")
    return changes


def other_machine(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str | None:
    """How the machines differ, in words; None where they do not."""
    names = ("cpu", "threads", "torch", "gpu")
    seen = [{name: results[0]["machine"].get(name) for name in names} for results in (before, now)]
    differing = [
        f"{name} {seen[0][name]} before, {seen[1][name]} now" for name in names if seen[0][name] != seen[1][name]
    ]
    return "; ".join(differing) or None
