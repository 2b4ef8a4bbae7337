import itertools
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare

from greedynas.theory import exploit_q, theorem1
from greedynas_ext.pool import CandidatePool
from greedynas_ext.samplers import DrawnPaths, FairSampler, GreedySampler, UniformSampler

# Seeds are fixed, so these tests do not flicker; a correct sampler fails one of them for 1 seed in 1,000.
P = 1e-3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_uniform(drawn, outcomes):
    """Chi-square of the outcomes in `drawn` against equal chances; none but `outcomes` may occur."""
    counts = Counter(drawn)
    outcomes = list(outcomes)
    assert set(counts) <= set(outcomes)
    assert chisquare([counts[outcome] for outcome in outcomes]).pvalue > P


def rows(paths):
    return list(map(tuple, paths.tolist()))


def product(*ranges):
    return itertools.product(*map(range, ranges))


# --- uniform ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(num_choices=st.lists(st.integers(1, 20), min_size=1, max_size=25), m=st.integers(1, 40))
def test_uniform_paths_have_the_right_shape_and_range(num_choices, m):
    paths = UniformSampler(num_choices).sample(m, generator())
    assert (paths.shape, paths.dtype) == ((m, len(num_choices)), torch.int64)
    assert (paths >= 0).all()
    assert (paths < torch.tensor(num_choices)).all()


def test_uniform_paths_are_uniform_and_independent():
    drawn = rows(UniformSampler([3, 1, 4, 2]).sample(24_000, generator(1)))
    assert_uniform(drawn, product(3, 1, 4, 2))  # all combinations: layers are independent
    firsts = [path[0] for path in drawn]
    assert_uniform(zip(firsts[::2], firsts[1::2], strict=True), product(3, 3))  # so are successive paths


def test_every_layer_of_a_real_space_is_uniform():
    paths = UniformSampler([13] * 21).sample(13_000, generator(2))
    for column in paths.T.tolist():
        assert_uniform(column, range(13))


def test_a_generators_state_repeats_uniform_draws_and_nothing_else_is_touched():
    sampler, g = UniformSampler([7] * 21), generator(3)
    sampler.sample(4, g)
    state, global_state = g.get_state(), torch.get_rng_state()
    expected = sampler.sample(10, g)
    assert torch.equal(UniformSampler([7] * 21).sample(10, torch.Generator().set_state(state)), expected)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert not torch.equal(sampler.sample(10, g), expected)


WEIGHTS = torch.tensor([[0, 1, 5], [0, 2, 3], [1, 2, 4], [0, 1, 9]])  # additive costs [layer, operation]


def additive(paths):
    return WEIGHTS.gather(1, paths.T).sum(0).tolist()


def within(budget):
    return [path for path in product(3, 3, 3, 3) if additive(torch.tensor([path]))[0] <= budget]


@pytest.mark.parametrize(("m", "rounds"), [(1, 3000), (7, 900), (6000, 1)])
def test_rejection_is_uniform_over_the_paths_within_the_budget(m, rounds):
    feasible = within(5)
    assert 10 < len(feasible) < 40
    sampler = UniformSampler([3] * 4, cost=additive, max_cost=5, reject=True)
    g = generator(4)
    drawn = [sampler.sample(m, g) for _ in range(rounds)]
    assert {tuple(paths.shape) for paths in drawn} == {(m, 4)}
    assert_uniform(rows(torch.cat(drawn)), feasible)


def test_rejection_finds_the_only_path_within_a_tight_budget():
    sampler = UniformSampler([3] * 4, cost=additive, max_cost=1, reject=True)
    assert within(1) == [(0, 0, 0, 0)]
    assert rows(sampler.sample(5, generator())) == [(0, 0, 0, 0)] * 5


def test_rejection_takes_costs_as_tensors_too():
    sampler = UniformSampler([3] * 4, cost=lambda paths: paths.sum(1), max_cost=2.0, reject=True)
    assert (sampler.sample(100, generator()).sum(1) <= 2).all()


