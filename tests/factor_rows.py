"""A loss whose layers have any rows one likes, every estimator of the registry on it, and the same estimates built densely.

With Σ_t ⟨g_{n,t}, W̄ᵀ ā_{n,t}⟩ averaged over n as the loss, the empirical Fisher's rows are the arguments ā and g themselves, so
that the dense computation reads nothing that the library has computed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import kfe_optax as kfe
from kfe_optax.factors.base import Source

from . import dense_factors as df
from .dense_optimizers import Average

EXAMPLES = 8
# {layer: (stacked, positions, d_in, d_out)}; "twice" uses its parameters twice, once for each position.
SHAPES = {
    "dense": (0, 1, 4, 4),
    "positions": (0, 3, 3, 4),
    "stack": (2, 1, 4, 3),
    "twice": (0, 2, 4, 3),
}
WHOLE, DIAGONAL = 8192, 3  # max_dim: every side a matrix; sides of 4 diagonal
TIGHT = {"tolerance": 1e-13, "max_iterations": 20000}
FISMO_DAMPING = 0.1
SUBSPACE = {"tolerance": 1e-13, "subspace": 6, "max_restarts": 500}


def estimators(decay):
    """Each factors estimator, the iterative ones run to rounding."""
    return {
        "kfac": kfe.factors.kfac(decay),
        "tkfac": kfe.factors.tkfac(decay),
        "tkfac_example": kfe.factors.tkfac(decay, "example"),
        "tkfac_normalized": kfe.factors.tkfac(decay, averages="normalized"),
        "kpsvd": kfe.factors.kpsvd(decay, **TIGHT),
        "deflation": kfe.factors.deflation(decay, **TIGHT),
        "lanczos": kfe.factors.lanczos(decay, **SUBSPACE),
        "kfac_corrected": kfe.factors.kfac_corrected(decay, **TIGHT),
        "streaming": kfe.factors.streaming(2, decay, **SUBSPACE),
        "gradient": kfe.factors.gradient(decay),
        "fismo": kfe.factors.fismo(decay, FISMO_DAMPING),
    }


def fismo_side(old, v, other, decay, damping, diagonal):
    """The published update of one side from V and the other side, whose inverse whitens it."""
    new = v @ np.linalg.solve(other, v.T) / v.shape[1] + damping * np.trace(old) / len(old) * np.eye(len(old))
    new = decay * old + (1 - decay) * (np.diag(np.diag(new)) if diagonal else new)
    return len(new) * new / np.trace(new)


def names(max_dim):
    """The estimators that run: with diagonal sides not those that differ from others in nothing that a side touches."""
    return [
        n
        for n in estimators(0.0)
        if max_dim == WHOLE or n not in ("deflation", "streaming", "tkfac_normalized")
    ]


def names_of(estimator, max_dim):
    """The layers that an estimator can estimate: pairing by position needs rows. Fewer where a program is long to compile."""
    if estimator in ("tkfac", "tkfac_normalized"):
        return [name for name in SHAPES if name != "twice"]
    if estimator == "streaming" or (estimator in ("lanczos", "kfac_corrected") and max_dim == DIAGONAL):
        return ["positions", "stack"]
    return list(SHAPES)


def loss_fn(params, rows):
    def product(own, a, g):
        return jnp.sum(kfe.tag_dense(a, a @ own["kernel"], own) * g) / EXAMPLES

    def body(total, given):
        return total + product(*given), None

    total = product(params["dense"], *(v[:, 0] for v in rows["dense"]))
    total = total + product(params["positions"], *rows["positions"])
    total = jax.lax.scan(body, total, (params["stack"], *(v[..., 0, :] for v in rows["stack"])))[0]
    for position in range(2):
        total = total + product(params["twice"], *(v[:, position] for v in rows["twice"]))
    return total


def parameters():
    make = lambda s, d_in, d_out: {"kernel": jnp.ones((s, d_in, d_out) if s else (d_in, d_out))}
    return {name: make(s, d_in, d_out) for name, (s, _, d_in, d_out) in SHAPES.items()}


def random_rows(seed, size=1.0):
    """{layer: (ā (*stack, n, t, d_in), g (*stack, n, t, d_out))}, neither centered nor independent."""
    generator = np.random.default_rng(seed)
    rows = {}
    for name, (stacked, positions, d_in, d_out) in SHAPES.items():
        lead = (*([stacked] if stacked else []), EXAMPLES, positions)
        a = generator.normal(size=(*lead, d_in)) + 0.5
        g = size * generator.normal(size=(*lead, d_out)) * (1 + a[..., :1] ** 2)
        rows[name] = (a, g)
    return rows


@functools.cache
def layers():
    found = kfe.find_layers(loss_fn, parameters(), random_rows(0))
    assert list(found) == list(SHAPES)
    assert found["twice"].shared and found["stack"].stack_shape == (2,)
    return found


def init(decay, max_dim):
    found, own = layers(), estimators(decay)
    return {
        name: own[name].init([found[n] for n in names_of(name, max_dim)], max_dim) for name in names(max_dim)
    }


@functools.cache
def updater(decay):
    """(states, rows, count) → (new states, their terms), the estimators of the states compiled at once."""
    own, found = estimators(decay), layers()
    differentiate = kfe.value_grad_and_taps(loss_fn, found, fisher="empirical")

    @jax.jit
    def update(states, rows, count):
        params = parameters()
        _, grads, taps = differentiate(params, rows)
        gradients = {name: found[name].to_matrix(grads) for name in found}
        source = Source(found, taps.pulled(), gradients)
        states = {name: own[name].update(state, source, count) for name, state in states.items()}
        return states, {name: own[name].terms(state, found) for name, state in states.items()}

    return update


def members(rows, terms):
    """(key, ā (n, t, d_in), g (n, t, d_out), [(A, B), …]) of every layer, a stack taken apart; diagonals as matrices."""
    for name, own in terms.items():
        a, g = rows[name]
        stacked = SHAPES[name][0]
        pairs = [(np.asarray(term.input), np.asarray(term.output)) for term in own]
        for i in range(stacked or 1):
            pick = (lambda v, i=i: v[i]) if stacked else (lambda v: v)
            found = [tuple(expanded(pick(side)) for side in pair) for pair in pairs]
            yield (name, i), pick(a), pick(g), found


def expanded(side):
    return np.diag(side) if side.ndim == 1 else side


def side_basis(d, diagonal):
    """Orthonormal vec's that span what a side may be: the diagonal or the symmetric matrices."""
    return np.stack([np.diag(row).ravel() for row in np.eye(d)], 1) if diagonal else df.symmetric_basis(d)


