"""``config.layers``: what is done with the layers that the library finds in a model."""

from __future__ import annotations

from typing import Any

import kfe_optax as kfe
from kfe_optax.experiments.errors import ExperimentError


def configured(layers: kfe.Layers, text: str) -> kfe.Layers:
    """The layers as ``config.layers`` has them: "PATTERN:OPTION=VALUE,...", or "PATTERN:without", with ";" in between.

    Raises:
      ExperimentError: the text is not of this form, or the library refuses what it says.

    Example::

        configured(layers, "Conv_*:approximation=sua; Dense_2:without")
    """
    for part in filter(None, map(str.strip, text.split(";"))):
        pattern, _, options = (piece.strip() for piece in part.rpartition(":"))
        try:
            left_out = options == "without"
            layers = layers.without(pattern) if left_out else layers.configure(pattern, **_options(options))
        except (TypeError, ValueError) as error:
            raise ExperimentError(
                f"config.layers holds '{part}', which cannot be used: {error} Write PATTERN:OPTION=VALUE or PATTERN:without, as "
                "in 'Conv_*:approximation=sua'."
            ) from error
    return layers


def _options(text: str) -> dict[str, Any]:
    found = {}
    for option in text.split(","):
        name, equals, value = (piece.strip() for piece in option.partition("="))
        if not (name and equals and value):
            raise ValueError(f"{option!r} is no option.")
        found[name] = int(value) if value.isdecimal() else value
    return found
