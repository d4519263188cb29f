"""A paper model of what n data-parallel devices send, in bytes a device, with rings for all collectives (see `traffic`).

With P parameters in the layers, F = Σ (d_in² + d_out²) numbers in the factors (d for a diagonal side), D = Σ d_out², all of four
bytes, and r = (n − 1)/n:

    every step       gradient, all-reduce                                        2 r P
      inverses_and_apply: preconditioned gradients, gathered                     g(P), twice for EKFAC (into its basis and out)
      sharded: at least the updates, the product between the two sides,
        and the inverse or basis of one side, gathered                           r (2 P + D)
    a factor update  A and G, all-reduce                                         2 r F
    a refresh        inverses, inverses_and_apply: inverses or bases, gathered   g(F), with EKFAC's eigenvalues
      sharded: at least the factors, gathered where they are factorized          r F

For "sharded" these are the least that must move, since the compiler chooses how; measured on eight devices with nine layers of
width 128 (`scaling`) it sends 1.06 of it in every step and 1.4 in a refresh for K-FAC, and 1.9 of it for EKFAC, whose products
it takes as sums over shards. All other rows agree with the compiled programs within 0.2 %.

g(S) is r times what a stack of b equal matrices takes when it is padded to n ⌈b/n⌉ of them; where that would more than double it
the devices sum zeros and their own part instead, 2 r S. Factors could travel as triangles, at half of F; they do not.
Divided by their periods these are the bytes of a mean step. None of them grows with n: r is 1, and n ≫ b makes g(S) = 2 S. What
does grow with n is the latency of a ring, by 2 (n − 1) messages a collective: hence the factors go in one fused all-reduce.

What n divides is the work: of b equal matrices each device factorizes ⌈b/n⌉. Once there are more devices than matrices, the
largest of them is the time of a refresh; that is the limit of dividing matrix by matrix, and `max_dim` the way past it.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kfe_optax._layers.table import align, quantity
from kfe_optax._linalg.devices import rows_of

Sides = list[tuple[int, int]]
NUMBER = 4  # bytes
MAX_DIM = 8192
# Of one factorization, by the cube of the side: an inverse by Cholesky, an eigendecomposition.
PER_CUBE = {"kfac": 2.0, "ekfac": 9.0}
OPTIMIZERS = tuple(
    f"{method} {how}".strip()
    for method in ("kfac", "ekfac")
    for how in ("", "inverses", "inverses_and_apply", "sharded")
)


class Volume(NamedTuple):
    """Bytes that a device sends: in every step, in an update of the factors, in a refresh of what is made of them."""

    step: float
    factors: float = 0.0
    inverses: float = 0.0

    def mean(self, factor_period: int, inverse_period: int) -> float:
        return self.step + self.factors / factor_period + self.inverses / inverse_period


def predicted(optimizer: str, sides: Sides, devices: int, max_dim: int = MAX_DIM) -> Volume:
    """The volume of "adam", or "kfac" or "ekfac" with, after a space, "inverses", "inverses_and_apply" or "sharded"."""
    method, _, how = optimizer.partition(" ")
    r = (devices - 1) / devices
    parameters = NUMBER * sum(d_in * d_out for d_in, d_out in sides)
    step = 2 * r * parameters
    if method == "adam":
        return Volume(step)
    factors = [d for pair in sides for d in pair]
    every = NUMBER * sum(_numbers(d, max_dim) for d in factors)
    inverses = 0.0
    if how in ("inverses", "inverses_and_apply"):
        own = {d: d * (d + 1) if method == "ekfac" else d * d for d in factors if d <= max_dim}
        inverses = _gathered([(b, own[d], d**3) for d, b in Counter(factors).items() if d in own], devices)
    if how == "inverses_and_apply":
        pairs = [
            (b, d_in * d_out, d_in * d_out * (d_in + d_out)) for (d_in, d_out), b in Counter(sides).items()
        ]
        step += (2 if method == "ekfac" else 1) * _gathered(pairs, devices)
    if how == "sharded":
        step += r * (2 * parameters + NUMBER * sum(_numbers(d_out, max_dim) for _, d_out in sides))
        inverses = r * every
    return Volume(step, 2 * r * every, inverses)


def _numbers(side: int, max_dim: int) -> int:
    return side if side > max_dim else side * side


def _gathered(stacks: list[tuple[int, float, float]], devices: int) -> float:
    """g of stacks of b problems with results of so many numbers, at this cost."""
    total = 0.0
    tables = rows_of(devices, [(many, float(cost)) for many, _, cost in stacks])
    for (many, size, _), table in zip(stacks, tables, strict=True):
        padded = table.size
        total += NUMBER * size * (2 * many if padded > 2 * many else padded)
    return total * (devices - 1) / devices


def largest_share(method: str, sides: Sides, devices: int, max_dim: int = MAX_DIM) -> float:
    """FLOPs of a refresh's factorizations on the device that has the most to do."""
    stacks = [(d, b) for d, b in Counter(d for pair in sides for d in pair).items() if d <= max_dim]
    tables = rows_of(devices, [(b, 2.0 * d**3) for d, b in stacks])
    load = sum(
        PER_CUBE[method] * d**3 * (table >= 0).sum(1) for (d, _), table in zip(stacks, tables, strict=True)
    )
    return float(load.max())


