import copy
import errno
import json
import math
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from greedynas_ext.pool import CandidatePool


class NaivePool:
    """The rules of the pool written down as plainly as they are stated, on a list that is sorted each time."""

    def __init__(self, capacity, budget):
        self.capacity, self.budget = capacity, budget
        self.rows = []  # [loss, path, evaluations]

    def add(self, path, loss):
        if self.budget is not None and sum(path) > self.budget:
            return
        old = [row for row in self.rows if row[1] == path]
        self.rows = [row for row in self.rows if row[1] != path]
        row = [loss, path, 1]
        if old:
            row = [(old[0][0] + loss) / 2, path, old[0][2] + 1]
        if math.isnan(row[0]) or math.isinf(row[0]):
            return
        self.rows = sorted([*self.rows, row])[: self.capacity]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def contents(pool):
    return list(zip(pool.losses.tolist(), map(tuple, pool.paths.tolist()), pool.evaluations.tolist(), strict=True))


def filled(n=20, **arguments):
    pool = CandidatePool(**arguments)
    for i in range(n):
        pool.add([i // 7, i % 7], 1.0 / (i + 3))
    return pool


paths = st.tuples(st.integers(0, 2), st.integers(0, 3))
losses = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.0000000000000002, math.nan, math.inf, -math.inf]) | st.floats(-10, 10)


@settings(max_examples=150)
@given(
    capacity=st.integers(1, 8),
    budget=st.none() | st.integers(1, 6),
    evaluations=st.lists(st.tuples(paths, losses), max_size=40),
    batch=st.integers(1, 5),
)
def test_the_pool_is_the_naive_pool(capacity, budget, evaluations, batch):
    pool = CandidatePool(capacity, max_cost=budget, cost=sum)
    batched = CandidatePool(capacity, max_cost=budget, cost=sum)
    model = NaivePool(capacity, budget)
    snapshot, before = pool.snapshot(), []
    for i, (path, loss) in enumerate(evaluations):
        model.add(path, loss)
        stays = pool.add(path, loss)
        assert stays == (path in [row[1] for row in model.rows]) == (path in pool)
        assert contents(pool) == [tuple(row) for row in model.rows]
        assert (len(pool), pool.full) == (len(model.rows), len(model.rows) == capacity)
        common = [row for row in model.rows if row[1] in before]
        expected = 1 - len(common) / len(model.rows) if model.rows else 1.0
        assert pool.turnover(snapshot) == pytest.approx(expected, abs=1e-15)
        if i % 7 == 0:
            snapshot, before = pool.snapshot(), [row[1] for row in model.rows]
    for start in range(0, len(evaluations), batch):
        part = evaluations[start : start + batch]
        stay = batched.update(
            torch.tensor([path for path, _ in part]), torch.tensor([loss for _, loss in part], dtype=torch.float64)
        )
        assert stay.tolist() == [path in batched for path, _ in part]
    assert batched.to_json() == pool.to_json()
    back = CandidatePool.from_json(json.loads(json.dumps(pool.to_json(), allow_nan=False)), cost=sum)
    assert repr(back.to_json()) == repr(pool.to_json())  # repr tells 0.0 from -0.0


