"""Statistics of a layer that is used more than once (a repeated call, a loop over time), or on unknown examples: sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._layers.identity import LARGEST_SIDE
from kfe_optax._layers.kinds.base import TRANSPOSED, gram
from kfe_optax._layers.layer import Layer
from kfe_optax._statistics.rows import over_stack


class Sums:
    """See `statistics.Statistics`; what needs single examples is there as long as `Layer.per_example`."""

    def __init__(self, layer: Layer, rider: Mapping[str, jax.Array], scale: Any):
        self.layer = layer
        self._sums = dict(rider)
        self._scale = scale

    def rows(self):
        raise ValueError(f"Layer {self.layer.name!r} {self.layer.why_sums} and has no rows.")

    def _over_stack(self, function):
        return over_stack(function, len(self.layer.stacked))(self._sums)

    def _reduced(self) -> bool:
        return self.layer.sharing == "reduce"

    def input_factor(self, diagonal=False):
        layer = self.layer
        own = layer.kind.diagonal[0]
        if layer.mixed:
            raise ValueError(f"The uses of layer {layer.name!r} have no common A; see traced_factors.")

        def factor(sums):
            if self._reduced():
                means = sums["input_sums"] / jnp.maximum(sums["example_counts"], 1)[:, None]
                live = jnp.maximum(jnp.sum(sums["example_counts"] > 0), 1)
                return gram(means[..., None, :], diagonal or own) / live
            count = jnp.maximum(sums["count"], 1)
            if "inputs" not in sums:
                _check_diagonal(layer, diagonal)
                return sums["input_squares"] / count[0]
            result = layer.kind.input_factor(sums["inputs"], count[0], layer.kernel_shape, layer.bias, own)
            return jnp.diagonal(result, axis1=-2, axis2=-1) if diagonal and not own else result

        return self._over_stack(factor)

    def output_factor(self, diagonal=False):
        layer = self.layer

        def factor(sums):
            if self._reduced():
                return gram(sums["output_sums"][..., None, :], diagonal)
            if "outputs" not in sums:
                _check_diagonal(layer, diagonal)
                return sums["output_squares"]
            result = sums["outputs"]
            return jnp.diagonal(result, axis1=-2, axis2=-1) if diagonal else result

        return self._over_stack(factor) * (self._scale**2 / self.layer.examples)

    def second_moment_in(self, basis_in, basis_out):
        if not self.layer.per_example:
            return None
        gradients = self.example_gradients()
        if basis_in is not None:
            gradients = basis_in[..., None, :, :].mT @ gradients
        if basis_out is not None:
            gradients = gradients @ basis_out[..., None, :, :]
        return jnp.mean(jnp.square(gradients), -3)

    def contract_output(self, v, diagonal=False):
        gradients = self.example_gradients()
        mapped = gradients * v[..., None, None, :] if self._diagonal(v) else gradients @ v[..., None, :, :]
        form = "...nab,...nab->...a" if diagonal else "...nab,...ncb->...ac"
        return jnp.einsum(form, mapped, gradients) / self.layer.examples

    def contract_input(self, u, diagonal=False):
        gradients = self.example_gradients()
        mapped = gradients * u[..., None, :, None] if self._diagonal(u) else u[..., None, :, :] @ gradients
        form = "...nab,...nab->...b" if diagonal else "...nab,...nac->...bc"
        return jnp.einsum(form, gradients, mapped) / self.layer.examples

    def _diagonal(self, factor):
        return factor.ndim == len(self.layer.stack_shape) + 1

    def traced_factors(self, pairing, diagonal):
        layer = self.layer
        if pairing == "use":
            return self._traced_uses(diagonal)
        if pairing == "position":
            raise ValueError(
                f"Layer {layer.name!r} {layer.why_sums}, so the traces of its single positions are not known: choose tkfac's "
                "pairing='example', or leave it out with layers.without."
            )
        d_in, d_out = layer.sides
        stack = layer.stack_shape
        inputs = self.contract_output(jnp.ones((*stack, d_out), layer.factor_dtype), diagonal[0])
        outputs = self.contract_input(jnp.ones((*stack, d_in), layer.factor_dtype), diagonal[1])
        sigma = outputs.sum(-1) if diagonal[1] else jnp.trace(outputs, axis1=-2, axis2=-1)
        return sigma, inputs, outputs

    def _traced_uses(self, diagonal):
        """σ = Σ tr A_u tr G_u, Σ tr(G_u) A_u, Σ tr(A_u) G_u over the uses as they are and the transposed ones."""
        layer, squared = self.layer, self._scale**2 / self.layer.examples
        own = layer.kind.diagonal

        def side(sums, name, index):
            """The sum over the rows of a side, and whether it is the diagonal of one."""
            squares = f"{name[:-1]}_squares"
            if squares in sums:
                _check_diagonal(layer, diagonal[index])
            moments = sums[squares] if squares in sums else sums[name]
            if diagonal[index] and not (own[index] or squares in sums):
                moments = jnp.diagonal(moments, axis1=-2, axis2=-1)
            return moments

        def trace(moments, index):
            return moments.sum(-1) if diagonal[index] else jnp.trace(moments, axis1=-2, axis2=-1)

        def weighted(trace, moments):
            return trace.reshape(*trace.shape, *(1,) * (moments.ndim - trace.ndim)) * moments

        def traced(sums):
            # Each is quadratic in g: in the plain uses by G, in the transposed ones by A.
            sigma, inputs, outputs = 0.0, 0.0, 0.0
            for prefix in ("", f"{TRANSPOSED}_"):
                a, g = side(sums, f"{prefix}inputs", 0), side(sums, f"{prefix}outputs", 1)
                weight = squared / jnp.maximum(sums[f"{prefix}count"][0], 1)
                traces = trace(a, 0), trace(g, 1)
                sigma += weight * traces[0] * traces[1]
                inputs += weighted(weight * traces[1], a)
                outputs += weighted(weight * traces[0], g)
            return sigma, inputs, outputs

        return self._over_stack(traced)

    def example_gradients(self):
        if not self.layer.per_example:
            name = self.layer.name
            if not self.layer.aligned:
                raise ValueError(
                    f"Layer {name!r} {self.layer.why_sums} (batch-major, also when flattened with other axes), so its "
                    "per-example gradients are not known: choose a method that reads none, such as kfe.kfac, or "
                    f"layers.without({name!r})."
                )
            raise ValueError(
                f"Layer {name!r} is applied to one example at a time (vmap) or to batches of different sizes, so its "
                "per-example gradients are not kept; call the model on the whole batch."
            )
        gradients = self._sums["examples"] * self._scale
        lead = len(self.layer.stacked)
        # (*stacked, n, *blocks, d_in, d_out): the examples go behind the blocks.
        return jnp.moveaxis(gradients, lead, -3)

    def project_inputs(self, p):
        raise ValueError(
            f"Layer {self.layer.name!r} {self.layer.why_sums}, so the projections of its single rows are not known."
        )

    def project_outputs(self, q):
        return self.project_inputs(q)

    def project(self, p, q):
        gradients = self.example_gradients()
        return self._over_blocks(jnp.einsum("...nio,...vi,...vo->...nv", gradients, p, q))

    def inner(self, matrix):
        return self._over_blocks(jnp.einsum("...nio,...io->...n", self.example_gradients(), matrix))

    def weighted_gradient(self, weights):
        return jnp.einsum("...nio,n->...io", self.example_gradients(), weights)

    def _over_blocks(self, values):
        return values.sum(tuple(range(len(self.layer.stacked), len(self.layer.stack_shape))))


def _check_diagonal(layer: Layer, diagonal: bool) -> None:
    if not diagonal:
        raise ValueError(
            f"Layer {layer.name!r} is used more than once and has a side of more than {LARGEST_SIDE}, of whose factor the sums "
            f"over its uses hold the diagonal alone: choose max_dim={LARGEST_SIDE} or less."
        )
