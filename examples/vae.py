"""A variational autoencoder (Kingma & Welling 2014) on digits: two Flax Linen modules in one tree of parameters.

The encoder predicts mean μ and log variance of q(z|x), the decoder the pixels' logits from z = μ + σε, and the loss
is the negative evidence lower bound in nats an image, −E[log p(x|z)] + KL(q(z|x) ‖ N(0, I)). The pixels are Bernoulli
variables and give the Fisher matrix, of the encoder's layers through z as well; the KL term names no distribution and
is a part of the gradient alone.

    python -m examples.vae
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import kfe_optax as kfe
from examples import digits, race


class Encoder(nn.Module):
    """Images to the mean and the log variance of each latent variable."""

    width: int
    latents: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = nn.tanh(nn.Dense(self.width, name="hidden")(images))
        return nn.Dense(self.latents, name="mean")(hidden), nn.Dense(self.latents, name="log_variance")(
            hidden
        )


class Decoder(nn.Module):
    """Latent variables to the logits of the pixels."""

    width: int
    pixels: int

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        hidden = nn.tanh(nn.Dense(self.width, name="hidden")(latents))
        return nn.Dense(self.pixels, name="pixels")(hidden)


def divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(mean, variance) ‖ N(0, I)), summed over the latent variables."""
    return 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1)


class Vae(NamedTuple):
    """Batches of 256 binarized images."""

    steps: int = 300
    unit: str = "negative evidence lower bound, nats an image"
    width: int = 128
    latents: int = 16
    pixels: int = 784

    def models(self) -> tuple[Encoder, Decoder]:
        return Encoder(self.width, self.latents), Decoder(self.width, self.pixels)

    def start(self, key: jax.Array) -> tuple[Any, jax.Array]:
        encoder, decoder = self.models()
        images = (digits.load().images.reshape(-1, self.pixels) > 0.5).astype(jnp.float32)
        params = {
            "encoder": encoder.init(jax.random.fold_in(key, 0), images[:1])["params"],
            "decoder": decoder.init(jax.random.fold_in(key, 1), jnp.zeros((1, self.latents)))["params"],
        }
        return params, images

    def arguments(
        self, params: Any, carried: jax.Array, key: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        chosen = jax.random.randint(jax.random.fold_in(key, 0), (256,), 0, len(carried))
        noise = jax.random.normal(jax.random.fold_in(key, 1), (256, self.latents))
        return (carried[chosen], noise), carried

    def loss_fn(self, params: Any, images: jax.Array, noise: jax.Array) -> jax.Array:
        encoder, decoder = self.models()
        mean, log_variance = encoder.apply({"params": params["encoder"]}, images)
        latents = mean + jnp.exp(0.5 * log_variance) * noise
        logits = decoder.apply({"params": params["decoder"]}, latents)
        pixels = kfe.losses.sigmoid_binary_cross_entropy(logits, images).sum(-1)
        return (pixels + divergence(mean, log_variance)).mean()

    def measure(self, params: Any, carried: jax.Array, loss: jax.Array) -> jax.Array:
        return loss


TITLE, PROBLEM, RATES = "A variational autoencoder on digits", Vae(), (3e-3, 1e-2, 3e-2)

if __name__ == "__main__":
    race.main("vae", TITLE, PROBLEM, RATES)
