"""``compare``: equal steps and equal seconds, the figure, the table, the curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import pytest
from rich.console import Console

from kfe_optax.experiments import compare as compare_lib
from kfe_optax.experiments.compare import compare
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.plots import plot_runs
from kfe_optax.experiments.report import comparison_table
from kfe_optax.experiments.runs import Point, Run

PNG = b"\x89PNG\r\n\x1a\n"


def printed(run: Callable[[Console], object]) -> str:
    """What ``run`` prints on an 80 columns wide console."""
    console = Console(width=80, file=io.StringIO())
    run(console)
    return console.file.getvalue()


def made_up(name: str, losses: list[float], measures: dict | None = None) -> Run:
    curve = tuple(Point(10 * i, 0.5 * i, loss) for i, loss in enumerate(losses))
    end = {"train_loss": losses[-1], "test_loss": losses[-1] + 0.01} | (measures or {})
    return Run(name, curve, 1.0, end, "cross-entropy, mean over pixels")


@pytest.mark.nightly
def test_four_optimizers_with_equal_steps(tiny_config, tmp_path):
    tiny_config.compare.steps = 7
    tiny_config.log_every = 3
    runs = []
    text = printed(lambda console: runs.extend(compare(tiny_config, tmp_path, console)))
    assert [run.name for run in runs] == ["adam", "sgd", "kfac", "ekfac"]
    for run in runs:
        assert [point.step for point in run.curve] == [0, 3, 6, 7]
        # The same parameters and images at the start.
        assert run.curve[0].loss == runs[0].curve[0].loss
        assert run.curve[-1].loss < run.curve[0].loss
        assert 0.0 < run.seconds < 60.0
        assert run.compile_seconds > 0.0
    assert (tmp_path / "compare.png").read_bytes()[:8] == PNG
    with (tmp_path / "compare.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 16
    assert float(table[-1]["loss"]) == runs[-1].curve[-1].loss
    lines = [line.split() for line in text.splitlines() if line.strip()]
    for run in runs:
        assert [run.name, f"{run.measures['train_loss']:.5f}"] in [line[:2] for line in lines]
    assert "compare.png" in text
    assert "Seconds exclude" in text


@pytest.mark.slow
def test_equal_seconds_give_each_its_own_number_of_steps(tiny_config, tmp_path):
    tiny_config.compare.optimizers = "adam, kfac"
    tiny_config.compare.seconds = 0.3
    adam, kfac = compare(tiny_config, tmp_path, Console(quiet=True))
    for run in (adam, kfac):
        assert run.seconds >= 0.3
        assert run.curve[-2].seconds < 0.3
    assert adam.steps != kfac.steps


def test_time_is_up_within_an_interval(tiny_config, tmp_path):
    tiny_config.log_every = 10**9
    tiny_config.compare.update(optimizers="sgd", seconds=0.2)
    (run,) = compare(tiny_config, tmp_path, Console(quiet=True))
    assert run.seconds >= 0.2
    assert [point.step for point in run.curve] == [0, run.steps]


def test_schedules_span_a_run_of_equal_seconds(tiny_config, tmp_path, monkeypatch):
    lengths = []
    original = compare_lib.make_job

    def recorded(config, optimizer, dataset, run_steps):
        lengths.append(run_steps)
        return original(config, optimizer, dataset, run_steps)

    monkeypatch.setattr(compare_lib, "make_job", recorded)
    tiny_config.compare.update(optimizers="sgd", seconds=0.5)
    (run,) = compare(tiny_config, tmp_path, Console(quiet=True))
    rehearsed, planned = lengths
    assert rehearsed == tiny_config.steps
    # The rehearsal's estimate of the run's length; a busy machine may be several times off.
    assert run.steps / 10 < planned < run.steps * 10


def test_a_classifier_shows_accuracy(tiny_classifier, tmp_path):
    tiny_classifier.compare.optimizers = "adam"
    text = printed(lambda console: compare(tiny_classifier, tmp_path, console))
    assert "accuracy" in text
    assert "%" in text


def test_the_table_says_when_each_reached_adams_loss():
    table_text = printed(
        lambda console: console.print(
            comparison_table(
                [
                    made_up("adam", [0.7, 0.5, 0.4, 0.3]),
                    made_up("sgd", [0.7, 0.6, 0.5, 0.45]),
                    made_up("ekfac", [0.7, 0.3, 0.2, 0.1]),
                ],
                title="made up",
            )
        )
    )
    rows = {line.split()[0]: line for line in table_text.splitlines() if line.strip()}
    assert rows["adam"].split() == ["adam", "0.30000", "0.31000", "30", "1.5", "50.0", "30,", "1.5", "s"]
    assert rows["sgd"].split()[-1] == "never"
    assert rows["ekfac"].split()[-3:] == ["10,", "0.5", "s"]
    assert max(map(len, table_text.splitlines())) <= 80


def test_the_table_without_adam_has_no_such_column():
    text = printed(lambda console: console.print(comparison_table([made_up("sgd", [0.7, 0.5])], "made up")))
    assert "adam" not in text


def test_a_diverged_run_is_shown_and_never_best(tmp_path):
    nan = float("nan")
    runs = [made_up("adam", [0.7, 0.5]), made_up("sgd", [0.7, nan])]
    plot_runs(runs, tmp_path / "figure.png", title="made up")
    assert (tmp_path / "figure.png").read_bytes()[:8] == PNG
    text = printed(lambda console: console.print(comparison_table(runs, "made up")))
    assert "nan" in text
    assert "never" in text
    plot_runs([runs[1]], tmp_path / "figure.png", title="only diverged")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizers": "adam,lbfgs"}, "no optimizer 'lbfgs'"),
        ({"optimizers": " , "}, "config.compare.optimizers is empty"),
        ({"steps": -1}, "cannot be negative"),
        ({"seconds": -1.0}, "cannot be negative"),
        ({"examples": 0}, "must be at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tiny_config, tmp_path, changes, sentence):
    tiny_config.compare.update(changes)
    with pytest.raises(ExperimentError, match=sentence):
        compare(tiny_config, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_an_optimizer_without_settings_is_found_first(tiny_config, tmp_path):
    del tiny_config.ekfac
    with pytest.raises(ExperimentError, match="no settings for 'ekfac'"):
        compare(tiny_config, tmp_path / "out", Console(quiet=True))
