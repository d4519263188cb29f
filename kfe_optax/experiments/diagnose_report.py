"""What a ``diagnose`` run shows: mean errors, whether the theory's inequalities hold, and a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from kfe_optax.experiments.report import plain_table

Values = Mapping[str, Mapping[str, np.ndarray]]  # {quantity: {method: a number a measured step}}
# What optimality on one batch implies; a violation beyond rounding would be a mistake of the program. Float64 knows an
# error e to about 1e-15/e, see kfe.diagnostics.kronecker_error, and the iterations end a little before that.
_AT_MOST = (
    *(("deflation", "kpsvd"), ("lanczos", "kpsvd"), ("lanczos", "kfac_corrected"), ("kpsvd", "kfac")),
    *(("kpsvd", "tkfac"), ("kfac_corrected", "kfac"), ("ekfac", "kfac"), ("tekfac", "tkfac")),
)
_ROUNDING = 1e-7
# Okabe and Ito's colors; markers tell the curves apart in black and white.
_COLORS = ("#000000", "#7F7F7F", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7")
_STYLES = [{"color": color, "marker": marker} for color, marker in zip(_COLORS, "osv^DXP*", strict=True)]
_PANELS = {
    "error": "estimates from the step's own batch",
    "spectrum_error": "the same, eigenvalues alone",
    "stale_error": "factors and basis of the last refresh",
    "loss": "training",
}


def theory(error: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Which of the theory's inequalities between the methods' errors do not hold, and at how many steps, in sentences."""
    failed = 0
    for low, high in _AT_MOST:
        excess = error[low] - error[high]
        if (excess > _ROUNDING).any():
            failed += 1
            yield f"{low} <= {high} fails at {np.sum(excess > _ROUNDING)} of {excess.size} steps, by {excess.max():.1e} at most"
    yield f"{len(_AT_MOST) - failed} of {len(_AT_MOST)} inequalities hold at all {error['kfac'].size} steps"


def means_table(values: Values, between: np.ndarray, title: str) -> Table:
    """The mean over training of each method's errors; ``between`` says which steps lie between refreshes."""
    columns = [values["error"], values["spectrum_error"], {}]
    if between.any():
        columns[2] = {method: found[between] for method, found in values["stale_error"].items()}
    rows = [
        [method, *(f"{column[method].mean():.4f}" if method in column else "" for column in columns)]
        for method in values["error"]
    ]
    caption = (
        "Means over training of relative errors. Between refreshes: with factors and basis of the last one."
    )
    return plain_table(title, caption, ("method", "error", "spectrum error", "between refreshes"), rows)


def plot_diagnosis(
    steps: Sequence[int], values: Values, correlations: Mapping[str, np.ndarray], path: Path, title: str
) -> None:
    """Draws the errors and the loss over training, and the correlation matrices of the gradient's coordinates.

    Example::

        plot_diagnosis(found.steps, found.values, found.correlations, Path("diagnose.png"), "MNIST autoencoder, dense_5")
    """
    figure = Figure(figsize=(15, 8.6), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    styles = dict(zip(values["error"], itertools.cycle(_STYLES), strict=False))
    for (quantity, words), axes in zip(_PANELS.items(), panels, strict=False):
        for method, found in values[quantity].items():
            style = styles.get(method, _STYLES[0])
            axes.plot(steps, found, **style, markevery=max(1, len(steps) // 8), label=method)
        axes.set(yscale="log", xlabel="training step", ylabel=quantity.replace("_", " "))
        axes.set_title(words, fontsize=11)
        axes.grid(True, color="#DDDDDD", linewidth=0.7)
        axes.legend(frameon=False, fontsize=9)
    for (space, matrix), axes in zip(correlations.items(), panels[4:], strict=True):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"correlation of the gradient, {space}, step {steps[-1]}", fontsize=11)
    figure.colorbar(image, ax=panels[5])
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path)