def transformer(layers: int = 24, width: int = 1024, vocabulary: int = 32_000) -> Sides:
    """Query, key, value and output, two layers four times as wide, all with biases, and an embedding that is the head too."""
    block = [(width + 1, width)] * 4 + [(width + 1, 4 * width), (4 * width + 1, width)]
    return [(vocabulary, width), *block * layers]


def resnet50() -> Sides:
    """Convolutions without biases, (k² c_in, c_out), and a classifier of 1,000 classes."""
    sides, channels = [(7 * 7 * 3, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sides += [(channels, width), (9 * width, width), (width, 4 * width)]
            sides += [(channels, 4 * width)] if block == 0 else []
            channels = 4 * width
    return [*sides, (channels + 1, 1000)]


NETWORKS = {
    "A transformer, 24 layers of width 1,024, 32,000 words": transformer,
    "ResNet-50": resnet50,
}


def report(devices: int, gigabytes_a_second: float, factor_period: int, inverse_period: int) -> str:
    """Both networks on so many devices."""
    parts = []
    for title, make in NETWORKS.items():
        sides = make()
        factors = [d for pair in sides for d in pair if d <= MAX_DIM]
        parameters = sum(d_in * d_out for d_in, d_out in sides)
        gradient = predicted("adam", sides, devices).step
        rows = []
        for name in ("adam", *OPTIMIZERS):
            volume = predicted(name, sides, devices)
            mean = volume.mean(factor_period, inverse_period)
            row = [name, *(quantity(v, "B") for v in volume), quantity(mean, "B")]
            row += [f"{mean / gradient:.2f}", f"{1e3 * mean / (1e9 * gigabytes_a_second):.1f}"]
            method, _, how = name.partition(" ")
            if method in PER_CUBE:
                among = devices if how.startswith("inverses") else 1
                state = 2 * NUMBER * sum(_numbers(d, MAX_DIM) for pair in sides for d in pair)
                state += NUMBER * parameters if method == "ekfac" else 0
                share = quantity(largest_share(method, sides, among), "FLOP")
                row += [share, quantity(state / (devices if how == "sharded" else 1), "B")]
            else:
                row += ["", quantity(2 * NUMBER * parameters, "B")]
            rows.append(row)
        header = (
            "optimizer",
            "every step",
            "factors",
            "inverses",
            "mean step",
            "× gradient",
            "ms",
            "refresh",
            "state",
        )
        parts.append(
            f"{title}: {parameters:,} parameters, {len(factors)} factors of up to {max(factors):,}, "
            f"{quantity(NUMBER * sum(d * d for d in factors), 'B')}\n\n"
            + align(header, rows, right=range(1, 9))
        )
    parts.append(
        f"Bytes that each of {devices:,} devices sends; a mean step updates the factors every {factor_period} steps and what is "
        f"made of them every {inverse_period}; its\nmilliseconds are those of {gigabytes_a_second:g} GB/s a device, nothing "
        "overlapped. Refresh: factorizations of the device that has the most. State:\nbytes a device, of the preconditioner."
    )
    return "\n\n".join(parts)
