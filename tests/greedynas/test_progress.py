import io

import pytest
from rich.console import Console

from greedynas import progress
from greedynas.progress import Reporter


def lines(monkeypatch, times, total, done=0):
    clock = iter(times)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Reporter("train", total, done=done, console=Console(file=stream)) as reporter:
        for number in range(len(times)):
            reporter.advance({"loss": f"{number}.5", "images/s": "[7]"})
    return stream.getvalue().splitlines()


def test_a_line_at_first_then_every_ten_seconds_and_at_the_end(monkeypatch):
    assert lines(monkeypatch, [0.0, 3.0, 9.9, 10.0, 19.9, 20.5, 21.0], 7) == [
        "train 1/7  loss 0.5  images/s [7]",
        "train 4/7  loss 3.5  images/s [7]",
        "train 6/7  loss 5.5  images/s [7]",
        "train 7/7  loss 6.5  images/s [7]",
    ]


def test_counts_on_from_where_a_resumed_run_was(monkeypatch):
    assert lines(monkeypatch, [0.0], 9, done=4) == ["train 5/9  loss 0.5  images/s [7]"]


def test_a_terminal_gets_a_bar():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with Reporter("search", 4, done=1, console=console) as reporter:
        reporter.advance({"best loss": "0.25"})
    assert "search" in stream.getvalue()
    assert "2/4" in stream.getvalue()
    assert "best loss 0.25" in stream.getvalue()


def test_the_bar_goes_when_the_work_fails():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    reporter = Reporter("search", 4, console=console)
    with pytest.raises(RuntimeError, match="no more"), reporter:
        raise RuntimeError("no more")
    assert not console._live_stack


def test_progress_goes_to_stderr_by_default(capsys):
    with Reporter("train", 1) as reporter:
        reporter.advance({})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "train 1/1" in captured.err
