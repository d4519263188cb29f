"""The house's docstrings for mkdocstrings: what the parser of Google's style does not know of them is put into its words."""

from __future__ import annotations

import re
from typing import Any

import griffe

# "    damping, size,\n      decay: see `kfe.kfac`." : names that are explained together, over more than one line.
_NAMES = re.compile(r"^( *)((?:\w+, )*\w+,)\n +(?=(?:\w+(?:, |,\n|: ))+)", re.MULTILINE)
_TYPE = re.compile(r"^( *Returns:\n *)`([\w.]+)`: ", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class HouseStyle(griffe.Extension):
    """`Example:` is a section of examples; names that are explained together stand on one line; types have no backticks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = _TYPE.sub(r"\1\2: ", _EXAMPLE.sub(r"\1Examples:", obj.docstring.value))
        changed = True
        while changed:
            text, changed = _NAMES.subn(r"\1\2 ", text)
        obj.docstring.value = text
