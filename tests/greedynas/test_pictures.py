import dataclasses
import io
import math

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from run_folders import make_retraining, make_run, make_search, make_training

import greedynas.pictures as pictures
from greedynas.architecture_picture import architecture_picture
from greedynas.drawing import DPI, WIDTH, new_figure, picture, shortened
from greedynas.published import PUBLISHED
from greedynas.run_results import PathDraws, read_results
from greedynas.search_picture import best_losses, search_picture
from greedynas.spaces import get_space

WIDTH_PIXELS = int(WIDTH * DPI)


def decode(data):
    """A PNG's pixels, uint8 [height, width, 3]; it is of a README's width, on white, and carries no metadata."""
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    assert set(image.info) <= {"dpi"}
    pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert width == WIDTH * DPI
    assert 0.2 < height / width < 0.6
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    inked = (pixels != 255).any(2)
    assert 0.02 < inked.mean() < 0.7
    # Content reaches near all four sides: nothing is squeezed into a corner, nor cut off at an edge.
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    assert rows[0] < 0.06 * height
    assert rows[-1] > 0.9 * height
    assert columns[0] < 0.06 * width
    assert columns[-1] > 0.9 * width
    assert not inked[:, [0, -1]].any()
    assert not inked[[0, -1]].any()
    return pixels


def count_colour(pixels, colour):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels == rgb).all(2).sum())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return read_results(make_run(tmp_path_factory.mktemp("runs") / "run", stop_threshold=0.4).root)


