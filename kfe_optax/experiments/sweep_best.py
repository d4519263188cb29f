"""What a sweep found: its settings in order, the table of the best ones, and the best as a config."""

from __future__ import annotations

import math
import pprint
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from rich import box
from rich.table import Table

from kfe_optax.experiments.optimizers import optimizer_settings
from kfe_optax.experiments.sweep_records import Row
from kfe_optax.experiments.sweep_space import with_values

_SHOWN = 5


class Setting(NamedTuple):
    """One setting with the means of its losses over the seeds; infinite where a seed diverged."""

    values: tuple[float, ...]
    train_loss: float
    test_loss: float
    rows: tuple[Row, ...]

    @property
    def diverged(self) -> bool:
        """Whether a trial of this setting diverged."""
        return math.isinf(self.train_loss)


def rank_settings(rows: Sequence[Row]) -> list[Setting]:
    """The settings, the lowest training loss first; those that diverged last.

    Example::

        best = rank_settings(records.rows)[0]
    """
    groups: dict[tuple[float, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.trial.values, []).append(row)
    found = []
    for values, group in groups.items():
        train = test = math.inf
        if not any(row.diverged for row in group):
            train = sum(row.losses.train_loss for row in group) / len(group)
            test = sum(row.losses.test_loss for row in group) / len(group)
        found.append(Setting(values, train, test, tuple(group)))
    return sorted(found, key=lambda setting: setting.train_loss)


def settings_table(settings: Sequence[Setting], fields: Sequence[str], title: str, loss_name: str) -> Table:
    """The best settings, one a row."""
    diverged = sum(setting.diverged for setting in settings)
    seeds = max(len(setting.rows) for setting in settings)
    caption = f"Final loss: {loss_name}. {len(settings)} settings, {diverged} of them diverged."
    if seeds > 1:
        caption += f" Means over {seeds} seeds; a setting of which one seed diverged counts as diverged."
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    for name in ("place", *fields, "train", "test"):
        table.add_column(name, justify="right")
    for place, setting in enumerate(settings[:_SHOWN], start=1):
        losses = (
            ("diverged", "")
            if setting.diverged
            else (f"{setting.train_loss:.5f}", f"{setting.test_loss:.5f}")
        )
        table.add_row(str(place), *(f"{value:.4g}" for value in setting.values), *losses)
    return table


def best_config(config: ConfigDict, fields: Sequence[str], best: Setting, steps: int) -> ConfigDict:
    """The sweep's config with the best setting, ready for ``train`` with the first of its seeds."""
    found = ConfigDict(config.to_dict())
    settings = optimizer_settings(config, config.optimizer)
    found[config.optimizer] = with_values(settings, dict(zip(fields, best.values, strict=True)))
    found.update(name=f"{config.name}_best", seed=best.rows[0].trial.seed, steps=steps)
    return found


def write_config(config: ConfigDict, path: Path, heading: str) -> None:
    """Writes a config as a file with ``get_config()``, complete in itself.

    Example::

        write_config(config, Path("best.py"), heading="The best of 25 settings.")
    """
    fields = pprint.pformat(config.to_dict(), width=100, sort_dicts=False)
    text = f'''"""{heading}"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    return ConfigDict(FIELDS)


FIELDS = {fields}
'''
    path.write_text(text, encoding="utf-8")