@settings(max_examples=50)
@given(losses=st.lists(st.sampled_from([0.5, 1.0]), min_size=12, max_size=12), order=st.permutations(range(12)))
def test_ties_do_not_depend_on_the_order_of_insertion(losses, order):
    pools = []
    for indices in (range(12), order):
        pool = CandidatePool(5)
        for i in indices:
            pool.add((i // 4, i % 4), losses[i])
        pools.append(pool)
    assert contents(pools[0]) == contents(pools[1])
    assert contents(pools[0]) == sorted(contents(pools[0]))


def test_a_path_evaluated_again_gets_the_mean_of_its_score_and_the_new_loss():
    pool = CandidatePool(3)
    for loss in (1.0, 2.0, 5.0):
        assert pool.add((1, 2), loss)
    assert contents(pool) == [(3.25, (1, 2), 3)]  # not 8/3, the mean of all losses


def test_the_worst_falls_out_and_starts_anew_when_it_returns():
    pool = CandidatePool(2)
    assert pool.add((0,), 1.0)
    assert pool.add((1,), 3.0)
    assert pool.add((1,), 3.0)
    assert pool.add((2,), 2.0)
    assert contents(pool) == [(1.0, (0,), 1), (2.0, (2,), 1)]
    assert not pool.add((1,), 2.5)
    assert pool.add((1,), 0.5)
    assert contents(pool) == [(0.5, (1,), 1), (1.0, (0,), 1)]


def test_a_path_that_got_worse_stays_until_another_pushes_it_out():
    pool = CandidatePool(2)
    pool.update([[0], [1]], [1.0, 2.0])
    assert pool.add((0,), 9.0)
    assert contents(pool) == [(2.0, (1,), 1), (5.0, (0,), 2)]
    assert pool.add((2,), 4.0)
    assert contents(pool) == [(2.0, (1,), 1), (4.0, (2,), 1)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_keeps_and_throws_paths_out(loss):
    pool = CandidatePool(4)
    assert not pool.add((0, 1), loss)
    assert pool.add((0, 2), 1.0)
    assert not pool.add((0, 2), torch.tensor(loss))
    assert len(pool) == 0
    assert pool.update([[1, 1], [2, 2]], torch.tensor([loss, 1.0])).tolist() == [False, True]


def test_a_mean_does_not_overflow():
    pool = CandidatePool(2)
    pool.add((0,), 1.5e308)
    assert pool.add((0,), 1.7e308)
    assert pool.losses.tolist() == [1.6e308]


def test_paths_over_the_budget_never_enter():
    pool = CandidatePool(10, max_cost=6.5, cost=lambda path: 2.5 * path[0] + path[1])
    assert pool.update([[2, 2], [2, 1], [2, 3], [0, 6]], [4.0, 3.0, 0.1, 2.0]).tolist() == [False, True, False, True]
    assert pool.snapshot() == {(2, 1), (0, 6)}
    assert pool.max_cost == 6.5


def test_update_says_what_is_in_the_pool_after_the_whole_batch():
    pool = CandidatePool(2)
    assert pool.update([[0], [1], [2], [3]], [4.0, 3.0, 2.0, 1.0]).tolist() == [False, False, True, True]
    assert pool.update(torch.empty(0, 1, dtype=torch.int64), []).tolist() == []


def test_update_counts_a_path_that_comes_twice():
    pool = CandidatePool(4)
    pool.update([[1, 1], [0, 1], [1, 1]], torch.tensor([1.0, 1.5, 3.0]))
    assert contents(pool) == [(1.5, (0, 1), 1), (2.0, (1, 1), 2)]


def test_float32_losses_are_kept_as_they_are():
    pool = CandidatePool(4)
    losses = torch.tensor([0.1, 0.3], dtype=torch.float32)
    pool.update([[0], [1]], losses)
    assert torch.equal(pool.losses, losses.double())
    assert (pool.losses.dtype, pool.paths.dtype, pool.evaluations.dtype) == (torch.float64, torch.int64, torch.int64)


def test_paths_may_be_tensors_lists_and_numpy():
    pool = CandidatePool(10)
    pool.add(torch.tensor([1, 2]), torch.tensor(1.0))
    pool.add(np.array([1, 3]), np.float64(2.0))
    pool.add([1, 4], 3)
    assert pool.snapshot() == {(1, 2), (1, 3), (1, 4)}
    assert torch.tensor([1, 3]) in pool
    assert [1, 5] not in pool


def test_an_empty_pool_has_shapes():
    pool = CandidatePool(3, num_choices=[7, 7, 2])
    assert pool.paths.shape == (0, 3)
    assert CandidatePool(3).paths.shape == (0, 0)
    assert pool.losses.shape == pool.evaluations.shape == (0,)
    assert (pool.turnover(frozenset()), pool.turnover({(1, 1, 1)})) == (1.0, 1.0)
    assert repr(pool) == "CandidatePool(0 of 3 paths)"


def test_repr_tells_the_best():
    assert repr(filled(5, capacity=9)) == "CandidatePool(5 of 9 paths, best loss 0.142857)"


def test_turnover_is_the_share_of_newcomers():
    pool = filled(10)
    snapshot = pool.snapshot()
    assert pool.turnover(snapshot) == 0.0
    for i in range(6):
        pool.add((9, i), 0.01)
    assert pool.turnover(snapshot) == 6 / 16
    assert len(snapshot) == 10
    # One that left counts no more: what is measured is the pool as it is now.
    assert pool.turnover(snapshot | {(100, 100)}) == 6 / 16


def test_turnover_of_a_full_pool_at_the_authors_threshold():
    pool = filled(50, capacity=50)
    snapshot = pool.snapshot()
    for i in range(4):
        pool.add((30, i), 0.001)
    assert pool.turnover(snapshot) == 0.08  # as many as left; the poster's |P_t ∩ P|/|P| would be 0.92


def test_sampling_is_uniform_with_replacement():
    pool = filled(20)
    drawn = pool.sample(20_000, generator())
    assert (drawn.shape, drawn.dtype) == ((20_000, 2), torch.int64)
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) == pool.snapshot()
    assert chisquare(list(counts.values())).pvalue > 1e-3
    pairs = Counter(zip(map(tuple, drawn[::2].tolist()), map(tuple, drawn[1::2].tolist()), strict=True))
    observed = [pairs[a, b] for a in counts for b in counts]
    assert chisquare(observed).pvalue > 1e-3  # draws do not know of each other, nor avoid repeats


def test_sampling_is_repeated_by_the_generators_state_alone():
    pool, g = filled(20), generator(5)
    g_state, global_state = g.get_state(), torch.get_rng_state()
    first = pool.sample(8, g)
    back = CandidatePool.from_json(pool.to_json())
    assert torch.equal(back.sample(8, torch.Generator().set_state(g_state)), first)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert pool.sample(0, g).shape == (0, 2)


def test_sampling_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="pool: cannot sample from it while it is empty"):
        CandidatePool(3).sample(1, generator())
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, got NoneType"):
        filled().sample(1, None)
    with pytest.raises(ValueError, match="n: expected at least 0, got -1"):
        filled().sample(-1, generator())


def test_sampling_refuses_a_generator_of_another_device():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match="generator: expected one on the CPU, got one on cuda:0"):
        filled().sample(1, Elsewhere())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity: expected at least 1, got 0"),
        ({"capacity": 1e3}, TypeError, "capacity: expected an integer, got float 1000.0"),
        ({"max_cost": 3.0}, ValueError, "cost: expected a function .* needed with max_cost, got None"),
        ({"max_cost": 0, "cost": sum}, ValueError, "max_cost: expected a positive finite number or None, got 0"),
        ({"max_cost": math.inf, "cost": sum}, ValueError, "max_cost: expected a positive finite number .* got inf"),
        ({"max_cost": "330M", "cost": sum}, TypeError, "max_cost: expected a number, got str '330M'"),
        ({"num_choices": []}, ValueError, "num_choices: expected at least one layer, got none"),
        ({"num_choices": 7}, TypeError, "num_choices: expected a sequence of ints, one per layer, got int"),
        ({"num_choices": [7, 0]}, ValueError, r"num_choices\[1\]: expected at least 1, got 0"),
    ],
)
def test_bad_pools_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        CandidatePool(**arguments)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ([1, 2, 3], ValueError, r"path: expected 2 operation indices \(one per layer\), got 3"),
        ([], ValueError, r"path: expected 2 operation indices \(one per layer\), got 0"),
        ([1, 7], ValueError, r"path\[1\]: expected an operation index of 0 to 6, got 7"),
        ([-1, 2], ValueError, r"path\[0\]: expected an operation index of 0 to 6, got -1"),
        ([1, 2.0], TypeError, r"path\[1\]: expected an integer, got float 2.0"),
        ([True, 2], TypeError, r"path\[0\]: expected an integer, got bool True"),
        ("12", TypeError, r"path: expected int64 \[L\] or a sequence of ints, got str"),
        (5, TypeError, r"path: expected int64 \[L\] or a sequence of ints, got int"),
        (torch.tensor([1.0, 2.0]), TypeError, r"path: expected int64 \[2\] \(one .*\), got float32 \[2\]"),
        (torch.tensor([1, 2, 3]), ValueError, r"path: expected int64 \[2\] \(one .*\), got int64 \[3\]"),
        (torch.tensor([[1, 2]]), ValueError, r"path: expected int64 \[2\] \(one .*\), got int64 \[1, 2\]"),
    ],
)
def test_bad_paths_are_refused(path, error, message):
    pool = CandidatePool(3, num_choices=[7, 7])
    with pytest.raises(error, match=message):
        pool.add(path, 1.0)
    assert len(pool) == 0