def test_rejection_is_repeated_by_the_generators_state():
    sampler, g = UniformSampler([3] * 4, cost=additive, max_cost=3, reject=True), generator(6)
    state = g.get_state()
    first, then = sampler.sample(9, g), sampler.sample(9, g)
    g.set_state(state)
    assert torch.equal(sampler.sample(9, g), first)
    assert torch.equal(sampler.sample(9, g), then)


def test_without_reject_the_budget_is_left_to_the_pool():
    budgeted = UniformSampler([3] * 4, cost=additive, max_cost=5)
    assert torch.equal(budgeted.sample(50, generator()), UniformSampler([3] * 4).sample(50, generator()))


@pytest.mark.parametrize(("m", "max_tries"), [(1, 1), (1, 5000), (10, 333), (3, 10_000)])
def test_when_nothing_fits_it_gives_up_and_says_so(m, max_tries):
    seen = []

    def cost(paths):
        seen.append(len(paths))
        return additive(paths)

    sampler = UniformSampler([3] * 4, cost=cost, max_cost=0.5, reject=True, max_tries=max_tries)
    message = rf"max_cost: expected a budget that leaves {m} paths to draw, got 0.5: 0 of {m * max_tries} uniformly "
    with pytest.raises(ValueError, match=message + r"drawn paths were within it \(acceptance 0\); the cheapest cost "):
        sampler.sample(m, generator())
    assert sum(seen) == m * max_tries
    assert len(seen) <= 2 + math.log2(m * max_tries) + m * max_tries / 4096


def test_when_too_few_fit_it_says_how_rare_they_are():
    sampler = UniformSampler([3] * 4, cost=additive, max_cost=1, reject=True, max_tries=40)
    with pytest.raises(
        ValueError, match=r"leaves 20 paths .* of 800 .* \(acceptance 0.0\d+\); the cheapest cost 1$"
    ) as caught:
        sampler.sample(20, generator(1))
    found = int(re.search(r"(\d+) of 800", str(caught.value))[1])
    assert P < binom.cdf(found, 800, 1 / 81) < 1 - P
    assert f"(acceptance {found / 800:.2g})" in str(caught.value)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (lambda paths: [1.0], r"cost: expected it to return 4 costs for 4 paths, got \[1\]"),
        (lambda paths: torch.ones(4, 1), r"cost: expected it to return 4 costs for 4 paths, got \[4, 1\]"),
        (lambda paths: [1.0, math.nan, 1.0, 1.0], "cost: expected numbers, got nan"),
    ],
)
def test_bad_costs_are_refused(cost, message):
    with pytest.raises(ValueError, match=message):
        UniformSampler([3] * 4, cost=cost, max_cost=1, reject=True).sample(4, generator())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_choices": []}, ValueError, "num_choices: expected at least one layer, got none"),
        ({"num_choices": [3, 0]}, ValueError, r"num_choices\[1\]: expected at least 1, got 0"),
        ({"num_choices": [3, 2.0]}, TypeError, r"num_choices\[1\]: expected an integer, got float 2.0"),
        ({"num_choices": "33"}, TypeError, "num_choices: expected a sequence of ints, one per layer, got str"),
        ({"num_choices": 21}, TypeError, "num_choices: expected a sequence of ints, one per layer, got int"),
        ({"reject": True, "max_cost": 3}, ValueError, "cost: expected one, needed with reject=True, got None"),
        ({"reject": True, "cost": additive}, ValueError, "max_cost: expected one, needed with reject=True, got None"),
        ({"max_cost": -1}, ValueError, "max_cost: expected a positive finite number or None, got -1"),
        ({"max_cost": math.nan}, ValueError, "max_cost: expected a positive finite number or None, got nan"),
        ({"max_tries": 0}, ValueError, "max_tries: expected at least 1, got 0"),
    ],
)
def test_bad_samplers_are_refused(arguments, error, message):
    arguments = {"num_choices": [3] * 4, **arguments}
    with pytest.raises(error, match=message):
        UniformSampler(**arguments)
    with pytest.raises(error, match=message):
        GreedySampler(arguments.pop("num_choices"), CandidatePool(), **arguments)


def test_num_choices_may_be_a_tensor():
    assert UniformSampler(torch.tensor([3, 4])).num_choices == (3, 4)


