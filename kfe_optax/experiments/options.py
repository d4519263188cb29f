"""An optimizer's options as config fields, read from its signature and its docstring: they are spelled nowhere twice."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict, config_dict

import kfe_optax as kfe
from kfe_optax.experiments.errors import ExperimentError
from kfe_optax.experiments.schedules import as_schedule

# What a config cannot say: the layers are found in its model, and these are functions, trees or objects.
_NO_FIELDS = ("layers", "mask", "rest", "coefficients")
# Numbers that always are schedules, so that the command line sets their parts.
_SCHEDULES = ("learning_rate", "damping", "coarse_damping")
_TYPES = (("tuple", tuple), ("int", int), ("float", float), ("ScalarOrSchedule", float))


def fields_of(make: Callable[..., Any], **given: Any) -> ConfigDict:
    """A field for every option of ``make`` that a config can say, at ``given``'s value or its own default.

    What is None, and what has no default and is not given, is an empty field of the option's type.
    """
    options = inspect.signature(make).parameters
    fields = {
        name: given.pop(name, None if option.default is option.empty else option.default)
        for name, option in options.items()
        if name not in _NO_FIELDS and option.kind is not option.VAR_KEYWORD
    }
    # What the signature has not is the optimizer's to refuse.
    return ConfigDict({name: _field(name, value, options) for name, value in {**fields, **given}.items()})


def _field(name: str, value: Any, options: Mapping[str, inspect.Parameter]) -> Any:
    if value is None:
        annotation = str(options[name].annotation) if name in options else ""
        return config_dict.placeholder(next((kind for word, kind in _TYPES if word in annotation), str))
    if isinstance(value, ConfigDict) or name in _SCHEDULES:
        return as_schedule(value)
    return value


def descriptions(make: Callable[..., Any]) -> dict[str, str]:
    """{option: the first sentence about it in the docstring}, through "see `kfe.other`" to where it is written.

    An option that is one of several words has these words.
    """
    documented = inspect.getdoc(make) or ""
    entries = documented.partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = {}
    for entry in re.split(r"\n  (?=\S)", f"\n{entries}"):
        names, colon, text = entry.partition(":")
        if not colon:
            continue
        text = " ".join(text.split())
        elsewhere = re.match(r"see `(?:kfe\.)?([\w.]+)`", text)
        written = _described(elsewhere.group(1)) if elsewhere else {}
        for name in re.split(r",\s+", names.strip()):
            sentence = re.split(r"(?<=[.;]) ", written.get(name, text))[0].rstrip(";.")
            found[name] = _choices(make, name) or sentence
    return found


def _choices(make: Callable[..., Any], name: str) -> str:
    options = get_type_hints(make).get(name)
    kinds = [kind for kind in (options, *get_args(options)) if get_origin(kind) is Literal]
    return ", ".join(repr(word) for kind in kinds for word in get_args(kind))


def _described(name: str) -> dict[str, str]:
    make: Any = kfe
    for part in name.split("."):
        make = getattr(make, part, None)
    return descriptions(make) if callable(make) else {}


def configured(layers: kfe.Layers, text: str) -> kfe.Layers:
    """The layers as ``config.layers`` has them: "PATTERN:OPTION=VALUE,...", or "PATTERN:without", with ";" in between."""
    for part in filter(None, map(str.strip, text.split(";"))):
        pattern, _, words = (piece.strip() for piece in part.rpartition(":"))
        try:
            if words == "without":
                layers = layers.without(pattern)
                continue
            options: dict[str, Any] = {}
            for option in words.split(","):
                name, _, value = (piece.strip() for piece in option.partition("="))
                if not (name and value):
                    raise ValueError(f"{option!r} is no option.")
                options[name] = int(value) if value.isdecimal() else value
            layers = layers.configure(pattern, **options)
        except (TypeError, ValueError) as error:
            form = "Write PATTERN:OPTION=VALUE or PATTERN:without, as in 'Conv_*:approximation=sua'."
            raise ExperimentError(
                f"config.layers holds '{part}', which cannot be used: {error} {form}"
            ) from error
    return layers
