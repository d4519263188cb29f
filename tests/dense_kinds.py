"""Every kind of layer from its definition in float64 numpy, by explicit loops; nothing here imports the library.

A layer is a set of rows: ā (*blocks, n, t, d_in) and, one a column of the Fisher matrix at the outputs, g (*blocks, c, n, t,
d_out), so that M = Σ_t ā gᵀ of an example and a column and F = E_n Σ_c vec(M) vec(M)ᵀ.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

# Convolutions.


def folded(i, size, padding):
    """Which of `size` elements stands at place i, inside or outside, of a row that continues periodically or by reflection."""
    if padding == "CIRCULAR":
        return i % size
    if padding == "REFLECT":
        while not 0 <= i < size:
            i = -i if i < 0 else 2 * (size - 1) - i
        return i
    return i if 0 <= i < size else None


def sources(size, window, stride=1, padding="VALID", input_dilation=1, kernel_dilation=1):
    """For each output position, and each offset in the window, which input element is read; None for a zero. One axis."""
    reach = (window - 1) * kernel_dilation + 1
    line, before, after = list(range(size)), 0, 0
    if padding in ("CIRCULAR", "REFLECT"):
        line = [folded(i, size, padding) for i in range(-((reach - 1) // 2), size + reach // 2)]
    elif padding == "CAUSAL":
        line = [None] * (reach - 1) + line
    elif padding in ("SAME", "SAME_LOWER"):
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
        before = total // 2 if padding == "SAME" else total - total // 2
        after = total - before
    elif padding != "VALID":
        before, after = padding
    spread = []
    for element in line:
        spread += [element] + [None] * (input_dilation - 1)
    spread = spread[: len(spread) - (input_dilation - 1)]
    spread = spread[-before:] if before < 0 else [None] * before + spread
    spread = spread[:after] if after < 0 else spread + [None] * after
    count = (len(spread) - reach) // stride + 1
    return [[spread[p * stride + o * kernel_dilation] for o in range(window)] for p in range(count)]


def transposed_sources(size, window, stride=1, padding="VALID", kernel_dilation=1):
    """The same table for a transposed convolution: element i adds to output i · stride + before − offset · dilation."""
    reach = (window - 1) * kernel_dilation + 1
    if padding == "SAME":
        count = size * stride
        before = reach - 1 if stride > reach - 1 else math.ceil((reach + stride - 2) / 2)
    elif padding == "VALID":
        count, before = size * stride + max(reach - stride, 0), reach - 1
    else:
        before = padding[0]
        count = (size - 1) * stride + 1 + sum(padding) - reach + 1
    table = [[None] * window for _ in range(count)]
    for i, offset in itertools.product(range(size), range(window)):
        position = i * stride + before - offset * kernel_dilation
        if 0 <= position < count:
            table[position][offset] = i
    return table


def patches(x, tables):
    """(n, *spatial, c) → (n, T, K, c): the inputs under the window at each output position, `tables` one a spatial axis."""
    positions = list(itertools.product(*(range(len(table)) for table in tables)))
    offsets = list(itertools.product(*(range(len(table[0])) for table in tables)))
    found = np.zeros((len(x), len(positions), len(offsets), x.shape[-1]))
    for t, position in enumerate(positions):
        for k, offset in enumerate(offsets):
            place = [table[p][o] for table, p, o in zip(tables, position, offset, strict=True)]
            if None in place:
                continue
            for channel in range(x.shape[-1]):
                found[:, t, k, channel] = x[(slice(None), *place, channel)]
    return found


def bordered(rows):
    """[a; 1]."""
    return np.concatenate([rows, np.ones((*rows.shape[:-1], 1))], -1)


def conv_rows(x, tables, bias, groups=1):
    """ā of a convolution: (n, t, K c + bias), or (groups, n, t, ...) with feature groups."""
    found = patches(x, tables)
    size = x.shape[-1] // groups
    rows = [found[..., i * size : (i + 1) * size].reshape(*found.shape[:2], -1) for i in range(groups)]
    rows = [bordered(r) if bias else r for r in rows]
    return np.stack(rows) if groups > 1 else rows[0]


def split(values, groups):
    """The last axis cut into groups, which come first; as it is for one group."""
    return values if groups == 1 else np.stack(np.split(values, groups, -1))


def sua(x, offsets, bias, centered):
    """A of "sua" from inputs (n, *spatial, c): channels at different offsets uncorrelated, the same at every place."""
    flat = x.reshape(-1, x.shape[-1])
    second = sum(np.outer(row, row) for row in flat) / len(flat)
    mean = flat.mean(0)
    if not centered:
        result = np.zeros((len(mean) + bias,) * 2)
        result[: len(mean), : len(mean)] = second
        if bias:
            result[-1, -1] = 1
        return result
    side = offsets * len(mean)
    result = np.zeros((side + bias,) * 2)
    for k in range(offsets):
        own = slice(k * len(mean), (k + 1) * len(mean))
        result[own, own] = second - np.outer(mean, mean)
    m = np.concatenate([mean] * offsets + [np.ones(1)] * bias)
    return result + np.outer(m, m)


# Linear maps of one kernel.


def map_rows(formula, x, y, kernel, bias):
    """(ā, a function of g like y) of "inputs,kernel->outputs", element by element: letters in the kernel's order, blocks first.

    With a bias each output has one, so that the 1 is the last of ā.
    """
    operands, outputs = formula.split("->")
    inputs, weights = operands.split(",")
    size = dict(zip(inputs + weights, x.shape + kernel, strict=True))
    blocks = [c for c in weights if c in inputs and c in outputs]
    ins = [c for c in weights if c not in outputs]
    outs = [c for c in weights if c not in inputs]
    free = [c for c in inputs if c not in weights]

    def gathered(values, labels, features):
        order = blocks + free + features
        found = np.zeros([*values.shape[: values.ndim - len(labels)], *(size[c] for c in order)])
        for place in itertools.product(*(range(size[c]) for c in order)):
            at = dict(zip(order, place, strict=True))
            found[(..., *place)] = values[(..., *(at[c] for c in labels))]
        lead = found.shape[: values.ndim - len(labels)]
        block = (math.prod(size[c] for c in blocks),) if blocks else ()
        n = (size[free[0]], math.prod(size[c] for c in free[1:])) if free else (1, 1)
        found = found.reshape(*lead, *block, *n, math.prod(size[c] for c in features))
        return np.moveaxis(found, len(lead), 0) if block else found

    rows = gathered(x, inputs, ins)
    return bordered(rows) if bias else rows, lambda g: gathered(g, outputs, outs)


def map_matrix(formula, kernel, bias=None):
    """W̄ of `map_rows`; the bias has the outputs' letters that the kernel has, in the order of the outputs."""
    operands, outputs = formula.split("->")
    inputs, weights = operands.split(",")
    blocks = [c for c in weights if c in inputs and c in outputs]
    ins = [c for c in weights if c not in outputs]
    outs = [c for c in weights if c not in inputs]
    size = dict(zip(weights, kernel.shape, strict=True))
    b, i, o = (math.prod(size[c] for c in group) for group in (blocks, ins, outs))
    matrix = np.zeros((b, i + (bias is not None), o))
    for flat, place in enumerate(itertools.product(*(range(size[c]) for c in blocks + ins + outs))):
        at = dict(zip(blocks + ins + outs, place, strict=True))
        where = flat // (i * o), flat // o % i, flat % o
        matrix[where] = kernel[tuple(at[c] for c in weights)]
        if bias is not None:
            matrix[where[0], -1, where[2]] = bias[tuple(at[c] for c in outputs if c in weights)]
    return matrix if blocks else matrix[0]


