"""Flax Linen: the one module whose equations no rule reads, and a TrainState that passes taps on."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import flax.linen as nn
import optax
from flax.training import train_state

from kfe_optax._statistics import tags


def _interceptor(next_function, args, kwargs, context):
    cell = context.module
    own = type(cell).__call__ is nn.OptimizedLSTMCell.__call__ and context.method_name == "__call__"
    if tags.listener() is None or not own or cell.is_initializing():
        return next_function(*args, **kwargs)
    plain: Any = nn.LSTMCell
    fields = {field.name for field in dataclasses.fields(plain)} - {"parent", "name"}
    other = plain(**{name: getattr(cell, name) for name in fields}, parent=None)
    return other.apply({"params": cell.variables["params"]}, *args, **kwargs)


def intercepting() -> contextlib.AbstractContextManager[Any]:
    """A context in which `nn.OptimizedLSTMCell`, one product with all its kernels side by side, is the cell that it optimizes.

    `nn.LSTMCell` has the same parameters, and a dense layer a gate.
    """
    return nn.intercept_methods(_interceptor)


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` takes `taps` and passes them to the optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, kfe_optax as kfe
      >>> model = nn.Dense(3)
      >>> x, labels = jnp.ones((4, 2)), jnp.arange(4) % 3
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x, labels):
      ...     logits = model.apply({"params": params}, x)
      ...     return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> layers = kfe.find_layers(loss_fn, {"dense": params}["dense"], x, labels)
      >>> state = kfe.TrainState.create(apply_fn=model.apply, params=params, tx=kfe.kfac(1e-2, layers))
      >>> loss, grads, taps = kfe.value_grad_and_taps(loss_fn, layers)(params, x, labels, key=jax.random.key(1))
      >>> int(state.apply_gradients(grads=grads, taps=taps).step)
      1
    """

    def apply_gradients(self, *, grads: Any, taps: Any = None, **changes: Any) -> TrainState:
        """One step: `tx.update(grads, opt_state, params, taps=taps)`, then the new parameters, state and count."""
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, taps=taps)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)
