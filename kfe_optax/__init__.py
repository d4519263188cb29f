"""K-FAC and its family as chainable Optax transformations for unmodified Flax models."""

from kfe_optax import diagnostics, distributions, factors, initializers, losses, polar
from kfe_optax._aliases.adaptive import kfac_adaptive
from kfe_optax._aliases.assembly import NATURAL
from kfe_optax._aliases.ekfac import ekfac, tekfac
from kfe_optax._aliases.info import Info, info
from kfe_optax._aliases.kfac import kfac, kfac_tridiagonal, two_level_kfac
from kfe_optax._aliases.named import deflation, kfac_corrected, kpsvd, lanczos, tkfac
from kfe_optax._aliases.registry import METHODS
from kfe_optax._aliases.soap import soap
from kfe_optax._aliases.spectral import spectral_kfac
from kfe_optax._jax.failures import Failure
from kfe_optax._layers import kinds
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers
from kfe_optax._methods.ekfac import scale_by_ekfac
from kfe_optax._methods.kfac import scale_by_kfac
from kfe_optax._methods.kfe import KfeInfo, in_kfe
from kfe_optax._methods.kronecker import scale_by_kronecker
from kfe_optax._methods.named import (
    scale_by_deflation,
    scale_by_kfac_corrected,
    scale_by_kpsvd,
    scale_by_lanczos,
    scale_by_tkfac,
)
from kfe_optax._methods.request import Request
from kfe_optax._methods.spectral import scale_by_spectral_kfac
from kfe_optax._methods.tekfac import scale_by_tekfac
from kfe_optax._methods.tridiagonal import scale_by_block_tridiagonal
from kfe_optax._statistics.masks import row_mask
from kfe_optax._statistics.tags import plain, tag_dense
from kfe_optax._taps.gradients import value_grad_and_taps
from kfe_optax._taps.taps import Taps
from kfe_optax._tracing import rules
from kfe_optax._tracing.adapters.linen import TrainState
from kfe_optax._tracing.discovery import find_layers
from kfe_optax._wrappers.adaptive_damping import adaptive_damping
from kfe_optax._wrappers.averaging import average_iterates, averaged_parameters
from kfe_optax._wrappers.clip import clip_by_kl
from kfe_optax._wrappers.normalize import clip_layers, graft, normalize_layers
from kfe_optax._wrappers.quadratic_model import scale_by_quadratic_model
from kfe_optax._wrappers.sharded_state import shard_state, state_bytes_per_device
from kfe_optax.contrib.two_level import scale_by_two_level_kfac, two_level
from kfe_optax.diagnostics import check_layers
from kfe_optax.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
)
from kfe_optax.losses import register_output

__all__ = [
    "METHODS",
    "NATURAL",
    "Bernoulli",
    "Categorical",
    "Distribution",
    "Failure",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Info",
    "KfeInfo",
    "Layer",
    "Layers",
    "Poisson",
    "Request",
    "Taps",
    "TrainState",
    "adaptive_damping",
    "average_iterates",
    "averaged_parameters",
    "check_layers",
    "clip_by_kl",
    "clip_layers",
    "deflation",
    "diagnostics",
    "distributions",
    "ekfac",
    "factors",
    "find_layers",
    "graft",
    "in_kfe",
    "info",
    "initializers",
    "kfac",
    "kfac_adaptive",
    "kfac_corrected",
    "kfac_tridiagonal",
    "kinds",
    "kpsvd",
    "lanczos",
    "losses",
    "normalize_layers",
    "plain",
    "polar",
    "register_output",
    "row_mask",
    "rules",
    "scale_by_block_tridiagonal",
    "scale_by_deflation",
    "scale_by_ekfac",
    "scale_by_kfac",
    "scale_by_kfac_corrected",
    "scale_by_kpsvd",
    "scale_by_kronecker",
    "scale_by_lanczos",
    "scale_by_quadratic_model",
    "scale_by_spectral_kfac",
    "scale_by_tekfac",
    "scale_by_tkfac",
    "scale_by_two_level_kfac",
    "shard_state",
    "soap",
    "spectral_kfac",
    "state_bytes_per_device",
    "tag_dense",
    "tekfac",
    "tkfac",
    "two_level",
    "two_level_kfac",
    "value_grad_and_taps",
]

__version__ = "0.2.0"