def one_hot(tokens, vocabulary):
    rows = np.zeros((*tokens.shape, vocabulary))
    for place in itertools.product(*map(range, tokens.shape)):
        rows[(*place, tokens[place])] = 1
    return rows


# Normalizations.


def normalized(x, axes, epsilon, center=True):
    """(x − mean) / sqrt(variance + ε) over the axes, or x / sqrt(mean of squares + ε)."""
    mean = x.mean(axes, keepdims=True) if center else 0
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + epsilon)


def norm_rows(x_hat, g, parameters, axes):
    """Rows of γ and β from the Jacobian of y = γ∘x̂ + β and g (c, *x̂'s shape): ā = 1, g (features, c, n, 1, parameters)."""
    lead = g.ndim - x_hat.ndim
    features = [x_hat.shape[a] for a in axes]
    result = np.zeros((math.prod(features), *g.shape[:lead], len(x_hat), 1, len(parameters)))
    for j, place in enumerate(itertools.product(*map(range, features))):
        at = [slice(None)] * x_hat.ndim
        for axis, i in zip(axes, place, strict=True):
            at[axis] = slice(i, i + 1)
        for p, name in enumerate(parameters):
            derivative = x_hat[tuple(at)] if name == "scale" else np.ones_like(x_hat[tuple(at)])
            product = g[(..., *at)] * derivative
            result[j, ..., 0, p] = product.reshape(*g.shape[:lead], len(x_hat), -1).sum(-1)
    return np.ones((math.prod(features), len(x_hat), 1, 1)), result


