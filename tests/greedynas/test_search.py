import itertools
import math
import random
import shutil

import numpy as np
import pytest
import torch
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from tiny import SPACE, contents, search_config, train_config

import greedynas.search
from greedynas.metrics_log import MetricsLog
from greedynas.runs import load_run
from greedynas.search import CategoricalMutation, first_population, pareto_front, search
from greedynas.storage import load_tensors, save_tensors
from greedynas.training import train
from greedynas_ext.strict_json import read_json, write_json

pytestmark = pytest.mark.usefixtures("tiny_space")
METHODS = ["nsga2", "random"]


@pytest.fixture
def run_dir(run_copy):
    """A finished training without searches."""
    shutil.rmtree(run_copy / "search")
    return run_copy


@pytest.fixture
def calls(monkeypatch):
    """Every call of evaluate_paths: the paths, the images with their targets, and the options."""
    seen = []
    original = greedynas.search.evaluate_paths

    def spy(supernet, paths, images, **options):
        batches = list(images)
        seen.append({"paths": [tuple(p) for p in paths.tolist()], "batches": batches, **options})
        return original(supernet, paths, batches, **options)

    monkeypatch.setattr(greedynas.search, "evaluate_paths", spy)
    return seen


def records_of(folder):
    return MetricsLog(folder.metrics).read()


def poison(root, prefix="choices.0.1."):
    """Makes the weights of one operation NaN."""
    tensors, metadata = load_tensors(root / "supernet.safetensors")
    for name, tensor in tensors.items():
        if name.startswith(prefix) and tensor.is_floating_point():
            tensor.fill_(math.nan)
    save_tensors(root / "supernet.safetensors", tensors, metadata)


# Mutation


def mutate(X, rate, choices, seed=0):
    problem = Problem(n_var=X.shape[1], n_obj=1, xl=0, xu=choices - 1, vtype=int)
    population = Population.new("X", X.copy())
    return CategoricalMutation(rate).do(problem, population, random_state=np.random.default_rng(seed)).get("X")


@pytest.mark.parametrize("choices", [2, 3, 7, 13])
def test_mutation_always_makes_another_value_in_range(choices):
    X = np.random.default_rng(1).integers(0, choices, (200, 21))
    mutated = mutate(X, 1.0, choices)
    assert (mutated != X).all()
    assert mutated.min() >= 0
    assert mutated.max() < choices
    assert (mutated == np.round(mutated)).all()


