import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import settings

from greedynas import spaces
from greedynas.data import load_data
from greedynas.retraining import retrain
from greedynas.runs import Task
from greedynas.search import search
from greedynas.training import train

# How long an example takes depends on what else the machine does.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


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


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A tiny run with a search and a retraining; for reading only."""
    root = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spaces._SPACES, "tiny", tiny.SPACE)
        train(tiny.train_config(root))
        search(tiny.search_config(root))
        retrain(tiny.retrain_config(root))
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def run_copy(finished_run, tmp_path, tiny_space):
    """A copy of it, to change and to break."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))
