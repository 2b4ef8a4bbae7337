"""Shows how far a long piece of work is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
_silent = False


def silence() -> None:
    """Shows no progress in this process from now on: another one reports for it."""
    global _silent
    _silent = True


class Reporter:
    """Progress of `total` units of work, with a line of figures that changes as it goes on."""

    def __init__(self, label: str, total: int, *, done: int = 0, console: Console | None = None) -> None:
        self._label, self._total, self._done = label, total, done
        self._console = console or Console(stderr=True, quiet=_silent)
        self._bar: Progress | None = None
        self._last_line = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> Reporter:
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, figures="")
        return self

    def advance(self, figures: dict[str, str]) -> None:
        """One unit more is done; `figures` are shown as "name value"."""
        self._done += 1
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, figures=text)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = now
            self._console.print(f"{self._label} {self._done}/{self._total}  {text}", highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
