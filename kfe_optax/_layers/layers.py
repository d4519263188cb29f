"""The layers of a loss function: a static mapping from name to `Layer`, and how they are configured."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from kfe_optax._jax import checks
from kfe_optax._layers import table
from kfe_optax._layers.kinds import KINDS, Kind
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.paths import Path, path_name

Sharing = Literal["expand", "reduce"]


class Layers(Mapping[str, Layer]):
    """The layers of a loss function, by name, in the order of the forward pass; static, hashable, printable as a table.

    Attributes:
      rest: the key paths of the parameters outside every layer.
      reasons: for each of them, why.
      outputs: the registered losses (see `kfe_optax.losses`).
      unregistered: whether the loss also reads a layer's output in a term that no registered loss stands for.
    """

    def __init__(
        self,
        layers: tuple[Layer, ...],
        rest: tuple[Path, ...],
        reasons: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        outputs: tuple[Any, ...],
        unregistered: bool = False,
    ):
        self._layers = layers
        self._by_name = {layer.name: layer for layer in layers}
        self.rest = rest
        self.reasons = reasons
        self.outputs = outputs
        self.unregistered = unregistered
        self._shapes = shapes

    def __getitem__(self, name: str) -> Layer:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no layer {name!r}; the layers are {', '.join(self._by_name)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._layers)

    def __hash__(self) -> int:
        return hash((self._layers, frozenset(self.rest)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layers):
            return NotImplemented
        return (self._layers, frozenset(self.rest)) == (other._layers, frozenset(other.rest))

    def __repr__(self) -> str:
        return f"Layers({', '.join(self._by_name)}; {len(self.rest)} parameters outside)"

    def __str__(self) -> str:
        return self.table()

    def _with(self, layers: Iterable[Layer]) -> Layers:
        return Layers(tuple(layers), self.rest, self.reasons, self._shapes, self.outputs, self.unregistered)

    def configure(
        self,
        pattern: str = "*",
        *,
        approximation: str | None = None,
        sharing: Sharing | None = None,
        **options: Any,
    ) -> Layers:
        """The layers with another approximation, or another treatment of shared positions, for some of them.

        Args:
          pattern: which layers, by name, as in a shell: "*", "encoder/*", "block_?/conv".
          approximation: one of the kind's own: of convolutions "kfc", "sua", "sua_uncentered" or "groups" with
            `num_groups=`; of dense layers "joint" or "heads"; of norms "full" or "diagonal". Matching layers of other kinds
            stay as they are.
          sharing: of dense layers, convolutions and embeddings. "expand": A = E[mean_t ā āᵀ], G = E[Σ_t g gᵀ], exact for deep
            linear networks with a loss at each position. "reduce": A = E[(mean_t ā)(mean_t ā)ᵀ], G = E[(Σ_t g)(Σ_t g)ᵀ], exact
            for deep linear networks that average over the positions; cheaper (Eschenhagen et al. 2023).
          **options: further options of the approximation.

        Raises:
          ValueError: no layer has such a name or such an approximation, or the layer's shape does not admit it.

        Example:
          >>> import jax, jax.numpy as jnp, flax.linen as nn, kfe_optax as kfe
          >>> model = nn.Conv(4, (3, 3))
          >>> x = jnp.ones((2, 8, 8, 3))
          >>> params = {"conv": model.init(jax.random.key(0), x)["params"]}
          >>> def loss_fn(params, x):
          ...     return kfe.losses.l2_loss(model.apply({"params": params["conv"]}, x)).mean()
          >>> layers = kfe.find_layers(loss_fn, params, x)
          >>> layers["conv"].shape, layers.configure(approximation="sua_uncentered")["conv"].shape
          ((28, 4), (9, 1, 4, 4))
        """
        matching = fnmatch.filter(self._by_name, pattern)
        if not matching:
            raise ValueError(
                f"No layer's name matches {pattern!r}; the layers are {', '.join(self._by_name)}."
            )
        if options and approximation is None:
            raise ValueError(
                f"{', '.join(options)} belong to an approximation: name it, as in approximation='groups'."
            )
        changed = {}
        for name in matching:
            layer = self._by_name[name]
            new = layer
            if approximation is not None and approximation in layer.kind.approximations:
                new = dataclasses.replace(new, kind=_configured(layer, approximation, options))
            if sharing is not None and not layer.kind.per_example:
                new = dataclasses.replace(new, sharing=sharing)
            if new is not layer:
                changed[name] = new
        if not changed:
            kinds = ", ".join(sorted({self._by_name[name].kind.name for name in matching}))
            raise ValueError(
                f"None of the layers that match {pattern!r} ({kinds}) has "
                f"approximation={approximation!r}, sharing={sharing!r}; see Layers.configure."
            )
        for layer in changed.values():
            _check_sharing(layer)
        return self._with(changed.get(name, layer) for name, layer in self._by_name.items())

    def without(self, *patterns: str, kinds: Iterable[str] = ()) -> Layers:
        """The layers but some; the parameters of these go through `rest`.

        Args:
          *patterns: which layers go, by name (as in `configure`).
          kinds: which kinds of layers go, such as "embedding" and "norm"; there may be none of them.

        Raises:
          ValueError: no layer has such a name; there is no such kind.
        """
        kinds = check_kinds(kinds)
        gone = {name: "left out by kind" for name, layer in self._by_name.items() if layer.kind.name in kinds}
        for pattern in patterns:
            names = fnmatch.filter(self._by_name, pattern)
            if not names:
                raise ValueError(
                    f"No layer's name matches {pattern!r}; the layers are {', '.join(self._by_name)}."
                )
            gone |= dict.fromkeys(names, "left out by Layers.without")
        if not gone:
            return self
        left = {
            path: (shape, why)
            for name, why in gone.items()
            for path, shape in self._by_name[name].leaf_shapes().items()
        }
        # What a layer that is left out feeds is fed by what fed it.
        flows = {name: self._by_name[name].flow for name in gone}
        layers = (
            dataclasses.replace(layer, order=order, flow=layer.flow.bypassing(flows))
            for order, layer in enumerate(layer for layer in self._layers if layer.name not in gone)
        )
        return Layers(
            tuple(layers),
            (*self.rest, *left),
            (*self.reasons, *(why for _, why in left.values())),
            (*self._shapes, *(shape for shape, _ in left.values())),
            self.outputs,
            self.unregistered,
        )

    def leaf_shapes(self) -> dict[Path, tuple[int, ...]]:
        """{key path: shape} of all parameters, in layers and outside."""
        inside = {path: shape for layer in self._layers for path, shape in layer.leaf_shapes().items()}
        return inside | dict(zip(self.rest, self._shapes, strict=True))

    def configured_like(self, other: Layers) -> Layers:
        """The layers that `other` has kept, with its approximations and its sharing."""
        out = {layer.name for layer in self._layers if {path for _, path in layer.paths} <= set(other.rest)}
        kept = self
        for name in out:
            kept = kept.without(glob.escape(name))

        def like(layer: Layer) -> Layer:
            theirs = other._by_name.get(layer.name)
            if theirs is None or type(theirs.kind) is not type(layer.kind):
                return layer
            # The padding is this batch's, for images of its size.
            return dataclasses.replace(layer, kind=layer.kind.like(theirs.kind), sharing=theirs.sharing)

        return kept._with(map(like, kept._layers))

    def table(self, max_dim: int | None = None) -> str:
        """The layers as an aligned table, with the bytes of state and the cost of a refresh under `max_dim`."""
        sizes = tuple(map(math.prod, self._shapes))
        return table.layer_table(self._layers, self.rest, self.reasons, sizes, max_dim)


def require_layers(layers: Any) -> None:
    """Raises TypeError for what are no layers."""
    if not isinstance(layers, Layers):
        raise TypeError(
            f"layers must be what kfe.find_layers(loss_fn, params, ...) returns, not a {type(layers).__name__}."
        )


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The names of kinds of layers; raises ValueError for one that does not exist."""
    given = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for name in given:
        if name not in KINDS:
            raise ValueError(f"There is no kind of layer {name!r}; the kinds are {', '.join(KINDS)}.")
    return given


