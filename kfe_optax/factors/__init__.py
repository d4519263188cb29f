"""Estimators of a layer's Fisher block as Kronecker terms: one a file, one line in `FACTORS` (see `base.Factors`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kfe_optax.factors.base import Factors as Factors
from kfe_optax.factors.base import Term as Term
from kfe_optax.factors.base import estimate as estimate
from kfe_optax.factors.deflation import deflation as deflation
from kfe_optax.factors.fismo import fismo as fismo
from kfe_optax.factors.gradient import gradient as gradient
from kfe_optax.factors.kfac import kfac as kfac
from kfe_optax.factors.kfac_corrected import kfac_corrected as kfac_corrected
from kfe_optax.factors.kpsvd import kpsvd as kpsvd
from kfe_optax.factors.lanczos import lanczos as lanczos
from kfe_optax.factors.streaming import streaming as streaming
from kfe_optax.factors.tkfac import tkfac as tkfac

# What the conformance suites run over. FISMO's factors forget at a rate that depends on the gradient's size: not they.
FACTORS: Mapping[str, Callable[..., Factors]] = {
    make.__name__: make
    for make in (kfac, tkfac, kpsvd, deflation, lanczos, kfac_corrected, streaming, gradient)
}
