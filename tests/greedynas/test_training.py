import copy
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import MEDIAN_MACS, SPACE, train_config

import greedynas_ext.path_filter
from greedynas.data import BatchStream, ValidationSampler
from greedynas.metrics_log import MetricsLog
from greedynas.storage import load_tensors
from greedynas.training import Counts, SupernetTrainer, train
from greedynas_ext.samplers import UniformSampler
from greedynas_ext.strict_json import read_json

pytestmark = pytest.mark.usefixtures("tiny_space")
ALL_PATHS = list(itertools.product(range(3), repeat=4))
SECONDS = ("seconds_training", "seconds_filtering")


@pytest.fixture
def make(tiny_task, tmp_path):
    torch.set_num_threads(1)
    return lambda **options: SupernetTrainer(train_config(tmp_path / "run", **options), tiny_task)


def run(trainer):
    records = []
    while not trainer.done:
        records.append(trainer.run_iteration())
    return records


def forward(supernet, images, path):
    features = supernet.stem(images)
    for layer, operation in enumerate(path):
        features = supernet.choices[layer][operation](features)
    return supernet.head(features)


def operation_of(name):
    """(layer, operation) that a tensor of the supernet belongs to; None for stem and head."""
    parts = name.split(".")
    return (int(parts[1]), int(parts[2])) if parts[0] == "choices" else None


def state_of(trainer):
    """All tensors that training may change, copied: parameters, buffers, momentum."""
    state = {name: tensor.clone() for name, tensor in trainer.supernet.state_dict().items()}
    for name, parameter in trainer.supernet.named_parameters():
        momentum = trainer.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            state[f"{name}.momentum"] = momentum.clone()
    return state


class ReferencePool:
    """The pool's rules once more, the slow way."""

    def __init__(self, capacity, fits=lambda path: True):
        self.capacity, self.fits, self.scores = capacity, fits, {}

    def add(self, path, loss):
        if not self.fits(path) or not math.isfinite(loss):
            return
        self.scores[path] = (self.scores[path] + loss) / 2 if path in self.scores else loss
        while len(self.scores) > self.capacity:
            del self.scores[max(self.scores, key=lambda p: (self.scores[p], p))]

    def replay(self, record):
        for path, loss in zip(record.get("drawn_paths", []), record.get("filter_losses", []), strict=True):
            self.add(tuple(path), loss)

    @property
    def best_first(self):
        return sorted(self.scores, key=lambda path: (self.scores[path], path))


# The filter


def test_the_filter_keeps_the_k_of_lowest_loss(make, tiny_task):
    trainer = make(iterations=4, warmup_iterations=1, sampled_paths=7, kept_paths=3, filter_images=30)
    sampler = ValidationSampler(tiny_task.data.validation, 30, seed=trainer.config.seed)
    trainer.run_iteration()
    for iteration in (1, 2, 3):
        before = copy.deepcopy(trainer.supernet)
        record = trainer.run_iteration()
        images, targets = sampler.random_subset(iteration)
        losses = []
        for path in record["drawn_paths"]:
            plain = copy.deepcopy(before).train()  # batch statistics, whatever the running ones
            with torch.no_grad():
                losses.append(F.cross_entropy(forward(plain, images, path), targets).item())
        assert record["filter_losses"] == pytest.approx(losses, rel=1e-5)
        kept = sorted(range(7), key=lambda i: (record["filter_losses"][i], i))[:3]
        assert record["trained_paths"] == [record["drawn_paths"][i] for i in kept]


def test_each_filter_has_a_validation_batch_of_its_own(make, tiny_task, monkeypatch):
    seen = []
    original = greedynas_ext.path_filter.evaluate_paths

    def spy(supernet, paths, images, targets, **options):
        seen.append((images.clone(), targets.clone(), options))
        return original(supernet, paths, images, targets, **options)

    monkeypatch.setattr(greedynas_ext.path_filter, "evaluate_paths", spy)
    run(make(iterations=6, warmup_iterations=3))
    assert len(seen) == 3  # the warm-up evaluates nothing
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[1][0], seen[2][0])
    validation = tiny_task.data.validation
    pixels = {image.numpy().tobytes() for image in validation.batch(torch.arange(len(validation))).images}
    for images, _, options in seen:
        assert len(images) == 16
        assert all(image.contiguous().numpy().tobytes() in pixels for image in images)  # not of the training images
        assert options.get("bn", "batch") == "batch"
        assert options.get("label_smoothing", 0.0) == 0.0


