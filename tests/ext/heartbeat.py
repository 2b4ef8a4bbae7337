"""A thread of pure Python that goes on while something else runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def assert_python_goes_on(work: Callable[[], object]) -> None:
    """During `work` another thread runs at least five times, and is never held up for half of it."""
    stop = threading.Event()
    beats: list[float] = []

    def beat() -> None:
        while not stop.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=beat)
    thread.start()
    started = time.perf_counter()
    work()
    ended = time.perf_counter()
    stop.set()
    thread.join()
    within = [moment for moment in beats if started < moment < ended]
    longest = max(b - a for a, b in zip([started, *within], [*within, ended], strict=True))
    assert len(within) >= 5
    assert longest < 0.5 * (ended - started)
