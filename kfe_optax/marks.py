"""Primitives that stand in a traced loss where a layer, a registered loss or an unsupported module was met."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching


class InnerDerivativeError(ValueError):
    """The loss function differentiates a tagged layer or a registered loss itself."""


def _raise_forward_mode(*_, **__):
    raise InnerDerivativeError(
        "A tagged layer or a registered loss is differentiated inside the loss function itself (jvp, grad, hessian or a "
        "gradient penalty). Curvature tags work for one reverse-mode differentiation of the whole loss: move the inner "
        "derivative to an untagged copy of the model (jax.lax.stop_gradient does not help), or leave those layers out."
    )


def _mark(name: str) -> Any:
    """A primitive that returns its first operand and records the vmaps around it in its parameter `vmaps`."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda value, *rest, **params: value)
    ad.primitive_jvps[primitive] = _raise_forward_mode

    def batch(operands, dims, *, vmaps, **params):
        size = next(v.shape[d] for v, d in zip(operands, dims, strict=True) if d is not None)
        first = jnp.moveaxis(operands[0], dims[0], 0) if dims[0] is not None else operands[0]
        if dims[0] is None:
            first = jnp.broadcast_to(first, (size, *first.shape))
        rest = [
            v if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(operands[1:], dims[1:], strict=True)
        ]
        mapped = tuple(d is not None for d in dims)
        return primitive.bind(first, *rest, vmaps=(*vmaps, (size, mapped)), **params), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


layer_mark = _mark("kfe_layer")  # operands: y, probe, x, the layer's parameters
output_mark = _mark("kfe_output")  # operands: the registered output z
elements_mark = _mark(
    "kfe_elements"
)  # operands: the elements of a registered loss, whose weights are counted
unsupported_mark = _mark("kfe_unsupported")  # operands: probe