def test_without_num_choices_lengths_follow_the_first_path():
    pool = CandidatePool(3)
    with pytest.raises(ValueError, match="path: expected at least 1 operation indices"):
        pool.add([], 1.0)
    with pytest.raises(ValueError, match=r"path\[1\]: expected an operation index of at least 0, got -2"):
        pool.add([1, -2], 1.0)
    pool.add([1, 100], 1.0)
    with pytest.raises(ValueError, match="path: expected 2 operation indices"):
        pool.add([1], 1.0)


@pytest.mark.parametrize(
    ("paths", "losses", "error", "message"),
    [
        (torch.ones(2, 3), [1, 2], ValueError, r"paths: expected int64 \[m, 2\] \(one .*\), got float32 \[2, 3\]"),
        (torch.tensor([1, 2]), [1], ValueError, r"paths: expected int64 \[m, 2\] \(one .*\), got int64 \[2\]"),
        (torch.ones(1, 2), [1], TypeError, r"paths: expected int64 \[m, 2\] .* got float32 \[1, 2\]"),
        (torch.ones(1, 2, dtype=torch.int32), [1], TypeError, r"paths: .* got int32 \[1, 2\]"),
        ([[1, 1], [1, 2, 3]], [1, 2], ValueError, r"paths\[1\]: expected 2 operation indices"),
        ([[1, 1], [1, 9]], [1, 2], ValueError, r"paths\[1\]\[1\]: expected an operation index of 0 to 6, got 9"),
        ([1, 2], [1, 2], TypeError, r"paths\[0\]: expected int64 \[L\] or a sequence of ints, got int"),
        (None, [1], TypeError, r"paths: expected int64 \[m, L\] or nested sequences of ints, got NoneType"),
        ([[1, 1], [1, 2]], [1.0], ValueError, "losses: expected one for each of 2 paths, got 1"),
        ([[1, 1]], torch.ones(1, 1), ValueError, r"losses: expected floating point \[m\], got float32 \[1, 1\]"),
        ([[1, 1]], torch.tensor([1]), TypeError, r"losses: expected floating point \[m\], got int64 \[1\]"),
        ([[1, 1]], 0.5, TypeError, r"losses: expected floating point \[m\] or a sequence of numbers, got float"),
        ([[1, 1], [2, 2]], [0.5, "1"], TypeError, r"losses\[1\]: expected a number, got str '1'"),
        ([[1, 1]], [torch.ones(2)], TypeError, r"losses\[0\]: expected one real number, got float32 \[2\]"),
    ],
)
def test_a_bad_batch_changes_nothing(paths, losses, error, message):
    pool = filled(4, capacity=10, num_choices=[7, 7])
    before = pool.to_json()
    with pytest.raises(error, match=message):
        pool.update(paths, losses)
    assert pool.to_json() == before


