"""The pictures of ``diagnose``: errors over training, and the correlations of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from kfe_optax.diagnostics import mean_absolute_correlation
from kfe_optax.experiments.diagnose_records import Series

# Okabe and Ito's colors; dashes and markers tell the curves apart in black and white. Deflation and
# Lanczos lie on one another: a wide line under a thin dashed one.
_STYLES: dict[str, tuple[str, str, str, str, float]] = {
    "kfac": ("K-FAC", "#000000", "-", "o", 1.8),
    "tkfac": ("TKFAC", "#7F7F7F", "--", "s", 1.8),
    "kpsvd": ("KPSVD", "#E69F00", "-", "^", 1.8),
    "kfac_corrected": ("KFAC-corrected", "#009E73", "-", "D", 1.8),
    "deflation": ("deflation", "#56B4E9", "-", "", 5.0),
    "lanczos": ("Lanczos", "#0072B2", "--", "v", 1.6),
    "ekfac": ("EKFAC", "#D55E00", "-", "X", 1.8),
    "tekfac": ("TEKFAC", "#CC79A7", "--", "P", 1.8),
}
_STALE_STYLES = {
    "kfac": ("K-FAC, old factors", "#000000", "-", "o", 1.8),
    "ekfac_running": ("EKFAC, old basis,\nrunning scale", "#CC79A7", "--", "P", 1.8),
    "ekfac": ("EKFAC, old basis,\nscale of the batch", "#D55E00", "-", "X", 1.8),
}
_FRESH_STYLES = {
    "kfac": ("K-FAC, fresh", "#7F7F7F", ":", "", 1.6),
    "ekfac": ("EKFAC, fresh", "#E69F00", ":", "", 1.6),
}
_RUNNING_STYLES = {
    "tkfac": ("average of TKFAC", "#7F7F7F", "--", "s", 1.8),
    "kfac": ("average of K-FAC", "#000000", "-", "o", 1.8),
    "kpsvd": ("average of KPSVD", "#E69F00", "-", "^", 1.8),
    "streaming_rank_1": ("streaming, rank 1", "#D55E00", "--", "X", 1.8),
    "best_rank_1": ("best rank 1", "#D55E00", ":", "", 3.0),
    "lanczos": ("average of Lanczos", "#56B4E9", "-", "v", 1.8),
    "streaming_rank_2": ("streaming, rank 2", "#0072B2", "--", "P", 1.8),
    "best_rank_2": ("best rank 2", "#0072B2", ":", "", 3.0),
}
_MARKERS_A_CURVE = 8
_NO_VARIANCE = "#BBBBBB"


def plot_errors(series: Series, path: Path, title: str, basis_update_period: int) -> None:
    """Four panels: errors and spectrum errors on each batch, between refreshes, and against the running F.

    Example::

        plot_errors(series, Path("diagnose.png"), "MNIST autoencoder, dense_5", basis_update_period=50)
    """
    figure = Figure(figsize=(13.5, 8.6), dpi=100, layout="constrained")
    (errors, spectra), (stale, running) = figure.subplots(2, 2)
    _draw(errors, series, "error", _STYLES)
    errors.set_title("estimates from the step's own batch, Frobenius norm", fontsize=11)
    errors.set_ylabel("‖F − F̂‖ / ‖F‖")
    _draw(spectra, series, "spectrum_error", _STYLES)
    left_out = [name for name in _STYLES if np.isnan(series.of("spectrum_error", name)).all()]
    note = "; rank 2 left out (layer above spectrum_limit)" if left_out else ""
    spectra.set_title(f"the same, eigenvalues alone{note}", fontsize=11)
    spectra.set_ylabel("‖spec F − spec F̂‖ / ‖spec F‖")
    _draw(stale, series, "error", _FRESH_STYLES)
    _draw(stale, series, "stale_error", _STALE_STYLES)
    refreshes = [step for step in series.steps if step % basis_update_period == 0]
    for step in refreshes:
        stale.axvline(
            step,
            color="#C0C0C0",
            linewidth=2.0,
            zorder=0.5,
            label="refresh" if step == refreshes[0] else None,
        )
    stale.set_title(f"factors and basis refreshed every {basis_update_period} steps", fontsize=11)
    stale.set_ylabel("‖F − F̂‖ / ‖F‖")
    _draw(running, series, "running_error", _RUNNING_STYLES)
    running.set_title("running averages, against the running average of F", fontsize=11)
    running.set_ylabel("‖F − F̂‖ / ‖F‖")
    for axes in (errors, spectra, stale, running):
        _tidy(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path, pil_kwargs={"compress_level": 9})


def _draw(
    axes: Axes, series: Series, quantity: str, styles: dict[str, tuple[str, str, str, str, float]]
) -> None:
    steps = series.steps
    spacing = max(1, len(steps) // _MARKERS_A_CURVE)
    for index, (method, (label, color, dashes, marker, width)) in enumerate(styles.items()):
        values = series.of(quantity, method)
        if np.isnan(values).all():
            continue
        axes.plot(
            steps,
            values,
            color=color,
            linestyle=dashes,
            linewidth=width,
            marker=marker or None,
            markersize=5,
            # Not all at the same steps, where they would cover each other.
            markevery=(index % spacing, spacing),
            label=label,
        )


def _tidy(axes: Axes) -> None:
    """A logarithmic error with readable ticks, a light grid, no box."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    many = (1.0, 3.0) if high > 50 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=many))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training step")
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plot_correlations(matrices: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Two heat maps, "parameters" and "kfe"; a coordinate without variance is gray.

    Example::

        plot_correlations(found.correlations, Path("correlation.png"), "step 200")
    """
    figure = Figure(figsize=(10.5, 5.7), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2)
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(bad=_NO_VARIANCE)
    spaces = {"parameters": "parameter space", "kfe": "Kronecker-factored eigenbasis"}
    for axes, (name, space) in zip(panels, spaces.items(), strict=True):
        matrix = np.array(matrices[name])
        mean = float(mean_absolute_correlation(jnp.asarray(matrix)))
        dead = np.diagonal(matrix) == 0
        matrix[dead] = matrix[:, dead] = np.nan
        image = axes.imshow(matrix, cmap=colors, vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"{space}\nmean |correlation| {mean:.3f}", fontsize=11)
        axes.set_xlabel("coordinate of the gradient" + " (gray: no variance)" * bool(dead.any()))
    panels[0].set_ylabel("coordinate of the gradient")
    figure.colorbar(image, ax=panels, label="correlation", shrink=0.8)
    figure.suptitle(title, fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path, pil_kwargs={"compress_level": 9})
