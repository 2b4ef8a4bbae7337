import errno
import io
import json
import os
import re

import pytest
from PIL import Image
from run_folders import DESCRIPTION, MEASURED_RATIO, make_retraining, make_run, make_search, make_training

import greedynas.drawing
import greedynas_ext.files
from greedynas.markdown import count, duration, image, macs, params, table
from greedynas.metrics_log import read_jsonl
from greedynas.report import write_report
from greedynas.report_summary import summary
from greedynas.run_results import read_results
from greedynas.runs import RunFolder
from greedynas_ext.strict_json import read_json, write_json


def read_report(root):
    """The text of a report, whose pictures must be there, and each of them whole."""
    text = write_report(root).read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert shown
    for file in shown:
        Image.open(root / file.replace("%20", " ").replace("%7C", "|")).load()
    assert len(shown) == len(set(shown)) == len(list((root / "pictures").iterdir()))
    assert "nan" not in text.lower()
    assert "None" not in text
    return text


def change(file, **changes):
    """Changes fields of a file of JSON behind the back of those who wrote it; `...` removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder that no test changes."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", stop_threshold=0.4)


@pytest.fixture(scope="module")
def text(finished):
    """Its report."""
    return read_report(finished.root)


@pytest.fixture
def unrendered(monkeypatch):
    """Draws all figures and renders none, which takes most of the time; for tests of the text."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    monkeypatch.setattr(
        greedynas.drawing.FigureCanvasAgg, "print_png", lambda self, file, **options: file.write(pixel.getvalue())
    )


@pytest.fixture
def run(tmp_path):
    """A small run folder to change."""
    return make_training(tmp_path / "run", rounds=40, pool_size=20)


def test_the_report_says_what_the_files_say(finished, text):
    training = read_json(finished.summary)
    chosen = read_json(finished.search("nsga2").summary)["chosen"]
    retrained = read_json(finished.retraining("nsga2").summary)
    assert text.startswith("# GreedyNAS on digits\n")
    assert DESCRIPTION in text
    assert "5,764,801 paths" in text
    assert text.count(f"`{' '.join(chosen['names'])}`") == 2  # headline and architecture
    assert "98.61 ± 0.62%" in text
    assert "97.22 ± 0.87%" in text
    assert f"{chosen['loss']:.4f} nats" in text
    assert f"{retrained['macs']:.2f} M MACs" in text
    assert f"{retrained['params'] / 1e3:.1f} k parameters" in text
    assert f"{training['images_trained']:,} trained, {training['images_evaluated']:,} evaluated" in text
    measured, poster = training["corrected_optimizations"]["measured"], training["corrected_optimizations"]["poster"]
    assert f"{measured:,.0f} images: training on one costs {MEASURED_RATIO} evaluations here" in text
    assert f"{poster:,.0f} with GreedyNAS's 3.33" in text
    assert f"stopped after round {training['iterations']}: {training['turnover']:.1%} of the pool was new" in text
    steps = f"cosine over 1,500 planned steps; {training['optimizer_steps']:,} ran"
    assert f"{steps}, the last at {training['final_learning_rate']:.2g}" in text