def test_a_cost_that_is_no_number_changes_nothing():
    pool = CandidatePool(5, max_cost=10, cost=lambda path: math.nan if path == (2, 2) else 1)
    with pytest.raises(ValueError, match=r"cost: expected a number for path \[2, 2\], got nan"):
        pool.update([[1, 1], [2, 2]], [0.1, 0.2])
    assert len(pool) == 0


def test_files_come_back_bit_for_bit(tmp_path):
    pool = CandidatePool(100, max_cost=330e6, cost=lambda path: 1e6 * sum(path), num_choices=[13] * 21)
    g = generator(1)
    pool.update(torch.randint(13, (150, 21), generator=g), torch.rand(150, generator=g, dtype=torch.float64) * 7)
    pool.update(pool.paths[:30], torch.rand(30, generator=g) / 3)
    pool.save(tmp_path / "pool.json")
    back = CandidatePool.load(tmp_path / "pool.json", cost=lambda path: 1e6 * sum(path))
    assert contents(back) == contents(pool)
    assert (back.capacity, back.max_cost, back.num_choices) == (100, 330e6, (13,) * 21)
    assert back.evaluations.sum() == len(pool) + 30
    for p in (pool, back):  # they go on alike
        p.add([0] * 21, 0.01)
        p.add(pool.paths[5], 0.3)
    assert back.to_json() == pool.to_json()


def test_a_pool_with_a_budget_can_be_read_without_the_cost_but_takes_no_more(tmp_path):
    pool = filled(4, max_cost=10, cost=sum)
    pool.save(tmp_path / "pool.json")
    back = CandidatePool.load(tmp_path / "pool.json")
    assert back.to_json() == pool.to_json()
    with pytest.raises(ValueError, match="cost: expected a function, needed to add to a pool with max_cost"):
        back.add((0, 0), 0.1)


