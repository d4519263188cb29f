"""Instruments that judge a curvature approximation against a layer's own Fisher block F = (1/N) Σ_n vec(M_n) vec(M_n)ᵀ.

`tap` is `taps[name]`, M_n a per-example gradient (d_in, d_out), vec row-major. An approximation is a tuple of Kronecker terms
((A, B), (C, D), ...), F̂ = A⊗B + C⊗D + ..., whose sides are matrices (*stack, d, d) or diagonals (*stack, d); or a diagonal
S (*stack, d_in, d_out) in an eigenbasis U_A⊗U_G. All are pure functions of arrays: they run inside `jit`, over the stacked
axes of a layer, and sum over the exact columns or average over the samples of the taps as the optimizers do. Failed
factorizations are counted by the optimizers themselves: `kfe.info(opt_state).failures`.
"""

from kfe_optax.diagnostics.blocks import eigenbasis_matrix as eigenbasis_matrix
from kfe_optax.diagnostics.blocks import fisher_block as fisher_block
from kfe_optax.diagnostics.blocks import gauss_newton_block as gauss_newton_block
from kfe_optax.diagnostics.blocks import kronecker_matrix as kronecker_matrix
from kfe_optax.diagnostics.check import LayerCheck as LayerCheck
from kfe_optax.diagnostics.check import LayerChecks as LayerChecks
from kfe_optax.diagnostics.check import check_layers as check_layers
from kfe_optax.diagnostics.correlation import gradient_correlation as gradient_correlation
from kfe_optax.diagnostics.correlation import mean_absolute_correlation as mean_absolute_correlation
from kfe_optax.diagnostics.errors import eigenbasis_error as eigenbasis_error
from kfe_optax.diagnostics.errors import fisher_norm as fisher_norm
from kfe_optax.diagnostics.errors import fisher_trace as fisher_trace
from kfe_optax.diagnostics.errors import kronecker_error as kronecker_error
from kfe_optax.diagnostics.errors import relative_error as relative_error
from kfe_optax.diagnostics.spectra import ConditionNumbers as ConditionNumbers
from kfe_optax.diagnostics.spectra import condition_number as condition_number
from kfe_optax.diagnostics.spectra import condition_numbers as condition_numbers
from kfe_optax.diagnostics.spectra import eigenbasis_spectrum as eigenbasis_spectrum
from kfe_optax.diagnostics.spectra import fisher_spectrum as fisher_spectrum
from kfe_optax.diagnostics.spectra import kronecker_spectrum as kronecker_spectrum
from kfe_optax.diagnostics.spectra import spectrum_error as spectrum_error
