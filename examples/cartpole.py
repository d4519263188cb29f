"""Cart-pole (Barto, Sutton & Anderson 1983) in JAX: a pole stands on a cart that is pushed to the left or to the right.

With the cart's place x, the pole's angle θ from upright, the push F = ±10, the masses M = 1 and m = 0.1 and half the
pole's length l = ½,

    θ'' = (g sin θ − cos θ p) / (l (4/3 − m cos²θ / (M + m))),   x'' = p − m l θ'' cos θ / (M + m),

where p = (F + m l θ'² sin θ) / (M + m). Each step of 0.02 s is one of Euler's and earns 1; an episode ends where |x|
> 2.4 or |θ| > 12°, or after 200 steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LONGEST = 200
ACTIONS = 2
GRAVITY, CART, POLE, HALF_LENGTH, PUSH, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02


class Poles(NamedTuple):
    """Many environments: (n, 4) of x, x', θ, θ', the steps of the running episodes, and the returns of those that ended last."""

    state: jax.Array
    count: jax.Array
    returns: jax.Array


def beginnings(key: jax.Array, n: int) -> jax.Array:
    """States near the upright one."""
    return jax.random.uniform(key, (n, 4), minval=-0.05, maxval=0.05)


def reset(key: jax.Array, n: int) -> Poles:
    return Poles(beginnings(key, n), jnp.zeros(n, jnp.int32), jnp.zeros(n))


def move(state: jax.Array, action: jax.Array) -> jax.Array:
    """States (n, 4) after one step with actions (n,), 0 or 1."""
    _, speed, angle, turning = jnp.moveaxis(state, -1, 0)
    sine, cosine, mass = jnp.sin(angle), jnp.cos(angle), CART + POLE
    pushed = (PUSH * (2 * action - 1) + POLE * HALF_LENGTH * turning**2 * sine) / mass
    bent = (GRAVITY * sine - cosine * pushed) / (HALF_LENGTH * (4 / 3 - POLE * cosine**2 / mass))
    drawn = pushed - POLE * HALF_LENGTH * bent * cosine / mass
    return state + SECONDS * jnp.stack([speed, drawn, turning, bent], -1)


def fallen(state: jax.Array) -> jax.Array:
    return (jnp.abs(state[..., 0]) > 2.4) | (jnp.abs(state[..., 2]) > jnp.deg2rad(12))


def step(poles: Poles, action: jax.Array, key: jax.Array) -> tuple[Poles, jax.Array, jax.Array]:
    """The next environments, where those that ended begin again; the states before that, and which of them have fallen.

    An episode that is cut after 200 steps has not fallen: what comes after it has a value still.
    """
    after, count = move(poles.state, action), poles.count + 1
    down = fallen(after)
    ended = down | (count >= LONGEST)
    again = beginnings(key, len(count))
    following = Poles(
        jnp.where(ended[:, None], again, after),
        jnp.where(ended, 0, count),
        jnp.where(ended, count.astype(poles.returns.dtype), poles.returns),
    )
    return following, after, down
