"""Proximal policy optimization (Schulman et al. 2017) on cart-pole, all of it in one compiled step.

64 environments act for 32 steps, and the next 16 steps of training go down on eighths of what happened. With the
ratio ρ = π(a|s) / π_old(a|s), generalized advantages Â and returns R, the loss is

    −mean min(ρ Â, clip(ρ, 0.8, 1.2) Â) + ½ mean (V(s) − R)² − 0.01 mean H(π(·|s)).

The clipped surrogate is no −log p. The Fisher matrix is that of the policy, E_s E_{a~π}[∇ log π(a|s) ∇ log π(a|s)ᵀ],
since the logits are registered as those of a categorical distribution with weights 1/n (the natural policy gradient,
Kakade 2001), and beside it that of V as the mean of a Gaussian (Wu et al. 2017). The entropy adds to the gradient
alone.

    python -m examples.ppo
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfe_optax as kfe
from examples import cartpole, race

Params = dict[str, dict[str, jax.Array]]
DISCOUNT, TRACE, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.01


class Rollout(NamedTuple):
    """What happened, (time, environments) or shuffled."""

    state: jax.Array
    action: jax.Array
    log_probability: jax.Array
    advantage: jax.Array
    returns: jax.Array


class Carried(NamedTuple):
    """The environments, the last rollout in the order in which it is used, and the number of steps so far."""

    poles: cartpole.Poles
    rollout: Rollout
    count: jax.Array


def init(key: jax.Array, width: int = 64) -> Params:
    """Two networks: kernels of Glorot's size, small ones at the policy's end, and biases of zero."""
    glorot = jax.nn.initializers.glorot_normal()
    params = {}
    for j, (head, outputs) in enumerate({"policy": cartpole.ACTIONS, "value": 1}.items()):
        for i, shape in enumerate(((4, width), (width, width), (width, outputs))):
            kernel = glorot(jax.random.fold_in(key, 3 * j + i), shape)
            params[f"{head}_{i}"] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
    params["policy_2"]["kernel"] *= 0.01
    return params


def _network(params: Params, head: str, state: jax.Array) -> jax.Array:
    h = state * jnp.array([1.0, 1.0, 5.0, 1.0])
    for i in range(3):
        layer = params[f"{head}_{i}"]
        h = (jnp.tanh(h) if i else h) @ layer["kernel"] + layer["bias"]
    return h


def policy(params: Params, state: jax.Array) -> jax.Array:
    """Logits (..., actions)."""
    return _network(params, "policy", state)


def value(params: Params, state: jax.Array) -> jax.Array:
    """V (...), of rewards of 0.01 a step."""
    return _network(params, "value", state)[..., 0]


def log_probability(logits: jax.Array, action: jax.Array) -> jax.Array:
    return -optax.losses.softmax_cross_entropy_with_integer_labels(logits, action)


def advantages(deltas: jax.Array, ended: jax.Array) -> jax.Array:
    """Â_t = δ_t + γλ Â_{t+1}, (time, environments), where an episode's end lets nothing through."""

    def back(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, end = now
        advantage = delta + DISCOUNT * TRACE * jnp.where(end, 0.0, later)
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(deltas[0]), (deltas, ended), reverse=True)[1]


def loss_fn(params: Params, batch: Rollout) -> jax.Array:
    logits = kfe.register_output(policy(params, batch.state), kfe.Categorical())
    ratio = jnp.exp(log_probability(logits, batch.action) - batch.log_probability)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    chances = jax.nn.softmax(logits)
    entropy = -jnp.sum(chances * jax.nn.log_softmax(logits), -1)
    squares = kfe.losses.l2_loss(value(params, batch.state), batch.returns)
    return squares.mean() - surrogate.mean() - ENTROPY * entropy.mean()


class Ppo(NamedTuple):
    """64 environments, rollouts of 32 steps, each used for two epochs of eight minibatches."""

    steps: int = 1600
    unit: str = "mean return of the last episodes (higher is better)"
    environments: int = 64
    length: int = 32
    epochs: int = 2
    minibatches: int = 8

    def start(self, key: jax.Array) -> tuple[Params, Carried]:
        params = init(jax.random.fold_in(key, 0))
        poles = cartpole.reset(jax.random.fold_in(key, 1), self.environments)
        _, rollout = self.roll(params, poles, jax.random.fold_in(key, 2))
        return params, Carried(poles, rollout, jnp.zeros((), jnp.int32))

    def roll(self, params: Params, poles: cartpole.Poles, key: jax.Array) -> tuple[cartpole.Poles, Rollout]:
        """`length` steps by the policy, in minibatches (epochs · minibatches, size), each epoch in an order of its own."""

        def act(poles: cartpole.Poles, key: jax.Array) -> tuple[cartpole.Poles, Any]:
            logits = policy(params, poles.state)
            action = jax.random.categorical(jax.random.fold_in(key, 0), logits)
            following, after, down = cartpole.step(poles, action, jax.random.fold_in(key, 1))
            before, future = value(params, poles.state), jnp.where(down, 0.0, value(params, after))
            delta = 0.01 + DISCOUNT * future - before
            seen = poles.state, action, log_probability(logits, action), before
            return following, (seen, delta, following.count == 0)

        walk, *orders = jax.random.split(key, 1 + self.epochs)
        poles, (seen, deltas, ended) = jax.lax.scan(act, poles, jax.random.split(walk, self.length))
        state, action, chance, before = seen
        advantage = advantages(deltas, ended)
        returns = advantage + before
        scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        size = self.environments * self.length
        order = jnp.concatenate([jax.random.permutation(key, size) for key in orders])
        order = order.reshape(self.epochs * self.minibatches, -1)
        rollout = Rollout(state, action, chance, scaled, returns)
        return poles, jax.tree.map(lambda x: x.reshape(size, *x.shape[2:])[order], rollout)

    def arguments(self, params: Params, carried: Carried, key: jax.Array) -> tuple[tuple[Rollout], Carried]:
        place = carried.count % (self.epochs * self.minibatches)
        poles, rollout = jax.lax.cond(
            place == 0,
            lambda: self.roll(params, carried.poles, key),
            lambda: (carried.poles, carried.rollout),
        )
        batch = jax.tree.map(lambda x: x[place], rollout)
        return (batch,), Carried(poles, rollout, carried.count + 1)

    def measure(self, params: Params, carried: Carried, loss: jax.Array) -> jax.Array:
        return carried.poles.returns.mean()

    loss_fn = staticmethod(loss_fn)


TITLE, PROBLEM, RATES = "Proximal policy optimization on cart-pole", Ppo(), (1e-3, 3e-3, 1e-2)

if __name__ == "__main__":
    race.main("ppo", TITLE, PROBLEM, RATES, larger_is_better=True)
