"""Losses that say which distribution the model predicts: those of Optax, and −log p of any distribution."""

from kfe_optax.losses.likelihoods import gaussian_nll_loss, negative_log_likelihood, poisson_nll_loss
from kfe_optax.losses.linearized import linearized
from kfe_optax.losses.registered import (
    l2_loss,
    policy_gradient_loss,
    register_output,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    squared_error,
)

__all__ = [
    "gaussian_nll_loss",
    "l2_loss",
    "linearized",
    "negative_log_likelihood",
    "poisson_nll_loss",
    "policy_gradient_loss",
    "register_output",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "squared_error",
]
