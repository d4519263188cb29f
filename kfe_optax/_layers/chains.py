"""From layers to chains, in which each layer feeds the next one and that one alone; stacked layers are taken apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from kfe_optax._layers.flow import BEFORE, LAST, SAME, End, Source
from kfe_optax._layers.identity import largest_side
from kfe_optax._layers.layer import Layer
from kfe_optax._layers.layers import Layers

Chains = Literal["whole", "split"] | Sequence[Sequence[str]]

_ACCEPTED = (
    "chains must be 'whole', 'split' or lists of layer names, one a chain, such as [['first', 'second'], ...]"
)


class Element(NamedTuple):
    """A member of a chain: a layer, or one of the layers of a stack.

    Attributes:
      layer: its name.
      index: its place in the stack; None for a layer that is not stacked by one scan.
    """

    layer: str
    index: int | None = None

    def __str__(self) -> str:
        return self.layer if self.index is None else f"{self.layer}[{self.index}]"


Chain = tuple[Element, ...]
Graph = dict[Element | End, frozenset[Element | End]]


class Plan(NamedTuple):
    """The layers of a network by chain.

    Attributes:
      chains: the chains, in the order of the forward pass; those of one are members of a stack that is partly in longer ones.
      alone: the layers that are, with all of their stack, chains of one.
    """

    chains: tuple[Chain, ...]
    alone: tuple[str, ...]

    def among(self, names: Iterable[str]) -> Plan:
        """The plan of some of the layers; a chain is cut where a layer is missing."""
        present = frozenset(names)
        pieces = []
        for chain in self.chains:
            for there, piece in itertools.groupby(chain, lambda element: element.layer in present):
                pieces += [tuple(piece)] if there else []
        return Plan(tuple(pieces), tuple(name for name in self.alone if name in present))


def find_chains(layers: Layers, chains: Chains, max_dim: int | None) -> Plan:
    """The chains of a network.

    Args:
      layers: the layers.
      chains: "whole": all of them are one chain. "split": a layer that one layer alone feeds, and that one nothing else,
        continues its chain, where their statistics can be paired. The data count as a layer before the others, but for masks
        and what is the same for all examples (see `_tracing.origins`), and the loss as one behind them. Or the names of the
        layers of each chain, in order, whatever feeds them; layers that are not named are chains of one, and stacked layers
        of one scan take turns.
      max_dim: a side larger than this is a diagonal, which cannot be paired.

    Raises:
      TypeError: chains that are neither.
      ValueError: no such chain: the message names the layer that breaks it.
    """
    if isinstance(chains, str):
        if chains not in ("whole", "split"):
            raise ValueError(f"{_ACCEPTED}, not {chains!r}.")
        elements = [e for loop in _by_loop(layers.values()) for e in _unrolled(loop)]
        before = _predecessors(layers)
        fed = _successors(elements, before)
        if chains == "whole":
            _check_whole(elements, before, fed)
            found = [tuple(elements)]
        else:
            found = _split(layers, elements, before, fed, max_dim)
    elif isinstance(chains, Iterable):
        found = _listed(layers, chains)
    else:
        raise TypeError(f"{_ACCEPTED}, not {chains!r}.")
    for chain in found:
        _check_pairs(layers, chain, max_dim)
    joined = {element.layer for chain in found if len(chain) > 1 for element in chain}
    return Plan(
        tuple(chain for chain in found if chain[0].layer in joined),
        tuple(name for name in layers if name not in joined),
    )


def _by_loop(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Runs of layers that one scan stacks; each other layer by itself."""

    def key(pair):
        place, layer = pair
        return (layer.flow.loop, layer.stacked) if layer.flow.loop else -place - 1

    return [[layer for _, layer in run] for _, run in itertools.groupby(enumerate(layers), key)]


def _unrolled(run: Sequence[Layer]) -> list[Element]:
    """The elements of the layers of one scan in the order in which they run."""
    if not run[0].flow.loop:
        return [Element(layer.name) for layer in run]
    return [Element(layer.name, i) for i in range(run[0].stacked[0]) for layer in run]


def _elements(layer: Layer) -> list[Element]:
    return _unrolled([layer])


def _predecessors(layers: Layers) -> Graph:
    """What feeds each element, and the loss, directly."""

    def at(source: Source, index: int | None) -> Sequence[Element | End]:
        if source.layer is End.DATA:
            return [End.DATA]
        layer = layers.get(source.layer)
        if layer is None or not layer.flow.loop:
            return [Element(source.layer)]
        elements = _elements(layer)
        if source.when == LAST:
            return elements[-1:]
        if index is None or source.when not in (SAME, BEFORE):
            return elements
        return [elements[index - (source.when == BEFORE)]]

    found: Graph = {}
    for layer in layers.values():
        found[End.LOSS] = frozenset(e for s in layer.flow.loss for e in at(s, None))
        for element in _elements(layer):
            sources = {0: layer.flow.first, None: (*layer.flow.first, *layer.flow.later)}.get(
                element.index, layer.flow.later
            )
            found[element] = frozenset(e for s in sources for e in at(s, element.index))
    return found


