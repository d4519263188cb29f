"""Deep Q-learning on cart-pole, all of it in one compiled step (Mnih et al. 2015; van Hasselt et al. 2016).

A step of training acts once in each of 16 environments, stores what happened in a replay buffer, draws a batch from
the buffer and goes down on ½ (Q(s, a) − y)², with the target y = r + γ Q'(s', argmax Q(s', ·)), behind a
`stop_gradient`, and the target network Q' a moving average of Q. The value of the action that was taken is the mean
of a Gaussian, and the Fisher matrix the Gauss–Newton matrix of the squared error: y has none.

    python -m examples.dqn
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfe_optax as kfe
from examples import cartpole, race

Params = dict[str, dict[str, jax.Array]]
DISCOUNT = 0.98


class Transitions(NamedTuple):
    """What happened: state, action, the state after it, and whether the pole fell."""

    state: jax.Array
    action: jax.Array
    after: jax.Array
    down: jax.Array


class Carried(NamedTuple):
    """The environments, the buffer with the number of steps in it, and the target network."""

    poles: cartpole.Poles
    buffer: Transitions
    count: jax.Array
    target: Params


def init(key: jax.Array, width: int = 64) -> Params:
    """Kernels of He's size, and biases of zero."""
    he, shapes = jax.nn.initializers.he_normal(), ((4, width), (width, width), (width, cartpole.ACTIONS))
    return {
        f"dense_{i}": {"kernel": he(jax.random.fold_in(key, i), shape), "bias": jnp.zeros(shape[1])}
        for i, shape in enumerate(shapes)
    }


def values(params: Params, state: jax.Array) -> jax.Array:
    """Q (n, actions); the states are brought to sizes around one."""
    h = state * jnp.array([1.0, 1.0, 5.0, 1.0])
    for i, layer in enumerate(params.values()):
        h = (jax.nn.relu(h) if i else h) @ layer["kernel"] + layer["bias"]
    return h


def targets(params: Params, target: Params, batch: Transitions) -> jax.Array:
    """y (n,): the network chooses the next action, and the target network values it; a pole that fell has no future."""
    chosen = values(params, batch.after).argmax(-1)
    future = jnp.take_along_axis(values(target, batch.after), chosen[:, None], 1)[:, 0]
    return 1 + DISCOUNT * jnp.where(batch.down, 0.0, future)


def loss_fn(params: Params, target: Params, batch: Transitions) -> jax.Array:
    """½ mean (Q(s, a) − y)²."""
    taken = jnp.take_along_axis(values(params, batch.state), batch.action[:, None], 1)[:, 0]
    y = jax.lax.stop_gradient(targets(params, target, batch))
    return kfe.losses.l2_loss(taken, y).mean()


class Dqn(NamedTuple):
    """16 environments, a buffer of 1,024 steps of them, batches of 256."""

    steps: int = 2000
    unit: str = "mean return of the last episodes (higher is better)"
    environments: int = 16
    capacity: int = 1024
    batch: int = 256
    exploration: float = 0.1
    following: float = 0.01

    def start(self, key: jax.Array) -> tuple[Params, Carried]:
        """The buffer is full from the first step on, with actions at random."""
        params = init(jax.random.fold_in(key, 0))
        poles = cartpole.reset(jax.random.fold_in(key, 1), self.environments)

        def explore(poles: cartpole.Poles, key: jax.Array) -> tuple[cartpole.Poles, Transitions]:
            return self.act(poles, params, 1.0, key)

        poles, buffer = jax.lax.scan(
            explore, poles, jax.random.split(jax.random.fold_in(key, 2), self.capacity)
        )
        return params, Carried(poles, buffer, jnp.zeros((), jnp.int32), params)

    def act(
        self, poles: cartpole.Poles, params: Params, exploration: float, key: jax.Array
    ) -> tuple[cartpole.Poles, Transitions]:
        """One step in each environment: the best action, or with this probability any."""
        keys = jax.random.split(key, 3)
        best, n = values(params, poles.state).argmax(-1), self.environments
        anything = jax.random.randint(keys[0], (n,), 0, cartpole.ACTIONS)
        action = jnp.where(jax.random.uniform(keys[1], (n,)) < exploration, anything, best)
        following, after, down = cartpole.step(poles, action, keys[2])
        return following, Transitions(poles.state, action, after, down)

    def arguments(
        self, params: Params, carried: Carried, key: jax.Array
    ) -> tuple[tuple[Params, Transitions], Carried]:
        keys = jax.random.split(key, 3)
        poles, seen = self.act(carried.poles, params, self.exploration, keys[0])
        place = carried.count % self.capacity
        buffer = jax.tree.map(lambda old, new: old.at[place].set(new), carried.buffer, seen)
        rows = jax.random.randint(keys[1], (self.batch,), 0, self.capacity)
        columns = jax.random.randint(keys[2], (self.batch,), 0, self.environments)
        target = optax.incremental_update(params, carried.target, self.following)
        batch = jax.tree.map(lambda stored: stored[rows, columns], buffer)
        return (target, batch), Carried(poles, buffer, carried.count + 1, target)

    def measure(self, params: Params, carried: Carried, loss: jax.Array) -> jax.Array:
        return carried.poles.returns.mean()

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "Deep Q-learning on cart-pole", Dqn(), (3e-4, 1e-3, 3e-3)

if __name__ == "__main__":
    race.main("dqn", TITLE, PROBLEM, RATES, larger_is_better=True)
