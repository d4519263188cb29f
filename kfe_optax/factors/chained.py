"""K-FAC's factors of chains of layers: A_ii, G_ii and, of neighbors, A_i,i+1 and G_i,i+1 (Martens & Grosse 2015, section 4.3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfe_optax._jax import counts, failures
from kfe_optax._layers.chains import Chain, Element, Plan
from kfe_optax._layers.layer import Layer
from kfe_optax._statistics import pairs
from kfe_optax._taps.taps import Pulled
from kfe_optax.factors import base
from kfe_optax.factors.base import ScalarOrSchedule, Source, Term
from kfe_optax.factors.kfac import estimate as kfac_estimate


class ChainFactors(NamedTuple):
    """The factors of one chain of L elements.

    Attributes:
      input: A_ii (d_in, d_in), L of them.
      output: G_ii (d_out, d_out), L of them.
      input_next: A_i,i+1, L − 1 of them.
      output_next: G_i,i+1, L − 1 of them.
    """

    input: tuple[jax.Array, ...]
    output: tuple[jax.Array, ...]
    input_next: tuple[jax.Array, ...]
    output_next: tuple[jax.Array, ...]


class ChainedState(NamedTuple):
    """Running averages of the factors: one decay and one batch for all of them.

    Attributes:
      updates: int32, how many batches went in.
      chains: the factors by the name of the chain, which is that of its first element.
      alone: {layer: its A and G} of the layers that are chains of one.
      failures: by reason (`kfe.Failure`), int32: estimates that were left out or bounded; that of a chain is one.
    """

    updates: jax.Array
    chains: dict[str, ChainFactors]
    alone: dict[str, Term]
    failures: jax.Array


class Chained(NamedTuple):
    """The estimator of a plan's factors; not one of `kfe.factors`, which know each layer by itself."""

    plan: Plan
    decay: ScalarOrSchedule

    needs_taps = True

    def init(self, layers: Sequence[Layer], max_dim: int | None) -> ChainedState:
        """Zeros."""
        base.check_max_dim(max_dim)
        known = {layer.name: layer for layer in layers}
        plan = self.plan.among(known)

        def zeros(chain: Chain) -> ChainFactors:
            own = [known[element.layer] for element in chain]

            def blocks(side: int, ahead: int) -> tuple[jax.Array, ...]:
                """Of each layer and the one `ahead` of it."""
                return tuple(
                    jnp.zeros((a.sides[side], b.sides[side]), a.factor_dtype)
                    for a, b in zip(own, own[ahead:], strict=False)
                )

            return ChainFactors(blocks(0, 0), blocks(1, 0), blocks(0, 1), blocks(1, 1))

        return ChainedState(
            jnp.zeros((), jnp.int32),
            {str(chain[0]): zeros(chain) for chain in plan.chains},
            {name: base.zero_term(known[name], max_dim) for name in plan.alone},
            failures.none(),
        )

    def update(self, state: ChainedState, source: Source, count: jax.Array) -> ChainedState:
        """One more batch."""
        rho = base.weight_of_past(counts.added(state.updates, 1), self.decay, count)
        chains, alone = estimate(self.plan.among(source.gradients), source, state.alone)
        chains, chain_failures = base.average(state.chains, chains, rho, lambda c: (c.input, c.output))
        alone, more = base.average(state.alone, alone, rho)
        failed = counts.added(state.failures, more + chain_failures)
        return ChainedState(counts.added(state.updates, 1), chains, alone, failed)


def estimate(
    plan: Plan, source: Source, alone: dict[str, Term]
) -> tuple[dict[str, ChainFactors], dict[str, Term]]:
    """The factors of one batch: those of the chains, and of the layers alone in the form that `alone` has."""
    assert source.pulled is not None
    along = _Along(source.pulled, plan.chains)
    members = {element.layer for chain in plan.chains for element in chain}
    diagonal = {name: base.is_diagonal(source.layers[name], term) for name, term in alone.items()}
    diagonal |= dict.fromkeys(members, (False, False))
    terms = kfac_estimate(source._replace(pulled=along), diagonal)
    chains = {}
    for chain, inputs, outputs in zip(plan.chains, along.input_pairs, along.output_pairs, strict=True):
        own = [terms[e.layer] if e.index is None else _at(terms[e.layer], e.index) for e in chain]
        chains[str(chain[0])] = ChainFactors(
            tuple(term.input for term in own), tuple(term.output for term in own), inputs, outputs
        )
    return chains, {name: terms[name] for name in alone}


def _at(term: Term, index: int) -> Term:
    return Term(term.input[index], term.output[index])


class _Along(Pulled):
    """`Pulled` whose reduction forms the pairs of a plan's chains along with what is asked of them, in the same draws."""

    def __init__(self, pulled: Pulled, chains: tuple[Chain, ...]):
        self._pulled = pulled
        self._chains = chains
        self.input_pairs: Any = None
        self.output_pairs: Any = None

    def both(self, inputs: Callable[[Any], Any], outputs: Callable[[Any], Any]) -> tuple[Any, Any]:
        (of_inputs, self.input_pairs), (of_outputs, self.output_pairs) = self._pulled.both(
            lambda s: (inputs(s), self._of(s, pairs.cross_input)),
            lambda s: (outputs(s), self._of(s, pairs.cross_output)),
        )
        return of_inputs, of_outputs

    def _of(self, statistics: dict[str, Any], pair: Callable[..., jax.Array]) -> list[tuple[jax.Array, ...]]:
        def member(element: Element):
            return statistics[element.layer], element.index

        return [
            tuple(pair(member(a), member(b)) for a, b in itertools.pairwise(chain)) for chain in self._chains
        ]
