"""The registry of the methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kfe_optax._aliases.assembly import ScaleBy
from kfe_optax._aliases.ekfac import ekfac, tekfac
from kfe_optax._aliases.kfac import kfac, kfac_tridiagonal, two_level_kfac
from kfe_optax._aliases.named import deflation, kfac_corrected, kpsvd, lanczos, tkfac
from kfe_optax._aliases.spectral import spectral_kfac
from kfe_optax._methods.ekfac import scale_by_ekfac
from kfe_optax._methods.kfac import scale_by_kfac
from kfe_optax._methods.named import (
    scale_by_deflation,
    scale_by_kfac_corrected,
    scale_by_kpsvd,
    scale_by_lanczos,
    scale_by_tkfac,
)
from kfe_optax._methods.spectral import scale_by_spectral_kfac
from kfe_optax._methods.tekfac import scale_by_tekfac
from kfe_optax._methods.tridiagonal import scale_by_block_tridiagonal
from kfe_optax.contrib.two_level import scale_by_two_level_kfac


class Method(NamedTuple):
    """A line of `METHODS`: the optimizer, and the preconditioner inside it, (layers, damping, ...)."""

    optimizer: ScaleBy
    scale_by: ScaleBy


# Every method by name: the conformance suite, the training job and the documentation read it. What is exported from `kfe_optax`
# stands in its `__init__.py` as well. `soap` reads no taps and `kfac_adaptive` has no learning rate: not here.
METHODS: Mapping[str, Method] = {
    "kfac": Method(kfac, scale_by_kfac),
    "ekfac": Method(ekfac, scale_by_ekfac),
    "tkfac": Method(tkfac, scale_by_tkfac),
    "tekfac": Method(tekfac, scale_by_tekfac),
    "kpsvd": Method(kpsvd, scale_by_kpsvd),
    "deflation": Method(deflation, scale_by_deflation),
    "lanczos": Method(lanczos, scale_by_lanczos),
    "kfac_corrected": Method(kfac_corrected, scale_by_kfac_corrected),
    "kfac_tridiagonal": Method(kfac_tridiagonal, scale_by_block_tridiagonal),
    "two_level_kfac": Method(two_level_kfac, scale_by_two_level_kfac),
    "spectral_kfac": Method(spectral_kfac, scale_by_spectral_kfac),
}
