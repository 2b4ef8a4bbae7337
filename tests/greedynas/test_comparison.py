import re

import pytest
from run_folders import MEASURED_RATIO, make_retraining, make_search, make_training

from greedynas.comparison import Arm, write_comparison
from greedynas.report import write_report
from greedynas.runs import RunFolder
from greedynas_ext.strict_json import read_json, write_json

ACCURACIES = {"greedy": (0.98, 0.985, 0.99), "random": (0.97, 0.9833, 0.975), "uniform": (0.95, 0.96, 0.955)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    greedy = make_training(root / "greedy", max_macs=1.0, rounds=60)
    uniform = make_training(root / "uniform", rounds=90, sampler="uniform", warmup_iterations=0, max_macs=1.0, seed=1)
    make_search(greedy, max_macs=1.0)
    make_search(greedy, method="random", max_macs=1.0, seed=1)
    make_search(uniform, max_macs=1.0, seed=2)
    for run, search, name in ((greedy, "nsga2", "greedy"), (greedy, "random", "random"), (uniform, "nsga2", "uniform")):
        for number, accuracy in enumerate(ACCURACIES[name]):
            make_retraining(run, search=search, name=f"{search}-{number}", epochs=3, accuracy=accuracy)
    return root


def arms(root, seeds=3):
    def arm(label, run, search):
        folder = RunFolder(root / run)
        return Arm(label, folder, search, [folder.retraining(f"{search}-{number}") for number in range(seeds)])

    return [arm("Greedy", "greedy", "nsga2"), arm("Random", "greedy", "random"), arm("Uniform", "uniform", "nsga2")]


@pytest.fixture
def text(root):
    report = write_comparison(root, arms(root))
    assert report == root / "report.md"
    return report.read_text()


def test_the_table_holds_the_figures_of_the_folders(root, text):
    table = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    rows = {cells[1]: cells[2:-1] for cells in table}
    assert rows.keys() == {"", "Greedy", "Random", "Uniform"}
    for label, run, search, name in (
        ("Greedy", "greedy", "nsga2", "greedy"),
        ("Random", "greedy", "random", "random"),
        ("Uniform", "uniform", "nsga2", "uniform"),
    ):
        training = read_json(root / run / "summary.json")
        chosen = read_json(root / run / "search" / search / "summary.json")["chosen"]
        cost = training["images_trained"] + training["images_evaluated"] / MEASURED_RATIO
        seconds = training["seconds_training"] + training["seconds_filtering"]
        low, high = min(ACCURACIES[name]), max(ACCURACIES[name])
        assert rows[label] == [
            f"{training['images_trained']:,}",
            f"{training['images_evaluated']:,}",
            f"{cost:,.0f}",
            f"{seconds:.0f} s",
            f"{chosen['loss']:.4f}",
            f"{chosen['macs']:.2f}",
            f"{sum(ACCURACIES[name]) / 3:.2%} ({low:.2%} to {high:.2%})",
        ]


def test_space_budget_and_cost_ratio_are_stated(text):
    assert "Space `mini-16`: 5,764,801 paths, 57,648 times the candidate pool" in text
    assert "Budget: 1M multiply-accumulates" in text
    assert "evaluated images / 9.87, the cost ratio measured in this run (GreedyNAS: 3.33)" in text
    assert "of 3 seeds; one of 360 test images is 0.28%" in text


def test_the_verdict_claims_no_more_than_the_seeds_do(text):
    # 98.0 to 99.0 % against 97.0 to 98.33 %: overlapping; against 95.0 to 96.0 %: apart
    assert (
        "Against *Random* the difference in mean test accuracy is +0.89 points: the seeds' ranges overlap, so this run "
        "cannot tell them apart." in text
    )
    assert "Against *Uniform* the difference in mean test accuracy is +3.00 points: beyond the seeds." in text


def test_one_seed_tells_nothing(root):
    text = write_comparison(root, arms(root, seeds=1)).read_text()
    assert "Against *Uniform* the difference in mean test accuracy is +3.00 points: with one seed each, this" in text
    assert "beyond the seeds" not in text


def test_a_baseline_that_wins_is_said_to(root):
    greedy, random, _ = arms(root)
    text = write_comparison(root, [random, greedy]).read_text()
    assert "Against *Greedy* the difference in mean test accuracy is -0.89 points: the seeds' ranges overlap" in text


def test_pictures_and_links_are_there(root):
    write_report(root / "greedy")
    (root / "uniform" / "report.md").write_text("made like the other")
    text = write_comparison(root, arms(root)).read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {"comparison.png", "greedy/report.md", "uniform/report.md"} <= set(links)
    assert len(links) == len(set(links))
    assert len([link for link in links if link.startswith("greedy/pictures/")]) >= 4
    for link in links:
        data = (root / link).read_bytes()
        assert data.startswith(b"\x89PNG") if link.endswith(".png") else data


def test_the_same_folders_give_the_same_bytes(root):
    first = write_comparison(root, arms(root)).read_bytes(), (root / "comparison.png").read_bytes()
    assert (write_comparison(root, arms(root)).read_bytes(), (root / "comparison.png").read_bytes()) == first


def test_missing_and_damaged_results_are_named(root):
    with pytest.raises(FileNotFoundError, match=r"retrain/nsga2-3/summary\.json"):
        write_comparison(root, arms(root, seeds=4))
    path = root / "greedy" / "search" / "random" / "summary.json"
    before = read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"search/random/summary\.json"):
        write_comparison(root, arms(root))
    write_json(path, before)
