"""The coarse space and the form of its Fisher matrix, out of the options of `two_level`."""

from __future__ import annotations

from typing import Any, Literal

import jax
from jax import core

from kfe_optax import factors as factors_lib
from kfe_optax._jax import checks
from kfe_optax.contrib.coarse import fisher, spaces
from kfe_optax.contrib.coarse.grids import Choice
from kfe_optax.factors.base import ScalarOrSchedule

SpaceName = Literal["constant", "outputs", "eigenvectors", "residual"]
FormName = Literal["factored", "exact"]


def space_of(
    coarse: Any, groups: Any, count: Any, decay: ScalarOrSchedule, max_dim: int | None
) -> spaces.Space:
    checks.one_of("coarse", coarse, SpaceName)
    for name, number, owner in (("groups", groups, "outputs"), ("count", count, "eigenvectors")):
        if number is None:
            continue
        if coarse != owner:
            raise ValueError(f"{name} belongs to coarse={owner!r}; leave it out with coarse={coarse!r}.")
        if isinstance(number, core.Tracer | jax.Array):
            raise ValueError(
                f"{name} fixes the shapes of the state and cannot be traced: give optax.inject_hyperparams "
                f"static_args=({name!r},)."
            )
        if number != int(number) or number < 1:
            raise ValueError(f"{name} must be a positive whole number, not {number!r}.")
    if coarse in ("constant", "outputs"):
        return spaces.Groups(1 if coarse == "constant" else int(groups or 4))
    if coarse == "eigenvectors":
        return spaces.Eigenvectors(int(count or 4), factors_lib.kfac(decay), max_dim)
    return spaces.Residual()


def form_of(space: spaces.Space, coarse: str, form: Any, grid: Any) -> fisher.Form:
    if form is None:
        form = "factored" if space.rank_one else "exact"
    checks.one_of("form", form, FormName)
    checks.one_of("grid", grid, Choice)
    if form == "exact":
        return fisher.Exact()
    if not space.rank_one:
        raise ValueError(
            f"form='factored' takes coarse vectors p qᵀ, which those of coarse={coarse!r} are not; choose form='exact'."
        )
    return fisher.Factored(grid)
