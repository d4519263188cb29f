"""The one exception that the commands turn into a sentence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


class ExperimentError(ValueError):
    """A mistake in a command, a config or a data file that one sentence explains.

    ``kfe-optax`` prints the sentence and exits with status 2, and so it does for what the library refuses and for
    files that the system denies; everything else keeps its traceback, because everything else is a
    defect of the program and not of its input.
    """


def require(condition: object, sentence: str) -> None:
    """Raises an ``ExperimentError`` with the sentence where the condition does not hold."""
    if not condition:
        raise ExperimentError(sentence)


def chosen(field: str, value: Any, choices: Collection[Any]) -> Any:
    """What ``value``, that of ``field``, names among ``choices``; it itself where they are no mapping."""
    require(value in choices, f"{field} is '{value}'; choose one of {', '.join(map(str, choices))}.")
    return choices[value] if isinstance(choices, Mapping) else value
