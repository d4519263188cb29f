"""`benchmarks.today`: what its tables are computed from."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.today.report import reached, report
from benchmarks.today.results import missing
from benchmarks.today.tasks import OPTIMIZERS, RATES, trial_of
from examples.race import schedule_of


def test_a_loss_is_reached_between_intervals():
    curve = [[10, 1.0, 4.0], [20, 2.0, 2.0], [30, 3.0, 3.0]]
    assert reached(curve, 2.5) == 17.5
    assert reached(curve, 5.0) == 10
    assert reached(curve, 1.0) is None


def test_the_rate_rises_and_falls():
    rate = schedule_of(0.5, 100)
    assert [float(rate(i)) for i in (0, 5, 10)] == pytest.approx([0.05, 0.275, 0.5])
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trials_draw_the_same_rates(name):
    recipe = OPTIMIZERS[name]
    for trial in range(3):
        rate, options = trial_of(recipe, trial)
        assert rate / recipe.unit == pytest.approx(trial_of(OPTIMIZERS["adam"], trial)[0] / 5e-3)
        for given, (least, largest) in recipe.space.items():
            value = options[given.removeprefix("1-")]
            assert least <= (1 - value if given.startswith("1-") else value) <= largest


def _run(optimizer, factor, seed, losses):
    curve = [[10 * (i + 1), 1.0, loss] for i, loss in enumerate(losses)]
    found = {"curve": curve, "test": {"loss": losses[-1]}}
    return {"task": "mlp", "optimizer": optimizer, "factor": factor, "seed": seed, **found}


def test_what_was_run_is_not_run_again():
    records = [_run("adam", factor, 0, [1.0, abs(np.log(factor)) + 0.1]) for factor in RATES[:4]]
    found = []
    for factor, seed in missing(records, "mlp", "adam", 2, range(5)):
        found.append((factor, seed))
        records.append(_run("adam", factor, seed, [1.0, float("nan")]))
    # The last rate, and the second seed at the best one, which is the middle.
    assert found == [(RATES[4], 0), (1.0, 1)]


def test_the_report_compares_with_adam():
    records = [_run("adam", 1.0, 0, [2.0, 1.0]), _run("kfac", 1.0, 0, [1.0, 0.5])]
    records.append({"task": "mlp", "costs": {"adam": 2.0, "kfac": 3.0}})
    text = report(records)
    assert "| kfac | 0.15 (of 1) | 0.5000 (1) | 0.5000 | 0.5000 (1) | 1.50 | 10 | 0.07 |" in text
    # Half the steps at one and a half of the cost; Muon and SOAP have not been run.
    assert "| kfac | 1 | 1 of 1 | 1 of 1 | 0.50 | 0.75 | 0 of 0 | – | 0 of 0 | – |" in text
