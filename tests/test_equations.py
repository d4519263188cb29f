"""What the library knows of the form of jaxprs, a fact a test; on the lowest and on the newest JAX."""

from __future__ import annotations

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfe_optax._marks.marks import ROW_MASK
from kfe_optax._tracing import equations

pytestmark = pytest.mark.release

W, X = jnp.arange(9.0).reshape(3, 3) / 9, jnp.ones((2, 3))


@jax.custom_jvp
def cubed(x):
    return (x @ W) * x


cubed.defjvp(lambda primals, tangents: (cubed(*primals), tangents[0]))

CALLS = {
    "jit": (jax.jit(lambda x: x @ W), 1, True),
    "remat": (jax.checkpoint(lambda x: x @ W), 1, True),
    "scan": (lambda x: jax.lax.scan(lambda h, w: (h @ w, h), x, jnp.stack([W, W]))[0], 1, True),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ W, lambda x: (x @ W) * x, x), 3, True),
    "while": (lambda x: jax.lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h @ W, x), 1, False),
    "custom_jvp_call": (cubed, 2, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    """The programs inside, the places in them, and whether uses there can be tagged."""
    function, places, rebuilt = CALLS[name]
    found = [e for e in jax.make_jaxpr(function)(X).jaxpr.eqns if equations.inner(e)]
    (equation,) = found
    assert equations.places(equation) == places
    assert equations.is_rebuilt(equation) is rebuilt
    assert len(equations.inner(equation)) == (2 if name == "cond" else 1)


@pytest.mark.parametrize("length", [1, 3])
def test_constants_and_carries_of_a_scan(length):
    """Whatever they are called: also where what is scanned over has the shape of the carry inside."""

    def function(x, weights):
        return jax.lax.scan(lambda h, w: ((h[0] @ w @ W, h[1] + 1), h[0]), (x, 0), weights)

    (equation,) = (
        e for e in jax.make_jaxpr(function)(X, jnp.ones((length, 3, 3))).jaxpr.eqns if equations.inner(e)
    )
    assert equations.scan_carry(equation) == (1, 2)


def test_a_run_of_equations():
    """The wanted variables alone, from what is known; under another transformation as well."""
    program = jax.make_jaxpr(lambda x: jnp.sin(x @ W) + 2 * x)(X)

    def evaluated(x):
        known = dict(
            zip((*program.jaxpr.constvars, *program.jaxpr.invars), (*program.consts, x), strict=True)
        )
        equations.run(program.jaxpr.eqns, program.jaxpr.outvars, known)
        return known[program.jaxpr.outvars[0]]

    np.testing.assert_allclose(evaluated(X), jnp.sin(X @ W) + 2 * X)
    np.testing.assert_allclose(jax.grad(lambda x: evaluated(x).sum())(X), jnp.cos(X @ W) @ W.T + 2, rtol=1e-6)


def test_where_an_equation_was_written():
    def function(x):
        with jax.named_scope(f"{ROW_MASK}3"), jax.named_scope("here"):
            return x @ W

    (equation,) = (e for e in jax.make_jaxpr(function)(X).jaxpr.eqns if equations.is_place(e))
    assert equations.written(equation).startswith("dot_general at test_equations.py:")
    assert equations.row_mask_of(equation) == "3"


def test_a_folder_may_be_named_as_a_library_is(tmp_path):
    """Flax's own examples lie in one; what counts is where the library is installed."""
    file = tmp_path / "flax" / "examples" / "model.py"
    file.parent.mkdir(parents=True)
    file.write_text("def apply(x, w):\n    return x @ w\n")
    apply = runpy.run_path(str(file))["apply"]
    (equation,) = jax.make_jaxpr(lambda x: apply(x, W))(X).jaxpr.eqns
    assert equations.written(equation) == "dot_general at model.py:2"
