"""What a ``diagnose`` run says: the mean errors, and at how many steps the theory's inequalities hold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from kfe_optax.experiments.diagnose_records import Series

# Float64 knows an error e to about 1e-15/e, see kfe.diagnostics.kronecker_error; the iterations end a little before that.
_ROUNDING = 1e-7
_SAME = 1e-3
_ORDER = (
    "kfac",
    "tkfac",
    "kpsvd",
    "kfac_corrected",
    "deflation",
    "lanczos",
    "ekfac",
    "ekfac_running",
    "tekfac",
    "streaming_rank_1",
    "best_rank_1",
    "streaming_rank_2",
    "best_rank_2",
)


class Check(NamedTuple):
    """An inequality at ``of`` steps, of which it holds at ``holds``; ``worst`` is the largest left minus right side."""

    claim: str
    holds: int
    of: int
    worst: float
    theorem: bool


def checks(series: Series, basis_update_period: int) -> list[Check]:
    """The claims of the papers, step by step.

    Those marked as theorems are consequences of optimality on one batch; a violation beyond rounding
    would be a mistake of the program. The others are what the papers observe.
    """
    error = {name: series.of("error", name) for name in series.methods("error")}
    stale = {name: series.of("stale_error", name) for name in series.methods("stale_error")}
    running = {name: series.of("running_error", name) for name in series.methods("running_error")}
    between = np.array(series.steps) % basis_update_period != 0
    rank_2 = np.maximum(error["deflation"], error["lanczos"])
    found = [
        _check(
            "|deflation − Lanczos| <= 0.001",
            np.abs(error["deflation"] - error["lanczos"]),
            np.full(len(rank_2), _SAME),
        ),
        _check("deflation, Lanczos <= KPSVD", rank_2, error["kpsvd"]),
        _check("deflation, Lanczos <= KFAC-corrected", rank_2, error["kfac_corrected"]),
        _check("KPSVD <= K-FAC", error["kpsvd"], error["kfac"]),
        _check("KPSVD <= TKFAC", error["kpsvd"], error["tkfac"]),
        _check("KFAC-corrected <= K-FAC", error["kfac_corrected"], error["kfac"]),
        _check("EKFAC <= K-FAC", error["ekfac"], error["kfac"]),
        _check("TEKFAC <= TKFAC", error["tekfac"], error["tkfac"]),
    ]
    rises = {name: (stale[name] - error[name])[between] for name in ("kfac", "ekfac")}
    stale = {name: values[between] for name, values in stale.items()}
    found += [
        _check("between refreshes: EKFAC <= amortized K-FAC", stale["ekfac"], stale["kfac"], False),
        _check(
            "between refreshes: EKFAC, running scale <= amortized K-FAC",
            stale["ekfac_running"],
            stale["kfac"],
            False,
        ),
        _check(
            "between refreshes: rise over a fresh estimate, EKFAC <= K-FAC",
            rises["ekfac"],
            rises["kfac"],
            False,
        ),
        _check(
            "running F: streaming rank 1 <= averaged KPSVD",
            running["streaming_rank_1"],
            running["kpsvd"],
            False,
        ),
        _check(
            "running F: streaming rank 2 <= averaged Lanczos",
            running["streaming_rank_2"],
            running["lanczos"],
            False,
        ),
    ]
    return found


def _check(claim: str, low: np.ndarray, high: np.ndarray, theorem: bool = True) -> Check:
    excess = low - high
    worst = float(excess.max()) if excess.size else float("nan")
    return Check(claim, int(np.sum(excess <= _ROUNDING)), excess.size, worst, theorem)


def checks_table(found: list[Check]) -> Table:
    """A row a claim: at how many steps it holds, and by how much it is missed or kept at the worst step."""
    table = Table(
        title="Claims, step by step",
        caption="Worst: the largest left minus right side. Theorems hold for any batch; the others are observations.",
        box=box.SIMPLE_HEAD,
        caption_justify="left",
    )
    table.add_column("claim")
    table.add_column("holds at", justify="right", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for check in found:
        verdict = f"{check.holds} of {check.of} steps"
        if check.holds < check.of:
            verdict = f"[bold]{verdict}[/bold]"
        table.add_row(check.claim, verdict, f"{check.worst:+.1e}", "theorem" if check.theorem else "")
    return table


def means_table(series: Series, basis_update_period: int, title: str) -> Table:
    """The mean over training of each method's errors, on a batch, between refreshes and against the running F."""
    between = np.array(series.steps) % basis_update_period != 0
    everywhere = np.ones(len(series.steps), bool)
    columns = (
        ("error", "error", everywhere),
        ("spectrum\nerror", "spectrum_error", everywhere),
        ("between\nrefreshes", "stale_error", between),
        ("spectrum", "stale_spectrum_error", between),
        ("running F", "running_error", everywhere),
    )
    table = Table(
        title=title,
        caption="Means over training of relative errors. Between refreshes: with factors and basis of the last refresh.",
        box=box.SIMPLE_HEAD,
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for header, *_ in columns:
        table.add_column(header, justify="right")
    found = {name for _, quantity, _ in columns for name in series.methods(quantity)}
    for method in sorted(found, key=_ORDER.index):
        cells = []
        for _, quantity, where in columns:
            known = method in series.methods(quantity)
            values = series.of(quantity, method)[where] if known else np.empty(0)
            values = values[np.isfinite(values)]
            cells.append(f"{values.mean():.4f}" if values.size else "")
        table.add_row(method, *cells)
    return table


def correlation_sentence(series: Series) -> str:
    """The mean absolute correlation in both spaces, over training."""
    parameters, kfe = (series.of("correlation", name).mean() for name in ("parameters", "kfe"))
    return f"mean |correlation| of the gradient's coordinates: {parameters:.3f} in parameter space, {kfe:.3f} in the KFE"
