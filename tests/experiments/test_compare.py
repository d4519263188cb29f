"""``compare``: equal steps, epochs and seconds, seeds, batches of an optimizer's own; the figure, the table, the curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from kfe_optax.experiments import compare as compare_lib
from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.runs import Run, comparison_table, curve, plot_runs

from .conftest import config_of

PNG = b"\x89PNG\r\n\x1a\n"
QUIET = Console(quiet=True)


def printed(run: Callable[[Console], object]) -> str:
    """What ``run`` prints on an 80 columns wide console."""
    console = Console(width=80, file=io.StringIO())
    run(console)
    return console.file.getvalue()


def made_up(name: str, losses: list[float], seed: int = 0) -> Run:
    rows = [{"step": 10 * i, "epoch": i, "seconds": 0.5 * i, "train_loss": x} for i, x in enumerate(losses)]
    end = {"train_loss": losses[-1], "test_loss": losses[-1] + 0.01}
    return Run(name, seed, rows, 1.0, end, "cross-entropy, mean over pixels")


def table_of(workdir):
    with (workdir / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(tiny_npz, tmp_path_factory):
    """Adam with batches of its own and SGD over two epochs from two seeds: the runs, what was printed, the folder."""
    config, folder = config_of(tiny_npz), tmp_path_factory.mktemp("compare")
    config.compare.update(optimizers="adam, sgd", budget="2 epochs", seeds=2)
    config.adam.batch_size = 24
    config.sgd.data_seed = 7
    runs = []
    text = printed(lambda console: runs.extend(compare(config, folder, console)))
    return runs, text, folder


def test_every_run_has_its_rows(compared):
    runs, _, folder = compared
    assert [(run.name, run.seed, run.steps) for run in runs] == [
        *(("adam", seed, 6) for seed in (0, 1)),
        *(("sgd", seed, 8) for seed in (0, 1)),
    ]
    for run in runs:
        evaluated = [row for row in run.rows if "train_loss" in row]
        assert [row["epoch"] for row in evaluated] == [0.0, 1.0, 2.0]
        # The same parameters and images at the start.
        twin = next(other for other in runs if other.seed == run.seed)
        assert evaluated[0]["train_loss"] == twin.rows[0]["train_loss"]
        assert evaluated[-1]["train_loss"] < evaluated[0]["train_loss"]
        assert evaluated[-1]["test_loss"] == run.measures["test_loss"]
        assert run.seconds > 0.0 and run.compile_seconds > 0.0
        one = folder / "runs" / f"{run.name}-{run.seed}"
        assert len((one / "metrics.csv").read_text().splitlines()) == 1 + len(run.rows)
        assert list((one / "tensorboard").iterdir())
    assert runs[0].rows[0]["train_loss"] != runs[1].rows[0]["train_loss"]
    table = table_of(folder)
    assert len(table) == sum(len(run.rows) for run in runs)
    assert all(float(row["loss"]) for row in table)  # nan at the start
    assert float(table[-1]["loss"]) == runs[-1].rows[-1]["loss"]


def test_means_and_deviations_are_over_seeds(compared):
    runs, text, folder = compared
    found = curve(runs[:2], "test_loss")
    assert found.step.tolist() == [0, 3, 6]
    both = np.array([[row["test_loss"] for row in run.rows if "test_loss" in row] for run in runs[:2]])
    np.testing.assert_allclose(found.mean, both.mean(axis=0))
    np.testing.assert_allclose(found.deviation, np.abs(both[0] - both[1]) / np.sqrt(2), rtol=1e-6)
    train = [run.measures["train_loss"] for run in runs[:2]]
    assert f"{np.mean(train):.5f} ±" in text
    assert f"{np.std(train, ddof=1):.5f}" in text
    assert "over 2 seeds" in text and "Seconds exclude" in " ".join(text.split())
    assert (folder / "compare.png").read_bytes()[:8] == PNG


@pytest.mark.nightly
def test_four_optimizers_with_equal_steps(tiny_config, tmp_path):
    tiny_config.compare.budget = "7 steps"
    tiny_config.log_every, tiny_config.evaluate_every = 3, "3 steps"
    runs = compare(tiny_config, tmp_path, QUIET)
    assert [run.name for run in runs] == ["adam", "sgd", "kfac", "ekfac"]
    for run in runs:
        assert [row["step"] for row in run.rows] == [0, 3, 6, 7]
        assert run.rows[0]["train_loss"] == runs[0].rows[0]["train_loss"]
    again = compare(tiny_config, tmp_path, QUIET)
    assert [run.rows[-1]["loss"] for run in again] == [run.rows[-1]["loss"] for run in runs]


def test_equal_seconds_give_each_its_own_number_of_steps(tiny_config, tmp_path, monkeypatch):
    """Time is up within an interval, and schedules span what is planned."""
    lengths, original = [], compare_lib.make_jobs

    def recorded(config, optimizer, dataset, run_steps):
        lengths.append(run_steps)
        return original(config, optimizer, dataset, run_steps)

    monkeypatch.setattr(compare_lib, "make_jobs", recorded)
    tiny_config.update(log_every=10**9, evaluate_every="end")
    tiny_config.compare.update(optimizers="sgd", budget="0.3 seconds")
    (run,) = compare(tiny_config, tmp_path, QUIET)
    assert run.seconds >= 0.3
    assert [row["step"] for row in run.rows] == [run.steps]
    rehearsed, planned = lengths
    assert rehearsed == tiny_config.steps
    # The rehearsal's estimate of the run's length; a busy machine may be several times off.
    assert run.steps / 10 < planned < run.steps * 10


def test_a_classifier_shows_accuracy(tiny_classifier, tmp_path):
    tiny_classifier.compare.optimizers = "adam"
    text = printed(lambda console: compare(tiny_classifier, tmp_path, console))
    assert "accuracy" in text and "%" in text
    last = table_of(tmp_path)[-1]
    assert 0.0 <= float(last["test_accuracy"]) <= 1.0 and not last["test_squared_error"]


def test_the_table_says_when_each_reached_adams_loss():
    runs = [
        made_up("adam", [0.7, 0.5, 0.4, 0.3]),
        made_up("sgd", [0.7, 0.6, 0.5, 0.45]),
        made_up("ekfac", [0.7, 0.3, 0.2, 0.1]),
    ]
    text = printed(lambda console: console.print(comparison_table(runs, title="made up")))
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert rows["adam"].split() == ["adam", "0.30000", "0.31000", "30", "1.5", "50.0", "30,", "1.5", "s"]
    assert rows["sgd"].split()[-1] == "never"
    assert rows["ekfac"].split()[-3:] == ["10,", "0.5", "s"]
    assert max(map(len, text.splitlines())) <= 80
    text = printed(lambda console: console.print(comparison_table(runs[1:2], "made up")))
    assert "adam" not in text


def test_a_diverged_run_is_shown_and_never_best(tmp_path):
    nan = float("nan")
    runs = [made_up("adam", [0.7, 0.5]), made_up("sgd", [0.7, nan])]
    plot_runs(runs, tmp_path / "figure.png", title="made up")
    assert (tmp_path / "figure.png").read_bytes()[:8] == PNG
    text = printed(lambda console: console.print(comparison_table(runs, "made up")))
    assert "nan" in text and "never" in text
    plot_runs([runs[1]], tmp_path / "figure.png", title="only diverged")


def test_validation_has_a_row_of_its_own(tmp_path):
    runs = [made_up("adam", [0.7, 0.5], seed) for seed in (0, 1)]
    plot_runs(runs, tmp_path / "one.png", title="training")
    for run in runs:
        for row in run.rows:
            row["validation_loss"] = 2 * row["train_loss"]
    plot_runs(runs, tmp_path / "two.png", title="both")
    heights = [int.from_bytes((tmp_path / name).read_bytes()[20:24]) for name in ("one.png", "two.png")]
    assert heights[1] == 2 * heights[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizers": "adam,lbfgs"}, "no optimizer 'lbfgs'|no settings for 'lbfgs'"),
        ({"optimizers": "adam,soap"}, "no settings for 'soap'"),
        ({"optimizers": " , "}, "config.compare.optimizers is empty"),
        (
            {"budget": "-1 steps"},
            "config.compare.budget is '-1 steps'; give a number above 0 and one of steps, epochs",
        ),
        ({"budget": "1.5 epochs"}, "config.compare.budget is '1.5 epochs'; give"),
        ({"budget": "soon"}, "config.compare.budget is 'soon'; give"),
        ({"seeds": 0}, "config.compare.seeds is 0; give a whole number of at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tiny_config, tmp_path, changes, sentence):
    tiny_config.compare.update(changes)
    with pytest.raises(ExperimentError, match=sentence):
        compare(tiny_config, tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()