@pytest.mark.parametrize(
    ("m", "generator", "error", "message"),
    [
        (0, generator(), ValueError, "m: expected at least 1, got 0"),
        (2.0, generator(), TypeError, "m: expected an integer, got float 2.0"),
        (2, None, TypeError, "generator: expected a torch.Generator, got NoneType"),
        (2, 17, TypeError, "generator: expected a torch.Generator, got int"),
    ],
)
def test_bad_draws_are_refused(m, generator, error, message):
    with pytest.raises(error, match=message):
        UniformSampler([3, 3]).sample(m, generator)
    with pytest.raises(error, match=message):
        GreedySampler([3, 3], CandidatePool()).sample(m, 0.5, generator)


# --- fair ------------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(choices=st.integers(1, 13), layers=st.integers(1, 25), seed=st.integers(0, 2**31))
def test_fair_draws_have_each_operation_of_each_layer_once(choices, layers, seed):
    paths = FairSampler([choices] * layers).sample(generator(seed))
    assert (paths.shape, paths.dtype) == ((choices, layers), torch.int64)
    assert (paths.sort(dim=0).values == torch.arange(choices)[:, None]).all()


def test_fair_permutations_are_uniform_and_layers_independent():
    sampler, g = FairSampler([3, 3]), generator(7)
    drawn = [sampler.sample(g) for _ in range(5400)]
    permutations = list(itertools.permutations(range(3)))
    assert_uniform((tuple(map(tuple, paths.T.tolist())) for paths in drawn), itertools.product(permutations, repeat=2))


def test_fair_draws_are_repeated_by_the_generators_state():
    g = generator(8)
    state, global_state = g.get_state(), torch.get_rng_state()
    expected = FairSampler([7] * 21).sample(g)
    assert torch.equal(FairSampler([7] * 21).sample(torch.Generator().set_state(state)), expected)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_fair_sampling_refuses_layers_that_differ():
    with pytest.raises(ValueError, match=r"num_choices: expected the same number .* got \[7, 7, 6\]"):
        FairSampler([7, 7, 6])
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator"):
        FairSampler([7, 7]).sample(0)


# --- greedy ----------------------------------------------------------------------------------------------------------

CHOICES = [5, 4, 3]


@pytest.fixture
def pool():
    pool = CandidatePool(10, num_choices=CHOICES)
    pool.update([[i % 5, i % 4, i % 3] for i in range(10)], [0.1 * i for i in range(10)])
    return pool


def draw_many(sampler, m, eps, rounds, seed):
    g = generator(seed)
    drawn = [sampler.sample(m, eps, g) for _ in range(rounds)]
    return DrawnPaths(torch.stack([d.paths for d in drawn]), torch.stack([d.from_pool for d in drawn]))


def test_greedy_draws_mix_the_pool_and_the_space(pool):
    drawn = draw_many(GreedySampler(CHOICES, pool), 10, 0.3, 3000, seed=9)
    assert (drawn.paths.shape, drawn.from_pool.shape) == ((3000, 10, 3), (3000, 10))
    assert (drawn.paths.dtype, drawn.from_pool.dtype) == (torch.int64, torch.bool)
    exploited = drawn.from_pool.sum().item()
    assert P < binom.cdf(exploited, 30_000, 0.3) < 1 - P
    assert_uniform(rows(drawn.paths[drawn.from_pool]), pool.snapshot())
    assert_uniform(rows(drawn.paths[~drawn.from_pool]), product(*CHOICES))


def test_greedy_draws_are_independent_within_a_step(pool):
    drawn = draw_many(GreedySampler(CHOICES, pool), 5, 0.4, 6000, seed=10)
    counts = Counter(drawn.from_pool.sum(1).tolist())  # binomial only if positions are independent
    expected = [6000 * binom.pmf(j, 5, 0.4) for j in range(6)]
    assert chisquare([counts[j] for j in range(6)], expected).pvalue > P
    for position in range(5):  # and none is favoured
        assert P < binom.cdf(drawn.from_pool[:, position].sum().item(), 6000, 0.4) < 1 - P
    both = drawn.from_pool[:, 0] & drawn.from_pool[:, 1]
    pairs = zip(rows(drawn.paths[both, 0]), rows(drawn.paths[both, 1]), strict=True)
    same = sum(a == b for a, b in pairs)  # a path may come twice: 1 in 10
    assert P < binom.cdf(same, int(both.sum()), 0.1) < 1 - P


