"""`PathFilter`: the paths that it keeps, its pool, schedule and stopping rule, and that a run goes on where it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_supernets import FOREIGN
from foreign_supernets import make as make_foreign
from supernets import Chain, draw_images, plain_image_losses
from torch import Tensor, nn

import greedynas_ext.path_filter
from greedynas_ext import ExploitSchedule, PathFilter, UniformSampler, adapt, evaluate_paths

CHOICES = (3, 2, 3, 3)


@pytest.fixture
def net() -> Chain:
    torch.manual_seed(3)
    layers = [
        [
            nn.Sequential(nn.Conv2d(4, 4, 1 + 2 * (op % 2), padding=op % 2), nn.BatchNorm2d(4), nn.ReLU())
            for op in range(n)
        ]
        for n in CHOICES
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return Chain(nn.Conv2d(2, 4, 3), layers, head).double()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=generator)
    return images, torch.randint(5, (6,), generator=generator)


def make(
    net: Any, m: Any = 6, k: Any = 2, *, seed: int = 1, warmup: int = 2, total: int = 20, **options: Any
) -> PathFilter:
    settings: dict[str, Any] = {
        "pool_size": 7,
        "schedule": ExploitSchedule(start=0.2, end=0.9, warmup_steps=warmup, total_steps=total),
        "generator": torch.Generator().manual_seed(seed),
    }
    return PathFilter(net, m, k, **(settings | options))


def train(net: Chain, paths: Tensor, step: int) -> None:
    """A step on each path, so that the same path has another loss in the next round."""
    images, targets = batch(100 + step)
    for path in paths.tolist():
        net.zero_grad()
        F.cross_entropy(forward(net, images, path), targets).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad


def forward(net: Chain, images: Tensor, path: list[int]) -> Tensor:
    features = net.stem(images)
    for layer, op in zip(net.choices, path, strict=True):
        features = layer[op](features)
    return net.head(features)


# Drawing


def test_it_returns_the_k_of_lowest_loss(net: Chain) -> None:
    paths_to_train = make(net, 7, 3)
    for step in range(8):
        images, targets = batch(step)
        kept = paths_to_train.draw(images, targets)
        assert (kept.dtype, kept.shape) == (torch.int64, (3, len(CHOICES)))
        last = paths_to_train.last
        assert (last is None) == (step < 2)
        if last is not None:
            losses = plain_image_losses(net, last.drawn.paths, images, targets)[0].mean(1)
            assert last.evaluation.losses.tolist() == pytest.approx(losses.tolist(), rel=1e-10)
            best = sorted(range(7), key=lambda i: (last.evaluation.losses[i].item(), i))[:3]
            assert kept.tolist() == last.drawn.paths[best].tolist()
        train(net, kept, step)
    assert paths_to_train.step == 8


def test_the_warm_up_draws_uniformly_and_looks_at_no_image(net: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("evaluated during the warm-up")

    monkeypatch.setattr(greedynas_ext.path_filter, "evaluate_paths", forbidden)
    paths_to_train = make(net, warmup=4)
    uniform, generator = UniformSampler(CHOICES), torch.Generator().manual_seed(1)
    for _ in range(4):
        assert paths_to_train.exploit_probability == 0.0
        assert paths_to_train.draw(forbidden).tolist() == uniform.sample(2, generator).tolist()
        assert paths_to_train.last is None
        assert len(paths_to_train.pool) == 0
    with pytest.raises(AssertionError, match="during the warm-up"):
        paths_to_train.draw(*batch())


def test_the_exploit_probability_is_that_of_the_schedule(net: Chain) -> None:
    schedule = ExploitSchedule("cosine", start=0.0, end=1.0, warmup_steps=1, total_steps=9)
    paths_to_train = make(net, 40, 2, schedule=schedule, pool_size=200)
    shares = []
    for step in range(12):
        known = {tuple(path) for path in paths_to_train.pool.paths.tolist()}
        assert paths_to_train.exploit_probability == schedule(step)
        paths_to_train.draw(*batch())
        if step:
            last = paths_to_train.last
            assert last is not None
            assert last.exploit_probability == schedule(step)
            assert all(tuple(path) in known for path in last.drawn.paths[last.drawn.from_pool].tolist())
            shares.append(last.drawn.from_pool.double().mean().item())
    assert shares[0] == 0.0
    assert 0.2 < shares[3] < 0.8  # ε is 0.39 there
    assert shares[7:] == [1.0] * 4


def test_the_pool_is_that_of_the_evaluations(net: Chain) -> None:
    paths_to_train = make(net, total=14)
    scores: dict[tuple[int, ...], float] = {}
    again = 0
    for step in range(14):
        train(net, paths_to_train.draw(*batch(step)), step)
        last = paths_to_train.last
        if last is None:
            continue
        for path, loss in zip(last.drawn.paths.tolist(), last.evaluation.losses.tolist(), strict=True):
            key = tuple(path)
            again += key in scores
            scores[key] = (scores[key] + loss) / 2 if key in scores else loss
            if len(scores) > 7:
                del scores[max(scores, key=lambda key: (scores[key], key))]
        best = sorted(scores, key=lambda key: (scores[key], key))
        assert paths_to_train.pool.paths.tolist() == [list(key) for key in best]
        assert paths_to_train.pool.losses.tolist() == [scores[key] for key in best]
    assert again > 5


def test_images_come_in_many_ways(net: Chain) -> None:
    images, targets = batch()
    results = []
    for given in [
        (images, targets),
        ([(images, targets)],),
        (lambda: (images, targets),),
        (lambda: [images, targets],),
    ]:
        paths_to_train = make(net, warmup=0)
        results.append((paths_to_train.draw(*given).tolist(), paths_to_train.pool.to_json()))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    "options",
    [
        {"bn": "running"},
        {"bn": "recalibrated", "calibration": batch(9)[0]},
        {"label_smoothing": 0.3},
        {"precision": "fp32"},
        {"micro_batch": 2},
    ],
    ids=lambda options: next(iter(options)) + str(len(options)),
)
def test_the_options_are_those_of_the_evaluation(net: Chain, options: dict[str, Any]) -> None:
    train(net, torch.tensor([[0, 1, 2, 0]]), 0)  # running statistics that are not those of the start
    paths_to_train = make(net, warmup=0, **options)
    paths_to_train.draw(*batch())
    assert paths_to_train.last is not None
    paths = paths_to_train.last.drawn.paths
    found = paths_to_train.last.evaluation.losses
    assert torch.equal(found, evaluate_paths(net, paths, *batch(), **options).losses)
    assert not torch.equal(found, evaluate_paths(net, paths, *batch()).losses)


def test_a_draw_that_fails_can_be_repeated(net: Chain) -> None:
    one, other = make(net), make(net)
    images, targets = batch()
    for step in range(6):
        if step >= 2:
            before = json.dumps(one.state_dict())
            with pytest.raises(ValueError, match="images: expected finite values"):
                one.draw(images * float("nan"), targets)
            with pytest.raises(ZeroDivisionError):
                one.draw(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
            assert json.dumps(one.state_dict()) == before
        assert torch.equal(one.draw(images, targets), other.draw(images, targets))
    assert one.state_dict() == other.state_dict()


# Budgets


def cost(paths: Tensor) -> list[float]:
    return [float(total) for total in paths.sum(1)]


def test_paths_over_the_budget_never_enter_the_pool(net: Chain) -> None:
    paths_to_train = make(net, max_cost=3, cost=cost, total=12)
    drawn_over = 0
    for step in range(12):
        paths_to_train.draw(*batch(step))
        if paths_to_train.last is not None:
            drawn_over += int((paths_to_train.last.drawn.paths.sum(1) > 3).sum())
        assert (paths_to_train.pool.paths.sum(1) <= 3).all()
    assert drawn_over > 3
    assert len(paths_to_train.pool) > 3


def test_with_reject_they_are_not_drawn_either(net: Chain) -> None:
    paths_to_train = make(net, max_cost=3, cost=lambda paths: paths.sum(1), reject=True, total=12)
    for step in range(12):
        assert (paths_to_train.draw(*batch(step)).sum(1) <= 3).all()
        assert paths_to_train.last is None or (paths_to_train.last.drawn.paths.sum(1) <= 3).all()


# Stopping


@pytest.mark.parametrize("threshold", [0.0, 0.2, None])
def test_the_stopping_rule(net: Chain, threshold: float | None) -> None:
    paths_to_train = make(net, pool_size=10, stop_interval=3, stop_threshold=threshold, total=60)
    compared: set[tuple[int, ...]] | None = None
    turnovers, steady, expected = [], False, None
    for step in range(1, 61):
        paths_to_train.draw(*batch())  # the same images and weights: the pool comes to rest
        if step > 2 and (step - 2) % 3 == 0:
            now = {tuple(path) for path in paths_to_train.pool.paths.tolist()}
            if compared is not None:
                expected = len(now - compared) / len(now)
                turnovers.append(expected)
                steady = threshold is not None and expected <= threshold
            compared = now if len(now) == 10 else None
        assert paths_to_train.turnover == expected
        assert paths_to_train.steady == steady
    assert turnovers[0] > 0.2
    assert turnovers[-1] == 0.0
    assert paths_to_train.steady == (threshold is not None)


def test_a_pool_that_is_not_full_is_not_steady(net: Chain) -> None:
    paths_to_train = make(net, pool_size=54, stop_interval=10, max_cost=1, cost=cost, total=60)
    for _ in range(60):
        paths_to_train.draw(*batch())
    assert len(paths_to_train.pool) == 5  # all that are within the budget
    assert paths_to_train.turnover is None
    assert not paths_to_train.steady


def test_the_interval_is_three_pools_of_draws(net: Chain) -> None:
    assert make(net, 6, pool_size=7).stop_interval == 4
    assert make(net, 10, pool_size=1000).stop_interval == 300


# Resuming


@pytest.mark.parametrize("stop_at", [0, 1, 2, 5, 9, 13])
def test_a_run_goes_on_bit_for_bit(net: Chain, stop_at: int) -> None:
    def run(paths_to_train: PathFilter, steps: range) -> list[Any]:
        rounds = []
        for step in steps:
            kept = paths_to_train.draw(*batch(step))
            train(net, kept, step)
            last = paths_to_train.last
            losses = None if last is None else last.evaluation.losses.tolist()
            rounds.append((kept.tolist(), losses, paths_to_train.turnover, paths_to_train.steady))
        return rounds

    options: dict[str, Any] = {"stop_interval": 2, "stop_threshold": 0.5, "max_cost": 6, "cost": cost}
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    whole = make(net, **options)
    expected = run(whole, range(16))
    assert any(turnover for _, _, turnover, _ in expected)

    net.load_state_dict(weights)
    first = make(net, **options)
    rounds = run(first, range(stop_at))
    state = json.loads(json.dumps(first.state_dict()))
    run(first, range(stop_at, 16))  # what was saved is a copy
    net.load_state_dict(weights)
    run(make(net, **options), range(stop_at))
    resumed = make(net, **options, seed=77)
    resumed.draw(*batch(50))  # overwritten by what is loaded
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.last is None
    assert rounds + run(resumed, range(stop_at, 16)) == expected
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step: expected at least 0, got -1"),
        ({"step": 1.5}, "step: expected an integer, got float 1.5"),
        ({"format": "other"}, "format: expected 'greedynas.path_filter' version 1, got 'other' version 1"),
        ({"version": 2}, "format: expected .* version 1, got .* version 2"),
        ({"pool": None}, "no valid candidate pool: pool: expected an object, got NoneType"),
        ({"compared_pool": [[0, 0, 0, 3]]}, r"compared_pool\[0\]\[3\]: expected an operation index of 0 to 2, got 3"),
        ({"turnover": "0"}, "turnover: expected a number, got str '0'"),
        ({"steady": 1}, "steady: expected a bool, got int"),
        ({"generator": "00ff"}, "generator: expected the state of a CPU generator in hexadecimal"),
        ({"generator": "zz"}, "generator: expected the state of a CPU generator in hexadecimal"),
        ({"generator": None}, "generator: expected the state of a CPU generator in hexadecimal"),
        ({"more": 1}, "keys: expected compared_pool, .* missing or unknown: more"),
    ],
    ids=str,
)
def test_a_bad_state_is_refused_and_changes_nothing(net: Chain, change: dict[str, Any], message: str) -> None:
    paths_to_train = make(net)
    for step in range(5):
        paths_to_train.draw(*batch(step))
    state = paths_to_train.state_dict()
    before = json.dumps(state)
    with pytest.raises(ValueError, match=f"^state: expected what state_dict returned; {message}"):
        paths_to_train.load_state_dict(state | change)
    assert json.dumps(paths_to_train.state_dict()) == before


def test_a_state_of_other_arguments_is_refused(net: Chain) -> None:
    state = make(net).state_dict()
    with pytest.raises(ValueError, match=r"pool.capacity: expected 8, got 7"):
        make(net, pool_size=8).load_state_dict(state)
    with pytest.raises(ValueError, match=r"pool.max_cost: expected 3.0, got None"):
        make(net, max_cost=3, cost=cost).load_state_dict(state)
    net.choices[2].append(nn.Identity())
    with pytest.raises(ValueError, match=r"pool.num_choices: expected \(3, 2, 4, 3\), got \(3, 2, 3, 3\)"):
        make(net).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected what state_dict returned; got list"):
        make(net).load_state_dict([])  # type: ignore[arg-type]


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"m": 0}, ValueError, "m: expected at least 1, got 0"),
        ({"m": 2.0}, TypeError, "m: expected an integer, got float 2.0"),
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": 7}, ValueError, r"k: expected at most m = 6 \(the number of paths drawn\), got 7"),
        ({"pool_size": 0}, ValueError, "pool_size: expected at least 1, got 0"),
        ({"schedule": 0.5}, TypeError, "schedule: expected an ExploitSchedule, got float"),
        ({"generator": None}, TypeError, "generator: expected a torch.Generator, got NoneType"),
        ({"max_cost": 3}, ValueError, "cost: expected a function"),
        ({"max_cost": -1, "cost": cost}, ValueError, "max_cost: expected a positive finite number or None, got -1"),
        ({"reject": True, "cost": cost}, ValueError, "max_cost: expected one, needed with reject=True, got None"),
        (
            {"max_cost": 0.5, "cost": lambda paths: paths.sum(1) + 1.0, "reject": True},
            ValueError,
            "max_cost: expected a budget that leaves 1 paths to draw, got 0.5",
        ),
        ({"stop_threshold": 1.0}, ValueError, r"stop_threshold: expected a value in \[0, 1\) or None, got 1.0"),
        ({"stop_threshold": "0"}, TypeError, "stop_threshold: expected a number, got str '0'"),
        ({"stop_interval": 0}, ValueError, "stop_interval: expected at least 1, got 0"),
        (
            {"stop_interval": 1},
            ValueError,
            r"stop_interval: expected more than 7/6 rounds \(pool size over paths drawn\), .* got 1;",
        ),
        ({"bn": "none"}, ValueError, "bn: expected one of 'batch', 'running', 'recalibrated', got 'none'"),
        ({"calibration": batch()[0]}, ValueError, "calibration: expected images with bn='recalibrated' and only then"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing: expected"),
        ({"precision": "fp8"}, ValueError, "precision: expected one of"),
        ({"max_memory": 0}, ValueError, "max_memory: expected at least 1, got 0"),
        ({"micro_batch": 0}, ValueError, "micro_batch: expected at least 1, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(net: Chain, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make(net, **arguments)


def test_bad_supernets_and_images_are_named(net: Chain) -> None:
    with pytest.raises(TypeError, match=r"^supernet: expected attributes stem, choices\[layer\]\[op\] and head"):
        make(nn.Linear(2, 2))
    paths_to_train = make(net, warmup=0)
    images, targets = batch()
    with pytest.raises(TypeError, match=r"^targets: expected int64 \[6\], got None"):
        paths_to_train.draw(images)
    with pytest.raises(TypeError, match=r"^targets: expected None beside a function"):
        paths_to_train.draw(lambda: (images, targets), targets)
    with pytest.raises(TypeError, match=r"^images: expected the function to return \(images, targets\), got float64"):
        paths_to_train.draw(lambda: images)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"^cost: expected it to return 1 costs for 1 paths, got \[2\]"):
        make(net, warmup=0, max_cost=3, cost=lambda paths: [1.0] * 2).draw(images, targets)


def test_an_adapted_supernet() -> None:
    """Its layers differ in their number of options."""
    net, foreign = make_foreign("scarlet"), FOREIGN["scarlet"]
    view = adapt(net, **foreign.arguments)
    images, targets = draw_images(4, 20)
    path_filter = make(view, 6, 2, warmup=0)
    assert path_filter.pool.num_choices == foreign.sizes
    kept = path_filter.draw(images, targets)
    drawn = path_filter.last.drawn.paths
    losses = evaluate_paths(view, drawn, images, targets).losses
    assert torch.equal(kept, drawn[losses.argsort()[:2]])
