"""Kinds of layers: how parameters form the matrix W̄, and how an input and an output gradient form rows.

One kind a file, one line in `KINDS`. A kind knows neither a framework nor an optimizer: rules say which equations are of which
kind, and everything else (riders, factors, transforms, the conformance tests) goes through `Kind`.
"""

from kfe_optax._layers.kinds.base import Kind
from kfe_optax._layers.kinds.conv import Conv
from kfe_optax._layers.kinds.dense import Dense
from kfe_optax._layers.kinds.embedding import Embedding
from kfe_optax._layers.kinds.norm import Norm

__all__ = [
    "Conv",
    "Dense",
    "Embedding",
    "Kind",
    "Norm",
]

KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Dense, Conv, Embedding, Norm)}
