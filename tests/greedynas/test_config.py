import dataclasses
from pathlib import Path

import pytest
import yaml

from greedynas.config import (
    EvaluateConfig,
    RetrainConfig,
    SearchConfig,
    TrainConfig,
    check_types,
    from_mapping,
    load_config,
    read_yaml,
    save_config,
    to_mapping,
)

KINDS = (TrainConfig, SearchConfig, RetrainConfig, EvaluateConfig)
PRESETS = Path(__import__("greedynas").__file__).parent / "configs"


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_survive_a_file(kind, tmp_path):
    config = kind(run=tmp_path / "run")
    save_config(tmp_path / "config.yaml", config)
    assert load_config(kind, tmp_path / "config.yaml") == config


def test_every_kind_of_value_survives_a_file(tmp_path):
    config = TrainConfig(
        run=tmp_path,
        data_root=Path("some folder/ü"),
        validation=0.25,
        max_macs=1e-7,
        learning_rate=1e-05,
        stop_threshold=None,
        stop_interval=90,
        draw_within_budget=True,
        threads=3,
    )
    save_config(tmp_path / "config.yaml", config)
    loaded = load_config(TrainConfig, tmp_path / "config.yaml")
    assert loaded == config
    assert {name: type(value) for name, value in vars(loaded).items()} == {
        name: type(value) for name, value in vars(config).items()
    }


def test_to_mapping_holds_plain_values_only():
    values = to_mapping(TrainConfig(run=Path("a"), data_root=Path("b")))
    assert values["run"] == "a"
    assert values["data_root"] == "b"
    assert {type(value) for value in values.values()} <= {str, int, float, bool, type(None)}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("2E3", 2000.0), ("-1.5e+2", -150.0), ("3", 3.0), ("1.0e-05", 1e-5)]
)
def test_numbers_may_be_written_as_in_python(text, value, tmp_path):
    # PyYAML alone reads 1e-5, which everybody writes for a learning rate, as a string.
    (tmp_path / "c.yaml").write_text(f"run: r\nlearning_rate: {text}\n")
    config = load_config(TrainConfig, tmp_path / "c.yaml")
    assert config.learning_rate == value
    assert type(config.learning_rate) is float


@pytest.mark.parametrize("text", ["e3", "1e", "1e5x", "v1e5"])
def test_what_only_looks_like_a_number_stays_text(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"dataset: {text}\n")
    assert read_yaml(tmp_path / "c.yaml") == {"dataset": text}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": "r", "learning_rat": 1.0}, r"file\.yaml: unknown key 'learning_rat'; expected some of run, space"),
        ({"run": "r", 3: 1.0, "foo": 2}, r"file\.yaml: unknown key 3"),
        ({"space": "macro"}, r"file\.yaml: expected a value for 'run'"),
        ({"run": "r", "sampler": "best"}, r"file\.yaml: sampler: expected one of greedy, uniform, fair, got 'best'"),
        ({"run": "r", "iterations": 1.5}, r"file\.yaml: iterations: expected int, got float 1\.5"),
        ({"run": "r", "iterations": True}, r"iterations: expected int, got bool True"),
        ({"run": "r", "augment": 1}, r"augment: expected bool, got int 1"),
        ({"run": "r", "learning_rate": "fast"}, r"learning_rate: expected float, got str 'fast'"),
        ({"run": "r", "learning_rate": True}, r"learning_rate: expected float, got bool True"),
        ({"run": "r", "max_macs": [1.0]}, r"max_macs: expected float or none, got list \[1\.0\]"),
        ({"run": "r", "validation": "many"}, r"validation: expected int or float or none, got str 'many'"),
        ({"run": 3}, r"run: expected Path, got int 3"),
        ({"run": "r", "sampler": ["greedy"]}, r"sampler: expected one of"),
    ],
)
def test_wrong_values_name_the_source_and_the_key(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(TrainConfig, values, "file.yaml")


def test_an_int_is_a_float_but_stays_an_int_where_both_may_be():
    config = from_mapping(TrainConfig, {"run": "r", "max_macs": 2, "validation": 100}, "x")
    assert type(config.max_macs) is float
    assert type(config.validation) is int


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"iterations": 2.0}, TypeError, r"^iterations: expected int, got float 2\.0"),
        ({"sampler": "best"}, ValueError, r"^sampler: expected one of"),
        ({"run": None}, TypeError, r"^run: expected Path, got NoneType"),
    ],
)
def test_configs_made_in_python_are_checked_too(change, error, message):
    config = dataclasses.replace(TrainConfig(run=Path("r")), **change)
    with pytest.raises(error, match=message):
        check_types(config)


def test_good_configs_pass():
    for kind in KINDS:
        check_types(kind(run=Path("r")))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config: no file .*nothing\.yaml"):
        read_yaml(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a mapping of options, got NoneType"),
        (b"- 1\n- 2\n", "expected a mapping of options, got list"),
        (b"a: [1\n", "expected YAML, while parsing"),
        (b"a: \xff\xfe", "expected YAML, .*utf-8"),
        (b"a: !!python/object/apply:os.system ['true']", "expected YAML, could not determine a constructor"),
    ],
)
def test_damaged_files_are_named_in_one_line(data, message, tmp_path):
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(tmp_path / "c.yaml")
    assert str(caught.value).startswith(str(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)


def test_presets_hold_known_options_only():
    presets = sorted(PRESETS.glob("*/*.yaml"))
    assert {path.parent.name for path in presets} == {"train", "retrain"}
    for path in presets:
        kind = {"train": TrainConfig, "retrain": RetrainConfig}[path.parent.name]
        from_mapping(kind, {"run": "r", **yaml.safe_load(path.read_text())}, str(path))