def _configured(layer: Layer, approximation: str, options: Mapping[str, Any]) -> Kind:
    try:
        kind = layer.kind.configured(approximation, options)
        kind.check(layer.kernel_shape)
        if layer.mixed and kind != kind.plain():
            raise ValueError(
                f"it is also used with input and output exchanged, of which approximation={approximation!r} knows nothing"
            )
    except ValueError as error:
        raise ValueError(f"Layer {layer.name!r}: {error}.") from None
    return kind


def _check_sharing(layer: Layer) -> None:
    checks.one_of("sharing", layer.sharing, Sharing)
    if layer.sharing == "expand":
        return
    trouble = None
    if layer.kind.approximation.startswith("sua"):
        trouble = (
            f"approximation={layer.kind.approximation!r} is about single positions: combine it with 'expand'"
        )
    elif layer.mixed:
        trouble = "its uses with input and output exchanged have no common mean with the others: leave it at 'expand'"
    elif not layer.has_rows and not layer.per_example:
        trouble = (
            "its examples are not known (a vmap over examples, batches of different sizes, or a leading axis that is not shown "
            "to be the batch): leave it at 'expand'"
        )
    if trouble:
        raise ValueError(f"Layer {layer.name!r} cannot have sharing='reduce': {trouble}.")


def same_layers(expected: Layers, found: Layers) -> str | None:
    """What differs between the layers an optimizer was built for and those of the present call; None when nothing does."""
    for name in expected:
        if name not in found:
            return f"layer {name!r} is gone"
        if _form(expected[name]) != _form(found[name]):
            fields = [
                f.name
                for f in dataclasses.fields(Layer)
                if f.compare and getattr(expected[name], f.name) != getattr(found[name], f.name)
            ]
            old, new = (
                ", ".join(f"{f}={getattr(layers[name], f)}" for f in fields) for layers in (expected, found)
            )
            return f"layer {name!r} was found with {old} and now has {new}"
    extra = [name for name in found if name not in expected]
    if extra:
        return f"layer {extra[0]!r} is new"
    if set(expected.rest) != set(found.rest):
        changed = set(expected.rest) ^ set(found.rest)
        return f"the parameters outside the layers differ ({', '.join(map(path_name, sorted(changed, key=str)))})"
    return None


def _form(layer: Layer) -> Layer:
    return dataclasses.replace(layer, kind=layer.kind.form())
