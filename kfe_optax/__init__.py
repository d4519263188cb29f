"""K-FAC and its family as chainable Optax transformations for unmodified Flax models."""

from kfe_optax import diagnostics as diagnostics
from kfe_optax import factors as factors
from kfe_optax import losses as losses
from kfe_optax.adapters.linen import TrainState as TrainState
from kfe_optax.diagnostics import check_layers as check_layers
from kfe_optax.discovery import find_layers as find_layers
from kfe_optax.distributions import Bernoulli as Bernoulli
from kfe_optax.distributions import Categorical as Categorical
from kfe_optax.distributions import Gaussian as Gaussian
from kfe_optax.gradients import value_grad_and_taps as value_grad_and_taps
from kfe_optax.info import Info as Info
from kfe_optax.info import info as info
from kfe_optax.layer import Layer as Layer
from kfe_optax.layers import Layers as Layers
from kfe_optax.losses import register_output as register_output
from kfe_optax.masks import row_mask as row_mask
from kfe_optax.optimizers import METHODS as METHODS
from kfe_optax.optimizers import deflation as deflation
from kfe_optax.optimizers import ekfac as ekfac
from kfe_optax.optimizers import kfac as kfac
from kfe_optax.optimizers import kfac_corrected as kfac_corrected
from kfe_optax.optimizers import kpsvd as kpsvd
from kfe_optax.optimizers import lanczos as lanczos
from kfe_optax.optimizers import tekfac as tekfac
from kfe_optax.optimizers import tkfac as tkfac
from kfe_optax.tags import plain as plain
from kfe_optax.tags import tag_dense as tag_dense
from kfe_optax.taps import Taps as Taps
from kfe_optax.transforms.clip import clip_by_kl as clip_by_kl
from kfe_optax.transforms.ekfac import scale_by_ekfac as scale_by_ekfac
from kfe_optax.transforms.kfac import scale_by_kfac as scale_by_kfac
from kfe_optax.transforms.kfe import KfeInfo as KfeInfo
from kfe_optax.transforms.kfe import in_kfe as in_kfe
from kfe_optax.transforms.kronecker import scale_by_kronecker as scale_by_kronecker
from kfe_optax.transforms.named import scale_by_deflation as scale_by_deflation
from kfe_optax.transforms.named import scale_by_kfac_corrected as scale_by_kfac_corrected
from kfe_optax.transforms.named import scale_by_kpsvd as scale_by_kpsvd
from kfe_optax.transforms.named import scale_by_lanczos as scale_by_lanczos
from kfe_optax.transforms.named import scale_by_tkfac as scale_by_tkfac
from kfe_optax.transforms.tekfac import scale_by_tekfac as scale_by_tekfac

__version__ = "0.1.0"