def test_the_filter_leaves_no_trace_in_the_supernet(make, monkeypatch):
    trainer = make(iterations=5, warmup_iterations=1)
    trainer.run_iteration()
    before = state_of(trainer)
    monkeypatch.setattr(trainer, "_step", lambda path: 1.0)
    record = trainer.run_iteration()
    assert len(record["filter_losses"]) == 6
    after = state_of(trainer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training for module in trainer.supernet.modules())


def test_running_statistics_count_training_batches_only(make):
    trainer = make()
    records = run(trainer)
    stem = {v.item() for n, v in trainer.supernet.state_dict().items() if n.startswith("stem") and "num_batches" in n}
    assert stem == {records[-1]["optimizer_steps"]}


def test_kept_paths_get_a_step_each_on_a_batch_of_its_own(make, tiny_task):
    options = {"momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.1, "label_smoothing": 0.1}
    trainer = make(iterations=4, warmup_iterations=1, kept_paths=3, **options)
    trainer.run_iteration()
    batches = BatchStream(tiny_task.data.train, 8, seed=trainer.config.seed, augment=True)
    total = 4 * 3
    for iteration in (1, 2):
        oracle = copy.deepcopy(trainer.supernet)
        momenta = {
            name: trainer.optimizer.state[p]["momentum_buffer"].clone()
            for name, p in trainer.supernet.named_parameters()
            if p in trainer.optimizer.state
        }
        record = trainer.run_iteration()
        for number, path in enumerate(record["trained_paths"]):
            step = iteration * 3 + number
            images, targets = batches.batch(step)
            loss = F.cross_entropy(forward(oracle, images, path), targets, label_smoothing=0.1)
            used = {
                name: p
                for name, p in oracle.named_parameters()
                if operation_of(name) is None or path[operation_of(name)[0]] == operation_of(name)[1]
            }
            rate = 1e-5 + (0.1 - 1e-5) * 0.5 * (1 + math.cos(math.pi * step / (total - 1)))
            for (name, p), gradient in zip(used.items(), torch.autograd.grad(loss, list(used.values())), strict=True):
                gradient = gradient + 0.01 * p.detach()
                momenta[name] = 0.9 * momenta[name] + gradient if name in momenta else gradient
                with torch.no_grad():
                    p -= rate * (gradient + 0.9 * momenta[name])
        expected, got = oracle.state_dict(), trainer.supernet.state_dict()
        for name in expected:
            assert torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("sampler", ["greedy", "uniform"])
def test_what_a_step_leaves_out_stays_bit_for_bit(sampler, make):
    # With gradients zeroed instead of None, momentum and weight decay would move every operation.
    trainer = make(
        sampler=sampler, iterations=14, warmup_iterations=2, kept_paths=1, weight_decay=0.1, learning_rate=0.1
    )
    untouched_momentum = 0
    for _ in range(14):
        before = state_of(trainer)
        (path,) = trainer.run_iteration()["trained_paths"]
        after = state_of(trainer)
        for name, tensor in before.items():
            operation = operation_of(name)
            if operation is not None and path[operation[0]] != operation[1]:
                assert torch.equal(after[name], tensor), name
                untouched_momentum += name.endswith("momentum") and bool(tensor.any())
        moved = [name for name in before if name.endswith("conv.weight") and not torch.equal(after[name], before[name])]
        with_weights = {(la, op) for la, op in enumerate(path) if list(trainer.supernet.choices[la][op].parameters())}
        assert {operation_of(name) for name in moved} == {None} | with_weights
    assert untouched_momentum > 50  # else nothing could have moved


def test_the_warm_up_is_uniform_and_evaluates_nothing(make, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("evaluated during the warm-up")

    monkeypatch.setattr(greedynas_ext.path_filter, "evaluate_paths", forbidden)
    trainer = make(iterations=5, warmup_iterations=5)
    generator = torch.Generator().manual_seed(trainer.config.seed)
    uniform = UniformSampler([3] * 4)
    for record in run(trainer):
        assert record["trained_paths"] == uniform.sample(2, generator).tolist()
        assert record["images_evaluated"] == record["pool"] == 0
        assert not {"filter_losses", "drawn_paths", "exploit_probability"} & record.keys()
    assert trainer.summary()["cost_ratio"] == {"measured": None, "poster": 3.33}


def test_counts(make):
    trainer = make(iterations=7, warmup_iterations=2, sampled_paths=6, kept_paths=2, batch_size=8, filter_images=16)
    for number, record in enumerate(run(trainer), start=1):
        assert record["iteration"] == number - 1
        assert record["optimizer_steps"] == 2 * number
        assert record["images_trained"] == 2 * 8 * number
        assert record["images_evaluated"] == 6 * 16 * max(0, number - 2)
    assert record["seconds_training"] > 0
    assert record["seconds_filtering"] > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_exploit_probability_follows_the_schedule(schedule, make, monkeypatch):
    trainer = make(schedule=schedule, iterations=11, warmup_iterations=2, exploit_start=0.1, exploit_end=0.9)
    asked = []
    sample = trainer.filter._greedy.sample
    monkeypatch.setattr(trainer.filter._greedy, "sample", lambda m, p, g: asked.append(p) or sample(m, p, g))
    records = run(trainer)[2:]
    for number, record in enumerate(records):
        t = number / 8
        share = t if schedule == "linear" else (1 - math.cos(math.pi * t)) / 2
        assert record["exploit_probability"] == pytest.approx(0.1 + 0.8 * share, abs=1e-12)
    assert records[-1]["exploit_probability"] == 0.9
    assert asked == [record["exploit_probability"] for record in records]  # it is used, not only reported


# The pool


@pytest.mark.parametrize("max_macs", [None, MEDIAN_MACS])
def test_the_pool_can_be_replayed_from_the_metrics(max_macs, make):
    trainer = make(
        iterations=14, warmup_iterations=2, exploit_end=1.0, pool_size=7, max_macs=max_macs, stop_threshold=None
    )
    reference = ReferencePool(7, lambda path: max_macs is None or SPACE.macs(path) <= max_macs * 1e6)
    reevaluated = over = 0
    draws = Counter()
    while not trainer.done:
        known = set(reference.scores)
        record = trainer.run_iteration()
        drawn = [tuple(path) for path in record.get("drawn_paths", [])]
        reevaluated += sum(path in known for path in drawn)
        over += sum(SPACE.macs(path) > MEDIAN_MACS * 1e6 for path in drawn)
        draws.update((len(drawn) and [record["from_pool"]]) or [])
        reference.replay(record)
        assert trainer.pool.paths.tolist() == [list(path) for path in reference.best_first]
        assert trainer.pool.losses.tolist() == [reference.scores[path] for path in reference.best_first]
        assert record["pool"] == len(reference.scores)
    assert reevaluated > 5  # means of old and new were taken
    assert over > 5  # and paths over the budget were there to be kept out
    assert sum(count * times for count, times in draws.items()) == sum(trainer.pool_draws.values())
    assert sum(trainer.pool_draws.values()) > 5


def test_pool_draws_are_of_paths_that_were_in_the_pool(make):
    trainer = make(iterations=12, warmup_iterations=2, exploit_start=1.0, exploit_end=1.0)
    reference = ReferencePool(8)
    while not trainer.done:
        before = set(reference.scores)
        record = trainer.run_iteration()
        if before:  # ε is 1: all are drawn from the pool once it has some
            assert {tuple(path) for path in record["drawn_paths"]} <= before
            assert record["from_pool"] == 6
        reference.replay(record)
    summary = trainer.summary()["pool_draws"]
    assert {tuple(entry["path"]): entry["draws"] for entry in summary} == dict(trainer.pool_draws)
    assert [(-entry["draws"], entry["path"]) for entry in summary] == sorted(
        (-entry["draws"], entry["path"]) for entry in summary
    )
    assert all(entry["in_pool"] == (tuple(entry["path"]) in reference.scores) for entry in summary)


def test_paths_over_the_budget_are_drawn_unless_told_otherwise(make):
    def over(paths):
        return [path for path in paths if SPACE.macs(path) > MEDIAN_MACS * 1e6]

    records = run(make(max_macs=MEDIAN_MACS, iterations=8))
    assert any(over(record["trained_paths"]) for record in records)
    for sampler in ("greedy", "uniform"):
        trainer = make(max_macs=MEDIAN_MACS, iterations=8, draw_within_budget=True, sampler=sampler)
        for record in run(trainer):
            assert not over(record["trained_paths"])
            assert not over(record.get("drawn_paths", []))


def test_a_budget_that_nothing_meets_leaves_the_pool_empty(make):
    trainer = make(max_macs=0.001, iterations=6)
    records = run(trainer)
    assert len(trainer.pool) == 0
    assert all(record.get("from_pool", 0) == 0 for record in records)
    with pytest.raises(ValueError, match=r"^max_macs: expected a budget that leaves 1 paths to draw, got 0\.001"):
        make(max_macs=0.001, draw_within_budget=True)


# Stopping


@pytest.fixture
def fast(make, monkeypatch):
    """Trainers whose filter knows a fixed loss for each path, and whose steps do nothing: the pool becomes steady."""
    generator = torch.Generator().manual_seed(5)
    table = dict(zip(ALL_PATHS, torch.rand(len(ALL_PATHS), generator=generator).tolist(), strict=True))

    def evaluate(supernet, paths, images, targets, *, k, **options):
        losses = torch.tensor([table[tuple(path)] for path in paths.tolist()])
        return SimpleNamespace(
            losses=losses, top_k=losses.argsort(stable=True)[:k], plan=SimpleNamespace(shared_fraction=0.0)
        )

    monkeypatch.setattr(greedynas_ext.path_filter, "evaluate_paths", evaluate)

    def build(**options):
        settings = {"iterations": 120, "warmup_iterations": 10, "exploit_end": 0.3, "pool_size": 14, "stop_interval": 3}
        trainer = make(**(settings | options))

        def step(path):
            trainer.counts.optimizer_steps += 1
            return 1.0

        monkeypatch.setattr(trainer, "_step", step)
        return trainer

    return build


def looks(records, config):
    """(rounds done, whether the pool was full, turnover since the look before) at each look that can compare."""
    pool, before, result = ReferencePool(config.pool_size), None, []
    for done, record in enumerate(records, start=1):
        pool.replay(record)
        past = done - config.warmup_iterations
        if past > 0 and past % config.stop_interval == 0:
            now = set(pool.scores)
            if before:
                result.append((done, len(now) == config.pool_size, len(now - before) / len(now)))
            before = now if len(now) == config.pool_size else None
    return result


def test_turnover_is_the_new_part_of_the_pool_at_each_look(fast):
    trainer = fast(stop_threshold=None)
    records = run(trainer)
    expected = {done: turnover for done, _, turnover in looks(records, trainer.config)}
    assert len(expected) > 20
    assert len(set(expected.values())) > 3
    last = None
    for done, record in enumerate(records, start=1):
        last = expected.get(done, last)
        assert record["turnover"] == (None if last is None else pytest.approx(last, abs=1e-12))


def test_stops_at_the_first_look_that_is_steady_enough_and_not_before(fast):
    free = fast(stop_threshold=None)
    records = run(free)
    assert len(records) == 120
    seen = looks(records, free.config)
    thresholds = sorted({turnover for _, _, turnover in seen if turnover < 1})
    assert len(thresholds) >= 4
    stops = set()
    for threshold in [*thresholds, thresholds[1] - 1e-9, 0.99]:
        expected = next((done for done, full, turnover in seen if full and turnover <= threshold), 120)
        trainer = fast(stop_threshold=threshold)
        assert len(run(trainer)) == expected
        summary = trainer.summary()
        assert summary["iterations"] == expected
        assert summary["planned_iterations"] == 120
        assert summary["stopped_early"] == (expected < 120)
        stops.add(expected)
    assert len(stops) > 2  # different thresholds did stop at different rounds
    assert min(stops) >= 10 + 2 * 3  # past the warm-up, and only once there is a pool to compare with


def test_what_the_poster_prints_would_stop_elsewhere(fast):
    # π = |P_t ∩ P| / |P| <= α taken literally stops when the pool has changed, not when it is steady.
    trainer = fast(stop_threshold=0.0)
    records = run(trainer)
    assert trainer.filter.steady
    assert records[-1]["turnover"] == 0.0
    assert all(record["turnover"] != 0.0 for record in records[:-1])


def test_does_not_stop_between_looks(fast):
    trainer = fast(stop_threshold=0.5, stop_interval=7)
    run(trainer)
    assert trainer.filter.steady
    assert (trainer.iteration - 10) % 7 == 0


def test_does_not_stop_while_the_pool_is_not_full(fast):
    # Few paths are within the budget: the pool is as steady as can be, but never full.
    few = sorted(SPACE.macs(ALL_PATHS))[9] / 1e6
    trainer = fast(stop_threshold=0.9, pool_size=30, stop_interval=6, max_macs=few, exploit_end=0.1)
    run(trainer)
    assert 5 <= len(trainer.pool) < 30
    assert trainer.iteration == 120
    assert trainer.filter.turnover is None


def test_never_stops_without_a_threshold(fast):
    trainer = fast(stop_threshold=None, exploit_start=0.9, exploit_end=0.9)
    run(trainer)
    assert trainer.iteration == 120
    assert trainer.filter.turnover == 0.0


def test_does_not_stop_in_the_warm_up(fast):
    trainer = fast(warmup_iterations=120, stop_threshold=0.99)
    assert all(record["turnover"] is None for record in run(trainer))
    assert trainer.iteration == 120


def test_the_default_interval_could_renew_the_pool_three_times(make):
    assert make(stop_interval=None, pool_size=8, sampled_paths=6).filter.stop_interval == 4
    assert make(stop_interval=None, pool_size=10, sampled_paths=6).filter.stop_interval == 5
    assert make(stop_interval=None, pool_size=1000, sampled_paths=10, kept_paths=5).filter.stop_interval == 300


# Learning rate, divergence


def rates_of(trainer):
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda opt, *_: rates.append([g["lr"] for g in opt.param_groups]))
    return rates


@pytest.mark.parametrize(("sampler", "steps"), [("greedy", 12), ("uniform", 12), ("fair", 6)])
def test_the_learning_rate_falls_by_optimizer_steps(sampler, steps, make):
    trainer = make(sampler=sampler, iterations=6, warmup_iterations=2, learning_rate=0.2, final_learning_rate=0.01)
    rates = rates_of(trainer)
    records = run(trainer)
    expected = 0.01 + 0.19 * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / (steps - 1)))
    assert np.allclose(rates, expected[:, None], rtol=1e-12)
    assert rates[0] == [0.2]
    assert rates[-1] == [pytest.approx(0.01)]
    per_round = steps // 6
    assert [record["learning_rate"] for record in records] == [rate for (rate,) in rates[per_round - 1 :: per_round]]
    assert trainer.planned_steps == steps
    assert trainer.summary()["final_learning_rate"] == rates[-1][0]


