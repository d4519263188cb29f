"""The layers of a model as an aligned text table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp


def align(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of text in columns two spaces apart; the columns in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        parts = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), line(["─" * w for w in widths]), *map(line, rows)])


def quantity(value: float, unit: str) -> str:
    """A number with three digits and a decimal prefix, 1.23 MB."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"


def state_bytes(layer: Any, max_dim: int | None) -> int:
    """Bytes of the two factors and their inverses (or bases) of one layer; a diagonal side keeps vectors."""
    item = jnp.dtype(layer.factor_dtype).itemsize
    elements = (
        math.prod(layer.side_stack(side)) * (d if layer.is_diagonal(side, max_dim) else d * d)
        for side, d in enumerate(layer.sides)
    )
    return 2 * item * sum(elements)


def refresh_flops(layer: Any, max_dim: int | None) -> float:
    """Floating-point operations of one basis refresh: about 9 d³ for the eigendecomposition of a d × d factor."""
    return 9.0 * sum(
        math.prod(layer.side_stack(side)) * d**3
        for side, d in enumerate(layer.sides)
        if not layer.is_diagonal(side, max_dim)
    )


def _kind(layer: Any) -> str:
    """The kind, with what differs from its default."""
    notes = [layer.kind.approximation] if layer.kind != layer.kind.plain() else []
    notes += [layer.sharing] if layer.sharing != "expand" else []
    return layer.kind.name + (f" ({', '.join(notes)})" if notes else "")


def layer_table(
    layers: Sequence[Any],
    rest: Sequence[Any],
    reasons: Sequence[str],
    sizes: Sequence[int],
    max_dim: int | None,
) -> str:
    """One row a layer, a line of totals, and below it the parameters outside every layer with the reason for each."""
    header = ("layer", "kind", "parameters", "matrix", "stacked", "positions", "state", "refresh")
    rows = []
    for layer in layers:
        d_in, d_out = layer.sides
        diagonal = [name for side, name in enumerate(("in", "out")) if layer.is_diagonal(side, max_dim)]
        positions = (
            str(layer.positions) if layer.has_rows else "shared" if layer.aligned else "examples unknown"
        )
        if not layer.has_rows and layer.per_example:
            # Per-example gradients are kept only while a refresh that asks for them runs.
            examples = layer.examples * math.prod(layer.shape) * jnp.dtype(layer.factor_dtype).itemsize
            positions += f" (per-example gradients {quantity(examples, 'B')})"
        rows.append(
            (
                layer.name,
                _kind(layer),
                f"{layer.size:,}",
                f"{d_in} × {d_out}" + (f" (diagonal: {', '.join(diagonal)})" if diagonal else ""),
                " × ".join(map(str, layer.stack_shape)) or "–",
                positions,
                quantity(state_bytes(layer, max_dim), "B"),
                quantity(refresh_flops(layer, max_dim), "FLOP"),
            )
        )
    counted = sum(layer.size for layer in layers)
    state = sum(state_bytes(layer, max_dim) for layer in layers)
    flops = sum(refresh_flops(layer, max_dim) for layer in layers)
    text = align(header, rows, right=(2, 6, 7))
    text += (
        f"\n{len(layers)} layers, {counted:,} parameters; factors and bases {quantity(state, 'B')}, "
        f"a refresh {quantity(flops, 'FLOP')}"
    )
    if rest:
        outside = [
            ("/".join(map(str, path)), f"{size:,}", reason)
            for path, size, reason in zip(rest, sizes, reasons, strict=True)
        ]
        text += "\n\n" + align(("outside every layer", "parameters", "reason"), outside, right=(1,))
    return text