def test_greedy_draws_keep_theorem_1():
    # Good are the paths whose first operation is one of 3 in 5: q = 0.6; all of the pool is good.
    pool = CandidatePool(30)
    pool.update([path for path in product(*CHOICES) if path[0] < 3][:30], [1.0] * 30)
    sampler, rounds = GreedySampler(CHOICES, pool), 6000
    for eps, seed in ((0.0, 11), (0.5, 12)):
        drawn = draw_many(sampler, 10, eps, rounds, seed)
        successes = ((drawn.paths[:, :, 0] < 3).sum(1) >= 5).sum().item()
        probability = theorem1(m=10, k=5, q=exploit_q(0.6, eps))
        assert P < binom.cdf(successes, rounds, probability) < 1 - P


def test_greedy_draws_at_the_ends_and_from_an_empty_pool(pool):
    sampler = GreedySampler(CHOICES, pool)
    assert not sampler.sample(500, 0.0, generator()).from_pool.any()
    all_from_pool = sampler.sample(500, 1.0, generator())
    assert all_from_pool.from_pool.all()
    assert set(rows(all_from_pool.paths)) == pool.snapshot()
    drawn = GreedySampler(CHOICES, CandidatePool()).sample(6000, 0.8, generator(13))
    assert not drawn.from_pool.any()
    assert_uniform(rows(drawn.paths), product(*CHOICES))


def test_greedy_draws_follow_the_pool_as_it_changes(pool):
    sampler = GreedySampler(CHOICES, pool)
    for loss in (math.nan, 0.0):
        pool.add((0, 0, 0), loss)
        assert ((0, 0, 0) in rows(sampler.sample(300, 1.0, generator()).paths)) == (loss == 0.0)


def test_greedy_draws_are_repeated_by_the_generators_state_and_the_pool(pool):
    g = generator(14)
    state, global_state = g.get_state(), torch.get_rng_state()
    expected = GreedySampler(CHOICES, pool).sample(50, 0.5, g)
    again = GreedySampler(CHOICES, CandidatePool.from_json(pool.to_json()))
    drawn = again.sample(50, 0.5, torch.Generator().set_state(state))
    assert torch.equal(drawn.paths, expected.paths)
    assert torch.equal(drawn.from_pool, expected.from_pool)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_greedy_draws_keep_the_budget():
    pool = CandidatePool(10, max_cost=4, cost=lambda path: additive(torch.tensor([path]))[0])
    pool.update([[0, 0, 0, 1], [0, 1, 0, 0], [2, 2, 2, 2]], [1.0, 2.0, 0.5])
    sampler = GreedySampler([3] * 4, pool, cost=additive, max_cost=4, reject=True)
    drawn = sampler.sample(2000, 0.5, generator(15))
    assert max(additive(drawn.paths)) == 4
    assert set(rows(drawn.paths[drawn.from_pool])) == {(0, 0, 0, 1), (0, 1, 0, 0)}
    assert_uniform(rows(drawn.paths[~drawn.from_pool]), within(4))


def test_bad_greedy_samplers_and_draws_are_refused(pool):
    with pytest.raises(TypeError, match="pool: expected a CandidatePool, got list"):
        GreedySampler(CHOICES, [])
    with pytest.raises(ValueError, match=r"pool: expected one for \(5, 4\) choices, got one for \(5, 4, 3\)"):
        GreedySampler([5, 4], pool)
    other = CandidatePool()
    other.add([1, 2], 0.5)
    with pytest.raises(ValueError, match="pool: expected paths of 3 layers, got 2"):
        GreedySampler(CHOICES, other).sample(4, 1.0, generator())
    for eps in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"exploit_probability: expected a probability in \[0, 1\]"):
            GreedySampler(CHOICES, pool).sample(4, eps, generator())
    assert GreedySampler(CHOICES, pool).num_choices == (5, 4, 3)