def test_the_horizon_stays_where_training_stops_early(fast):
    trainer = fast(stop_threshold=0.5)
    records = run(trainer)
    summary = trainer.summary()
    assert summary["stopped_early"]
    assert summary["planned_optimizer_steps"] == 240
    step = 2 * trainer.iteration - 1
    expected = 1e-5 + (0.05 - 1e-5) * 0.5 * (1 + math.cos(math.pi * step / 239))
    assert records[-1]["learning_rate"] == summary["final_learning_rate"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sampler", ["greedy", "uniform", "fair"])
def test_divergence(sampler, make):
    trainer = make(sampler=sampler, learning_rate=1e30, warmup_iterations=0)
    with pytest.raises(FloatingPointError, match=r"^training: the loss became \[.*\] in round \d+; a lower learning"):
        run(trainer)


def test_a_path_without_finite_loss_stays_out_of_the_pool(make):
    trainer = make(iterations=3, warmup_iterations=0, sampled_paths=20, kept_paths=2, pool_size=40)
    with torch.no_grad():
        for parameter in trainer.supernet.choices[0][1].parameters():
            parameter.fill_(math.nan)
    for _ in range(3):
        record = trainer.run_iteration()
        bad = [path[0] == 1 for path in record["drawn_paths"]]
        assert any(bad)
        assert [math.isnan(loss) for loss in record["filter_losses"]] == bad
        assert all(path[0] != 1 for path in record["trained_paths"])
    assert (trainer.pool.paths[:, 0] != 1).all()


# Other samplers


def test_fair_rounds_draw_a_permutation_per_layer_and_make_one_step(make, tiny_task):
    trainer = make(sampler="fair", iterations=3, momentum=0.0, weight_decay=0.0, learning_rate=0.1, label_smoothing=0.1)
    batches = BatchStream(tiny_task.data.train, 8, seed=trainer.config.seed, augment=True)
    for iteration in range(3):
        oracle = copy.deepcopy(trainer.supernet)
        record = trainer.run_iteration()
        paths = record["trained_paths"]
        assert len(paths) == 3
        assert all(sorted(column) == [0, 1, 2] for column in zip(*paths, strict=True))
        assert record["optimizer_steps"] == iteration + 1
        assert record["images_trained"] == 3 * 8 * (iteration + 1)
        assert record["images_evaluated"] == record["pool"] == 0
        images, targets = batches.batch(iteration)
        losses = [F.cross_entropy(forward(oracle, images, path), targets, label_smoothing=0.1) for path in paths]
        assert record["training_loss"] == pytest.approx(sum(losses).item() / 3, rel=1e-5)
        gradients = torch.autograd.grad(sum(losses), list(oracle.parameters()))
        rate = trainer.learning_rate(iteration)
        for (name, before), gradient in zip(oracle.named_parameters(), gradients, strict=True):
            after = dict(trainer.supernet.named_parameters())[name]
            torch.testing.assert_close(after, before - rate * gradient, rtol=1e-4, atol=1e-6)
        stem = trainer.supernet.state_dict()
        assert {stem[n].item() for n in stem if n.startswith("stem") and "num_batches" in n} == {3 * (iteration + 1)}


def test_uniform_rounds_draw_from_the_whole_space(make, monkeypatch):
    trainer = make(sampler="uniform", iterations=200, warmup_iterations=0)
    monkeypatch.setattr(trainer, "_step", lambda path: 1.0)
    drawn = Counter(tuple(path) for record in run(trainer) for path in record["trained_paths"])
    assert sum(drawn.values()) == 400
    expected = 400 / 81
    assert sum((drawn[path] - expected) ** 2 / expected for path in ALL_PATHS) < 130  # chi-square, 80 dof: p < 4e-4
    assert len(trainer.pool) == 0
    assert trainer.counts.images_evaluated == 0


# Costs


def test_cost_ratio_and_corrected_counts():
    counts = Counts(50, 4000, 60000, seconds_training=20.0, seconds_filtering=30.0)
    assert counts.cost_ratio == pytest.approx((20 / 4000) / (30 / 60000))  # 10 evaluated images
    assert counts.corrected(counts.cost_ratio) == pytest.approx(4000 + 60000 / 10)
    assert counts.corrected(3.33) == pytest.approx(4000 + 60000 / 3.33)
    assert Counts(5, 400).cost_ratio is None
    assert Counts(5, 400).corrected(None) == 400.0


def test_the_posters_figures_come_out_of_the_counts():
    # 46 epochs of 1.23M training images and 2.40M evaluated ones
    counts = Counts(images_trained=46 * 1_230_000, images_evaluated=46 * 2_400_000)
    assert counts.corrected(3.33) / 1e6 == pytest.approx(89.7, abs=0.05)


def test_summary_holds_measured_and_published_costs(make):
    trainer = make()
    run(trainer)
    summary = trainer.summary()
    measured = summary["cost_ratio"]["measured"]
    per_trained = summary["seconds_training"] / summary["images_trained"]
    assert measured == pytest.approx(per_trained / (summary["seconds_filtering"] / summary["images_evaluated"]))
    assert summary["cost_ratio"]["poster"] == 3.33
    for name, ratio in (("measured", measured), ("poster", 3.33)):
        assert summary["corrected_optimizations"][name] == pytest.approx(
            summary["images_trained"] + summary["images_evaluated"] / ratio
        )
    assert summary["space_size"] == 81
    assert "1,154 training" in summary["data"]


# Whole runs


def without_seconds(records):
    return [{name: value for name, value in record.items() if name not in SECONDS} for record in records]


def outcome(folder):
    """What a run ends with, but for measured times."""
    summary = read_json(folder.summary)
    for name in (*SECONDS, "cost_ratio"):
        del summary[name]
    del summary["corrected_optimizations"]["measured"]
    return (
        folder.supernet.read_bytes(),
        folder.pool.read_bytes(),
        summary,
        without_seconds(MetricsLog(folder.metrics).read()),
    )


@pytest.mark.parametrize("sampler", ["greedy", "uniform", "fair"])
def test_a_seed_repeats_a_run_bit_for_bit_and_another_does_not(sampler, tmp_path):
    first = outcome(train(train_config(tmp_path / "a", sampler=sampler, seed=3, max_macs=0.02)))
    torch.manual_seed(99)  # the global generators have no say
    np.random.seed(99)
    random.seed(99)
    assert outcome(train(train_config(tmp_path / "b", sampler=sampler, seed=3, max_macs=0.02))) == first
    other = outcome(train(train_config(tmp_path / "c", sampler=sampler, seed=4, max_macs=0.02)))
    assert other[0] != first[0]
    assert other[3] != first[3]


def test_global_generators_are_left_alone(tmp_path):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    train(train_config(tmp_path / "run", iterations=4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


def test_what_a_run_leaves(tmp_path, tiny_task):
    folder = train(train_config(tmp_path / "run", max_macs=0.02))
    names = {path.name for path in folder.root.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "checkpoint.safetensors", "supernet.safetensors", "pool.json", "summary.json"
    }  # fmt: skip
    records = MetricsLog(folder.metrics).read()
    assert [record["iteration"] for record in records] == list(range(10))
    tensors, metadata = load_tensors(folder.supernet)
    assert metadata == {"space": "tiny"}
    assert tensors.keys() == tiny_task.new_supernet(0).state_dict().keys()
    summary = read_json(folder.summary)
    assert summary["iterations"] == 10
    assert summary["images_trained"] == records[-1]["images_trained"]
    reference = ReferencePool(8, lambda path: SPACE.macs(path) <= 0.02e6)
    for record in records:
        reference.replay(record)
    assert [tuple(entry["path"]) for entry in read_json(folder.pool)["entries"]] == reference.best_first


def test_a_diverged_run_is_not_finished(tmp_path):
    with pytest.raises(FloatingPointError, match="training: the loss became"):
        train(train_config(tmp_path / "run", learning_rate=1e30))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "supernet.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"space": "mbv9"}, ValueError, r"^space: expected one of mbv2-7.*got 'mbv9'"),
        ({"dataset": "cats"}, ValueError, r"^dataset: expected one of digits.*got 'cats'"),
        ({"dataset": "imagefolder"}, ValueError, r"^data_root: imagefolder needs the folder"),
        ({"dataset": "imagefolder", "data_root": "/nowhere"}, FileNotFoundError, r"^data_root: /nowhere: no such"),
        ({"filter_images": 300}, ValueError, r"^filter_images: 300 exceeds the 288 images of the validation set"),
        ({"batch_size": 2000}, ValueError, r"^batch_size: 2000 exceeds the 1154 images"),
        ({"validation": 1.5}, ValueError, r"^validation: expected a fraction between 0 and 1, got 1\.5"),
        ({"threads": 0}, ValueError, r"^threads: expected at least 1"),
        ({"label_smoothing": 2.0}, ValueError, r"^label_smoothing: expected a probability"),
    ],
)
def test_bad_options_leave_no_folder(options, error, message, tmp_path):
    if "data_root" in options:
        options = options | {"data_root": Path(options["data_root"])}
    with pytest.raises(error, match=message):
        train(train_config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
