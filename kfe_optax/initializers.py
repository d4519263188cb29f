"""Initial values of parameters, in the manner of `jax.nn.initializers`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def sparse(count: int = 15, stddev: float = 1.0, dtype: Any = None) -> jax.nn.initializers.Initializer:
    """Every unit gets `count` incoming weights of N(0, stddev²), all the others are zero.

    The sparse initialization of Martens (2010, section 5), with which Martens & Grosse (2015, section 13) start their
    autoencoders; their biases are zero, as Flax's are. A unit's input has variance `count` · stddev² · E[a²] however many units
    feed it, and no two units begin alike. It suits saturating activations; behind ReLUs take a `stddev` of √(2/count).

    Args:
      count: incoming weights of a unit that are not zero; all of them when a unit has fewer.
      stddev: their standard deviation.
      dtype: the initializer's default dtype.

    Returns:
      `init(key, shape, dtype, out_sharding=None)`, to be a layer's `kernel_init`. The last axis counts the units, and all the
      others are incoming: a dense kernel (d_in, d_out) has `count` entries a column, a convolution's (height, width, channels,
      features) `count` a feature.

    Raises:
      ValueError: `count` is not positive, or the shape has fewer than two axes.

    Example:
      >>> import jax, flax.linen as nn
      >>> from kfe_optax import initializers
      >>> model = nn.Dense(50, kernel_init=initializers.sparse())
      >>> kernel = model.init(jax.random.key(0), jax.numpy.ones((1, 200)))["params"]["kernel"]
      >>> {int(nonzero) for nonzero in (kernel != 0).sum(0)}
      {15}
    """
    if count < 1:
        raise ValueError(
            f"count is {count}: a unit without incoming weights never learns; let it have at least 1."
        )

    def init(key: jax.Array, shape: Any, dtype: Any = dtype, out_sharding: Any = None) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(
                f"sparse() initializes kernels, whose last axis counts the units, and this shape is {tuple(shape)}; "
                "take zeros for a bias."
            )
        dtype = jnp.result_type(float) if dtype is None else dtype
        incoming, units = math.prod(shape[:-1]), shape[-1]
        of_places, of_values = jax.random.split(key)
        first = np.broadcast_to(np.arange(incoming)[:, None] < count, (incoming, units))
        chosen = jax.random.permutation(of_places, jnp.asarray(first), axis=0, independent=True)
        values = jax.random.normal(of_values, (incoming, units), dtype) * jnp.asarray(stddev, dtype)
        kernel = jnp.where(chosen, values, jnp.zeros((), dtype)).reshape(shape)
        return kernel if out_sharding is None else jax.device_put(kernel, out_sharding)

    return init
