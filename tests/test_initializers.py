"""The sparse initialization: how many weights, where, how large."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kfe_optax.initializers import sparse


def drawn(init, *given):
    """An array of one program; a shape and a dtype are static."""
    key, *static = given
    return np.asarray(jax.jit(lambda key: init(key, *static))(key))


def test_every_unit_has_count_incoming_weights_at_places_of_its_own():
    kernel = drawn(sparse(), jax.random.key(0), (400, 300), jnp.float32)
    assert np.all((kernel != 0).sum(axis=0) == 15)
    weights = kernel[kernel != 0]
    # 4,500 of N(0, 1): five standard errors.
    assert abs(weights.mean()) < 5 / np.sqrt(4500)
    assert weights.var() == pytest.approx(1.0, abs=5 * np.sqrt(2 / 4500))
    # Each place is as likely: the number of weights of an input is binomial, of mean 11.25 and variance 10.8.
    fan_out = (kernel != 0).sum(axis=1)
    assert fan_out.var() == pytest.approx(300 * (15 / 400) * (1 - 15 / 400), rel=0.4)
    assert len({tuple(np.flatnonzero(column)) for column in kernel.T}) == 300
    # Neighboring rows of weights are independent of their places.
    other = drawn(sparse(), jax.random.key(1), (400, 300), jnp.float32)
    assert not np.array_equal(kernel != 0, other != 0)


def test_options_dtypes_and_shapes():
    init = sparse(3, 0.5)
    with jax.enable_x64(True):
        kernel = drawn(init, jax.random.key(0), (40, 2000), jnp.float64)
        assert kernel.dtype == jnp.float64
        assert drawn(sparse(dtype=jnp.bfloat16), jax.random.key(0), (4, 4)).dtype == jnp.bfloat16
        np.testing.assert_array_equal((kernel != 0).sum(axis=0), 3)
        assert float(kernel[kernel != 0].std()) == pytest.approx(0.5, rel=0.05)
    # A unit with fewer inputs takes them all.
    assert np.all(drawn(init, jax.random.key(0), (2, 9)) != 0)
    # A convolution's unit has all places of its patch.
    kernel = drawn(init, jax.random.key(0), (3, 3, 4, 50))
    np.testing.assert_array_equal((kernel != 0).reshape(36, 50).sum(axis=0), 3)
    assert np.all((kernel != 0).sum(axis=(1, 2, 3)) > 20)


def test_it_is_an_initializer_of_linen_and_nnx_also_stacked_and_placed():
    model = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=4
    )(7, kernel_init=sparse(5))
    kernel = np.asarray(jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 20)))["params"]["kernel"])
    assert kernel.shape == (4, 20, 7)
    np.testing.assert_array_equal((kernel != 0).sum(axis=1), 5)
    layer = nnx.Linear(20, 7, kernel_init=sparse(5), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal((np.asarray(layer.kernel[...]) != 0).sum(axis=0), 5)
    mesh = jax.make_mesh((1,), ("x",))
    place = jax.NamedSharding(mesh, jax.P(None, "x"))
    init = jax.jit(lambda key: sparse(5)(key, (20, 7), jnp.float32, place))
    placed = init(jax.random.key(2))
    assert placed.sharding.is_equivalent_to(place, 2)
    np.testing.assert_array_equal(placed, drawn(sparse(5), jax.random.key(2), (20, 7), jnp.float32))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: sparse(0), "let it have at least 1"),
        (lambda: sparse()(jax.random.key(0), (7,)), r"this shape is \(7,\); take zeros for a bias"),
    ],
)
def test_mistakes_are_sentences(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