def test_mutation_is_uniform_over_the_other_values():
    choices, n = 7, 60_000
    mutated = mutate(np.full((n // 20, 20), 2), 1.0, choices)
    counts = np.bincount(mutated.ravel().astype(int), minlength=choices)
    assert counts[2] == 0
    others = np.delete(counts, 2)
    assert ((others - n / 6) ** 2 / (n / 6)).sum() < 20.5  # chi-square, 5 dof: p = 0.001


@pytest.mark.parametrize("rate", [0.0, 1 / 21, 0.3])
def test_mutation_has_the_rate_it_is_given(rate):
    X = np.random.default_rng(2).integers(0, 7, (2000, 21))
    changed = (mutate(X, rate, 7) != X).sum()
    n = X.size
    assert abs(changed - n * rate) <= 4 * math.sqrt(n * rate * (1 - rate))


def test_mutation_leaves_a_single_choice_alone():
    X = np.zeros((10, 4), dtype=int)
    assert (mutate(X, 1.0, 1) == 0).all()


def test_mutation_repeats_by_seed():
    X = np.random.default_rng(3).integers(0, 7, (50, 8))
    assert (mutate(X, 0.3, 7, seed=4) == mutate(X, 0.3, 7, seed=4)).all()
    assert (mutate(X, 0.3, 7, seed=4) != mutate(X, 0.3, 7, seed=5)).any()


# The front


def dominates(a, b):
    return a["loss"] <= b["loss"] and a["macs"] <= b["macs"] and (a["loss"], a["macs"]) != (b["loss"], b["macs"])


@pytest.mark.parametrize("seed", range(5))
def test_front_equals_brute_force(seed):
    generator = random.Random(seed)
    records = [
        {"path": [i], "loss": generator.randint(0, 12) / 4, "macs": float(generator.randint(0, 12))} for i in range(60)
    ]
    front = pareto_front(records)
    expected = {(r["loss"], r["macs"]) for r in records if not any(dominates(o, r) for o in records)}
    assert {(r["loss"], r["macs"]) for r in front} == expected
    assert [r["macs"] for r in front] == sorted({macs for _, macs in expected})
    assert pareto_front([]) == []


# The first population


def test_first_population_is_the_pool_then_random(run_dir):
    run = load_run(run_dir)
    pool = run.pool.paths
    paths, from_pool = first_population(run, 5, None, torch.Generator())
    assert from_pool == 5
    assert torch.equal(paths, pool[:5])
    paths, from_pool = first_population(run, 20, None, torch.Generator())
    assert from_pool == 8
    assert torch.equal(paths[:8], pool)
    assert len({tuple(path) for path in paths.tolist()}) == 20
    other, _ = first_population(run, 20, None, torch.Generator().manual_seed(1))
    assert not torch.equal(other[8:], paths[8:])


def test_first_population_fits_the_budget(run_dir):
    run = load_run(run_dir)
    costs = run.task.macs_of(run.pool.paths)
    budget = sorted(costs)[3]
    paths, from_pool = first_population(run, 12, budget, torch.Generator())
    assert from_pool == sum(cost <= budget for cost in costs)
    assert torch.equal(paths[:from_pool], run.pool.paths[[cost <= budget for cost in costs]])
    assert max(run.task.macs_of(paths)) <= budget
    assert len({tuple(path) for path in paths.tolist()}) == 12


def test_first_population_may_be_the_whole_space(run_dir):
    run = load_run(run_dir)
    paths, _ = first_population(run, 81, None, torch.Generator())
    assert {tuple(path) for path in paths.tolist()} == set(itertools.product(range(3), repeat=4))
    with pytest.raises(ValueError, match=r"population: expected at most the 81 distinct paths that were found, got 82"):
        first_population(run, 82, None, torch.Generator())


# Whole searches


@pytest.mark.parametrize("method", METHODS)
def test_each_generation_is_one_call_and_no_path_is_evaluated_twice(method, run_dir, calls):
    folder = search(search_config(run_dir, method=method))
    records, summary = records_of(folder), read_json(folder.summary)
    assert len(calls) == 3
    evaluated = [path for call in calls for path in call["paths"]]
    assert len(calls[0]["paths"]) == 6
    assert len(set(evaluated)) == len(evaluated)
    assert [tuple(record["path"]) for record in records] == evaluated
    assert [record["generation"] for record in records] == [
        number for number, call in enumerate(calls) for _ in call["paths"]
    ]
    assert summary["paths_evaluated"] == len(evaluated)
    assert summary["images_evaluated"] == len(evaluated) * 50
    assert summary["images_calibrated"] == len(evaluated) * 40
    assert [entry["paths"] for entry in summary["history"]] == list(
        itertools.accumulate(len(call["paths"]) for call in calls)
    )
    assert all(record["macs"] == SPACE.macs(record["path"]) / 1e6 for record in records)


def test_nsga2_begins_with_the_pool(run_dir, calls):
    summary = read_json(search(search_config(run_dir)).summary)
    assert calls[0]["paths"] == [tuple(path) for path in load_run(run_dir).pool.paths[:6].tolist()]
    assert summary["first_population_from_pool"] == 6
    assert summary["history"][0]["from_pool"] == 6
    assert all("from_pool" not in entry for entry in summary["history"][1:])


def test_random_search_evaluates_as_many_paths_each_new(run_dir, calls):
    summary = read_json(search(search_config(run_dir, method="random", population=13, generations=6)).summary)
    assert summary["paths_evaluated"] == 78  # of 81: nearly all, so that a sampler with repeats would show
    assert [len(call["paths"]) for call in calls] == [13] * 6
    assert summary["first_population_from_pool"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_search_ends_where_the_space_does(method, run_dir):
    summary = read_json(
        search(search_config(run_dir, method=method, population=30, generations=9, mutation_probability=0.5)).summary
    )
    assert summary["paths_evaluated"] <= 81
    if method == "random":
        assert summary["paths_evaluated"] == 81
        assert len(summary["history"]) == 3


@pytest.mark.parametrize("method", METHODS)
def test_chosen_and_front_by_brute_force(method, run_dir):
    folder = search(search_config(run_dir, method=method, population=10))
    summary, records = read_json(folder.summary), records_of(folder)
    best = min(records, key=lambda r: (r["loss"], r["path"]))
    assert summary["chosen"] == {**best, "names": SPACE.decode(best["path"])}
    front = [r for r in records if not any(dominates(o, r) for o in records)]
    assert {(r["loss"], r["macs"]) for r in summary["front"]} == {(r["loss"], r["macs"]) for r in front}
    assert [entry["best_loss"] for entry in summary["history"]] == [
        min(r["loss"] for r in records if r["generation"] <= number) for number in range(3)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_holds_for_choice_and_front(method, run_dir):
    free = read_json(search(search_config(run_dir, name="free", method=method, population=10)).summary)
    budget = free["chosen"]["macs"] - 1e-6  # what would have been chosen is over it
    folder = search(search_config(run_dir, method=method, population=10, max_macs=budget))
    summary = read_json(folder.summary)
    assert summary["max_macs"] == budget
    assert summary["chosen"]["macs"] <= budget
    assert max(r["macs"] for r in summary["front"]) <= budget
    within = [r for r in records_of(folder) if r["macs"] <= budget]
    assert summary["chosen"]["loss"] == min(r["loss"] for r in within)
    assert summary["history"][-1]["best_loss"] == summary["chosen"]["loss"]
    assert all(r["macs"] <= budget for r in records_of(folder) if r["generation"] == 0)


def test_what_nsga2_minimises_and_what_binds_it():
    records = [{"loss": 2.5, "macs": 3.0}, {"loss": math.nan, "macs": 5.0}, {"loss": math.inf, "macs": 4.0}]
    figures = greedynas.search._figures_of(records, True, 4.0)
    assert figures["F"].tolist() == [[2.5, 3.0], [1e6, 5.0], [1e6, 4.0]]
    assert figures["G"].tolist() == [[-1.0], [1.0], [0.0]]  # pymoo: at most 0 is feasible
    assert greedynas.search._figures_of(records, False, None).keys() == {"F"}
    assert greedynas.search._figures_of(records, False, None)["F"].tolist() == [[2.5], [1e6], [1e6]]


def test_the_trainings_budget_is_the_default(tmp_path):
    root = train(train_config(tmp_path / "run", max_macs=0.016, iterations=4)).root
    assert read_json(search(search_config(root)).summary)["max_macs"] == 0.016
    assert read_json(search(search_config(root, name="other", max_macs=0.02)).summary)["max_macs"] == 0.02


def test_nsga2_improves_on_its_first_population(run_dir):
    history = read_json(search(search_config(run_dir, population=8, generations=6, cost_objective=False)).summary)[
        "history"
    ]
    best = [entry["best_loss"] for entry in history]
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]


def test_what_is_evaluated_on(run_dir, calls):
    run = load_run(run_dir)
    search(search_config(run_dir, batch_size=20, seed=3))
    validation = run.task.data.validation.batch(torch.arange(len(run.task.data.validation))).images
    training = {image.numpy().tobytes() for image in run.task.data.train.batch(torch.arange(1154)).images}
    pixels = [image.numpy().tobytes() for image in validation]
    for call in calls:
        assert [len(images) for images, _ in call["batches"]] == [20, 20, 10]
        images = [image.numpy().tobytes() for batch, _ in call["batches"] for image in batch]
        assert len(set(images)) == 50
        assert set(images) <= set(pixels)
        assert images != pixels[:50]  # folders come class by class: the first images would be of the first classes
        assert call["bn"] == "recalibrated"
        assert len(call["calibration"]) == 40
        assert all(image.numpy().tobytes() in training for image in call["calibration"])
    assert calls[0]["batches"][0][0].equal(calls[1]["batches"][0][0])


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_other_statistics_need_no_calibration(bn, run_dir, calls):
    summary = read_json(search(search_config(run_dir, bn=bn, validation_images=None)).summary)
    assert {call["bn"] for call in calls} == {bn}
    assert {call["calibration"] for call in calls} == {None}
    assert sum(len(images) for images, _ in calls[0]["batches"]) == 288
    assert summary["images_calibrated"] == 0


def test_the_test_set_stays_closed(run_dir, monkeypatch):
    opened = []
    monkeypatch.setattr(greedynas.search, "load_run", lambda root: opened.append(load_run(root)) or opened[0])
    search(search_config(run_dir))
    assert not opened[0].task.data.test.opened


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_repeats_a_search_and_another_does_not(method, run_dir):
    first = search(search_config(run_dir, method=method, name="a", seed=7))
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    again = search(search_config(run_dir, method=method, name="b", seed=7))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]
    other = search(search_config(run_dir, method=method, name="c", seed=8))
    assert first.metrics.read_bytes() == again.metrics.read_bytes()
    assert first.summary.read_bytes() == again.summary.read_bytes()
    assert first.metrics.read_bytes() != other.metrics.read_bytes()


def test_the_seed_reaches_selection_and_variation(run_dir):
    # All images, no calibration and a first population from the pool: nothing else could make a difference.
    options = {"bn": "running", "validation_images": None}
    runs = [search(search_config(run_dir, name=f"s{seed}", seed=seed, **options)) for seed in (3, 4)]
    first, second = ([record["path"] for record in records_of(folder)] for folder in runs)
    assert first[:6] == second[:6]
    assert first[6:] != second[6:]


# Resuming


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("whole", "torn"), [(0, 0), (3, 40), (6, 1), (100, 0)])
def test_resuming_replays_what_is_on_record(method, whole, torn, run_dir, calls):
    folder = search(search_config(run_dir, method=method))
    metrics, summary = folder.metrics.read_bytes(), folder.summary.read_bytes()
    lines = metrics.splitlines(keepends=True)
    generations = [record["generation"] for record in records_of(folder)]
    complete = next((i for i, g in enumerate(generations) if g == (generations[whole:] or [None])[0]), len(lines))
    folder.metrics.write_bytes(b"".join(lines[:whole]) + (lines[whole][:torn] if torn else b""))
    folder.summary.unlink()
    calls.clear()
    search(search_config(run_dir, method=method), resume=True)
    # A generation that was cut short is evaluated again as a whole, nothing before it.
    assert sum(len(call["paths"]) for call in calls) == len(lines) - complete
    assert folder.metrics.read_bytes() == metrics
    assert folder.summary.read_bytes() == summary


def test_a_finished_search_is_left_alone(run_dir, calls):
    folder = search(search_config(run_dir))
    calls.clear()
    before = contents(run_dir)
    assert search(search_config(run_dir), resume=True) == folder
    with pytest.raises(FileExistsError, match="holds a run already; --resume continues it"):
        search(search_config(run_dir))
    with pytest.raises(ValueError, match=r"^seed: expected 0, with which"):
        search(search_config(run_dir, seed=1), resume=True)
    assert contents(run_dir) == before
    assert calls == []


def test_records_that_are_none_are_named(run_dir):
    folder = search(search_config(run_dir))
    folder.summary.unlink()
    folder.metrics.write_text('{"path": [0, 0, 0, 0]}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected records of accuracy, generation, loss, macs, path"):
        search(search_config(run_dir), resume=True)
    folder.metrics.write_text('{"path": \n{}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1"):
        search(search_config(run_dir), resume=True)


# Losses that are no numbers


@pytest.mark.parametrize(("method", "cost_objective"), [("nsga2", True), ("nsga2", False), ("random", True)])
def test_paths_without_finite_loss_are_never_chosen(method, cost_objective, run_dir):
    poison(run_dir)
    config = search_config(run_dir, method=method, population=10, cost_objective=cost_objective, generations=5)
    folder = search(config)
    summary, records = read_json(folder.summary), records_of(folder)
    bad = [record for record in records if math.isnan(record["loss"])]
    assert bad
    assert all(record["path"][0] == 1 for record in bad)
    assert all(math.isfinite(record["loss"]) == (record["path"][0] != 1) for record in records)
    assert all(record["path"][0] != 1 for record in [summary["chosen"], *summary["front"]])
    metrics = folder.metrics.read_bytes()
    folder.summary.unlink()
    search(config, resume=True)  # NaN survives the log
    assert folder.metrics.read_bytes() == metrics
    assert read_json(folder.summary) == summary


def test_nothing_finite_at_all(run_dir):
    poison(run_dir, "stem")
    with pytest.raises(ValueError, match=r"^max_macs: no evaluated path lies within None million .* a finite loss"):
        search(search_config(run_dir))
    assert not (run_dir / "search" / "nsga2" / "summary.json").exists()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1}, r"^population: expected at least 2, got 1"),
        ({"population": 82}, r"^population: expected at most the 81 distinct paths"),
        ({"validation_images": 289}, r"^validation_images: expected 1 to 288 \(all of them\), got 289"),
        ({"max_macs": 0.001}, r"^max_macs: expected a budget that leaves"),
        ({"max_macs": 0.001, "method": "random"}, r"^max_macs: expected a budget that leaves"),
        ({"batch_size": 0}, r"^batch_size: expected at least 1"),
        ({"name": "a/b"}, r"^name: expected the plain name"),
    ],
)
def test_bad_options_leave_no_folder(options, message, run_dir):
    with pytest.raises(ValueError, match=message):
        search(search_config(run_dir, **options))
    assert not (run_dir / "search").exists()


def test_no_training(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^run: no run in"):
        search(search_config(tmp_path))


def test_as_many_calibration_images_as_there_are(run_dir, calls):
    search(search_config(run_dir, calibration_images=10**6, generations=1))
    assert len(calls[0]["calibration"]) == 1154


def test_a_pool_that_was_never_filled(run_dir):
    pool = read_json(run_dir / "pool.json")
    write_json(run_dir / "pool.json", {**pool, "entries": []})
    summary = read_json(search(search_config(run_dir)).summary)
    assert summary["first_population_from_pool"] == 0
    assert summary["paths_evaluated"] > 6
