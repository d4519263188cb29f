"""The Kronecker factorizations of one layer's Fisher block, built densely in float64; nothing here imports the library.

F = (1/N) Σ_n vec(M_n) vec(M_n)ᵀ is the block over row-major vec(W), W (d_in, d_out), and M_n = Σ_t a_{n,t} g_{n,t}ᵀ the gradient
of one example. An approximation is a list of terms [(R, S), (P, Q), …], F ≈ R⊗S + P⊗Q + ….

Sources: Koroko et al. 2022 (KPSVD, deflation, Lanczos, KFAC-corrected), Gao et al. 2020 (TKFAC, TEKFAC), Van Loan & Pitsianis
1993 (the rearrangement).
"""

from __future__ import annotations

import numpy as np

from . import dense
from .dense_optimizers import Average


def examples(a, g):
    """M_n = Σ_t a_{n,t} g_{n,t}ᵀ (n, d_in, d_out) from the rows a (n, t, d_in), g (n, t, d_out)."""
    return np.einsum("nti,ntj->nij", np.asarray(a, np.float64), np.asarray(g, np.float64))


def fisher(m):
    """F from example gradients m (n, d_in, d_out)."""
    flat = np.asarray(m, np.float64).reshape(len(m), -1)
    return flat.T @ flat / len(m)


def fisher_of_rows(a, g):
    return fisher(examples(a, g))


def matrix(terms):
    """Σ R⊗S of a list of terms."""
    return sum(np.kron(r, s) for r, s in terms)


def rearrange(f, d_in, d_out):
    """Z(F) (d_in², d_out²), the linear map with Z(A⊗B) = vec(A) vec(B)ᵀ."""
    return f.reshape(d_in, d_out, d_in, d_out).transpose(0, 2, 1, 3).reshape(d_in**2, d_out**2)


def unrearrange(z, d_in, d_out):
    return z.reshape(d_in, d_in, d_out, d_out).transpose(0, 2, 1, 3).reshape(d_in * d_out, d_in * d_out)


def symmetric_basis(d):
    """Orthonormal columns (d², d(d+1)/2) that span vec of the symmetric matrices."""
    unit = np.eye(d)
    pairs = [(unit[i], unit[j]) for i in range(d) for j in range(i, d)]
    columns = np.stack([(np.outer(x, y) + np.outer(y, x)).ravel() for x, y in pairs], 1)
    return columns / np.linalg.norm(columns, axis=0)


def symmetric_svd(f, d_in, d_out):
    """The SVD of Z(F) restricted to symmetric matrices on both sides: [(σ, U (d_in, d_in), V (d_out, d_out))], σ descending.

    Z(F) maps symmetric matrices to symmetric and skew to skew. The skew part vanishes with one position per example; with shared
    positions it does not, and the papers' methods, which start from a symmetric matrix, never leave the symmetric part. Signs:
    tr U ≥ 0, which for a positive semi-definite F makes U and V of the leading triple positive semi-definite.
    """
    left, right = symmetric_basis(d_in), symmetric_basis(d_out)
    u, sigma, vt = np.linalg.svd(left.T @ rearrange(f, d_in, d_out) @ right, full_matrices=False)
    triples = []
    for i, value in enumerate(sigma):
        u_i, v_i = (left @ u[:, i]).reshape(d_in, d_in), (right @ vt[i]).reshape(d_out, d_out)
        sign = -1.0 if np.trace(u_i) < 0 else 1.0
        triples.append((value, sign * u_i, sign * v_i))
    return triples


def best_terms(f, d_in, d_out, rank):
    """The best sum of `rank` Kronecker products of symmetric matrices, [(√σ U, √σ V)]."""
    triples = symmetric_svd(f, d_in, d_out)[:rank]
    return [(np.sqrt(sigma) * u, np.sqrt(sigma) * v) for sigma, u, v in triples]


def kpsvd(f, d_in, d_out):
    return best_terms(f, d_in, d_out, 1)


def deflation(f, d_in, d_out):
    return best_terms(f, d_in, d_out, 2)


lanczos = deflation  # two ways to compute the same pair of triples


