"""A rule of one's own: one class, one call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import kfe_optax as kfe

from .dense import assert_close

N = 5


def product(x, w):
    """(d_out, n), features in front of the examples."""
    return w @ x


features_first = Primitive("features_first_product")
features_first.def_impl(product)
features_first.def_abstract_eval(lambda x, w: jax.core.ShapedArray((w.shape[0], x.shape[1]), x.dtype))
ad.defbilinear(features_first, lambda g, x, w: w.T @ g, lambda g, x, w: g @ x.T)
mlir.register_lowering(features_first, mlir.lower_fun(product, multiple_results=False))


class FeaturesFirst(kfe.rules.Rule):
    """(d_out, n) = W (d_in, n), as a dense layer that sees (n, d_in)."""

    primitive = "features_first_product"

    def use(self, equation, side, trail):
        if side != 1 or trail.dims != (0, 1):
            return None
        x, y = (
            jax.ShapeDtypeStruct(v.aval.shape[::-1], v.aval.dtype)
            for v in (equation.invars[0], equation.outvars[0])
        )
        kind = kfe.kinds.Dense(kernel="ab", inputs="...b", outputs="...a", bias="a")
        return kfe.rules.Found(kind, trail, 0, kfe.rules.shapes(x, y), axes=(0, -1), order=(1, 0))

    def layout(self, equation, x, operands):
        return kfe.rules.Layout(operands[x].T, jnp.transpose, jnp.transpose)


def test_a_rule_of_ones_own(x64):
    """Its layer obeys the law of rows, with the bias that is added to it."""
    random = np.random.default_rng(0).normal
    params = {"w": jnp.asarray(random(size=(3, 4))), "b": jnp.asarray(random(size=(3, 1)))}
    x, labels = jnp.asarray(random(size=(N, 4))), jnp.arange(N) % 3

    def loss_fn(params, x, labels):
        logits = (features_first.bind(x.T, params["w"]) + params["b"]).T
        logits = logits + jnp.sin(x) @ params["w"].T  # the same kernel in another layout, by another rule
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    assert (
        "features_first_product at test_rules.py" in kfe.find_layers(loss_fn, params, x, labels).reasons[-1]
    )
    kfe.rules.register(FeaturesFirst())
    try:
        layers = kfe.find_layers(loss_fn, params, x, labels)
        assert {name: layer.shape for name, layer in layers.items()} == {"w": (5, 3)}
        _, grads, taps = kfe.value_grad_and_taps(loss_fn, layers, fisher="empirical")(params, x, labels)
        assert_close(grads, jax.jit(jax.grad(loss_fn))(params, x, labels), 1e-10)
        assert_close(taps["w"].example_gradients().mean(-3), layers["w"].to_matrix(grads), 1e-10)
        with pytest.raises(ValueError, match="There is a rule for 'features_first_product' already"):
            kfe.rules.register(FeaturesFirst())
    finally:
        del kfe.rules.RULES["features_first_product"]
    with pytest.raises(TypeError, match="an object of a subclass of kfe.rules.Rule"):
        kfe.rules.register(FeaturesFirst)
