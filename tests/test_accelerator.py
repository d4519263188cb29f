"""The report about a device, from end to end, on the smallest sizes."""

from __future__ import annotations

import json

import pytest

from benchmarks import accelerator

pytestmark = pytest.mark.slow


def test_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "TESTS", ("tests/test_polar.py",))
    out = tmp_path / "found" / "report"
    accelerator.main(["--size", "tiny", "--minutes", "60", "--out", str(out)])
    found = json.loads(out.with_suffix(".json").read_text())
    assert not found["left out"]
    parts = found["parts"]
    assert list(parts) == list(accelerator.PARTS)
    assert " passed" in parts["tests"][0]["result"]
    assert " failed" not in parts["tests"][0]["result"]
    assert [row["method"] for row in parts["precision"]] == ["kfac", "ekfac"]
    assert all(0 < row["float32"] < 1e-3 for row in parts["precision"])
    assert all(row["inverse"] > 0 for row in parts["algebra"])
    adam, kfac = parts["steps"]
    assert adam["in Adam's"] == 1
    assert kfac["state, MB"] > adam["state, MB"]
    assert kfac["mean"] <= kfac["dearest"]
    assert [row["optimizer"] for row in parts["training"]] == ["adam", "kfac"]
    assert parts["training"][0]["curve"][-1][0] == 4
    report = out.with_suffix(".md").read_text()
    assert report in capsys.readouterr().out
    assert all(f"## {part}" in report for part in parts)


def test_what_no_time_was_left_for_is_named(tmp_path):
    accelerator.main(
        ["--size", "tiny", "--minutes", "0", "--parts", "algebra", "steps", "--out", str(tmp_path / "r")]
    )
    assert "No time was left for: algebra at 8, adam on the autoencoder." in (tmp_path / "r.md").read_text()
