"""Instruments that judge a curvature approximation against a layer's own Fisher block F = (1/N) Σ_n vec(M_n) vec(M_n)ᵀ.

`tap` is `taps[name]`, M_n a per-example gradient (d_in, d_out), vec row-major. An approximation is a tuple of Kronecker terms
((A, B), (C, D), ...), F̂ = A⊗B + C⊗D + ..., whose sides are matrices (*stack, d, d) or diagonals (*stack, d); or a diagonal
S (*stack, d_in, d_out) in an eigenbasis U_A⊗U_G. All are pure functions of arrays: they run inside `jit`, over the stacked
axes of a layer, and sum over the exact columns or average over the samples of the taps as the optimizers do. Failed
factorizations are counted by the optimizers themselves: `kfe.info(opt_state).failures`.
"""

from kfe_optax.diagnostics.across_layers import fisher_matrix, kfac_matrix, mean_absolute_blocks
from kfe_optax.diagnostics.blocks import eigenbasis_matrix, fisher_block, gauss_newton_block, kronecker_matrix
from kfe_optax.diagnostics.check import LayerCheck, LayerChecks, check_layers
from kfe_optax.diagnostics.correlation import gradient_correlation, mean_absolute_correlation
from kfe_optax.diagnostics.errors import (
    eigenbasis_error,
    fisher_norm,
    fisher_trace,
    kronecker_error,
    relative_error,
)
from kfe_optax.diagnostics.spectra import (
    ConditionNumbers,
    condition_number,
    condition_numbers,
    eigenbasis_spectrum,
    fisher_spectrum,
    kronecker_spectrum,
    spectrum_error,
    squared_gradient_scale,
)

__all__ = [
    "ConditionNumbers",
    "LayerCheck",
    "LayerChecks",
    "check_layers",
    "condition_number",
    "condition_numbers",
    "eigenbasis_error",
    "eigenbasis_matrix",
    "eigenbasis_spectrum",
    "fisher_block",
    "fisher_matrix",
    "fisher_norm",
    "fisher_spectrum",
    "fisher_trace",
    "gauss_newton_block",
    "gradient_correlation",
    "kfac_matrix",
    "kronecker_error",
    "kronecker_matrix",
    "kronecker_spectrum",
    "mean_absolute_blocks",
    "mean_absolute_correlation",
    "relative_error",
    "spectrum_error",
    "squared_gradient_scale",
]