def kfac_corrected(f, a, g):
    """[(A, G)] and the best symmetric rank 1 of F − A⊗G."""
    return [(a, g), *best_terms(f - np.kron(a, g), len(a), len(g), 1)]


def streaming(fs, decay, rank, d_in, d_out):
    """The terms after each block of `fs`: F̂ ← best rank r of ρ_k F̂ + (1 − ρ_k) F_k, ρ_k = min(1 − 1/k, decay)."""
    history, running = [], 0.0
    for k, f in enumerate(fs, 1):
        rho = min(1 - 1 / k, decay)
        history.append(best_terms(rho * running + (1 - rho) * f, d_in, d_out, rank))
        running = matrix(history[-1])
    return history


def kfac(a, g):
    """A = mean over n and t of a aᵀ, G = (1/N) Σ_{n,t} g gᵀ."""
    n, t = a.shape[:2]
    return np.einsum("nti,ntj->ij", a, a) / (n * t), np.einsum("nti,ntj->ij", g, g) / n


def tkfac(a, g, pairing="position"):
    """(σ, Φ, Ψ), F ≈ σ Φ⊗Ψ, tr Φ = tr Ψ = 1.

    "position": Λ = a aᵀ with Γ = g gᵀ of the same position (the paper), σ = E Σ_t tr Λ_t tr Γ_t. "example": Λ⊗Γ traced out of
    vec(M) vec(M)ᵀ itself, σ = E‖M‖² = tr F. The same with one position per example.
    """
    n = len(a)
    if pairing == "position":
        of_a, of_g = np.sum(a**2, -1), np.sum(g**2, -1)
        sigma = np.sum(of_a * of_g) / n
        phi = np.einsum("nt,nti,ntj->ij", of_g, a, a) / n
        psi = np.einsum("nt,nti,ntj->ij", of_a, g, g) / n
    elif pairing == "example":
        m = examples(a, g)
        sigma = np.sum(m**2) / n
        phi, psi = np.einsum("nik,njk->ij", m, m) / n, np.einsum("nki,nkj->ij", m, m) / n
    else:
        raise ValueError(pairing)
    return sigma, phi / sigma, psi / sigma


def tkfac_terms(sigma, phi, psi):
    """[(√σ Φ, √σ Ψ)], the pair that is damped."""
    return [(np.sqrt(sigma) * phi, np.sqrt(sigma) * psi)]


class TermsAverage:
    """Running averages of every side of every term, ρ_k = min(1 − 1/k, decay).

    The sign of a new (P, Q) (every term but the first) is free: both are flipped when
    ⟨P_new, P_old⟩ + ⟨Q_new, Q_old⟩ < 0, P_old and Q_old being the averages so far.
    """

    def __init__(self, decay):
        self.decay = decay
        self.pairs: list[tuple[Average, Average]] = []

    def add(self, terms):
        if not self.pairs:
            self.pairs = [(Average(self.decay), Average(self.decay)) for _ in terms]
        for i, ((left, right), (p, q)) in enumerate(zip(self.pairs, terms, strict=True)):
            flip = i > 0 and np.sum(p * left.value) + np.sum(q * right.value) < 0
            left.add(-p if flip else p)
            right.add(-q if flip else q)
        return self.terms

    @property
    def terms(self):
        return [(left.value, right.value) for left, right in self.pairs]


class TkfacAverage:
    """Running averages of σ, σΦ and σΨ, divided on use, so that the traces stay 1 and σ is the average of σ."""

    def __init__(self, decay):
        self.sigma, self.phi, self.psi = Average(decay), Average(decay), Average(decay)

    def add(self, sigma, phi, psi):
        self.sigma.add(sigma)
        self.phi.add(sigma * phi)
        self.psi.add(sigma * psi)
        return self.value

    @property
    def value(self):
        return self.sigma.value, self.phi.value / self.sigma.value, self.psi.value / self.sigma.value


class NormalizedAverage(TkfacAverage):
    """Running averages of σ, Φ and Ψ themselves, as the paper prints them."""

    def add(self, sigma, phi, psi):
        self.sigma.add(sigma)
        self.phi.add(phi)
        self.psi.add(psi)
        return self.value

    @property
    def value(self):
        return self.sigma.value, self.phi.value, self.psi.value