def test_a_failed_save_keeps_the_old_pool(tmp_path, monkeypatch):
    filled(4).save(tmp_path / "pool.json")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match=r"full.*pool.json"):
            filled(9).save(tmp_path / "pool.json")
    assert len(CandidatePool.load(tmp_path / "pool.json")) == 4
    assert os.listdir(tmp_path) == ["pool.json"]


def change(data, key, value):
    """Sets data["a"][0]["b"] for the key "a.0.b"; deletes it for the value `...`."""
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    for part in parents:
        data = data[part]
    if value is ...:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "other", "format: expected 'greedynas.candidate_pool' version 1, got 'other' version 1"),
        ("version", 2, "got 'greedynas.candidate_pool' version 2"),
        ("capacity", ..., "pool: expected the keys .*; capacity missing"),
        ("extra", 1, "pool: expected no other keys than .*, got extra"),
        ("capacity", 19, r"entries: expected a list of at most 19 \(its capacity\), got 20"),
        ("capacity", "20", "capacity: expected an integer, got str '20'"),
        ("capacity", True, "capacity: expected an integer, got bool True"),
        ("max_cost", -1.0, "max_cost: expected a positive finite number"),
        ("max_cost", 5.0, r"entries\[\d+\].path: expected a cost of at most 5.0, got [6-9]"),
        ("num_choices", [3, 6], r"entries\[\d+\].path\[1\]: expected an operation index of 0 to 5, got 6"),
        ("num_choices", [3], r"entries\[0\].path: expected 1 operation indices"),
        ("entries", {}, "entries: expected a list of at most 1000 .*, got dict"),
        ("entries.3", [1, 2], r"entries\[3\]: expected an object, got list"),
        ("entries.3.loss", ..., r"entries\[3\]: expected the keys evaluations, loss, path; loss missing"),
        ("entries.3.note", "", r"entries\[3\]: expected no other keys than .*, got note"),
        ("entries.3.loss", "0.5", r"entries\[3\].loss: expected a number, got str '0.5'"),
        ("entries.3.loss", None, r"entries\[3\].loss: expected a number, got NoneType"),
        ("entries.3.loss", math.nan, r"entries\[3\].loss: expected a finite number, got nan"),
        ("entries.3.loss", 0.0, r"entries\[3\]: expected entries sorted by loss, then path"),
        ("entries.3.path", [1], r"entries\[3\].path: expected 2 operation indices"),
        ("entries.3.path.0", 1.0, r"entries\[3\].path\[0\]: expected an integer, got float 1.0"),
        ("entries.3.path.0", -1, r"entries\[3\].path\[0\]: expected an operation index of at least 0, got -1"),
        ("entries.3.path", [2, 4], r"entries\[3\].path: expected every path once, got \[2, 4\] again"),
        ("entries.3.evaluations", 0, r"entries\[3\].evaluations: expected at least 1, got 0"),
        ("entries.3.evaluations", 1.0, r"entries\[3\].evaluations: expected an integer, got float"),
    ],
)
def test_damaged_pools_say_what_is_wrong(tmp_path, key, value, message):
    data = copy.deepcopy(filled(20, max_cost=30, cost=sum).to_json())
    change(data, key, value)
    with pytest.raises(ValueError, match=f"no valid candidate pool: .*{message}"):
        CandidatePool.from_json(data, cost=sum)
    (tmp_path / "pool.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"pool\.json: "):
        CandidatePool.load(tmp_path / "pool.json", cost=sum)


def test_equal_losses_out_of_order_are_noticed():
    data = CandidatePool(3).to_json()
    data["entries"] = [{"path": [i], "loss": 1.0, "evaluations": 1} for i in (1, 0)]
    with pytest.raises(ValueError, match=r"entries\[1\]: expected entries sorted"):
        CandidatePool.from_json(data)


def test_files_that_are_no_pool_are_named(tmp_path):
    filled(5).save(tmp_path / "pool.json")
    data = (tmp_path / "pool.json").read_bytes()
    for damaged in (data[:-10], b"", pickle.dumps(filled(2).to_json()), b"[]", b"\xff\xfe"):
        (tmp_path / "pool.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"pool\.json: "):
            CandidatePool.load(tmp_path / "pool.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        CandidatePool.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no valid candidate pool: pool: expected an object, got NoneType"):
        CandidatePool.from_json(None)


def test_what_json_gives_is_no_window_into_the_pool():
    pool = filled(5)
    data = pool.to_json()
    data["entries"][0]["path"][0] = 99
    data["entries"].pop()
    assert len(pool) == 5
    assert 99 not in pool.paths
