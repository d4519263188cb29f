"""Estimators of a layer's Fisher block as Kronecker terms: one a file, one line in `FACTORS` (see `base.Factors`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kfe_optax.factors.base import DecayBySteps, Factors, Term, estimate
from kfe_optax.factors.deflation import deflation
from kfe_optax.factors.fismo import fismo
from kfe_optax.factors.gradient import gradient
from kfe_optax.factors.kfac import kfac
from kfe_optax.factors.kfac_corrected import kfac_corrected
from kfe_optax.factors.kpsvd import kpsvd
from kfe_optax.factors.lanczos import lanczos
from kfe_optax.factors.streaming import streaming
from kfe_optax.factors.tkfac import tkfac

__all__ = [
    "FACTORS",
    "DecayBySteps",
    "Factors",
    "Term",
    "deflation",
    "estimate",
    "fismo",
    "gradient",
    "kfac",
    "kfac_corrected",
    "kpsvd",
    "lanczos",
    "streaming",
    "tkfac",
]

# What the conformance suites run over. FISMO's factors forget at a rate that depends on the gradient's size: not they.
FACTORS: Mapping[str, Callable[..., Factors]] = {
    make.__name__: make
    for make in (kfac, tkfac, kpsvd, deflation, lanczos, kfac_corrected, streaming, gradient)
}