def _successors(elements: list[Element], before: Graph) -> Graph:
    """What each element feeds directly."""
    readers = [*elements, End.LOSS]
    return {
        element: frozenset(reader for reader in readers if element in before[reader]) for element in elements
    }


def _check_whole(elements: list[Element], before: Graph, fed: Graph) -> None:
    for element, expected in zip(elements, [End.DATA, *elements], strict=False):
        first = expected is End.DATA
        # The input of a first layer may be a constant.
        if before[element] == {expected} or (first and not before[element]):
            continue
        where = "as the first layer" if first else f"after layer {str(expected)!r}"
        _refuse(f"layer {str(element)!r} stands {where} and is fed by {_names(before[element])}")
    for element in elements[:-1]:
        if End.LOSS in fed[element]:
            _refuse(f"layer {str(element)!r} feeds {_names(fed[element])}")


def _names(found: Iterable[Element | End]) -> str:
    """Layers in the order of their names, the data and the loss last."""
    return " and ".join(map(str, sorted(found, key=lambda e: (isinstance(e, End), str(e))))) or "no layer"


def _refuse(reason: str) -> None:
    raise ValueError(
        f"The network is not a chain of layers: {reason}. With chains='whole' the data must feed the first layer alone, each "
        "layer the next one alone, and the last one the loss (no residual connections, no branches). Choose chains='split' for "
        "the chains that the network contains, or name them: chains=[['first', 'second'], ...]."
    )


def _split(
    layers: Layers, elements: list[Element], before: Graph, fed: Graph, max_dim: int | None
) -> list[Chain]:
    chains: list[list[Element]] = []
    ends: dict[Element, list[Element]] = {}
    for element in elements:
        previous = next(iter(before[element])) if len(before[element]) == 1 else None
        joined = isinstance(previous, Element) and previous in ends and fed[previous] == {element}
        if joined and not _trouble(layers[previous.layer], layers[element.layer], max_dim):
            chain = ends.pop(previous)
        else:
            chain = []
            chains.append(chain)
        chain.append(element)
        ends[element] = chain
    return [tuple(chain) for chain in chains]


def _listed(layers: Layers, chains: Any) -> list[Chain]:
    known = ", ".join(layers)
    seen: set[str] = set()
    found = []
    for names in chains:
        listed = isinstance(names, Iterable) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"chains must be a list of chains, each a list of layer names: not {names!r} as one of them."
            )
        for name in names:
            if name not in layers:
                raise ValueError(
                    f"chains names {name!r}, and there is no such layer; the layers are {known}."
                )
            if name in seen:
                raise ValueError(f"chains names {name!r} twice; a layer belongs to one chain.")
            seen.add(name)
        _check_order(layers, names)
        found += (
            [tuple(e for run in _by_loop(layers[name] for name in names) for e in _unrolled(run))]
            if names
            else []
        )
    return found + [(element,) for name in layers if name not in seen for element in _elements(layers[name])]


def _check_order(layers: Layers, names: Any) -> None:
    for first, second in itertools.pairwise(names):
        if layers[first].order > layers[second].order:
            raise ValueError(
                f"chains names {first!r} before {second!r}, which the forward pass runs first: name the layers of a chain in the "
                "order in which they run, as print(layers) lists them."
            )


def _check_pairs(layers: Layers, chain: Chain, max_dim: int | None) -> None:
    for first, second in itertools.pairwise(chain):
        trouble = _trouble(layers[first.layer], layers[second.layer], max_dim)
        if trouble:
            raise ValueError(
                f"Layers {str(first)!r} and {str(second)!r} cannot be neighbors in a chain: {trouble}. Choose chains='split', "
                "which makes a chain of one of a layer that cannot be paired, or name the chains without it: "
                "chains=[['first', 'second'], ...]."
            )


def _trouble(first: Layer, second: Layer, max_dim: int | None) -> str | None:
    """Why the statistics of two layers cannot be paired row by row."""
    for layer in (first, second):
        trouble = _own_trouble(layer, max_dim)
        if trouble:
            return f"{layer.name!r} {trouble}"
    if first.examples != second.examples:
        return f"they see {first.examples} and {second.examples} examples"
    positions = [1 if layer.sharing == "reduce" else layer.positions for layer in (first, second)]
    if positions[0] != positions[1]:
        return f"they have {positions[0]} and {positions[1]} positions an example, which do not correspond"
    return None


def _own_trouble(layer: Layer, max_dim: int | None) -> str | None:
    kind = layer.kind
    if not layer.has_rows:
        return f"{layer.why_sums}, so that its statistics are sums"
    if kind.statistics != "rows" or kind.per_example or any(kind.diagonal):
        return f"is a layer of kind {kind.name!r}, which has no rows to pair"
    if kind != kind.plain():
        return f"has approximation={kind.approximation!r}, whose A is not that of its rows"
    if kind.blocks(layer.kernel_shape):
        return "consists of blocks (groups)"
    if layer.stacked and not layer.flow.loop:
        return "is stacked by a vmap, by several scans or by one that runs backwards"
    if max(layer.sides) > (largest := largest_side(max_dim)):
        return f"has a side of {max(layer.sides)} > max_dim={largest}, which is kept as a diagonal"
    return None