def best_terms(f, d_in, d_out, rank, diagonal):
    """`dense_factors.best_terms` among the matrices that are diagonal on the sides that say so."""
    left, right = (side_basis(d, flag) for d, flag in zip((d_in, d_out), diagonal, strict=True))
    u, sigma, vt = np.linalg.svd(left.T @ df.rearrange(f, d_in, d_out) @ right, full_matrices=False)
    terms = []
    for i in range(rank):
        pair = (left @ u[:, i]).reshape(d_in, d_in), (right @ vt[i]).reshape(d_out, d_out)
        root = np.sqrt(sigma[i]) * (-1 if np.trace(pair[0]) < 0 else 1)
        terms.append((root * pair[0], root * pair[1]))
    return terms


class Reference:
    """One estimator of one layer, densely: `add` takes F and the factors of a batch and returns the terms so far."""

    def __init__(self, estimator, decay, max_dim):
        self.estimator, self.max_dim, self.decay = estimator, max_dim, decay
        averages = {
            "tkfac_normalized": df.NormalizedAverage,
            "tkfac": df.TkfacAverage,
            "tkfac_example": df.TkfacAverage,
        }
        self.average = averages.get(estimator, df.TermsAverage)(decay)
        self.sides = Average(decay), Average(decay)
        self.fishers = []
        self.whitened = None

    def add(self, f, kfac, tkfac, mean):
        """f (d, d), kfac (A, G), tkfac {pairing: (σ, Φ, Ψ)}, mean the mean gradient."""
        d_in, d_out = mean.shape
        diagonal = d_in > self.max_dim, d_out > self.max_dim
        keep = lambda side, flag: np.diag(np.diag(side)) if flag else side
        both = lambda pair: tuple(keep(side, flag) for side, flag in zip(pair, diagonal, strict=True))
        if "tkfac" in self.estimator:
            sigma, phi, psi = tkfac["example" if self.estimator == "tkfac_example" else "position"]
            return df.tkfac_terms(*self.average.add(sigma, *both((phi, psi))))
        if self.estimator == "fismo":
            p, q = self.whitened or (np.eye(d_in), np.eye(d_out))
            p = fismo_side(p, mean, q, self.decay, FISMO_DAMPING, diagonal[0])
            self.whitened = p, fismo_side(q, mean.T, p, self.decay, FISMO_DAMPING, diagonal[1])
            return [self.whitened]
        if self.estimator == "gradient":
            for side, new in zip(self.sides, both((mean @ mean.T, mean.T @ mean)), strict=True):
                side.add(new)
            left, right = (side.value for side in self.sides)
            return [(left / np.sqrt(np.trace(left)), right / np.sqrt(np.trace(left)))]
        best = functools.partial(best_terms, d_in=d_in, d_out=d_out, diagonal=diagonal)
        if self.estimator == "streaming":
            self.fishers.append(f)
            running, previous = 0.0, [(0.0, 0.0)] * 2
            for k, new in enumerate(self.fishers, 1):
                rho = min(1 - 1 / k, self.decay)
                terms = best(rho * running + (1 - rho) * new, rank=2)
                (p, q), (old_p, old_q) = terms[1], previous[1]
                if np.sum(p * old_p) + np.sum(q * old_q) < 0:
                    terms[1] = -p, -q
                running, previous = df.matrix(terms), terms
            if not any(diagonal):
                check = df.streaming(self.fishers, self.decay, 2, d_in, d_out)[-1]
                np.testing.assert_allclose(df.matrix(check), running, atol=1e-12 * np.linalg.norm(running))
            return terms
        first = both(kfac)
        new = {
            "kfac": lambda: [first],
            "kpsvd": lambda: best(f, rank=1),
            "deflation": lambda: best(f, rank=2),
            "lanczos": lambda: best(f, rank=2),
            "kfac_corrected": lambda: [first, *best(f - np.kron(*first), rank=1)],
        }[self.estimator]()
        return self.average.add(new)


def of_rows(a, g):
    """What `Reference.add` takes, from rows."""
    tkfac = {pairing: df.tkfac(a, g, pairing) for pairing in ("position", "example")}
    return df.fisher_of_rows(a, g), df.kfac(a, g), tkfac, df.examples(a, g).mean(0)