def test_training_picture_shows_losses_rates_and_what_filters_rejected(results):
    pixels = decode(pictures.training_picture(results))
    left, right = pixels[:, : WIDTH_PIXELS // 2], pixels[:, WIDTH_PIXELS // 2 :]
    assert count_colour(left, "#0072B2") > 500
    assert count_colour(right, "#0072B2") > 500
    assert count_colour(right, "#7A7A7A") > 500  # the rejected
    assert count_colour(pixels, "#F1F1F1") > 5000  # the warm-up


@pytest.mark.parametrize("sampler", ["uniform", "fair"])
def test_training_picture_without_filters_has_one_column(tmp_path, sampler):
    run = read_results(make_training(tmp_path / "run", rounds=40, sampler=sampler).root)
    pixels = decode(pictures.training_picture(run))
    assert count_colour(pixels, "#F1F1F1") < 200  # no warm-up either
    middle = slice(int(0.45 * WIDTH_PIXELS), int(0.7 * WIDTH_PIXELS))
    assert count_colour(pixels[:, middle], "#0072B2") > 200  # one panel takes the whole width


def test_pool_picture_marks_turnover_threshold_and_stop(results):
    assert results.training.stopped_early
    pixels = decode(pictures.pool_picture(results))
    assert count_colour(pixels, "#E69F00") > 300  # turnover
    red = count_colour(pixels, "#D55E00")
    assert red > 300  # threshold, and a large dot where it stopped


def test_pool_picture_without_a_look_at_the_pool_or_a_threshold(tmp_path):
    run = make_training(tmp_path / "run", rounds=30, pool_size=400, stop_threshold=None, warmup_iterations=0)
    results = read_results(run.root)
    assert results.training.turnover is None
    pixels = decode(pictures.pool_picture(results))
    assert count_colour(pixels, "#E69F00") == 0
    assert count_colour(pixels, "#D55E00") == 0
    assert count_colour(pixels, "#F1F1F1") < 200


def test_looks_are_the_rounds_in_which_the_pool_was_compared(results):
    looks = pictures._looks(results)
    interval, warmup = results.training.stop_interval, results.config.warmup_iterations
    assert [rounds for rounds, _ in looks] == list(range(warmup + 2 * interval, len(results.rounds) + 1, interval))
    assert looks[-1] == (len(results.rounds), results.training.turnover)


def test_search_picture_stars_the_choice_and_draws_the_budget(results, tmp_path):
    nsga2, random = results.searches
    plain = decode(search_picture(nsga2))
    assert count_colour(plain, "#D55E00") > 100  # the star
    overlaid = decode(search_picture(nsga2, random))
    assert count_colour(overlaid, "#7A7A7A") > count_colour(plain, "#7A7A7A") + 200
    run = make_training(tmp_path / "run", rounds=20)
    make_search(run, max_macs=1.0, bad_losses=3)
    budgeted = read_results(run.root).searches[0]
    assert budgeted.summary.chosen.macs <= 1.0
    assert count_colour(decode(search_picture(budgeted)), "#D55E00") > count_colour(plain, "#D55E00") + 100


def test_search_picture_of_a_single_path(tmp_path):
    run = make_training(tmp_path / "run", rounds=20)
    make_search(run, population=1, generations=1)
    decode(search_picture(read_results(run.root).searches[0]))


def test_best_losses_count_only_finite_ones_within_the_budget(tmp_path):
    run = make_training(tmp_path / "run", rounds=20)
    make_search(run, max_macs=0.9, bad_losses=4)
    search = read_results(run.root).searches[0]
    best = best_losses(search)
    assert len(best) == len(search.evaluated)
    assert np.isnan(best[:4]).all()
    assert best[-1] == search.summary.chosen.loss
    for number in (10, 50, len(best)):
        known = [s.loss for s in search.evaluated[:number] if s.macs <= 0.9 and math.isfinite(s.loss)]
        assert best[number - 1] == min(known, default=math.inf) or (not known and math.isnan(best[number - 1]))


def test_draws_picture(results):
    pixels = decode(pictures.draws_picture(results))
    assert count_colour(pixels, "#0072B2") > 1000
    assert count_colour(pixels, "#C4C4C4") > 1000


def test_draws_picture_bins_where_paths_are_drawn_very_often(results):
    draws = [PathDraws([0] * 8, 3000 - 7 * rank, rank % 3 == 0) for rank in range(400)]
    often = dataclasses.replace(results, training=dataclasses.replace(results.training, pool_draws=draws))
    decode(pictures.draws_picture(often))


@pytest.mark.parametrize("number", [1, 2, 7])
def test_retraining_picture(tmp_path, number):
    run = make_training(tmp_path / "run", rounds=20)
    for index in range(number):
        make_retraining(run, path="id " * 8, name=f"retraining {index}", epochs=index + 1, accuracy=1 - index / 100)
    decode(pictures.retraining_picture(read_results(run.root).retrainings))


@pytest.mark.parametrize(
    ("space", "path"),
    [
        ("mini-16", "e3k3 e6k7 e3k5 id e6k3 e6k5 e3k7 id"),
        ("mini-28", "id " * 10),
        ("macro", "id e3k3 e6k5 e6k5 e3k3 id id e6k5"),
        ("mbv2-7", "e6k7 " * 21),
        ("mbv2-se-13", " ".join(PUBLISHED["GreedyNAS-A"])),
    ],
)
def test_architecture_picture_of_every_space(space, path):
    space = get_space(space)
    names = path.split()
    pixels = decode(architecture_picture(space, space.encode(names).tolist(), "An architecture"))
    blues = {"3": "#CFE6F5", "5": "#5FA8D8", "7": "#08518C"}
    rank = {kernel: index for index, kernel in enumerate(sorted({str(op.kernel) for op in space.operations} - {"1"}))}
    areas = {kernel: count_colour(pixels, list(blues.values())[index]) for kernel, index in rank.items()}
    for kernel, area in areas.items():
        used = sum(int(name[1]) for name in names if name[2:4] == f"k{kernel}")  # sum of the expansions
        legend = 600
        assert (area > legend) == (used > 0), (kernel, area)


def test_architecture_columns_add_up_to_the_cost_of_the_path():
    from greedynas.architecture_picture import _columns

    for name in ("mini-16", "macro", "mbv2-se-13"):
        space = get_space(name)
        path = [layer % space.num_operations for layer in range(space.num_layers)]
        columns = _columns(space, path)
        assert sum(column.macs for column in columns) == space.macs(path)
        assert all(column.macs >= 0 for column in columns)
        assert len(columns) == 2 + len(space.fixed) + space.num_layers


def test_architecture_picture_rejects_a_path_of_another_space():
    with pytest.raises(ValueError, match=r"path: expected 8 operation indices .* got 21"):
        architecture_picture(get_space("mini-16"), [0] * 21, "title")


def test_pictures_are_the_same_bytes_each_time_and_leave_global_settings_alone(results):
    before = dict(matplotlib.rcParams)
    first = pictures.training_picture(results)
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "axes.facecolor": "red"}):
        assert pictures.training_picture(results) == first


def test_an_empty_picture_is_found_out():
    with pytest.raises(AssertionError):
        decode(picture(lambda: new_figure(3.0))())


@settings(max_examples=60)
@given(st.lists(st.floats(-10, 10) | st.just(math.nan), min_size=1, max_size=30), st.integers(0, 40))
def test_smoothed_is_the_mean_of_as_many_neighbours_on_either_side(values, reach):
    out = pictures.smoothed(values, reach)
    assert len(out) == len(values)
    for i, mean in enumerate(out):
        side = min(reach, i, len(values) - 1 - i)
        around = [v for v in values[i - side : i + side + 1] if not math.isnan(v)]
        if around:
            assert mean == pytest.approx(sum(around) / len(around), abs=1e-9)
        else:
            assert math.isnan(mean)


def test_standard_error():
    assert pictures.standard_error(0.5, 100) == pytest.approx(0.05)
    assert pictures.standard_error(1.0, 7) == 0.0


def test_shortened():
    assert shortened("nsga2") == "nsga2"
    assert shortened("a very long name of a search") == "a very long name …"
