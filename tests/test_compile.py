"""`benchmarks.compile`: what it counts in a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.compile import equations, kernels, table


def test_equations_of_branches_loops_and_calls_count():
    def inner(x):
        return jnp.sin(x) + 1

    def function(x):
        x = jax.lax.cond(x > 0, inner, jnp.cos, x)
        return jax.lax.fori_loop(0, 3, lambda _, y: inner(y), x)

    whole, parts = (equations(jax.make_jaxpr(f)(1.0).jaxpr) for f in (function, inner))
    # The comparison, the choice and its index, the branches, the loop with its count and the body.
    assert parts == 2
    assert whole >= 2 * parts + 3
    assert equations(jax.make_jaxpr(jax.jit(inner))(1.0).jaxpr) == 1 + parts


def test_kernels_are_fusions_and_what_stands_alone():
    def compiled(function):
        return jax.jit(function).lower(jnp.ones((64, 64))).compile()

    assert kernels(compiled(lambda x: jnp.sin(x) * 2 + x)) == 1
    two = kernels(compiled(lambda x: (jnp.sin(x).sum(0), jnp.cos(x).sum(1))))
    assert two >= 2
    looped = kernels(compiled(lambda x: jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y @ x), x)))
    assert looped >= 2


def test_the_table_has_medians_and_their_ratio_to_the_first():
    sizes = {"equations": 1000, "instructions": 2000, "kernels": 30}
    turn = lambda seconds: {"tracing": 0.0, "lowering": 0.0, "compiling": seconds, "all": seconds, **sizes}
    text = table({"adam": [turn(1.0), turn(2.0), turn(9.0)], "kfac": [turn(6.0)]})
    row = next(line for line in text.splitlines() if line.startswith("kfac")).split()
    assert row[1:] == ["0.00", "0.00", "6.00", "6.00", "3.0", "1,000", "2,000", "30"]
