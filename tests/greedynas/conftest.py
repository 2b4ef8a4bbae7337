import pytest
import tiny
import torch

from greedynas import spaces
from greedynas.data import load_data
from greedynas.runs import Task


@pytest.fixture
def tiny_space(monkeypatch):
    """Makes "tiny" the name of a space, and puts the number of threads back that a config sets."""
    monkeypatch.setitem(spaces._SPACES, "tiny", tiny.SPACE)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_task():
    """Digits and the tiny space. Its count of test reads is shared: do not read its test set."""
    return Task(load_data("digits", seed=0), tiny.SPACE)