def damp(a, b, damping, form):
    """The damped pair: "factored" (with π, 1 when a trace is 0), "sqrt" (√λ on both) or "linear" (λ on both)."""
    ratio = 1.0
    if form == "factored" and np.trace(a) > 0 and np.trace(b) > 0:
        ratio = dense.pi(a, b)
    amount = {"factored": np.sqrt(damping), "sqrt": np.sqrt(damping), "linear": damping}[form]
    return a + ratio * amount * np.eye(len(a)), b + amount / ratio * np.eye(len(b))


def inverse_root(a):
    """The symmetric A^(−1/2)."""
    s, u = np.linalg.eigh(a)
    return (u / np.sqrt(s)) @ u.T


def solve_two_terms(a, b, c, d, v, sign=1, denominators="exact", floor=0.0):
    """(A⊗B ± C⊗D)⁻¹ vec(V), A and B positive definite, the second term undamped.

    "exact": the Kronecker sum itself. Otherwise K₁[(K₁ᵀ V K₂) ⊘ D]K₂ᵀ with D = 1 + |s₁||s₂|ᵀ ("absolute", for the sign + only) or
    D = max(1 ± s₁s₂ᵀ, floor) ("clip"); s₁, s₂ are the eigenvalues of A^(−1/2) C A^(−1/2) and B^(−1/2) D B^(−1/2).
    """
    if denominators == "exact":
        return np.linalg.solve(np.kron(a, b) + sign * np.kron(c, d), v.ravel()).reshape(v.shape)
    root_a, root_b = inverse_root(a), inverse_root(b)
    s_1, e_1 = np.linalg.eigh(root_a @ c @ root_a)
    s_2, e_2 = np.linalg.eigh(root_b @ d @ root_b)
    if denominators == "absolute" and sign == 1:
        divisor = 1 + np.outer(np.abs(s_1), np.abs(s_2))
    elif denominators == "clip":
        divisor = np.maximum(1 + sign * np.outer(s_1, s_2), floor)
    else:
        raise ValueError((denominators, sign))
    k_1, k_2 = root_a @ e_1, root_b @ e_2
    return k_1 @ ((k_1.T @ v @ k_2) / divisor) @ k_2.T


def precondition(terms, v, damping, form="factored", denominators="exact", floor=0.0):
    """The damped inverse of a list of terms applied to V; `form` damps the first term, "exact" adds λI to their sum."""
    if form == "exact":
        total = matrix(terms) + damping * np.eye(v.size)
    else:
        (first, *rest) = terms
        a, b = damp(*first, damping, form)
        if denominators != "exact" and rest:
            ((c, d),) = rest
            return solve_two_terms(a, b, c, d, v, 1, denominators, floor)
        total = matrix([(a, b), *rest])
    return np.linalg.solve(total, v.ravel()).reshape(v.shape)


def best_diagonal(f, u_a, u_g):
    """Θ (d_in, d_out), the diagonal of (U_A⊗U_G)ᵀ F (U_A⊗U_G)."""
    return dense.diagonal_in(f, np.kron(u_a, u_g)).reshape(len(u_a), len(u_g))


def in_basis(theta, u_a, u_g):
    """(U_A⊗U_G) diag Θ (U_A⊗U_G)ᵀ."""
    u = np.kron(u_a, u_g)
    return (u * theta.ravel()) @ u.T


def tekfac_denominators(thetas, damping, conv, trace_tuned=False, threshold=0.01):
    """What the rotated gradients are divided by, layer by layer; `conv` says which layers are convolutions.

    Plain: Θ + λ. Trace-tuned: Θ + λ_l with λ_l = max(tr Θ_l, ϑ)/(d_in d_out) in convolutions, β(Θ + λ) in fully connected
    layers with β the largest λ_l (1 without convolutions).
    """
    if not trace_tuned:
        return [theta + damping for theta in thetas]
    tuned = [max(np.sum(theta), threshold) / theta.size for theta in thetas]
    beta = max((t for t, is_conv in zip(tuned, conv, strict=True) if is_conv), default=1.0)
    layers = zip(thetas, tuned, conv, strict=True)
    return [theta + own if is_conv else beta * (theta + damping) for theta, own, is_conv in layers]