def test_totals_of_draws_and_filters_are_those_of_the_metrics(finished, text):
    filters = [r for r in read_jsonl(finished.metrics) if "filter_losses" in r]
    from_pool = sum(r["from_pool"] for r in filters)
    draws = read_json(finished.summary)["pool_draws"]
    assert from_pool == sum(d["draws"] for d in draws) > 100
    drawn = 10 * len(filters)
    assert f"{from_pool:,} of {drawn:,} paths ({from_pool / drawn:.1%}) were drawn from the pool" in text
    assert f"{from_pool:,} draws from the pool took {len(draws):,} different paths" in text
    still = sum(d["in_pool"] for d in draws)
    assert f"Of the 100 paths in the pool at the end, {still} were drawn" in text
    last = filters[-(len(filters) // 10) :]
    kept = sum(sum(sorted(r["filter_losses"])[:5]) for r in last) / 5 / len(last)
    rejected = sum(sum(sorted(r["filter_losses"])[5:]) for r in last) / 5 / len(last)
    assert f"losses average {kept:.3f} nats, those of the rejected {rejected:.3f} nats" in text


def test_the_commands_repeat_every_stage(text):
    commands = re.findall(r"greedynas (\w+) --config (\S+) --run NEW", text)
    assert [command for command, _ in commands] == ["train", "search", "search", "retrain", "retrain"]
    assert all(os.path.isfile(file) for _, file in commands)


def test_the_same_folder_gives_the_same_bytes(finished, text):
    files = [finished.report, *sorted(finished.pictures.iterdir())]
    before = [file.read_bytes() for file in files]
    assert len(files) == 9
    for file in files:
        file.unlink()
    write_report(str(finished.root))
    assert [file.read_bytes() for file in files] == before


def test_tables_are_aligned(text):
    lines = text.splitlines()
    tables = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    tables = [block.strip().splitlines() for block in tables if block.strip()]
    assert len(tables) == 3
    for rows in tables:
        bars = [[match.start() for match in re.finditer(r"(?<!\\)\|", row)] for row in rows]
        assert all(positions == bars[0] for positions in bars)


def test_a_training_alone(run):
    text = read_report(run.root)
    assert "no search of it has finished yet" in text
    assert "## Search" not in text
    assert "## Retraining" not in text
    assert "## Architecture" not in text
    assert f"greedynas search --run {run.root}" in text


@pytest.mark.parametrize(
    ("sampler", "words"), [("uniform", "trains 5 uniformly drawn paths"), ("fair", "trains 7 paths, in which every")]
)
def test_samplers_without_a_filter(unrendered, tmp_path, sampler, words):
    run = make_training(tmp_path / "run", rounds=20, sampler=sampler)
    make_search(run, method="random")
    text = read_report(run.root)
    assert words in text
    assert f"none with {sampler} sampling" in text
    assert "images; nothing was evaluated" in text
    assert "## Exploitation" not in text
    assert "## Draws" not in text
    assert "# GreedyNAS" not in text
    assert "Chosen and not yet retrained" in text


def test_a_search_that_has_not_finished_is_left_out(unrendered, run):
    make_search(run, name="half").summary.unlink()
    assert "half" not in read_report(run.root)


def test_stopping_rule_in_all_its_states(tmp_path):
    def stopping(name, **options):
        return summary(read_results(make_training(tmp_path / name, rounds=60, **options).root))[-1]

    assert "| switched off" in stopping("off", stop_threshold=None, pool_size=20)
    assert "no two full pools were compared (α = 8%, a look every 300 rounds)" in stopping("never", pool_size=1000)
    assert re.search(r"did not apply: \d+\.\d% of the pool was new", stopping("busy", pool_size=20))


def test_greedy_training_that_never_left_its_warm_up(unrendered, tmp_path):
    run = make_training(tmp_path / "run", rounds=5, warmup_iterations=5)
    text = read_report(run.root)
    assert "## Exploitation" not in text
    assert "nothing was evaluated" in text


def test_filters_that_keep_all_paths_or_saw_nan(tmp_path):
    run = make_training(tmp_path / "run", rounds=40, kept_paths=10)
    lines = run.metrics.read_text().splitlines()
    record = json.loads(lines[-1])
    record["filter_losses"] = ["NaN"] * 10
    run.metrics.write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")
    assert "those of the rejected" not in read_report(run.root)


def test_the_report_is_about_nsga2_and_the_retraining_of_its_choice(unrendered, run):
    make_search(run, name="another", seed=3)
    make_search(run)
    make_retraining(run, path="id " * 8, name="all identities", accuracy=0.5)
    make_retraining(run, search="another", accuracy=0.91)
    text = read_report(run.root)
    assert "| nsga2, among" in text
    assert "**91.00 ± 1.51% test accuracy**" in text
    assert "Retrained as all identities: `id id id id id id id id`" in text
    assert "| given path" in text
    make_retraining(run, accuracy=0.93)
    assert "**93.00 ± 1.34% test accuracy**" in summary(read_results(run.root))[1]


def test_searches_that_chose_the_same_path_share_a_picture(unrendered, run):
    make_search(run)
    make_search(run, name="again")
    text = read_report(run.root)
    assert text.count("Chosen by nsga2 and again") == 2
    assert "search-again-architecture.png" not in text


def test_a_budget_is_told(unrendered, run):
    make_search(run, max_macs=0.9)
    assert "lowest loss within 0.9 M MACs" in read_report(run.root)


def test_names_that_markdown_and_shells_take_for_more(unrendered, run):
    make_search(run, name="a | b c")
    text = read_report(run.root)
    assert "| a \\| b c |" in text
    assert "(pictures/search-a%20%7C%20b%20c.png)" in text
    assert f"--config '{run.root}/search/a | b c/config.yaml'" in text


def test_no_run_and_unfinished_training(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run in .*nowhere \(expected .*config\.yaml\)"):
        write_report(tmp_path / "nowhere")
    run = make_training(tmp_path / "run", rounds=5)
    run.summary.unlink()
    with pytest.raises(FileNotFoundError, match=r"training in .*run is not finished; .*--resume"):
        write_report(run.root)
    assert not run.report.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": ...}, "summary.json: expected 'iterations', which is missing"),
        ({"iterations": 40.5}, "summary.json: iterations: expected int, got float 40.5"),
        ({"stopped_early": 1}, "summary.json: stopped_early: expected bool, got int 1"),
        ({"data": None}, "summary.json: data: expected str, got NoneType None"),
        ({"turnover": "low"}, "summary.json: turnover: expected float, got str 'low'"),
        ({"cost_ratio": {"measured": []}}, "summary.json: cost_ratio: measured: expected float, got list"),
        ({"cost_ratio": {"measured": 2}}, "summary.json: cost_ratio: expected 'poster', which is missing"),
        ({"pool_draws": [7]}, r"summary.json: pool_draws\[0\]: expected an object, got int"),
        ({"pool_draws": [{"path": [0], "draws": 1, "in_pool": True}]}, r"summary.json: paths\[0\]: expected 8 "),
        ({"iterations": 41}, r"metrics.jsonl: expected 41 records, as .*summary.json says, got 40"),
    ],
)
def test_a_damaged_summary_is_named(run, changes, message):
    change(run.summary, **changes)
    with pytest.raises(ValueError, match=message):
        write_report(run.root)
    assert not run.report.exists()
    assert not run.pictures.exists()


def test_other_damaged_files_are_named(run):
    search = make_search(run)
    make_retraining(run)
    intact = read_json(search.summary)
    change(search.summary, chosen={**intact["chosen"], "path": [9] * 8})
    with pytest.raises(ValueError, match=r"nsga2/summary.json: paths\[0\]\[0\]: expected an operation index"):
        write_report(run.root)
    write_json(search.summary, intact)
    lines = search.metrics.read_text().splitlines()
    search.metrics.write_text("\n".join(['{"path": [0]}', *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"nsga2/metrics.jsonl: line 1: expected 'loss', which is missing"):
        write_report(run.root)
    search.metrics.write_text("\n".join(lines) + "\n")
    change(run.retraining("nsga2").summary, test_accuracy=1.5)
    with pytest.raises(ValueError, match=r"retrain/nsga2/summary.json: test_accuracy, test_images: .* got 1.5 of 360"):
        write_report(run.root)
    run.summary.write_text(run.summary.read_text()[:-40])
    with pytest.raises(ValueError, match=r"run/summary.json: damaged"):
        write_report(run.root)


def test_a_full_disk_leaves_the_old_report(unrendered, run, monkeypatch):
    write_report(run.root)
    before = {file: file.read_bytes() for file in (run.report, *run.pictures.iterdir())}
    make_search(run)

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(greedynas_ext.files.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run.root)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in (run.report, *run.pictures.iterdir())} == before


def test_records_may_hold_more_than_is_read(run):
    change(run.summary, something_new=[1, 2])
    assert read_results(run.root).training.iterations == 40
    assert isinstance(read_results(run.root).folder, RunFolder)


def test_numbers_as_people_read_them():
    assert [count(n) for n in (0, 999, 12345, 999_999, 1e6, 89_712_000, 2.4e9)] == [
        *("0", "999", "12,345", "999,999", "1 M", "89.7 M", "2,400 M")
    ]
    assert [macs(m) for m in (0.0567, 1.309, 370.04, 999.7, 4100.2)] == [
        *("0.0567 M MACs", "1.31 M MACs", "370 M MACs", "1,000 M MACs", "4,100 M MACs")
    ]
    assert [params(n) for n in (800, 54_123, 6_503_000)] == ["0.8 k", "54.1 k", "6.50 M"]
    assert [duration(s) for s in (0.04, 59.94, 61, 3599.7, 7_620)] == [
        *("0.0 s", "59.9 s", "1 min 1 s", "1 h 0 min", "2 h 7 min")
    ]


def test_table_and_image():
    assert table(("a", "number"), [("x|y", "1"), ("line\nbreak", "10")], right=[1]).splitlines() == [
        "| a          | number |",
        "| :--------- | -----: |",
        "| x\\|y       |      1 |",
        "| line break |     10 |",
    ]
    assert image("A picture", "pictures/ä b.png") == "![A picture](pictures/%C3%A4%20b.png)"
