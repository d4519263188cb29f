"""Row masks: which rows count when statistics are formed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from kfe_optax._jax import retracing
from kfe_optax._layers.layer import Layer
from kfe_optax._marks import marks
from kfe_optax._statistics import tags


@contextlib.contextmanager
def row_mask(mask: Any) -> Generator[None]:
    """Layers called in this context count only the rows where `mask` is true (a norm counts what arrives in g).

    A padded token whose loss is masked has g = 0 and counts nowhere in G, but it would count in A = E[mean_t ā āᵀ]. Give
    `value_grad_and_taps(...)(..., row_mask=mask)` the mask of the whole batch; this context is for a part of the model with
    another one, such as the step of a loop over time. Outside `value_grad_and_taps` it does nothing.

    Args:
      mask: (n,) or (n, t, ...), a prefix of the layers' positions. A layer without positions (a pooled head) counts the
        examples with any true entry; a layer whose input is flattened, (n t, d), takes a mask of as many entries. None
        lifts the mask.

    Example:
      >>> import jax, jax.numpy as jnp, kfe_optax as kfe
      >>> def loss_fn(params, x, lengths):
      ...     with kfe.row_mask(jnp.arange(x.shape[1]) < lengths[:, None]):
      ...         y = kfe.tag_dense(x, x @ params["kernel"], params)
      ...     return kfe.losses.l2_loss(y).mean()
      >>> params, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((4, 5, 3))
      >>> layers = kfe.find_layers(loss_fn, params, x, jnp.array([5, 2, 1, 4]))
      >>> layers["kernel"].positions
      5
    """
    listener = tags.listener()
    if listener is None:
        yield
        return
    serial = marks.LIFTED
    if mask is not None:
        serial = str(next(listener.masks))
        marks.mask_mark.bind(jnp.asarray(mask), serial=serial, vmaps=())
    # A function of the model that was traced under another mask must be traced again.
    with tags.masked_rows(mask), retracing.fresh(), jax.named_scope(marks.ROW_MASK + serial):
        yield


def live(
    layer: Layer, mask: Any, free: tuple[int, ...], of_batch: bool = False, of_example: bool = False
) -> jax.Array | None:
    """The row mask for a use of a layer with positions of shape `free`, 1 or 0; None without a mask.

    `of_batch`: it is that of the whole batch, not one that a part of the model was called with. `of_example`: a vmap over the
    examples maps it, too.

    Raises:
      ValueError: the mask's shape is no prefix of `free`.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask) != 0
    shape = mask.shape
    name = repr(layer.name)
    if layer.spread and not of_example:
        raise ValueError(
            f"row_mask has shape {shape}, but layer {name} is under a vmap over the batch and sees one example: open `with "
            "kfe.row_mask(mask of this example):` inside the vmap, or call the model on the whole batch."
        )
    if of_batch and not layer.aligned and shape[:1] == (layer.examples,):
        # Shapes say nothing: as many examples as steps of time, or (t n) where the mask is (n, t).
        raise ValueError(
            f"row_mask has shape {shape}, an entry an example first, but the leading axis of layer {name} is not shown to be the "
            "batch: mark it with kfe.tag_dense in a `with kfe.row_mask(mask of its own rows):`, or move the batch in front."
        )
    if layer.constant:
        return jnp.ones(free, jnp.float32)
    if layer.in_loop and mask.ndim > 1 and len(free) < mask.ndim:
        raise ValueError(
            f"row_mask has shape {shape}, but layer {name} runs inside a loop and sees one of its positions at a time: open "
            "`with kfe.row_mask(mask of this step):` inside the loop, or give one entry an example."
        )
    if free[: mask.ndim] == shape:
        mask = mask.reshape(*shape, *(1,) * (len(free) - mask.ndim))
    elif mask.size == free[0] and len(free) == 1:
        mask = mask.reshape(free)
    elif layer.aligned and mask.ndim == 1 and len(mask) == layer.examples and free[0] % layer.examples == 0:
        mask = jnp.repeat(mask, free[0] // layer.examples).reshape(free[0], *(1,) * (len(free) - 1))
    elif len(free) == 1 and free == shape[:1]:
        mask = mask.reshape(free[0], -1).any(-1)
    else:
        raise ValueError(
            f"row_mask has shape {shape}, but the input of layer {name} has the positions {free}: give one entry an example, "
            "or one an example and position, or lift the mask for this layer with `with kfe.row_mask(None):`."
        )
    return jnp.broadcast_to(mask, free).astype(jnp.float32)
