import dataclasses
import re

import pytest
import torch
from tiny import SPACE, contents, search_config, train_config

from greedynas.config import save_config
from greedynas.runs import RunFolder, load_run, load_state, load_task
from greedynas.storage import load_tensors
from greedynas_ext.strict_json import read_json, write_json

pytestmark = pytest.mark.usefixtures("tiny_space")


def test_where_everything_lies(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.config == tmp_path / "config.yaml"
    assert folder.search("a").summary == tmp_path / "search" / "a" / "summary.json"
    assert folder.retraining("b").network == tmp_path / "retrain" / "b" / "network.safetensors"
    assert folder.report == tmp_path / "report.md"
    assert folder.pictures == tmp_path / "pictures"


def test_only_finished_stages_are_listed(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.names("search") == []
    for name in ("b", "a", "unfinished"):
        folder.search(name).root.mkdir(parents=True)
    for name in ("b", "a"):
        write_json(folder.search(name).summary, {})
    assert folder.names("search") == ["a", "b"]
    assert not folder.search("unfinished").finished


def test_opening_makes_the_folder_and_saves_the_config(tmp_path):
    folder = RunFolder(tmp_path / "some" / "run")
    folder.open(train_config(folder.root), resume=False)
    assert list(contents(folder.root)) == ["config.yaml"]


def test_an_existing_run_is_not_touched(run_copy):
    before = contents(run_copy)
    with pytest.raises(FileExistsError, match=rf"^run: {re.escape(str(run_copy))} holds a run already; --resume cont"):
        RunFolder(run_copy).open(train_config(run_copy), resume=False)
    assert contents(run_copy) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", 5, "seed: expected 0, with which"),
        ("learning_rate", 0.1, "learning_rate: expected 0.05, with which .* was started, got 0.1"),
        ("max_macs", 1.0, "max_macs: expected None, with which .* was started, got 1.0"),
        ("threads", 2, "threads: expected 1, with which"),
        ("space", "mini-16", "space: expected 'tiny', with which"),
        ("iterations", 20, "iterations: expected 10"),
    ],
)
def test_resuming_with_another_option_names_it_and_touches_nothing(name, value, message, run_copy):
    before = contents(run_copy)
    config = dataclasses.replace(train_config(run_copy), **{name: value})
    with pytest.raises(ValueError, match=message):
        RunFolder(run_copy).open(config, resume=True)
    assert contents(run_copy) == before


def test_a_run_may_have_been_moved(run_copy):
    RunFolder(run_copy).open(train_config(run_copy), resume=True)  # its config.yaml has the old place


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(train_config(folder.root), resume=False)
    leftover = folder.root / ".greedynas-0123456789abcdef.tmp"
    leftover.write_bytes(b"half")
    mine = folder.root / ".notes.tmp"
    mine.write_bytes(b"mine")
    folder.open(train_config(folder.root), resume=True)
    assert not leftover.exists()
    folder.config.unlink()
    leftover.write_bytes(b"half of a config")
    folder.open(train_config(folder.root), resume=False)
    assert not leftover.exists()
    assert mine.exists()


def test_a_damaged_config_is_named(run_copy):
    (run_copy / "config.yaml").write_text("run: [")
    with pytest.raises(ValueError, match=r"config\.yaml: expected YAML"):
        RunFolder(run_copy).open(train_config(run_copy), resume=True)


# load_run


def test_a_finished_run_comes_back_whole(run_copy, tmp_path):
    run = load_run(run_copy)
    assert run.config == dataclasses.replace(train_config(run_copy), run=run.config.run)
    tensors, _ = load_tensors(run_copy / "supernet.safetensors")
    state = run.supernet.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in state)
    assert run.pool.to_json() == read_json(run_copy / "pool.json")
    assert run.task.space == SPACE
    assert run.summary["iterations"] == 10


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^run: no run in .*nowhere \(expected .*config\.yaml\)"):
        load_run(tmp_path / "nowhere")


def test_an_unfinished_run(run_copy):
    (run_copy / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^run: the training in .* is not finished; `greedynas train --resume"):
        load_run(run_copy)


@pytest.mark.parametrize("name", ["supernet.safetensors", "pool.json", "summary.json", "config.yaml"])
def test_damaged_files_are_named(name, run_copy):
    data = (run_copy / name).read_bytes()
    (run_copy / name).write_bytes(data[: len(data) // 2] + b"{")
    with pytest.raises(ValueError, match=re.escape(str(run_copy / name))):
        load_run(run_copy)


@pytest.mark.parametrize("name", ["supernet.safetensors", "pool.json"])
def test_missing_files_are_named(name, run_copy):
    (run_copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        load_run(run_copy)


def test_a_supernet_of_another_space_is_refused(run_copy):
    save_config(run_copy / "config.yaml", train_config(run_copy, space="mini-16"))
    with pytest.raises(ValueError, match=r"supernet\.safetensors: "):
        load_run(run_copy)


def test_load_state_changes_nothing_where_something_does_not_fit(tmp_path):
    module = torch.nn.Linear(2, 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for tensors, message in (
        ({"weight": torch.zeros(3, 2)}, "file: no tensor 'bias'"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "more": torch.zeros(1)}, "unexpected tensor 'more'"),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(4)},
            r"expected 'bias' as torch.float32 \[3\], got .*\[4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_state(module, tensors, tmp_path / "file")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_task_fits_the_space_to_the_data(tmp_path):
    task = load_task(train_config(tmp_path, space="macro"))
    assert (task.space.in_channels, task.space.num_classes, task.space.resolution) == (1, 10, 8)
    assert task.macs_of(torch.tensor([[0] * 8])) == [task.space.macs([0] * 8, 8) / 1e6]
    assert task.new_supernet(1).stem[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_search_opens_like_a_training(run_copy):
    folder = RunFolder(run_copy).search("nsga2")
    with pytest.raises(ValueError, match="population: expected 6"):
        folder.open(search_config(run_copy, population=7), resume=True)
