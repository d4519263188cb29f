"""`kfe.check_layers`: the law of rows on a user's model."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import kfe_optax as kfe

from .zoo import CASES


@pytest.mark.parametrize("name", ["mlp", "remat_scan", "over_time", "batch_norm_dropout", "example_vmap"])
def test_a_sound_model(name):
    """Every layer is ok, or says why it is not checked."""
    case = CASES[name]
    loss_fn, params, args = case.make(jnp.float32)
    layers = kfe.find_layers(loss_fn, params, *args)
    checks = kfe.check_layers(loss_fn, layers, params, *args)
    assert checks.ok
    assert "WRONG" not in str(checks)
    assert [check.name for check in checks] == list(layers)
    for check in checks:
        assert (check.gradient_error is not None) == case.example_gradients
        assert check.note or check.example_error is not None


def test_a_layer_tagged_with_another_input():
    """The rows of a mistaken tag are found out, in the table and in numbers; the other layer is fine."""
    generator = np.random.default_rng(0)
    x, y = (jnp.asarray(generator.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    params = {name: {"kernel": jnp.eye(3) + 0.1} for name in ("right", "wrong")}

    def loss_fn(params, x, y):
        hidden = kfe.tag_dense(x, x @ params["right"]["kernel"], params["right"])
        z = kfe.tag_dense(2 * hidden, hidden @ params["wrong"]["kernel"], params["wrong"])
        return kfe.losses.l2_loss(z, y).mean()

    layers = kfe.find_layers(loss_fn, params, x, y)
    checks = kfe.check_layers(loss_fn, layers, params, x, y)
    assert not checks.ok
    right, wrong = checks
    assert right.gradient_error < 1e-5
    assert right.example_error < 1e-5
    # Twice the input is twice the gradient: as large an error as the gradient itself.
    assert wrong.gradient_error == pytest.approx(1, rel=1e-4)
    assert wrong.example_error == pytest.approx(1, rel=1e-4)
    rows = str(checks).splitlines()
    assert "WRONG" in next(row for row in rows if row.startswith("wrong"))
    assert "ok" in next(row for row in rows if row.startswith("right"))
