"""A tap made of given rows: the library's estimators and instruments on any set of ā and g."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import kfe_optax as kfe
from kfe_optax.factors.base import Source

_LAYER = "kernel"


class GivenRows:
    """Taps of a one-layer model whose statistics are the rows that are put in.

    The loss (1/n) Σ_n,t g_{n,t}ᵀ W ā_{n,t} has the gradient ā_{n,t} g_{n,t}ᵀ on example n, so that its
    empirical Fisher is F = (1/n) Σ_n (Σ_t ā⊗g)(Σ_t ā⊗g)ᵀ. What is measured often on one batch is measured
    so, without another pass through the network, and a weighted mean of the F of many batches is one set
    of rows with g scaled by the roots of the weights.

    Example::

        given = GivenRows(inputs=31, outputs=250)
        a, g = taps["dense_5"].rows()
        kfe.diagnostics.fisher_norm(given.tap(a, g))
    """

    def __init__(self, inputs: int, outputs: int, dtype: Any = None):
        self._params = {_LAYER: jnp.zeros((inputs, outputs), dtype)}
        self.layers = kfe.find_layers(
            _pairing, self._params, jnp.zeros((2, 1, inputs)), jnp.zeros((2, 1, outputs))
        )
        self._differentiate = kfe.value_grad_and_taps(_pairing, self.layers, fisher="empirical")

    @property
    def layer(self) -> kfe.Layer:
        """The layer, without a bias: its homogeneous coordinate is a column of ā."""
        return self.layers[_LAYER]

    def tap(self, a: jax.Array, g: jax.Array) -> Any:
        """The layer's tap for ā (n, t, d_in) and g (n, t, d_out)."""
        _, _, taps = self._differentiate(self._params, a, g)
        return taps[_LAYER]

    def start(self, factors: Any) -> Any:
        """The state of an estimator before the first batch."""
        return factors.init([self.layer], max(self.layer.sides))

    def update(self, factors: Any, state: Any, tap: Any) -> tuple[Any, tuple[kfe.factors.Term, ...]]:
        """The state of an estimator after one more batch, and its Kronecker terms."""
        source = Source(self.layers, tap.taps.pulled(), {})
        state = factors.update(state, source, jnp.zeros((), jnp.int32))
        return state, factors.terms(state, self.layers)[_LAYER]


def _pairing(params: Any, a: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.sum(kfe.tag_dense(a, a @ params[_LAYER], params) * g) / a.shape[0]
