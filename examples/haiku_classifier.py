"""A small Vision Transformer of digits in Haiku.

`hk.transform` makes a pure function of a tree of parameters, and that is all it takes. An image is 16 patches of 7 ×
7 pixels. The projections of attention and of the MLP are found as dense layers with 16 positions an example, the
norms as norms; the table of positions belongs to no layer and goes to Adam, as the printed table says.

    python -m examples.haiku_classifier
"""

from __future__ import annotations

from typing import Any, NamedTuple

import haiku as hk
import jax

import kfe_optax as kfe
from examples import race
from examples.digits import Digits, load


class Classifier(NamedTuple):
    """Batches of 128 digits."""

    steps: int = 200
    unit: str = "training loss"
    width: int = 64
    depth: int = 2
    heads: int = 4

    def network(self, images: jax.Array) -> jax.Array:
        patches = images.reshape(-1, 4, 7, 4, 7).swapaxes(2, 3).reshape(-1, 16, 49)
        places = hk.get_parameter("places", (16, self.width), init=hk.initializers.RandomNormal(0.02))
        h = hk.Linear(self.width, name="patches")(patches) + places
        scaled = hk.initializers.VarianceScaling(1 / self.depth)
        for i in range(self.depth):
            attention = hk.MultiHeadAttention(
                self.heads, self.width // self.heads, w_init=scaled, name=f"attention_{i}"
            )
            x = self.norm(f"norm_{i}a")(h)
            h = h + attention(x, x, x)
            mlp = hk.nets.MLP([4 * self.width, self.width], activation=jax.nn.gelu, name=f"mlp_{i}")
            h = h + mlp(self.norm(f"norm_{i}b")(h))
        return hk.Linear(10, name="out")(self.norm("norm_out")(h).mean(1))

    @staticmethod
    def norm(name: str) -> hk.LayerNorm:
        return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)

    def transformed(self) -> hk.Transformed:
        return hk.without_apply_rng(hk.transform(self.network))

    def start(self, key: jax.Array) -> tuple[Any, Digits]:
        digits = load()
        return self.transformed().init(key, digits.images[:1]), digits

    def arguments(self, params: Any, carried: Digits, key: jax.Array) -> tuple[tuple[Digits], Digits]:
        return (carried.batch(key, 128),), carried

    def loss_fn(self, params: Any, batch: Digits) -> jax.Array:
        logits = self.transformed().apply(params, batch.images)
        return kfe.losses.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def measure(self, params: Any, carried: Digits, loss: jax.Array) -> jax.Array:
        return loss


TITLE, PROBLEM, RATES = "Haiku: a Vision Transformer of digits", Classifier(), (3e-3, 1e-2, 3e-2)

if __name__ == "__main__":
    race.main("haiku_classifier", TITLE, PROBLEM, RATES)