# What a layer's rows say.


@dataclasses.dataclass
class Rows:
    """ā (*blocks, n, t, d_in), g (*blocks, c, n, t, d_out), and which positions (n, t) count."""

    a: np.ndarray
    g: np.ndarray
    live: np.ndarray | None = None

    def __post_init__(self):
        self.n = self.a.shape[-3]
        if self.live is None:
            self.live = np.ones(self.a.shape[-3:-1])
        self.a = self.a * self.live[..., None]
        self.g = self.g * self.live[..., None]

    def expand(self):
        """A = E[ā āᵀ] over all live positions, G = Σ_c E_n[Σ_t g gᵀ]."""
        a = np.einsum("...nti,...ntj->...ij", self.a, self.a) / max(self.live.sum(), 1)
        return a, np.einsum("...cnti,...cntj->...ij", self.g, self.g) / self.n

    def reduce(self):
        """A = E of the mean ā's square over examples with a live position, G = Σ_c E_n of the summed g's."""
        mean = self.a.sum(-2) / np.maximum(self.live.sum(-1), 1)[:, None]
        total = self.g.sum(-2)
        return (
            np.einsum("...ni,...nj->...ij", mean, mean) / max(self.live.any(-1).sum(), 1),
            np.einsum("...cni,...cnj->...ij", total, total) / self.n,
        )

    def gradients(self):
        """M (*blocks, c, n, d_in, d_out)."""
        return np.einsum("...nti,...cntj->...cnij", self.a, self.g)

    def second_moment(self, u_in, u_out):
        m = u_in[..., None, None, :, :].swapaxes(-1, -2) @ self.gradients() @ u_out[..., None, None, :, :]
        return (m**2).sum((-4, -3)) / self.n

    def contract_output(self, v):
        """E[M V Mᵀ]."""
        m = self.gradients()
        return np.einsum("...cnij,...jk,...cnlk->...il", m, v, m) / self.n

    def contract_input(self, u):
        """E[Mᵀ U M]."""
        m = self.gradients()
        return np.einsum("...cnij,...ik,...cnkl->...jl", m, u, m) / self.n

    def traced(self, pairing):
        """(σ, σΦ, σΨ) of TKFAC, each position or each example's gradient with its own traces."""
        if pairing == "example":
            eye_in, eye_out = np.eye(self.a.shape[-1]), np.eye(self.g.shape[-1])
            inputs = self.contract_output(np.broadcast_to(eye_out, (*self.g.shape[:-4], *eye_out.shape)))
            outputs = self.contract_input(np.broadcast_to(eye_in, (*self.a.shape[:-3], *eye_in.shape)))
            return np.trace(inputs, axis1=-2, axis2=-1), inputs, outputs
        lengths = (self.a**2).sum(-1), (self.g**2).sum(-1)
        return (
            np.einsum("...nt,...cnt->...", *lengths) / self.n,
            np.einsum("...nti,...ntj,...cnt->...ij", self.a, self.a, lengths[1]) / self.n,
            np.einsum("...cnti,...cntj,...nt->...ij", self.g, self.g, lengths[0]) / self.n,
        )


def merged(uses):
    """Several uses of one layer: the positions of all of them, one after the other."""
    live = np.concatenate([use.live for use in uses], -1)
    return Rows(np.concatenate([u.a for u in uses], -2), np.concatenate([u.g for u in uses], -2), live)


# The loss: cross-entropy of z = Σ over layers of tanh(y) H.


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def columns(z):
    """(c, n, C): L with Σ_c L Lᵀ the Hessian diag(p) − p pᵀ of the cross-entropy."""
    p = softmax(z)
    found = np.sqrt(p)[..., None] * (np.eye(z.shape[-1]) - p[..., None, :])
    return np.moveaxis(found, -2, 0)


def residual(z, labels):
    """(1, n, C): the gradient of each example's cross-entropy."""
    return (softmax(z) - np.eye(z.shape[-1])[labels])[None]


def through_head(y, head, rows):
    """g = rows · ∂z/∂y (c, *y's shape), of z = tanh(y) H with y (n, ...) and H (size, C); rows (c, n, C)."""
    jacobian = head[None] * (1 - np.tanh(y).reshape(len(y), -1, 1) ** 2)
    return np.einsum("nsk,cnk->cns", jacobian, rows).reshape(len(rows), *y.shape)
