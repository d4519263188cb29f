"""Deep linear networks: a composition of matrices, with batch norm between them."""

from __future__ import annotations

import jax
from flax import linen as nn

from kfe_optax.experiments.models.parts import normalized, scaled_normal

# All keep the size of what passes: N(0, 1/n), n the fan-in; and matrices that keep every direction.
INITIALIZERS: dict[str, nn.initializers.Initializer] = {
    "normal": scaled_normal(1.0),
    "orthogonal": nn.initializers.orthogonal(),
}


class Hidden(nn.Module):
    """A dense layer and its batch norm, without an activation.

    It returns a pair, as the body of a loop does.
    """

    width: int
    batch_norm: bool
    initializer: str
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        # A norm takes a bias away again.
        kernel_init = INITIALIZERS[self.initializer]
        x = nn.Dense(self.width, use_bias=not self.batch_norm, kernel_init=kernel_init, name="dense")(x)
        return normalized(x, "norm", batch_norm=self.batch_norm, train=self.train), None


class LinearNetwork(nn.Module):
    """``depth`` dense layers without activations, each but the last before a batch norm.

    What it computes is an affine map of its inputs (in training: of inputs whose batch the norms have
    whitened in part), so that only the optimization is hard. The layers from ``width`` to ``width`` are
    a loop with stacked parameters: a program that does not grow with the depth.

    Example::

        model = LinearNetwork(outputs=10, width=10, depth=64)
        variables = model.init(key, inputs)  # inputs (n, d)
        outputs, moved = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    """

    outputs: int
    width: int = 10
    depth: int = 64
    batch_norm: bool = True
    initializer: str = "normal"

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        hidden = (self.width, self.batch_norm, self.initializer, train)
        x, _ = Hidden(*hidden, name="first")(inputs)
        if self.depth > 2:
            loop = nn.scan(
                Hidden,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=self.depth - 2,
            )
            x, _ = loop(*hidden, name="hidden")(x, None)
        return nn.Dense(self.outputs, kernel_init=INITIALIZERS[self.initializer], name="last")(x)
